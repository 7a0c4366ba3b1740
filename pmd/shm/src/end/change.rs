//! What changes at one's own end, and is written here alone.
//!
//! The other end tells of what *it* changes, if it is asked ([`crate::wake`]). Of a phase, an own shutdown, an end of the
//! anchor that was noted, and of tokens that were taken off it, nobody tells: whoever waits for the connection elsewhere
//! in this process must look, and that is said by [`Process::changed`], behind each of them. Whoever naps is woken.

use super::{Anchor, End, Process, Shared};
use crate::sync::Ordering::*;

impl<S: Anchor + Process> End<'_, S> {
    /// The receiving half goes on to another phase.
    pub(super) fn set_receiving(&self, phase: u32) {
        self.rx().phase.store(phase, Release);
        self.changed();
    }

    /// The sending half goes on to another phase.
    pub(super) fn set_sending(&self, phase: u32) {
        self.tx().phase.store(phase, Release);
        self.changed();
    }

    /// The program has ended what it sends.
    pub(super) fn set_sending_shut(&self) {
        self.tx().shut.store(1, Release);
        self.changed();
    }

    /// The program wants nothing more.
    pub(super) fn set_receiving_shut(&self) {
        self.rx().shut.store(1, Release);
        self.changed();
    }

    /// The anchor has told something of its end: bits of `anchor`.
    pub(super) fn add_anchor_bits(&self, bits: u32) {
        if self.rx().anchor.fetch_or(bits, AcqRel) & bits != bits {
            self.changed();
        }
    }
}

impl<S: Anchor + Process> End<'_, S> {
    fn changed(&self) {
        self.end_own_nap();
        self.socket.changed();
    }
}

/// By the thread that watches the rings of an end whose bytes go in place, where nobody waits elsewhere in the process.
impl Shared {
    /// The receiving half goes on to another phase.
    pub(super) fn set_receiving_in_place(&self, phase: u32) {
        self.rx().phase.store(phase, Release);
    }

    /// What is sent has ended.
    pub(super) fn set_sending_shut_in_place(&self) {
        self.tx().shut.store(1, Release);
    }
}
