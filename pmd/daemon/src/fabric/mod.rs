//! Connections to programs of other nodes: what the control thread does for them. The data path is
//! `rdsock-node`; here is who may use it, and the sockets of both sides.
//!
//! A program that connects to an address of another node asks first (REACH): `connect.rs`. When a
//! node asks for a stream, the daemon connects to the program that listens: `listen.rs`. On either
//! side the daemon is then the other end of the program's connection, and the program's end is
//! promoted as any other: `promote.rs`.

mod config;
mod connect;
mod device;
mod listen;
mod promote;
mod routes;

pub use config::{Device, FabricConfig, NodeConfig};

use crate::book::{Route, TenantId};
use crate::confine::Confinement;
use crate::daemon::{Daemon, Due, Token};
use crate::memory::StreamFds;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use rdsock_node::mail::Waker;
use rdsock_node::stream::NodeStream;
use rdsock_node::{Command, Notice, Opening, Poller, Settings, Stage, StartError, Totals};
use rdsock_proto::{Addresses, Count};
use rdsock_rde::Management;
use rdsock_rde::spec::counter;
use rdsock_shm::control::Between;
use rdsock_shm::layout::BellBoard;
use rdsock_vfio::{EventFd, EventFlags};
use serde_json::{Map, Value, json};
use std::cmp::Reverse;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tracing::{info, warn};

/// Time for a program to make its anchor, once it was told where.
const ANCHOR: Duration = Duration::from_secs(10);

/// How long the streams of a node that does not answer any more wait for it.
const RESUME: Duration = Duration::from_secs(30);

/// A stream to another node.
#[derive(Debug)]
pub(crate) struct Carried {
    pub stream: Arc<NodeStream>,
    /// Its memory and end pages, until the program's end was promoted.
    fds: Option<StreamFds>,
    /// A program has it mapped, or had.
    mapped: bool,
    /// From where to where, as the programs see it.
    source: SocketAddr,
    destination: SocketAddr,
    /// The addresses of the anchor, as the program's socket has them.
    anchor: Option<(SocketAddr, SocketAddr)>,
    /// The socket's cookie and inode, of the daemon's end.
    socket: Option<(u64, u64)>,
}

/// A program that waits for the answer to a REACH.
#[derive(Debug)]
struct Asking {
    tenant: TenantId,
    question: Between,
}

/// A socket that a program listens on.
#[derive(Clone, Copy, Debug)]
struct Listening {
    tenant: TenantId,
    fd: i32,
    address: SocketAddr,
}

/// The fabric, as the control thread has it.
#[derive(Debug)]
pub(crate) struct Control {
    poller: Poller,
    /// Where the device says what it has refused.
    management: Management,
    waker: Arc<Waker>,
    /// Signalled when the system wants the device back.
    wanted_back: Arc<EventFd>,
    /// It is being given back.
    giving_back: bool,
    /// Where programs make their anchors: on either loopback address.
    listeners: Vec<TcpListener>,
    /// Handed out in place of a peer's bell board; nobody looks at it.
    board: Rc<OwnedFd>,
    carried: HashMap<u64, Carried>,
    asking: HashMap<u64, Asking>,
    /// Streams by the address that their program's anchor comes from.
    expected: HashMap<SocketAddr, u64>,
    /// Streams by the address that the daemon has connected from.
    callers: HashMap<SocketAddr, u64>,
    /// By the sockets' cookies: several processes may hold one.
    listening: HashMap<u64, Vec<Listening>>,
    failed: bool,
}

