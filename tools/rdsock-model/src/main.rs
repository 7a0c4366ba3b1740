//! `rdsock-model`: devices "rde" (`docs/device.md`) of several nodes, wired to each other, in one process. Each is served
//! over a vfio-user socket, to a daemon (`device = "vfio-user:…"`) or to a virtual machine (QEMU's `vfio-user-pci`).
//!
//! The order of a run is: raw flags ([`cli`]) → checked plan ([`plan`]) → run ([`run`]) → [`report`].

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod cli;
mod plan;
mod report;
mod run;

use std::process::ExitCode;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        // It would panic where standard error is full.
        .log_internal_errors(false)
        .init();
    let flags = match rdsock_output::parse("rdsock-model") {
        Ok(flags) => flags,
        Err(status) => return status,
    };
    let done = plan::Plan::check(flags)
        .map_err(|error| error.to_string())
        .and_then(|plan| run::run(&plan).map_err(|error| error.to_string()));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            rdsock_output::failed("rdsock-model", error);
            ExitCode::FAILURE
        }
    }
}
