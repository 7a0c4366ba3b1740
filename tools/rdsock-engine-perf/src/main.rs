//! `rdsock-engine-perf`: what the RDMA engine and the mailbox take, without sockets, like perftest's
//! `ib_write_lat`. Two nodes with models of the device, in this
//! process or in two.
//!
//! The order of a run is: raw flags ([`cli`]) → checked plan ([`plan`]) → run ([`measure`]) → report.

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod bench;
mod cli;
mod linked;
mod measure;
mod plan;
mod report;

use std::process::ExitCode;

fn main() -> ExitCode {
    // The libraries' warnings (no huge pages, say).
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        // It would panic where standard error is full.
        .log_internal_errors(false)
        .init();
    let flags = match rdsock_output::parse("rdsock-engine-perf") {
        Ok(flags) => flags,
        Err(status) => return status,
    };
    let done = plan::Plan::check(flags).and_then(|plan| {
        if let Some(dir) = &plan.far {
            return measure::answer(&plan, dir);
        }
        let outcomes = measure::run(&plan)?;
        Ok(report::print(&plan, &outcomes)?)
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            rdsock_output::failed("rdsock-engine-perf", error);
            ExitCode::FAILURE
        }
    }
}
