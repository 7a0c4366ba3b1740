//! Messages that peers send. Nothing in them is believed: what contradicts our own state is counted,
//! and at most breaks a stream of the node that sent it.

use super::{Addresses, Node};
use crate::action::EndReason;
use crate::counters::Count;
use crate::id::{NodeId, Place, StreamId};
use crate::message::{Body, Cause, Message, Refusal};
use crate::session::{Offer, State};
use crate::stream::{Phase, Stream, tell, wire};
use std::net::Ipv6Addr;

impl Node {
    /// A message from `node` has come; `now` in ns.
    pub fn handle_message(&mut self, node: NodeId, bytes: &[u8], now: u64) {
        if node.index() >= self.sessions.len() || node == self.id {
            return;
        }
        let s = node.index();
        let understood = Message::decode(bytes).map_err(Count::from);
        if let Err(count) = understood.and_then(|message| self.follow(s, message, now)) {
            self.sessions[s].counters.add(count);
        }
    }

    fn follow(&mut self, s: usize, message: Message, now: u64) -> Result<(), Count> {
        if let Body::Hello {
            epoch,
            tag,
            pending,
        } = message.body
        {
            self.on_hello(s, message.session, epoch, tag, pending, now);
            return Ok(());
        }
        let session = &mut self.sessions[s];
        if message.session != session.tag {
            return Err(Count::StaleSession);
        }
        if session.state == State::Greeting {
            return Err(Count::NoSession);
        }
        session.heard = now;
        match message.body {
            Body::Hello { .. } | Body::Alive => Ok(()),
            Body::Offer {
                from,
                place,
                source_port,
                destination_port,
            } => {
                session.offer = Some(Offer {
                    from,
                    place,
                    source_port,
                    destination_port,
                });
                Ok(())
            }
            Body::Connect {
                from,
                source,
                destination,
            } => self.on_connect(s, from, source, destination),
            Body::Accept { to, from, place } => self.on_accept(s, to, from, place),
            Body::Refuse { to, refusal } => self.on_refuse(s, to, refusal),
            Body::Resume {
                to,
                from,
                arrived,
                consumed,
                notify,
            } => self.on_resume(s, to, from, arrived, consumed, notify),
            Body::Resumed if session.peer_resumed => Err(Count::WrongState),
            Body::Resumed => {
                session.peer_resumed = true;
                self.activate(s);
                Ok(())
            }
            Body::Data { to, head } => self.on_stream(s, to, |stream| stream.on_head(head)),
            Body::Credit {
                to,
                consumed,
                seen,
                notify,
            } => self.on_stream(s, to, |stream| stream.on_credit(consumed, seen, notify)),
            Body::Shut { to, end } => self.on_stream(s, to, |stream| stream.on_end(end)),
            Body::Close { to, end, consumed } => self.on_leave(s, to, Some((end, consumed))),
            Body::Reset { to, .. } => self.on_leave(s, to, None),
        }
    }

    /// The place of a stream that the peer of session `s` may speak of.
    fn stream_of(&self, s: usize, to: StreamId) -> Result<usize, Count> {
        let at = self.table.find(to).ok_or(Count::UnknownStream)?;
        let stream = &self.table[at];
        if stream.node.index() != s {
            return Err(Count::ForeignStream);
        }
        if stream.phase == Phase::Over {
            return Err(Count::UnknownStream);
        }
        Ok(at)
    }

    /// The same, if it is established and was named in this session.
    fn open_stream(&self, s: usize, to: StreamId) -> Result<usize, Count> {
        let at = self.stream_of(s, to)?;
        let stream = &self.table[at];
        let fits = stream.phase == Phase::Open
            && stream.settled == self.sessions[s].tag
            && stream.remote.is_some();
        if fits { Ok(at) } else { Err(Count::WrongState) }
    }

    /// Something about one direction. A violation breaks the stream.
    fn on_stream(
        &mut self,
        s: usize,
        to: StreamId,
        change: impl FnOnce(&mut Stream) -> Result<(), Count>,
    ) -> Result<(), Count> {
        let at = self.open_stream(s, to)?;
        let stream = &mut self.table[at];
        if !stream.listens() {
            return Ok(());
        }
        let result = change(stream);
        if result.is_err() {
            stream.end(EndReason::Violation);
            stream.want_leave(Some(Cause::Violation));
        } else if stream.has_unread() {
            stream.want_leave(Some(Cause::Unread));
        }
        self.touch(at);
        result
    }

