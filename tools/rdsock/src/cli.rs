//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::pci::{Address, MODULE, VFIO_PCI};

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
    /// Tell which TCP connections are accelerated, and why the others are not
    Why(WhyArgs),
    /// Show the live counters of the daemon, the programs and their streams
    Stat(StatArgs),
    /// Check what this machine has for rdsock, and what to do about what it lacks
    ///
    /// The exit status is 0 when rdsock can be used.
    Doctor(DoctorArgs),
    /// Show devices for connections to other nodes, and what keeps each from being used
    Devices(DevicesArgs),
    /// Give a device to a VFIO driver, so that rdsockd can use it
    ///
    /// Refused for a device that is in use, that shares its IOMMU group with others, or that no
    /// IOMMU stands before. It counts until the machine is started again. Needs root.
    Bind(BindArgs),
    /// Give a device back to the kernel
    ///
    /// The driver that the kernel has for it takes it, if there is one. Needs root.
    Unbind(UnbindArgs),
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

#[derive(Debug, Args)]
pub struct WhyArgs {
    /// Only this process, attached or not
    #[arg(value_name = "PID", conflicts_with = "all")]
    pub pid: Option<i32>,
    /// All attached processes that you may see (the default)
    #[arg(long)]
    pub all: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct StatArgs {
    /// Print the daemon's answer as JSON, one object a line
    #[arg(long)]
    pub json: bool,
    /// Again every so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub watch: Option<f64>,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Look at what this configuration of rdsockd needs for other nodes
    ///
    /// Without it: what the daemon that runs was given, or else /etc/rdsock/rdsockd.toml.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Below this folder are `sys`, `dev` and `proc`: another one is a made-up machine.
const ROOT: &str = "/";

#[derive(Debug, Args)]
pub struct DevicesArgs {
    /// Other devices that a VFIO driver has, too
    #[arg(long)]
    pub all: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[arg(long, hide = true, value_name = "DIR", default_value = ROOT)]
    pub root: PathBuf,
}

#[derive(Debug, Args)]
pub struct BindArgs {
    /// The device, such as 0000:03:00.0
    #[arg(value_name = "BDF")]
    pub address: Address,
    /// The driver: the kernel module of this project, or the kernel's own, with which nothing
    /// protects the device's management page
    #[arg(long, default_value = MODULE)]
    pub driver: VfioDriver,
    #[arg(long, hide = true, value_name = "DIR", default_value = ROOT)]
    pub root: PathBuf,
}

/// A driver that gives devices to user space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VfioDriver {
    #[value(name = MODULE)]
    RdsockVfio,
    #[value(name = VFIO_PCI)]
    VfioPci,
}

impl VfioDriver {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            VfioDriver::RdsockVfio => MODULE,
            VfioDriver::VfioPci => VFIO_PCI,
        }
    }
}

#[derive(Debug, Args)]
pub struct UnbindArgs {
    /// The device, such as 0000:03:00.0
    #[arg(value_name = "BDF")]
    pub address: Address,
    #[arg(long, hide = true, value_name = "DIR", default_value = ROOT)]
    pub root: PathBuf,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("expected a number of seconds from 0.1 to 86400".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_follows_the_program_is_the_programs() {
        for words in [
            ["rdsock", "run", "--", "ls", "--no-daemon"],
            ["rdsock", "run", "--spin-us=5", "ls", "--no-daemon"],
        ] {
            let Command::Run(args) = Cli::parse_from(words).command else {
                panic!("not run");
            };
            assert_eq!(args.command, ["ls", "--no-daemon"]);
            assert!(!args.no_daemon);
        }
    }
}
