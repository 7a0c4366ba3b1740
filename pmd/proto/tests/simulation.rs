//! Whole fabrics, by seed: 2 to 64 nodes with faults, each stream checked byte for byte.
//!
//! A failing seed is printed; `RDSOCK_SEED=<seed>` runs that one alone, `RDSOCK_SEEDS=<n>` sets how
//! many are tried for each kind of fault.

#[path = "simulation/fabric.rs"]
mod fabric;
#[path = "simulation/faults.rs"]
mod faults;
#[path = "simulation/liar.rs"]
mod liar;
#[path = "simulation/program.rs"]
mod program;
#[path = "simulation/rng.rs"]
mod rng;
#[path = "simulation/verdict.rs"]
mod verdict;
#[path = "simulation/world.rs"]
mod world;

use program::Outcome;
use rng::mix;
use world::{Faults, World};

/// Prints the seed of a run that fails.
struct Seed<'a>(&'a str, u64);

impl Drop for Seed<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "replay: RDSOCK_SEED={} cargo test -p rdsock-proto --test simulation {}",
                self.1, self.0
            );
        }
    }
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} has to be a number, not {text:?}")),
    )
}

/// Connections that ended with all bytes at both ends, and all connections.
#[derive(Default)]
struct Tally {
    orderly: usize,
    all: usize,
    writes: u64,
}

fn run_one(name: &str, seed: u64, faults: &Faults, tally: &mut Tally) {
    let replay = Seed(name, seed);
    let nodes = match mix(seed) % 200 {
        0 => 64,
        1..20 => 8,
        few => 2 + few as usize % 4,
    };
    let mut world = World::new(seed, nodes, faults.clone());
    let (ticks, connections) = if nodes == 64 { (400, 80) } else { (800, 12) };
    world.run(ticks, connections);
    let eof = |side: &program::Side| side.outcome == Some(Outcome::Eof);
    tally.orderly += world
        .connections
        .iter()
        .filter(|one| one.sides.iter().all(eof))
        .count();
    tally.all += world.connections.len();
    tally.writes += world.fabric.writes;
    drop(replay);
}

/// Runs the seeds; at least `share` percent of the connections have to carry all their bytes.
fn simulate(name: &str, faults: Faults, share: usize) {
    let mut tally = Tally::default();
    if let Some(seed) = number("RDSOCK_SEED") {
        return run_one(name, seed, &faults, &mut tally);
    }
    let some = if cfg!(debug_assertions) { 40 } else { 2000 };
    for seed in 0..number("RDSOCK_SEEDS").unwrap_or(some) {
        run_one(name, seed, &faults, &mut tally);
    }
    println!(
        "{name}: {} of {} connections whole, {} writes",
        tally.orderly, tally.all, tally.writes
    );
    assert!(
        tally.orderly * 100 >= tally.all * share,
        "{} of {}",
        tally.orderly,
        tally.all
    );
}

#[test]
fn without_faults() {
    // The rest are refused or reset by their programs, as chance has it.
    simulate("without_faults", Faults::default(), 70);
}

#[test]
fn unruly_programs() {
    simulate(
        "unruly_programs",
        Faults {
            unruly: true,
            ..Faults::default()
        },
        50,
    );
}

#[test]
fn failing_posts() {
    simulate(
        "failing_posts",
        Faults {
            failures: 50,
            ..Faults::default()
        },
        20,
    );
}

#[test]
fn short_cuts() {
    simulate(
        "short_cuts",
        Faults {
            short_cuts: 60,
            ..Faults::default()
        },
        40,
    );
}

#[test]
fn long_cuts() {
    simulate(
        "long_cuts",
        Faults {
            long_cuts: 200,
            unruly: true,
            ..Faults::default()
        },
        10,
    );
}

#[test]
fn worker_restarts() {
    simulate(
        "worker_restarts",
        Faults {
            workers: 150,
            ..Faults::default()
        },
        20,
    );
}

#[test]
fn node_restarts() {
    simulate(
        "node_restarts",
        Faults {
            nodes: 200,
            unruly: true,
            ..Faults::default()
        },
        10,
    );
}

#[test]
fn lying_node() {
    simulate(
        "lying_node",
        Faults {
            liar: true,
            ..Faults::default()
        },
        10,
    );
}

#[test]
fn everything() {
    let faults = Faults {
        unruly: true,
        failures: 100,
        short_cuts: 100,
        long_cuts: 400,
        workers: 300,
        nodes: 400,
        liar: true,
    };
    simulate("everything", faults, 1);
}
