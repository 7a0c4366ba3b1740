//! The two halves of an end, and what holding one means.

use super::{Anchor, End, Process};
use crate::layout::phase;
use crate::lock::{self, Owner, Taken};
use crate::ring::{Receiver, Sender};
use crate::sync::{AtomicU64, Ordering::*};
use crate::wake;

/// Tries after which a waiter for a lock gives way, and looks whether the owner is dead.
const TRIES: u32 = if cfg!(loom) { 1 } else { 64 };

impl<'a, S: Anchor + Process> End<'a, S> {
    /// Takes the sending half.
    #[inline]
    pub fn lock_tx(&self) -> Sending<'_, 'a, S> {
        let (taken, recovered) = self.take_lock(&self.tx().lock);
        let sender = Sender::new(
            self.tx(),
            self.out(),
            self.shared.ring_out,
            taken == Taken::Nested,
        );
        if recovered {
            sender.recover();
        }
        Sending {
            end: self,
            sender,
            taken,
        }
    }

    /// Takes the receiving half.
    #[inline]
    pub fn lock_rx(&self) -> Receiving<'_, 'a, S> {
        let (taken, _) = self.take_lock(&self.rx().lock);
        let receiver = Receiver::new(
            self.rx(),
            self.incoming(),
            self.shared.ring_in,
            taken == Taken::Nested,
        );
        Receiving {
            end: self,
            receiver,
            taken,
        }
    }

    /// Takes a half's lock, whoever has it. True when it was taken from a dead process.
    #[inline]
    fn take_lock(&self, word: &AtomicU64) -> (Taken, bool) {
        let me = self.socket.me();
        // A fork counts the child among the holders before there is one.
        let alone = self.socket.is_alone() && self.page().holders.load(Relaxed) == 1;
        let tried = if alone {
            lock::try_take_alone(word, me)
        } else {
            lock::try_take(word, me)
        };
        match tried {
            Ok(taken) => (taken, false),
            Err(_) => self.take_lock_slowly(word, me),
        }
    }

    #[cold]
    fn take_lock_slowly(&self, word: &AtomicU64, me: Owner) -> (Taken, bool) {
        let mut tries = 0_u32;
        loop {
            match lock::try_take(word, me) {
                Ok(taken) => return (taken, false),
                Err(owner) => {
                    tries = tries.wrapping_add(1);
                    if !tries.is_multiple_of(TRIES) {
                        core::hint::spin_loop();
                    } else {
                        self.socket.give_way();
                        if tries.is_multiple_of(64 * TRIES)
                            && !self.socket.is_running(Owner::pid_of(owner))
                            && lock::take_from_dead(word, owner, me)
                        {
                            return (Taken::Outer, true);
                        }
                    }
                }
            }
        }
    }

    /// After exec: frees the locks of threads of the program that this process was, and forgets that one napped.
    pub fn free_own_locks(&self, pid: u32) {
        for word in [&self.tx().lock, &self.rx().lock] {
            let owner = word.load(Relaxed);
            if owner != 0 && Owner::pid_of(owner) == pid {
                let _ = word.compare_exchange(owner, 0, AcqRel, Relaxed);
            }
        }
        self.forget_nap_of(pid);
    }
}

/// The sending half, held.
#[derive(Debug)]
pub struct Sending<'e, 'a, S: Anchor + Process> {
    pub(super) end: &'e End<'a, S>,
    /// The ring's producer.
    pub sender: Sender<'a>,
    taken: Taken,
}

impl<S: Anchor + Process> Sending<'_, '_, S> {
    /// True when further up this thread's stack the half is held already.
    #[inline]
    pub fn is_nested(&self) -> bool {
        self.taken == Taken::Nested
    }

    /// What a nested sender left behind since the last publication.
    #[inline]
    fn left_behind(&self) -> bool {
        !S::IN_PLACE && self.sender.is_behind() && self.end.tx().phase.load(Relaxed) == phase::RING
    }
}

impl<S: Anchor + Process> Drop for Sending<'_, '_, S> {
    #[inline]
    fn drop(&mut self) {
        if self.taken == Taken::Nested {
            return;
        }
        let end = self.end;
        loop {
            if self.left_behind() {
                self.sender.publish();
                if wake::asked(&end.out().bytes) != 0 {
                    end.answer(&end.out().bytes);
                }
            }
            lock::release(&end.tx().lock, self.taken);
            // Once more, since one may have come before the release. Whoever has the lock by now
            // comes here as well.
            if !self.left_behind()
                || !matches!(
                    lock::try_take(&end.tx().lock, end.socket.me()),
                    Ok(Taken::Outer)
                )
            {
                return;
            }
        }
    }
}

/// The receiving half, held.
#[derive(Debug)]
pub struct Receiving<'e, 'a, S: Anchor + Process> {
    pub(super) end: &'e End<'a, S>,
    /// The ring's consumer.
    pub receiver: Receiver<'a>,
    taken: Taken,
}

impl<S: Anchor + Process> Receiving<'_, '_, S> {
    /// True when further up this thread's stack the half is held already.
    #[inline]
    pub fn is_nested(&self) -> bool {
        self.taken == Taken::Nested
    }

    /// What a nested receiver left behind since the last publication.
    #[inline]
    fn left_behind(&self) -> bool {
        !S::IN_PLACE
            && self.receiver.is_behind()
            && self.end.rx().phase.load(Relaxed) == phase::RING
    }
}

impl<S: Anchor + Process> Drop for Receiving<'_, '_, S> {
    #[inline]
    fn drop(&mut self) {
        if self.taken == Taken::Nested {
            return;
        }
        let end = self.end;
        loop {
            if self.left_behind() && self.receiver.publish() {
                end.rx().space_due.store(1, Relaxed);
            }
            lock::release(&end.rx().lock, self.taken);
            // As for the sending half.
            if !self.left_behind()
                || !matches!(
                    lock::try_take(&end.rx().lock, end.socket.me()),
                    Ok(Taken::Outer)
                )
            {
                return;
            }
        }
    }
}