impl Control {
    /// Opens the device and starts the poll core.
    pub fn start(
        config: &FabricConfig,
        confinement: &mut Confinement,
        epoll: &Epoll,
    ) -> Result<Self, StartError> {
        let (rde, fabric) = device::open(config)?;
        confinement.device_is_open();
        let waker = Arc::new(Waker::new()?);
        let cores = match config.poll_cores.as_slice() {
            [] => vec![None],
            cores => cores.iter().copied().map(Some).collect(),
        };
        let settings = Settings {
            node: config.node,
            peers: config.others().map(|node| node.id).collect(),
            cores,
            idle: config.idle,
            streams: config.max_streams,
            streams_per_node: config.max_streams,
            ring_size: config.ring_size,
            connect_timeout: config.connect_timeout,
            resume_timeout: RESUME,
            epoch: epoch(),
        };
        let mut listeners = Vec::new();
        for address in [
            IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(Ipv6Addr::LOCALHOST),
        ] {
            match listen_on(address) {
                Ok(listener) => listeners.push(listener),
                Err(error) if address.is_ipv6() => {
                    warn!("no IPv6 to other nodes: can't listen on ::1: {error}");
                }
                Err(error) => return Err(error.into()),
            }
        }
        let event = |token: Token| EpollEvent::new(EpollFlags::EPOLLIN, token.to_word());
        for (at, listener) in listeners.iter().enumerate() {
            let token = Token::Anchors(at as u64);
            epoll.add(listener, event(token)).map_err(io::Error::from)?;
        }
        epoll
            .add(waker.fd(), event(Token::Fabric))
            .map_err(io::Error::from)?;
        let flags = EventFlags::EFD_CLOEXEC | EventFlags::EFD_NONBLOCK;
        let wanted_back = EventFd::from_flags(flags).map_err(io::Error::from)?;
        let wanted_back = Arc::new(wanted_back);
        rde.space().device().set_wanted_back(&wanted_back)?;
        epoll
            .add(&*wanted_back, event(Token::WantedBack))
            .map_err(io::Error::from)?;
        let management = rde.management();
        // Before there can be a notice: each is to be seen by epoll.
        waker.start_sleep();
        let poller = Poller::start(rde, fabric, settings, waker.clone())?;
        info!(
            node = config.node,
            device = %config.device,
            others = config.others().count(),
            "joined the fabric"
        );
        Ok(Control {
            poller,
            management,
            waker,
            wanted_back,
            giving_back: false,
            listeners,
            board: Rc::new(crate::memory::make_board(size_of::<BellBoard>() as u64)?),
            carried: HashMap::new(),
            asking: HashMap::new(),
            expected: HashMap::new(),
            callers: HashMap::new(),
            listening: HashMap::new(),
            failed: false,
        })
    }
}

fn listen_on(address: IpAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind((address, 0))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A number that no earlier start had, in all likelihood.
fn epoch() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(1, |since| since.as_nanos() as u64).max(1)
}

impl Control {
    /// For `rdsock stat`.
    fn answer(&self, config: &FabricConfig) -> Value {
        let nodes: Vec<Value> = config
            .others()
            .map(|node| {
                let streams = self.carried.values();
                let violations = Count::ALL.iter().map(|count| {
                    let cores = self.poller.cores();
                    let seen: u64 = cores.map(|core| core.violations(node.id, *count)).sum();
                    (count.name().to_owned(), Value::from(seen))
                });
                json!({
                    "id": node.id,
                    "name": node.name,
                    "addresses": node.addresses,
                    "up": self.poller.is_up(node.id),
                    "streams": streams.filter(|carried| carried.stream.node == node.id).count(),
                    "violations": violations.collect::<Map<String, Value>>(),
                })
            })
            .collect();
        json!({
            "node": config.node,
            "device": config.device.to_string(),
            "failed": self.failed,
            "refused_here": self.management.counter(counter::REFUSED_HERE),
            "refused_there": self.management.counter(counter::REFUSED_THERE),
            "streams": self.carried.len(),
            "listeners": self.listening.len(),
            "cores": self.cores_answer(config),
            "nodes": nodes,
        })
    }
}

impl Control {
    /// The poll cores, for `rdsock stat`.
    fn cores_answer(&self, config: &FabricConfig) -> Vec<Value> {
        let core = |(number, totals): (usize, &Totals)| {
            let up = config.others().map(|node| node.id);
            let stages = Stage::ALL.iter();
            let stages = stages.map(|stage| (stage.name().into(), totals.stage(*stage).into()));
            let counts = totals.counts();
            let counts = counts.map(|(name, count)| (name.into(), count.into()));
            json!({
                "core": number,
                "cpu": config.poll_cores.get(number),
                "failed": totals.has_failed(),
                "streams": self.poller.streams_of(number),
                "nodes_up": up.filter(|node| totals.is_up(*node)).collect::<Vec<u16>>(),
                "counts": counts.collect::<Map<String, Value>>(),
                "timed_turns": totals.timed_turns(),
                "stage_ns": stages.collect::<Map<String, Value>>(),
            })
        };
        self.poller.cores().enumerate().map(core).collect()
    }
}

impl Daemon {
    /// The fabric, for `rdsock stat`. A device that was given back is one that does not work.
    pub(crate) fn fabric_answer(&self) -> Option<Value> {
        let config = self.config.fabric.as_ref()?;
        Some(match &self.fabric {
            Some(fabric) => fabric.answer(config),
            None => json!({
                "node": config.node,
                "device": config.device.to_string(),
                "failed": true,
                "streams": 0,
                "listeners": 0,
                "cores": [],
                "nodes": [],
            }),
        })
    }

