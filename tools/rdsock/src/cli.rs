//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

/// Carries the TCP connections of unmodified programs over shared memory.
#[derive(Debug, Parser)]
#[command(name = "rdsock", version, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a program, accelerated
    ///
    /// The program's connections to other programs of this machine that run under rdsock go over
    /// shared memory; all others go over the kernel, as always. A daemon for this user is started
    /// when none runs; it ends when unused for a while. The exit status is the program's own: 127
    /// when it is not found, 126 when it can't be executed.
    Run(RunArgs),
    /// Print a completion script for a shell
    Completions {
        /// For which shell
        shell: Shell,
    },
    /// Write the manual pages into a directory
    Man {
        /// Where to
        dir: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Do not start a daemon when none runs
    #[arg(long)]
    pub no_daemon: bool,
    /// Spin for so many microseconds before sleeping for a stream
    #[arg(long, value_name = "N")]
    pub spin_us: Option<u32>,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD", num_args = 1..)]
    pub command: Vec<OsString>,
}
