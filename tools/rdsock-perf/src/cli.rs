//! The flags as they are typed, with their help texts. [`crate::plan`] checks them; nothing else reads them.

use crate::error::{Doing, Result};
use crate::plan::{Mode, Path, Wait};
use clap::{Args, CommandFactory, Parser, Subcommand};
use std::path::PathBuf;

/// Latency and throughput of TCP, UNIX sockets and rdsock, side by side
#[derive(Parser)]
#[command(name = "rdsock-perf", version, arg_required_else_help = true)]
pub struct Flags {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Answer clients: echo, receive or accept, as each client asks
    Server(ServerFlags),
    /// Measure against a server
    Client(ClientFlags),
    /// Measure all paths of this machine in alternation and print them with their ratios
    Compare(CompareFlags),
    /// Measure what the hardware alone can do (compare calls this)
    #[command(hide = true)]
    Floor(FloorFlags),
    /// Print the completions of a shell
    #[command(hide = true)]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write the pages of all subcommands into a folder
    #[command(hide = true)]
    Man {
        /// Folder for one page for each subcommand
        #[arg(long)]
        dir: Option<PathBuf>,
    },
}

#[derive(Args)]
pub struct ServerFlags {
    /// IP address to listen at
    #[arg(long, default_value = "127.0.0.1", value_name = "IP")]
    pub bind: std::net::IpAddr,
    /// TCP port; 0 lets the system choose, and the port is printed
    #[arg(long, default_value_t = 7464)]
    pub port: u16,
    /// Listen at this UNIX socket (a path, or @name in the abstract name space) instead of TCP
    #[arg(long, value_name = "NAME", conflicts_with_all = ["bind", "port"])]
    pub unix: Option<String>,
    /// How to wait, whatever the client asks for
    #[arg(long, value_enum)]
    pub wait: Option<Wait>,
    /// End after the first client
    #[arg(long)]
    pub once: bool,
    /// Core to run on
    #[arg(long)]
    pub core: Option<usize>,
    /// Print events as lines of JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct ClientFlags {
    /// Server, as HOST:PORT
    #[arg(default_value = "127.0.0.1:7464", conflicts_with = "unix")]
    pub server: String,
    /// Connect to this UNIX socket (a path, or @name) instead of TCP
    #[arg(long, value_name = "NAME")]
    pub unix: Option<String>,
    /// What to measure
    #[arg(long, value_enum, default_value_t = Mode::Rtt)]
    pub mode: Mode,
    /// Sleep in the kernel, or call non-blocking in a loop; for both ends
    #[arg(long, value_enum, default_value_t = Wait::Block)]
    pub wait: Wait,
    /// Bytes of a message (k and M are powers of two) [default: 64; bw: 64k]
    #[arg(long, value_name = "BYTES")]
    pub size: Option<String>,
    /// Seconds to measure
    #[arg(long, default_value_t = 5.0)]
    pub seconds: f64,
    /// Seconds before that which do not count [default: a tenth of --seconds, at most 1]
    #[arg(long, value_name = "SECONDS")]
    pub warmup: Option<f64>,
    /// Open loop: send so many messages a second whatever the answers do; a latency counts from the moment when
    /// its message was due, so that a stall is charged to every message that it delays
    #[arg(long, value_name = "PER_SECOND")]
    pub rate_limit: Option<f64>,
    /// Check every byte of the payload
    #[arg(long)]
    pub verify: bool,
    /// Leave Nagle's algorithm on (TCP_NODELAY is set otherwise)
    #[arg(long)]
    pub nagle: bool,
    /// Core to run on
    #[arg(long)]
    pub core: Option<usize>,
    /// Give up after so many seconds in all (the process ends by SIGALRM)
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u32>,
    /// Print the result as one line of JSON
    #[arg(long)]
    pub json: bool,
    /// Be told over stdin when to go and when to finish (compare uses this); implies --json
    #[arg(long, hide = true)]
    pub control: bool,
}

#[derive(Args)]
pub struct CompareFlags {
    /// Modes to measure
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "rtt,rate,bw,cps"
    )]
    pub only: Vec<Mode>,
    /// Paths to measure [default: all that this machine can, rdsock-adaptive for rtt only]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub paths: Vec<Path>,
    /// Message sizes (k and M are powers of two): rtt takes all, rate those up to 4k, bw those from 4k on
    /// [default: rtt 64, rate 64, bw 64k]
    #[arg(long, value_delimiter = ',', value_name = "BYTES")]
    pub sizes: Vec<String>,
    /// Ways of waiting
    #[arg(long, value_enum, value_delimiter = ',', default_value = "block,spin")]
    pub wait: Vec<Wait>,
    /// Seconds of each single measurement
    #[arg(long, default_value_t = 1.0)]
    pub seconds: f64,
    /// How often each is measured; figures are the medians of the rounds
    #[arg(long, default_value_t = 3)]
    pub rounds: u32,
    /// Cores of server and client [default: the first two allowed]
    #[arg(long, value_name = "A,B")]
    pub cores: Option<String>,
    /// Cores on which the daemons of rdsock-nodes poll, that of the server's node and that of the client's; may be
    /// one [default: the server's and the client's own]
    #[arg(long, value_name = "A,B")]
    pub poll_cores: Option<String>,
    /// The rdsock program [default: beside this program, then in PATH]
    #[arg(long, value_name = "PATH")]
    pub rdsock: Option<PathBuf>,
    /// Check every byte of the payload
    #[arg(long)]
    pub verify: bool,
    /// Leave Nagle's algorithm on
    #[arg(long)]
    pub nagle: bool,
    /// Write all figures to this file (docs/rdsock-perf.md describes it)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw the latency distributions into this file
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

#[derive(Args)]
pub struct FloorFlags {
    /// floor-cacheline or floor-ring
    #[arg(long, value_enum)]
    pub path: Path,
    /// What to measure
    #[arg(long, value_enum, default_value_t = Mode::Rtt)]
    pub mode: Mode,
    /// Bytes of a message
    #[arg(long, default_value = "64", value_name = "BYTES")]
    pub size: String,
    /// Seconds to measure
    #[arg(long, default_value_t = 1.0)]
    pub seconds: f64,
    /// The two cores
    #[arg(long, value_name = "A,B")]
    pub cores: Option<String>,
    /// Print the result as one line of JSON
    #[arg(long)]
    pub json: bool,
}

/// Text of the completions of `shell`.
pub fn completions(shell: clap_complete::Shell) -> Vec<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Flags::command(), "rdsock-perf", &mut text);
    text
}

/// The manual page; with `dir`, writes the page of each subcommand there and returns nothing.
pub fn man(dir: Option<PathBuf>) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    match dir {
        Some(dir) => rdsock_output::fill(&dir, |to| clap_mangen::generate_to(Flags::command(), to))
            .doing(|| format!("write {}", dir.display()))?,
        None => clap_mangen::Man::new(Flags::command())
            .render(&mut text)
            .doing(|| "make the manual page")?,
    }
    Ok(text)
}

/// Writes a text to stdout.
pub fn print(text: &[u8]) -> Result<()> {
    Ok(rdsock_output::bytes(text)?)
}
