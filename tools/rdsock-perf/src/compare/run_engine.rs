//! One measurement of the bare engine: `rdsock-engine-perf`, two processes with a node each.

use super::child::Child;
use super::ground::Ground;
use crate::clock::{Facts, Source};
use crate::error::{Error, Result};
use crate::latency::Buckets;
use crate::outcome::Outcome;
use crate::plan::{Cell, ComparePlan, Mode, Wait};
use serde::Deserialize;
use std::process::Command;
use std::time::Duration;

/// What it prints of a test, as far as it is used here. Times are nanoseconds, one way.
#[derive(Debug, Deserialize)]
struct Line {
    operations: u64,
    seconds: f64,
    mb_s: f64,
    histogram: Buckets,
}

/// Runs `rdsock-engine-perf`: a write with notification there and one back (rtt), or writes (bw).
pub fn run(plan: &ComparePlan, ground: &Ground, cell: Cell) -> Result<Outcome> {
    let engine = ground
        .engine
        .as_deref()
        .expect("a path that was not left out has its program");
    let test = match cell.mode {
        Mode::Rtt => "write-notify",
        _ => "write-bw",
    };
    let mut command = Command::new(engine);
    command.args([test, "--devices", "linked", "--json"]);
    command.args(["--size", &cell.size.to_string()]);
    command.args(["--seconds", &plan.seconds.to_string()]);
    command.args(["--core", &plan.cores.client.to_string()]);
    command.args(["--device-core", &plan.cores.server.to_string()]);
    let limit = Duration::from_secs_f64(plan.seconds * 2.0 + 20.0);
    let (good, text) = Child::start("rdsock-engine-perf", command)?.output(limit)?;
    let said = text.lines().find(|line| line.starts_with('{'));
    let Some(said) = said.filter(|_| good) else {
        let text = text.trim();
        return Err(Error::Peer(format!("rdsock-engine-perf failed: {text}")));
    };
    let line: Line = serde_json::from_str(said).map_err(|error| {
        Error::Peer(format!(
            "rdsock-engine-perf said what can't be read ({error}): {said}"
        ))
    })?;
    Ok(outcome(cell, line))
}

/// The result as this program has it.
fn outcome(cell: Cell, line: Line) -> Outcome {
    let is_rtt = cell.mode == Mode::Rtt;
    // A sample is half of a way there and back.
    let histogram: Buckets = match is_rtt {
        true => (line.histogram.iter())
            .map(|(ns, count)| (2 * ns, *count))
            .collect(),
        false => Buckets::new(),
    };
    let quantile = |part: f64| {
        let rank = (line.operations as f64 * part).ceil() as u64;
        let mut seen = 0;
        let reached = histogram.iter().find(|(_, count)| {
            seen += count;
            seen >= rank
        });
        reached.map(|(ns, _)| *ns)
    };
    Outcome {
        mode: cell.mode,
        wait: Wait::Spin,
        size: cell.size,
        seconds: line.seconds,
        count: line.operations,
        per_s: line.operations as f64 / line.seconds,
        mb_s: (!is_rtt).then_some(line.mb_s),
        p50_ns: quantile(0.5),
        p99_ns: quantile(0.99),
        p999_ns: quantile(0.999),
        max_ns: quantile(1.0),
        ring_bytes: None,
        preempted: None,
        clock: Facts {
            source: Source::Monotonic,
            cost_ns: 0.0,
        },
        histogram,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"test":"write-notify","bytes":64,"operations":4,"seconds":2.0,"mb_s":8.0,
        "histogram":[[100,2],[150,1],[900,1]]}"#;

    fn outcome_of(mode: Mode) -> Outcome {
        let size = 64;
        outcome(Cell { mode, size }, serde_json::from_str(LINE).unwrap())
    }

    #[test]
    fn a_round_trip_is_two_ways() {
        let outcome = outcome_of(Mode::Rtt);
        assert_eq!((outcome.p50_ns, outcome.max_ns), (Some(200), Some(1800)));
        assert_eq!((outcome.per_s, outcome.mb_s), (2.0, None));
        assert_eq!(outcome.histogram, [(200, 2), (300, 1), (1800, 1)]);
    }

    #[test]
    fn bulk_has_no_latency() {
        let outcome = outcome_of(Mode::Bw);
        assert_eq!((outcome.mb_s, outcome.p50_ns), (Some(8.0), None));
    }
}
