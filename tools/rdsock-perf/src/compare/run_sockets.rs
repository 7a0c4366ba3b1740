//! One measurement of a socket path: a server process, a client process, and for rdsock the proof that it was on.

use super::LeftOut;
use super::child::Child;
use super::veth::Veth;
use super::why::{self, Demand, End};
use crate::error::{Doing, Error, Result};
use crate::outcome::Outcome;
use crate::plan::{Cell, ComparePlan, Mode, Path, Wait};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Name of the environment variable with the shim's spin budget, in microseconds.
const SPIN_BUDGET: &str = "RDSOCK_SPIN_US";
/// Name of the shim's file, by which a process that has it loaded is known.
const SHIM: &str = "librdsock";
/// Longest time for a process to start and say its first word; `rdsock run` may start a daemon first.
const START: Duration = Duration::from_secs(15);
/// Longest time for a process to end when its connection has ended.
const END: Duration = Duration::from_secs(10);

/// What the paths stand on, and which paths are left out.
pub struct Ground {
    program: PathBuf,
    veth: Option<Veth>,
    rdsock: Option<PathBuf>,
    /// Paths that can't be measured here.
    pub left_out: Vec<LeftOut>,
}

impl Ground {
    /// Finds out which of the plan's paths are possible. A path that the user named must be.
    pub fn prepare(plan: &ComparePlan) -> Result<Self> {
        let program = std::env::current_exe().doing(|| "find this program's own file")?;
        if is_shimmed("self")? {
            return Err(Error::Usage(
                "compare starts rdsock itself: don't run it under rdsock".into(),
            ));
        }
        let mut ground = Self {
            program,
            veth: None,
            rdsock: None,
            left_out: Vec::new(),
        };
        for &path in &plan.paths {
            let prepared = match path {
                Path::TcpVeth => Veth::make().map(|veth| ground.veth = Some(veth)),
                Path::RdsockLocal | Path::RdsockAdaptive => {
                    find_rdsock(plan.rdsock.as_ref(), &ground.program)
                        .map(|found| ground.rdsock = Some(found))
                }
                _ => Ok(()),
            };
            match prepared {
                Err(reason) if plan.paths_named || plan.rdsock.is_some() && path.is_rdsock() => {
                    return Err(Error::Usage(format!("{path} can't be measured: {reason}")));
                }
                Err(reason) => ground.left_out.push(LeftOut { path, reason }),
                Ok(()) => {}
            }
        }
        Ok(ground)
    }

    /// What is measured in one round of `cell`, in order.
    pub fn lanes(&self, plan: &ComparePlan, cell: Cell) -> Vec<(Path, Wait)> {
        let is_in = |path: &&Path| self.left_out.iter().all(|left| left.path != **path);
        let lanes = plan.paths.iter().filter(is_in);
        lanes
            .flat_map(|&path| {
                plan.waits_of(path, cell)
                    .into_iter()
                    .map(move |wait| (path, wait))
            })
            .collect()
    }

    /// The start of the commands of server and client for `path`, up to this program's own name.
    fn commands(&self, path: Path, wait: Wait) -> [Command; 2] {
        let mut commands = match (path, &self.veth, &self.rdsock) {
            (Path::TcpVeth, Some(veth), _) => {
                [veth.in_server(), veth.in_client()].map(|mut command| {
                    command.arg(&self.program);
                    command
                })
            }
            (Path::RdsockLocal | Path::RdsockAdaptive, _, Some(rdsock)) => [(); 2].map(|()| {
                let mut command = Command::new(rdsock);
                command.args(["run", "--"]).arg(&self.program);
                command
            }),
            _ => [(); 2].map(|()| Command::new(&self.program)),
        };
        for command in &mut commands {
            match (path, wait) {
                // Like with like: where the kernel may not spin, the shim may not either.
                (Path::RdsockLocal, Wait::Block) => command.env(SPIN_BUDGET, "0"),
                _ => command.env_remove(SPIN_BUDGET),
            };
        }
        commands
    }
}

impl Path {
    /// Whether the path goes through the shim.
    fn is_rdsock(self) -> bool {
        matches!(self, Self::RdsockLocal | Self::RdsockAdaptive)
    }
}

