//! Streams: made, handed out, found again, given back.

use std::cmp::Reverse;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdsock_node::stream::NodeStream;
use rdsock_shm::control::{Lookup, Message, Promote, Request, kind};
use rdsock_shm::layout::DATA_OFFSET;
use rdsock_shm::reason::Reason;
use tracing::{debug, warn};

use crate::book::{self, Announced, Conn, Route, TenantId, order};
use crate::channel::Outgoing;
use crate::connections::End;
use crate::daemon::{Daemon, Due};
use crate::fabric::octets;
use crate::memory::{DirectionView, HugePages, StreamFds, make_stream, rounded};
use crate::process::socket_inode;

/// Looks at an abandoned stream whose socket somebody still holds: soon at first, then seldom.
const FIRST_LOOK: Duration = Duration::from_millis(50);
const LAST_LOOK: Duration = Duration::from_secs(30);

/// A stream's memory and what is needed to hand it out again.
#[derive(Debug)]
pub(crate) struct Memory {
    stream: Rc<OwnedFd>,
    ends: [Rc<OwnedFd>; 2],
    /// The bell boards of the tenants that announced the two ends.
    bells: [Rc<OwnedFd>; 2],
    ring_size: u64,
    /// Made of huge pages.
    pub huge: bool,
    /// Where the other end is, when that is on another node.
    pub elsewhere: Option<Elsewhere>,
}

/// The other end of a stream, on another node. On this host, the daemon stands for it.
#[derive(Debug)]
pub(crate) struct Elsewhere {
    /// The node.
    pub node: u16,
    /// Which end the program is.
    pub end: usize,
    /// From where to where the program that connected went.
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// The data path's.
    pub stream: Arc<NodeStream>,
}

impl Elsewhere {
    /// What the program is told of its own address.
    pub fn local(&self) -> SocketAddr {
        match self.end {
            0 => self.source,
            _ => self.destination,
        }
    }

    /// What the program is told of its peer's address.
    pub fn peer(&self) -> SocketAddr {
        match self.end {
            0 => self.destination,
            _ => self.source,
        }
    }
}

impl Memory {
    /// An end is handed to another tenant, with this bell board.
    pub fn hand_anew(&mut self, end: usize, bells: Rc<OwnedFd>) {
        if let Some(place) = self.bells.get_mut(end) {
            *place = bells;
        }
    }

    pub fn new(
        fds: StreamFds,
        bells: [Rc<OwnedFd>; 2],
        ring_size: u64,
        elsewhere: Option<Elsewhere>,
    ) -> Self {
        Memory {
            stream: Rc::new(fds.stream),
            ends: fds.ends.map(Rc::new),
            bells,
            ring_size,
            huge: fds.huge,
            elsewhere,
        }
    }

    /// Both directions, as the ends have left them.
    pub fn directions(&self) -> io::Result<[DirectionView; 2]> {
        DirectionView::read_both(&self.stream)
    }
}

/// Whether huge pages can be had, looked up now and then and warned of once.
#[derive(Debug, Default)]
pub(crate) struct HugeSupply {
    dry_until: Option<Instant>,
    warned: bool,
}

impl HugeSupply {
    const PAUSE: Duration = Duration::from_secs(1);

    fn wanted(&self, policy: HugePages, now: Instant) -> bool {
        policy != HugePages::Never && self.dry_until.is_none_or(|until| now >= until)
    }

    fn none_left(&mut self, policy: HugePages, now: Instant) {
        self.dry_until = Some(now + Self::PAUSE);
        if !std::mem::replace(&mut self.warned, true) || policy == HugePages::Always {
            warn!(
                "no huge pages for a stream: ordinary pages are used, which costs a little speed; \
                 reserve some with `sysctl vm.nr_hugepages=N`, or set huge_pages = \"never\""
            );
        }
    }
}

