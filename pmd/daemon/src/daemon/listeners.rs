//! Programs that listen: a node asks for a stream, and the daemon connects to the program on its behalf.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, getsockname, getsockopt,
    setsockopt, socket, sockopt,
};
use rdsock_node::{Asked, Command, Opening};
use rdsock_proto::{Addresses, Refusal};
use rdsock_shm::control::{
    Between, Caller, FABRIC_CLASS_V6, FABRIC_SOURCE_V4, Message, Request, kind,
};
use tracing::debug;

use super::callers::borrowed;
use super::{Daemon, End};
use crate::accounts::Thing;
use crate::agenda::{Due, Token};
use crate::book::TenantId;
use crate::channel::Foreign;
use crate::diag::Listener;
use crate::fabric::{Anchor, Call, Carried, Early, Listening, addresses, octets};
use crate::found::{Errand, Found};
use crate::porters::Owner;
use crate::rights::{Held, NotHeld, Rights, is_other_end, socket_address};

/// Time for a connection over loopback to be made: a full backlog takes longer.
const CALL: Duration = Duration::from_millis(20);
/// Time until the kernel was told to make it, for whom other calls are in the way, or a program that can make them long.
const DIAL: Duration = Duration::from_secs(2);

/// In the connection of a load: a call, and its ticket.
const CALLS: u64 = 1 << 62;

/// Holders of a listening socket that are looked at for one connection: those that do not hold it any more are forgotten, and
/// the next connection finds others.
const HOLDERS: usize = 8;

/// A program that would get a connection.
#[derive(Clone, Copy, Debug)]
struct WouldGet {
    uid: u32,
    /// Cookie of its socket.
    listener: u64,
}

impl Daemon {
    /// A tenant listens on a socket, or says so.
    pub(super) fn on_listens(&mut self, tenant: TenantId, request: &Request) {
        let home = self.rights.namespaces.is_home(request.netns);
        let fabric = self.fabric.as_ref().filter(|_| home);
        if fabric.is_some_and(|fabric| fabric.listening.has_room(tenant)) {
            let (fd, cookie) = (request.fd, request.cookie);
            let errand = Errand::Listener(fd, cookie);
            self.have_looked_at(tenant, errand, (fd, cookie), false, None);
        }
    }

    /// A porter has looked at a socket that a tenant says it listens on. That it listens there is asked when it counts.
    pub(super) fn on_listener(
        &mut self,
        tenant: TenantId,
        fd: i32,
        cookie: u64,
        held: Result<Held, NotHeld>,
    ) {
        match held {
            Ok(held) => self.enter_listener(Listening { tenant, held }),
            Err(error) => {
                debug!(tenant, fd, cookie, "does not listen: {error}");
                self.journal.counters.unverified += 1;
            }
        }
    }

    /// A tenant holds a socket on which it says it listens: that is on its user's account from now on.
    fn enter_listener(&mut self, found: Listening) {
        let tenant = found.tenant;
        let (Some(fabric), Some(connection)) = (&mut self.fabric, self.connections.get_mut(tenant))
        else {
            return;
        };
        let listening = &mut fabric.listening;
        if !listening.has(tenant, found.held.cookie) {
            if !listening.has_room(tenant) {
                return;
            }
            if let Err(over) = connection.charge.more(Thing::Listeners, 1) {
                let (uid, pid) = (connection.peer.uid, connection.peer.pid);
                return self.log_over(over, uid, pid);
            }
        }
        listening.add(found);
    }

    /// A tenant listens on so many sockets less.
    fn listens_less(&mut self, tenant: TenantId, count: usize) {
        if let Some(connection) = self.connections.get_mut(tenant) {
            connection.charge.less(Thing::Listeners, count as u64);
        }
    }

    /// A tenant has gone, and with it what it had on its account: it listens no more.
    pub(super) fn forget_listener(&mut self, id: TenantId) {
        if let Some(fabric) = &mut self.fabric {
            fabric.listening.forget(id);
        }
    }

    /// There are no other nodes any more: nobody listens for them.
    pub(super) fn forget_all_listeners(&mut self) {
        let fabric = self.fabric.as_mut();
        let listening = fabric.map(|fabric| std::mem::take(&mut fabric.listening));
        for (tenant, count) in listening.unwrap_or_default().tenants() {
            self.listens_less(tenant, count);
        }
    }

