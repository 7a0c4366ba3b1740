//! Calls in vain: control connections that end before their maker has attached or was answered. Each costs the control thread some
//! ten times of what turning it away costs. So who calls in vain very often is turned away unheard for a moment; `callers.rs` asks.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Calls in vain of a user within a spell, after which the user's further callers are turned away until its end.
const MOST: u32 = 1000;
const SPELL: Duration = Duration::from_secs(1);
/// Users that are counted in a spell.
const USERS: usize = 4096;

/// See the module's text.
#[derive(Debug)]
pub(super) struct CallsInVain {
    since: Instant,
    of: HashMap<u32, u32>,
}

impl CallsInVain {
    pub fn new(now: Instant) -> Self {
        CallsInVain {
            since: now,
            of: HashMap::new(),
        }
    }

    /// A user has called in vain.
    pub fn note(&mut self, uid: u32, now: Instant) {
        self.begin(now);
        if self.of.len() < USERS || self.of.contains_key(&uid) {
            let calls = self.of.entry(uid).or_default();
            *calls = calls.saturating_add(1);
        }
    }

    /// Is a user's next caller to be turned away unheard?
    pub fn are_too_many(&mut self, uid: u32, now: Instant) -> bool {
        self.begin(now);
        self.of.get(&uid).is_some_and(|calls| *calls >= MOST)
    }

    fn begin(&mut self, now: Instant) {
        if now.duration_since(self.since) >= SPELL {
            self.since = now;
            self.of.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_calls_in_vain_very_often_is_not_heard_for_a_moment_and_others_are() {
        let start = Instant::now();
        let mut calls = CallsInVain::new(start);
        for _ in 0..MOST {
            assert!(!calls.are_too_many(7, start));
            calls.note(7, start);
        }
        assert!(calls.are_too_many(7, start) && !calls.are_too_many(8, start));
        assert!(calls.are_too_many(7, start + SPELL / 2));
        assert!(!calls.are_too_many(7, start + SPELL));
    }

    #[test]
    fn very_many_users_take_no_more_room() {
        let now = Instant::now();
        let mut calls = CallsInVain::new(now);
        (0..2 * USERS as u32).for_each(|uid| calls.note(uid, now));
        assert_eq!(calls.of.len(), USERS);
    }
}
