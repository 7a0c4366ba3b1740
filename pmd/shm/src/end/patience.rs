//! How long a process waits for what other ends owe it: a token that was counted, the end of RINGING, room for what they have
//! left in a ring. Only a close and an end that must be the kernel's at once wait for any of it, and all of that is what
//! other programs say, who may be hostile. So the time is one account for the whole process, and small: an honest end that has
//! lost its core in between needs some milliseconds, and who wants to hold up others soon gets no wait at all.

use super::{Anchor, Process, Until};
use crate::sync::{AtomicU64, Ordering::*};

/// Turns of giving way before time counts. An end that is just inside its send is done by then.
const FREE_TURNS: u32 = if cfg!(loom) { 0 } else { 64 };

/// So many milliseconds of waiting in each so long time.
#[derive(Clone, Copy, Debug)]
pub struct Patience<'a> {
    /// The account: when the present time began, in milliseconds (upper half), and what was spent since. `None`: each wait has
    /// so much.
    pub spent: Option<&'a AtomicU64>,
    /// Milliseconds of waiting,
    pub most: u32,
    /// and in how many.
    pub every: u32,
}

impl Patience<'_> {
    /// When the present time began, and what is spent of it.
    fn account(&self, now: u32) -> (u32, u32) {
        let word = self.spent.map_or(0, |spent| spent.load(Relaxed));
        let (start, spent) = ((word >> 32) as u32, word as u32);
        let age = now.wrapping_sub(start);
        // Another thread may have begun it since `now` was asked for.
        let is_present = age < self.every || start.wrapping_sub(now) < self.every;
        if word != 0 && is_present {
            (start, spent)
        } else {
            (now, 0)
        }
    }

    fn left(&self, now: u64) -> u32 {
        self.most.saturating_sub(self.account(now as u32).1)
    }

    fn spend(&self, now: u64, ms: u32) {
        let Some(account) = self.spent else { return };
        // Two at once: one of them may go uncounted.
        let (start, spent) = self.account(now as u32);
        let word = u64::from(start) << 32 | u64::from(spent.saturating_add(ms));
        account.store(word, Relaxed);
    }
}

/// The waits of one call.
#[derive(Debug)]
pub(super) struct Waiting<'a> {
    patience: Patience<'a>,
    turns: u32,
    own: u32,
}

impl<'a> Waiting<'a> {
    pub(super) fn new(patience: Patience<'a>) -> Self {
        Waiting {
            patience,
            turns: 0,
            own: 0,
        }
    }

    /// Spends what `wait` takes, which is told how much there is. False, and it is not called, when nothing is left.
    fn spend<P: Process, T>(&mut self, process: &P, wait: impl FnOnce(u32) -> T) -> Option<T> {
        let before = process.milliseconds();
        let left = self.patience.left(before).saturating_sub(self.own);
        if left == 0 {
            return None;
        }
        let result = wait(left);
        let now = process.milliseconds();
        let ms = now.saturating_sub(before).min(u64::from(u32::MAX)) as u32;
        if self.patience.spent.is_none() {
            self.own = self.own.saturating_add(ms);
        }
        self.patience.spend(now, ms);
        Some(result)
    }

    /// Lets others run. False when there is no patience left.
    pub(super) fn turn<P: Process>(&mut self, process: &P) -> bool {
        if self.turns < FREE_TURNS {
            self.turns += 1;
            process.give_way();
            return true;
        }
        self.spend(process, |_| process.rest()).is_some()
    }

    /// Waits for something on the anchor. False when it has not come.
    pub(super) fn on_anchor<P: Anchor + Process>(&mut self, socket: &P, what: Until) -> bool {
        self.spend(socket, |ms| socket.wait(what, ms)) == Some(true)
    }
}
