//! The part of `rdsock stat` about other nodes.

use rdsock_output::{OutputError, line};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::counts;
use crate::show::table;

/// The path to other nodes.
#[derive(Debug, Deserialize)]
pub struct Fabric {
    node: u16,
    device: String,
    failed: bool,
    streams: u64,
    listeners: u64,
    nodes: Vec<Node>,
    cores: Vec<Core>,
}

/// A poll core.
#[derive(Debug, Deserialize)]
struct Core {
    core: u16,
    cpu: Option<usize>,
    failed: bool,
    streams: u64,
    counts: Map<String, Value>,
    timed_turns: u64,
    stage_ns: Map<String, Value>,
}

/// Another node.
#[derive(Debug, Deserialize)]
struct Node {
    id: u16,
    name: String,
    addresses: Vec<String>,
    up: bool,
    streams: u64,
    violations: Map<String, Value>,
}

/// Prints it.
pub fn print(fabric: &Fabric) -> Result<(), OutputError> {
    let device = match fabric.failed {
        true => "which has FAILED: see the log of rdsockd",
        false => "which works",
    };
    line!(
        "\nnode {} on {}, {device}: {} streams to other nodes, {} sockets that they may connect to",
        fabric.node,
        fabric.device,
        fabric.streams,
        fabric.listeners
    )?;
    let mut table = table([
        "NODE",
        "NAME",
        "STATE",
        "STREAMS",
        "ADDRESSES",
        "VIOLATIONS",
    ]);
    for node in &fabric.nodes {
        let state = if node.up { "up" } else { "absent" };
        table.add_row([
            node.id.to_string(),
            node.name.clone(),
            state.into(),
            node.streams.to_string(),
            node.addresses.join(" "),
            counts(&node.violations),
        ]);
    }
    line!("{table}")?;
    for core in &fabric.cores {
        print_core(core)?;
    }
    Ok(())
}

fn print_core(core: &Core) -> Result<(), OutputError> {
    let place = match core.cpu {
        Some(cpu) => format!("pinned to CPU {cpu}"),
        None => "on any CPU".into(),
    };
    let state = if core.failed { ", FAILED" } else { "" };
    line!(
        "poll core {}, {place}{state}: streams {}, {}",
        core.core,
        core.streams,
        counts(&core.counts)
    )?;
    let mean = |(name, sum): (&String, &Value)| {
        let mean = sum.as_u64()?.checked_div(core.timed_turns)?;
        Some(format!("{name} {mean}"))
    };
    let means: Vec<String> = core.stage_ns.iter().filter_map(mean).collect();
    if !means.is_empty() {
        line!("  ns of a busy turn: {}", means.join(", "))?;
    }
    Ok(())
}
