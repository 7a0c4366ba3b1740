//! The state machine: all sessions and streams of one node. See the crate's documentation for how
//! it is driven, and `docs/protocol.md` for the rules that it follows.
//!
//! This file holds what the daemon calls for its own side. [`inbound`] understands what peers
//! send, [`outbound`] makes actions, [`posts`] follows what is in flight, [`greeting`] begins, loses
//! and resumes sessions, [`restart`] carries streams over a restart of the daemon's worker.

mod greeting;
mod inbound;
mod outbound;
mod posts;
mod restart;

pub use posts::Status;
pub use restart::{Positions, Record};

use crate::action::EndReason;
use crate::config::Config;
use crate::counters::Counters;
use crate::id::{NodeId, Place, StreamId};
use crate::list::{Links, List};
use crate::message::{Cause, Refusal};
use crate::session::{Session, State};
use crate::stream::{Leave, Phase, Stream, tell, wire};
use crate::table::Table;
use std::net::Ipv6Addr;

/// From where to where a program connects. IPv4 as v4-mapped addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Address of the connecting program.
    pub source: Ipv6Addr,
    /// Its port.
    pub source_port: u16,
    /// The address that it connects to.
    pub destination: Ipv6Addr,
    /// Its port.
    pub destination_port: u16,
}

/// Why a call about a stream was not followed. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalError {
    /// The id means no stream (any more).
    Unknown,
    /// The stream is not in a state for this call.
    State,
    /// A position that goes back, or further than the ring allows: the program has written nonsense
    /// into its memory. The daemon should `reset` the stream.
    Position,
}

/// The protocol's state of one node.
pub struct Node {
    id: NodeId,
    epoch: u64,
    config: Config,
    table: Table,
    sessions: Vec<Session>,
    /// Streams of a session; streams with something to send; streams with something to tell;
    /// connects in the order of their deadlines.
    members: Links,
    ready: Links,
    telling: Links,
    asking: Links,
    tell_list: List,
    ask_list: List,
    /// Sessions with something to do.
    active: Links,
    active_list: List,
    /// No session has anything to do with the time before this, in ns.
    timer: u64,
    sweeps: u64,
    tags: u64,
}

impl Node {
    /// Node `id` in its `epoch`, which must not be 0 and must differ from all earlier ones of this
    /// node; it stays the same when only the daemon's worker restarts and its streams are given
    /// back with [`Node::restore`]. `seed` must differ at each start, also of a worker.
    pub fn new(id: NodeId, epoch: u64, seed: u64, config: Config) -> Self {
        assert!(
            epoch != 0 && config.window >= 4 && config.quantum > 0,
            "a usable configuration"
        );
        let streams = config.streams as usize;
        let nodes = usize::from(config.nodes);
        let mut node = Node {
            id,
            epoch,
            table: Table::new(config.streams, mix(seed) as u32),
            sessions: Vec::with_capacity(nodes),
            members: Links::new(streams),
            ready: Links::new(streams),
            telling: Links::new(streams),
            asking: Links::new(streams),
            tell_list: List::new(),
            ask_list: List::new(),
            active: Links::new(nodes),
            active_list: List::new(),
            timer: 0,
            sweeps: 0,
            tags: mix(seed ^ epoch),
            config,
        };
        for _ in 0..nodes {
            let tag = node.next_tag();
            let session = Session::new(node.config.window, node.config.pending, tag);
            node.sessions.push(session);
        }
        node
    }