    /// All nodes, for `rdsock why`.
    pub(crate) fn nodes_answer(&self) -> Vec<Value> {
        let Some(config) = &self.config.fabric else {
            return Vec::new();
        };
        let up = |node| {
            let fabric = self.fabric.as_ref();
            fabric.is_some_and(|fabric| fabric.poller.is_up(node))
        };
        let answer = |node: &NodeConfig| {
            json!({
                "id": node.id,
                "name": node.name,
                "addresses": node.addresses,
                "own": node.id == config.node,
                "up": up(node.id),
            })
        };
        config.nodes.iter().map(answer).collect()
    }

    /// Node, own and other address of a stream that is carried to another node, by its anchor. A tenant
    /// that names the stream of another one has not its anchor.
    pub(crate) fn way_of_anchor(
        &self,
        ticket: u64,
        anchor: Route,
    ) -> Option<(u16, SocketAddr, SocketAddr)> {
        let carried = self.fabric.as_ref()?.carried.get(&ticket)?;
        let (node, end) = (carried.stream.node, carried.stream.end);
        (carried.anchor == Some((anchor.local, anchor.peer))).then_some(match end {
            0 => (node, carried.source, carried.destination),
            _ => (node, carried.destination, carried.source),
        })
    }

    /// The device is being unbound or taken out, and the system waits until it is closed: all streams to other nodes
    /// end, and it is closed. What is on the kernel, or goes to this host, stays as it is.
    pub(crate) fn on_wanted_back(&mut self) {
        let Some(fabric) = &mut self.fabric else {
            return;
        };
        // It may be wanted several times.
        let _ = fabric.wanted_back.read();
        if !std::mem::replace(&mut fabric.giving_back, true) {
            fabric.poller.command(Command::GiveBack);
        }
        self.close_device();
    }

    /// Closes a device that is to be given back, as soon as nobody uses it.
    fn close_device(&mut self) {
        let unused = |fabric: &Control| fabric.failed && fabric.carried.is_empty();
        if self
            .fabric
            .as_ref()
            .is_some_and(|fabric| fabric.giving_back && unused(fabric))
        {
            self.fabric = None;
            warn!(
                "the device is closed, since the system wants it back; restart rdsockd when there is one again"
            );
        }
    }

    /// The poll core has something to say.
    pub(crate) fn on_fabric(&mut self) {
        self.take_notices();
        self.close_device();
    }

    fn take_notices(&mut self) {
        if let Some(fabric) = &self.fabric {
            fabric.waker.end_sleep();
        }
        loop {
            while let Some(notice) = self.fabric.as_mut().and_then(|f| f.poller.notice()) {
                self.on_notice(notice);
            }
            let Some(fabric) = &mut self.fabric else {
                return;
            };
            fabric.waker.start_sleep();
            // Once more, since the sleep was announced only now.
            match fabric.poller.notice() {
                Some(notice) => {
                    fabric.waker.end_sleep();
                    self.on_notice(notice);
                }
                None => return,
            }
        }
    }

    fn on_notice(&mut self, notice: Notice) {
        match notice {
            Notice::Incoming {
                id,
                node,
                addresses,
            } => self.on_incoming(id, node, addresses),
            Notice::Established { ticket } => self.on_established(ticket),
            Notice::Refused { ticket, why } => self.on_refused(ticket, why),
            Notice::Released { ticket } => self.on_released(ticket),
            Notice::NodeUp { node } => info!(node, "a node is up"),
            Notice::NodeGone { node } => info!(node, "a node has gone"),
            Notice::DeviceFailed => {
                if let Some(fabric) = &mut self.fabric {
                    fabric.failed = true;
                }
            }
        }
    }

    /// Nothing touches a stream's memory any more.
    fn on_released(&mut self, ticket: u64) {
        let Some(fabric) = &mut self.fabric else {
            return;
        };
        fabric.expected.retain(|_, other| *other != ticket);
        fabric.callers.retain(|_, other| *other != ticket);
        fabric.asking.remove(&ticket);
        fabric.carried.remove(&ticket);
        if self.book.close(ticket).is_some() {
            self.counters.streams_closed += 1;
        }
    }

    /// True for a stream to another node that is not released.
    pub(crate) fn is_carried(&self, ticket: u64) -> bool {
        let fabric = self.fabric.as_ref();
        fabric.is_some_and(|fabric| fabric.carried.contains_key(&ticket))
    }

    /// No program has come for a stream.
    fn abandon_carried(&mut self, ticket: u64) {
        let Some(fabric) = &mut self.fabric else {
            return;
        };
        if let Some(carried) = fabric.carried.get(&ticket) {
            let stream = carried.stream.clone();
            fabric.poller.command(Command::Gone { stream });
        }
    }

