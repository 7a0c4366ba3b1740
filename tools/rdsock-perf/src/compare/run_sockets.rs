//! One measurement of a socket path: a server process, a client process, and for rdsock the proof that it was on.

use super::child::Child;
use super::ground::Ground;
use super::nodes::Nodes;
use super::proof::{Proof, pid, text};
use super::veth::Veth;
use crate::error::{Error, Result};
use crate::outcome::Outcome;
use crate::plan::{Cell, ComparePlan, Path, Wait};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Longest time for a process to start and say its first word; `rdsock run` may start a daemon first.
const START: Duration = Duration::from_secs(15);
/// Longest time for a process to end when its connection has ended.
const END: Duration = Duration::from_secs(10);

/// Starts a server and a client, has them measure, and takes the result.
pub fn run(
    plan: &ComparePlan,
    ground: &Ground,
    cell: Cell,
    path: Path,
    wait: Wait,
) -> Result<Outcome> {
    let nodes = match path {
        Path::RdsockNodes => Some(Nodes::start(plan, ground)?),
        _ => None,
    };
    let [mut server, mut client] = ground.commands(path, wait, nodes.as_ref());
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
        Path::RdsockNodes => {
            let address = Nodes::server_address(ground.veth.as_ref());
            server.args(["--port", "0", "--bind", &address.to_string()])
        }
        _ => server.args(["--port", "0"]),
    };
    let mut server = Child::start("the server", server)?;
    let listening = server.event("listening", START)?;
    add_client_flags(&mut client, plan, cell, wait, &text(&listening, "address")?);
    let mut client = Child::start("the client", client)?;
    let connected = client.event("connected", START)?;
    let proof = Proof::begin(ground, cell, path, nodes.as_ref(), &listening, &connected)?;
    let pids = [pid(&listening)?, pid(&connected)?];
    let before = preemptions(pids);
    client.tell("go")?;
    let event = client.event("result", Duration::from_secs_f64(plan.seconds * 1.5 + 20.0))?;
    let preempted = preemptions(pids).saturating_sub(before);
    let result = serde_json::from_value(event["result"].clone());
    let outcome: Outcome =
        result.map_err(|error| Error::Peer(format!("a result can't be read: {error}")))?;
    proof.complete(outcome.count * outcome.size)?;
    client.tell("finish")?;
    client.finish(END)?;
    server.finish(END)?;
    if let Some(nodes) = nodes {
        nodes.finish()?;
    }
    Ok(Outcome {
        // The four threads of two nodes give the two cores to each other all the time.
        preempted: (path != Path::RdsockNodes).then_some(preempted),
        ..outcome
    })
}

/// How often the kernel has taken a core away from all threads of these processes so far.
fn preemptions(pids: [u32; 2]) -> u64 {
    let tasks = pids
        .iter()
        .filter_map(|pid| std::fs::read_dir(format!("/proc/{pid}/task")).ok())
        .flatten()
        .flatten();
    tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok())
        .filter_map(|status| involuntary_switches(&status))
        .sum()
}

/// The count in the text of `/proc/PID/status`.
fn involuntary_switches(status: &str) -> Option<u64> {
    status
        .lines()
        .find_map(|line| line.strip_prefix("nonvoluntary_ctxt_switches:"))?
        .trim()
        .parse()
        .ok()
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

/// A name in the abstract name space that nobody else uses.
fn fresh_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!(
        "@rdsock-perf-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn involuntary_switches_are_told_from_voluntary_ones() {
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t5\nnonvoluntary_ctxt_switches:\t17\n";
        assert_eq!(involuntary_switches(status), Some(17));
        assert_eq!(involuntary_switches("Name:\tx\n"), None);
    }

    #[test]
    fn names_are_fresh() {
        assert_ne!(fresh_name(), fresh_name());
    }
}
