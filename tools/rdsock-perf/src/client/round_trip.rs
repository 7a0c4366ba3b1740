//! Mode `rtt`, closed loop: send a message, wait for it to come back, again.

use super::check_payload;
use crate::clock::Clock;
use crate::error::Result;
use crate::latency::Latencies;
use crate::link::Link;
use crate::outcome::Outcome;
use crate::pattern::Pattern;
use crate::plan::{ClientPlan, Mode};

/// Measures each round trip from just before `send` to just after the last `recv`.
pub fn run(plan: &ClientPlan, link: &Link, clock: &Clock) -> Result<Outcome> {
    let mut samples = Latencies::preallocated();
    let mut trip = Trip::new(plan, link);
    let warm = clock.now() + clock.ticks(plan.warmup);
    while clock.now() < warm {
        trip.once()?;
    }
    let start = clock.now();
    let end = start + clock.ticks(plan.seconds);
    let mut now = start;
    while now < end {
        let sent = clock.now();
        trip.once()?;
        now = clock.now();
        samples.record(clock.ns(now - sent));
    }
    let seconds = clock.ns(now - start) as f64 / 1e9;
    trip.last()?;
    check_payload(trip.wrong, "the echoes")?;
    Ok(Outcome::of_latencies(
        Mode::Rtt,
        plan.wait,
        plan.size as u64,
        &samples,
        seconds,
        clock,
    ))
}

/// A message that goes and comes back.
struct Trip<'a> {
    link: &'a Link,
    pattern: Pattern,
    answer: Vec<u8>,
    position: u64,
    verify: bool,
    wrong: u64,
}

impl<'a> Trip<'a> {
    fn new(plan: &ClientPlan, link: &'a Link) -> Self {
        let (pattern, answer) = (Pattern::new(plan.size), vec![0; plan.size]);
        Self {
            link,
            pattern,
            answer,
            position: 0,
            verify: plan.verify,
            wrong: 0,
        }
    }

    /// One round trip.
    #[inline]
    fn once(&mut self) -> Result<()> {
        self.link
            .send_all(self.pattern.at(self.position, self.answer.len()))?;
        self.link.recv_exact(&mut self.answer)?;
        if self.verify {
            self.wrong += self.pattern.wrong(self.position, &self.answer);
            self.position += self.answer.len() as u64;
        }
        Ok(())
    }

    /// The round trip that ends the phase.
    fn last(&mut self) -> Result<()> {
        self.link.send_all(&self.pattern.last(self.position))?;
        self.link.recv_exact(&mut self.answer)
    }
}
