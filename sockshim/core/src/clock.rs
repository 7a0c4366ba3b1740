//! Time for spinning: the time stamp counter, scaled by what the constructor measured.

use crate::state::PROCESS;
use crate::sys;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What one clock says of the other.
#[derive(Debug)]
pub struct Clock {
    ticks_per_us: AtomicU64,
    /// Where both stood at first: in ticks, and in nanoseconds.
    start: [AtomicU64; 2],
}

impl Clock {
    /// Not measured yet: a guess.
    pub const fn new() -> Self {
        let ticks = if cfg!(target_arch = "x86_64") {
            2500
        } else {
            1000
        };
        Clock {
            ticks_per_us: AtomicU64::new(ticks),
            start: [AtomicU64::new(0), AtomicU64::new(0)],
        }
    }

    fn start(&self, ticks: u64, ns: u64) {
        self.start[0].store(ticks, Relaxed);
        self.start[1].store(ns, Relaxed);
    }

    /// Measures, once a millisecond has passed since the start.
    fn calibrate(&self, ticks: u64, ns: u64) {
        let (ticks, ns) = (
            ticks - self.start[0].load(Relaxed),
            ns - self.start[1].load(Relaxed),
        );
        if ns > 1_000_000 && cfg!(target_arch = "x86_64") {
            let measured = (ticks as u128 * 1000 / ns as u128).clamp(100, 20_000);
            self.ticks_per_us.store(measured as u64, Relaxed);
        }
    }
}

/// Ticks of an invariant counter.
#[inline]
pub fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: rdtsc has no effect on memory.
    unsafe {
        std::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    nanoseconds()
}

/// Monotonic nanoseconds.
pub fn nanoseconds() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is valid for writes.
    unsafe { (sys::host().clock_gettime)(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Notes where both clocks stand.
pub fn start() {
    PROCESS.clock.start(ticks(), nanoseconds());
}

/// Measures the counter against the clock, once a millisecond has passed since [`start`].
pub fn calibrate() {
    PROCESS.clock.calibrate(ticks(), nanoseconds());
}

/// `us` microseconds in ticks.
pub fn ticks_of(us: u64) -> u64 {
    us * PROCESS.clock.ticks_per_us.load(Relaxed)
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn the_counter_is_measured_once_a_millisecond_has_passed() {
        let clock = Clock::new();
        let ticks_per_us = || clock.ticks_per_us.load(Relaxed);
        clock.start(1000, 500);
        clock.calibrate(1000 + 3_000_000, 500 + 1_000_000);
        assert_eq!(ticks_per_us(), 2500);
        clock.calibrate(1000 + 6_000_000, 500 + 2_000_000);
        assert_eq!(ticks_per_us(), 3000);
        // A machine that stood still in between, or a counter that did.
        clock.calibrate(1000, 500 + 2_000_000);
        assert_eq!(ticks_per_us(), 100);
        clock.calibrate(u64::MAX, 500 + 2_000_000);
        assert_eq!(ticks_per_us(), 20_000);
    }
}
