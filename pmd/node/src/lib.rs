//! The data path of a node: streams to other nodes, carried by an engine and a mailbox.
//!
//! ```text
//!  control thread ──Command──► poll core ◄──── look ────► anchors' thread
//!  (rdsockd)      ◄──Notice───  (core)                     (anchors)
//!                                 │  rings, by shared memory   │  sockets, by the kernel
//!                                 ▼                            ▼
//!                               device                      programs
//! ```
//!
//! The counterparts are programs (their memory is hostile, see [`stream`]), other nodes (the protocol's
//! state machine, `rdsock-proto`, believes them nothing), and the device (`rdsock-rde`). For a program,
//! the daemon is the other end of its connection: [`stream::NodeStream`] says how.
//!
//! A [`Poller`] is one poll core with its anchors' thread, started by whoever has opened a device.

mod anchors;
mod core;
mod live;
pub mod mail;
pub mod memory;
pub mod stream;

use crate::core::{Core, Inbox, Parts, Reach};
pub use anchors::Attach;
use anchors::{Anchors, Desk};
use mail::{Look, Mail, Waker};
use memory::{Slot, StreamMemory, stream_bytes};
pub use rdsock_model::Fabric;
use rdsock_proto::{Addresses, Config as Limits, Node, NodeId, Refusal, StreamId};
use rdsock_rde::{OpenError, Rde, Rights, Sizes};
use rdsock_vfio::{BusError, EventFd, EventFlags};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use stream::NodeStream;

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
    /// The core to run on; `None` for any.
    pub cpu: Option<usize>,
    /// What to do without work.
    pub idle: Idle,
    /// Most streams.
    pub streams: usize,
    /// Most streams to one node.
    pub streams_per_node: usize,
    /// Bytes of each ring.
    pub ring_size: u64,
    /// How long a connect waits for the other node's answer.
    pub connect_timeout: Duration,
    /// A number that no earlier start of this node had.
    pub epoch: u64,
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
        id: StreamId,
        /// The stream that it becomes.
        stream: Arc<NodeStream>,
    },
    /// Refuse it.
    Refuse {
        /// As in [`Notice::Incoming`].
        id: StreamId,
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
}

/// What the control thread has to know.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Notice {
    /// A node asks for a stream.
    Incoming {
        /// The protocol's id of it.
        id: StreamId,
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
    /// Connects to this node are possible.
    NodeUp {
        /// Which.
        node: u16,
    },
    /// A node has restarted, or did not come back.
    NodeGone {
        /// Which.
        node: u16,
    },
    /// The device is not used any more.
    DeviceFailed,
}

/// A count that another thread may read.
#[derive(Debug, Default)]
pub struct Total(AtomicU64);

