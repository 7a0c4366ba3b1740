//! The timetable of the open loop: message `i` is due `i` intervals after the start, whatever happens in between.

use crate::clock::Clock;
use std::time::Duration;

/// When each message is due, in ticks of the clock.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    start: u64,
    ticks_per_message: f64,
}

impl Pace {
    /// `per_second` messages a second from `start` on.
    pub fn new(clock: &Clock, start: u64, per_second: f64) -> Self {
        let ticks_per_second = clock.ticks(Duration::from_secs(1)) as f64;
        Self {
            start,
            ticks_per_message: ticks_per_second / per_second,
        }
    }

    /// When message `index` is due.
    #[inline]
    pub fn due(&self, index: u64) -> u64 {
        self.start + (index as f64 * self.ticks_per_message) as u64
    }

    /// How many messages are due from the start to `end` (exclusive).
    pub fn messages_until(&self, end: u64) -> u64 {
        (end.saturating_sub(self.start) as f64 / self.ticks_per_message).ceil() as u64
    }
}

/// Sleeps until about `due`, then spins the last bit where `spin`; returns at once when it has passed.
pub fn wait_until(clock: &Clock, due: u64, spin: bool) {
    loop {
        let now = clock.now();
        if now >= due {
            return;
        }
        if !spin {
            std::thread::sleep(Duration::from_nanos(clock.ns(due - now)));
        }
    }
}

/// Makes sleeps of this thread end on time; by default the kernel may add 50 µs.
pub fn sleep_precisely() {
    // SAFETY: PR_SET_TIMERSLACK takes one number and touches no memory.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1usize) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_times_do_not_drift() {
        let clock = Clock::calibrated();
        let second = clock.ticks(Duration::from_secs(1));
        let pace = Pace::new(&clock, 1000, 3.0);
        assert_eq!(pace.due(0), 1000);
        assert!(pace.due(3_000_000).abs_diff(1000 + 1_000_000 * second) < 1_000_000);
        assert_eq!(pace.messages_until(1000 + second), 3);
        assert_eq!(pace.messages_until(1000), 0);
    }
}
