//! Mode `rtt`, open loop: messages leave by the timetable, whether answers have come or not.
//!
//! The latency of a message counts from the moment when it was due. So a stall of the server, or of this sender, is
//! charged to every message that it delays, where a closed loop would just send less ("coordinated omission").
//! Answers come in order, so the `i`-th answer belongs to the `i`-th message, and the two directions share nothing
//! but the timetable.

use super::check_payload;
use super::pace::{Pace, sleep_precisely, wait_until};
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::latency::Latencies;
use crate::link::Link;
use crate::outcome::Outcome;
use crate::pattern::Pattern;
use crate::plan::{ClientPlan, Mode, Wait};

/// Sends `per_second` messages a second.
pub fn run(plan: &ClientPlan, per_second: f64, link: &Link, clock: &Clock) -> Result<Outcome> {
    let pace = Pace::new(
        clock,
        clock.now() + clock.ticks(std::time::Duration::from_millis(1)),
        per_second,
    );
    let warm = pace.messages_until(pace.due(0) + clock.ticks(plan.warmup));
    let total = (warm + pace.messages_until(pace.due(0) + clock.ticks(plan.seconds))).max(warm + 1);
    let mut receipt = Receipt::new(plan, clock, pace, warm);
    match plan.wait {
        Wait::Spin => spin(plan, link, total, &mut receipt)?,
        Wait::Block => block(plan, link, total, &mut receipt)?,
    }
    let seconds = clock.ns(receipt.last - pace.due(warm).min(receipt.last)) as f64 / 1e9;
    end_phase(plan, link)?;
    check_payload(receipt.wrong, "the echoes")?;
    Ok(Outcome::of_latencies(
        Mode::Rtt,
        plan.wait,
        plan.size as u64,
        &receipt.samples,
        seconds,
        clock,
    ))
}

/// One thread that sends what is due and receives what has come, in turn.
fn spin(plan: &ClientPlan, link: &Link, total: u64, receipt: &mut Receipt) -> Result<()> {
    let pattern = Pattern::new(plan.size);
    let (mut sent, mut unsent) = (0, &[][..]);
    while receipt.received < total {
        if unsent.is_empty() && sent < total && receipt.clock.now() >= receipt.pace.due(sent) {
            unsent = pattern.at(sent * plan.size as u64, plan.size);
            sent += 1;
        }
        if !unsent.is_empty() {
            unsent = &unsent[link.send_now(unsent)?..];
        }
        let filled = link.recv_now(receipt.room())?;
        receipt.add(filled);
    }
    Ok(())
}

/// Two threads on one socket: this one receives, the other sleeps until the next message is due and sends it.
fn block(plan: &ClientPlan, link: &Link, total: u64, receipt: &mut Receipt) -> Result<()> {
    let (pace, clock) = (receipt.pace, receipt.clock);
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || -> Result<()> {
            sleep_precisely();
            let pattern = Pattern::new(plan.size);
            for index in 0..total {
                wait_until(clock, pace.due(index), false);
                link.send_all(pattern.at(index * plan.size as u64, plan.size))?;
            }
            Ok(())
        });
        while receipt.received < total {
            match link.recv_some(receipt.room())? {
                0 => {
                    return Err(Error::Peer(
                        "the server closed the connection in the middle of a measurement".into(),
                    ));
                }
                filled => receipt.add(filled),
            }
        }
        sender
            .join()
            .map_err(|_| Error::Peer("the sending thread died".into()))?
    })
}

/// Sends the message that ends the phase, and takes its echo.
fn end_phase(plan: &ClientPlan, link: &Link) -> Result<()> {
    link.send_all(&Pattern::new(plan.size).last(0))?;
    link.recv_exact(&mut vec![0; plan.size])
}

/// The receiving side: which answers have come, and when.
struct Receipt<'a> {
    clock: &'a Clock,
    pace: Pace,
    samples: Latencies,
    /// Answers before this one do not count.
    warm: u64,
    answer: Vec<u8>,
    filled: usize,
    received: u64,
    /// When the last whole answer came, in ticks.
    last: u64,
    pattern: Option<Pattern>,
    wrong: u64,
}

impl<'a> Receipt<'a> {
    fn new(plan: &ClientPlan, clock: &'a Clock, pace: Pace, warm: u64) -> Self {
        Self {
            clock,
            pace,
            samples: Latencies::preallocated(),
            warm,
            answer: vec![0; plan.size],
            filled: 0,
            received: 0,
            last: 0,
            pattern: plan.verify.then(|| Pattern::new(plan.size)),
            wrong: 0,
        }
    }

    /// Where the rest of the present answer goes.
    fn room(&mut self) -> &mut [u8] {
        &mut self.answer[self.filled..]
    }

    /// Takes note that `bytes` were put into the room.
    fn add(&mut self, bytes: usize) {
        self.filled += bytes;
        if self.filled < self.answer.len() {
            return;
        }
        self.last = self.clock.now();
        if self.received >= self.warm {
            self.samples.record(
                self.clock
                    .ns(self.last.saturating_sub(self.pace.due(self.received))),
            );
        }
        if let Some(pattern) = &self.pattern {
            self.wrong += pattern.wrong(self.received * self.answer.len() as u64, &self.answer);
        }
        self.filled = 0;
        self.received += 1;
    }
}
