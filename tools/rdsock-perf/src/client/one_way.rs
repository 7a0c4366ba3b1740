//! Modes `rate` and `bw`: one `send` for each message, counted at the receiver.

use super::pace::{Pace, sleep_precisely, wait_until};
use super::{check_payload, tally};
use crate::clock::Clock;
use crate::error::Result;
use crate::link::Link;
use crate::outcome::Outcome;
use crate::pattern::Pattern;
use crate::plan::{ClientPlan, Wait};

/// Bytes between two looks at the clock, so that looking costs nothing beside sending.
const BYTES_PER_LOOK: usize = 16 << 10;

/// Sends for the time of the plan, and reports what the server counted.
pub fn run(plan: &ClientPlan, link: &Link, clock: &Clock) -> Result<Outcome> {
    let end = clock.now() + clock.ticks(plan.warmup + plan.seconds);
    let mut stream = Stream {
        link,
        pattern: Pattern::new(plan.size),
        plan,
        position: 0,
    };
    match plan.rate_limit {
        None => stream.flood(clock, end)?,
        Some(per_second) => stream.pace(clock, end, per_second)?,
    }
    link.send_all(&stream.pattern.last(stream.position))?;
    let tally = tally(link)?;
    check_payload(tally.wrong, "the stream")?;
    Ok(Outcome::of_bytes(
        plan.mode,
        plan.wait,
        plan.size as u64,
        tally.bytes,
        tally.ns,
        clock,
    ))
}

/// The sending side.
struct Stream<'a> {
    link: &'a Link,
    pattern: Pattern,
    plan: &'a ClientPlan,
    position: u64,
}

impl Stream<'_> {
    /// Sends as fast as it can until `end`.
    fn flood(&mut self, clock: &Clock, end: u64) -> Result<()> {
        let messages_per_look = (BYTES_PER_LOOK / self.plan.size).max(1);
        while clock.now() < end {
            for _ in 0..messages_per_look {
                self.once()?;
            }
        }
        Ok(())
    }

    /// Sends by the timetable until `end`.
    fn pace(&mut self, clock: &Clock, end: u64, per_second: f64) -> Result<()> {
        sleep_precisely();
        let pace = Pace::new(clock, clock.now(), per_second);
        for index in 0..pace.messages_until(end) {
            wait_until(clock, pace.due(index), self.plan.wait == Wait::Spin);
            self.once()?;
        }
        Ok(())
    }

    /// Sends one message.
    #[inline]
    fn once(&mut self) -> Result<()> {
        self.link
            .send_all(self.pattern.at(self.position, self.plan.size))?;
        if self.plan.verify {
            self.position += self.plan.size as u64;
        }
        Ok(())
    }
}
