//! Naps: short sleeps on the word of a request for bytes (a futex), before a sleep on the anchor. Nothing is sent to end one, and
//! nothing is counted.
//!
//! The argument is that of [`crate::wake`]: who naps sets NAP, and looks once more; the other end publishes, and looks at the word.
//! It takes NAP away, and wakes who sleeps on the word. The kernel looks at the word before it lets a thread sleep, so who comes later than that does not
//! sleep. One thread of an end naps at a time, so there is one to be woken.
//!
//! What comes unasked (a mark, a break) and what is changed at one's own end (see `change.rs`) ends a nap as well. What the anchor alone
//! tells does not: the other end's death, a close or bytes past the shim. So a caller naps for a short time, and
//! then sleeps on the anchor. That bounds also what the other end can do by waking nobody, or by moving the sleeper to another word.

use super::{Anchor, End, Process};
use crate::layout::{phase, want};
use crate::sync::{AtomicU32, AtomicU64, Ordering::*, fence};
use crate::wake;

/// A thread that is about to nap, or does.
#[derive(Debug)]
pub struct Nap<'a> {
    word: &'a AtomicU32,
    value: u32,
    napper: &'a AtomicU64,
}

impl<'a> Nap<'a> {
    /// Asks for bytes: the caller looks for them after this, and may sleep then. `None` where the ring is not what comes next, or
    /// another thread naps (or was killed in a nap: then nobody does any more).
    pub fn enter<S: Anchor + Process>(end: &End<'a, S>) -> Option<Self> {
        let rx = end.rx();
        let napper = &rx.napper;
        if rx.phase.load(Acquire) != phase::RING
            || napper
                .compare_exchange(0, end.socket.name(), AcqRel, Relaxed)
                .is_err()
        {
            return None;
        }
        Some(Nap {
            word: &end.incoming().bytes.want,
            value: end.ask_for_bytes(want::NAP),
            napper,
        })
    }

    /// On what to sleep, and as long as it has which value.
    pub fn place(&self) -> (&'a AtomicU32, u32) {
        (self.word, self.value)
    }
}

impl Drop for Nap<'_> {
    fn drop(&mut self) {
        if self.word.load(Relaxed) & want::NAP != 0 {
            wake::unask(self.word, want::NAP);
        }
        self.napper.store(0, Release);
    }
}

impl<S: Anchor + Process> End<'_, S> {
    /// Ends the nap of a thread of this end, if one naps: behind a change that it is to see.
    pub(super) fn end_own_nap(&self) {
        // Who naps has said so before it looked, with such a fence between.
        fence(SeqCst);
        if self.rx().napper.load(Relaxed) != 0 {
            self.end_nap(&self.incoming().bytes.want);
        }
    }

    /// A process is known to have no thread that naps.
    pub(super) fn forget_nap_of(&self, pid: u32) {
        let napper = &self.rx().napper;
        let name = napper.load(Relaxed);
        if (name >> 32) as u32 == pid {
            let _ = napper.compare_exchange(name, 0, AcqRel, Relaxed);
        }
    }

    /// Ends the nap of a thread of the other end, which has not asked for what it is to see.
    pub(super) fn end_others_nap(&self) {
        self.end_nap(&self.out().bytes.want);
    }

    fn end_nap(&self, word: &AtomicU32) {
        if wake::take_nap(word) {
            self.socket.wake(word);
        }
    }
}
