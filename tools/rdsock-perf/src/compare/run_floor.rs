//! One measurement of a floor, in a process of its own.

use super::child::Child;
use crate::error::{Doing, Error, Result};
use crate::outcome::Outcome;
use crate::plan::{Cell, ComparePlan, Path};
use std::process::Command;
use std::time::Duration;

/// Runs `rdsock-perf floor`.
pub fn run(plan: &ComparePlan, cell: Cell, path: Path) -> Result<Outcome> {
    let mut command =
        Command::new(std::env::current_exe().doing(|| "find this program's own file")?);
    command.args([
        "floor",
        "--json",
        "--path",
        &path.to_string(),
        "--mode",
        &cell.mode.to_string(),
    ]);
    command.args([
        "--size",
        &cell.size.to_string(),
        "--seconds",
        &plan.seconds.to_string(),
    ]);
    command.args(["--cores", &plan.cores.to_string()]);
    let mut child = Child::start(&path.to_string(), command)?;
    let event = child.event("result", Duration::from_secs_f64(plan.seconds * 2.0 + 20.0))?;
    child.finish(Duration::from_secs(5))?;
    serde_json::from_value(event["result"].clone())
        .map_err(|error| Error::Peer(format!("a result can't be read: {error}")))
}
