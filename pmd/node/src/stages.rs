//! Where a poll core's time goes: the stages of a turn, measured in a sample of the turns that had work.
//!
//! Opts into `unsafe` to read the time-stamp counter.

use std::time::Instant;

/// One turn in so many is measured: a prime, so that no habit of the loop keeps step with it.
const TURNS_PER_SAMPLE: u64 = 61;

macro_rules! stages {
    ($($(#[$doc:meta])* $stage:ident $name:literal;)*) => {
        /// A stage of a turn.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum Stage { $($(#[$doc])* $stage,)* }

        impl Stage {
            /// All of them, in the order of a turn.
            pub const ALL: &'static [Stage] = &[$(Stage::$stage,)*];

            /// What `rdsock stat` calls it.
            pub fn name(self) -> &'static str {
                match self { $(Stage::$stage => $name,)* }
            }
        }
    };
}

stages! {
    /// Streams that are polled.
    Streams "streams";
    /// The model of the device, where it is one in this process and this core steps it.
    Device "device";
    /// Completions.
    Completions "completions";
    /// Messages of other nodes.
    Messages "messages";
    /// Commands of the control thread.
    Commands "commands";
    /// Streams that the anchors' thread wants to be looked at.
    Looks "looks";
    /// The protocol: what is to be said and written.
    Protocol "protocol";
    /// Posting that, and telling what has happened.
    Posts "posts";
}

/// Nanoseconds, or ticks, for each stage.
pub(crate) type Laps = [u64; Stage::ALL.len()];

/// Measures stages.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    start: (Instant, u64),
    turns: u64,
    last: u64,
    lap: Laps,
    /// Ticks of the turns that were kept.
    pub kept: Laps,
    /// How many those were.
    pub kept_turns: u64,
}

impl Stopwatch {
    pub fn new() -> Self {
        Stopwatch {
            start: (Instant::now(), ticks()),
            turns: 0,
            last: 0,
            lap: Laps::default(),
            kept: Laps::default(),
            kept_turns: 0,
        }
    }

    /// A turn begins: whether it is one to be measured.
    #[inline]
    pub fn turn(&mut self) -> bool {
        self.turns += 1;
        let measured = self.turns.is_multiple_of(TURNS_PER_SAMPLE);
        if measured {
            self.lap = Laps::default();
            self.last = ticks();
        }
        measured
    }

    /// A stage has ended.
    #[inline]
    pub fn lap(&mut self, stage: Stage) {
        let now = ticks();
        self.lap[stage as usize] += now.wrapping_sub(self.last);
        self.last = now;
    }

    /// The turn had work: it counts.
    pub fn keep(&mut self) {
        for (kept, lap) in self.kept.iter_mut().zip(self.lap) {
            *kept += lap;
        }
        self.kept_turns += 1;
    }

    /// What was kept, in nanoseconds.
    pub fn nanoseconds(&self) -> Laps {
        let (began, first) = self.start;
        let passed = began.elapsed().as_nanos() as f64;
        let ticked = ticks().wrapping_sub(first).max(1) as f64;
        self.kept.map(|kept| (kept as f64 * passed / ticked) as u64)
    }
}

/// A clock that costs a few nanoseconds and counts evenly.
#[inline]
fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: rdtsc has no effect on memory, and every x86-64 has it.
    unsafe {
        std::arch::x86_64::_rdtsc()
    }
    #[cfg(target_arch = "aarch64")]
    {
        let count: u64;
        // SAFETY: reads the virtual counter, which Linux lets programs read.
        unsafe { std::arch::asm!("mrs {}, cntvct_el0", out(reg) count, options(nomem, nostack)) };
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_of_the_turns_with_work_is_kept() {
        let mut watch = Stopwatch::new();
        for turn in 1..=10 * TURNS_PER_SAMPLE {
            if watch.turn() {
                watch.lap(Stage::Device);
                while watch.start.0.elapsed().as_nanos() as u64 / 100_000 < turn / TURNS_PER_SAMPLE
                {
                }
                watch.lap(Stage::Posts);
                // Every second one has work.
                if turn % 2 == 0 {
                    watch.keep();
                }
            }
        }
        assert_eq!(watch.kept_turns, 5);
        let spent = watch.nanoseconds();
        let [device, posts] = [Stage::Device, Stage::Posts].map(|stage| spent[stage as usize]);
        assert!(posts > device, "{spent:?}");
        assert!(u128::from(posts) <= watch.start.0.elapsed().as_nanos());
        assert_eq!(spent[Stage::Looks as usize], 0);
    }
}
