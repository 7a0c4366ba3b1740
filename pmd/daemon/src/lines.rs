//! Lines of the log, on their way to standard error.
//!
//! Who reads there may be slow, or stopped: a journal that somebody else floods, a terminal, a pipe that is full. So a thread of its own
//! writes, and nobody else waits for it. Lines for which there is no room are left out, and counted.
//!
//! `log.rs` gives lines, whichever thread has something to say; the daemon starts the thread, and waits a moment for it at the end.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;

/// Bytes that may wait.
const ROOM: usize = 1 << 20;
/// At the end, what is still to be written is waited for so long.
const FAREWELL: Duration = Duration::from_millis(500);

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Lines(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    /// Signalled when there is something to write.
    come: Condvar,
    /// Signalled when all is written.
    done: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    /// There is a thread that writes. Before, whoever gives a line writes it.
    has_writer: bool,
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    left_out: u64,
    /// One is being written.
    under_way: bool,
}

impl Lines {
    /// From now on a thread writes.
    pub fn start_writer(&self) -> io::Result<()> {
        let shared = self.0.clone();
        let writer = thread::Builder::new().name("log".into());
        writer.spawn(move || shared.write(write))?;
        self.0.lock().has_writer = true;
        Ok(())
    }

    /// One more line. Waits for nobody, once there is a thread that writes.
    pub fn give(&self, line: &[u8]) {
        let mut waiting = self.0.lock();
        if !waiting.has_writer {
            drop(waiting);
            return write(line);
        }
        waiting.give(line);
        drop(waiting);
        self.0.come.notify_one();
    }

    /// Waits until all is written, but not for long.
    pub fn finish(&self) {
        let is_busy = |waiting: &mut Waiting| waiting.under_way || !waiting.lines.is_empty();
        let waiting = self.0.lock();
        let _ = self.0.done.wait_timeout_while(waiting, FAREWELL, is_busy);
    }
}

impl io::Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.give(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Waiting {
    fn give(&mut self, line: &[u8]) {
        if self.bytes + line.len() > ROOM {
            self.left_out += 1;
            return;
        }
        self.bytes += line.len();
        self.lines.push_back(line.to_vec());
    }

    /// The next one to be written. Behind the last one, how many were left out.
    fn next(&mut self) -> Option<Vec<u8>> {
        let line = self.lines.pop_front();
        if let Some(line) = line {
            self.bytes -= line.len();
            return Some(line);
        }
        let left_out = std::mem::take(&mut self.left_out);
        (left_out != 0).then(|| {
            format!("{left_out} lines were left out, since nobody read the log\n").into_bytes()
        })
    }
}

impl Shared {
    /// Never held while something is written.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, write: fn(&[u8])) -> ! {
        let mut waiting = self.lock();
        loop {
            let Some(line) = waiting.next() else {
                waiting.under_way = false;
                self.done.notify_all();
                let woken = self.come.wait(waiting);
                waiting = woken.unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            waiting.under_way = true;
            drop(waiting);
            write(&line);
            waiting = self.lock();
        }
    }
}

/// Not by the library's way, whose lock others would have to wait for. What can't be written is lost: a disk may be full.
fn write(mut line: &[u8]) {
    while !line.is_empty() {
        match nix::unistd::write(io::stderr().as_fd(), line) {
            Ok(written) => line = line.get(written..).unwrap_or_default(),
            Err(Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is_no_room_for_is_counted() {
        let mut waiting = Waiting::default();
        let line = vec![b'a'; ROOM / 4];
        (0..6).for_each(|_| waiting.give(&line));
        let all: Vec<_> = std::iter::from_fn(|| waiting.next()).collect();
        assert_eq!(all.len(), 5);
        let last = String::from_utf8(all[4].clone()).unwrap();
        assert!(last.starts_with("2 lines were left out"), "{last}");
        assert!(waiting.bytes == 0 && waiting.next().is_none());
    }

    #[test]
    fn nobody_waits_for_a_writer_that_is_held_up() {
        fn for_ever(_: &[u8]) {
            thread::sleep(Duration::from_secs(600));
        }
        let lines = Lines::default();
        let shared = lines.0.clone();
        thread::spawn(move || shared.write(for_ever));
        lines.0.lock().has_writer = true;
        let start = std::time::Instant::now();
        (0..10_000).for_each(|_| lines.give(&[b'a'; 1000]));
        lines.finish();
        assert!(start.elapsed() < Duration::from_secs(60));
        assert!(lines.0.lock().left_out > 0);
    }
}