    /// CLOSE, with the positions it carries, or RESET: the peer's last word on the stream.
    fn on_leave(&mut self, s: usize, to: StreamId, close: Option<(u64, u64)>) -> Result<(), Count> {
        // After a loss it is said again, perhaps for a stream that is over here already.
        let again = match self.stream_of(s, to) {
            Ok(at) => self.table[at].left,
            Err(count) => count == Count::UnknownStream,
        };
        if again {
            return Ok(());
        }
        let at = self.open_stream(s, to)?;
        let stream = &mut self.table[at];
        let result = match close {
            Some((end, consumed)) if stream.listens() => stream.on_close(end, consumed),
            _ => Ok(true),
        };
        match result {
            Ok(false) => {}
            Ok(true) => stream.end(EndReason::PeerReset),
            Err(_) => stream.end(EndReason::Violation),
        }
        stream.left = true;
        stream.wire &= wire::LEAVE;
        stream.want_leave(None);
        self.touch(at);
        result.map(|_| ())
    }

    fn on_connect(
        &mut self,
        s: usize,
        from: StreamId,
        source: Ipv6Addr,
        destination: Ipv6Addr,
    ) -> Result<(), Count> {
        let (streams_from_node, pending) = (self.config.streams_from_node, self.config.pending);
        let session = &mut self.sessions[s];
        let offer = session.offer.take().filter(|offer| offer.from == from);
        let offer = offer.ok_or(Count::NoOffer)?;
        if session.unanswered >= pending {
            return Err(Count::ConnectFlood);
        }
        session.unanswered += 1;
        if session.theirs >= streams_from_node || self.table.is_full() {
            session.replies.push_back((from, Refusal::Limit));
            self.activate(s);
            return Err(Count::NoRoom);
        }
        let addresses = Addresses {
            source,
            source_port: offer.source_port,
            destination,
            destination_port: offer.destination_port,
        };
        let mut stream = Stream::new(NodeId(s as u16), Phase::Offered, addresses);
        (stream.peer, stream.remote) = (Some(from), Some(offer.place));
        (stream.named, stream.settled) = (session.tag, session.tag);
        stream.theirs = true;
        stream.tell = tell::INCOMING;
        if let Some(id) = self.table.insert(stream) {
            session.theirs += 1;
            self.members.push(&mut session.members, id.at());
            self.touch(id.at());
        }
        Ok(())
    }

    /// The place of a stream whose answer we wait for in this session.
    fn asked_stream(&mut self, s: usize, to: StreamId) -> Result<usize, Count> {
        let at = self.stream_of(s, to)?;
        let stream = &self.table[at];
        let waits = matches!(stream.phase, Phase::Connecting | Phase::Abandoned);
        if !waits || !stream.asked || stream.named != self.sessions[s].tag {
            return Err(Count::WrongState);
        }
        self.asking.remove(&mut self.ask_list, at);
        self.answered_to(at);
        Ok(at)
    }

    fn on_accept(
        &mut self,
        s: usize,
        to: StreamId,
        from: StreamId,
        place: Place,
    ) -> Result<(), Count> {
        let at = self.asked_stream(s, to)?;
        let stream = &mut self.table[at];
        stream.peer = Some(from);
        stream.remote = Some(place);
        if stream.phase == Phase::Connecting {
            stream.tell |= tell::ESTABLISHED;
        } else {
            stream.want_leave(Some(Cause::GivenUp));
        }
        stream.phase = Phase::Open;
        self.touch(at);
        Ok(())
    }

    fn on_refuse(&mut self, s: usize, to: StreamId, refusal: Refusal) -> Result<(), Count> {
        let at = self.asked_stream(s, to)?;
        if self.table[at].phase == Phase::Connecting {
            self.fail_connect(at, refusal);
            self.table[at].held = false;
        }
        self.over(at);
        self.touch(at);
        Ok(())
    }

    fn on_resume(
        &mut self,
        s: usize,
        to: StreamId,
        from: StreamId,
        arrived: u64,
        consumed: u64,
        notify: bool,
    ) -> Result<(), Count> {
        // A stream that is over here is not named by us in turn: so the peer learns that.
        let Ok(at) = self.stream_of(s, to) else {
            return Ok(());
        };
        let tag = self.sessions[s].tag;
        if self.sessions[s].peer_resumed || self.table[at].settled == tag {
            return Err(Count::WrongState);
        }
        let stream = &mut self.table[at];
        let result = match stream.phase {
            // Its answer was lost with the session. We do not name it, which ends it there.
            Phase::Connecting | Phase::Abandoned => return Ok(()),
            Phase::Open if stream.peer == Some(from) && stream.listens() => {
                stream.on_resume(arrived, consumed, notify)
            }
            Phase::Open if stream.peer == Some(from) => Ok(()),
            _ => return Err(Count::WrongState),
        };
        if result.is_err() {
            stream.end(EndReason::Violation);
            stream.want_leave(Some(Cause::Violation));
        }
        stream.settled = tag;
        self.touch(at);
        result
    }
}
