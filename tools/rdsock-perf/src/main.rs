//! `rdsock-perf`: latency and throughput of TCP, UNIX sockets and rdsock, side by side.
//!
//! It uses plain sockets and none of the project's crates but the one that prints, so that one binary measures the kernel and, when
//! started by `rdsock run`, the shim. It never knows by itself that it is accelerated: `compare` asks `rdsock why`.
//!
//! The order of a run is: raw flags ([`cli`]) → checked plan ([`plan`]) → run → report.

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod address;
mod cli;
mod client;
mod clock;
mod compare;
mod core_pin;
mod error;
mod floor;
mod latency;
mod link;
mod outcome;
mod pattern;
mod plan;
mod server;
mod wire;

use plan::Plan;
use std::process::ExitCode;

fn main() -> ExitCode {
    let flags = match rdsock_output::parse("rdsock-perf") {
        Ok(flags) => flags,
        Err(status) => return status,
    };
    let done = Plan::check(flags).and_then(|plan| match plan {
        Plan::Server(plan) => server::run(&plan),
        Plan::Client(plan) => client::run(&plan),
        Plan::Compare(plan) => compare::run(&plan),
        Plan::Floor(plan) => floor::run(&plan),
        Plan::Text(text) => cli::print(&text),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            rdsock_output::failed("rdsock-perf", &error);
            ExitCode::from(error.exit_code())
        }
    }
}
