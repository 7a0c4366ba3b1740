//! The proof that a run went the way that its row says: the shim loaded at both ends or at none, and for rdsock the
//! word of `rdsock why` before and after.

use super::ground::Ground;
use super::nodes::Nodes;
use super::why::{self, Demand, End};
use crate::error::{Doing, Error, Result};
use crate::plan::{Cell, Mode, Path};
use serde_json::Value;

/// Name of the shim's file, by which a process that has it loaded is known.
const SHIM: &str = "librdsock";

/// That a run goes the way that its row will say.
pub enum Proof<'a> {
    /// Over the kernel: neither process has the shim.
    Kernel,
    /// Over rdsock: what `rdsock why` must say, and the bytes moved before.
    Rdsock {
        rdsock: &'a std::path::Path,
        ends: Box<[End; 2]>,
        demand: Demand,
        before: [u64; 2],
    },
}

impl<'a> Proof<'a> {
    /// Looks at the two processes once they are connected; for rdsock, waits until the connection is on rings.
    pub fn begin(
        ground: &'a Ground,
        cell: Cell,
        path: Path,
        nodes: Option<&Nodes>,
        listening: &Value,
        connected: &Value,
    ) -> Result<Self> {
        let pids = [pid(listening)?, pid(connected)?];
        for pid in pids {
            check_shim(pid, path)?;
        }
        if !path.is_rdsock() {
            return Ok(Self::Kernel);
        }
        let rdsock = ground
            .rdsock
            .as_deref()
            .expect("a path that was not left out has its program");
        let (local, peer) = (text(connected, "local")?, text(connected, "peer")?);
        let daemon = |at: usize| nodes.map(|nodes| nodes.sockets()[at].clone());
        let ends = Box::new([
            End {
                name: "server",
                daemon: daemon(0),
                pid: pids[0],
                local: peer.clone(),
                peer: local.clone(),
            },
            End {
                name: "client",
                daemon: daemon(1),
                pid: pids[1],
                local,
                peer,
            },
        ]);
        let demand = if cell.mode == Mode::Cps {
            Demand::Attached
        } else {
            Demand::OnRings
        };
        let before = why::wait_until(rdsock, &ends, demand)?;
        Ok(Self::Rdsock {
            rdsock,
            ends,
            demand,
            before,
        })
    }

    /// Looks again when the run is over and the connection still open: at least `payload` bytes went over rings.
    pub fn complete(self, payload: u64) -> Result<()> {
        match self {
            Self::Kernel => Ok(()),
            Self::Rdsock {
                rdsock,
                ends,
                demand,
                before,
            } => why::check_after(rdsock, &ends, demand, before, payload),
        }
    }
}

impl Path {
    /// Whether the path goes through the shim.
    pub fn is_rdsock(self) -> bool {
        matches!(
            self,
            Self::RdsockLocal | Self::RdsockAdaptive | Self::RdsockNodes
        )
    }
}

/// The shim must be loaded exactly where the row will say so.
fn check_shim(pid: u32, path: Path) -> Result<()> {
    match (path.is_rdsock(), is_shimmed(&pid.to_string())?) {
        (true, false) => Err(Error::NotAccelerated(format!(
            "process {pid} runs without {SHIM}"
        ))),
        (false, true) => Err(Error::Peer(format!(
            "process {pid} has {SHIM} loaded: this would not measure the kernel"
        ))),
        _ => Ok(()),
    }
}

/// Whether a process has the shim mapped.
pub fn is_shimmed(pid: &str) -> Result<bool> {
    let maps =
        std::fs::read(format!("/proc/{pid}/maps")).doing(|| format!("look at process {pid}"))?;
    Ok(maps
        .windows(SHIM.len())
        .any(|window| window == SHIM.as_bytes()))
}

/// A text field of an event.
pub fn text(event: &Value, field: &str) -> Result<String> {
    event[field]
        .as_str()
        .map(Into::into)
        .ok_or_else(|| Error::Peer(format!("an event without {field:?}: {event}")))
}

/// The pid in an event.
pub fn pid(event: &Value) -> Result<u32> {
    let pid = event["pid"]
        .as_u64()
        .and_then(|pid| u32::try_from(pid).ok());
    pid.ok_or_else(|| Error::Peer(format!("an event without a pid: {event}")))
}
