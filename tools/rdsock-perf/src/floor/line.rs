//! `floor-cacheline`: two threads, each on its own core, write one cache line in turn.
//!
//! One sample is a round trip: the line goes to the other core and comes back.

use crate::clock::Clock;
use crate::core_pin;
use crate::error::{Error, Result};
use crate::latency::Latencies;
use crate::outcome::Outcome;
use crate::plan::{Cores, Mode, Wait};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Told in place of a number: stop.
const STOP: u64 = u64::MAX;

/// A word with two lines of its own, since the prefetcher fetches lines in pairs.
#[repr(align(128))]
struct Line(AtomicU64);

/// Bounces the line for `time`, after a tenth of that for warming up. The size of the result is 64: one line.
pub fn run(cores: Cores, time: Duration, clock: &Clock) -> Result<Outcome> {
    let line = Line(AtomicU64::new(0));
    std::thread::scope(|scope| {
        let echo = scope.spawn(|| echo(&line, cores.server));
        let ours = scope.spawn(|| {
            let outcome = core_pin::pin(Some(cores.client)).map(|()| measure(&line, time, clock));
            line.0.store(STOP, Ordering::Release);
            outcome
        });
        let died = |_| Error::Peer("a thread of floor-cacheline died".into());
        let outcome = ours.join().map_err(died)?;
        echo.join().map_err(died)??;
        outcome
    })
}

/// Answers each odd number with the next even one.
fn echo(line: &Line, core: usize) -> Result<()> {
    let pinned = core_pin::pin(Some(core));
    loop {
        match line.0.load(Ordering::Acquire) {
            STOP => return pinned,
            odd if odd % 2 == 1 => line.0.store(odd + 1, Ordering::Release),
            _ => {}
        }
    }
}

/// Writes odd numbers and waits for the even one after each.
fn measure(line: &Line, time: Duration, clock: &Clock) -> Outcome {
    let mut samples = Latencies::preallocated();
    let mut number = 0;
    let mut bounce = || {
        line.0.store(number + 1, Ordering::Release);
        number += 2;
        while line.0.load(Ordering::Acquire) != number {}
    };
    let warm = clock.now() + clock.ticks(time / 10);
    while clock.now() < warm {
        bounce();
    }
    let start = clock.now();
    let end = start + clock.ticks(time);
    let mut now = start;
    while now < end {
        let before = clock.now();
        bounce();
        now = clock.now();
        samples.record(clock.ns(now - before));
    }
    let seconds = clock.ns(now - start) as f64 / 1e9;
    Outcome::of_latencies(Mode::Rtt, Wait::Spin, 64, &samples, seconds, clock)
}
