//! The end of a stream whose rings something else writes and reads in place ([`Process::IN_PLACE`]): the daemon's end of a stream
//! to another node. An engine puts what comes from there into the outgoing ring, and stores its head word; and it takes what the
//! program has put into the incoming one.
//!
//! Two threads drive it, of which each writes words of its own. One makes the calls on the anchor, and changes phases. The other one
//! watches the ring for the engine ([`TxState::head`](crate::layout::TxState::head) is its, and the marks and the consumer's
//! tail); it never waits, takes no lock but by trying, and makes no call. What both do is the switch of the incoming direction, since a
//! program that switches gives no sign.
//!
//! What lies on the anchor, and what stands in the outgoing ring for a program that is not on it (before the switch, after it
//! has left), goes through here, as much as there is now. Neither direction is ended by this end for its own reasons: the engine
//! goes on to write into the ring.

use super::receive::Took;
use super::{Anchor, Buffers, End, How, Process, Receiving, Shared};
use crate::layout::{anchor, mark, phase, want};
use crate::lock::{self, Owner};
use crate::ring::Receiver;
use crate::sync::Ordering::*;

impl<S: Anchor + Process> End<'_, S> {
    /// Takes what the anchor has while that is what comes next, as much as there is room for; the position of that is
    /// [`RxState::tail`](crate::layout::RxState::tail). False when there is nothing now, or the direction has ended.
    pub fn receive_anchor(&self, to: &Buffers) -> bool {
        let half = self.lock_rx();
        let mut done = 0;
        let took = match self.rx().phase.load(Acquire) {
            phase::SWITCHING => half.take_switching(to, How::default(), &mut done),
            phase::ANCHOR | phase::DEMOTED => half.take_from_kernel(to, &mut done),
            _ => return false,
        };
        match took {
            Took::Some => done != 0,
            Took::Again | Took::Overtaken | Took::Left => true,
            Took::Nothing | Took::Few(_) => false,
            Took::End => {
                // Of this direction alone: who has gone is known by the other one.
                self.add_anchor_bits(anchor::EOF);
                false
            }
            Took::Error(_) => {
                self.note_end(true);
                false
            }
        }
    }

    /// Gives the program what stands in the ring while it reads the anchor, in at most so many sends, or moves the direction to
    /// the ring. True when all of them went.
    pub fn send_in_place(&self, most: usize) -> bool {
        let half = self.lock_tx();
        let wants = self.out().bytes.want.load(Acquire);
        if self.tx().phase.load(Acquire) == phase::RING && wants & want::DEMOTED != 0 {
            half.begin_rest();
        }
        for _ in 0..most {
            let goes_on = match self.tx().phase.load(Acquire) {
                phase::ANCHOR => !half.try_switch() && half.send_piece(),
                phase::LEAVING => half.send_piece(),
                _ => false,
            };
            if !goes_on {
                return false;
            }
        }
        true
    }

    /// Sends a token for an ask that was taken, where the program can tell it from data: a direction that has not left the
    /// anchor does so first, if it can.
    pub fn send_token_in_place(&self) {
        let half = self.lock_tx();
        let is_on_ring = match self.tx().phase.load(Acquire) {
            phase::RING => true,
            phase::ANCHOR => half.try_switch(),
            _ => false,
        };
        if is_on_ring {
            self.send_token();
        }
    }
}

impl<S: Anchor + Process> Receiving<'_, '_, S> {
    /// Receives what is the kernel's for ever.
    fn take_from_kernel(&self, to: &Buffers, done: &mut usize) -> Took {
        use super::Got;
        let (end, tail) = (self.end, &self.end.rx().tail);
        let stop = if to.total == 0 {
            Some(end.socket.peek())
        } else {
            self.take_anchor(to, 0, to.total, How::default(), done)
        };
        if *done != 0 {
            tail.store(tail.load(Relaxed) + *done as u64, Relaxed);
            return Took::Some;
        }
        match stop {
            Some(Got::End) => Took::End,
            Some(Got::Error(error)) => Took::Error(error),
            _ => Took::Nothing,
        }
    }
}

impl Shared {
    /// [`End::settle_switch`] by the thread that watches the ring: where the half is held it is left alone, and looked at later.
    /// True when the direction is on the ring, or has been.
    pub fn try_settle_switch(&self, me: Owner) -> bool {
        let rx = self.rx();
        match rx.phase.load(Acquire) {
            phase::RING | phase::DEMOTED => return true,
            phase::SWITCHING => {}
            _ => return false,
        }
        let Some(at) = Receiver::switch_at(self.incoming()) else {
            return false;
        };
        if at != rx.tail.load(Relaxed) {
            return false;
        }
        let Ok(taken) = lock::try_take(&rx.lock, me) else {
            return false;
        };
        if rx.phase.load(Acquire) == phase::SWITCHING && at == rx.tail.load(Relaxed) {
            Receiver::new(rx, self.incoming(), self.ring_in, false).switch(at);
            self.set_receiving_in_place(phase::RING);
        }
        lock::release(&rx.lock, taken);
        rx.phase.load(Acquire) == phase::RING
    }

    /// The direction has ended behind all that is in the outgoing ring, and the program reads that.
    pub fn end_in_place(&self) {
        self.set_sending_shut_in_place();
        self.out().producer.mark.fetch_or(mark::FIN, AcqRel);
    }
}