    /// A node asks for a stream.
    pub(super) fn on_incoming(&mut self, id: Asked, node: u16, addresses: Addresses) {
        self.journal.counters.incoming += 1;
        if let Err(why) = self.try_incoming(id, node, addresses) {
            debug!(node, ?addresses, ?why, "refused");
            self.refuse(id, why);
        }
    }

    fn refuse(&mut self, id: Asked, why: Refusal) {
        self.journal.counters.incoming_refused += 1;
        if let Some(fabric) = &mut self.fabric {
            fabric.command(Command::Refuse { id, why });
        }
        self.close_device_if_given_back();
    }

    fn try_incoming(&mut self, id: Asked, node: u16, between: Addresses) -> Result<(), Refusal> {
        let ip = |ip: Ipv6Addr| IpAddr::V6(ip).to_canonical();
        let source = SocketAddr::new(ip(between.source), between.source_port);
        let destination = SocketAddr::new(ip(between.destination), between.destination_port);
        let config = self.config.fabric.as_ref().ok_or(Refusal::Policy)?;
        // A node speaks for its own addresses, and to ours.
        let owner = |ip| config.node_of(ip).map(|node| node.id);
        if owner(source.ip()) != Some(node) || owner(destination.ip()) != Some(config.node) {
            return Err(Refusal::Policy);
        }
        let (port, from) = (destination.port(), source.port());
        if !self.config.policy.allows_ports(port, from) {
            return Err(Refusal::Policy);
        }
        let (socket, local) = caller(destination).map_err(|error| {
            debug!(%destination, "can't call the program that listens: {error}");
            Refusal::Limit
        })?;
        let would_get = self.would_get(destination, local);
        let WouldGet { uid, listener } = would_get.ok_or(Refusal::NoListener)?;
        let carried = self.carry(node, Opening::Accept(id), &between, uid);
        let ticket = carried.map_err(|error| {
            debug!(node, "no stream: {error}");
            Refusal::Limit
        })?;
        let Some(fabric) = &mut self.fabric else {
            return Err(Refusal::Policy);
        };
        fabric.call_from(ticket, local);
        let call = Call {
            id,
            socket: None,
            local,
            destination,
            uid,
            listener,
            early: None,
        };
        fabric.calls.insert(ticket, call);
        self.agenda.after(DIAL, Due::Call(ticket));
        self.have_called(ticket, uid, socket, destination);
        Ok(())
    }

    /// Has a program that listens called. All that watch its socket are woken in the time of who calls: so that is a look, and so
    /// is the end of a call that is not wanted any more. No call waits for another one.
    fn have_called(&mut self, ticket: u64, uid: u32, socket: OwnedFd, to: SocketAddr) {
        let owner = Owner {
            uid,
            connection: ticket | CALLS,
        };
        let mut socket = self.porters.foreign(owner, socket);
        let fabric = self.fabric.as_ref();
        if let Some(carried) = fabric.and_then(|fabric| fabric.carried.get(&ticket)) {
            socket.charge_to(carried.charge.clone());
        }
        self.porters.give_quick(owner, move || {
            let called = connect(socket.as_raw_fd(), &SockaddrStorage::from(to));
            Some(Found::Called {
                ticket,
                socket,
                called,
            })
        });
    }

    /// The kernel was told to connect to a program that listens.
    pub(super) fn on_called(&mut self, ticket: u64, socket: Foreign, called: Result<(), Errno>) {
        let fabric = self.fabric.as_mut();
        let Some(call) = fabric.and_then(|fabric| fabric.calls.get_mut(&ticket)) else {
            return;
        };
        let flags = EpollFlags::EPOLLOUT | EpollFlags::EPOLLONESHOT;
        let watched = match called {
            Ok(()) | Err(Errno::EINPROGRESS) => {
                let token = Token::Call(ticket);
                self.agenda.watch_for(borrowed(&socket), flags, token)
            }
            Err(error) => Err(error),
        };
        let (id, early) = (call.id, call.early.take());
        match watched {
            Ok(()) => {
                call.socket = Some(socket);
                self.agenda.after(CALL, Due::Call(ticket));
            }
            Err(error) => {
                let why = self.give_up_call(ticket, error);
                self.refuse(id, why);
            }
        }
        // Where it was made, this look finds it.
        self.look_at_early(early);
    }

