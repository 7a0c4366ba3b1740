//! `rdsock-engine-perf`: what the RDMA engine and the mailbox take, without sockets, like perftest's
//! `ib_write_lat`. Two nodes with models of the device, in this
//! process or in two.
//!
//! The order of a run is: raw flags ([`cli`]) → checked plan ([`plan`]) → run ([`measure`]) → report.

mod bench;
mod cli;
mod linked;
mod measure;
mod plan;
mod report;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    // The libraries' warnings (no huge pages, say).
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let flags = cli::Flags::parse();
    let done = plan::Plan::check(flags).and_then(|plan| {
        if let Some(dir) = &plan.far {
            return measure::answer(&plan, dir);
        }
        let outcomes = measure::run(&plan)?;
        report::print(&plan, &outcomes);
        Ok(())
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rdsock-engine-perf: {error}");
            ExitCode::FAILURE
        }
    }
}
