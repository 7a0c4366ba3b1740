//! The measurements.

use crate::bench::Bench;
use crate::cli::Test;
use crate::plan::{Error, Plan};
use hdrhistogram::Histogram;
use rdsock_model::Counters;
use rdsock_rde::{Data, Notify, Operation, Work};
use std::time::Instant;

/// Longest latency that is told apart, in nanoseconds.
const LONGEST: u64 = 10_000_000_000;

/// What came of a test.
pub struct Outcome {
    pub test: Test,
    /// Nanoseconds one way.
    pub latency: Histogram<u64>,
    /// What both devices did in the measured part.
    pub before: [Counters; 2],
    pub after: [Counters; 2],
    /// Operations in the measured part.
    pub operations: u64,
}

/// Runs all tests of the plan.
pub fn run(plan: &Plan) -> Result<Vec<Outcome>, Error> {
    if let Some(core) = plan.core {
        core_affinity::set_for_current(core);
    }
    plan.tests.iter().map(|test| one(plan, *test)).collect()
}

fn one(plan: &Plan, test: Test) -> Result<Outcome, Error> {
    let mut bench = Bench::new(plan)?;
    let operation: fn(&mut Bench) -> Result<(), Error> = match test {
        Test::Write => write,
        Test::WriteNotify => |bench| notify(bench, 0).and_then(|()| notify(bench, 1)),
        Test::Mailbox => |bench| mailbox(bench, 0).and_then(|()| mailbox(bench, 1)),
    };
    let ways = if test == Test::Write { 1 } else { 2 };
    for _ in 0..plan.warmup {
        operation(&mut bench)?;
    }
    let before = bench.counters();
    let mut latency = Histogram::new_with_bounds(1, LONGEST, 3)
        .unwrap_or_else(|error| unreachable!("constant bounds: {error}"));
    for _ in 0..plan.count {
        let start = Instant::now();
        operation(&mut bench)?;
        latency.saturating_record(start.elapsed().as_nanos() as u64 / ways);
    }
    Ok(Outcome {
        test,
        latency,
        before,
        after: bench.counters(),
        operations: plan.count * ways,
    })
}

/// A write of node 1, until its completion.
fn write(bench: &mut Bench) -> Result<(), Error> {
    let to = bench.remote(0);
    post(bench, 0, to, None, true)?;
    let done = bench.until(0, |set| {
        let mut got = None;
        set.poll_completions(1, |completion| got = Some(completion))?;
        Ok(got)
    })?;
    if !done.status.is_ok() {
        return Err(Error::Status(done.status));
    }
    Ok(())
}

/// A write with notification of one node, until the other one has the notification.
fn notify(bench: &mut Bench, from: usize) -> Result<(), Error> {
    let to = bench.remote(from);
    let notify = Notify {
        set: 0,
        payload: b"stream, position",
    };
    post(bench, from, to, Some(notify), false)?;
    bench.message(1 - from)?;
    // The own completions, which only the driver's book needs.
    let mut failure = None;
    bench.nodes[from]
        .set
        .poll_completions(16, |completion| failure = Some(completion.status))?;
    failure.map_or(Ok(()), |status| Err(Error::Status(status)))
}

/// A message of one node, until the other one has it.
fn mailbox(bench: &mut Bench, from: usize) -> Result<(), Error> {
    bench.nodes[from]
        .set
        .send(2 - from as u16, 0, &[0x5a; 48])?;
    bench.message(1 - from).map(|_| ())
}

fn post(
    bench: &mut Bench,
    from: usize,
    to: rdsock_rde::Remote,
    notify: Option<Notify<'_>>,
    report: bool,
) -> Result<(), Error> {
    let node = &mut bench.nodes[from];
    let operation = Operation::Write {
        to,
        data: Data::Pieces(&node.piece),
        word: None,
        notify,
    };
    node.set.post(&Work {
        target: 2 - from as u16,
        operation,
        tag: 0,
        report,
    })?;
    node.set.ring();
    Ok(())
}
