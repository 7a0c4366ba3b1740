//! Readiness of a stream, in the bits of `poll` (those of `epoll` are the same): first what is due is done, then the kernel is
//! asked for its part, then the words are read, and the answer is a function of both (`rdsock_shm::end::State`).

use crate::conn::Use;
use crate::end::End;
use crate::registration::{self, Needs};
use crate::stream::Stream;
use crate::sys;
use libc::{POLLERR, POLLHUP, POLLIN, c_int};
use rdsock_shm::end::{Anchor, Kernel, Outgoing, Shared, State, bit};
use rdsock_shm::layout::{mark, phase};
use rdsock_shm::reason::Reason;
use std::sync::atomic::Ordering::*;

/// Bits that the receiving half decides.
pub const IN: i16 = bit::IN;
/// Bits that the sending half decides.
pub const OUT: i16 = bit::OUT;

/// The readiness of a connection, or `None` when it is the kernel's to tell. A peer that has left
/// is followed if the caller holds no lock that this needs (`may_follow`).
pub fn of(held: &Use, stream: &Stream, fd: c_int, events: i16, may_follow: bool) -> Option<i16> {
    let usual = as_usual(held, stream, events);
    if usual.is_some() {
        return usual;
    }
    let end = stream.at(held, fd);
    let look = settle(&end, held, may_follow);
    if !stream.is_on_rings() {
        if may_follow {
            end.finished(Reason::PeerDemoted);
        }
        return None;
    }
    let mut state = State::of(stream);
    let mut bits = 0;
    if let Some(ask) = state.asks_kernel(events, look) {
        bits = ask_kernel(&end, ask);
        // Behind the question: the anchor ends after the marks were set.
        state = State::of(stream);
    }
    let kernel = ask_behind(&end, &state, bits);
    Some(state.readiness(&kernel, stream.ring_size(), events))
}

/// The readiness of a stream of which nothing is due: most are, most of the time.
#[inline]
pub fn as_usual(held: &Use, stream: &Stream, events: i16) -> Option<i16> {
    if held.conn.look.load(Relaxed) != 0 {
        return None;
    }
    stream.usual(events)
}

/// Does what is due before a question; true when the anchor was looked at.
pub fn settle(end: &End<'_>, held: &Use, may_follow: bool) -> bool {
    let stream = end.shared;
    end.settle_switch();
    end.send_rest();
    if may_follow {
        end.settle_reset();
        if stream.peer_has_left() {
            end.follow();
        }
        if stream.incoming().producer.mark.load(Acquire) & mark::END != 0 {
            end.settle_incoming();
        }
    }
    let look = held.conn.look.load(Relaxed) != 0 && held.conn.look.swap(0, AcqRel) != 0;
    if look {
        end.look();
    }
    look
}

/// What the kernel says, where one direction is still (or again) on the anchor. What it says of the connection's end is judged
/// by the ring, and noted.
fn ask_kernel(end: &End<'_>, ask: i16) -> i16 {
    let stream = end.shared;
    let mut got = sys::poll_one(end.socket.wait_fd(), ask, 0).max(0) as i16;
    if got & (POLLERR | POLLHUP) != 0 && stream.judges_end() {
        if stream.rx().anchor.load(Acquire) == 0 {
            end.note_end(got & POLLERR != 0);
        }
        got &= !(POLLERR | POLLHUP);
    }
    got
}

/// What else the answer needs: a program that sets SO_RCVLOWAT has left the rings for all but what is still in them, and what
/// stands behind the ring's end is on the anchor.
fn ask_behind(end: &End<'_>, state: &State, mut bits: i16) -> Kernel {
    let fd = end.socket.wait_fd();
    if state.asks_behind_ring() {
        // The next receive finds out what the anchor has.
        bits |= sys::poll_one(fd, POLLIN, 0).max(0) as i16 & IN;
    }
    let mut kernel = Kernel {
        bits,
        least: 1,
        behind: 0,
    };
    let sends_to_kernel = matches!(
        state.outgoing,
        Outgoing::Kernel | Outgoing::Ended { on_anchor: true }
    );
    if sends_to_kernel && end.shared.has_unread_ring() {
        let least: Option<c_int> = sys::getsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT);
        kernel.least = least.map_or(1, |least| least.max(1) as u64);
        if kernel.least > 1 {
            // Behind the tokens.
            let there = end.socket.unread().unwrap_or(0);
            kernel.behind = there.saturating_sub(u64::from(end.outstanding()));
        }
    }
    kernel
}

/// True when what the anchor has told a sleeper, who asked for POLLRDHUP as well, must be looked at: there may be more than tokens.
/// Those wait for whoever sleeps there next.
pub fn needs_look(end: &End<'_>, seen: i16) -> bool {
    let reads_ring = end.shared.rx().phase.load(Acquire) == phase::RING
        && end.shared.incoming().producer.mark.load(Acquire) & mark::END == 0;
    seen != 0 && (seen != POLLIN || !reads_ring || end.outstanding() == 0)
}

/// What has to be asked for by whoever waits for `events`.
pub fn needs(stream: &Shared, events: i16) -> Needs {
    let shut = stream.tx().shut.load(Relaxed) != 0;
    let needs = registration::needs(events as u16 as u32, shut);
    // Also before the direction has moved to its ring, which it may do with any send: whoever asks now may not ask again then.
    let sends = stream.tx().phase.load(Relaxed);
    let space = needs.space && !matches!(sends, phase::DEMOTED | phase::LEAVING);
    Needs { space, ..needs }
}

/// Asks the other end for a sign (`how`: WAKE or BELL) when what `events` names comes.
pub fn ask(end: &End<'_>, events: i16, how: u32) {
    let needs = needs(end.shared, events);
    if needs.bytes {
        end.ask_for_bytes(how);
    }
    if needs.space {
        end.ask_for_space(how);
    }
}
