//! Readiness of a stream, in the bits of `poll` (those of `epoll` are the same).

use crate::conn::Use;
use crate::stream::Stream;
use crate::{demote, sys};
use libc::{POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDHUP, POLLRDNORM, POLLWRNORM, c_int};
use rdsock_shm::layout::{anchor, mark, phase};
use rdsock_shm::reason::Reason;
use rdsock_shm::wake;
use std::sync::atomic::Ordering::*;

/// Bits that the receiving half decides.
pub const IN: i16 = POLLIN | POLLRDNORM;
/// Bits that the sending half decides.
pub const OUT: i16 = POLLOUT | POLLWRNORM;

/// The readiness of a connection, or `None` when it is the kernel's to tell. A peer that has left
/// is followed if the caller holds no lock that this needs (`may_follow`).
pub fn of(held: &Use, stream: &Stream, fd: c_int, events: i16, may_follow: bool) -> Option<i16> {
    crate::io::settle_switch(stream);
    if may_follow {
        settle_reset(stream, fd);
    }
    if may_follow && demote::peer_has_left(stream) {
        demote::follow(held, stream, fd);
    }
    if may_follow && stream.incoming().producer.mark.load(Acquire) & mark::END != 0 {
        demote::settle_incoming(held, stream, fd);
    }
    let look = held.conn.look.load(Relaxed) != 0 && held.conn.look.swap(0, AcqRel) != 0;
    if look {
        let guard = stream.lock_rx();
        if !guard.is_nested() && stream.rx().phase.load(Relaxed) == phase::RING {
            guard.look(fd);
        }
    }
    if !demote::is_on_rings(stream) {
        return None;
    }
    // First: the anchor ends after the marks were set.
    let kernel = kernel_share(stream, fd, events, look);
    let mut ready = kernel & (libc::POLLPRI | POLLERR | POLLHUP);
    let seen = stream.rx().anchor.load(Acquire);
    let marks = stream.incoming().producer.mark.load(Acquire);
    if stream.is_reset() || marks & mark::RESET != 0 {
        // In a broken stream the bits say that the error was reported.
        let told = anchor::ERROR | anchor::SEND_ERROR;
        let error = !stream.is_reset() || seen & told == 0;
        let ready = IN | OUT | POLLHUP | POLLRDHUP | if error { POLLERR } else { 0 };
        return Some(ready & (events | POLLERR | POLLHUP));
    }
    if stream.rx().phase.load(Acquire) == phase::RING {
        if marks & mark::END != 0 && !stream.has_bytes() {
            // The next receive finds out what the anchor has.
            ready |= sys::poll_one(fd, POLLIN, 0).max(0) as i16 & IN;
        }
        let ended = marks & mark::FIN != 0 || seen != 0 || stream.rx().shut.load(Relaxed) != 0;
        if has_enough(stream, fd) || ended {
            ready |= IN;
        }
        if marks & mark::FIN != 0 || seen & anchor::EOF != 0 || stream.rx().shut.load(Relaxed) != 0
        {
            ready |= POLLRDHUP;
        }
    } else {
        ready |= kernel & (IN | POLLRDHUP);
    }
    if stream.tx().phase.load(Acquire) == phase::RING {
        if is_writable(stream) {
            ready |= OUT;
        }
    } else {
        ready |= kernel & OUT;
    }
    let shut = stream.tx().shut.load(Relaxed) != 0;
    if shut {
        ready |= OUT;
    }
    if seen & anchor::ERROR != 0 {
        ready |= POLLERR;
    }
    if seen & anchor::BROKEN != 0 {
        ready |= POLLHUP | OUT;
    } else if ready & POLLRDHUP != 0 && shut {
        ready |= POLLHUP;
    }
    Some(ready & (events | POLLERR | POLLHUP))
}

