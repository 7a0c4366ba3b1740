//! The event loop: what happened, and what is due. Connections are in `connections.rs`, what
//! their messages mean in `tenants.rs`, what announcements lead to in `matching.rs`.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tracing::{error, info, warn};

use crate::args::Args;
use crate::book::Book;
use crate::config::{Config, ConfigError};
use crate::confine::Confinement;
use crate::connections::{Connection, End, Watched, spare_descriptor};
use crate::counters::Counters;
use crate::endpoint::{Endpoint, EndpointError};
use crate::fabric::Control;
use crate::log::Throttle;
use crate::matching::SearchBudget;
use crate::namespaces::Namespaces;
use crate::notify::notify;
use crate::process;
use crate::streams::{HugeSupply, Memory};

const LISTENER: u64 = 0;
const SIGNALS: u64 = 1;
const FABRIC: u64 = 2;
const WANTED_BACK: u64 = 3;
/// And the following.
const ANCHORS: u64 = 4;
/// Numbers of connections are above the words of everything else.
const FIRST_CONNECTION: u64 = 4;

/// What an epoll event is about; in the event's 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    Listener,
    Signals,
    Connection(u64),
    Process(u64),
    /// Notices of the fabric.
    Fabric,
    /// The system wants the fabric's device back.
    WantedBack,
    /// A listener for anchors.
    Anchors(u64),
}

impl Token {
    pub(crate) fn to_word(self) -> u64 {
        match self {
            Token::Listener => LISTENER,
            Token::Signals => SIGNALS,
            Token::Connection(id) => id << 1,
            Token::Process(id) => id << 1 | 1,
            Token::Fabric => FABRIC,
            Token::WantedBack => WANTED_BACK,
            Token::Anchors(listener) => ANCHORS + (listener & 1),
        }
    }

    fn from_word(word: u64) -> Self {
        match word {
            LISTENER => Token::Listener,
            SIGNALS => Token::Signals,
            FABRIC => Token::Fabric,
            WANTED_BACK => Token::WantedBack,
            _ if word >> 1 == ANCHORS >> 1 => Token::Anchors(word - ANCHORS),
            _ if word & 1 == 0 => Token::Connection(word >> 1),
            _ => Token::Process(word >> 1),
        }
    }
}

/// Something to look at later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Due {
    /// A connection must have said who it is.
    Handshake(u64),
    /// A connection's messages may be sent now.
    Send(u64),
    /// A process that has hung up had its time.
    Watch(u64),
    /// Does anybody still hold this stream? Asked for the so-manieth time.
    Stream(u64, u32),
    /// A program must have made the anchor of a stream to another node.
    Anchor(u64),
}

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The control socket.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The fabric.
    #[error("the fabric: {0}")]
    Fabric(#[from] rdsock_node::StartError),
    /// The system said no.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
}

fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> DaemonError {
    move |error| DaemonError::System(what, error.into())
}

/// The daemon.
#[derive(Debug)]
pub struct Daemon {
    args: Args,
    pub(crate) config: Config,
    pub(crate) endpoint: Endpoint,
    pub(crate) epoll: Epoll,
    signals: SignalFd,
    /// Given up for a moment when there are no descriptors left, to turn a caller away.
    pub(crate) spare: Option<OwnedFd>,
    pub(crate) descriptors: u64,
    pub(crate) connections: HashMap<u64, Connection>,
    pub(crate) next_connection: u64,
    /// Processes that have hung up and live on, by their connection.
    pub(crate) watched: HashMap<u64, Watched>,
    /// Tenants with requests left in their queues.
    pub(crate) busy: VecDeque<u64>,
    /// Streams for which a [`Due::Stream`] is set.
    pub(crate) looked_after: HashSet<u64>,
    /// What may be spent on searching `/proc`, by user.
    pub(crate) searches: HashMap<u32, SearchBudget>,
    pub(crate) due: BinaryHeap<Reverse<(Instant, Due)>>,
    pub(crate) book: Book<Memory>,
    pub(crate) next_stream: u64,
    pub(crate) namespaces: Namespaces,
    pub(crate) counters: Counters,
    pub(crate) throttle: Throttle,
    pub(crate) huge: HugeSupply,
    /// The path to other nodes, where one is configured.
    pub(crate) fabric: Option<Control>,
    pub(crate) confinement: Confinement,
    pub(crate) last_use: Instant,
    pub(crate) started: Instant,
}

