//! From flags to a checked plan: after this, nothing can turn out to be nonsense.

mod cells;
mod cores;
mod kinds;

pub use cells::Cell;
pub use cores::Cores;
pub use kinds::{Mode, Path, Wait};

use crate::address::Address;
use crate::cli::{self, ClientFlags, Command, CompareFlags, Flags, FloorFlags, ServerFlags};
use crate::core_pin;
use crate::error::{Doing, Error, Result};
use cells::{cells, parse_size};
use clap::ValueEnum;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

/// Most bytes of one write of rdsock-engine-perf.
const LARGEST_TRANSFER: u64 = 1 << 20;

/// What this process is to do.
pub enum Plan {
    /// Answer clients.
    Server(ServerPlan),
    /// Measure against a server.
    Client(ClientPlan),
    /// Measure all paths.
    Compare(ComparePlan),
    /// Measure the hardware.
    Floor(FloorPlan),
    /// Print a text.
    Text(Vec<u8>),
}

/// A checked `server`.
pub struct ServerPlan {
    pub address: Address,
    /// Overrides the client's wish.
    pub wait: Option<Wait>,
    pub once: bool,
    pub core: Option<usize>,
    pub json: bool,
}

/// A checked `client`.
pub struct ClientPlan {
    pub address: Address,
    pub mode: Mode,
    pub wait: Wait,
    /// Bytes of a message.
    pub size: usize,
    pub seconds: Duration,
    pub warmup: Duration,
    /// Messages each second, in the open loop.
    pub rate_limit: Option<f64>,
    pub verify: bool,
    pub nagle: bool,
    pub core: Option<usize>,
    /// Seconds until SIGALRM.
    pub timeout: Option<u32>,
    pub json: bool,
    pub control: bool,
}

/// A checked `compare`.
pub struct ComparePlan {
    /// Modes and message sizes, in the order of the table.
    pub cells: Vec<Cell>,
    pub paths: Vec<Path>,
    /// Whether the user named the paths: then none may be left out in silence.
    pub paths_named: bool,
    pub waits: Vec<Wait>,
    /// Of each single measurement.
    pub seconds: f64,
    pub rounds: u32,
    pub cores: Cores,
    /// Where the daemons of the path rdsock-nodes poll: that of the server's node, and that of the client's.
    pub poll_cores: Cores,
    pub rdsock: Option<PathBuf>,
    pub verify: bool,
    pub nagle: bool,
    pub json: Option<PathBuf>,
    pub svg: Option<PathBuf>,
}

/// A checked `floor`.
pub struct FloorPlan {
    pub path: Path,
    pub mode: Mode,
    /// Bytes of a message.
    pub size: usize,
    pub seconds: Duration,
    pub cores: Cores,
    pub json: bool,
}

impl Plan {
    /// Checks the flags. Resolves host names; changes nothing.
    pub fn check(flags: Flags) -> Result<Self> {
        Ok(match flags.command {
            Command::Server(flags) => Self::Server(ServerPlan::check(flags)),
            Command::Client(flags) => Self::Client(ClientPlan::check(flags)?),
            Command::Compare(flags) => {
                Self::Compare(ComparePlan::check(flags, &core_pin::allowed())?)
            }
            Command::Floor(flags) => Self::Floor(FloorPlan::check(flags, &core_pin::allowed())?),
            Command::Completions { shell } => Self::Text(cli::completions(shell)),
            Command::Man { dir } => Self::Text(cli::man(dir)?),
        })
    }
}

impl ServerPlan {
    fn check(flags: ServerFlags) -> Self {
        Self {
            address: flags.unix.map_or(
                Address::Tcp(SocketAddr::new(flags.bind, flags.port)),
                Address::Unix,
            ),
            wait: flags.wait,
            once: flags.once,
            core: flags.core,
            json: flags.json,
        }
    }
}

