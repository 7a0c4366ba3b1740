//! Programs that listen: a node asks for a stream, and the daemon connects to the program on its behalf.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{SockaddrStorage, connect, getsockopt, sockopt};
use rdsock_node::{Asked, Command, Opening};
use rdsock_proto::{Addresses, Refusal};
use rdsock_shm::control::{Between, Caller, Message, Request, kind};
use tracing::debug;

use super::between::NewStream;
use super::{Daemon, End};
use crate::accounts::{Charge, Thing};
use crate::agenda::{Due, Token};
use crate::book::TenantId;
use crate::channel::Foreign;
use crate::diag::Listener;
use crate::fabric::incoming::{self, Answer, Incoming};
use crate::fabric::{
    Anchor, Call, Carried, Early, Listening, Step, Whose, address, addresses, octets,
};
use crate::found::{Errand, Found};
use crate::porters::Owner;
use crate::rights::{Held, Listens, NotHeld, Rights};

/// Time for a connection over loopback to be made: a full backlog takes longer.
const CALL: Duration = Duration::from_millis(20);
/// Time until the kernel has said who would get it, and once more until it was told to make it, for whom other calls are in the way, or a program that can make them long.
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
            let said = address(request.local, request.local_port);
            let errand = Errand::Listener(fd, cookie, said);
            self.have_looked_at(tenant, errand, (fd, cookie), false, None);
        }
    }

    /// A porter has looked at a socket that a tenant listens on, or says so. That it listens there still is asked when it counts.
    pub(super) fn on_listener(
        &mut self,
        tenant: TenantId,
        (fd, cookie): (i32, u64),
        said: Option<SocketAddr>,
        held: Result<Held, NotHeld>,
    ) {
        // Where the socket itself can't be asked, its process is believed: it is one of the daemon's user.
        let believed = |address: SocketAddr| Listens {
            address,
            of_both: address.is_ipv6() && address.ip().is_unspecified(),
        };
        let found = held.and_then(|held| {
            let listens = held.listens.or(said.map(believed));
            Ok((held, listens.ok_or(NotHeld::Elsewhere)?))
        });
        match found {
            Ok((held, listens)) => self.enter_listener(Listening {
                tenant,
                fd,
                held,
                listens,
            }),
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
        let (claims, uid, connect) = self.who_pays_at(destination)?;
        let incoming = Incoming {
            ticket: self.streams.number(),
            id,
            node,
            between,
            destination,
            claims,
            uid,
            connect,
        };
        self.have_listener_looked_for(incoming);
        Ok(())
    }

    /// Who was found to listen where a connection goes, and can pay for it. Who can't may not listen there any more, and others do: that one is looked
    /// at again.
    fn who_pays_at(
        &mut self,
        destination: SocketAddr,
    ) -> Result<(Listening, u32, Charge), Refusal> {
        let mut why = Refusal::NoListener;
        for _ in 0..HOLDERS {
            let fabric = self.fabric.as_ref().ok_or(Refusal::Policy)?;
            let claims = fabric.listening.latest_at(destination).ok_or(why)?;
            let tenant = self.connections.tenant(claims.tenant);
            let uid = tenant.ok_or(why)?.passport.peer.uid;
            match self.connect_from_afar(uid) {
                Ok(connect) => return Ok((claims, uid, connect)),
                Err(over) => why = over,
            }
            self.listens_no_more(claims);
            self.have_claim_looked_at(claims);
        }
        Err(why)
    }

    /// Another node asks on the account of a user.
    fn connect_from_afar(&mut self, uid: u32) -> Result<Charge, Refusal> {
        let connect = self.charge_connect(uid);
        let connect = connect.and_then(|connect| self.leave_room(uid).map(|()| connect));
        connect.map_err(|_| Refusal::Limit)
    }

    /// A tenant may have closed the socket that it listened on, or share the port with others. Until this look is done, nothing is asked
    /// on its account.
    fn have_claim_looked_at(&mut self, claims: Listening) {
        let socket = (claims.fd, claims.held.cookie);
        let errand = Errand::Listener(socket.0, socket.1, Some(claims.listens.address));
        self.have_looked_at(claims.tenant, errand, socket, false, None);
    }

    /// Asks the kernel who would get a connection. To find a port for it, and that, may take as long as somebody likes: so it is a look,
    /// on behalf of who listens there as far as is known.
    fn have_listener_looked_for(&mut self, incoming: Incoming) {
        let owner = Owner {
            uid: incoming.uid,
            connection: incoming.ticket | CALLS,
        };
        if let Some(fabric) = &mut self.fabric {
            fabric.incoming.insert(incoming.ticket, incoming.id);
        }
        self.agenda.after(DIAL, Due::Incoming(incoming.ticket));
        // Its other address is known when it has one.
        let ask = self
            .rights
            .ask_at_home(incoming.destination, incoming.destination);
        self.porters.ask_quick(owner, move |carrier| {
            let answer = incoming::ask(carrier, incoming.destination, ask);
            Some(Found::Listener(Box::new(incoming), answer))
        });
    }

    /// The kernel has not said in time who would get a connection that another node asks for: whoever listens there has his looks held up. The
    /// node has its answer all the same, since it waits for so many at a time only.
    pub(super) fn on_incoming_due(&mut self, ticket: u64) {
        let fabric = self.fabric.as_mut();
        if let Some(id) = fabric.and_then(|fabric| fabric.incoming.remove(&ticket)) {
            debug!(ticket, "refused: it is not known in time who listens there");
            self.refuse(id, Refusal::Limit);
        }
    }

    /// The kernel has said who would get a connection that another node asks for.
    pub(super) fn on_listener_found(&mut self, incoming: Incoming, answer: Result<Answer, Errno>) {
        let (id, node) = (incoming.id, incoming.node);
        let fabric = self.fabric.as_mut();
        if fabric.is_none_or(|fabric| fabric.incoming.remove(&incoming.ticket).is_none()) {
            // It was refused.
            return;
        }
        if let Err(why) = self.call(incoming, answer) {
            debug!(node, ?why, "refused");
            self.refuse(id, why);
        }
    }

    fn call(&mut self, incoming: Incoming, answer: Result<Answer, Errno>) -> Result<(), Refusal> {
        let Incoming {
            ticket,
            id,
            node,
            between,
            destination,
            claims,
            ..
        } = incoming;
        let (own, listener) = answer.map_err(|error| {
            debug!(%destination, "can't call the program that listens: {error}");
            Refusal::Limit
        })?;
        let would_get = self.would_get(listener);
        if would_get.is_none_or(|would_get| would_get.uid != incoming.uid) {
            // It was asked on the account of somebody who does not listen there, maybe.
            self.listens_no_more(claims);
            self.have_claim_looked_at(claims);
        }
        let WouldGet { uid, listener } = would_get.ok_or(Refusal::NoListener)?;
        let connect = match uid == incoming.uid {
            true => incoming.connect,
            false => self.connect_from_afar(uid)?,
        };
        let carried = self.carry(NewStream {
            ticket,
            node,
            opening: Opening::Accept(id),
            anchor: Anchor::Called { cookie: own.cookie },
            addresses: &between,
            uid,
            whose: Whose::Listeners {
                cookie: listener,
                uid,
            },
            connect,
        });
        carried.map_err(|error| {
            debug!(node, "no stream: {error}");
            Refusal::Limit
        })?;
        let fabric = self.fabric.as_mut().ok_or(Refusal::Policy)?;
        fabric.call_from(ticket, own.local);
        let call = Call {
            id,
            step: Step::Dialling,
            end: Instant::now() + DIAL,
            local: own.local,
            destination,
            uid,
            listener,
            early: None,
        };
        fabric.calls.insert(ticket, call);
        self.agenda.after(DIAL, Due::Call(ticket));
        self.have_called(ticket, uid, own.socket, destination);
        Ok(())
    }

    /// Has a program that listens called. All that watch its socket are woken in the time of who calls: so that is a look, and so
    /// is the end of a call that is not wanted any more. No call waits for another one.
    fn have_called(&mut self, ticket: u64, uid: u32, socket: OwnedFd, to: SocketAddr) {
        let owner = Owner {
            uid,
            connection: ticket | CALLS,
        };
        let mut socket = self.porters.closer(owner).foreign(socket);
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
                self.agenda.watch_for(socket.as_fd(), flags, token)
            }
            Err(error) => Err(error),
        };
        let id = call.id;
        match watched {
            Ok(()) => {
                call.step = Step::Dialled(socket);
                self.agenda.after(CALL, Due::Call(ticket));
            }
            Err(error) => {
                let why = self.give_up_call(ticket, error);
                self.refuse(id, why);
            }
        }
    }

    /// What a program has announced before it was known whose its connection is, is looked at now.
    pub(super) fn look_at_early(&mut self, early: Option<Early>) {
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
        let fabric = self.fabric.as_mut();
        let early = fabric.and_then(|fabric| fabric.release(ticket));
        self.look_at_early(early);
        match error {
            Errno::ECONNREFUSED => Refusal::NoListener,
            _ => Refusal::Limit,
        }
    }

    /// The kernel has made a connection to a program that listens, or has not.
    pub(super) fn on_call(&mut self, ticket: u64) {
        let fabric = self.fabric.as_mut();
        let Some(call) = fabric.and_then(|fabric| fabric.calls.get_mut(&ticket)) else {
            return;
        };
        let Step::Dialled(socket) = &call.step else {
            return;
        };
        self.agenda.unwatch(socket);
        let error = match getsockopt(&socket, sockopt::SocketError) {
            Ok(0) => None,
            Ok(error) => Some(Errno::from_raw(error)),
            Err(error) => Some(error),
        };
        if let Some(error) = error {
            let id = call.id;
            let why = self.give_up_call(ticket, error);
            return self.refuse(id, why);
        }
        call.note_made();
        let (uid, destination, local) = (call.uid, call.destination, call.local);
        // From port 0, which no connection has: for its own port the connection itself is found.
        let nowhere = SocketAddr::new(local.ip(), 0);
        let ask = self.rights.ask_at_home(destination, nowhere);
        let owner = Owner {
            uid,
            connection: ticket | CALLS,
        };
        self.porters.ask_quick(owner, move |carrier| {
            Some(Found::MadeTo {
                ticket,
                listener: ask.listener(carrier),
            })
        });
    }

    /// The kernel has said who listens where it has made a connection to.
    pub(super) fn on_made_to(&mut self, ticket: u64, listener: io::Result<Option<Listener>>) {
        let listener = self.would_get(listener);
        let fabric = self.fabric.as_mut();
        let Some(call) = fabric.and_then(|fabric| fabric.calls.get(&ticket)) else {
            return;
        };
        let id = call.id;
        if !Self::is_made(call, listener) {
            let why = self.give_up_call(ticket, Errno::ECONNREFUSED);
            return self.refuse(id, why);
        }
        let Some(fabric) = &mut self.fabric else {
            return;
        };
        let Some(Call {
            step: Step::Made(socket),
            local,
            destination,
            early,
            ..
        }) = fabric.calls.remove(&ticket)
        else {
            return;
        };
        if let Some(carried) = fabric.carried.get_mut(&ticket) {
            carried.connect = None;
            let stream = carried.stream.clone();
            fabric.command(Command::Accept { id, stream });
        }
        // As the program's socket has them.
        fabric.attach(ticket, socket, (destination, local));
        self.look_at_early(early);
    }

    /// Was a connection made to the program that it was meant for? The socket that would have got it listened still when it was made, so
    /// nobody else has taken its place meanwhile.
    fn is_made(call: &Call, listener: Option<WouldGet>) -> bool {
        listener.is_some_and(|now| {
            // Of several sockets that share the port, another one may get the next connection.
            now.listener == call.listener || Rights::may_have_promised(now.uid, call.uid)
        })
    }

    /// A program that listens has had its time: its backlog is full, unless it was this thread that had no time meanwhile.
    pub(super) fn on_call_due(&mut self, ticket: u64) {
        let fabric = self.fabric.as_ref();
        let Some(call) = fabric.and_then(|fabric| fabric.calls.get(&ticket)) else {
            return;
        };
        let id = call.id;
        match &call.step {
            Step::Dialled(socket) if can_be_written(socket.as_fd()) => {
                return self.on_call(ticket);
            }
            Step::Dialled(socket) => self.agenda.unwatch(socket),
            // The kernel is asked: that is not the program's fault.
            Step::Made(_) if Instant::now() < call.end => return,
            Step::Dialling | Step::Made(_) => {}
        }
        let why = self.give_up_call(ticket, Errno::ETIMEDOUT);
        self.refuse(id, why);
    }

    /// The tenant that would get a connection which the kernel would give to this socket; `None` when that is no tenant.
    fn would_get(&mut self, listener: io::Result<Option<Listener>>) -> Option<WouldGet> {
        let socket: Listener = match listener {
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
            self.listens_no_more(holder);
        }
        None
    }

    /// A tenant listens no more on a socket that it was found to listen on. It says so when it listens again.
    fn listens_no_more(&mut self, holder: Listening) {
        let (tenant, cookie) = (holder.tenant, holder.held.cookie);
        let fabric = self.fabric.as_mut();
        if fabric.is_some_and(|fabric| fabric.listening.remove(cookie, tenant)) {
            self.listens_less(tenant, 1);
        }
    }

    /// A tenant asks whose connection it has: one that it has accepted, or got from another program.
    pub(super) fn on_whois(&mut self, id: TenantId, question: Between) -> Result<(), End> {
        if addresses(&question).is_none_or(|names| self.carried_between(names).is_none()) {
            return self.tell_who(id, question, Err(NotHeld::Socket));
        }
        let names = addresses(&question);
        let ask = names.map(|(local, peer)| self.rights.ask_at_home(local, peer));
        let socket = (question.fd, 0);
        self.have_looked_at(id, Errand::Whois(question), socket, false, ask);
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
        let found = held.ok().zip(addresses(&question));
        let found = found.and_then(|(held, names)| {
            let (ticket, carried) = self.carried_between(names)?;
            let (Anchor::Called { cookie } | Anchor::Attached { cookie, .. }) = carried.anchor
            else {
                return None;
            };
            let is_its = Rights::is_between(held, held.located?, cookie);
            is_its.then_some((ticket, carried))
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
            // Who has accepted it asks before a byte is said.
            let uid = self.connections.get(id).map(|asker| asker.peer.uid);
            if let (Some(fabric), Some(uid)) = (&mut self.fabric, uid) {
                fabric.is_for(ticket, id, uid);
            }
        }
        self.send(id, Message::new(kind::CALLER, &answer).into())
    }
}

/// Is a connection made, or has it failed?
fn can_be_written(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::POLLOUT)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
}