    /// Asks `node` for a stream. `local` is where it may write; the stream's own sending ring has
    /// the same size. `Established` or `Refused` follows.
    ///
    /// # Errors
    /// The connection stays on kernel TCP: [`Refusal::Lost`] when there is no session with that
    /// node, [`Refusal::Limit`] when the table is full or too many connects are unanswered.
    pub fn connect(
        &mut self,
        node: NodeId,
        addresses: Addresses,
        local: Place,
        now: u64,
    ) -> Result<StreamId, Refusal> {
        let session = self.sessions.get(node.index()).ok_or(Refusal::Lost)?;
        if session.state != State::Live {
            return Err(Refusal::Lost);
        }
        if session.asking >= session.peer_pending {
            return Err(Refusal::Limit);
        }
        let mut stream = Stream::new(node, Phase::Connecting, addresses);
        (stream.named, stream.settled) = (session.tag, session.tag);
        stream.local = Some(local.checked().map_err(|_| Refusal::Limit)?);
        stream.wire = wire::CONNECT;
        stream.deadline = now.saturating_add(self.config.connect_timeout);
        let id = self.table.insert(stream).ok_or(Refusal::Limit)?;
        let session = &mut self.sessions[node.index()];
        session.asking += 1;
        self.members.push(&mut session.members, id.at());
        self.asking.push(&mut self.ask_list, id.at());
        self.touch(id.at());
        Ok(id)
    }

    /// Accepts an incoming stream; `local` is where the other node may write.
    ///
    /// # Errors
    /// [`LocalError::State`] when it is not waiting for an answer (any more: then `Ended` has come
    /// or comes); [`LocalError::Unknown`]; [`LocalError::Position`] for an impossible place.
    pub fn accept(&mut self, id: StreamId, local: Place) -> Result<(), LocalError> {
        let at = self.held(id)?;
        let stream = &mut self.table[at];
        if stream.phase != Phase::Offered || stream.ended.is_some() {
            return Err(LocalError::State);
        }
        stream.local = Some(local.checked().map_err(|_| LocalError::Position)?);
        stream.phase = Phase::Open;
        stream.wire |= wire::ACCEPT;
        self.touch(at);
        Ok(())
    }

    /// Refuses an incoming stream. Only `Released` follows.
    ///
    /// # Errors
    /// As [`Node::accept`].
    pub fn refuse(&mut self, id: StreamId, refusal: Refusal) -> Result<(), LocalError> {
        let at = self.held(id)?;
        let stream = &mut self.table[at];
        if stream.phase != Phase::Offered {
            return Err(LocalError::State);
        }
        stream.refusal = Some(refusal);
        self.let_go(at, Some(Cause::Program));
        Ok(())
    }

    /// Our program has written up to position `head`.
    ///
    /// # Errors
    /// [`LocalError::Position`] when that is less than before, or more than the ring holds;
    /// [`LocalError::State`] after `shut`; [`LocalError::Unknown`].
    pub fn advance_head(&mut self, id: StreamId, head: u64) -> Result<(), LocalError> {
        let at = self.held(id)?;
        let stream = &mut self.table[at];
        if stream.ended.is_some() {
            return Ok(());
        }
        let size = stream.local.map_or(0, |place| place.size());
        if head < stream.tx.head || head > stream.tx.done.saturating_add(size) {
            return Err(LocalError::Position);
        }
        if stream.phase != Phase::Open || (stream.tx.shut && head > stream.tx.head) {
            return Err(LocalError::State);
        }
        stream.tx.head = head;
        if stream.left && head > stream.tx.consumed {
            stream.end(EndReason::PeerReset);
        }
        self.touch(at);
        Ok(())
    }

    /// Our program has read up to position `consumed`.
    ///
    /// # Errors
    /// [`LocalError::Position`] when that is less than before, or more than the ring holds;
    /// [`LocalError::Unknown`].
    pub fn advance_consumed(&mut self, id: StreamId, consumed: u64) -> Result<(), LocalError> {
        let at = self.held(id)?;
        let stream = &mut self.table[at];
        let most = match (stream.local, stream.rx.end) {
            (_, Some(end)) => end,
            (Some(local), None) => stream.rx.consumed.saturating_add(local.size()),
            (None, None) => 0,
        };
        if consumed < stream.rx.consumed || consumed > most {
            return Err(LocalError::Position);
        }
        stream.rx.consumed = consumed;
        if stream.credit_is_due() {
            stream.wire |= wire::CREDIT;
        }
        self.touch(at);
        Ok(())
    }

