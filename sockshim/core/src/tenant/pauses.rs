//! When the daemon may be asked again: each time later where it has no place for this process, or where the process changes
//! its user again and again. Used by `attach.rs`, under the tenant's lock; the time comes in, in nanoseconds.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Milliseconds between two attempts to reach a daemon.
pub const RETRY_MS: u64 = 500;
/// Milliseconds until the next attempt where too many others called just then: the least. Each time twice as long, up to [`RETRY_MS`].
const CROWDED_MS: u64 = 1;
/// Milliseconds for which a daemon is left alone that is at a limit, or found this process not to be who it was: the
/// least and the most.
const REFUSED_MS: [u64; 2] = [1000, 64_000];
/// Milliseconds between two times that a process attaches anew since its user has changed: the least and the most. One
/// that has kept its user for longer than the most is followed at once.
const FOLLOW_MS: [u64; 2] = [1000, 64_000];

const MILLISECOND: u64 = 1_000_000;

/// The attempts to reach a daemon.
#[derive(Debug)]
pub struct Attempts {
    /// When the last one was; 0 for none.
    at: AtomicU64,
    /// Milliseconds from then on in which no daemon is asked again.
    pause_ms: AtomicU64,
    /// The same where the last one found the daemon's socket crowded; else 0.
    crowded_ms: AtomicU64,
}

impl Attempts {
    /// None yet.
    pub const fn new() -> Self {
        Attempts {
            at: AtomicU64::new(0),
            pause_ms: AtomicU64::new(RETRY_MS),
            crowded_ms: AtomicU64::new(0),
        }
    }

    /// True when it is time for one.
    pub fn are_due(&self, now: u64) -> bool {
        let at = self.at.load(Relaxed);
        let pause = match self.crowded() {
            Some(pause) => pause,
            None => self.pause_ms.load(Relaxed),
        };
        at == 0 || now.wrapping_sub(at) >= pause * MILLISECOND
    }

    /// One is made.
    pub fn begin(&self, now: u64) {
        self.at.store(now, Relaxed);
    }

    /// Its end: the daemon's socket was crowded, or not.
    pub fn end(&self, crowded: bool) {
        let next = match self.crowded_ms.load(Relaxed) {
            _ if !crowded => 0,
            0 => CROWDED_MS,
            before => (before * 2).min(RETRY_MS),
        };
        self.crowded_ms.store(next, Relaxed);
    }

    /// Where the last one found the daemon's socket crowded: milliseconds until the next one.
    #[inline]
    pub fn crowded(&self) -> Option<u64> {
        let pause = self.crowded_ms.load(Relaxed);
        (pause != 0).then_some(pause)
    }

    /// The next one need not wait.
    pub fn forget(&self) {
        self.at.store(0, Relaxed);
        self.crowded_ms.store(0, Relaxed);
    }

    /// The daemon has no place for this process now.
    pub fn refused(&self, now: u64) {
        let [least, most] = REFUSED_MS;
        let pause = self.pause_ms.load(Relaxed);
        let longer = if pause < least { least } else { pause * 2 };
        self.pause_ms.store(longer.min(most), Relaxed);
        self.at.store(now, Relaxed);
    }

    /// The daemon has greeted it.
    pub fn welcomed(&self) {
        self.pause_ms.store(RETRY_MS, Relaxed);
    }
}

/// The times that a process has attached anew since its user had changed.
#[derive(Debug)]
pub struct Changes {
    /// When the last one was; 0 for none.
    at: AtomicU64,
    /// Milliseconds from then on in which it stays who it was.
    pause_ms: AtomicU64,
}

impl Changes {
    /// None yet.
    pub const fn new() -> Self {
        Changes {
            at: AtomicU64::new(0),
            pause_ms: AtomicU64::new(0),
        }
    }

    /// Is it time to attach anew? Takes the time as that of the next pause's beginning if it is.
    pub fn may_follow(&self, now: u64) -> bool {
        let [least, most] = FOLLOW_MS;
        let (before, pause) = (self.at.load(Relaxed), self.pause_ms.load(Relaxed));
        let since = now.wrapping_sub(before) / MILLISECOND;
        if before != 0 && since < pause {
            return false;
        }
        let calm = before == 0 || since > 2 * most;
        let next = if calm { least } else { (pause * 2).min(most) };
        self.pause_ms.store(next, Relaxed);
        self.at.store(now.max(1), Relaxed);
        true
    }