impl Total {
    /// Counts one more. Only one thread counts.
    #[inline]
    pub(crate) fn add(&self) {
        let count = self.0.load(Ordering::Relaxed);
        self.0.store(count + 1, Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a poll core has done.
#[derive(Debug, Default)]
pub struct Totals {
    /// Times it slept.
    pub sleeps: Total,
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

/// A running poll core with its anchors' thread. Dropping it ends both; its streams break.
#[derive(Debug)]
pub struct Poller {
    inbox: Arc<Inbox>,
    desk: Arc<Desk>,
    notices: Arc<Mail<Notice>>,
    /// Notices taken while a command waited for room.
    backlog: VecDeque<Notice>,
    windows: HashMap<u16, Places>,
    ring_size: u64,
    threads: Vec<JoinHandle<()>>,
}

/// The window of a node, and the places in it that are free.
#[derive(Debug)]
struct Places {
    window: rdsock_vfio::Window,
    free: Arc<Mutex<Vec<u64>>>,
}

impl Poller {
    /// Starts on queue set 0 of a device, which has joined its fabric. `fabric` is the model to be stepped, when
    /// the device is one in this process. `control` is woken by notices.
    pub fn start(
        rde: Rde,
        fabric: Option<Fabric>,
        settings: Settings,
        control: Arc<Waker>,
    ) -> Result<Self, StartError> {
        let slot = stream_bytes(settings.ring_size);
        let places = settings.streams_per_node;
        let (mut windows, mut reach) = (HashMap::new(), HashMap::new());
        for peer in &settings.peers {
            let window = rde.space().window(slot * places as u64)?;
            let region = rde.register_window(&window, Rights::Write, Some(*peer))?;
            let free = (0..places as u64).rev().map(|place| place * slot).collect();
            let free = Arc::new(Mutex::new(free));
            windows.insert(
                *peer,
                Places {
                    window: window.clone(),
                    free,
                },
            );
            let region = Some(region);
            reach.insert(*peer, Reach { window, region });
        }
        let set = rde.queue_set(0, Sizes::default())?;
        let flags = EventFlags::EFD_CLOEXEC | EventFlags::EFD_NONBLOCK;
        let interrupt = EventFd::from_value_and_flags(0, flags).map_err(io::Error::from)?;
        let interrupt = Arc::new(interrupt);
        rde.space()
            .device()
            .set_interrupt(1, Some(interrupt.clone()))?;

        let nodes = settings.peers.iter().chain([&settings.node]).max();
        let mut limits = Limits::new(nodes.map_or(1, |node| node + 1));
        limits.streams = settings.streams as u32;
        limits.streams_from_node = settings.streams_per_node as u32;
        limits.connect_timeout = settings.connect_timeout.as_nanos() as u64;
        let node = Node::new(
            NodeId(settings.node),
            settings.epoch,
            settings.epoch.rotate_left(17),
            limits,
        );

        let waker = Arc::new(Waker::new()?);
        let inbox = Arc::new(Inbox {
            commands: Mail::new(settings.streams.max(1024), waker.clone()),
            look: Arc::new(Look::new(settings.streams, waker.clone(), 0)),
            stop: AtomicBool::new(false),
            waker,
            totals: Totals::default(),
        });
        let desk = Arc::new(Desk::new(settings.streams)?);
        let notices = Arc::new(Mail::new(4 * settings.streams + 4096, control));
        let anchors = Anchors::new(desk.clone(), inbox.look.clone())?;
        let cpu = match settings.cpu {
            Some(cpu) => Some(find_cpu(cpu)?),
            None => None,
        };
        let ring_size = settings.ring_size;
        let core = Core::new(Parts {
            node,
            rde,
            set,
            fabric,
            interrupt,
            reach,
            inbox: inbox.clone(),
            desk: desk.clone(),
            notices: notices.clone(),
            settings,
        });
        let mut poller = Poller {
            inbox,
            desk,
            notices,
            backlog: VecDeque::new(),
            windows,
            ring_size,
            threads: Vec::new(),
        };
        poller.spawn("rdsock-anchors", move || anchors.run())?;
        poller.spawn("rdsock-poll", move || {
            if let Some(cpu) = cpu
                && !core_affinity::set_for_current(cpu)
            {
                tracing::warn!(
                    cpu = cpu.id,
                    "the poll core can't be pinned; it runs on any"
                );
            }
            core.run();
        })?;
        Ok(poller)
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let builder = std::thread::Builder::new().name(name.into());
        self.threads.push(builder.spawn(run)?);
        Ok(())
    }

    /// Maps the memory of a stream to a node: a memfd of [`stream_bytes`] bytes, sealed against shrinking, with the
    /// header in place. `None` when there are too many already, or there is no such node.
    pub fn stream(
        &self,
        ticket: u64,
        node: u16,
        end: usize,
        file: &impl AsFd,
    ) -> Result<Option<Arc<NodeStream>>, BusError> {
        let Some(places) = self.windows.get(&node) else {
            return Ok(None);
        };
        let Some(slot) = Slot::take(&places.free) else {
            return Ok(None);
        };
        let memory = StreamMemory::new(file, self.ring_size, &places.window, slot)?;
        Ok(Some(Arc::new(NodeStream::new(ticket, node, end, memory))))
    }

    /// Has the poll core do something.
    pub fn command(&mut self, command: Command) {
        let mut command = command;
        while let Err(full) = self.inbox.commands.put(command) {
            command = full;
            // The poll core takes commands only while there is room for its notices.
            self.backlog
                .extend(std::iter::from_fn(|| self.notices.take()));
            std::thread::yield_now();
        }
    }

    /// Gives the daemon's end of a program's connection to the anchors' thread.
    pub fn attach(&self, stream: Arc<NodeStream>, socket: OwnedFd) {
        let mut attach = Attach { stream, socket };
        while let Err(full) = self.desk.attach.put(attach) {
            attach = full;
            std::thread::yield_now();
        }
    }

    /// The next notice.
    pub fn notice(&mut self) -> Option<Notice> {
        self.backlog.pop_front().or_else(|| self.notices.take())
    }

    /// What the poll core has done.
    pub fn totals(&self) -> &Totals {
        &self.inbox.totals
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.inbox.stop.store(true, Ordering::Release);
        self.inbox.waker.wake();
        self.desk.end();
        for thread in self.threads.drain(..) {
            // A panic of the thread was printed by the panic hook.
            let _ = thread.join();
        }
    }
}

fn find_cpu(cpu: usize) -> Result<core_affinity::CoreId, StartError> {
    core_affinity::get_core_ids()
        .into_iter()
        .flatten()
        .find(|core| core.id == cpu)
        .ok_or(StartError::NoCpu(cpu))
}
