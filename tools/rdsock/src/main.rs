//! `rdsock`: runs programs with the shim, tells what became of their connections, and sets up devices.

mod cli;
mod daemon;
mod doctor;
mod generate;
mod pci;
mod run;
mod show;
mod signals;
mod stat;
mod why;

use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command};

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // Rust ignores SIGPIPE; a program whose output is cut off by `head` shall just end.
    signals::restore();
    let result = match command {
        Command::Run(args) => return run::run(args),
        Command::Why(args) => why::why(&args).map_err(Into::into),
        Command::Stat(args) => stat::stat(&args).map_err(Into::into),
        Command::Doctor(args) => Ok(doctor::doctor(&args)),
        Command::Devices(args) => Ok(pci::devices(&args)),
        Command::Bind(args) => pci::bind(&args).map_err(Into::into),
        Command::Unbind(args) => pci::unbind(&args).map_err(Into::into),
        Command::Completions { shell } => generate::completions(shell),
        Command::Man { dir } => generate::man(&dir),
    };
    result.unwrap_or_else(|error| {
        eprintln!("rdsock: {error}");
        ExitCode::FAILURE
    })
}