/// What the kernel says, where one direction is still (or again) on the anchor. Asked for its end alone where the
/// program asks for nothing else, or when it is to be looked at (`look`).
fn kernel_share(stream: &Stream, fd: c_int, events: i16, look: bool) -> i16 {
    let mut ask = events & libc::POLLPRI;
    if stream.rx().phase.load(Acquire) != phase::RING {
        ask |= events & (IN | POLLRDHUP);
        // With the end of the other direction, which the kernel does not know, it is a POLLHUP.
        if ask != 0 || stream.tx().shut.load(Relaxed) != 0 {
            ask |= POLLRDHUP;
        }
    }
    if stream.tx().phase.load(Acquire) != phase::RING {
        ask |= events & OUT;
    }
    // What goes by itself: errors of a direction that the kernel has again.
    let left = [&stream.rx().phase, &stream.tx().phase]
        .into_iter()
        .any(|half| half.load(Acquire) == phase::DEMOTED);
    let end = look && !stream.is_all_on_rings() || events & (IN | OUT | POLLRDHUP) == 0;
    if ask == 0 && !left && !end {
        return 0;
    }
    let mut got = sys::poll_one(fd, ask, 0).max(0) as i16;
    if stream.rx().phase.load(Acquire) == phase::SWITCHING && got & IN != 0 {
        // The byte that is seen may be a wake byte; then the ring tells.
        let at = stream.incoming().producer.switch_at.load(Acquire);
        if at == stream.rx().tail.load(Relaxed)
            && !stream.has_bytes_after(at)
            && got & POLLRDHUP == 0
            && stream.incoming().producer.mark.load(Acquire) == 0
        {
            got &= !IN;
        }
    } else if stream.rx().phase.load(Acquire) == phase::SWITCHING {
        let at = stream.incoming().producer.switch_at.load(Acquire);
        if at == stream.rx().tail.load(Relaxed) && stream.has_bytes_after(at) {
            got |= events & IN;
        }
    }
    if got & (POLLERR | POLLHUP) != 0 && stream.judges_end() {
        if stream.rx().anchor.load(Acquire) == 0 {
            stream.note_end(got & POLLERR != 0);
        }
        got &= !(POLLERR | POLLHUP);
    }
    got
}

/// The other end has broken the connection, and what it sent before that has been read: so is this
/// end's, and the error waits to be asked for.
pub fn settle_reset(stream: &Stream, fd: c_int) {
    if stream.incoming().producer.mark.load(Acquire) & mark::RESET == 0 || stream.is_reset() {
        return;
    }
    let guard = stream.lock_rx();
    if !guard.is_nested() && stream.rx().phase.load(Acquire) == phase::RING && !stream.has_bytes() {
        stream.reset(fd, Reason::PeerReset);
    }
}

/// Bytes to read, as many as SO_RCVLOWAT asks for: a program that sets it has left the rings for
/// all but what is still in them.
fn has_enough(stream: &Stream, fd: c_int) -> bool {
    if !stream.has_bytes() || stream.tx().phase.load(Relaxed) != phase::DEMOTED {
        return stream.has_bytes();
    }
    let least: Option<c_int> = sys::getsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT);
    let least = least.map_or(1, |least| least.max(1) as u64);
    let producer = &stream.incoming().producer;
    let in_ring = producer
        .head
        .load(Acquire)
        .wrapping_sub(stream.rx().tail.load(Relaxed));
    if in_ring >= least {
        return true;
    }
    // The rest comes behind the wake bytes on the anchor.
    let sent = producer.wakes.load(Acquire);
    let wakes = sent.wrapping_sub(stream.rx().drained.load(Relaxed));
    let there = sys::ioctl_int(fd, libc::FIONREAD).unwrap_or(0).max(0) as u64;
    producer.mark.load(Acquire) & mark::END != 0
        && in_ring + there.saturating_sub(u64::from(wakes)) >= least
}

/// As Linux: a third of the buffer is free.
fn is_writable(stream: &Stream) -> bool {
    crate::wait::sendable(stream, stream.ring_size() / 3)
}

/// Asks the other end for a sign (`how`: WAKE or BELL) when what `events` names comes.
pub fn ask(stream: &Stream, events: i16, how: u32) {
    if events & (IN | POLLRDHUP) != 0 {
        stream.ask_for_bytes(how);
    }
    if events & OUT != 0 && stream.tx().phase.load(Relaxed) == phase::RING {
        wake::ask(&stream.out().space.want, how);
    }
}