impl ClientPlan {
    fn check(flags: ClientFlags) -> Result<Self> {
        let address = match flags.unix {
            Some(name) => Address::Unix(name),
            None => Address::Tcp(resolve(&flags.server)?),
        };
        let default_size = if flags.mode == Mode::Bw { "64k" } else { "64" };
        let seconds = duration("--seconds", flags.seconds)?;
        let warmup = match flags.warmup {
            Some(0.0) => Duration::ZERO,
            Some(warmup) => duration("--warmup", warmup)?,
            None => (seconds / 10).min(Duration::from_secs(1)),
        };
        if let Some(limit) = flags.rate_limit {
            if !(limit > 0.0 && limit <= 1e8) {
                return Err(Error::Usage(format!(
                    "--rate-limit is {limit}; it must be above 0 and at most 100 000 000"
                )));
            }
            if flags.mode == Mode::Cps {
                return Err(Error::Usage(
                    "--rate-limit has no meaning in mode cps".into(),
                ));
            }
        }
        Ok(Self {
            address,
            mode: flags.mode,
            wait: flags.wait,
            size: parse_size(flags.size.as_deref().unwrap_or(default_size))? as usize,
            seconds,
            warmup,
            rate_limit: flags.rate_limit,
            verify: flags.verify,
            nagle: flags.nagle,
            core: flags.core,
            timeout: flags.timeout,
            json: flags.json || flags.control,
            control: flags.control,
        })
    }
}

impl ComparePlan {
    fn check(flags: CompareFlags, allowed: &[usize]) -> Result<Self> {
        duration("--seconds", flags.seconds)?;
        if flags.rounds == 0 {
            return Err(Error::Usage("--rounds must be at least 1".into()));
        }
        let sizes = flags
            .sizes
            .iter()
            .map(|size| parse_size(size))
            .collect::<Result<Vec<_>>>()?;
        let mut paths = if flags.paths.is_empty() {
            Path::value_variants().to_vec()
        } else {
            flags.paths.clone()
        };
        let cores = Cores::choose(flags.cores.as_deref(), allowed)?;
        let poll_cores = match &flags.poll_cores {
            Some(named) => Cores::named("--poll-cores", named, allowed)?,
            None => cores,
        };
        let mut waits = flags.wait;
        paths.sort_unstable();
        paths.dedup();
        waits.sort_unstable();
        waits.dedup();
        Ok(Self {
            cells: cells(&flags.only, &sizes),
            paths,
            paths_named: !flags.paths.is_empty(),
            waits,
            seconds: flags.seconds,
            rounds: flags.rounds,
            cores,
            poll_cores,
            rdsock: flags.rdsock,
            verify: flags.verify,
            nagle: flags.nagle,
            json: flags.json,
            svg: flags.svg,
        })
    }

    /// The ways of waiting in which `path` is measured in `cell`; empty where it has no meaning there.
    pub fn waits_of(&self, path: Path, cell: Cell) -> Vec<Wait> {
        let first_rtt = self.cells.iter().find(|cell| cell.mode == Mode::Rtt);
        match path {
            // A line has one size: measured once, not for each message size.
            Path::FloorCacheline if first_rtt == Some(&cell) => vec![Wait::Spin],
            Path::FloorCacheline => vec![],
            Path::FloorRing if cell.mode == Mode::Cps => vec![],
            Path::FloorRing => vec![Wait::Spin],
            Path::FloorEngine => match cell.mode {
                Mode::Rtt | Mode::Bw if cell.size <= LARGEST_TRANSFER => vec![Wait::Spin],
                _ => vec![],
            },
            Path::RdsockAdaptive if cell.mode != Mode::Rtt && !self.paths_named => vec![],
            Path::RdsockAdaptive => vec![Wait::Block],
            _ => self.waits.clone(),
        }
    }
}

impl FloorPlan {
    fn check(flags: FloorFlags, allowed: &[usize]) -> Result<Self> {
        match (flags.path, flags.mode) {
            (Path::FloorCacheline, Mode::Rtt)
            | (Path::FloorRing, Mode::Rtt | Mode::Rate | Mode::Bw) => {}
            (path, mode) => {
                return Err(Error::Usage(format!(
                    "there is no floor for {path} in mode {mode}"
                )));
            }
        }
        Ok(Self {
            path: flags.path,
            mode: flags.mode,
            size: parse_size(&flags.size)? as usize,
            seconds: duration("--seconds", flags.seconds)?,
            cores: Cores::choose(flags.cores.as_deref(), allowed)?,
            json: flags.json,
        })
    }
}

/// A time of at most one day.
fn duration(flag: &str, seconds: f64) -> Result<Duration> {
    if seconds > 0.0 && seconds <= 86_400.0 {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(Error::Usage(format!(
            "{flag} is {seconds}; it must be above 0 and at most 86400"
        )))
    }
}