impl Daemon {
    /// Makes the stream of two ends that were found to hold the same connection.
    pub(crate) fn make(&mut self, a: Announced, b: Announced) -> Result<(), Reason> {
        let ends = order(a, b).ok_or(Reason::Foreign)?;
        let ring_size = self.config.ring_size;
        let account = self.book.account(ends[0].uid);
        let bytes = rounded(ring_size, 4096);
        if account.streams >= self.config.max_streams_per_user
            || account.bytes.saturating_add(bytes) > self.config.max_bytes_per_user
            || !self.has_stream_descriptors()
        {
            let cause = "a limit of its user is reached: streams stay on the kernel";
            self.log_refusal(cause, ends[0].uid, 0);
            return Err(Reason::Limit);
        }
        let mut bells = Vec::new();
        for end in &ends {
            bells.push(
                self.tenant(end.conn.tenant)
                    .ok_or(Reason::Unverified)?
                    .bells
                    .clone(),
            );
        }
        let Ok(bells) = <[Rc<OwnedFd>; 2]>::try_from(bells) else {
            return Err(Reason::Unverified);
        };
        let id = self.next_stream;
        let (policy, now) = (self.config.huge_pages, Instant::now());
        let try_huge = self.huge.wanted(policy, now);
        let fds = make_stream(id, ring_size, try_huge).map_err(|error| {
            self.log_fault("can't make a stream's memory", ends[0].uid, &error);
            Reason::NoMemory
        })?;
        if try_huge && !fds.huge {
            self.huge.none_left(policy, now);
        }
        self.next_stream += 1;
        self.counters.streams_opened += 1;
        self.counters.streams_huge += u64::from(fds.huge);
        debug!(stream = id, route = ?ends[0].route, "opened");
        let bytes = fds.bytes;
        self.book
            .open(id, ends, bytes, Memory::new(fds, bells, ring_size, None));
        Ok(())
    }

    /// Sends both tenants their end of the stream that was just made.
    pub(crate) fn hand_out(&mut self, served: Announced, other: Announced) -> Result<(), End> {
        if let Some(message) = self.promotion(other.conn) {
            if other.conn.tenant == served.conn.tenant {
                self.send(other.conn.tenant, message)?;
            } else {
                self.send_to_other(other.conn.tenant, message);
            }
        }
        match self.promotion(served.conn) {
            Some(message) => self.send(served.conn.tenant, message),
            None => Ok(()),
        }
    }

    /// The PROMOTE message for a connection that holds an end.
    pub(crate) fn promotion(&self, conn: Conn) -> Option<Outgoing> {
        let (stream_id, end) = self.book.seat_of(conn)?;
        let memory = &self.book.stream(stream_id)?.memory;
        let elsewhere = memory.elsewhere.as_ref();
        let words = |address: SocketAddr| (octets(address.ip()), u32::from(address.port()));
        let (local, local_port) = elsewhere
            .map(Elsewhere::local)
            .map(words)
            .unwrap_or_default();
        let (peer, peer_port) = elsewhere
            .map(Elsewhere::peer)
            .map(words)
            .unwrap_or_default();
        let promote = Promote {
            conn: conn.number,
            generation: conn.generation,
            stream_id,
            ring_size: memory.ring_size,
            data_offset: DATA_OFFSET,
            end: end as u32,
            huge: memory.huge.into(),
            local,
            peer,
            local_port,
            peer_port,
            node: elsewhere.map_or(0, |elsewhere| elsewhere.node.into()),
            reserved: 0,
        };
        let fds = [
            &memory.stream,
            memory.ends.get(end)?,
            memory.bells.get(1 - end)?,
        ];
        Some(Outgoing {
            bytes: Message::new(kind::PROMOTE, &promote).as_bytes().to_vec(),
            fds: fds.map(Rc::clone).to_vec(),
        })
    }

    /// A process asks whether a socket that it inherited is a stream.
    pub(crate) fn on_lookup(&mut self, id: TenantId, lookup: Lookup) -> Result<(), End> {
        let conn = Conn {
            tenant: id,
            number: lookup.conn,
            generation: lookup.generation,
        };
        let found = self.book.by_cookie(lookup.cookie);
        if let Some((stream, end)) = found
            && self.may_hold(id, lookup.fd, stream, end)
        {
            self.take_seat(conn, stream, end);
            self.note_mapped(stream);
            self.counters.inherited += 1;
            if let Some(message) = self.promotion(conn) {
                return self.send(id, message);
            }
        }
        self.send(id, Message::empty(kind::NOT_FOUND).into())
    }

    /// A process holds an end by inheritance.
    pub(crate) fn on_holds(&mut self, conn: Conn, request: &Request) {
        let (stream, end) = (request.stream_id, request.active as usize);
        if end > 1 || !self.may_hold(conn.tenant, request.fd, stream, end) {
            self.counters.unverified += 1;
            return;
        }
        self.take_seat(conn, stream, end);
    }

