//! Quick questions: single words of a stream, for a caller that spins, and for a step that is about to act. They change
//! nothing, and take no lock. The whole is [`super::State`].

use super::shut::{DEAF, GONE};
use super::state::bit::{IN, OUT};
use super::{Peer, Shared};
use crate::layout::{NOT_SWITCHED, anchor, mark, phase, want};
use crate::sync::Ordering::*;
use libc::{POLLPRI, POLLRDHUP};

impl Shared {
    /// What `poll` says of `events` where all goes on as usual: what comes is on the ring, and so is what goes, if it is asked
    /// for; nobody has ended or left; the anchor has told of nothing, and need not be asked. `None`: [`super::State`] knows.
    ///
    /// In the same order as there: what was published before the anchor's end, or a mark, is seen then.
    #[inline]
    pub fn usual(&self, events: i16) -> Option<i16> {
        let (rx, tx) = (self.rx(), self.tx());
        let sends = tx.phase.load(Acquire);
        let is_usual = rx.anchor.load(Acquire) == 0
            && self.incoming().producer.mark.load(Acquire) == 0
            && rx.phase.load(Relaxed) == phase::RING
            && (sends == phase::RING || sends == phase::ANCHOR && events & OUT == 0)
            && rx.shut.load(Relaxed) | tx.shut.load(Relaxed) == 0
            && self.out().bytes.want.load(Relaxed) & (GONE | want::LEAVE) == 0
            && events & POLLPRI == 0
            && events & (IN | OUT | POLLRDHUP) != 0;
        if !is_usual {
            return None;
        }
        let bytes = if events & IN == 0 {
            0
        } else {
            let head = self.incoming().producer.head.load(Acquire);
            head.wrapping_sub(rx.tail.load(Relaxed))
        };
        if bytes > self.ring_size() {
            return None;
        }
        let readable = if bytes == 0 { 0 } else { IN };
        // As Linux: a third of the buffer is free.
        let has_room = events & OUT != 0 && self.space() >= self.ring_size() / 3;
        let writable = if has_room { OUT } else { 0 };
        Some((readable | writable) & events)
    }

    /// A look at the incoming ring without its lock: bytes, or a violation.
    #[inline]
    pub fn has_bytes(&self) -> bool {
        self.incoming().producer.head.load(Acquire) != self.rx().tail.load(Relaxed)
    }

    /// True when the producer has published bytes behind `position`.
    pub fn has_bytes_after(&self, position: u64) -> bool {
        self.incoming().producer.head.load(Acquire) > position
    }

    /// True while bytes of the ring stand before whatever comes on the anchor.
    pub fn has_unread_ring(&self) -> bool {
        self.rx().phase.load(Relaxed) == phase::RING && self.has_bytes()
    }

    /// True while the other end has not taken everything off the outgoing ring.
    pub fn has_unread(&self) -> bool {
        let seen = self.tx().seen_tail.load(Relaxed);
        let tail = self.out().consumer.tail.load(Acquire).max(seen);
        tail < crate::ring::position(self.tx().head.load(Relaxed))
    }

    /// True when either direction is, or may yet go, on a ring.
    pub fn is_on_rings(&self) -> bool {
        self.tx().phase.load(Acquire) != phase::DEMOTED
            || self.rx().phase.load(Acquire) != phase::DEMOTED
    }

    /// True when neither direction is on the anchor.
    pub fn is_all_on_rings(&self) -> bool {
        self.rx().phase.load(Relaxed) == phase::RING && self.tx().phase.load(Relaxed) == phase::RING
    }

    /// True once the stream was reset.
    pub fn is_reset(&self) -> bool {
        self.rx().phase.load(Acquire) == phase::RESET
    }

    /// True while the anchor's end is [`super::End::note_end`]'s to judge: what the kernel says of it may come from
    /// tokens.
    pub fn judges_end(&self) -> bool {
        self.tx().phase.load(Acquire) == phase::RING
            && matches!(
                self.rx().phase.load(Acquire),
                phase::RING | phase::SWITCHING
            )
    }

    /// True while bytes of the ring come behind some on the anchor.
    pub fn is_switching(&self) -> bool {
        self.rx().phase.load(Relaxed) == phase::SWITCHING
    }

    /// Something for a receiver to look at: bytes, a mark, an end, or a phase that is not the ring's.
    #[inline]
    pub fn is_receivable(&self) -> bool {
        self.has_bytes() || self.has_ended() || self.rx().phase.load(Relaxed) != phase::RING
    }

