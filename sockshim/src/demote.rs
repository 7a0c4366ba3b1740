//! Leaving the rings: what rings cannot carry goes back to the kernel, at an exact position.
//!
//! Each direction is ended by its sender: it marks END at its head, and everything after that goes
//! over the anchor. The receiver reads the ring up to the mark, takes the counted wake bytes off
//! the anchor, and reads the anchor from then on. An end that [`leave`]s ends its own direction and
//! asks the other end (LEAVE) to end the other one with its next call.
//!
//! An end that must be the kernel's at once ([`abandon`]: exec, passing the fd, stdio) also says
//! where it stopped reading (DEMOTED); the other end sends what lies behind that again, on the
//! anchor.
//!
//! No wake byte may come after END, since the receiver could not tell it from data: the sender
//! counts one last byte before it marks, and sends it after. An abandoner knows the other end's
//! number of wake bytes once no RINGING stands in its own requests, because DEMOTED beside them
//! forbids further ones.

use crate::conn::{self, Use};
use crate::stream::{RxGuard, Stream, TxGuard, WAKE_BYTE};
use crate::{clock, real, sys, wait};
use libc::c_int;
use rdsock_shm::layout::{NOT_SWITCHED, anchor, mark, phase, want};
use rdsock_shm::reason::{Reason, State};
use std::sync::atomic::Ordering::*;

/// Milliseconds that a wake byte which was counted may take to arrive.
const IN_FLIGHT_MS: i64 = 1000;
/// Milliseconds that a close waits for wake bytes on their way.
const CLOSING_MS: u64 = 100;
/// Milliseconds that the other end may take from deciding on a wake byte to having sent it.
const RINGING_MS: u64 = 5000;

/// True when either direction is, or may yet go, on a ring.
pub fn is_on_rings(stream: &Stream) -> bool {
    let done = [phase::DEMOTED];
    !(done.contains(&stream.tx().phase.load(Acquire))
        && done.contains(&stream.rx().phase.load(Acquire)))
}

/// ECONNRESET of a reset stream is reported by a send if no call has reported it yet.
pub fn take_send_error(stream: &Stream) -> bool {
    let before = stream.rx().anchor.fetch_or(anchor::SEND_ERROR, AcqRel);
    before & (anchor::SEND_ERROR | anchor::ERROR) == 0
}

/// ECONNRESET of a reset stream is reported once by a receive: true for the first.
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
    // A nested sender leaves it to the outer one, whose bytes come first.
    if stream.tx().phase.load(Acquire) != phase::RING || guard.is_nested() {
        return;
    }
    if taken & want::DEMOTED != 0 {
        send_again(stream, guard, fd);
    } else if taken & want::CLOSED != 0 {
        // Before its kernel says so.
        crate::ready::settle_reset(stream, fd);
        if stream.is_reset() {
            return;
        }
        // Nobody will read the ring. What the kernel says of a send to a closed connection is
        // provoked with one byte, and is right from the next call on.
        sys::send_now(fd, &[WAKE_BYTE]);
        stream.tx().phase.store(phase::DEMOTED, Release);
        held.conn.look.store(1, Relaxed);
    } else if taken & want::LEAVE != 0 {
        end_sending(held, stream, guard, fd);
    }
}

/// This end has left, and its own direction may not have ended yet.
pub fn is_leaving(stream: &Stream) -> bool {
    stream.incoming().bytes.want.load(Acquire) & want::LEAVE != 0
}

