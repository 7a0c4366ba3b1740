//! `rdsock-model`: devices "rde" (`docs/device.md`) of several nodes, wired to each other, in one process. Each is served
//! over a vfio-user socket, to a daemon (`device = "vfio-user:…"`) or to a virtual machine (QEMU's `vfio-user-pci`).
//!
//! The order of a run is: raw flags ([`cli`]) → checked plan ([`plan`]) → run ([`run`]) → [`report`].

mod cli;
mod plan;
mod report;
mod run;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let done = plan::Plan::check(cli::Flags::parse())
        .map_err(|error| error.to_string())
        .and_then(|plan| run::run(&plan).map_err(|error| error.to_string()));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rdsock-model: {error}");
            ExitCode::FAILURE
        }
    }
}