    /// What a program has announced before it was known whether its connection was made is looked at now.
    fn look_at_early(&mut self, early: Option<Early>) {
        if let Some(Early {
            conn,
            socket,
            searched,
        }) = early
        {
            self.have_looked_at(conn.tenant, Errand::Conn(conn), socket, searched, None);
        }
    }

    /// A program that listens can't be reached.
    fn give_up_call(&mut self, ticket: u64, error: Errno) -> Refusal {
        debug!(ticket, "the program that listens can't be reached: {error}");
        if let Some(fabric) = &mut self.fabric {
            fabric.release(ticket);
        }
        match error {
            Errno::ECONNREFUSED => Refusal::NoListener,
            _ => Refusal::Limit,
        }
    }

    /// The kernel has made a connection to a program that listens, or has not.
    pub(super) fn on_call(&mut self, ticket: u64) {
        let Some(fabric) = &mut self.fabric else {
            return;
        };
        let Some(call) = fabric.calls.get_mut(&ticket) else {
            return;
        };
        let Some(socket) = call.socket.take() else {
            return;
        };
        let Some(call) = fabric.calls.remove(&ticket) else {
            return;
        };
        self.agenda.unwatch(borrowed(&socket));
        let error = getsockopt(&borrowed(&socket), sockopt::SocketError);
        let made = match error {
            Ok(0) => self.is_made(&call),
            Ok(error) => Err(Errno::from_raw(error)),
            Err(error) => Err(error),
        };
        if let Err(error) = made {
            let why = self.give_up_call(ticket, error);
            return self.refuse(call.id, why);
        }
        let Some(fabric) = &mut self.fabric else {
            return;
        };
        if let Some(carried) = fabric.carried.get_mut(&ticket) {
            carried.connect = None;
            let (id, stream) = (call.id, carried.stream.clone());
            fabric.command(Command::Accept { id, stream });
        }
        // As the program's socket has them.
        fabric.attach(ticket, socket, (call.destination, call.local));
    }

    /// Was a connection made to the program that it was meant for? The socket that would have got it listens still, so
    /// nobody else has taken its place meanwhile.
    fn is_made(&mut self, call: &Call) -> Result<(), Errno> {
        // From port 0, which no connection has: for its own port the connection itself is found.
        let nowhere = SocketAddr::new(call.local.ip(), 0);
        match self.would_get(call.destination, nowhere) {
            Some(now) if now.listener == call.listener => Ok(()),
            // Of several sockets that share the port, another one may get the next connection.
            Some(now) if Rights::may_have_promised(now.uid, call.uid) => Ok(()),
            _ => Err(Errno::ECONNREFUSED),
        }
    }

    /// A program that listens has had its time: its backlog is full, unless it was this thread that had no time meanwhile.
    pub(super) fn on_call_due(&mut self, ticket: u64) {
        let fabric = self.fabric.as_ref();
        let call = fabric.and_then(|fabric| fabric.calls.get(&ticket));
        let socket = call.and_then(|call| call.socket.as_ref());
        if socket.is_some_and(|socket| can_be_written(borrowed(socket))) {
            return self.on_call(ticket);
        }
        let call = self
            .fabric
            .as_mut()
            .and_then(|fabric| fabric.calls.remove(&ticket));
        if let Some(call) = call {
            if let Some(socket) = &call.socket {
                self.agenda.unwatch(borrowed(socket));
            }
            let why = self.give_up_call(ticket, Errno::ETIMEDOUT);
            self.refuse(call.id, why);
            self.look_at_early(call.early);
        }
    }

