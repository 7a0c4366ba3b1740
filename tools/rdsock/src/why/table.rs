//! The report for people.

use super::report::Report;
use crate::show::table;

/// Prints the report.
pub fn print(report: &Report, pid: Option<i32>) {
    match &report.daemon {
        Some(daemon) => println!("daemon: pid {} at {}", daemon.pid, daemon.socket),
        None => println!("daemon: none answers"),
    }
    for process in &report.processes {
        if let Some(reason) = &process.reason {
            println!("{} ({}): {reason}", process.program, process.pid);
        }
    }
    if report.connections.is_empty() {
        return match pid {
            Some(pid) => println!("process {pid} has no TCP connections"),
            None => println!("no preloaded program has a TCP connection"),
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
    println!("{table}");
    let accelerated = report
        .connections
        .iter()
        .filter(|line| line.accelerated)
        .count();
    println!(
        "{accelerated} of {} connections on rings",
        report.connections.len()
    );
}
