//! What the hardware alone can do between two cores: no socket, no system call.
//!
//! `floor-cacheline` is one cache line that two threads write in turn; `floor-ring` is a bare ring in memory that two
//! processes share. Everything above them pays at least this.

pub mod line;
mod memory;
mod ring;

use crate::clock::Clock;
use crate::error::Result;
use crate::plan::{FloorPlan, Path};
use rdsock_output::line as print_line;
use serde_json::json;

/// Measures one floor and prints its result. Must be called before any thread is started: the ring forks.
pub fn run(plan: &FloorPlan) -> Result<()> {
    let clock = Clock::calibrated();
    let outcome = match plan.path {
        Path::FloorCacheline => line::run(plan.cores, plan.seconds, &clock)?,
        _ => ring::run(plan, &clock)?,
    };
    if plan.json {
        rdsock_output::json(json!({"event": "result", "result": outcome}))?;
    } else {
        print_line!("{outcome}")?;
        if let Some(bytes) = outcome.ring_bytes {
            print_line!("  ring     {} KiB", bytes >> 10)?;
        }
    }
    Ok(())
}
