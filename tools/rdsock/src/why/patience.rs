//! Looks at processes that may keep whoever looks waiting: one in the middle of `exec`, or one that waits for a file
//! which does not answer, holds the lock that its mappings are read under.
//!
//! Each look runs on a thread. One that is held up is left behind, and others go on with the rest.

use std::collections::{HashSet, VecDeque};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// After such a time without news, a further thread helps.
const NUDGE: Duration = Duration::from_millis(100);
/// Threads, at most.
const THREADS: usize = 64;
/// For all looks together; what is not seen by then is left out.
const PATIENCE: Duration = Duration::from_secs(5);
/// For one more look when that is used up.
const LAST: Duration = Duration::from_millis(200);

type Queue = Arc<Mutex<VecDeque<i32>>>;

/// How long looks may be held up from now on.
#[derive(Debug)]
pub struct Patience(Duration);

impl Default for Patience {
    fn default() -> Self {
        Patience(PATIENCE)
    }
}

impl Patience {
    /// Looks at each process; also returns those that held up who looked.
    pub fn look_at_each<T: Send + 'static>(
        &mut self,
        pids: &[i32],
        look: impl Fn(i32) -> T + Clone + Send + 'static,
    ) -> (Vec<(i32, T)>, Vec<i32>) {
        let start = Instant::now();
        let (seen, stuck) = look_until(start + self.0.max(LAST), pids, look);
        if !stuck.is_empty() {
            self.0 = self.0.saturating_sub(start.elapsed());
        }
        (seen, stuck)
    }
}

fn look_until<T: Send + 'static>(
    end: Instant,
    pids: &[i32],
    look: impl Fn(i32) -> T + Clone + Send + 'static,
) -> (Vec<(i32, T)>, Vec<i32>) {
    let queue: Queue = Arc::new(Mutex::new(pids.iter().copied().collect()));
    let (sender, results) = channel();
    let start = || start(queue.clone(), sender.clone(), look.clone());
    let (mut threads, mut seen) = (start(), Vec::new());
    while seen.len() < pids.len() {
        match results.recv_timeout(NUDGE) {
            Ok(one) => seen.push(one),
            Err(RecvTimeoutError::Timeout) if Instant::now() < end => {
                if threads < THREADS {
                    threads += start();
                }
            }
            Err(_) => break,
        }
    }
    let done: HashSet<i32> = seen.iter().map(|(pid, _)| *pid).collect();
    let stuck = pids.iter().copied().filter(|pid| !done.contains(pid));
    (seen, stuck.collect())
}

/// Starts a thread. Returns how many there are more: the system may have none left.
fn start<T: Send + 'static>(
    queue: Queue,
    sender: Sender<(i32, T)>,
    look: impl Fn(i32) -> T + Send + 'static,
) -> usize {
    let thread = thread::Builder::new().name("look".into());
    let started = thread.spawn(move || {
        loop {
            let next = queue
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop_front();
            let Some(pid) = next else { return };
            if sender.send((pid, look(pid))).is_err() {
                return;
            }
        }
    });
    usize::from(started.is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn who_holds_up_is_named_and_holds_up_nobody_else() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let reader = Arc::new(reader);
        let pids: Vec<i32> = (1..1000).collect();
        let mut patience = Patience::default();
        let (seen, stuck) = patience.look_at_each(&pids, move |pid| {
            if pid % 400 == 3 {
                // Nobody writes.
                let _ = (&*reader).read(&mut [0]);
            }
            pid * 2
        });
        assert_eq!(stuck, [3, 403, 803]);
        assert_eq!(seen.len(), pids.len() - 3);
        assert!(seen.iter().all(|(pid, twice)| *twice == pid * 2));
        assert!(patience.look_at_each(&[], |pid| pid).0.is_empty());
        // It is used up, and a look is taken all the same.
        assert_eq!(patience.0, Duration::ZERO);
        assert_eq!(patience.look_at_each(&[7], |pid| pid).0, [(7, 7)]);
    }
}
