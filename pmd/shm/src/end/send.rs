//! Sending: which way the bytes go, and onto the ring as many as fit.

use super::shut::GONE;
use super::{Anchor, Buffers, End, Process, Sending};
use crate::layout::{anchor, mark, phase, want};
use crate::reason::Reason;
use crate::ring::Violation;
use crate::sync::{AtomicU32, Ordering::*, model_fence};
use crate::wake;

/// A counter that is one higher while somebody is inside a kernel call.
#[derive(Debug)]
pub struct Counted<'a>(&'a AtomicU32);

impl<'a> Counted<'a> {
    /// Counts one in.
    pub fn enter(counter: &'a AtomicU32) -> Self {
        counter.fetch_add(1, SeqCst);
        model_fence();
        Counted(counter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
        model_fence();
    }
}

/// Where a sender's bytes go.
#[derive(Debug)]
pub enum Way<'a> {
    /// Onto the ring.
    Ring,
    /// To the anchor, by the caller, while this counts it in; then it calls [`End::after_kernel_send`].
    Kernel(Option<Counted<'a>>),
    /// Nowhere yet: the anchor has no room for what comes before them ([`phase::LEAVING`]).
    Behind,
    /// Nowhere: EPIPE.
    Pipe,
    /// Nowhere: the connection is broken. [`End::tell_break`] says how a call that has sent nothing ends.
    Broken,
}

/// What became of a step of sending.
#[derive(Debug)]
pub enum Sent<'a> {
    /// Everything is on the ring.
    All,
    /// The ring is full: ask for space, look again, sleep.
    Full,
    /// The anchor has no room for what comes before the rest, see [`Way::Behind`]: wait for that, look again.
    Behind,
    /// The rest is the anchor's, see [`Way::Kernel`].
    Kernel(Option<Counted<'a>>),
    /// EPIPE.
    Pipe,
    /// The connection is broken: ECONNRESET, unless a part was sent. Then that is the result, and the next call is told.
    Broken,
}

impl<'a, S: Anchor + Process> End<'a, S> {
    /// Sends from `done` on, as much as fits; moves the direction to the ring if it can. Never waits.
    #[inline]
    pub fn send(&self, from: &Buffers, done: &mut usize) -> Sent<'a> {
        loop {
            let half = self.lock_tx();
            match half.way() {
                Way::Ring => {}
                Way::Kernel(counted) => return Sent::Kernel(counted),
                Way::Behind => return Sent::Behind,
                Way::Pipe => return Sent::Pipe,
                Way::Broken => return self.broken_after(*done),
            }
            if half.fill(from, done).is_err() {
                self.reset(Reason::Violation);
                return self.broken_after(*done);
            }
            if *done == from.total {
                return Sent::All;
            }
            half.follow_wants();
            drop(half);
            if self.tx().phase.load(Relaxed) == phase::RING {
                return Sent::Full;
            }
        }
    }

    /// A send finds the connection broken, when it has sent so much.
    #[cold]
    fn broken_after(&self, done: usize) -> Sent<'a> {
        if done != 0 || self.tell_break() {
            Sent::Broken
        } else {
            Sent::Pipe
        }
    }

    /// The connection is broken, and a call reports it that has sent nothing: true for ECONNRESET, which is told once, false for EPIPE.
    pub fn tell_break(&self) -> bool {
        self.take_send_error() && self.shared.broken_by() != libc::EPIPE
    }

    /// Tells the producer of what comes in, which waits for space, that there is some. A token may only be sent on
    /// a direction that has left the anchor, so this one must switch first; when another thread is in
    /// a kernel send, that one looks again when it is done.
    pub fn answer_space(&self) {
        let half = self.lock_tx();
        let on_ring = match self.tx().phase.load(Acquire) {
            phase::RING => true,
            phase::ANCHOR => half.try_switch(),
            _ => false,
        };
        // Under the lock: no token may follow the mark that ends this direction.
        if on_ring {
            self.answer(&self.incoming().space);
        }
    }

    /// After a kernel send that was counted: what had to wait for it.
    pub fn after_kernel_send(&self) {
        if self.shared.is_leaving() && self.tx().phase.load(Acquire) == phase::ANCHOR {
            let half = self.lock_tx();
            if !half.is_nested() {
                half.end_sending();
            }
        }
        if self.rx().phase.load(Acquire) == phase::RING
            && wake::asked(&self.incoming().space) & (want::WAKE | want::BELL) != 0
        {
            self.answer_space();
        }
    }

    /// Bytes on the ring that the other end has not received. `None`: ask the kernel.
    pub fn unsent(&self) -> Option<u64> {
        let half = self.lock_tx();
        if self.tx().phase.load(Acquire) != phase::RING {
            return None;
        }
        let space = half.sender.space().ok()?;
        Some(self.shared.ring_size() - space)
    }
}

