//! The data path of a node: streams to other nodes, carried by an engine and a mailbox.
//!
//! ```text
//!  control thread ──Command──► poll core ◄──── look ────► anchors' thread
//!  (rdsockd)      ◄──Notice───  (core)                     (anchors)       × poll cores
//!                                 │  rings, by shared memory   │  sockets, by the kernel
//!                                 ▼                            ▼
//!                               device                      programs
//! ```
//!
//! The counterparts are programs (their memory is hostile, see [`stream`]), other nodes (the protocol's
//! state machine, `rdsock-proto`, believes them nothing), and the device (`rdsock-rde`). For a program,
//! the daemon is the other end of its connection: [`stream::NodeStream`] says how.
//!
//! A [`Poller`] is the poll cores of a node, each with an anchors' thread for each user who has streams there, started by
//! whoever has opened a device. Core *k* uses queue set *k*, and talks to cores *k* of the other nodes; a stream stays on the core that
//! it was opened on. Nodes may have different numbers of cores: those that both have are used.

mod anchors;
mod core;
mod desk;
mod live;
pub mod mail;
pub mod memory;
mod socket;
mod stages;
mod station;
pub mod stream;
mod totals;

pub use desk::{DESCRIPTORS, Paid};
use live::PIECES;
use mail::Waker;
use memory::{Slot, StreamMemory, stream_bytes};
pub use rdsock_model::Fabric;
use rdsock_proto::{Addresses, Refusal, StreamId};
use rdsock_rde::{OpenError, Rde};
use rdsock_vfio::{BusError, Window};
pub use stages::Stage;
use station::{Shared, Station};
use std::any::Any;
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
pub use stream::Berth;
use stream::NodeStream;
pub use totals::{Total, Totals};

/// What a poll core does without work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// Spins for ever.
    Busy,
    /// Gives way to other threads, and after this time sleeps until there is work.
    Adaptive {
        /// Time without work.
        spin: Duration,
    },
}

/// How a node is set up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This node's id, 1 to 1023.
    pub node: u16,
    /// The other nodes' ids.
    pub peers: Vec<u16>,
    /// The poll cores: for each, the core of the machine that it runs on; `None` for any.
    pub cores: Vec<Option<usize>>,
    /// What to do without work.
    pub idle: Idle,
    /// Most streams.
    pub streams: usize,
    /// Most streams to one node. Of those that a node has opened itself, it gets no more than its
    /// share of `streams` either, so that no node takes the others' places.
    pub streams_per_node: usize,
    /// Bytes of each ring.
    pub ring_size: u64,
    /// How long a connect waits for the other node's answer.
    pub connect_timeout: Duration,
    /// How long streams wait for a node that does not answer any more, before they end.
    pub resume_timeout: Duration,
    /// A number that no earlier start of this node had.
    pub epoch: u64,
}

impl Settings {
    /// Streams that each poll core of this node may have at one of another node, of those that it asked for: that one's core of the same number
    /// reckons in the same way.
    pub fn streams_at_node(&self) -> usize {
        let share = self.streams / self.peers.len().max(1);
        self.streams_per_node.min(share.max(1))
    }
}

/// A stream that a node asks for, until it is accepted or refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    core: u16,
    id: StreamId,
}

/// How a stream comes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// A program of this node connects.
    Connect,
    /// A node asks for it.
    Accept(Asked),
}

/// What the control thread wants done.
#[derive(Debug)]
pub enum Command {
    /// Ask the stream's node for it.
    Connect {
        /// The stream.
        stream: Arc<NodeStream>,
        /// From where to where.
        addresses: Addresses,
    },
    /// Accept what a node asked for.
    Accept {
        /// As in [`Notice::Incoming`].
        id: Asked,
        /// The stream that it becomes.
        stream: Arc<NodeStream>,
    },
    /// Refuse it.
    Refuse {
        /// As in [`Notice::Incoming`].
        id: Asked,
        /// Why.
        why: Refusal,
    },
    /// No program has it any more.
    Gone {
        /// The stream.
        stream: Arc<NodeStream>,
    },
    /// Its program has mapped it.
    Ready {
        /// The stream.
        stream: Arc<NodeStream>,
    },
    /// The system wants the device back: do not use it any more, as if it had failed.
    GiveBack,
}

/// What the control thread has to know.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Notice {
    /// A node asks for a stream.
    Incoming {
        /// What it is called until it is accepted or refused.
        id: Asked,
        /// Who asks.
        node: u16,
        /// From where to where.
        addresses: Addresses,
    },
    /// The other node has accepted.
    Established {
        /// The stream.
        ticket: u64,
    },
    /// The other node has not accepted, or did not answer.
    Refused {
        /// The stream.
        ticket: u64,
        /// Why.
        why: Refusal,
    },
    /// Nothing touches the stream's memory any more.
    Released {
        /// The stream.
        ticket: u64,
    },
    /// Connects to this node are possible, on one poll core at least.
    NodeUp {
        /// Which.
        node: u16,
    },
    /// A node has restarted, or did not come back, on any poll core.
    NodeGone {
        /// Which.
        node: u16,
    },
    /// The device is not used any more, by any poll core.
    DeviceFailed,
    /// Something has changed for one poll core, and nothing for the node.
    NoNews,
}

