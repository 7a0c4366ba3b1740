//! `rdsock`: runs programs with the shim, tells what became of their connections, and sets up devices.

#![deny(clippy::print_stdout, clippy::print_stderr)]

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

use cli::{Cli, Command};

/// What its complaints begin with.
const NAME: &str = "rdsock";

fn main() -> ExitCode {
    // Rust ignores SIGPIPE; a program whose output is cut off by `head` shall just end.
    signals::restore();
    let command = match rdsock_output::parse::<Cli>(NAME) {
        Ok(cli) => cli.command,
        Err(status) => return status,
    };
    let result = match command {
        Command::Run(args) => return run::run(args),
        Command::Why(args) => why::why(&args).map_err(Into::into),
        Command::Stat(args) => stat::stat(&args).map_err(Into::into),
        Command::Doctor(args) => doctor::doctor(&args).map_err(Into::into),
        Command::Devices(args) => pci::devices(&args).map_err(Into::into),
        Command::Bind(args) => pci::bind(&args).map_err(Into::into),
        Command::Unbind(args) => pci::unbind(&args).map_err(Into::into),
        Command::Completions { shell } => generate::completions(shell),
        Command::Man { dir } => generate::man(&dir),
    };
    result.unwrap_or_else(|error| {
        rdsock_output::failed(NAME, error);
        ExitCode::FAILURE
    })
}
