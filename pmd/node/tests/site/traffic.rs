//! Programs on their anchors that send and receive without end, and check each byte.

use super::LIMIT;
use std::io::{Error, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Instant;

/// Repeats after a number of bytes that is no multiple of a ring or page.
const PERIOD: usize = 251 * 1021;
const BLOCK: usize = 16 << 10;

/// One end of a connection whose other end does the same.
pub struct Traffic {
    /// Bytes that came, all of them right.
    received: Arc<AtomicU64>,
    reading: JoinHandle<Error>,
    writing: JoinHandle<Error>,
}

fn pattern() -> Vec<u8> {
    let byte = |i: usize| (i as u32).wrapping_mul(0x9e37_79b1).rotate_left(9) as u8;
    (0..PERIOD + BLOCK).map(|i| byte(i % PERIOD)).collect()
}

impl Traffic {
    pub fn start(program: &TcpStream) -> Self {
        program.set_read_timeout(Some(LIMIT)).unwrap();
        program.set_write_timeout(Some(LIMIT)).unwrap();
        let pattern = Arc::new(pattern());
        let received = Arc::new(AtomicU64::new(0));
        let (mut reader, right, count) = (
            program.try_clone().unwrap(),
            pattern.clone(),
            received.clone(),
        );
        let reading = std::thread::spawn(move || {
            let mut block = vec![0; BLOCK];
            loop {
                match reader.read(&mut block) {
                    Ok(0) => return ErrorKind::UnexpectedEof.into(),
                    Ok(len) => {
                        let at = count.load(Relaxed) as usize % PERIOD;
                        assert!(block[..len] == right[at..at + len], "wrong bytes");
                        count.fetch_add(len as u64, Relaxed);
                    }
                    Err(error) => return error,
                }
            }
        });
        let mut writer = program.try_clone().unwrap();
        let writing = std::thread::spawn(move || {
            let mut sent = 0;
            loop {
                let at = sent % PERIOD;
                match writer.write(&pattern[at..at + BLOCK]) {
                    Ok(len) => sent += len,
                    Err(error) => return error,
                }
            }
        });
        Traffic {
            received,
            reading,
            writing,
        }
    }

    /// Waits until so many more bytes have come.
    pub fn moves(&self, bytes: u64) {
        let from = self.received.load(Relaxed);
        let end = Instant::now() + LIMIT;
        while self.received.load(Relaxed) < from + bytes {
            assert!(Instant::now() < end, "nothing moves after {from} bytes");
            assert!(!self.reading.is_finished(), "it ended after {from} bytes");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// Waits for its end, which is one that TCP may have.
    pub fn ended(self) {
        let allowed = |error: Error| {
            matches!(
                error.kind(),
                ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
            )
        };
        let read = self.reading.join().expect("every byte is right");
        assert!(allowed(Error::from(read.kind())), "reading ended: {read}");
        let wrote = self.writing.join().expect("the writer ends");
        assert!(allowed(Error::from(wrote.kind())), "writing ended: {wrote}");
    }
}
