//! The report for people.

use rdsock_output::{OutputError, in_line, line};

use super::report::Report;
use crate::show::table;

/// Prints the report.
pub fn print(report: &Report, pid: Option<i32>) -> Result<(), OutputError> {
    match &report.daemon {
        Some(daemon) => line!("daemon: pid {} at {}", daemon.pid, daemon.socket),
        None => line!("daemon: none answers"),
    }?;
    for process in &report.processes {
        if let Some(reason) = &process.reason {
            let (program, reason) = (in_line(&process.program), in_line(reason));
            line!("{program} ({}): {reason}", process.pid)?;
        }
    }
    for pid in &report.not_looked_at {
        line!(
            "process {pid} could not be looked at: it keeps whoever looks waiting, and whether it is preloaded is not known"
        )?;
    }
    if report.connections.is_empty() {
        return match pid {
            Some(pid) => line!("process {pid} has no TCP connections"),
            None => line!("no preloaded program has a TCP connection"),
        };
    }
    let mut table = table(["PID", "PROGRAM", "FD", "LOCAL", "PEER", "RINGS", "WHY NOT"]);
    for line in &report.connections {
        let rings = match (line.accelerated, line.tx_on_ring, line.rx_on_ring) {
            (false, ..) => "no",
            (true, true, true) => "yes",
            (true, true, false) => "sending",
            (true, ..) => "receiving",
        };
        let peer = match &line.node_name {
            Some(node) => format!("{} on {node}", line.peer),
            None => line.peer.clone(),
        };
        table.add_row([
            line.pid.to_string(),
            line.program.clone(),
            line.fd.to_string(),
            line.local.clone(),
            peer,
            rings.to_owned(),
            line.reason.clone().unwrap_or_default(),
        ]);
    }
    line!("{table}")?;
    let accelerated = report
        .connections
        .iter()
        .filter(|line| line.accelerated)
        .count();
    line!(
        "{accelerated} of {} connections on rings",
        report.connections.len()
    )
}