    /// In a child, which has changed nothing yet.
    pub fn forget(&self) {
        self.at.store(0, Relaxed);
        self.pause_ms.store(0, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1000 * MILLISECOND;

    #[test]
    fn attempts_come_twice_a_second_at_most() {
        let attempts = Attempts::new();
        let now = 100 * SECOND;
        assert!(attempts.are_due(now));
        attempts.begin(now);
        assert!(!attempts.are_due(now + 499 * MILLISECOND));
        assert!(attempts.are_due(now + 500 * MILLISECOND));
        attempts.forget();
        assert!(attempts.are_due(now));
    }

    #[test]
    fn a_crowded_daemon_is_tried_again_soon_and_ever_more_seldom() {
        let attempts = Attempts::new();
        let mut now = 100 * SECOND;
        for pause in [1, 2, 4, 8, 16, 32, 64, 128, 256, 500, 500, 500] {
            attempts.begin(now);
            attempts.end(true);
            assert_eq!(attempts.crowded(), Some(pause));
            assert!(!attempts.are_due(now + pause * MILLISECOND - 1), "{pause}");
            now += pause * MILLISECOND;
            assert!(attempts.are_due(now), "{pause}");
        }
        // It was reached, or is not there: as ever.
        attempts.begin(now);
        attempts.end(false);
        assert_eq!(attempts.crowded(), None);
        assert!(!attempts.are_due(now + 499 * MILLISECOND));
        // The next crowd begins anew.
        attempts.begin(now);
        attempts.end(true);
        assert!(attempts.are_due(now + MILLISECOND));
        attempts.forget();
        assert_eq!(attempts.crowded(), None);
    }

    /// A crowd does not make a daemon that refuses be asked more often than it was before.
    #[test]
    fn a_crowd_in_between_does_not_shorten_the_time_for_which_a_daemon_that_refuses_is_left_alone()
    {
        let attempts = Attempts::new();
        let now = 100 * SECOND;
        attempts.refused(now);
        attempts.refused(now);
        assert!(!attempts.are_due(now + 2 * SECOND - 1));
        attempts.begin(now + 2 * SECOND);
        attempts.end(true);
        attempts.begin(now + 2 * SECOND + MILLISECOND);
        attempts.end(false);
        attempts.refused(now + 3 * SECOND);
        assert!(!attempts.are_due(now + 7 * SECOND - 1));
        assert!(attempts.are_due(now + 7 * SECOND));
    }

    #[test]
    fn a_daemon_that_refuses_is_asked_ever_more_seldom_until_it_greets() {
        let attempts = Attempts::new();
        let mut now = 100 * SECOND;
        for seconds in [1, 2, 4, 8, 16, 32, 64, 64, 64] {
            attempts.refused(now);
            assert!(!attempts.are_due(now + seconds * SECOND - 1), "{seconds}");
            now += seconds * SECOND;
            assert!(attempts.are_due(now), "{seconds}");
        }
        attempts.welcomed();
        attempts.begin(now);
        assert!(attempts.are_due(now + SECOND / 2));
    }

    #[test]
    fn a_user_that_changes_again_and_again_is_followed_ever_more_seldom() {
        let changes = Changes::new();
        let mut now = 100 * SECOND;
        assert!(changes.may_follow(now));
        for seconds in [1, 2, 4, 8, 16, 32, 64, 64] {
            assert!(!changes.may_follow(now + seconds * SECOND - 1), "{seconds}");
            now += seconds * SECOND;
            assert!(changes.may_follow(now), "{seconds}");
        }
        // One that has kept its user for long is followed soon again.
        now += 129 * SECOND;
        assert!(changes.may_follow(now));
        assert!(changes.may_follow(now + SECOND));
        changes.forget();
        assert!(changes.may_follow(now + SECOND));
    }
}
