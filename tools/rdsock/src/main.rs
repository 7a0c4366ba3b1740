//! `rdsock`: runs programs with the shim, and tells what became of their connections.

mod cli;
mod daemon;
mod generate;
mod run;

use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command};

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => return run::run(args),
        Command::Completions { shell } => generate::completions(shell),
        Command::Man { dir } => generate::man(&dir),
    };
    result.unwrap_or_else(|error| {
        eprintln!("rdsock: {error}");
        ExitCode::FAILURE
    })
}
