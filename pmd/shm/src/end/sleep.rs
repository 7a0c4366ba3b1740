//! Who sleeps on an end's anchor, so that nobody takes a token away that somebody else needs.

use super::{Anchor, End, Process, Shared};
use crate::layout::want;
use crate::sync::{AtomicU64, Ordering::*};

/// Milliseconds in which whoever was woken has looked, as a rule.
pub const PATIENCE_MS: u32 = 100;

/// A sleeper on a stream's anchor, for bytes or for space.
///
/// All of an end's sleepers sleep on one fd, and a token ends the sleep of each of them, as long
/// as it lies there. Whoever is counted was so before the tokens that are there now came, or is
/// about to look, and stays counted until it has looked. So only one that finds nobody counted
/// takes them off; one that finds both others and tokens gives way, until those have looked.
///
/// On a busy machine that can take any time: a thread that was woken may wait long for a core. Those
/// that never look were killed or cancelled in their sleep, and are found by their names.
#[derive(Debug)]
pub struct Sleeper<'a> {
    shared: &'a Shared,
    /// Its entry in the stream's table, or 0.
    name: u64,
}

impl<'a> Sleeper<'a> {
    /// Clears the anchor of tokens and counts the caller in, who asks the other end for a sign
    /// and looks for what it waits for after this. `None`: give way and look again.
    pub fn enter<S: Anchor + Process>(end: &End<'a, S>) -> Option<Self> {
        let (shared, rx) = (end.shared, end.shared.rx());
        let half = end.lock_rx();
        half.drain();
        let others = rx.waiters.fetch_add(1, SeqCst);
        let mut sleeper = Sleeper { shared, name: 0 };
        if others != 0 && half.outstanding() != 0 {
            if !end.are_late() {
                return None;
            }
            end.forget_ended();
            if rx.waiters.load(SeqCst) > 1 {
                drop(half);
                drop(sleeper);
                // Not for ever at full speed.
                end.socket.rest();
                return None;
            }
            // For one of this thread's own further up the stack, in whose sleep a handler runs.
            end.ask_for_bytes(want::WAKE);
            end.ask_for_space(want::WAKE);
            half.drain_all();
        }
        // Named when counted: who is killed in between is waited for, and nobody is taken for dead.
        let name = end.socket.name();
        let enter = |entry: &AtomicU64| entry.compare_exchange(0, name, SeqCst, Relaxed).is_ok();
        if rx.sleepers.iter().any(enter) {
            sleeper.name = name;
        }
        Some(sleeper)
    }

    /// The sleeper of that name, that was counted in and forgotten.
    pub fn remembered(shared: &'a Shared, name: u64) -> Self {
        Sleeper { shared, name }
    }
}

impl Drop for Sleeper<'_> {
    fn drop(&mut self) {
        let mut entries = self.shared.rx().sleepers.iter();
        let leave = |entry: &AtomicU64| {
            entry
                .compare_exchange(self.name, 0, SeqCst, Relaxed)
                .is_ok()
        };
        // Whose entry is gone was counted out by somebody else.
        if self.name == 0 || entries.any(leave) {
            count_out(self.shared);
        }
    }
}

fn count_out(shared: &Shared) {
    let less = |count: u32| count.checked_sub(1);
    let _ = shared.rx().waiters.fetch_update(SeqCst, SeqCst, less);
}

impl<S: Anchor + Process> End<'_, S> {
    /// True when the tokens that are on the anchor have been there for long.
    fn are_late(&self) -> bool {
        let rx = self.rx();
        let now = self.socket.milliseconds() as u32;
        let noted = rx.gave_way.load(Relaxed);
        let drained = rx.drained.load(Relaxed);
        if noted as u32 != drained || noted == 0 {
            rx.gave_way
                .store(u64::from(now) << 32 | u64::from(drained), Relaxed);
            return false;
        }
        now.wrapping_sub((noted >> 32) as u32) > PATIENCE_MS
    }

    /// Counts those sleepers out that have ended in their sleep; and this thread's own, since it is here.
    fn forget_ended(&self) {
        let me = self.socket.name();
        for entry in &self.rx().sleepers {
            let name = entry.load(SeqCst);
            let has_ended = name != 0 && !self.socket.is_awake(name);
            if (has_ended || name == me) && entry.compare_exchange(name, 0, SeqCst, Relaxed).is_ok()
            {
                count_out(self.shared);
            }
        }
    }
}
