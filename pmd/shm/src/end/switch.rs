//! From the anchor to the rings: an end is promoted, then each direction switches at an exact position.

use super::shut::GONE;
use super::{Anchor, End, Process, Sending};
use crate::layout::{phase, want};
use crate::ring::Receiver;
use crate::sync::{Ordering::*, model_fence};

impl<S: Anchor + Process> End<'_, S> {
    /// Sets the end up, the first time that a process has mapped it: finds the position of the receiving half, and
    /// publishes that it is ready, so that the other end may switch. False when it can't be known.
    ///
    /// Nobody may be inside a kernel call on the anchor, and nobody may begin one.
    pub fn promote(&self, nonblock: bool) -> bool {
        if !self.socket.is_open() {
            return false;
        }
        let Some(position) = self.socket.received() else {
            return false;
        };
        self.page().installed.store(1, Release);
        self.page().nonblock.store(u32::from(nonblock), Relaxed);
        self.rx().tail.store(position, Relaxed);
        self.set_receiving(phase::SWITCHING);
        // Whoever sleeps on the anchor already must be woken by the first byte on the ring.
        let incoming = self.incoming();
        incoming.bytes.want.fetch_or(want::WAKE, SeqCst);
        self.note_barriers();
        incoming.consumer.ready.store(1, Release);
        true
    }

    /// Says whether the processes of this end take part in barriers.
    pub fn note_barriers(&self) {
        let there = u32::from(self.socket.has_barriers());
        self.out().producer.barriers.store(there, Relaxed);
    }

    /// Moves the receiving half to the ring when it stands where the other end switched: so that a
    /// program which only sends gets there as well.
    pub fn settle_switch(&self) {
        let rx = self.rx();
        if rx.phase.load(Acquire) != phase::SWITCHING {
            return;
        }
        let half = self.lock_rx();
        if let Some(at) = Receiver::switch_at(self.incoming())
            && !half.is_nested()
            && rx.phase.load(Acquire) == phase::SWITCHING
            && at == rx.tail.load(Relaxed)
        {
            half.receiver.switch(at);
            self.set_receiving(phase::RING);
        }
    }
}

impl<S: Anchor + Process> Sending<'_, '_, S> {
    /// Moves the sending direction to the ring, if nobody is inside a kernel send.
    pub fn try_switch(&self) -> bool {
        let end = self.end;
        model_fence();
        if end.out().consumer.ready.load(Acquire) != 1
            || self.is_nested()
            || end.socket.is_sending()
            || end.tx().in_kernel.load(SeqCst) != 0
            || end.out().bytes.want.load(Acquire) & GONE != 0
        {
            return false;
        }
        let Some(at) = end.socket.sent() else {
            return false;
        };
        if S::IN_PLACE {
            self.sender.switch_in_place(at);
        } else {
            self.sender.switch(at);
        }
        end.set_sending(phase::RING);
        true
    }
}
