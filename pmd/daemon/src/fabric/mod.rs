//! The fabric, as the control thread has it: the device, the streams to other nodes on their way from a question to a
//! promoted end, and who listens. The data path is `rdsock-node`; what an event means is the daemon's
//! (`daemon/between.rs`, `daemon/listeners.rs`).

mod config;
mod device;
pub mod incoming;
mod listeners;
mod routes;

pub use config::{Device, FabricConfig, NodeConfig};
pub use listeners::{Listeners, Listening};
pub use routes::follow;

use crate::accounts::{Accounts, Charge, Limits, Over, Thing};
use crate::agenda::{Agenda, Token};
use crate::book::{Conn, Route, TenantId};
use crate::channel::Foreign;
use crate::confine::Confinement;
use crate::memory::{Kept, StreamFds, can_be_whole};
use crate::porters::Owner;
use crate::rights::{Held, Rights};
use crate::shares::Known;
use crate::starter::Starter;
use rdsock_node::mail::Waker;
use rdsock_node::stream::NodeStream;
use rdsock_node::{
    Asked, Berth, Command, Notice, Opening, Poller, Settings, Stage, StartError, Totals,
};
use rdsock_proto::Count;
use rdsock_rde::Management;
use rdsock_rde::spec::counter;
use rdsock_shm::control::Between;
use rdsock_vfio::{BusError, EventFd, EventFlags};
use serde_json::{Map, Value, json};
use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tracing::info;
use tracing::warn;

/// How long the streams of a node that does not answer any more wait for it.
const RESUME: Duration = Duration::from_secs(30);

/// Streams that are promised to whoever comes from one address, to a tenant each. More than one only where users share a port.
const AT_ONE_ADDRESS: usize = 16;

/// A stream to another node, until nothing touches its memory any more.
#[derive(Debug)]
pub struct Carried {
    /// The data path's.
    pub stream: Arc<NodeStream>,
    /// Its memory and end pages, until the program's end was promoted.
    pub fds: Option<StreamFds>,
    /// A program has it mapped, or had.
    pub mapped: bool,
    /// From where to where, as the programs see it.
    pub source: SocketAddr,
    /// As `source`.
    pub destination: SocketAddr,
    /// Where bytes flow as long as it is not promoted.
    pub anchor: Anchor,
    /// Whose programs may be given it.
    pub whose: Whose,
    /// It is looked at whether the anchor that has come in is this one's.
    pub looked_at: bool,
    /// What it costs its user, until its last descriptor is closed: that of its anchor, or one in a message that nobody reads.
    pub charge: Arc<Charge>,
    /// The connect, as long as it is under way.
    pub connect: Option<Charge>,
    /// A place at the other node, where a program of this one has asked for the stream.
    pub _place: Option<Charge>,
}

/// Whose programs may be given a stream: what was said on its anchor lies in its memory as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// This user's.
    User(u32),
    /// Those of the first user that is found to have it, of those who listen where it came in.
    Listeners {
        /// Cookie of the socket that it came in at.
        cookie: u64,
        /// A user that listened there when it came.
        uid: u32,
    },
}

/// The daemon's end of a program's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// The other node was asked.
    Asked,
    /// The program was told to make it, and comes from this address.
    Promised {
        /// From where.
        from: SocketAddr,
        /// Whom it is promised to.
        tenant: TenantId,
        /// The user of that tenant.
        uid: u32,
        /// The socket that it was found to hold, and will connect.
        held: Held,
    },
    /// The daemon connects to a program that listens.
    Called {
        /// Cookie of the daemon's socket.
        cookie: u64,
    },
    /// No program comes for it any more.
    Abandoned,
    /// Bytes flow.
    Attached {
        /// The addresses, as the program's socket has them.
        names: (SocketAddr, SocketAddr),
        /// Cookie of the daemon's socket.
        cookie: u64,
        /// Inode of the daemon's socket.
        inode: u64,
    },
}

/// What there is at a listener for anchors.
#[derive(Debug)]
pub enum Arrival {
    /// A connection, and from where.
    From(OwnedFd, SocketAddr),
    /// Nothing now.
    None,
    /// There are no descriptors to take what there is.
    Short(io::Error),
}

