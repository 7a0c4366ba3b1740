//! The clock of all measurements: the time-stamp counter where it is invariant, else `clock_gettime`.
//!
//! Called around each measured operation, so a reading costs some ten nanoseconds and makes no system call.
//! The cost of one reading is measured when the clock is made, and printed with the results; it is contained in
//! each latency sample and is not subtracted.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Where the time comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// `lfence; rdtsc` on an invariant time-stamp counter.
    Tsc,
    /// `clock_gettime(CLOCK_MONOTONIC)` through the vDSO.
    Monotonic,
}

/// The clock, as reports name it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Where the time comes from.
    pub source: Source,
    /// Cost of one reading, in nanoseconds.
    pub cost_ns: f64,
}

/// A calibrated clock. Readings are in ticks; [`Clock::ns`] turns a difference of readings into nanoseconds.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    source: Source,
    /// Nanoseconds of one tick, as 32.32 fixed point.
    ns_per_tick: u64,
    cost_ns: f64,
}

impl Clock {
    /// Chooses and calibrates a clock; takes about 20 ms.
    pub fn calibrated() -> Self {
        let mut clock = invariant_tsc()
            .and_then(|()| Self::tsc())
            .unwrap_or(Self::monotonic());
        clock.cost_ns = clock.measure_cost();
        clock
    }

    /// A clock on `clock_gettime`, whose tick is a nanosecond.
    fn monotonic() -> Self {
        Self {
            source: Source::Monotonic,
            ns_per_tick: 1 << 32,
            cost_ns: 0.0,
        }
    }

    /// A clock on the time-stamp counter, or none where two calibrations disagree.
    fn tsc() -> Option<Self> {
        (0..3).find_map(|_| {
            let (first, second) = (ticks_per_window(), ticks_per_window());
            let ns_per_tick = agreed(first, second)?;
            Some(Self {
                source: Source::Tsc,
                ns_per_tick,
                cost_ns: 0.0,
            })
        })
    }

    /// The present, in ticks. No load or store after it in program order runs before it, nor the other way round.
    #[inline(always)]
    pub fn now(&self) -> u64 {
        match self.source {
            Source::Tsc => read_tsc(),
            Source::Monotonic => monotonic_ns(),
        }
    }

    /// Turns a difference of two readings into nanoseconds.
    #[inline(always)]
    pub fn ns(&self, ticks: u64) -> u64 {
        ((u128::from(ticks) * u128::from(self.ns_per_tick)) >> 32) as u64
    }

    /// Turns a time into ticks, rounded down.
    pub fn ticks(&self, time: Duration) -> u64 {
        ((time.as_nanos() << 32) / u128::from(self.ns_per_tick)) as u64
    }

    /// What reports say about this clock.
    pub fn facts(&self) -> Facts {
        Facts {
            source: self.source,
            cost_ns: (self.cost_ns * 10.0).round() / 10.0,
        }
    }

    /// Cost of one reading in nanoseconds: the best of several batches, since a batch may be interrupted.
    fn measure_cost(&self) -> f64 {
        const READINGS: u64 = 1000;
        let batch = || {
            let start = self.now();
            for _ in 1..READINGS {
                std::hint::black_box(self.now());
            }
            self.ns(self.now() - start) as f64 / READINGS as f64
        };
        (0..20).map(|_| batch()).fold(f64::INFINITY, f64::min)
    }
}