/// Why a node does not run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The device.
    #[error("the device can't be used: {0}")]
    Device(#[from] OpenError),
    /// Its bus.
    #[error("the device can't be reached: {0}")]
    Bus(#[from] BusError),
    /// The models of other nodes.
    #[error("can't meet the other nodes' models: {0}")]
    Link(#[from] rdsock_vfio::link::LinkError),
    /// The system said no.
    #[error("can't start a thread of the node: {0}")]
    System(#[from] io::Error),
    /// The device has too few interrupt vectors.
    #[error(
        "the device has {vectors} interrupt vectors, {cores} poll cores need one more than they are"
    )]
    Vectors {
        /// Of the device.
        vectors: u32,
        /// Wanted.
        cores: usize,
    },
    /// A write of a stream is of more pieces.
    #[error(
        "the device moves {pieces} pieces of memory at once, and a stream needs {PIECES}: it can't be used"
    )]
    Pieces {
        /// Of the device.
        pieces: u8,
    },
    /// The device belongs to another node, or (0) to none.
    #[error(
        "the device has the node id {found}, `node` in the configuration says {configured}: change that, or the device's \
         (whoever keeps its management page, the kernel module say, has set it)"
    )]
    OtherNode {
        /// The device's id.
        found: u32,
        /// The configuration's.
        configured: u16,
    },
    /// The core cannot be used.
    #[error("there is no core {0} for a poll core (see taskset, and the unit's AllowedCPUs)")]
    NoCpu(usize),
}

/// The running poll cores of a node. Dropping it ends them; their streams break.
#[derive(Debug)]
pub struct Poller {
    stations: Vec<Station>,
    /// Where the search for a core for the next connect begins.
    turn: usize,
    /// Where the search for the next notice begins.
    heard: usize,
    /// The cores that have told that a node is up.
    up: HashMap<u16, HashSet<usize>>,
    /// Cores that do not use the device any more.
    failed: HashSet<usize>,
    backlog: VecDeque<Notice>,
    windows: HashMap<u16, Places>,
    /// Most streams.
    streams: usize,
    ring_size: u64,
}

/// The window of a node, and the places in it that are free.
#[derive(Debug)]
struct Places {
    window: Window,
    free: Arc<Mutex<Vec<u64>>>,
}

impl Poller {
    /// Starts on the first queue sets of a device, which has joined its fabric. `fabric` is the model to be stepped,
    /// when the device is one in this process. `control` is woken by notices.
    pub fn start(
        rde: Rde,
        fabric: Option<Fabric>,
        settings: Settings,
        control: Arc<Waker>,
    ) -> Result<Self, StartError> {
        let (vectors, cores) = (rde.space().device().vectors(), settings.cores.len());
        if (vectors as usize) < 1 + cores {
            return Err(StartError::Vectors { vectors, cores });
        }
        let pieces = rde.capabilities().max_pieces;
        if usize::from(pieces) < PIECES {
            return Err(StartError::Pieces { pieces });
        }
        let slot = stream_bytes(settings.ring_size);
        let places = settings.streams_per_node as u64;
        let mut windows = HashMap::new();
        for peer in &settings.peers {
            windows.insert(*peer, rde.space().window(slot * places)?);
        }
        let (streams, ring_size) = (settings.streams, settings.ring_size);
        let shared = Shared {
            rde: Arc::new(rde),
            fabric,
            windows,
            settings,
            control,
            working: Arc::new(AtomicUsize::new(cores)),
            start: Instant::now(),
        };
        let stations = (0..cores).map(|number| Station::start(&shared, number as u16));
        let stations = stations.collect::<Result<_, _>>()?;
        let places = |window| Places {
            window,
            free: Arc::new(Mutex::new(
                (0..places).rev().map(|place| place * slot).collect(),
            )),
        };
        let windows = shared.windows.into_iter();
        Ok(Poller {
            stations,
            turn: 0,
            heard: 0,
            up: HashMap::new(),
            failed: HashSet::new(),
            backlog: VecDeque::new(),
            windows: windows
                .map(|(peer, window)| (peer, places(window)))
                .collect(),
            streams,
            ring_size,
        })
    }

    /// Finds a place for a user's stream to a node: a poll core, and a thread there that serves this user's anchors. Where one
    /// has to be started, it is paid for first: with [`DESCRIPTORS`], held for as long as it has them.
    pub fn berth<P, E>(
        &mut self,
        node: u16,
        opening: Opening,
        user: u32,
        pay: impl FnOnce() -> Result<P, E>,
    ) -> Result<Option<Berth>, E>
    where
        P: Any + Send + Sync,
        E: From<io::Error>,
    {
        let core = match opening {
            Opening::Connect => self.choose(node),
            Opening::Accept(asked) => asked.core.into(),
        };
        let Some(station) = self.stations.get_mut(core) else {
            return Ok(None);
        };
        let seat = match station.seat(user) {
            Some(seat) => seat,
            None => station.open_desk(user, Box::new(pay()?))?,
        };
        let load = station.load.clone();
        let core = core as u16;
        Ok(Some(Berth { core, load, seat }))
    }

