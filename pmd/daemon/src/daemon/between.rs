//! Programs that connect to other nodes: who may, where they make their anchors (`anchors.rs` takes these), and how their ends are promoted.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rdsock_node::memory::Board;
use rdsock_node::{Command, Notice, Opening};
use rdsock_proto::{Addresses, Refusal};
use rdsock_shm::control::{Between, Message, Reached, kind};
use rdsock_shm::reason::Reason;
use tracing::{debug, info, warn};

use super::streams::gives_back;
use super::{Daemon, End};
use crate::accounts::{Charge, Over, Thing};
use crate::agenda::Due;
use crate::book::{Announced, Conn, Role, Route, TenantId};
use crate::config::Config;
use crate::fabric::{Anchor, Asking, Carried, NodeConfig, Whose, addresses, follow, octets};
use crate::found::Errand;
use crate::memory::{TenantMap, make_stream_with, pipes_for};
use crate::rights::{Held, NotHeld, Rights};
use crate::streams::{Elsewhere, Memory};
use serde_json::{Value, json};

/// Time for a program to make its anchor, once it was told where.
const ANCHOR: Duration = Duration::from_secs(10);
/// Descriptors of a stream to another node: its memory, and that once more for models that are linked, an end page, and its anchor;
/// beside those that keep its pages.
const STREAM_DESCRIPTORS: u64 = 4;
/// In place of a tenant: the daemon itself.
const DAEMON: u64 = 0;

/// A stream to another node that is to be made.
pub(super) struct NewStream<'a> {
    pub(super) ticket: u64,
    pub(super) node: u16,
    pub(super) opening: Opening,
    pub(super) anchor: Anchor,
    pub(super) addresses: &'a Addresses,
    /// On whose account.
    pub(super) uid: u32,
    /// Whose programs may be given it.
    pub(super) whose: Whose,
    /// What that user has paid for the connect.
    pub(super) connect: Charge,
}