impl<'a, S: Anchor + Process> Sending<'_, 'a, S> {
    /// Finds the way out, and moves the direction on where it is due.
    #[inline]
    pub fn way(&self) -> Way<'a> {
        let tx = self.end.tx();
        if tx.shut.load(Relaxed) != 0 {
            return self.way_when_shut();
        }
        // Before anything is copied: an end that takes nothing more is to be heard of by the first send, all of which goes one way.
        // The kernel may answer a first part with a reset.
        let is_heard = self.end.out().bytes.want.load(Relaxed) & GONE == 0;
        match tx.phase.load(Acquire) {
            phase::RING if is_heard => Way::Ring,
            _ => self.way_off_the_ring(),
        }
    }

    /// Where the kernel has the direction, it has ended there, and may have another error.
    #[cold]
    fn way_when_shut(&self) -> Way<'a> {
        let end = self.end;
        if end.shared.marks() & mark::RESET != 0 {
            self.give_up_ring();
        }
        match end.tx().phase.load(Acquire) {
            phase::DEMOTED if self.takes_noted_error() => Way::Broken,
            phase::DEMOTED => Way::Kernel(None),
            phase::RESET => Way::Broken,
            _ => Way::Pipe,
        }
    }

    /// An error that a look has taken from the kernel waits for any call. True, once, where the kernel has the direction, and would
    /// have told this one of it.
    fn takes_noted_error(&self) -> bool {
        let noted = &self.end.rx().anchor;
        noted.load(Acquire) & anchor::ERROR != 0
            && noted.fetch_and(!anchor::ERROR, AcqRel) & anchor::ERROR != 0
    }

    #[cold]
    fn way_off_the_ring(&self) -> Way<'a> {
        let end = self.end;
        let tx = end.tx();
        self.give_up_ring();
        if tx.phase.load(Acquire) == phase::ANCHOR {
            if end.shared.is_leaving() {
                self.end_sending();
            } else {
                self.try_switch();
            }
        }
        self.send_rest();
        match tx.phase.load(Acquire) {
            phase::RING => Way::Ring,
            phase::ANCHOR | phase::DEMOTED if self.takes_noted_error() => Way::Broken,
            phase::ANCHOR => Way::Kernel(Some(Counted::enter(&tx.in_kernel))),
            phase::LEAVING => Way::Behind,
            phase::RESET => Way::Broken,
            _ => Way::Kernel(None),
        }
    }

    /// Copies as much as fits, and tells the other end. `Err`: it wrote nonsense.
    #[inline]
    fn fill(&self, from: &Buffers, done: &mut usize) -> Result<(), Violation> {
        let sender = &self.sender;
        while *done < from.total {
            let left = (from.total - *done) as u64;
            let Some(space) = sender.reserve(left.min(self.end.socket.limits().chunk))? else {
                return Ok(());
            };
            from.each(*done, space.len as usize, |at, len, skip| {
                // SAFETY: the program's buffer, as long as it says.
                unsafe { sender.fill(space, skip, at, len) }
            });
            *done += space.len as usize;
            if !self.publish() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Publishes what was filled, and answers the other end if it asks. False when the direction has left the ring then.
    #[inline]
    pub fn publish(&self) -> bool {
        let end = self.end;
        self.sender.publish();
        if wake::asked(&end.out().bytes) == 0 {
            return true;
        }
        self.after_answer(end.answer(&end.out().bytes));
        end.tx().phase.load(Relaxed) == phase::RING
    }

    /// The ring is full: looks whether the other end has left or closed, or its anchor has ended, so that it takes nothing more.
    pub fn follow_wants(&self) {
        let (shared, rx) = (self.end.shared, self.end.rx());
        // An end that the program has made itself says nothing of the other one. The anchor's comes after the mark, so it is looked at first.
        let has_gone = rx.anchor.load(Acquire) != 0 && rx.shut.load(Relaxed) == 0;
        let said = if shared.has_ended_ring() {
            // Who marks that says LEAVE before.
            want::LEAVE
        } else if has_gone {
            want::CLOSED
        } else {
            0
        };
        let wants = self.end.out().bytes.want.load(Acquire) | said;
        if wants & (want::DEMOTED | want::CLOSED | want::LEAVE) != 0 {
            self.after_answer(wants);
        } else if wants & want::SHUT != 0 || shared.marks() & mark::RESET != 0 {
            self.give_up_ring();
        }
    }
}