    fn take_seat(&mut self, conn: Conn, stream: u64, end: usize) {
        if self.book.seat_of(conn) == Some((stream, end)) {
            return;
        }
        // The new seat first, so that a stream that only moves is not found abandoned.
        let before = self.book.replace(conn);
        self.book.hold(stream, end, conn);
        if let Some(before) = before {
            self.check_stream(before);
        }
    }

    /// Does this tenant hold the socket of that end, and is it the user that announced it?
    fn may_hold(&self, id: TenantId, fd: i32, stream: u64, end: usize) -> bool {
        let (Some(connection), Some(stream)) =
            (self.connections.get(&id), self.book.stream(stream))
        else {
            return false;
        };
        let Some(end) = stream.ends.get(end) else {
            return false;
        };
        let same_process = end.pid == connection.peer.pid;
        (connection.peer.uid == end.uid || same_process)
            && socket_inode(connection.peer.pid, fd) == Some(end.inode)
            && self
                .socket_is(end.route, end.cookie)
                .is_none_or(|inode| inode == end.inode)
            && connection.peer.is_alive()
    }

    /// Inode of the socket with these addresses and this cookie; 0 when no process holds it.
    fn socket_is(&self, route: Route, cookie: u64) -> Option<u64> {
        let diag = self.namespaces.diag(route.netns)?;
        let found = diag.find(route.local, route.peer, cookie).ok()??;
        Some(found.inode)
    }

    /// A tenant gave up a connection.
    pub(crate) fn give_up(&mut self, conn: Conn) {
        if let Some(stream) = self.book.release(conn) {
            self.check_stream(stream);
        }
    }

    /// A tenant could not map its stream: the other end shall not wait for it.
    pub(crate) fn on_declined(&mut self, conn: Conn) {
        let Some((id, end)) = self.book.seat_of(conn) else {
            return self.give_up(conn);
        };
        let stream = self.book.stream(id);
        if stream.is_some_and(|stream| stream.memory.elsewhere.is_some()) {
            // The daemon carries what goes over its anchor.
            return self.give_up(conn);
        }
        let others: Vec<Conn> = self
            .book
            .stream(id)
            .and_then(|stream| stream.ends.get(1 - end))
            .map(|end| end.holders.iter().map(|holder| holder.conn).collect())
            .unwrap_or_default();
        self.close_stream(id);
        for other in others.into_iter().filter(|other| *other != conn) {
            self.send_to_other(other.tenant, Self::verdict(other, Reason::PeerDemoted));
        }
    }

    /// A holder of a stream is gone. Gives it back when it was the last, unless a process that the daemon does not know (a child
    /// that has not attached, a program between exec and attach) still holds one of its sockets.
    pub(crate) fn check_stream(&mut self, id: u64) {
        let (true, kept) = self.is_kept(id) else {
            return;
        };
        if !kept {
            self.close_stream(id);
        } else if self.looked_after.insert(id) {
            self.due
                .push(Reverse((Instant::now() + FIRST_LOOK, Due::Stream(id, 1))));
        }
    }

    /// An abandoned stream was kept: looks again, less and less often.
    pub(crate) fn look_again(&mut self, id: u64, times: u32) {
        self.looked_after.remove(&id);
        let (true, kept) = self.is_kept(id) else {
            return;
        };
        if !kept {
            return self.close_stream(id);
        }
        let wait = LAST_LOOK.min(FIRST_LOOK * 2u32.saturating_pow(times.min(16)));
        self.looked_after.insert(id);
        self.due
            .push(Reverse((Instant::now() + wait, Due::Stream(id, times + 1))));
    }

    /// Is this stream abandoned, and if so, does somebody hold one of its sockets?
    fn is_kept(&self, id: u64) -> (bool, bool) {
        match self.book.stream(id) {
            Some(stream) if stream.is_abandoned() => {
                let held =
                    |end: &book::End| self.socket_is(end.route, end.cookie) == Some(end.inode);
                let kept = match &stream.memory.elsewhere {
                    // The other one is the daemon's.
                    Some(elsewhere) => stream.ends.get(elsewhere.end).is_some_and(held),
                    None => stream.ends.iter().any(held),
                };
                (true, kept)
            }
            _ => (false, false),
        }
    }

    fn close_stream(&mut self, id: u64) {
        if self.is_carried(id) {
            // Its anchor tells the poll core how it ended, and it is closed when the other node knows.
            return;
        }
        if self.book.close(id).is_some() {
            self.counters.streams_closed += 1;
            debug!(stream = id, "closed");
        }
    }
}