/// A program that waits for the answer to a REACH.
#[derive(Debug)]
pub struct Asking {
    /// Whose.
    pub tenant: TenantId,
    /// What it asked.
    pub question: Between,
    /// The socket that it was found to hold.
    pub held: Held,
}

/// A connection to a program that listens, which the kernel has not made yet.
#[derive(Debug)]
pub struct Call {
    /// What the other node asked for.
    pub id: Asked,
    /// How far it has come.
    pub step: Step,
    /// When nothing that is in its way is waited for any more.
    pub end: Instant,
    /// Its address.
    pub local: SocketAddr,
    /// The program's address.
    pub destination: SocketAddr,
    /// The user of the program that would get it.
    pub uid: u32,
    /// Cookie of the socket that would get it.
    pub listener: u64,
    /// The program has it already, and says so.
    pub early: Option<Early>,
}

impl Call {
    /// The kernel has made it.
    pub fn note_made(&mut self) {
        let step = std::mem::replace(&mut self.step, Step::Dialling);
        self.step = match step {
            Step::Dialled(socket) => Step::Made(socket),
            other => other,
        };
    }
}

/// How far a call has come.
#[derive(Debug)]
pub enum Step {
    /// The kernel is being told to connect the daemon's socket.
    Dialling,
    /// The kernel was told.
    Dialled(Foreign),
    /// The kernel has made the connection. Is it one to who was meant?
    Made(Foreign),
}

/// An anchor that has come in, until it is known whose it is.
#[derive(Debug)]
struct Arrived {
    socket: Foreign,
    /// Cookie of that socket.
    cookie: u64,
    /// Where it leads to.
    to: SocketAddr,
}

/// What a program has announced of a connection of which the daemon does not know yet whether the kernel has made it, and to whom.
#[derive(Clone, Copy, Debug)]
pub struct Early {
    /// Its connection record.
    pub conn: Conn,
    /// Descriptor and cookie.
    pub socket: (i32, u64),
    /// Others may hold it, too.
    pub searched: bool,
}

/// The fabric, as the control thread has it.
#[derive(Debug)]
pub struct Control {
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
    /// Which of these wait, and are not watched.
    pub waiting: HashSet<usize>,
    /// Streams by ticket.
    pub carried: HashMap<u64, Carried>,
    /// From where to where programs of this node go by them.
    pub connected: HashSet<(SocketAddr, SocketAddr)>,
    /// Who waits for which of them to be established.
    pub asking: HashMap<u64, Asking>,
    /// Streams by the address that their program's anchor is to come from. Several may be promised for one address: who
    /// holds the socket that comes from there is looked up.
    promised: HashMap<SocketAddr, Vec<u64>>,
    /// Anchors that have come in, by the address that they come from, until it is known whose they are.
    arrived: HashMap<SocketAddr, Arrived>,
    /// What other nodes ask for, while the kernel is asked who would get it, by ticket.
    pub incoming: HashMap<u64, Asked>,
    /// Connections to programs that listen, on their way, by ticket.
    pub calls: HashMap<u64, Call>,
    /// Streams by the address that the daemon has connected from.
    callers: HashMap<SocketAddr, u64>,
    /// The same the other way round.
    caller_of: HashMap<u64, SocketAddr>,
    /// Streams by the addresses of their anchors, as the programs' sockets have them.
    attached: HashMap<(SocketAddr, SocketAddr), u64>,
    /// Streams that are promised to each tenant.
    promised_of: HashMap<TenantId, HashSet<u64>>,
    /// The sockets that tenants listen on.
    pub listening: Listeners,
    /// Whose the places are that a poll core of this node has at another one.
    places: HashMap<(u16, u16), Accounts>,
    places_each: u64,
    known: Known,
    /// There may be more notices.
    busy: bool,
    failed: bool,
}

