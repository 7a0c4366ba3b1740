//! The measurements.

use crate::bench::Bench;
use crate::cli::{Devices, Test};
use crate::linked::Linked;
use crate::plan::{Error, Plan, Until};
use hdrhistogram::Histogram;
use rdsock_model::Counters;
use rdsock_rde::{Data, Notify, Operation, Work};
use std::path::Path;
use std::time::Instant;

/// Longest latency that is told apart, in nanoseconds.
const LONGEST: u64 = 10_000_000_000;

/// What came of a test.
pub struct Outcome {
    pub test: Test,
    /// Nanoseconds one way.
    pub latency: Histogram<u64>,
    /// Length of the measured part.
    pub seconds: f64,
    /// What both devices did in the measured part.
    pub before: [Counters; 2],
    pub after: [Counters; 2],
    /// Operations in the measured part.
    pub operations: u64,
}

/// Runs all tests of the plan.
pub fn run(plan: &Plan) -> Result<Vec<Outcome>, Error> {
    pin(plan);
    let one = if plan.devices == Devices::Linked {
        linked
    } else {
        together
    };
    plan.tests.iter().map(|test| one(plan, *test)).collect()
}

/// Answers a process that measures.
pub fn answer(plan: &Plan, dir: &Path) -> Result<(), Error> {
    pin(plan);
    Linked::far(dir, plan.size)
}

fn pin(plan: &Plan) {
    if let Some(core) = plan.core {
        core_affinity::set_for_current(core);
    }
}

/// Both nodes in this process.
fn together(plan: &Plan, test: Test) -> Result<Outcome, Error> {
    let mut bench = Bench::new(plan)?;
    let operation: fn(&mut Bench) -> Result<(), Error> = match test {
        Test::Write => write,
        Test::WriteNotify => |bench| notify(bench, 0).and_then(|()| notify(bench, 1)),
        Test::Mailbox => |bench| mailbox(bench, 0).and_then(|()| mailbox(bench, 1)),
        Test::WriteBw => stream,
    };
    measure(
        plan,
        test,
        ways(test),
        &mut bench,
        operation,
        Bench::counters,
    )
}

/// Each node in its process. What the other one counts is the same as here.
fn linked(plan: &Plan, test: Test) -> Result<Outcome, Error> {
    let mut near = Linked::near(plan)?;
    let operation = |near: &mut Linked| near.operation(test);
    let counters = |near: &Linked| [near.counters(), Counters::default()];
    measure(plan, test, 1, &mut near, operation, counters)
}

/// Ways between the nodes that are measured at once.
fn ways(test: Test) -> u64 {
    match test {
        Test::Write | Test::WriteBw => 1,
        Test::WriteNotify | Test::Mailbox => 2,
    }
}

/// `counted`: operations that the counters see in each measured one.
fn measure<T>(
    plan: &Plan,
    test: Test,
    counted: u64,
    on: &mut T,
    mut operation: impl FnMut(&mut T) -> Result<(), Error>,
    counters: impl Fn(&T) -> [Counters; 2],
) -> Result<Outcome, Error> {
    for _ in 0..plan.warmup {
        operation(on)?;
    }
    let before = counters(on);
    let mut latency = Histogram::new_with_bounds(1, LONGEST, 3)
        .unwrap_or_else(|error| unreachable!("constant bounds: {error}"));
    let begin = Instant::now();
    let mut now = begin;
    let mut done = 0;
    loop {
        match plan.until {
            Until::Count(count) if done >= count => break,
            Until::Passed(time) if now - begin >= time => break,
            _ => {}
        }
        let start = Instant::now();
        operation(on)?;
        now = Instant::now();
        latency.saturating_record((now - start).as_nanos() as u64 / ways(test));
        done += 1;
    }
    Ok(Outcome {
        test,
        latency,
        seconds: (now - begin).as_secs_f64(),
        before,
        after: counters(on),
        operations: done * counted,
    })
}

/// Writes that are under way at once.
pub const DEPTH: usize = 8;

/// One more write of node 1, when fewer than [`DEPTH`] are under way; else one completion first.
fn stream(bench: &mut Bench) -> Result<(), Error> {
    while bench.nodes[0].set.outstanding() >= DEPTH {
        complete(bench)?;
    }
    let to = bench.remote(0);
    post(bench, 0, to, None, true)
}

/// A write of node 1, until its completion.
fn write(bench: &mut Bench) -> Result<(), Error> {
    let to = bench.remote(0);
    post(bench, 0, to, None, true)?;
    complete(bench)
}

/// Takes a completion of node 1.
fn complete(bench: &mut Bench) -> Result<(), Error> {
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