    /// Says whether notifications are wanted (as they are at first), and up to which position our
    /// program has seen bytes: if there are more already, a notification comes at once.
    ///
    /// # Errors
    /// [`LocalError::Position`] for a position beyond the ring; [`LocalError::Unknown`].
    pub fn set_notify(&mut self, id: StreamId, notify: bool, seen: u64) -> Result<(), LocalError> {
        let at = self.held(id)?;
        let stream = &mut self.table[at];
        if seen > stream.granted() {
            return Err(LocalError::Position);
        }
        (stream.rx.notify, stream.rx.seen) = (notify, seen);
        stream.wire |= wire::CREDIT;
        self.touch(at);
        Ok(())
    }

    /// Our program has ended its direction, behind all bytes that were advanced.
    ///
    /// # Errors
    /// [`LocalError::Unknown`], [`LocalError::State`].
    pub fn shut(&mut self, id: StreamId) -> Result<(), LocalError> {
        let at = self.held(id)?;
        let stream = &mut self.table[at];
        if stream.phase != Phase::Open {
            return Err(LocalError::State);
        }
        stream.tx.shut = true;
        stream.wire |= wire::SHUT;
        self.touch(at);
        Ok(())
    }

    /// Our program has closed the stream having read all that it will, or has seen it end. Bytes
    /// that were advanced are still sent. Only `Resume` and `Released` follow.
    ///
    /// # Errors
    /// [`LocalError::Unknown`].
    pub fn close(&mut self, id: StreamId) -> Result<(), LocalError> {
        let at = self.held(id)?;
        self.let_go(at, None);
        Ok(())
    }

    /// Our program has closed the stream with unread bytes or so that the other end sees a reset, or has
    /// died. Bytes that were advanced are still sent, as far as the other end has room. Only `Resume`
    /// and `Released` follow.
    ///
    /// # Errors
    /// [`LocalError::Unknown`].
    pub fn abort(&mut self, id: StreamId) -> Result<(), LocalError> {
        let at = self.held(id)?;
        self.let_go(at, Some(Cause::Unread));
        Ok(())
    }

    /// Breaks the stream at once: our program, or its memory, makes no sense. Only `Resume` and
    /// `Released` follow.
    ///
    /// # Errors
    /// [`LocalError::Unknown`].
    pub fn reset(&mut self, id: StreamId) -> Result<(), LocalError> {
        let at = self.held(id)?;
        self.let_go(at, Some(Cause::Program));
        Ok(())
    }

    /// Answers `Resume`: bytes have arrived up to `head`, the stream's head word.
    ///
    /// # Errors
    /// [`LocalError::Position`] when that cannot be: the stream is being broken, and has to be
    /// closed if it was not yet; [`LocalError::State`] when it was not asked for (any more);
    /// [`LocalError::Unknown`].
    pub fn resume(&mut self, id: StreamId, head: u64) -> Result<(), LocalError> {
        let at = self.table.find(id).ok_or(LocalError::Unknown)?;
        let stream = &mut self.table[at];
        if !std::mem::take(&mut stream.resuming) {
            return Err(LocalError::State);
        }
        stream.wire |= wire::RESUME;
        let goes_on = head >= stream.rx.head.max(stream.rx.consumed);
        let possible = goes_on && stream.on_head(head).is_ok();
        if !possible {
            stream.want_leave(Some(Cause::Program));
        } else if stream.has_unread() {
            stream.want_leave(Some(Cause::Unread));
        }
        self.touch(at);
        if possible {
            Ok(())
        } else {
            Err(LocalError::Position)
        }
    }

    /// Streams in the table.
    pub fn streams(&self) -> usize {
        self.table.len()
    }

    /// Whether connects to `node` are possible now.
    pub fn is_up(&self, node: NodeId) -> bool {
        self.sessions
            .get(node.index())
            .is_some_and(|session| session.state == State::Live)
    }

    /// What went wrong with `node`. `None` for a node beyond the configured ones.
    pub fn counters(&self, node: NodeId) -> Option<&Counters> {
        self.sessions
            .get(node.index())
            .map(|session| &session.counters)
    }

