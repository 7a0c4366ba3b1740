//! The queue of requests to the daemon, and what is told through it when a connection or a stream
//! ends.

use super::attach::{detach, has_hung_up};
use super::link::link;
use super::lock::{Guard, Shared};
use super::memory::{count, memory};
use super::messages::send_with;
use crate::conn::{self, Conn};
use crate::identity;
use crate::state::PROCESS;
use crate::stream::{self, Stream};
use libc::c_int;
use rdsock_shm::control::{Message, Request, kind, request};
use rdsock_shm::layout::{Counter, QUEUE_SLOTS, QueueSlot};
use rdsock_shm::queue::Putter;
use rdsock_shm::reason::{Reason, State};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*, fence};

/// The requests of a process.
#[derive(Debug)]
pub struct Requests {
    putter: Shared<Putter>,
    /// Requests to a daemon that has not sent the memory yet through which it takes them. As a queue there: it is copied.
    waiting: [QueueSlot; QUEUE_SLOTS],
    /// 1 when there is something in it.
    do_wait: AtomicU32,
}

impl Requests {
    /// None.
    pub const fn new() -> Self {
        Requests {
            putter: Shared(UnsafeCell::new(Putter::new())),
            waiting: [const {
                QueueSlot {
                    sequence: AtomicU64::new(0),
                    words: [const { AtomicU64::new(0) }; 15],
                }
            }; QUEUE_SLOTS],
            do_wait: AtomicU32::new(0),
        }
    }

    /// What an earlier daemon was asked is void.
    ///
    /// # Safety
    /// The tenant's lock is held.
    unsafe fn empty(&self) {
        if self.do_wait.swap(0, Relaxed) != 0 {
            self.waiting
                .iter()
                .for_each(|slot| slot.sequence.store(0, Relaxed));
        }
        // SAFETY: the lock is held.
        unsafe { *self.putter.0.get() = Putter::new() };
    }

    /// Puts a request into the daemon's queue, or (`None`) where it waits for that. False where there is no room.
    ///
    /// # Safety
    /// The tenant's lock is held.
    unsafe fn put(&self, queue: Option<&[QueueSlot; QUEUE_SLOTS]>, request: &Request) -> bool {
        if queue.is_none() {
            self.do_wait.store(1, Relaxed);
        }
        // SAFETY: the lock is held.
        let putter = unsafe { &mut *self.putter.0.get() };
        putter.put(queue.unwrap_or(&self.waiting), request)
    }

    fn waiting(&self) -> Option<&[QueueSlot; QUEUE_SLOTS]> {
        (self.do_wait.load(Relaxed) != 0).then_some(&self.waiting)
    }
}

/// Another daemon is told HELLO: what an earlier one was asked is void.
pub(super) fn empty_queue(_guard: &Guard) {
    // SAFETY: the lock is held.
    unsafe { PROCESS.tenant.requests.empty() };
    forget_untold();
}

/// Nobody has to be told of what was closed: it was another daemon's, or another process's.
pub(super) fn forget_untold() {
    conn::tell_untold(|_, conn, _| {
        // SAFETY: the lock is held.
        if let Some(offer) = unsafe { conn.take_offer() } {
            offer.close();
        }
        true
    });
}

/// The requests that wait for the daemon's memory, if there are some.
pub(super) fn waiting(_guard: &Guard) -> Option<&'static [QueueSlot; QUEUE_SLOTS]> {
    PROCESS.tenant.requests.waiting()
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Put {
    Done,
    /// There is no room in the queue now.
    Full,
    /// There is no daemon.
    Nobody,
}

/// Puts a request; the daemon is kicked when it sleeps. One that has not sent its memory yet finds it there. The lock is held.
pub(super) fn put(guard: &Guard, request: &Request) -> bool {
    try_put(guard, request) == Put::Done
}