/// Starts a server and a client, has them measure, and takes the result.
pub fn run(
    plan: &ComparePlan,
    ground: &Ground,
    cell: Cell,
    path: Path,
    wait: Wait,
) -> Result<Outcome> {
    let [mut server, mut client] = ground.commands(path, wait);
    server.args([
        "server",
        "--json",
        "--once",
        "--core",
        &plan.cores.server.to_string(),
    ]);
    match path {
        Path::Unix => server.args(["--unix", &fresh_name()]),
        Path::TcpVeth => server.args(["--port", "0", "--bind", &Veth::SERVER.to_string()]),
        _ => server.args(["--port", "0"]),
    };
    let mut server = Child::start("the server", server)?;
    let listening = server.event("listening", START)?;
    add_client_flags(&mut client, plan, cell, wait, &text(&listening, "address")?);
    let mut client = Child::start("the client", client)?;
    let connected = client.event("connected", START)?;
    let proof = Proof::begin(ground, cell, path, &listening, &connected)?;
    client.tell("go")?;
    let event = client.event("result", Duration::from_secs_f64(plan.seconds * 1.5 + 20.0))?;
    proof.complete()?;
    client.tell("finish")?;
    client.finish(END)?;
    server.finish(END)?;
    serde_json::from_value(event["result"].clone())
        .map_err(|error| Error::Peer(format!("a result can't be read: {error}")))
}

/// The client's flags.
fn add_client_flags(
    client: &mut Command,
    plan: &ComparePlan,
    cell: Cell,
    wait: Wait,
    address: &str,
) {
    client.args([
        "client",
        "--control",
        "--mode",
        &cell.mode.to_string(),
        "--wait",
        &wait.to_string(),
    ]);
    client.args([
        "--size",
        &cell.size.max(1).to_string(),
        "--seconds",
        &plan.seconds.to_string(),
    ]);
    client.args(["--core", &plan.cores.client.to_string()]);
    client.args(["--timeout", &(plan.seconds * 2.0 + 60.0).ceil().to_string()]);
    if plan.verify {
        client.arg("--verify");
    }
    if plan.nagle {
        client.arg("--nagle");
    }
    match address.strip_prefix("unix:") {
        Some(name) => client.args(["--unix", name]),
        None => client.arg(address),
    };
}

/// That a run goes the way that its row will say.
enum Proof<'a> {
    /// Over the kernel: neither process has the shim.
    Kernel,
    /// Over rdsock: what `rdsock why` must say, and the bytes moved before.
    Rdsock {
        rdsock: &'a std::path::Path,
        ends: [End; 2],
        demand: Demand,
        before: [u64; 2],
    },
}

impl<'a> Proof<'a> {
    /// Looks at the two processes once they are connected; for rdsock, waits until the connection is on rings.
    fn begin(
        ground: &'a Ground,
        cell: Cell,
        path: Path,
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
        let ends = [
            End {
                name: "server",
                pid: pids[0],
                local: peer.clone(),
                peer: local.clone(),
            },
            End {
                name: "client",
                pid: pids[1],
                local,
                peer,
            },
        ];
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

    /// Looks again when the run is over and the connection still open.
    fn complete(self) -> Result<()> {
        match self {
            Self::Kernel => Ok(()),
            Self::Rdsock {
                rdsock,
                ends,
                demand,
                before,
            } => why::check_after(rdsock, &ends, demand, before),
        }
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
fn is_shimmed(pid: &str) -> Result<bool> {
    let maps =
        std::fs::read(format!("/proc/{pid}/maps")).doing(|| format!("look at process {pid}"))?;
    Ok(maps
        .windows(SHIM.len())
        .any(|window| window == SHIM.as_bytes()))
}

/// `rdsock`: the one that was named, else beside this program, else in PATH.
fn find_rdsock(
    named: Option<&PathBuf>,
    program: &std::path::Path,
) -> std::result::Result<PathBuf, String> {
    if let Some(named) = named {
        return named
            .is_file()
            .then(|| named.clone())
            .ok_or(format!("{} is not a file", named.display()));
    }
    let beside = program.parent().map(|folder| folder.join("rdsock"));
    let search = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&search).map(|folder| folder.join("rdsock"));
    beside
        .into_iter()
        .chain(in_path)
        .find(|candidate| candidate.is_file())
        .ok_or("no program rdsock beside this one or in PATH (name it with --rdsock)".into())
}

/// A name in the abstract name space that nobody else uses.
fn fresh_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!(
        "@rdsock-perf-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    )
}

/// A text field of an event.
fn text(event: &Value, field: &str) -> Result<String> {
    event[field]
        .as_str()
        .map(Into::into)
        .ok_or_else(|| Error::Peer(format!("an event without {field:?}: {event}")))
}

/// The pid in an event.
fn pid(event: &Value) -> Result<u32> {
    let pid = event["pid"]
        .as_u64()
        .and_then(|pid| u32::try_from(pid).ok());
    pid.ok_or_else(|| Error::Peer(format!("an event without a pid: {event}")))
}
