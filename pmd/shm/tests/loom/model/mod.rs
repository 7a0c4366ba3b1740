//! What the loom tests are made of: the kernel's side of a connection as a pipe of bytes, and the memory of a stream, which
//! loom watches. What an end does with both is the code that ships, `rdsock_shm::end`.

#![allow(dead_code)]

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use loom::sync::{Condvar, Mutex};
use rdsock_shm::layout::{Direction, NOT_SWITCHED};
use rdsock_shm::lock::{self, Owner, Taken};
use rdsock_shm::ring::RingMemory;
use std::collections::VecDeque;

pub mod end;

/// Checks every interleaving with at most `preemptions` preemptions. More with the environment:
/// `LOOM_MAX_PREEMPTIONS` sets the number for all, `RDSOCK_SOAK` adds to it.
pub fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let number = |name| {
        std::env::var(name)
            .ok()
            .and_then(|value| value.parse::<usize>().ok())
    };
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 20_000;
    builder.preemption_bound = Some(
        number("LOOM_MAX_PREEMPTIONS").unwrap_or(preemptions) + number("RDSOCK_SOAK").unwrap_or(0),
    );
    let runs = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counted = runs.clone();
    builder.check(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        model();
    });
    println!(
        "{} interleavings",
        runs.load(std::sync::atomic::Ordering::Relaxed)
    );
}

/// The memory of a ring.
pub struct Memory(Box<[UnsafeCell<u8>]>);

// SAFETY: the cells are used through a ring's halves; loom reports every race on them.
unsafe impl Sync for Memory {}
// SAFETY: as above.
unsafe impl Send for Memory {}

impl Memory {
    pub fn new(size: usize) -> Self {
        Memory((0..size).map(|_| UnsafeCell::new(0)).collect())
    }

    pub fn ring(&self) -> RingMemory {
        // SAFETY: the test keeps the memory as long as the halves that use it.
        unsafe { RingMemory::new(self.0.as_ptr(), self.0.len() as u64) }
    }
}

/// A direction as the daemon makes it.
pub fn direction() -> Direction {
    let direction = Direction::default();
    direction
        .producer
        .switch_at
        .store(NOT_SWITCHED, std::sync::atomic::Ordering::Relaxed);
    direction
}

/// One direction of a TCP connection: a FIFO of bytes with an end, as the kernel keeps it.
pub struct Pipe {
    state: Mutex<Kernel>,
    arrived: Condvar,
    taken: Condvar,
    /// Bytes that have room.
    room: usize,
}

struct Kernel {
    bytes: VecDeque<u8>,
    sent: u64,
    ended: bool,
}

/// What a receive call gives.
#[derive(Debug, PartialEq, Eq)]
pub enum Given {
    Bytes(Vec<u8>),
    Nothing,
    End,
}

impl Pipe {
    pub fn new() -> Self {
        Self::with_room(usize::MAX)
    }

    /// One in which so many bytes have room.
    pub fn with_room(room: usize) -> Self {
        Pipe {
            room,
            taken: Condvar::new(),
            state: Mutex::new(Kernel {
                bytes: VecDeque::new(),
                sent: 0,
                ended: false,
            }),
            arrived: Condvar::new(),
        }
    }

    /// `send`, blocking.
    pub fn send(&self, bytes: &[u8]) {
        let mut done = self.send_now(bytes);
        while done < bytes.len() {
            self.wait_for_room();
            done += self.send_now(&bytes[done..]);
        }
    }

    /// `send(MSG_DONTWAIT)`: how many.
    pub fn send_now(&self, bytes: &[u8]) -> usize {
        let mut state = self.state.lock().unwrap();
        assert!(!state.ended, "sent behind the end");
        let room = self.room.saturating_sub(state.bytes.len());
        let sent = bytes.len().min(room);
        state.bytes.extend(&bytes[..sent]);
        state.sent += sent as u64;
        self.arrived.notify_all();
        sent
    }

    /// `poll(POLLOUT)`.
    pub fn wait_for_room(&self) {
        let mut state = self.state.lock().unwrap();
        while state.bytes.len() >= self.room {
            state = self.taken.wait(state).unwrap();
        }
    }

    /// `shutdown(SHUT_WR)`, or the death of the sender.
    pub fn end(&self) {
        self.state.lock().unwrap().ended = true;
        self.arrived.notify_all();
    }

    /// Bytes ever sent: `tcpi_bytes_acked` and `SIOCOUTQ`.
    pub fn sent(&self) -> u64 {
        self.state.lock().unwrap().sent
    }

    /// Bytes ever received by the program: `tcpi_bytes_received` less `FIONREAD`.
    pub fn received(&self) -> u64 {
        let state = self.state.lock().unwrap();
        state.sent - state.bytes.len() as u64
    }

    /// `FIONREAD`.
    pub fn unread(&self) -> u64 {
        self.state.lock().unwrap().bytes.len() as u64
    }

    /// `recv(MSG_DONTWAIT)` of at most `most` bytes.
    pub fn receive(&self, most: u64) -> Given {
        let mut state = self.state.lock().unwrap();
        let most = (most as usize).min(state.bytes.len());
        match most {
            0 if state.ended && state.bytes.is_empty() => Given::End,
            0 => Given::Nothing,
            _ => {
                let bytes = state.bytes.drain(..most).collect();
                self.taken.notify_all();
                Given::Bytes(bytes)
            }
        }
    }

    /// `recv(MSG_DONTWAIT | MSG_PEEK)` of at most `most` bytes, or `poll(POLLIN)` without a wait.
    pub fn look(&self, most: usize) -> Given {
        let state = self.state.lock().unwrap();
        let bytes: Vec<u8> = state.bytes.iter().copied().take(most).collect();
        match bytes.len() {
            0 if state.ended => Given::End,
            0 => Given::Nothing,
            _ => Given::Bytes(bytes),
        }
    }

    /// True behind the end.
    pub fn has_ended(&self) -> bool {
        self.state.lock().unwrap().ended
    }

    /// `recv(MSG_PEEK)` of one byte, blocking, or `poll(POLLIN)`. False at the end.
    pub fn sleep(&self) -> bool {
        let mut state = self.state.lock().unwrap();
        while state.bytes.is_empty() && !state.ended {
            state = self.arrived.wait(state).unwrap();
        }
        !state.bytes.is_empty()
    }
}

/// Where threads sleep on words.
#[derive(Default)]
pub struct Futex {
    bucket: Mutex<()>,
    woken: Condvar,
}

impl Futex {
    /// FUTEX_WAIT, without an end of time.
    pub fn sleep(&self, word: &AtomicU32, value: u32) {
        let bucket = self.bucket.lock().unwrap();
        if word.load(Ordering::SeqCst) == value {
            drop(self.woken.wait(bucket).unwrap());
        }
    }

    /// FUTEX_WAKE; or the end of the time.
    pub fn wake(&self) {
        drop(self.bucket.lock().unwrap());
        self.woken.notify_all();
    }
}

/// Takes a lock, whoever has it.
pub fn take(word: &AtomicU64, me: Owner) -> Taken {
    loop {
        match lock::try_take(word, me) {
            Ok(taken) => return taken,
            Err(_) => loom::thread::yield_now(),
        }
    }
}