/// Why a stream to another node was not made.
#[derive(Debug, thiserror::Error)]
pub(super) enum CarryError {
    /// A limit is reached.
    #[error(transparent)]
    Over(#[from] Over),
    /// The data path has no room, or there is none.
    #[error("the data path has no room")]
    Full,
    /// Its memory, or the thread that serves its anchor, could not be made.
    #[error("the system has no memory or thread for it: {0}")]
    System(#[from] io::Error),
}

impl Daemon {
    /// The poll core has something to say. Whoever answers what it hears with the next question has to wait for others.
    pub(super) fn on_fabric(&mut self) {
        let mut portion = self.portion();
        while portion.has_room()
            && let Some(notice) = self.fabric.as_mut().and_then(|fabric| fabric.notice())
        {
            self.on_notice(notice);
        }
        self.close_device_if_given_back();
    }

    /// The device is closed when it is to be given back and the last stream has gone.
    pub(super) fn close_device_if_given_back(&mut self) {
        if self
            .fabric
            .as_ref()
            .is_some_and(|fabric| fabric.is_given_back())
        {
            self.close_device();
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
            Notice::NoNews => {}
            Notice::DeviceFailed => {
                if let Some(fabric) = &mut self.fabric {
                    fabric.fail();
                }
            }
        }
    }

    /// The device is being unbound or taken out, and the system waits until it is closed: all streams to other nodes
    /// end, and it is closed. What is on the kernel, or goes to this host, stays as it is.
    pub(super) fn on_wanted_back(&mut self) {
        if self
            .fabric
            .as_mut()
            .is_some_and(|fabric| fabric.give_back())
        {
            self.close_device();
        }
    }

    fn close_device(&mut self) {
        self.forget_all_listeners();
        if let Some(fabric) = self.fabric.take() {
            fabric.into_doors(&self.agenda).shut(&self.starter);
        }
        warn!(
            "the device is closed, since the system wants it back; restart rdsockd when there is one again"
        );
    }

    /// Writes the networks of other nodes into a tenant's memory.
    pub(super) fn tell_routes(&self, map: &TenantMap) {
        if self.fabric.is_some()
            && let Some(config) = &self.config.fabric
        {
            map.routes().set(&config.networks());
        }
    }

    pub(super) fn tell_all_routes(&self) {
        for (_, _, tenant) in self.connections.attached() {
            self.tell_routes(&tenant.map);
        }
    }

    pub(super) fn reload_fabric(&self, config: &mut Config) {
        config.fabric = follow(self.config.fabric.as_ref(), config.fabric.take());
    }

    /// The fabric, for `rdsock stat`. A device that was given back is one that does not work.
    pub(super) fn fabric_answer(&self) -> Option<Value> {
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
    pub(super) fn nodes_answer(&self) -> Vec<Value> {
        let Some(config) = &self.config.fabric else {
            return Vec::new();
        };
        let up = |node| {
            let fabric = self.fabric.as_ref();
            fabric.is_some_and(|fabric| fabric.is_up(node))
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

    /// Nothing touches a stream's memory any more.
    fn on_released(&mut self, ticket: u64) {
        let Some(fabric) = &mut self.fabric else {
            return;
        };
        let early = fabric.release(ticket);
        if let Some(stream) = self.streams.close(ticket) {
            self.journal.counters.streams_closed += 1;
            self.give_back(stream);
        }
        self.look_at_early(early);
    }

    /// True for a stream to another node that is not released.
    pub(super) fn is_carried(&self, ticket: u64) -> bool {
        let fabric = self.fabric.as_ref();
        fabric.is_some_and(|fabric| fabric.carried.contains_key(&ticket))
    }

    /// A stream whose program was told where to make its anchor has had its time.
    pub(super) fn on_anchor_due(&mut self, ticket: u64) {
        if let Some(fabric) = &mut self.fabric
            && let Some(carried) = fabric.carried.get(&ticket)
            && matches!(carried.anchor, Anchor::Promised { .. })
        {
            fabric.abandon(ticket);
        }
    }

    /// Makes a stream to a node, on the account of a user.
    pub(super) fn carry(&mut self, new: NewStream) -> Result<(), CarryError> {
        let NewStream {
            ticket,
            node,
            opening,
            anchor,
            addresses,
            uid,
            whose,
            connect,
        } = new;
        let config = self.config.fabric.as_ref().ok_or(CarryError::Full)?;
        let ring_size = config.ring_size;
        let bytes = rdsock_node::memory::stream_bytes(ring_size);
        let wanted = [
            (Thing::Streams, 1),
            (Thing::Carried, 1),
            (Thing::Bytes, bytes),
            (Thing::Descriptors, STREAM_DESCRIPTORS + pipes_for(bytes)),
        ];
        let charge = self.accounts.charge(uid, &wanted);
        let charge = charge.inspect_err(|over| {
            self.journal.refusal(over.cause(), uid, 0);
        })?;
        let charge = Arc::new(charge);
        if matches!(opening, Opening::Accept(_)) {
            self.leave_room(uid)?;
        }
        let fabric = self.fabric.as_mut().ok_or(CarryError::Full)?;
        let accounts = &mut self.accounts;
        let of_thread = [(Thing::Descriptors, rdsock_node::DESCRIPTORS)];
        let pay = || Ok::<_, CarryError>(accounts.charge(uid, &of_thread)?);
        let berth = fabric.berth(node, opening, uid, pay)?;
        let berth = berth.ok_or(CarryError::Full)?;
        let place = match opening {
            Opening::Connect => Some(fabric.place_at(node, berth.core(), uid)),
            Opening::Accept(_) => None,
        };
        let place = place.transpose().inspect_err(|over| {
            self.journal.refusal(over.cause(), uid, 0);
        })?;
        let end = match opening {
            Opening::Connect => 0,
            Opening::Accept(_) => 1,
        };
        let paid = charge.clone();
        let (fds, kept) = make_stream_with(ticket, ring_size, bytes, end, paid)?;
        let made = fabric
            .stream(ticket, node, opening, berth, &fds, kept)
            .map_err(|error| {
                let error = io::Error::other(error);
                let what = "the device can't be given a stream's memory, so it stays on the kernel";
                self.journal.fault(what, uid, &error);
                error
            })?;
        let stream = made.ok_or(CarryError::Full)?;
        let address = |ip: Ipv6Addr, port| SocketAddr::new(IpAddr::V6(ip).to_canonical(), port);
        fabric.carried.insert(
            ticket,
            Carried {
                stream,
                fds: Some(fds),
                mapped: false,
                source: address(addresses.source, addresses.source_port),
                destination: address(addresses.destination, addresses.destination_port),
                anchor,
                whose,
                looked_at: false,
                charge,
                connect: Some(connect),
                _place: place,
            },
        );
        Ok(())
    }

    /// A user pays for a connect to another node or from there, for as long as it is under way.
    pub(super) fn charge_connect(&mut self, uid: u32) -> Result<Charge, Over> {
        let connect = self.accounts.charge(uid, &[(Thing::Connects, 1)]);
        connect.inspect_err(|over| {
            self.journal.refusal(over.cause(), uid, 0);
        })
    }

    /// Another node asks for something on the account of a user who has no say in that: a quarter of what the user may have
    /// is left for the user itself.
    pub(super) fn leave_room(&mut self, uid: u32) -> Result<(), Over> {
        let room =
            [Thing::Descriptors, Thing::Connects].map(|thing| match self.accounts.of(uid, thing) {
                // Who may have one only gets it.
                0 | 1 => (thing, 0),
                taken => (thing, taken.div_ceil(3)),
            });
        self.accounts.charge(uid, &room).map(drop)
    }

    /// A tenant has gone: what it was promised is not kept, so that its programs see a reset at once.
    pub(super) fn forget_promises(&mut self, id: TenantId) {
        if let Some(fabric) = &mut self.fabric {
            for ticket in fabric.promised_tenant(id, None) {
                fabric.abandon(ticket);
            }
        }
    }

    /// A tenant asks whether a connect may go over the fabric. A porter looks at the socket first: a stream is promised to
    /// this very one, and to who the tenant was when it asked.
    pub(super) fn on_reach(&mut self, id: TenantId, question: Between) -> Result<(), End> {
        self.journal.counters.reaches += 1;
        let socket = (question.fd, 0);
        self.have_looked_at(id, Errand::Reach(question), socket, false, None);
        Ok(())
    }

    /// A porter has looked at the socket with which a tenant wants to reach another node.
    pub(super) fn reach(&mut self, id: TenantId, question: Between, held: Result<Held, NotHeld>) {
        let reached = held
            .map_err(|_| Reason::Unverified)
            .and_then(|held| Ok((self.try_reach(id, &question)?, held)));
        match reached {
            Ok((ticket, held)) => {
                let asking = Asking {
                    tenant: id,
                    question,
                    held,
                };
                if let Some(fabric) = &mut self.fabric {
                    fabric.asking.insert(ticket, asking);
                }
            }
            Err(reason) => {
                debug!(tenant = id, "not over the fabric: {}", reason.text());
                self.decline(id, &question, reason);
            }
        }
    }

    fn try_reach(&mut self, id: TenantId, question: &Between) -> Result<u64, Reason> {
        let (Some(fabric), Some(config)) = (&self.fabric, &self.config.fabric) else {
            return Err(Reason::NoDevice);
        };
        let (local, peer) = addresses(question).ok_or(Reason::Unverified)?;
        let tenant = self.connections.tenant(id).ok_or(Reason::Unverified)?;
        let uid = tenant.passport.peer.uid;
        if fabric.has_failed() {
            return Err(Reason::NoDevice);
        }
        if !self.rights.namespaces.is_home(question.netns) {
            return Err(Reason::OtherNamespace);
        }
        if !self.config.policy.allows_ports(local.port(), peer.port()) {
            return Err(Reason::Policy);
        }
        let node = config.node_of(peer.ip()).map(|node| node.id);
        let node = node.filter(|node| *node != config.node && fabric.is_up(*node));
        let node = node.ok_or(Reason::NodeAbsent)?;
        let source = if local.ip().is_unspecified() {
            config.own_address(peer.ip()).ok_or(Reason::NodeAbsent)?
        } else {
            local.ip()
        };
        // The other node's program would see two connections with the same addresses. Whether there may be one is the kernel's to say.
        let way = (SocketAddr::new(source, local.port()), peer);
        if fabric.connected.contains(&way) {
            return Err(Reason::Taken);
        }
        let mapped = |ip: IpAddr| Ipv6Addr::from(octets(ip));
        let addresses = Addresses {
            source: mapped(source),
            source_port: local.port(),
            destination: mapped(peer.ip()),
            destination_port: peer.port(),
        };
        let connect = self.charge_connect(uid).map_err(|_| Reason::Limit)?;
        let ticket = self.streams.number();
        let carried = self.carry(NewStream {
            ticket,
            node,
            opening: Opening::Connect,
            anchor: Anchor::Asked,
            addresses: &addresses,
            uid,
            whose: Whose::User(uid),
            connect,
        });
        carried.map_err(|error| {
            debug!(tenant = id, "no stream: {error}");
            Reason::Limit
        })?;
        let Some(fabric) = &mut self.fabric else {
            return Err(Reason::NoDevice);
        };
        fabric.connected.insert(way);
        if let Some(carried) = fabric.carried.get(&ticket) {
            let stream = carried.stream.clone();
            fabric.command(Command::Connect { stream, addresses });
        }
        Ok(ticket)
    }

    fn decline(&mut self, id: TenantId, question: &Between, reason: Reason) {
        self.journal.counters.not_reached += 1;
        let answer = Reached {
            question: question.question,
            ticket: 0,
            anchor: [0; 16],
            local: [0; 16],
            anchor_port: 0,
            reason: reason as u32,
        };
        self.send_to_other(id, Message::new(kind::REACHED, &answer).into());
    }

    /// The other node has accepted: the program may make its anchor.
    fn on_established(&mut self, ticket: u64) {
        let Some(fabric) = &mut self.fabric else {
            return;
        };
        let (Some(asking), Some(carried)) =
            (fabric.asking.remove(&ticket), fabric.carried.get(&ticket))
        else {
            return;
        };
        let source = carried.source;
        let (id, question) = (asking.tenant, asking.question);
        let uid = self.connections.get(id).map(|asker| asker.peer.uid);
        let (Some(listener), Some((local, _)), Some(uid)) =
            (fabric.anchors_for(source), addresses(&question), uid)
        else {
            fabric.abandon(ticket);
            return self.decline(id, &question, Reason::NoDevice);
        };
        // From where the kernel will connect the program's socket.
        let from = match local.ip() {
            ip if !ip.is_unspecified() => ip,
            _ if listener.is_ipv4() => IpAddr::V4(Ipv4Addr::LOCALHOST),
            _ => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        let from = SocketAddr::new(from, local.port());
        // What it was promised before for this address it has given up.
        for earlier in fabric.promised_tenant(id, Some(from)) {
            fabric.abandon(earlier);
        }
        if !fabric.has_room_at(from) {
            fabric.abandon(ticket);
            return self.decline(id, &question, Reason::Limit);
        }
        let anchor = Anchor::Promised {
            from,
            tenant: id,
            uid,
            held: asking.held,
        };
        fabric.promise(ticket, anchor);
        let answer = Reached {
            question: question.question,
            ticket,
            anchor: octets(listener.ip()),
            local: octets(source.ip()),
            anchor_port: listener.port().into(),
            reason: 0,
        };
        self.journal.counters.reached += 1;
        self.agenda.after(ANCHOR, Due::Anchor(ticket));
        self.send_to_other(id, Message::new(kind::REACHED, &answer).into());
    }

    /// The other node has not accepted.
    fn on_refused(&mut self, ticket: u64, why: Refusal) {
        let asking = self
            .fabric
            .as_mut()
            .and_then(|fabric| fabric.asking.remove(&ticket));
        if let Some(asking) = asking {
            let reason = match why {
                Refusal::NoListener => Reason::NoListener,
                Refusal::Limit | Refusal::Policy => Reason::NodeRefused,
                Refusal::Timeout | Refusal::Lost => Reason::NodeAbsent,
            };
            debug!(tenant = asking.tenant, ?why, "not over the fabric");
            self.decline(asking.tenant, &asking.question, reason);
        }
    }

    /// A tenant was found to hold a connection that it says is a stream to another node.
    pub(super) fn on_carried_announced(
        &mut self,
        announced: Announced,
        ticket: u64,
        held: Held,
    ) -> Result<(), End> {
        let conn = announced.conn;
        if held.shared {
            return self.turn_down(conn, Reason::Shared);
        }
        match self.try_promote(announced, ticket) {
            Ok(()) => match self.promotion(conn) {
                Some(message) => self.send(conn.tenant, message),
                None => Ok(()),
            },
            Err(reason) => self.turn_down(conn, reason),
        }
    }

    fn try_promote(&mut self, announced: Announced, ticket: u64) -> Result<(), Reason> {
        let tenant = self.connections.tenant(announced.conn.tenant);
        let tenant = tenant.ok_or(Reason::Unverified)?;
        // Without them it gets a wake byte each time.
        let own_board = tenant.may_be_rung.then(|| {
            let bells = &tenant.bells;
            Board::new(bells, Box::new(bells.clone()))
        });
        let own_board = own_board.transpose().map_err(|_| Reason::NoMemory)?;
        let fabric = self.fabric.as_mut().ok_or(Reason::NoDevice)?;
        let carried = fabric.carried.get(&ticket).ok_or(Reason::Unverified)?;
        let Route { local, peer, netns } = announced.route;
        let (cookie, inode) = match carried.anchor {
            Anchor::Attached {
                names,
                cookie,
                inode,
            } if names == (local, peer) && Rights::leads_to(&announced, cookie) => (cookie, inode),
            _ => return Err(Reason::Unverified),
        };
        if !fabric.is_for(ticket, announced.conn.tenant, announced.uid) {
            return Err(Reason::Foreign);
        }
        let carried = fabric.carried.get_mut(&ticket).ok_or(Reason::Unverified)?;
        let fds = carried.fds.take();
        if fds.is_none() && carried.mapped {
            // Somebody has the stream of this very socket.
            return Err(Reason::Shared);
        }
        let stream = carried.stream.clone();
        stream.set_board(own_board);
        let elsewhere = Elsewhere {
            node: stream.node,
            end: stream.end,
            source: carried.source,
            destination: carried.destination,
            stream: stream.clone(),
        };
        let ours = Announced {
            conn: Conn {
                tenant: DAEMON,
                number: ticket as u32,
                generation: 0,
            },
            fd: -1,
            pid: std::process::id() as i32,
            uid: announced.uid,
            cookie,
            inode,
            seen: announced.seen,
            route: Route {
                netns,
                local: peer,
                peer: local,
            },
            role: Role::Unknown,
            other_end: None,
            times: None,
        };
        let ends = match stream.end {
            0 => [announced, ours],
            _ => [ours, announced],
        };
        match fds {
            Some(fds) => {
                let bytes = fds.bytes;
                let ring_size = stream.memory.ring_size();
                // The poll core alone rings the tenant's bells.
                let closer = self.porters.closer(gives_back(ends[0].uid));
                let pays = (carried.charge.clone(), &closer);
                let memory = Memory::new(fds, [None, None], ring_size, pays, Some(elsewhere));
                self.journal.counters.streams_opened += 1;
                self.streams.open(ticket, ends, bytes, memory);
            }
            // Who was handed it has forked before it came to that: this is the child.
            None => {
                let before = self.streams.close(ticket).ok_or(Reason::Shared)?;
                self.streams.open(ticket, ends, before.bytes, before.memory);
            }
        }
        // The daemon is no tenant that holds it.
        self.streams.release(ours.conn);
        Ok(())
    }

    /// A stream is not handed to anybody else from now on.
    pub(super) fn note_mapped(&mut self, ticket: u64) {
        let fabric = self.fabric.as_mut();
        if let Some(carried) = fabric.and_then(|fabric| fabric.carried.get_mut(&ticket)) {
            carried.mapped = true;
        }
    }

    /// A tenant has mapped the stream of a connection.
    pub(super) fn on_mapped(&mut self, conn: Conn) {
        if !self.streams.mapped(conn) {
            // It was said before: a poll core is told once.
            return;
        }
        let stream = self
            .streams
            .seat_of(conn)
            .and_then(|(id, _)| self.streams.get(id))
            .and_then(|stream| stream.memory.elsewhere.as_ref())
            .map(|elsewhere| elsewhere.stream.clone());
        if let Some(stream) = &stream {
            self.note_mapped(stream.ticket);
        }
        if let (Some(stream), Some(fabric)) = (stream, &mut self.fabric) {
            fabric.command(Command::Ready { stream });
        }
    }
}
