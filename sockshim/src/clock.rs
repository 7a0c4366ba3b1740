//! Time for spinning: the time stamp counter, scaled by what the constructor measured.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

static TICKS_PER_US: AtomicU64 = AtomicU64::new(2500);
static START: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

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

/// Monotonic nanoseconds, from the vDSO.
pub fn nanoseconds() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is valid for writes.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Notes where both clocks stand.
pub fn start() {
    START[0].store(ticks(), Relaxed);
    START[1].store(nanoseconds(), Relaxed);
    if cfg!(not(target_arch = "x86_64")) {
        TICKS_PER_US.store(1000, Relaxed);
    }
}

/// Measures the counter against the clock, once a millisecond has passed since [`start`].
pub fn calibrate() {
    let (ticks, ns) = (
        ticks() - START[0].load(Relaxed),
        nanoseconds() - START[1].load(Relaxed),
    );
    if ns > 1_000_000 && cfg!(target_arch = "x86_64") {
        TICKS_PER_US.store(
            (ticks as u128 * 1000 / ns as u128).clamp(100, 20_000) as u64,
            Relaxed,
        );
    }
}

/// `us` microseconds in ticks.
pub fn ticks_of(us: u64) -> u64 {
    us * TICKS_PER_US.load(Relaxed)
}