    /// Something for a receiver to look at that sleeps on the anchor: as above, and before the switch what the anchor does
    /// not tell.
    pub fn may_receive(&self) -> bool {
        if !self.is_switching() {
            return self.is_receivable();
        }
        // As the step goes (`take_switching`): an end in the ring counts behind what is still on the anchor.
        let at = self.incoming().producer.switch_at.load(Acquire);
        let marks = self.marks();
        at <= self.rx().tail.load(Relaxed)
            || at == NOT_SWITCHED && marks & mark::END != 0
            || marks & mark::RESET != 0
            || self.rx().shut.load(Relaxed) != 0
            || self.rx().anchor.load(Relaxed) & anchor::EOF != 0
    }

    /// What the other end has marked. A break counts unless
    /// - both directions had ended before: TCP has no connection then that could be reset, and nobody is told;
    /// - the other end has closed, and the rest comes on the anchor, or that is where this end receives: then the kernel tells of it,
    ///   behind that;
    /// - this end has shut both directions, also on the anchor: then the kernel tells of it, once.
    pub fn marks(&self) -> u32 {
        let marks = self.incoming().producer.mark.load(Acquire);
        if marks & mark::RESET == 0 {
            return marks;
        }
        let is_over = marks & mark::FIN != 0 && self.tx().shut.load(Relaxed) != 0;
        let has_closed = self.out().bytes.want.load(Relaxed) & want::CLOSED != 0;
        let is_behind = self.rx().phase.load(Relaxed) == phase::DEMOTED;
        let is_kernels = marks & mark::END != 0 && (has_closed || is_behind);
        let has_shut = self.incoming().bytes.want.load(Relaxed) & want::SHUT != 0
            && self.tx().phase.load(Relaxed) == phase::DEMOTED;
        if is_over || is_kernels || has_shut {
            marks & !mark::RESET
        } else {
            marks
        }
    }

    /// The error of a broken stream. As of TCP, one that broke behind its end has EPIPE, and a receive tells of the end alone.
    pub(super) fn broken_by(&self) -> i32 {
        let both = mark::FIN | mark::RESET;
        if self.incoming().producer.mark.load(Acquire) & both == both {
            libc::EPIPE
        } else {
            libc::ECONNRESET
        }
    }

    /// No more bytes will come on the ring.
    #[inline]
    pub fn has_ended(&self) -> bool {
        self.marks() != 0
            || self.rx().shut.load(Relaxed) != 0
            || self.rx().anchor.load(Relaxed) != 0
    }

    /// Something for a sender to look at: so much space, a peer that has left, or an end.
    #[inline]
    pub fn is_sendable(&self, enough: u64) -> bool {
        self.space() >= enough
            || self.peer() != Peer::Reads
            || self.marks() & mark::RESET != 0
            || self.tx().shut.load(Relaxed) != 0
            || self.rx().anchor.load(Relaxed) != 0
            || self.tx().phase.load(Relaxed) != phase::RING
    }

    /// Room in the outgoing ring, without its lock; none where the other end wrote what cannot be.
    #[inline]
    pub(super) fn space(&self) -> u64 {
        let head = crate::ring::position(self.tx().head.load(Relaxed));
        // The other end's word is behind where this direction moved to the ring until it has made a call.
        let seen = self.tx().seen_tail.load(Relaxed);
        let tail = self.out().consumer.tail.load(Acquire).max(seen);
        self.ring_size().saturating_sub(head.saturating_sub(tail))
    }

    pub(super) fn peer(&self) -> Peer {
        let wants = self.out().bytes.want.load(Relaxed);
        if wants & want::DEMOTED != 0 {
            Peer::Abandoned
        } else if wants & DEAF != 0 {
            Peer::Closed
        } else if wants & want::LEAVE != 0 || self.has_ended_ring() {
            // Who marks the end of its ring says LEAVE before that.
            Peer::Leaves
        } else {
            Peer::Reads
        }
    }

    /// The other end has marked that the rest comes on the anchor.
    #[inline]
    pub(super) fn has_ended_ring(&self) -> bool {
        self.incoming().producer.mark.load(Acquire) & mark::END != 0
    }

    /// This end has left, and its own direction may not have ended yet.
    pub fn is_leaving(&self) -> bool {
        self.incoming().bytes.want.load(Acquire) & want::LEAVE != 0
    }

    /// True when the other end has asked to leave, so that a caller who only looks must follow.
    pub fn peer_has_left(&self) -> bool {
        // Who marks the end of its ring has said LEAVE before that.
        let has_left = self.out().bytes.want.load(Relaxed) & (want::DEMOTED | want::LEAVE) != 0;
        (has_left || self.has_ended_ring())
            && match self.tx().phase.load(Relaxed) {
                phase::RING => true,
                // Else the thread that is inside a kernel send does what is left.
                phase::ANCHOR => !self.is_leaving() || self.tx().in_kernel.load(Relaxed) == 0,
                _ => false,
            }
    }
}
