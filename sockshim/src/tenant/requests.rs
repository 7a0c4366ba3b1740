//! The queue of requests to the daemon, and what is told through it when a connection or a stream
//! ends.

use super::attach::{CONTROL, GREETING, detach, has_hung_up};
use super::lock::{Guard, Shared};
use super::memory::{count, memory};
use super::messages::send_with;
use crate::conn::{self, Conn};
use crate::stream::{self, Stream};
use libc::c_int;
use rdsock_shm::control::{Message, Request, kind, request};
use rdsock_shm::layout::{Counter, QUEUE_SLOTS, QueueSlot};
use rdsock_shm::queue::Putter;
use rdsock_shm::reason::{Reason, State};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*, fence};

static PUTTER: Shared<Putter> = Shared(UnsafeCell::new(Putter::new()));
/// Requests to a daemon that has not sent the memory yet through which it takes them. As a queue there: it is copied.
static WAITING: [QueueSlot; QUEUE_SLOTS] = [const {
    QueueSlot {
        sequence: AtomicU64::new(0),
        words: [const { AtomicU64::new(0) }; 15],
    }
}; QUEUE_SLOTS];
/// 1 when there is something in it.
static WAIT: AtomicU32 = AtomicU32::new(0);

/// Another daemon is told HELLO: what an earlier one was asked is void.
pub(super) fn empty_queue(_guard: &Guard) {
    if WAIT.swap(0, Relaxed) != 0 {
        WAITING
            .iter()
            .for_each(|slot| slot.sequence.store(0, Relaxed));
    }
    // SAFETY: the lock is held.
    unsafe { *PUTTER.0.get() = Putter::new() };
}

/// The requests that wait for the daemon's memory, if there are some.
pub(super) fn waiting(_guard: &Guard) -> Option<&'static [QueueSlot; QUEUE_SLOTS]> {
    (WAIT.load(Relaxed) != 0).then_some(&WAITING)
}

/// Puts a request; the daemon is kicked when it sleeps. One that has not sent its memory yet finds it there. The lock is held.
pub(super) fn put(_guard: &Guard, request: &Request) -> bool {
    let Some(memory) = memory() else { return false };
    let control = CONTROL.load(Relaxed);
    if control < 0 {
        return false;
    }
    let waits = GREETING.load(Relaxed) != 0;
    if waits {
        WAIT.store(1, Relaxed);
    }
    let queue = if waits { &WAITING } else { &memory.queue };
    // SAFETY: the lock is held.
    if !unsafe { &mut *PUTTER.0.get() }.put(queue, request) {
        count(Counter::QueueFull);
        if has_hung_up(control) {
            detach();
        }
        return false;
    }
    if waits {
        return true;
    }
    fence(SeqCst);
    if memory.header.daemon_sleeps.load(Relaxed) != 0 {
        memory.header.daemon_sleeps.store(0, Relaxed);
        let sent = send_with(control, &Message::empty(kind::KICK), &[]);
        if sent < 0 && sent != -(libc::EAGAIN as isize) {
            detach();
            return false;
        }
    }
    true
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

/// The connection is closed, or may no longer be promoted.
pub fn withdraw(index: usize, conn: &Conn) {
    if let Some(guard) = Guard::take() {
        // SAFETY: the lock is held.
        if let Some(offer) = unsafe { conn.take_offer() } {
            offer.close();
        }
        put(&guard, &blank(request::CLOSED, index, conn));
    }
}

/// This process no longer holds a stream.
pub fn stream_closed(index: usize, conn: &Conn, stream: &Stream) {
    stream.let_go(stream::pid());
    if let Some(guard) = Guard::take() {
        put(
            &guard,
            &Request {
                stream_id: stream.id,
                active: stream.end_number(),
                ..blank(request::CLOSED, index, conn)
            },
        );
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