fn try_put(_guard: &Guard, request: &Request) -> Put {
    let Some(memory) = memory() else {
        return Put::Nobody;
    };
    let control = link().control.load(Relaxed);
    if control < 0 {
        return Put::Nobody;
    }
    let waits = link().greeting.load(Relaxed) != 0;
    let queue = (!waits).then_some(&memory.queue);
    // SAFETY: the lock is held.
    if !unsafe { PROCESS.tenant.requests.put(queue, request) } {
        count(Counter::QueueFull);
        if has_hung_up(control) {
            detach();
            return Put::Nobody;
        }
        return Put::Full;
    }
    if waits {
        return Put::Done;
    }
    fence(SeqCst);
    if memory.header.daemon_sleeps.load(Relaxed) != 0 {
        memory.header.daemon_sleeps.store(0, Relaxed);
        let sent = send_with(control, &Message::empty(kind::KICK), &[]);
        if sent < 0 && sent != -(libc::EAGAIN as isize) {
            detach();
            return Put::Nobody;
        }
    }
    Put::Done
}

pub(super) fn blank(what: u32, index: usize, conn: &Conn) -> Request {
    Request {
        what,
        conn: index as u32,
        generation: conn.generation.load(Relaxed),
        fd: conn.fd.load(Relaxed),
        cookie: 0,
        netns: 0,
        stream_id: 0,
        local: [0; 16],
        peer: [0; 16],
        local_port: 0,
        peer_port: 0,
        active: 0,
        extra: 0,
        reserved: [0; 4],
    }
}

/// Keeps a connection on the kernel for ever.
pub fn keep_on_kernel(index: usize, conn: &Conn, reason: Reason) {
    if conn.keep_on_kernel(index, reason) {
        tell_or_owe(index, conn, None);
    }
}

/// See [`conn::Told`]. False where the daemon has to be told later.
pub fn closed(index: usize, conn: &Conn, stream: Option<&Stream>) -> bool {
    let had = stream.map(|stream| {
        stream.let_go(stream::pid());
        (stream.id, stream.end_number())
    });
    tell_or_owe(index, conn, had)
}

fn tell_or_owe(index: usize, conn: &Conn, stream: Option<(u64, u32)>) -> bool {
    match Guard::take() {
        Some(guard) => tell_of_close(&guard, index, conn, stream),
        // In a handler, on top of who holds the lock; a `vfork` child has nobody to tell.
        None => identity::is_foreign(),
    }
}

fn tell_of_close(guard: &Guard, index: usize, conn: &Conn, stream: Option<(u64, u32)>) -> bool {
    // SAFETY: the lock is held.
    if let Some(offer) = unsafe { conn.take_offer() } {
        offer.close();
    }
    let (stream_id, active) = stream.unwrap_or_default();
    let closed = Request {
        stream_id,
        active,
        ..blank(request::CLOSED, index, conn)
    };
    try_put(guard, &closed) != Put::Full
}

/// Tells the daemon of what was closed while its queue was full, or this thread held the tenant's lock further up its stack.
#[cold]
pub(super) fn tell_untold() {
    if let Some(guard) = Guard::take_soon() {
        conn::tell_untold(|index, conn, stream| tell_of_close(&guard, index, conn, stream));
    }
}

/// A stream was demoted or reset.
pub fn stream_left(fd: c_int, stream: &Stream, state: State, reason: Reason) {
    let Some(held) = conn::of(fd) else { return };
    held.conn.tell(held.index, state, reason);
    if let Some(guard) = Guard::take_soon() {
        put(
            &guard,
            &Request {
                stream_id: stream.id,
                extra: reason as u32,
                ..blank(request::LEFT, held.index, held.conn)
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdsock_shm::control;

    #[test]
    fn requests_wait_for_the_memory_of_the_daemon_that_they_are_for() {
        let requests = Requests::new();
        let request: Request = control::from_bytes(&[0; size_of::<Request>()]).unwrap();
        // SAFETY: no other thread has them.
        let put = || unsafe { requests.put(None, &request) };
        assert!(requests.waiting().is_none());
        for _ in 0..QUEUE_SLOTS {
            assert!(put());
        }
        assert!(!put(), "more than there is room for");
        assert!(requests.waiting().is_some());
        // Another daemon: what the first was asked is void.
        // SAFETY: likewise.
        unsafe { requests.empty() };
        assert!(requests.waiting().is_none());
        assert!(put() && requests.waiting().is_some());
    }
}
