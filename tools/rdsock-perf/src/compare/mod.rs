//! The comparison: all paths of this machine, measured in alternation within one run.
//!
//! For each mode and size, each round measures every path once, so that whatever drifts on the machine drifts under
//! all of them alike; figures are medians of the rounds. Before and after each round the cost of a cache line is
//! probed and printed, since on virtual machines it moves.

mod child;
mod ground;
mod interrupt;
mod json;
mod machine;
mod nodes;
mod proof;
mod ratio;
mod rows;
mod run_engine;
mod run_floor;
mod run_sockets;
mod svg;
mod table;
mod veth;
mod why;

use crate::clock::Clock;
use crate::error::{Doing, Error, Result};
use crate::floor::line;
use crate::outcome::Outcome;
use crate::plan::{Cell, ComparePlan, Path, Wait};
use ground::Ground;
use indicatif::{ProgressBar, ProgressStyle};
use rdsock_output::line as print_line;
use rows::{Probe, Rows};
use serde::Serialize;
use std::time::Duration;

/// Length of one probe of the cache line.
const PROBE: Duration = Duration::from_millis(30);

/// A path that is not measured, and why.
#[derive(Debug, Clone, Serialize)]
pub struct LeftOut {
    /// The path.
    pub path: Path,
    /// The reason, in words.
    pub reason: String,
}

/// Measures, prints the table, writes the files.
pub fn run(plan: &ComparePlan) -> Result<()> {
    interrupt::watch();
    let clock = Clock::calibrated();
    let ground = Ground::prepare(plan)?;
    let bar = Progress::new(total_runs(plan, &ground));
    bar.say(&format!(
        "cores: server {}, client {}; clock: {:?}, one reading costs {} ns",
        plan.cores.server,
        plan.cores.client,
        clock.facts().source,
        clock.facts().cost_ns
    ));
    let mut rows = Rows::default();
    for &cell in &plan.cells {
        for round in 1..=plan.rounds {
            measure_round(plan, &ground, cell, round, &clock, &bar, &mut rows)?;
        }
    }
    drop(bar);
    print_line!("{}", table::draw(&rows))?;
    if let Some(line) = table::disturbances(&rows) {
        print_line!("{line}")?;
    }
    for LeftOut { path, reason } in &ground.left_out {
        print_line!("left out: {path}: {reason}")?;
    }
    if let Some(file) = &plan.json {
        let text = json::text(plan, &rows, &ground.left_out, clock.facts());
        std::fs::write(file, text).doing(|| format!("write {}", file.display()))?;
    }
    if let Some(file) = &plan.svg {
        svg::draw(file, &rows)?;
    }
    Ok(())
}

/// One round of one mode and size: every path once, between two probes of the cache line.
fn measure_round(
    plan: &ComparePlan,
    ground: &Ground,
    cell: Cell,
    round: u32,
    clock: &Clock,
    bar: &Progress,
    rows: &mut Rows,
) -> Result<()> {
    let before_ns = probe(plan, clock)?;
    for (path, wait) in ground.lanes(plan, cell) {
        bar.begin(&format!(
            "{} {path} {wait}, round {round} of {}",
            cell.mode, plan.rounds
        ));
        let outcome = measure(plan, ground, cell, path, wait)?;
        rows.add(path, cell, wait, outcome);
        bar.done();
    }
    let after_ns = probe(plan, clock)?;
    bar.say(&format!(
        "{} {} B, round {round} of {}: cache line {before_ns} ns before, {after_ns} ns after",
        cell.mode, cell.size, plan.rounds
    ));
    rows.probes.push(Probe {
        mode: cell.mode,
        size: cell.size,
        round,
        before_ns,
        after_ns,
    });
    Ok(())
}

/// One measurement of one path.
fn measure(
    plan: &ComparePlan,
    ground: &Ground,
    cell: Cell,
    path: Path,
    wait: Wait,
) -> Result<Outcome> {
    interrupt::check()?;
    let measured = match path {
        Path::FloorCacheline | Path::FloorRing => run_floor::run(plan, cell, path),
        Path::FloorEngine => run_engine::run(plan, ground, cell),
        _ => run_sockets::run(plan, ground, cell, path, wait),
    };
    measured.map_err(|error| match error {
        // Ctrl-C reaches the children as well, and their end is only a consequence.
        _ if interrupt::check().is_err() => Error::Interrupted,
        Error::Peer(text) => Error::Peer(format!("{} over {path} ({wait}): {text}", cell.mode)),
        other => other,
    })
}

/// What a bounced cache line costs now: median round trip in nanoseconds.
fn probe(plan: &ComparePlan, clock: &Clock) -> Result<u64> {
    interrupt::check()?;
    Ok(line::run(plan.cores, PROBE, clock)?.p50_ns.unwrap_or(0))
}

/// How many single measurements there will be.
fn total_runs(plan: &ComparePlan, ground: &Ground) -> u64 {
    let a_round: usize = plan
        .cells
        .iter()
        .map(|&cell| ground.lanes(plan, cell).len())
        .sum();
    a_round as u64 * u64::from(plan.rounds)
}

/// A bar on a terminal, and plain lines anywhere.
struct Progress {
    bar: ProgressBar,
}

impl Progress {
    fn new(total: u64) -> Self {
        let bar = ProgressBar::new(total);
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {eta} {msg}")
            .expect("a valid template");
        bar.set_style(style);
        Self { bar }
    }

    fn begin(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    fn done(&self) {
        self.bar.inc(1);
    }

    fn say(&self, line: &str) {
        self.bar.suspend(|| rdsock_output::say(line));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