/// Ends this end's own direction: the ring at its head, the rest on the anchor. A direction that
/// has not moved to its ring does so first, where it can: a wake byte may follow then, for an end
/// that sleeps for space and has to hear of this. While a thread is inside a kernel send, it is
/// left to that one, when it comes back.
pub fn end_sending(held: &Use, stream: &Stream, guard: &TxGuard<'_>, fd: c_int) {
    let producer = &stream.out().producer;
    let tx = stream.tx();
    let before = tx.phase.load(Acquire);
    if before != phase::RING && before != phase::ANCHOR {
        return;
    }
    for request in [&stream.incoming().bytes.want, &stream.out().space.want] {
        request.fetch_or(want::LEAVE, SeqCst);
    }
    let shut = tx.shut.load(Relaxed) != 0;
    if before == phase::ANCHOR && !shut && tx.in_kernel.load(SeqCst) != 0 {
        return;
    }
    let peer = &stream.out().bytes.want;
    let closed = peer.load(Acquire) & want::CLOSED != 0;
    if before == phase::RING || !closed && crate::io::try_switch(held, stream, guard, fd) {
        guard.sender.publish();
        // The last wake byte, unless the other end has gone to the kernel and would read it: then
        // it gets what it has not read, and needs no mark.
        match stream.begin_ringing(peer) {
            Ok(()) => {
                producer.wakes.fetch_add(1, AcqRel);
                producer.mark.fetch_or(mark::END, SeqCst);
                if sys::send_now(fd, &[WAKE_BYTE]) != 1 {
                    producer.wakes.fetch_sub(1, AcqRel);
                }
                rdsock_shm::wake::rung(peer);
            }
            Err(wants) if wants & want::DEMOTED != 0 => {
                send_again(stream, guard, fd);
                return;
            }
            // It has closed, and what it sent before is still to be read here.
            Err(_) => {
                producer.mark.fetch_or(mark::END, SeqCst);
            }
        }
    } else {
        // The other end is not ready, and sees LEAVE when it is; or it is the kernel's.
        producer.mark.fetch_or(mark::END, SeqCst);
    }
    stream.tx().phase.store(phase::DEMOTED, Release);
    if stream.tx().shut.load(Relaxed) != 0 {
        // SAFETY: a plain call on the program's fd.
        unsafe { real::shutdown(fd, libc::SHUT_WR) };
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

/// The ring has been read to its end: takes the last wake bytes off the anchor. They end the sleep
/// of others, who may look first, which they do without the lock.
pub fn incoming_ended(stream: &Stream, guard: &RxGuard<'_>, fd: c_int) {
    let start = clock::nanoseconds();
    while guard.outstanding() != 0
        && stream.rx().waiters.load(SeqCst) != 0
        && clock::nanoseconds() - start < u64::from(wait::PATIENCE_MS) * 1_000_000
    {
        sys::sched_yield();
    }
    if take_last_wakes(guard, fd, IN_FLIGHT_MS) {
        stream.rx().phase.store(phase::DEMOTED, Release);
    } else {
        stream.reset(fd, Reason::NotQuiet);
    }
}

fn take_last_wakes(guard: &RxGuard<'_>, fd: c_int, ms: i64) -> bool {
    for _ in 0..64 {
        guard.drain_all(fd);
        if guard.outstanding() == 0 {
            return true;
        }
        if sys::poll_one(fd, libc::POLLIN, ms) <= 0 {
            return guard.outstanding() == 0;
        }
    }
    false
}

/// The other end has left: gives it what it did not read, and ends this direction as well.
pub fn follow(held: &Use, stream: &Stream, fd: c_int) {
    let guard = stream.lock_tx(fd);
    if guard.is_nested() {
        return;
    }
    match stream.tx().phase.load(Acquire) {
        phase::RING if stream.out().bytes.want.load(Acquire) & want::DEMOTED != 0 => {
            send_again(stream, &guard, fd)
        }
        phase::RING | phase::ANCHOR => end_sending(held, stream, &guard, fd),
        _ => {}
    }
    drop(guard);
    finished(held, stream, fd, Reason::PeerDemoted);
}

/// Takes note when both directions are the anchor's.
fn finished(held: &Use, stream: &Stream, fd: c_int, reason: Reason) {
    if !is_on_rings(stream)
        && !stream.is_reset()
        && stream.end().reason.swap(reason as u32, AcqRel) == 0
    {
        crate::tenant::count(rdsock_shm::layout::Counter::Demoted);
        crate::tenant::stream_left(fd, stream, State::Demoted, reason);
        restore_options(held, fd);
        crate::epoll::demoted(held, fd);
    }
}

/// True when the other end has asked to leave, so that a caller who only looks must follow.
pub fn peer_has_left(stream: &Stream) -> bool {
    stream.out().bytes.want.load(Relaxed) & (want::DEMOTED | want::LEAVE) != 0
        && match stream.tx().phase.load(Relaxed) {
            phase::RING => true,
            // Else the thread that is inside a kernel send does what is left.
            phase::ANCHOR => !is_leaving(stream) || stream.tx().in_kernel.load(Relaxed) == 0,
            _ => false,
        }
}

/// Takes the end of the incoming ring, if that is where the receiver stands.
pub fn settle_incoming(held: &Use, stream: &Stream, fd: c_int) {
    let guard = stream.lock_rx();
    let ended = stream.incoming().producer.mark.load(Acquire) & mark::END != 0;
    let unswitched = stream.incoming().producer.switch_at.load(Acquire) == NOT_SWITCHED;
    let phase = stream.rx().phase.load(Acquire);
    if ended
        && !guard.is_nested()
        && (phase == phase::RING && !stream.has_bytes() || phase == phase::SWITCHING && unswitched)
    {
        incoming_ended(stream, &guard, fd);
    }
    drop(guard);
    finished(held, stream, fd, Reason::PeerDemoted);
}

/// Leaves the rings, for `reason`: what is sent from now on goes over the anchor, and what comes
/// does so once the other end has followed.
#[cold]
pub fn leave(held: &Use, fd: c_int, reason: Reason) {
    held.conn.keep_on_kernel(held.index, reason);
    let Some(stream) = held.conn.stream() else {
        return;
    };
    if !is_on_rings(stream) || stream.is_reset() {
        return;
    }
    let guard = stream.lock_tx(fd);
    if !guard.is_nested() {
        end_sending(held, stream, &guard, fd);
    }
    drop(guard);
    held.conn.tell(held.index, State::Demoted, reason);
}

/// Leaves the rings so that the kernel has every byte from now on, whoever reads. What was in the
/// ring and not read comes once the other end makes its next call.
#[cold]
pub fn abandon(held: &Use, fd: c_int, reason: Reason) {
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
    let left = abandon_locked(held, stream, &tx, &rx, fd);
    drop(rx);
    drop(tx);
    sys::restore_signals(mask);
    if left {
        finished(held, stream, fd, reason);
    } else {
        stream.reset(fd, Reason::NotQuiet);
    }
}

fn abandon_locked(
    held: &Use,
    stream: &Stream,
    tx: &TxGuard<'_>,
    rx: &RxGuard<'_>,
    fd: c_int,
) -> bool {
    if stream.out().bytes.want.load(Acquire) & want::DEMOTED != 0
        && stream.tx().phase.load(Acquire) == phase::RING
    {
        send_again(stream, tx, fd);
    }
    let position = stream.rx().tail.load(Relaxed);
    stream.incoming().consumer.stop.store(position, Release);
    let requests = [&stream.incoming().bytes.want, &stream.out().space.want];
    for request in requests {
        request.fetch_or(want::DEMOTED, SeqCst);
    }
    for request in requests {
        let start = clock::nanoseconds();
        while request.load(Acquire) & want::RINGING != 0 {
            if clock::nanoseconds() - start > RINGING_MS * 1_000_000 {
                return false;
            }
            sys::sched_yield();
        }
    }
    end_sending(held, stream, tx, fd);
    if stream.rx().phase.load(Acquire) == phase::DEMOTED {
        return true;
    }
    let switched = stream.incoming().producer.switch_at.load(Acquire);
    let quiet = rx.outstanding() == 0
        || switched == position
        || stream.rx().phase.load(Relaxed) == phase::RING;
    // The end is marked by a sender that has not seen DEMOTED, and will not send again.
    let ended = stream.incoming().producer.mark.load(Acquire) & mark::END != 0;
    let unread = switched != NOT_SWITCHED && stream.has_bytes_after(position.max(switched));
    if !quiet || ended && unread || !take_last_wakes(rx, fd, IN_FLIGHT_MS) {
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

/// Abandons the rings for every connection of the process.
pub fn abandon_all(reason: Reason) {
    conn::each(|index, conn| {
        let fd = conn.fd.load(Relaxed);
        if let Some(held) = conn::by_index(index)
            && fd >= 0
        {
            abandon(&held, fd, reason);
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
    let linger: Option<libc::linger> = sys::getsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER);
    let aborts = linger.is_some_and(|linger| linger.l_onoff != 0 && linger.l_linger == 0);
    if aborts || stream.has_unread_ring() {
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
    let requests = [&stream.incoming().bytes.want, &stream.out().space.want];
    for request in requests {
        request.fetch_or(want::CLOSED, SeqCst);
    }
    // The kernel would answer a close with unread wake bytes with a reset as well, and one that
    // comes later; and would drop what it has not sent yet.
    crate::io::settle_switch(stream);
    let start = clock::nanoseconds();
    while requests
        .iter()
        .any(|request| request.load(Acquire) & want::RINGING != 0)
        && clock::nanoseconds() - start < CLOSING_MS * 1_000_000
    {
        sys::sched_yield();
    }
    if stream.rx().phase.load(Acquire) == phase::RING {
        take_last_wakes(&stream.lock_rx(), fd, CLOSING_MS as i64);
    }
}

/// `shutdown` on a stream: 0 or an error number, `None` when it is the kernel's.
pub fn shutdown(held: &Use, fd: c_int, how: c_int) -> Option<c_int> {
    let stream = held.conn.stream()?;
    if !(libc::SHUT_RD..=libc::SHUT_RDWR).contains(&how)
        || !is_on_rings(stream)
        || stream.is_reset()
    {
        return None;
    }
    let peer_is_done = stream.incoming().producer.mark.load(Acquire) & mark::FIN != 0
        || stream.rx().anchor.load(Acquire) & anchor::EOF != 0;
    if stream.tx().shut.load(Acquire) != 0 && peer_is_done {
        return Some(libc::ENOTCONN);
    }
    if how != libc::SHUT_RD {
        let guard = stream.lock_tx(fd);
        if stream.tx().phase.load(Acquire) == phase::ANCHOR {
            crate::io::try_switch(held, stream, &guard, fd);
        }
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
                stream.tx().shut.store(1, Release);
                end_sending(held, stream, &guard, fd);
                held.conn.tell(held.index, State::Demoted, Reason::Call);
            }
        }
    }
    if how != libc::SHUT_WR {
        stream.rx().shut.store(1, Release);
        // The kernel's own mark wakes whoever sleeps on the anchor, in any process.
        // SAFETY: a plain call on the program's fd.
        unsafe { real::shutdown(fd, libc::SHUT_RD) };
    }
    Some(0)
}