    /// A stream whose program was told where to make its anchor has had its time.
    pub(crate) fn on_anchor_due(&mut self, ticket: u64) {
        let waits = self
            .fabric
            .as_ref()
            .and_then(|fabric| fabric.carried.get(&ticket))
            .is_some_and(|carried| carried.socket.is_none());
        if waits {
            self.abandon_carried(ticket);
        }
    }

    fn give_time_for_anchor(&mut self, ticket: u64) {
        self.due
            .push(Reverse((Instant::now() + ANCHOR, Due::Anchor(ticket))));
    }

    /// Makes the memory of a stream to a node.
    fn carry(
        &mut self,
        node: u16,
        opening: Opening,
        addresses: &Addresses,
        uid: u32,
    ) -> Result<u64, CarryError> {
        let Some(config) = &self.config.fabric else {
            return Err(CarryError::Limit);
        };
        let ring_size = config.ring_size;
        let account = self.book.account(uid);
        let bytes = rdsock_node::memory::stream_bytes(ring_size);
        if account.streams >= self.config.max_streams_per_user
            || account.bytes.saturating_add(bytes) > self.config.max_bytes_per_user
            || !self.has_stream_descriptors()
        {
            let cause = "a limit of its user is reached: streams stay on the kernel";
            self.log_refusal(cause, uid, 0);
            return Err(CarryError::Limit);
        }
        let ticket = self.next_stream;
        let fds = crate::memory::make_stream_with(ticket, ring_size, bytes)?;
        let Some(fabric) = &mut self.fabric else {
            return Err(CarryError::Limit);
        };
        let made = fabric.poller.stream(ticket, node, opening, &fds.stream);
        let made = made.map_err(|error| {
            let error = io::Error::other(error);
            let what = "the device can't be given a stream's memory, so it stays on the kernel";
            self.log_fault(what, uid, &error);
            CarryError::Memory(error)
        })?;
        let Some(fabric) = &mut self.fabric else {
            return Err(CarryError::Limit);
        };
        let stream = made.ok_or(CarryError::Limit)?;
        self.next_stream += 1;
        let address = |ip: Ipv6Addr, port| SocketAddr::new(IpAddr::V6(ip).to_canonical(), port);
        fabric.carried.insert(
            ticket,
            Carried {
                stream,
                fds: Some(fds),
                mapped: false,
                source: address(addresses.source, addresses.source_port),
                destination: address(addresses.destination, addresses.destination_port),
                anchor: None,
                socket: None,
            },
        );
        Ok(ticket)
    }

    /// Gives the daemon's end of a program's connection to the data path.
    fn attach_anchor(&mut self, ticket: u64, socket: OwnedFd, anchor: (SocketAddr, SocketAddr)) {
        let Some(fabric) = &mut self.fabric else {
            return;
        };
        let Some(carried) = fabric.carried.get_mut(&ticket) else {
            return;
        };
        carried.anchor = Some(anchor);
        carried.socket = identity(socket.as_fd());
        // Latency is what this is for. It can't fail on a TCP socket.
        let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::TcpNoDelay, &true);
        let stream = carried.stream.clone();
        fabric.poller.attach(stream, socket);
    }

    /// A tenant has gone: it listens no more.
    pub(crate) fn forget_listener(&mut self, id: TenantId) {
        if let Some(fabric) = &mut self.fabric {
            fabric.listening.retain(|_, holders| {
                holders.retain(|holder| holder.tenant != id);
                !holders.is_empty()
            });
        }
    }

    /// Answers a tenant's question, whoever is being served.
    fn reply(&mut self, id: TenantId, message: rdsock_shm::control::Message) {
        self.send_to_other(id, message.into());
    }
}

/// Why a stream to another node was not made.
#[derive(Debug, thiserror::Error)]
enum CarryError {
    /// A limit is reached.
    #[error("a limit is reached")]
    Limit,
    /// Its memory could not be made or mapped.
    #[error("its memory: {0}")]
    Memory(#[from] io::Error),
}

/// Cookie and inode of a socket.
fn identity(socket: std::os::fd::BorrowedFd<'_>) -> Option<(u64, u64)> {
    let inode = nix::sys::stat::fstat(socket).ok()?.st_ino;
    Some((crate::diag::cookie_of(socket)?, inode))
}

/// The four addresses of a question.
fn addresses(between: &Between) -> Option<(SocketAddr, SocketAddr)> {
    let address = |ip: [u8; 16], port: u32| {
        let ip = IpAddr::V6(Ipv6Addr::from(ip)).to_canonical();
        Some(SocketAddr::new(ip, port.try_into().ok()?))
    };
    Some((
        address(between.local, between.local_port)?,
        address(between.peer, between.peer_port)?,
    ))
}

/// An address as it stands in messages: IPv4 as a v4-mapped IPv6 address.
pub(crate) fn octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}