    /// The tenant that would get a connection to `destination` from `source`; `None` when that is no tenant.
    fn would_get(&mut self, destination: SocketAddr, source: SocketAddr) -> Option<WouldGet> {
        let diag = self.rights.namespaces.home_diag()?.clone();
        let socket: Listener = match diag.listener(destination, source) {
            Ok(socket) => socket?,
            Err(error) => {
                let what = "the kernel does not tell who listens (sock_diag)";
                self.journal.fault(what, 0, &error);
                return None;
            }
        };
        for _ in 0..HOLDERS {
            let holder = self.fabric.as_ref()?.listening.latest(socket.cookie)?;
            let tenant = self.connections.tenant(holder.tenant);
            if let Some(tenant) = tenant
                && Rights::still_listens(holder.held, &tenant.passport, &socket)
            {
                return Some(WouldGet {
                    uid: tenant.passport.peer.uid,
                    listener: socket.cookie,
                });
            }
            // It says so when it listens again.
            let fabric = self.fabric.as_mut()?;
            if fabric.listening.remove(socket.cookie, holder.tenant) {
                self.listens_less(holder.tenant, 1);
            }
        }
        None
    }

    /// A tenant asks whose connection it has: one that it has accepted, or got from another program.
    pub(super) fn on_whois(&mut self, id: TenantId, question: Between) -> Result<(), End> {
        if addresses(&question).is_none_or(|names| self.carried_between(names).is_none()) {
            return self.tell_who(id, question, Err(NotHeld::Socket));
        }
        let socket = (question.fd, 0);
        self.have_looked_at(id, Errand::Whois(question), socket, false, None);
        Ok(())
    }

    /// The stream with an anchor of these addresses, as the program's socket has them.
    fn carried_between(&self, names: (SocketAddr, SocketAddr)) -> Option<(u64, &Carried)> {
        let fabric = self.fabric.as_ref()?;
        let (local, peer) = names;
        let accepted = fabric.called_from(peer);
        let accepted = accepted.filter(|(_, carried)| carried.destination == local);
        accepted.or_else(|| fabric.anchored_at(names))
    }

    /// Tells a tenant whose connection it has, if it was found to have it.
    pub(super) fn tell_who(
        &mut self,
        id: TenantId,
        question: Between,
        held: Result<Held, NotHeld>,
    ) -> Result<(), End> {
        let diag = self.rights.namespaces.home_diag().map(|diag| &**diag);
        let found = held.ok().zip(addresses(&question));
        let found = found.filter(|(held, names)| Rights::is_between(diag, *held, *names));
        let found = found.and_then(|(_, names)| {
            let (ticket, carried) = self.carried_between(names)?;
            let is_there = match carried.anchor {
                // The daemon has its socket until it is known what becomes of it.
                Anchor::Called => true,
                Anchor::Attached { cookie, .. } => is_other_end(diag?, cookie, names),
                _ => false,
            };
            is_there.then_some((ticket, carried))
        });
        let mut answer = Caller {
            question: question.question,
            ticket: 0,
            local: [0; 16],
            peer: [0; 16],
            local_port: 0,
            peer_port: 0,
        };
        if let Some((ticket, carried)) = found {
            let (local, peer) = match carried.stream.end {
                0 => (carried.source, carried.destination),
                _ => (carried.destination, carried.source),
            };
            answer.ticket = ticket;
            (answer.local, answer.local_port) = (octets(local.ip()), local.port().into());
            (answer.peer, answer.peer_port) = (octets(peer.ip()), peer.port().into());
        }
        self.send(id, Message::new(kind::CALLER, &answer).into())
    }
}

/// Is a connection made, or has it failed?
fn can_be_written(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::POLLOUT)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
}

/// A socket to call a program with, and its address. Who asks about the connection is told the true peer.
fn caller(destination: SocketAddr) -> Result<(OwnedFd, SocketAddr), Errno> {
    let (family, from) = match destination.ip() {
        IpAddr::V4(_) => (
            AddressFamily::Inet,
            SocketAddr::new(Ipv4Addr::from(FABRIC_SOURCE_V4).into(), 0),
        ),
        IpAddr::V6(_) => (
            AddressFamily::Inet6,
            SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 0),
        ),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, None)?;
    if destination.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6TClass, &FABRIC_CLASS_V6.into())?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(from))?;
    let local = socket_address(&getsockname(socket.as_raw_fd())?).ok_or(Errno::EINVAL)?;
    Ok((socket, local))
}
