//! Leaving the rings: what rings cannot carry goes back to the kernel, at an exact position.
//!
//! The end that leaves ("leaver") marks where its outgoing ring ends, says where it stopped
//! reading the incoming one, and uses the anchor from then on. The other end ("follower") reads
//! the ring up to the mark, takes the counted wake bytes off the anchor, and sends the bytes that
//! the leaver did not take again on the anchor.
//!
//! No wake byte may come after the mark, since the follower could not tell it from data: the
//! leaver counts one last byte before it marks, and sends it after. It knows the follower's number
//! of wake bytes once no RINGING stands in its own requests, because DEMOTED beside them forbids
//! further ones.

use crate::conn::{self, Use};
use crate::stream::{RxGuard, Stream, TxGuard, WAKE_BYTE};
use crate::{real, sys};
use libc::c_int;
use rdsock_shm::layout::{NOT_SWITCHED, anchor, mark, phase, want};
use rdsock_shm::reason::{Reason, State};
use std::sync::atomic::Ordering::*;

/// Milliseconds that a wake byte which was counted may take to arrive.
const IN_FLIGHT_MS: i64 = 1000;

/// True when either direction is, or may yet go, on a ring.
pub fn is_on_rings(stream: &Stream) -> bool {
    let done = [phase::DEMOTED];
    !(done.contains(&stream.tx().phase.load(Acquire))
        && done.contains(&stream.rx().phase.load(Acquire)))
}

/// ECONNRESET is reported once: true for the first caller.
pub fn take_error(stream: &Stream) -> bool {
    stream
        .rx()
        .anchor
        .fetch_or(anchor::ERROR | anchor::EOF, AcqRel)
        & anchor::ERROR
        == 0
}

/// What a sender does after it has answered: the other end may have left, or closed.
#[cold]
pub fn after_answer(held: &Use, stream: &Stream, guard: &TxGuard<'_>, fd: c_int, taken: u32) {
    if stream.tx().phase.load(Acquire) != phase::RING {
        return;
    }
    if taken & want::DEMOTED != 0 {
        send_again(stream, guard, fd);
    } else if taken & want::CLOSED != 0 {
        // Nobody will read the ring. What the kernel says of a send to a closed connection is
        // provoked with one byte, and is right from the next call on.
        sys::send_now(fd, &[WAKE_BYTE]);
        stream.tx().phase.store(phase::DEMOTED, Release);
        held.conn.look.store(1, Relaxed);
    }
}

/// Sends on the anchor what the other end left in the ring; this direction is the anchor's then.
fn send_again(stream: &Stream, guard: &TxGuard<'_>, fd: c_int) {
    let mut from = stream
        .out()
        .consumer
        .stop
        .load(Acquire)
        .max(stream.out().producer.switch_at.load(Relaxed));
    loop {
        let Ok((at, len)) = guard.sender.published(from) else {
            stream.reset(fd, Reason::Violation);
            return;
        };
        if len == 0 {
            break;
        }
        // SAFETY: the ring's memory is mapped as long as the stream.
        let sent = unsafe { sys::send_raw(fd, at, len, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        if sent > 0 {
            from += sent as u64;
        } else if sent == -(libc::EAGAIN as isize) {
            sys::poll_one(fd, libc::POLLOUT, 1000);
        } else if sent != -(libc::EINTR as isize) {
            break;
        }
    }
    stream.tx().phase.store(phase::DEMOTED, Release);
    if stream.tx().shut.load(Relaxed) != 0 {
        // SAFETY: a plain call on the program's fd.
        unsafe { real::shutdown(fd, libc::SHUT_WR) };
    }
}

/// The ring has been read to its end: takes the last wake bytes off the anchor.
pub fn incoming_ended(stream: &Stream, guard: &RxGuard<'_>, fd: c_int) {
    if take_last_wakes(guard, fd) {
        stream.rx().phase.store(phase::DEMOTED, Release);
    } else {
        stream.reset(fd, Reason::NotQuiet);
    }
}

fn take_last_wakes(guard: &RxGuard<'_>, fd: c_int) -> bool {
    for _ in 0..64 {
        guard.drain(fd);
        if guard.outstanding() == 0 {
            return true;
        }
        if sys::poll_one(fd, libc::POLLIN, IN_FLIGHT_MS) <= 0 {
            return false;
        }
    }
    false
}

/// The other end has left: gives it what it did not read, and leaves as well.
pub fn follow(held: &Use, stream: &Stream, fd: c_int) {
    let guard = stream.lock_tx(fd);
    match stream.tx().phase.load(Acquire) {
        phase::RING => after_answer(held, stream, &guard, fd, want::DEMOTED),
        phase::ANCHOR => stream.tx().phase.store(phase::DEMOTED, Release),
        _ => {}
    }
    drop(guard);
    if !is_on_rings(stream) {
        crate::tenant::stream_left(fd, stream, State::Demoted, Reason::PeerDemoted);
        restore_options(held, fd);
        crate::epoll::demoted(held, fd);
    }
}

/// True when the other end has asked to leave, so that a caller who only looks must follow.
pub fn peer_has_left(stream: &Stream) -> bool {
    stream.out().bytes.want.load(Relaxed) & want::DEMOTED != 0
        && stream.tx().phase.load(Relaxed) != phase::DEMOTED
}

/// Leaves the rings, for `reason`. Afterwards every call on the fd is the kernel's.
#[cold]
pub fn leave(held: &Use, fd: c_int, reason: Reason) {
    held.conn.keep_on_kernel(held.index, reason);
    let Some(stream) = held.conn.stream() else {
        return;
    };
    if !is_on_rings(stream) || stream.is_reset() {
        return;
    }
    let mask = sys::block_signals();
    let tx = stream.lock_tx(fd);
    let rx = stream.lock_rx();
    let left = leave_locked(stream, &tx, &rx, fd);
    drop(rx);
    drop(tx);
    sys::restore_signals(mask);
    if !left {
        stream.reset(fd, Reason::NotQuiet);
        return;
    }
    stream.end().reason.store(reason as u32, Relaxed);
    crate::tenant::count(rdsock_shm::layout::Counter::Demoted);
    crate::tenant::stream_left(fd, stream, State::Demoted, reason);
    restore_options(held, fd);
    crate::epoll::demoted(held, fd);
}

fn leave_locked(stream: &Stream, tx: &TxGuard<'_>, rx: &RxGuard<'_>, fd: c_int) -> bool {
    // The other end may have left first.
    if stream.out().bytes.want.load(Acquire) & want::DEMOTED != 0 {
        send_again(stream, tx, fd);
    }
    let position = stream.rx().tail.load(Relaxed);
    stream.incoming().consumer.stop.store(position, Release);
    let requests = [&stream.incoming().bytes.want, &stream.out().space.want];
    for request in requests {
        request.fetch_or(want::DEMOTED, SeqCst);
    }
    for request in requests {
        let mut turns = 0;
        while request.load(Acquire) & want::RINGING != 0 {
            turns += 1;
            if turns > 100_000 {
                return false;
            }
            sys::sched_yield();
        }
    }
    let producer = &stream.out().producer;
    producer.wakes.fetch_add(1, AcqRel);
    producer.mark.fetch_or(mark::END, SeqCst);
    sys::send_now(fd, &[WAKE_BYTE]);
    stream.tx().phase.store(phase::DEMOTED, Release);
    if stream.tx().shut.load(Relaxed) != 0 {
        // SAFETY: a plain call on the program's fd.
        unsafe { real::shutdown(fd, libc::SHUT_WR) };
    }
    let switched = stream.incoming().producer.switch_at.load(Acquire);
    let quiet = rx.outstanding() == 0
        || switched == position
        || stream.rx().phase.load(Relaxed) == phase::RING && switched != NOT_SWITCHED;
    if !quiet || !take_last_wakes(rx, fd) {
        return false;
    }
    stream.rx().phase.store(phase::DEMOTED, Release);
    true
}

/// Gives the anchor the program's own options back.
fn restore_options(held: &Use, fd: c_int) {
    let options = held.conn.options.load(Relaxed);
    let nodelay = (options & 1) as c_int;
    sys::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, &nodelay);
    if options & 2 != 0 {
        sys::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_CORK, &1_i32);
    }
}