impl Control {
    /// Opens the device and starts the poll core.
    pub fn start(
        config: &FabricConfig,
        Doors(listeners): Doors,
        confinement: &mut Confinement,
        agenda: &Agenda,
        known: Known,
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
        if nix::unistd::geteuid().is_root() && !can_be_whole() {
            warn!(
                "any user's program can stall the poll cores by making holes in the memory of its streams: the daemon \
                 needs CAP_LINUX_IMMUTABLE and Linux 6.1 to keep it from that"
            );
        }
        for (at, listener) in listeners.iter().enumerate() {
            let token = Token::Anchors(at as u64);
            agenda.watch(listener, token).map_err(io::Error::from)?;
        }
        let watched = agenda.watch(waker.fd(), Token::Fabric);
        watched.map_err(io::Error::from)?;
        let flags = EventFlags::EFD_CLOEXEC | EventFlags::EFD_NONBLOCK;
        let wanted_back = EventFd::from_flags(flags).map_err(io::Error::from)?;
        let wanted_back = Arc::new(wanted_back);
        rde.space().device().set_wanted_back(&wanted_back)?;
        let watched = agenda.watch(&*wanted_back, Token::WantedBack);
        watched.map_err(io::Error::from)?;
        let management = rde.management();
        // Before there can be a notice: each is to be seen by epoll.
        waker.start_sleep();
        let places_each = settings.streams_at_node() as u64;
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
            waiting: HashSet::new(),
            carried: HashMap::new(),
            connected: HashSet::new(),
            asking: HashMap::new(),
            promised: HashMap::new(),
            arrived: HashMap::new(),
            incoming: HashMap::new(),
            calls: HashMap::new(),
            callers: HashMap::new(),
            caller_of: HashMap::new(),
            attached: HashMap::new(),
            promised_of: HashMap::new(),
            listening: Listeners::default(),
            places: HashMap::new(),
            places_each,
            known,
            busy: false,
            failed: false,
        })
    }
}

/// Where programs make their anchors: on either loopback address.
///
/// Nobody else gets their ports for as long as this process lives: a program may just have been told to go there. And when it ends, however it does, all
/// control connections hang up before the ports are free, if these were made before there was anything else: of what a process has
/// open, the kernel takes the last number first. So who is connected there, and finds its daemon there still, has come to the daemon.
#[derive(Debug)]
pub struct Doors(Vec<TcpListener>);

impl Doors {
    /// Makes them.
    pub fn new() -> io::Result<Self> {
        let mut doors = vec![listen_on(Ipv4Addr::LOCALHOST.into())?];
        match listen_on(Ipv6Addr::LOCALHOST.into()) {
            Ok(door) => doors.push(door),
            Err(error) => warn!("no IPv6 to other nodes: can't listen on ::1: {error}"),
        }
        Ok(Doors(doors))
    }

    /// Has all who come from now on hung up on.
    pub fn shut(self, starter: &Starter) {
        for door in self.0 {
            let hang_up = move || {
                let _ = door.set_nonblocking(false);
                while let Ok((came, _)) = door.accept() {
                    drop(came);
                }
            };
            starter.order("door", hang_up, || {});
        }
    }
}

fn listen_on(address: IpAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind((address, 0))?;
    listener.set_nonblocking(true)?;
    // Until this process ends.
    std::mem::forget(listener.try_clone()?);
    Ok(listener)
}

/// A number that no earlier start had, in all likelihood.
fn epoch() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(1, |since| since.as_nanos() as u64).max(1)
}