/// `clock_gettime(CLOCK_MONOTONIC)` in nanoseconds.
#[inline]
fn monotonic_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place for the result, and CLOCK_MONOTONIC exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The time-stamp counter, read after all loads before it are done.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn read_tsc() -> u64 {
    // SAFETY: both instructions exist on every x86-64 and touch no memory.
    unsafe {
        std::arch::x86_64::_mm_lfence();
        std::arch::x86_64::_rdtsc()
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn read_tsc() -> u64 {
    monotonic_ns()
}

/// Whether the counter runs at one rate in all power states, which the kernel says with two flags.
fn invariant_tsc() -> Option<()> {
    if !cfg!(target_arch = "x86_64") {
        return None;
    }
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    has_invariant_tsc(&cpuinfo).then_some(())
}

/// Looks for the two flags in the text of `/proc/cpuinfo`.
fn has_invariant_tsc(cpuinfo: &str) -> bool {
    let Some(flags) = cpuinfo.lines().find(|line| line.starts_with("flags")) else {
        return false;
    };
    ["constant_tsc", "nonstop_tsc"]
        .iter()
        .all(|wanted| flags.split_whitespace().any(|flag| flag == *wanted))
}

/// Counts ticks over about 10 ms: (ticks, nanoseconds).
fn ticks_per_window() -> (u64, u64) {
    let (start_ticks, start_ns) = paired_reading();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(10) {
        std::hint::spin_loop();
    }
    let (end_ticks, end_ns) = paired_reading();
    (end_ticks.saturating_sub(start_ticks), end_ns - start_ns)
}

/// Both clocks read at the same moment: of several tries, the one that took least time.
fn paired_reading() -> (u64, u64) {
    (0..10)
        .map(|_| {
            let before = read_tsc();
            let ns = monotonic_ns();
            let width = read_tsc().saturating_sub(before);
            (width, before + width / 2, ns)
        })
        .min_by_key(|&(width, _, _)| width)
        .map_or((0, 0), |(_, ticks, ns)| (ticks, ns))
}

/// The tick of two calibrations (ticks, ns) as 32.32 fixed point, where they agree within one part in a thousand.
fn agreed(first: (u64, u64), second: (u64, u64)) -> Option<u64> {
    let tick =
        |(ticks, ns): (u64, u64)| (ticks > 0).then(|| (u128::from(ns) << 32) / u128::from(ticks));
    let (first, second) = (tick(first)?, tick(second)?);
    let tick = u64::try_from(second).ok().filter(|&tick| tick > 0)?;
    (first.abs_diff(second) <= second / 1000).then_some(tick)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_ticks_is_a_second() {
        let clock = Clock::calibrated();
        let ticks = clock.ticks(Duration::from_secs(1));
        assert!(clock.ns(ticks).abs_diff(1_000_000_000) < 1000);
    }

    #[test]
    fn follows_the_system_clock() {
        let clock = Clock::calibrated();
        let (begun, start) = (Instant::now(), clock.now());
        std::thread::sleep(Duration::from_millis(20));
        let ours = clock.ns(clock.now() - start) as f64;
        let theirs = begun.elapsed().as_nanos() as f64;
        assert!(
            (ours / theirs - 1.0).abs() < 0.05,
            "{ours} against {theirs}"
        );
    }

    #[test]
    fn never_runs_backwards_and_has_a_cost() {
        let clock = Clock::calibrated();
        let mut last = clock.now();
        for _ in 0..10_000 {
            let now = clock.now();
            assert!(now >= last);
            last = now;
        }
        assert!(clock.facts().cost_ns > 0.0);
    }

    #[test]
    fn calibrations_must_agree() {
        // 2 GHz: half a nanosecond for a tick.
        assert_eq!(
            agreed((20_000_000, 10_000_000), (20_000_000, 10_000_000)),
            Some(1 << 31)
        );
        assert_eq!(
            agreed((20_000_000, 10_000_000), (21_000_000, 10_000_000)),
            None
        );
        assert_eq!(agreed((0, 10_000_000), (0, 10_000_000)), None);
    }

    #[test]
    fn both_flags_are_needed() {
        assert!(has_invariant_tsc(
            "model: x\nflags\t: fpu constant_tsc nonstop_tsc sse\n"
        ));
        assert!(!has_invariant_tsc("flags\t: fpu constant_tsc sse\n"));
        assert!(!has_invariant_tsc("no flags here\n"));
    }
}
