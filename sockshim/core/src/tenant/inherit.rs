//! Connections that go over to another process, by fork or by exec: which must not be promoted
//! meanwhile, and how the process that has them now learns what they are.

use super::attach::{await_greeting, ensure};
use super::link::link;
use super::lock::Guard;
use super::memory;
use super::messages::{await_message, read_messages, send_with};
use super::requests::{blank, forget_untold, put};
use super::{ask, listeners};
use crate::conn::{self, phase};
use crate::hidden::close_hidden;
use crate::state::PROCESS;
use crate::{clock, identity, stream, sys};
use libc::c_int;
use rdsock_shm::control::{Lookup, Message, Request, kind, request};
use rdsock_shm::lock::{self, Taken};
use rdsock_shm::reason::{Reason, State};
use std::sync::atomic::Ordering::*;

/// Milliseconds that a program waits for the answer about an inherited connection.
const LOOKUP_MS: u64 = 1000;
/// Milliseconds that a forked child with streams waits, at most, for the daemon to know it.
const KNOWN_MS: u64 = 20;

/// Before fork: nothing of the tenant's may be half done. True when the lock was taken.
pub fn before_fork() -> bool {
    let guard = Guard::take_as_child();
    if let Some(guard) = &guard {
        note_shared(guard);
    }
    // Also where this thread has the lock further up its stack: the child will hold them.
    conn::each(|_, conn| {
        if let Some(stream) = conn.stream() {
            stream.count_holder();
        }
    });
    let is_taken = guard.is_some();
    std::mem::forget(guard);
    is_taken
}

/// Before a program is spawned or executed: it may get any connection, so what is not promoted yet
/// must be looked at again. A `vfork` child only notes that: an offer that is on its way to its parent
/// is one of an older generation, which the parent declines.
pub fn before_exec() {
    if let Some(guard) = Guard::take_as_child() {
        note_shared(&guard);
    }
}

fn note_shared(guard: &Guard) {
    let is_foreign = identity::is_foreign();
    conn::each(|index, conn| {
        conn.shared.store(1, Relaxed);
        if conn.phase.load(Relaxed) != phase::ANNOUNCED {
            return;
        }
        // An answer to an announcement of before the fork must not be followed: the child would
        // not know. The descriptors of one that waits are the parent's to close.
        if !is_foreign {
            // SAFETY: the lock is held.
            if let Some(offer) = unsafe { conn.take_offer() } {
                offer.close();
            }
        }
        conn.generation.fetch_add(1, Relaxed);
        conn.phase.store(phase::KERNEL, Relaxed);
        conn.calls.store(1, Relaxed);
        conn.tell(index, State::Kernel, Reason::Shared);
        if !is_foreign {
            put(guard, &blank(request::CLOSED, index, conn));
        }
    });
}

/// After fork, in the parent. The child may not exist, where libc has made none: then the counts of holders are one high, and the
/// last close is told by the kernel alone.
pub fn after_fork_in_parent() {
    lock::release(&PROCESS.tenant.lock, Taken::Outer);
}

/// There is no child: after [`before_fork`] and before [`after_fork_in_parent`].
pub fn fork_failed() {
    conn::each(|_, conn| {
        if let Some(stream) = conn.stream() {
            stream.uncount_holder();
        }
    });
}

/// After fork, in the child: a tenant of its own, when it first needs to be one.
pub fn after_fork_in_child() {
    PROCESS.tenant.lock.store(0, Relaxed);
    if let Some(unused) = link().forget_in_child() {
        close_hidden(unused);
    }
    memory::after_fork_in_child();
    forget_untold();
    ask::after_fork_in_child();
    listeners::after_fork_in_child();
    let mut streams = false;
    conn::each(|index, conn| {
        conn.users.store(0, Relaxed);
        conn.in_rx.store(0, Relaxed);
        conn.in_tx.store(0, Relaxed);
        if let Some(held) = conn::by_index(index)
            && let Some(stream) = held.conn.stream()
        {
            stream.at(&held, conn.fd.load(Relaxed)).hold(stream::pid());
            streams = true;
        }
    });
    if streams {
        hold_inherited();
    }
    // What its parent is told from now on is not for this process, which may give up rights, and be taken over then.
    if let Some(inherited) = link().give_up_inherited() {
        close_hidden(inherited);
    }
}

/// Tells the daemon which streams this process has by inheritance.
fn hold_inherited() {
    ensure();
    conn::each(|index, conn| {
        if let Some(stream) = conn.stream() {
            conn.tell(index, State::Rings, Reason::None);
            // The control connection came from the parent's, so it is the same daemon.
            conn.epoch.store(link().epoch.load(Relaxed), Relaxed);
            if let Some(record) = conn::record(index) {
                record.stream_id.store(stream.id, Relaxed);
            }
            if let Some(guard) = Guard::take() {
                put(
                    &guard,
                    &Request {
                        stream_id: stream.id,
                        active: stream.end_number(),
                        ..blank(request::HOLDS, index, conn)
                    },
                );
            }
        }
    });
    // Who forked it may give them up next: the daemon is to know of this process by then.
    if link().greeting.load(Relaxed) != 0 {
        let has_come = |_: &Guard| (link().greeting.load(Relaxed) == 0).then_some(());
        await_message(clock::nanoseconds() + KNOWN_MS * 1_000_000, has_come);
    }
}

/// Asks whether an inherited socket is a stream, and maps it if it is. Waits for the answer.
pub fn look_up(index: usize, fd: c_int) {
    let end = clock::nanoseconds() + LOOKUP_MS * 1_000_000;
    ensure();
    if !await_greeting(end) {
        return;
    }
    let Some(held) = conn::by_index(index) else {
        return;
    };
    let Some(cookie) = sys::cookie(fd) else {
        return;
    };
    let control = link().control.load(Relaxed);
    if control < 0 {
        return;
    }
    held.conn.generation.fetch_add(1, Relaxed);
    held.conn.cookie.store(cookie, Relaxed);
    let generation = held.conn.generation.load(Relaxed);
    held.conn.phase.store(phase::ANNOUNCED, Release);
    let question = Lookup {
        conn: index as u32,
        generation,
        cookie,
        fd,
        reserved: 0,
    };
    link().looking_up.store(1, Relaxed);
    if send_with(control, &Message::new(kind::LOOKUP, &question), &[]) > 0 {
        while held.conn.phase.load(Acquire) == phase::ANNOUNCED {
            let left = end.saturating_sub(clock::nanoseconds()).div_ceil(1_000_000);
            if left == 0 || sys::poll_one(control, libc::POLLIN, left as i64) <= 0 {
                break;
            }
            // The answer may come together with the one to HELLO, and with late ones to earlier questions.
            match Guard::take() {
                Some(guard) => read_messages(&guard),
                None => break,
            }
        }
    }
    link().looking_up.store(0, Relaxed);
    let _ = held
        .conn
        .phase
        .compare_exchange(phase::ANNOUNCED, phase::KERNEL, AcqRel, Relaxed);
}

/// What was inherited is not given to this program, which has another socket in its place: a connection that was reset.
pub fn lost(held: &conn::Use) {
    let conn = held.conn;
    conn.generation.fetch_add(1, Relaxed);
    conn.cookie.store(0, Relaxed);
    conn.phase.store(phase::NEVER, Release);
    conn.tell(held.index, State::Reset, Reason::Refused);
}