impl Control {
    /// For `rdsock stat`.
    pub fn answer(&self, config: &FabricConfig) -> Value {
        let mut streams: HashMap<u16, usize> = HashMap::new();
        for carried in self.carried.values() {
            *streams.entry(carried.stream.node).or_default() += 1;
        }
        let nodes: Vec<Value> = config
            .others()
            .map(|node| {
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
                    "streams": streams.get(&node.id).copied().unwrap_or(0),
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

impl Control {
    /// True while connects to a node are possible.
    pub fn is_up(&self, node: u16) -> bool {
        !self.failed && self.poller.is_up(node)
    }

    /// True when the device is not used any more.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// The device is not used any more.
    pub fn fail(&mut self) {
        self.failed = true;
    }

    /// The device is to be given back. True when it can be closed now.
    pub fn give_back(&mut self) -> bool {
        // It may be wanted several times.
        let _ = self.wanted_back.read();
        if !std::mem::replace(&mut self.giving_back, true) {
            self.poller.command(Command::GiveBack);
        }
        self.is_given_back()
    }

    /// True when the device is to be given back, and nobody uses it any more.
    pub fn is_given_back(&self) -> bool {
        self.giving_back && self.failed && self.carried.is_empty()
    }

    /// Tells a poll core something.
    pub fn command(&mut self, command: Command) {
        self.poller.command(command);
    }

    /// The next notice; `None` when the poll cores will wake the control thread for the next one.
    pub fn notice(&mut self) -> Option<Notice> {
        self.waker.end_sleep();
        let mut notice = self.poller.notice();
        if notice.is_none() {
            self.waker.start_sleep();
            // Once more, since the sleep was announced only now.
            notice = self.poller.notice();
            if notice.is_some() {
                self.waker.end_sleep();
            }
        }
        self.busy = notice.is_some();
        notice
    }

    /// The last notice that was taken may not be the last one: nobody wakes the control thread for the next.
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// Finds a place for a user's stream: see [`Poller::berth`].
    pub fn berth<E: From<io::Error>>(
        &mut self,
        node: u16,
        opening: Opening,
        uid: u32,
        pay: impl FnOnce() -> Result<Charge, E>,
    ) -> Result<Option<Berth>, E> {
        self.poller.berth(node, opening, uid, pay)
    }

    /// A place at another node for a user's stream, which a poll core asks for there. They are as few as that node gives to this one, and so each user has
    /// a share of them, whatever it has of other streams.
    pub fn place_at(&mut self, node: u16, core: u16, uid: u32) -> Result<Charge, Over> {
        let limits = || Limits::of_shared(Thing::Carried, self.places_each);
        let accounts = (self.places.entry((node, core)))
            .or_insert_with(|| Accounts::new(limits(), self.known.clone()));
        accounts.charge(uid, &[(Thing::Carried, 1)])
    }

    /// Gives a stream's memory to the data path, which keeps its pages, and pays for the stream, as long as it has something of it.
    /// `None` when there are too many streams.
    pub fn stream(
        &mut self,
        ticket: u64,
        node: u16,
        opening: Opening,
        berth: Berth,
        fds: &StreamFds,
        kept: Kept,
    ) -> Result<Option<Arc<NodeStream>>, BusError> {
        let paid = Box::new(kept);
        self.poller
            .stream(ticket, node, opening, berth, &fds.stream, paid)
    }

    /// Where a program makes its anchor, from an address of this family.
    pub fn anchors_for(&self, source: SocketAddr) -> Option<SocketAddr> {
        let addresses = self.listeners.iter();
        let mut addresses = addresses.filter_map(|listener| listener.local_addr().ok());
        addresses.find(|address| address.is_ipv4() == source.is_ipv4())
    }

    /// The listeners for anchors, which are not watched any more. Nothing else is left.
    pub fn into_doors(self, agenda: &Agenda) -> Doors {
        for listener in &self.listeners {
            agenda.unwatch(listener);
        }
        Doors(self.listeners)
    }

    /// The listeners for anchors.
    pub fn listeners(&self) -> usize {
        self.listeners.len()
    }

    /// A program is told to make its anchor.
    pub fn promise(&mut self, ticket: u64, anchor: Anchor) {
        if let Some(carried) = self.carried.get_mut(&ticket) {
            carried.anchor = anchor;
        }
        if let Anchor::Promised { from, tenant, .. } = anchor {
            self.promised.entry(from).or_default().push(ticket);
            self.promised_of.entry(tenant).or_default().insert(ticket);
        }
    }

    /// The promise was kept, or is not kept any more.
    fn forget_promise(&mut self, ticket: u64) {
        let anchor = self.carried.get(&ticket).map(|carried| carried.anchor);
        let Some(Anchor::Promised { from, tenant, .. }) = anchor else {
            return;
        };
        if let Some(tickets) = self.promised_of.get_mut(&tenant) {
            tickets.remove(&ticket);
            if tickets.is_empty() {
                self.promised_of.remove(&tenant);
            }
        }
        if let Some(tickets) = self.promised.get_mut(&from) {
            tickets.retain(|other| *other != ticket);
            if tickets.is_empty() {
                self.promised.remove(&from);
                self.arrived.remove(&from);
            }
        }
    }

    /// The next connection that has come in at a listener for anchors.
    pub fn arrival(&mut self, listener: usize) -> Arrival {
        let Some(accepted) = self.listeners.get(listener).map(TcpListener::accept) else {
            return Arrival::None;
        };
        let (socket, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Arrival::None,
            Err(error) => match error.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS) => {
                    return Arrival::Short(error);
                }
                // That one was over before it was taken.
                _ => return Arrival::None,
            },
        };
        Arrival::From(socket.into(), from)
    }

    /// Whose anchor a connection from this address is to be: a stream is promised for it. Of several, the latest.
    pub fn expected_from(&self, from: SocketAddr) -> Option<Owner> {
        let ticket = self.promised.get(&from)?.last()?;
        match self.carried.get(ticket)?.anchor {
            Anchor::Promised { tenant, uid, .. } => Some(Owner {
                uid,
                connection: tenant,
            }),
            _ => None,
        }
    }

    /// A connection has come in from an address that a stream is promised for. The daemon's socket has this cookie.
    pub fn arrive(&mut self, from: SocketAddr, to: SocketAddr, mut socket: Foreign, cookie: u64) {
        let ticket = self.promised.get(&from).and_then(|tickets| tickets.last());
        if let Some(carried) = ticket.and_then(|ticket| self.carried.get(ticket)) {
            socket.charge_to(carried.charge.clone());
        }
        let arrived = Arrived { socket, cookie, to };
        self.arrived.insert(from, arrived);
    }

    /// A listener for anchors, to be watched or not.
    pub fn listener(&self, listener: usize) -> Option<&TcpListener> {
        self.listeners.get(listener)
    }

    /// May one more stream be promised to whoever comes from an address? It is looked at of each whether that is whose anchor comes.
    pub fn has_room_at(&self, from: SocketAddr) -> bool {
        self.promised.get(&from).map_or(0, Vec::len) < AT_ONE_ADDRESS
    }

    /// The streams that are promised to whoever comes from an address, the latest first.
    pub fn promised_to(&self, from: SocketAddr) -> Vec<u64> {
        let tickets = self.promised.get(&from).into_iter().flatten();
        tickets.rev().copied().collect()
    }

    /// The streams that are promised to a tenant: to be made from an address, or from any.
    pub fn promised_tenant(&self, tenant: TenantId, from: Option<SocketAddr>) -> Vec<u64> {
        let place = |ticket: &u64| match self.carried.get(ticket)?.anchor {
            Anchor::Promised { from, .. } => Some(from),
            _ => None,
        };
        let promised = self.promised_of.get(&tenant).into_iter().flatten();
        let there =
            |ticket: &u64| place(ticket).is_some_and(|at| from.is_none_or(|from| from == at));
        promised.copied().filter(there).collect()
    }

    /// The daemon connects to a program that listens, from this address.
    pub fn call_from(&mut self, ticket: u64, local: SocketAddr) {
        self.callers.insert(local, ticket);
        self.caller_of.insert(ticket, local);
    }

    /// The stream that the daemon has connected from this address for.
    pub fn called_from(&self, local: SocketAddr) -> Option<(u64, &Carried)> {
        let ticket = *self.callers.get(&local)?;
        Some((ticket, self.carried.get(&ticket)?))
    }

    /// The stream whose anchor has these addresses, as the program's socket has them.
    pub fn anchored_at(&self, names: (SocketAddr, SocketAddr)) -> Option<(u64, &Carried)> {
        let ticket = *self.attached.get(&names)?;
        Some((ticket, self.carried.get(&ticket)?))
    }

    /// Where the anchor that has come from an address leads to, and the cookie of the daemon's socket there.
    pub fn arrived_at(&self, from: SocketAddr) -> Option<(SocketAddr, u64)> {
        let arrived = self.arrived.get(&from)?;
        Some((arrived.to, arrived.cookie))
    }

    /// The anchor that has come from this address is this stream's: bytes flow.
    pub fn attach_arrived(&mut self, ticket: u64, from: SocketAddr) {
        if let Some(Arrived { socket, to, .. }) = self.arrived.remove(&from) {
            self.forget_promise(ticket);
            self.attach(ticket, socket, (from, to));
        }
    }

    /// A tenant of this user was found to hold the program's end of a stream's anchor: may it be given the stream? Nobody else's programs
    /// may, once one may.
    pub fn is_for(&mut self, ticket: u64, tenant: TenantId, uid: u32) -> bool {
        let Some(carried) = self.carried.get_mut(&ticket) else {
            return false;
        };
        let listens = matches!(carried.whose, Whose::Listeners { cookie, .. } if self.listening.has(tenant, cookie));
        let may = Rights::may_have_carried(uid, carried.whose, listens);
        if may {
            carried.whose = Whose::User(uid);
        }
        may
    }

    /// Gives the daemon's end of a program's connection to the data path: bytes flow.
    pub fn attach(&mut self, ticket: u64, socket: Foreign, names: (SocketAddr, SocketAddr)) {
        let Some(carried) = self.carried.get_mut(&ticket) else {
            return;
        };
        let inode = nix::sys::stat::fstat(&socket).map(|stat| stat.st_ino);
        let cookie = crate::diag::cookie_of(socket.as_fd());
        let (Ok(inode), Some(cookie)) = (inode, cookie) else {
            return self.abandon(ticket);
        };
        carried.anchor = Anchor::Attached {
            names,
            cookie,
            inode,
        };
        self.attached.insert(names, ticket);
        // Latency is what this is for. It can't fail on a TCP socket.
        let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::TcpNoDelay, &true);
        self.poller.attach(&carried.stream, socket.hand_over());
    }

    /// No program has come for a stream.
    pub fn abandon(&mut self, ticket: u64) {
        self.forget_promise(ticket);
        if let Some(carried) = self.carried.get_mut(&ticket) {
            carried.anchor = Anchor::Abandoned;
            let stream = carried.stream.clone();
            self.poller.command(Command::Gone { stream });
        }
    }

    /// Nothing touches a stream's memory any more. What was announced of it meanwhile is to be looked at.
    pub fn release(&mut self, ticket: u64) -> Option<Early> {
        self.forget_promise(ticket);
        // Addresses come again: a later stream may have them.
        if let Some(local) = self.caller_of.remove(&ticket)
            && self.callers.get(&local) == Some(&ticket)
        {
            self.callers.remove(&local);
        }
        self.asking.remove(&ticket);
        let call = self.calls.remove(&ticket);
        let carried = self.carried.remove(&ticket)?;
        if carried.stream.end == 0 {
            self.connected
                .remove(&(carried.source, carried.destination));
        }
        if let Anchor::Attached { names, .. } = carried.anchor
            && self.attached.get(&names) == Some(&ticket)
        {
            self.attached.remove(&names);
        }
        call?.early
    }

    /// This stream's connection to a program that listens, with these addresses as the program's socket has them, while it is on its
    /// way.
    pub fn call_between(
        &mut self,
        ticket: u64,
        names: (SocketAddr, SocketAddr),
    ) -> Option<&mut Call> {
        let call = self.calls.get_mut(&ticket)?;
        ((call.destination, call.local) == names).then_some(call)
    }

    /// Node, own and other address of a stream that is carried to another node, by its anchor. A tenant
    /// that names the stream of another one has not its anchor.
    pub fn way_of_anchor(
        &self,
        ticket: u64,
        anchor: Route,
    ) -> Option<(u16, SocketAddr, SocketAddr)> {
        let carried = self.carried.get(&ticket)?;
        let (node, end) = (carried.stream.node, carried.stream.end);
        let names = match carried.anchor {
            Anchor::Attached { names, .. } => names,
            _ => return None,
        };
        (names == (anchor.local, anchor.peer)).then_some(match end {
            0 => (node, carried.source, carried.destination),
            _ => (node, carried.destination, carried.source),
        })
    }
}

/// An address of a message; `None` when its port is out of range.
pub fn address(ip: [u8; 16], port: u32) -> Option<SocketAddr> {
    let ip = IpAddr::V6(Ipv6Addr::from(ip)).to_canonical();
    Some(SocketAddr::new(ip, port.try_into().ok()?))
}

/// The four addresses of a question.
pub fn addresses(between: &Between) -> Option<(SocketAddr, SocketAddr)> {
    Some((
        address(between.local, between.local_port)?,
        address(between.peer, between.peer_port)?,
    ))
}

/// An address as it stands in messages: IPv4 as a v4-mapped IPv6 address.
pub fn octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}