    /// Maps the memory of a stream to a node: a memfd of [`stream_bytes`] bytes, sealed against shrinking, with the
    /// header in place. What pays for it is held until its anchor is closed and nobody refers to the stream. `None` when there are too
    /// many already, or there is no such node.
    pub fn stream(
        &mut self,
        ticket: u64,
        node: u16,
        opening: Opening,
        berth: Berth,
        file: &impl AsFd,
        paid: Paid,
    ) -> Result<Option<Arc<NodeStream>>, BusError> {
        let end = match opening {
            Opening::Connect => 0,
            Opening::Accept(_) => 1,
        };
        let Some(places) = self.windows.get(&node) else {
            return Ok(None);
        };
        // The queues between the threads have room for so many. (This one has been counted.)
        if self.stations.iter().map(Station::streams).sum::<usize>() > self.streams {
            return Ok(None);
        }
        let Some(slot) = Slot::take(&places.free) else {
            return Ok(None);
        };
        let memory = StreamMemory::new(file, self.ring_size, end, &places.window, slot)?;
        let stream = NodeStream::new(ticket, node, end, berth, memory, paid);
        Ok(Some(Arc::new(stream)))
    }

    /// The core with the fewest streams of those on which a node is up; in turn, when several have as few.
    fn choose(&mut self, node: u16) -> usize {
        let count = self.stations.len();
        self.turn = (self.turn + 1) % count.max(1);
        let in_turn = (0..count).map(|at| (self.turn + at) % count);
        in_turn
            .min_by_key(|at| {
                let station = &self.stations[*at];
                (!station.totals().is_up(node), station.streams())
            })
            .unwrap_or(0)
    }

    /// Has a poll core do something, or all of them, if it is about the device.
    pub fn command(&mut self, command: Command) {
        let core = match &command {
            Command::GiveBack => {
                for station in &mut self.stations {
                    station.command(Command::GiveBack);
                }
                return;
            }
            Command::Accept { id, .. } | Command::Refuse { id, .. } => id.core,
            Command::Connect { stream, .. }
            | Command::Gone { stream }
            | Command::Ready { stream } => stream.core,
        };
        if let Some(station) = self.stations.get_mut(usize::from(core)) {
            station.command(command);
        }
    }

    /// Gives the daemon's end of a program's connection to the anchors' thread of its user.
    pub fn attach(&self, stream: &Arc<NodeStream>, socket: OwnedFd) {
        stream.attach(socket);
    }

    /// The next notice. The cores take turns: one that has many keeps those of no other one waiting.
    pub fn notice(&mut self) -> Option<Notice> {
        let earlier = self.backlog.pop_front();
        earlier.or_else(|| {
            let count = self.stations.len();
            let mut in_turn = (0..count).map(|at| (self.heard + at) % count);
            let (core, notice) =
                in_turn.find_map(|core| Some((core, self.stations[core].notice()?)))?;
            self.heard = core + 1;
            match notice {
                Notice::NodeUp { node } => self.on_up(core, node),
                Notice::NodeGone { node } => self.on_gone(core, node),
                Notice::DeviceFailed => self.on_failed(core),
                other => return Some(other),
            }
            // One at a time, also of those that are no news: they may come without end.
            Some(self.backlog.pop_front().unwrap_or(Notice::NoNews))
        })
    }

    fn on_up(&mut self, core: usize, node: u16) {
        let cores = self.up.entry(node).or_default();
        if cores.is_empty() {
            self.backlog.push_back(Notice::NodeUp { node });
        }
        cores.insert(core);
    }

    fn on_gone(&mut self, core: usize, node: u16) {
        let cores = self.up.entry(node).or_default();
        cores.remove(&core);
        if cores.is_empty() {
            self.backlog.push_back(Notice::NodeGone { node });
        }
    }

    fn on_failed(&mut self, core: usize) {
        self.failed.insert(core);
        if self.failed.len() == self.stations.len() {
            self.backlog.push_back(Notice::DeviceFailed);
        }
        let up = self.up.iter().filter(|(_, cores)| cores.contains(&core));
        let nodes: Vec<u16> = up.map(|(node, _)| *node).collect();
        for node in nodes {
            self.on_gone(core, node);
        }
    }

    /// Whether connects to a node are possible now, on one poll core at least.
    pub fn is_up(&self, node: u16) -> bool {
        self.cores().any(|totals| totals.is_up(node))
    }

    /// What the poll cores have done.
    pub fn cores(&self) -> impl Iterator<Item = &Totals> {
        self.stations.iter().map(Station::totals)
    }

    /// Streams of a poll core.
    pub fn streams_of(&self, core: usize) -> usize {
        self.stations.get(core).map_or(0, Station::streams)
    }
}
