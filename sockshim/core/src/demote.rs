//! Leaving the rings, as this process does it: when a program's call asks for it, and what else hangs on it. The steps
//! themselves are `rdsock_shm::end`.

use crate::brand;
use crate::conn::{self, Use};
use crate::state::TOLD;
use crate::stream::{self, Stream};
use crate::tcp_info::TcpInfo;
use crate::{end, sys, tenant};
use libc::c_int;
use rdsock_shm::end::Anchor;
use rdsock_shm::layout::{anchor, mark, phase};
use rdsock_shm::reason::{Reason, State};
use std::sync::atomic::{AtomicU32, Ordering::*};

/// True when either direction is, or may yet go, on a ring.
pub fn is_on_rings(stream: &Stream) -> bool {
    stream.is_on_rings()
}

/// True once the other end has mapped the stream. It may never: then the daemon forgets the stream, and the kernel has all that was said.
pub fn has_other_end(stream: &Stream) -> bool {
    stream.out().consumer.ready.load(Acquire) != 0
}

/// The other end has left: gives it what it did not read, and ends this direction as well.
pub fn follow(held: &Use, stream: &Stream, fd: c_int) {
    stream.at(held, fd).follow();
}

/// True when the other end has asked to leave, so that a caller who only looks must follow.
pub fn peer_has_left(stream: &Stream) -> bool {
    stream.peer_has_left()
}

/// Takes the end of the incoming ring, if that is where the receiver stands.
pub fn settle_incoming(held: &Use, stream: &Stream, fd: c_int) {
    stream.at(held, fd).settle_incoming();
}

/// Leaves the rings, for `reason`: what is sent from now on goes over the anchor, and what comes
/// does so once the other end has followed.
#[cold]
pub fn leave(held: &Use, fd: c_int, reason: Reason) {
    tenant::keep_on_kernel(held.index, held.conn, reason);
    let Some(stream) = held.conn.stream() else {
        return;
    };
    if !stream.is_on_rings() || stream.is_reset() {
        return;
    }
    stream.at(held, fd).leave();
    held.conn.tell(held.index, State::Demoted, reason);
}

/// Leaves the rings so that the kernel has every byte from now on, whoever reads. What was in the
/// ring and not read comes with the next calls of the other end.
#[cold]
pub fn abandon(held: &Use, fd: c_int, reason: Reason) {
    tenant::keep_on_kernel(held.index, held.conn, reason);
    let Some(stream) = held.conn.stream() else {
        return;
    };
    if !stream.is_on_rings() || stream.is_reset() {
        return;
    }
    let end = stream.at(held, fd);
    let mask = sys::block_signals();
    let left = end.abandon();
    sys::restore_signals(mask);
    match left {
        Ok(()) => end.finished(reason),
        Err(reason) => end.give_up(reason),
    }
}

/// Gives the anchor the program's own options back.
pub fn restore_options(held: &Use, fd: c_int) {
    brand::take_off(fd);
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
    let end = stream.at(held, fd);
    if stream.is_reset() || !end.is_last_to_close(stream::pid()) {
        return;
    }
    let linger = end::unpacked(end.said_linger().unwrap_or_else(|| end.socket.linger()));
    let breaks = linger.l_onoff != 0 && linger.l_linger == 0;
    // Wherever it lies: what the anchor has from before the switch, or from behind the ring, counts as well. Where the kernel has the
    // direction, it knows whether this is the last descriptor: the socket may have been passed on.
    let breaks = breaks || end.unread().is_some_and(|unread| unread != 0);
    end.close(breaks);
}

/// `shutdown` on a stream: 0 or an error number, `None` when it is the kernel's.
pub fn shutdown(held: &Use, fd: c_int, how: c_int) -> Option<c_int> {
    let stream = held.conn.stream()?;
    stream.at(held, fd).settle_reset();
    if !(libc::SHUT_RD..=libc::SHUT_RDWR).contains(&how) || !stream.is_on_rings() {
        return None;
    }
    // Linux wakes whoever waits for the connection, also where the call changes nothing or fails: an edge each time.
    held.conn.shuts.fetch_add(1, SeqCst);
    (TOLD.changed)(held.conn);
    if stream.is_reset() {
        return None;
    }
    let end = stream.at(held, fd);
    let has_shut = stream.tx().shut.load(Acquire) != 0;
    // Once the program wants nothing more, the anchor's end may be its own, and the kernel says how both directions stand. Of a peer
    // that has died, or has closed before its direction moved to a ring, nobody else tells.
    let peer_is_done = stream.incoming().producer.mark.load(Acquire) & mark::FIN != 0
        || stream.rx().shut.load(Acquire) == 0
            && (stream.rx().anchor.load(Acquire) & anchor::EOF != 0
                || has_shut && end.socket.hears_end());
    // What the kernel says of a direction that it has, or has again, holds for the connection.
    let goes_on = stream.marks() & mark::END != 0;
    let is_closed = (stream.tx().phase.load(Acquire) != phase::RING || goes_on)
        && TcpInfo::of(fd).is_some_and(|info| info.state == TcpInfo::CLOSE);
    let is_broken = stream.marks() & mark::RESET != 0;
    if has_shut && peer_is_done || is_closed || is_broken {
        return Some(libc::ENOTCONN);
    }
    if how != libc::SHUT_RD && !end.shut_sending() {
        held.conn.tell(held.index, State::Demoted, Reason::Call);
    }
    if how != libc::SHUT_RD {
        end.note_shut_sending();
    }
    if how != libc::SHUT_WR {
        end.shut_receiving();
    }
    let is_shut = |word: &AtomicU32| word.load(Acquire) != 0;
    if is_shut(&stream.tx().shut) && is_shut(&stream.rx().shut) && !held.conn.names.are_told() {
        end.shut_both();
    }
    Some(0)
}