impl Daemon {
    /// Makes the control socket; nobody is served before [`Daemon::run`].
    pub fn new(args: Args, config: Config) -> Result<Self, DaemonError> {
        let descriptors = process::raise_limits();
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            mask.add(signal);
        }
        mask.thread_block().map_err(system("block signals"))?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(system("signalfd"))?;
        let socket: PathBuf = config
            .socket
            .clone()
            .unwrap_or_else(crate::endpoint::default_socket);
        let endpoint = Endpoint::new(&socket)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(system("epoll"))?;
        let readable = |token: Token| EpollEvent::new(EpollFlags::EPOLLIN, token.to_word());
        epoll
            .add(endpoint.socket(), readable(Token::Listener))
            .and_then(|()| epoll.add(signals.as_fd(), readable(Token::Signals)))
            .map_err(system("epoll"))?;
        let device = config.fabric.as_ref().map(|fabric| &fabric.device);
        let mut confinement = Confinement::begin(config.confine, device.into());
        let fabric = match &config.fabric {
            Some(fabric) => Some(Control::start(fabric, &mut confinement, &epoll)?),
            None => None,
        };
        confinement.filter();
        let now = Instant::now();
        Ok(Daemon {
            args,
            config,
            endpoint,
            epoll,
            signals,
            spare: spare_descriptor(),
            descriptors,
            connections: HashMap::new(),
            next_connection: FIRST_CONNECTION,
            watched: HashMap::new(),
            busy: VecDeque::new(),
            looked_after: HashSet::new(),
            searches: HashMap::new(),
            due: BinaryHeap::new(),
            book: Book::default(),
            next_stream: first_stream(),
            namespaces: Namespaces::new().map_err(system("network namespace"))?,
            counters: Counters::default(),
            throttle: Throttle::default(),
            huge: HugeSupply::default(),
            fabric,
            confinement,
            last_use: now,
            started: now,
        })
    }

    /// Serves until a signal, or until it was idle for long enough.
    pub fn run(mut self) -> Result<(), DaemonError> {
        let path = self.endpoint.path().display().to_string();
        info!(socket = path, pid = std::process::id(), "ready");
        if let Err(error) = notify("READY=1") {
            warn!("can't notify the service manager: {error}");
        }
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let count = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(error) => return Err(system("epoll")(error)),
            };
            for event in events.get(..count).unwrap_or(&[]) {
                if self.on_event(Token::from_word(event.data()), event.events()) {
                    self.stop("signal");
                    return Ok(());
                }
            }
            self.on_due(Instant::now());
            for _ in 0..self.busy.len() {
                if let Some(id) = self.busy.pop_front() {
                    self.serve(id, |daemon| daemon.drain(id));
                }
            }
            if self.idle_for(Instant::now()) == Some(Duration::ZERO) {
                self.stop("idle");
                return Ok(());
            }
        }
    }

    fn stop(&self, why: &str) {
        let _ = notify("STOPPING=1");
        info!(
            why,
            tenants = self.tenants(),
            "ending; streams live on without the daemon"
        );
    }

    /// Sleeps for ever when nothing is due.
    fn timeout(&self) -> EpollTimeout {
        if !self.busy.is_empty() {
            return EpollTimeout::ZERO;
        }
        let now = Instant::now();
        let due = self
            .due
            .peek()
            .map(|Reverse((at, _))| at.saturating_duration_since(now));
        let wait = match (due, self.idle_for(now)) {
            (Some(a), Some(b)) => a.min(b),
            (Some(wait), None) | (None, Some(wait)) => wait,
            (None, None) => return EpollTimeout::NONE,
        };
        // Rounded up, so as not to wake just before.
        let millis = wait.as_nanos().div_ceil(1_000_000).min(3_600_000) as u32;
        EpollTimeout::try_from(millis).unwrap_or(EpollTimeout::NONE)
    }

    /// Time until an idle daemon ends; `None` when it does not.
    fn idle_for(&self, now: Instant) -> Option<Duration> {
        let allowed = self.config.idle_exit_seconds;
        let unused = self.connections.is_empty() && self.watched.is_empty();
        (allowed != 0 && unused).then(|| {
            let end = self.last_use + Duration::from_secs(allowed);
            end.saturating_duration_since(now)
        })
    }

    /// True when the daemon is to end.
    fn on_event(&mut self, token: Token, flags: EpollFlags) -> bool {
        match token {
            Token::Listener => self.accept(),
            Token::Signals => return self.on_signal(),
            Token::Connection(id) => {
                if flags.contains(EpollFlags::EPOLLOUT) {
                    self.serve(id, |daemon| daemon.flush(id));
                }
                self.serve(id, |daemon| daemon.receive(id));
            }
            Token::Fabric => self.on_fabric(),
            Token::WantedBack => self.on_wanted_back(),
            Token::Anchors(listener) => self.on_anchors(listener as usize),
            Token::Process(id) => {
                if let Some(watched) = self.unwatch(id) {
                    for stream in watched.streams {
                        self.check_stream(stream);
                    }
                }
                self.serve(id, |_| Err(End::Exited));
            }
        }
        false
    }

    fn on_signal(&mut self) -> bool {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            if signal.ssi_signo != Signal::SIGHUP as u32 {
                return true;
            }
            self.reload();
        }
        false
    }

    fn reload(&mut self) {
        match self.args.config() {
            Ok(mut config) => {
                let socket = self.config.socket.clone();
                if config.socket != socket || config.log_level != self.config.log_level {
                    warn!("socket and logging change with a restart only");
                }
                if config.confine != self.config.confine {
                    warn!("confine changes with a restart only");
                }
                config.socket = socket;
                self.reload_fabric(&mut config);
                self.config = config;
                self.tell_all_routes();
                info!("configuration read again; it counts for what comes from now on");
            }
            Err(error) => error!("the configuration stays as it was: {error}"),
        }
    }

    fn on_due(&mut self, now: Instant) {
        while let Some(Reverse((at, due))) = self.due.peek().copied() {
            if at > now {
                return;
            }
            self.due.pop();
            match due {
                Due::Handshake(id) => self.serve(id, |daemon| daemon.on_handshake_due(id)),
                Due::Send(id) => self.serve(id, |daemon| daemon.retry(id)),
                Due::Watch(id) => self.on_watch_due(id),
                Due::Stream(id, times) => self.look_again(id, times),
                Due::Anchor(ticket) => self.on_anchor_due(ticket),
            }
        }
    }
}

/// A first stream number that a daemon before this one has not used lately, so that a tenant's
/// old streams are not taken for new ones.
fn first_stream() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs() % 100_000) * 1_000_000 + 1
}