/// The first address of HOST:PORT.
fn resolve(server: &str) -> Result<SocketAddr> {
    server
        .to_socket_addrs()
        .doing(|| format!("look up {server}"))?
        .next()
        .ok_or_else(|| Error::Usage(format!("{server} has no address")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, Parser};

    fn compare(arguments: &[&str]) -> Result<ComparePlan> {
        let all = ["rdsock-perf", "compare"].iter().chain(arguments);
        match Flags::try_parse_from(all)
            .map_err(|error| Error::Usage(error.to_string()))?
            .command
        {
            Command::Compare(flags) => ComparePlan::check(flags, &[0, 1, 2]),
            _ => unreachable!(),
        }
    }

    fn client(arguments: &[&str]) -> Result<ClientPlan> {
        let all = ["rdsock-perf", "client"].iter().chain(arguments);
        match Flags::try_parse_from(all)
            .map_err(|error| Error::Usage(error.to_string()))?
            .command
        {
            Command::Client(flags) => ClientPlan::check(flags),
            _ => unreachable!(),
        }
    }

    #[test]
    fn flags_are_well_formed() {
        Flags::command().debug_assert();
    }

    #[test]
    fn compare_defaults() {
        let plan = compare(&[]).unwrap();
        assert_eq!(
            plan.cores,
            Cores {
                server: 0,
                client: 1
            }
        );
        assert_eq!(plan.paths.len(), 9);
        assert_eq!(plan.poll_cores, plan.cores);
        assert!(!plan.paths_named);
        let rtt = plan.cells[0];
        let rate = plan.cells[1];
        assert_eq!(plan.waits_of(Path::FloorCacheline, rtt), [Wait::Spin]);
        assert!(plan.waits_of(Path::FloorCacheline, rate).is_empty());
        assert_eq!(plan.waits_of(Path::RdsockAdaptive, rtt), [Wait::Block]);
        assert!(plan.waits_of(Path::RdsockAdaptive, rate).is_empty());
        assert_eq!(plan.waits_of(Path::Unix, rate), [Wait::Block, Wait::Spin]);
        assert_eq!(plan.waits_of(Path::FloorEngine, rtt), [Wait::Spin]);
        assert!(plan.waits_of(Path::FloorEngine, rate).is_empty());
        let nodes = plan.waits_of(Path::RdsockNodes, rate);
        assert_eq!(nodes, [Wait::Block, Wait::Spin]);
    }

    #[test]
    fn poll_cores_may_be_one() {
        let plan = compare(&["--poll-cores", "2,2"]).unwrap();
        assert_eq!((plan.poll_cores.server, plan.poll_cores.client), (2, 2));
        for wrong in ["2", "2,9", "a"] {
            assert!(compare(&["--poll-cores", wrong]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_named_path_is_measured_in_every_mode() {
        let plan = compare(&["--paths", "rdsock-adaptive,unix", "--only", "bw"]).unwrap();
        assert_eq!(plan.paths, [Path::Unix, Path::RdsockAdaptive]);
        assert_eq!(
            plan.waits_of(Path::RdsockAdaptive, plan.cells[0]),
            [Wait::Block]
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for wrong in [
            &["--seconds", "0"][..],
            &["--seconds", "nan"],
            &["--rounds", "0"],
            &["--cores", "1,1"],
            &["--cores", "0,9"],
            &["--cores", "0"],
            &["--cores", "0,1,2"],
            &["--cores", "a,b"],
            &["--sizes", "0"],
            &["--only", "latency"],
            &["--paths", "tcp"],
        ] {
            assert!(compare(wrong).is_err(), "{wrong:?}");
        }
        assert!(client(&["--rate-limit", "0"]).is_err());
        assert!(client(&["--rate-limit", "5", "--mode", "cps"]).is_err());
        assert!(client(&["no-port"]).is_err());
    }

    #[test]
    fn a_client_warms_up_for_a_tenth() {
        let plan = client(&["--seconds", "2", "--mode", "bw"]).unwrap();
        assert_eq!(plan.warmup, Duration::from_millis(200));
        assert_eq!(plan.size, 65536);
        assert_eq!(
            client(&["--seconds", "60"]).unwrap().warmup,
            Duration::from_secs(1)
        );
        assert_eq!(client(&["--warmup", "0"]).unwrap().warmup, Duration::ZERO);
    }
}