    fn held(&self, id: StreamId) -> Result<usize, LocalError> {
        let at = self.table.find(id).ok_or(LocalError::Unknown)?;
        if self.table[at].held {
            Ok(at)
        } else {
            Err(LocalError::Unknown)
        }
    }

    /// The daemon uses the id no more; with a cause the stream is broken, else ended in order.
    fn let_go(&mut self, at: usize, cause: Option<Cause>) {
        let stream = &mut self.table[at];
        stream.held = false;
        stream.tell &= tell::RESUME;
        match stream.phase {
            Phase::Connecting => self.abandon(at),
            Phase::Offered if stream.left => {}
            Phase::Offered => {
                stream.phase = Phase::Refusing;
                stream.wire = wire::REFUSE;
            }
            Phase::Open => {
                if stream.is_live() {
                    stream.tx.shut = true;
                    (stream.rx.notify, stream.rx.seen) = (true, stream.rx.consumed);
                    stream.wire |= wire::CREDIT;
                }
                let unread = stream.has_unread() && !stream.left;
                stream.want_leave(cause.or(unread.then_some(Cause::Unread)));
            }
            Phase::Abandoned | Phase::Refusing | Phase::Over => {}
        }
        self.touch(at);
    }

    /// Gives a connect up. If the other node may have been asked, its answer has to be awaited.
    fn abandon(&mut self, at: usize) {
        self.asking.remove(&mut self.ask_list, at);
        let stream = &mut self.table[at];
        stream.held = false;
        stream.wire = 0;
        if stream.asked {
            stream.phase = Phase::Abandoned;
        } else {
            self.answered_to(at);
            self.over(at);
        }
    }

    /// A connect of this session is not unanswered any more.
    fn answered_to(&mut self, at: usize) {
        let stream = &self.table[at];
        let session = &mut self.sessions[stream.node.index()];
        if stream.named == session.tag {
            session.asking = session.asking.saturating_sub(1);
        }
    }

    /// A connect has failed.
    fn fail_connect(&mut self, at: usize, refusal: Refusal) {
        let stream = &mut self.table[at];
        stream.refusal = Some(refusal);
        stream.tell |= tell::REFUSED;
    }

    /// Nothing more is to be said about the stream by either side.
    fn over(&mut self, at: usize) {
        self.asking.remove(&mut self.ask_list, at);
        let stream = &mut self.table[at];
        stream.left = true;
        stream.leave = Leave::Done(None);
        stream.wire = 0;
    }

    /// To be called after each change of a stream: puts it into the lists where it belongs, and
    /// takes it out of its session when it is over.
    fn touch(&mut self, at: usize) {
        let stream = &mut self.table[at];
        if stream.phase == Phase::Over {
            return;
        }
        let session = &mut self.sessions[stream.node.index()];
        if !stream.held && stream.wire_over() && stream.in_flight == 0 {
            stream.phase = Phase::Over;
            stream.tell |= tell::RELEASED;
            session.theirs -= u32::from(stream.theirs);
            self.members.remove(&mut session.members, at);
            self.ready.remove(&mut session.ready, at);
        } else if stream.wire != 0 || stream.next_write(1, 1, u32::MAX).is_some() {
            self.ready.push(&mut session.ready, at);
            self.active.push(&mut self.active_list, stream.node.index());
        }
        if !stream.held {
            stream.tell &= tell::REFUSED | tell::RESUME | tell::RELEASED;
        }
        if stream.tell != 0 {
            self.telling.push(&mut self.tell_list, at);
        }
    }

    fn activate(&mut self, session: usize) {
        self.active.push(&mut self.active_list, session);
    }

    /// A tag that no earlier session had, in all likelihood; never 0.
    fn next_tag(&mut self) -> u32 {
        self.tags = self.tags.wrapping_add(1);
        (mix(self.tags) as u32).max(1)
    }
}

/// SplitMix64's output function.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