/// Leaves for every connection of the process.
pub fn leave_all(reason: Reason) {
    conn::each(|index, conn| {
        let fd = conn.fd.load(Relaxed);
        if let Some(held) = conn::by_index(index)
            && fd >= 0
        {
            leave(&held, fd, reason);
        }
    });
}

/// The program closes the last descriptor that this process has for the connection.
pub fn before_close(held: &Use, fd: c_int) {
    let Some(stream) = held.conn.stream() else {
        return;
    };
    if stream.end().holders.load(Acquire) > 1 || stream.is_reset() {
        return;
    }
    if peer_has_left(stream) {
        follow(held, stream, fd);
    }
    let producer = &stream.out().producer;
    if stream.rx().phase.load(Acquire) == phase::RING && stream.has_bytes() {
        // TCP answers a close with unread bytes with a reset.
        sys::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            &libc::linger {
                l_onoff: 1,
                l_linger: 0,
            },
        );
        producer.mark.fetch_or(mark::RESET, AcqRel);
    } else if stream.tx().phase.load(Acquire) == phase::RING {
        producer.mark.fetch_or(mark::FIN, AcqRel);
    }
    for request in [&stream.incoming().bytes.want, &stream.out().space.want] {
        request.fetch_or(want::CLOSED, SeqCst);
    }
}

/// `shutdown` on a stream. True when it was carried out here.
pub fn shutdown(held: &Use, fd: c_int, how: c_int) -> bool {
    let Some(stream) = held.conn.stream() else {
        return false;
    };
    if !(libc::SHUT_RD..=libc::SHUT_RDWR).contains(&how)
        || !is_on_rings(stream)
        || stream.is_reset()
    {
        return false;
    }
    if how != libc::SHUT_RD {
        let guard = stream.lock_tx(fd);
        match stream.tx().phase.load(Acquire) {
            phase::RING => {
                stream.tx().shut.store(1, Release);
                guard.sender.publish();
                stream.out().producer.mark.fetch_or(mark::FIN, SeqCst);
                if rdsock_shm::wake::asked(&stream.out().bytes) != 0 {
                    let taken = stream.answer(fd, &stream.out().bytes);
                    after_answer(held, stream, &guard, fd, taken);
                }
            }
            phase::DEMOTED => {
                // SAFETY: a plain call on the program's fd.
                unsafe { real::shutdown(fd, libc::SHUT_WR) };
            }
            _ => {
                // Not switched: the FIN goes behind the bytes on the anchor. No wake byte can
                // follow it, so the other end must not depend on one.
                drop(guard);
                leave(held, fd, Reason::Call);
                // SAFETY: a plain call on the program's fd.
                unsafe { real::shutdown(fd, how) };
                return true;
            }
        }
    }
    if how != libc::SHUT_WR {
        stream.rx().shut.store(1, Release);
        // The kernel's own mark wakes whoever sleeps on the anchor, in any process.
        // SAFETY: a plain call on the program's fd.
        unsafe { real::shutdown(fd, libc::SHUT_RD) };
    }
    true
}
