//! Streams outlive a restart of the daemon's worker: what has to be kept, and how it is given back.

use super::{Addresses, LocalError, Node};
use crate::action::EndReason;
use crate::id::{NodeId, Place, StreamId};
use crate::message::Cause;
use crate::stream::{Phase, Stream, tell};

/// What has to be kept of an established stream so that it outlives a restart of the daemon's
/// worker. Its positions are in shared memory. Fetch it again after each event of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Our id.
    pub stream: StreamId,
    /// The other node.
    pub node: NodeId,
    /// Its id.
    pub peer: StreamId,
    /// From where to where.
    pub addresses: Addresses,
    /// Where the other node writes.
    pub local: Place,
    /// Where we write.
    pub remote: Place,
    /// The other node opened the stream.
    pub theirs: bool,
    /// Where the other end's direction ends, if known.
    pub peer_end: Option<u64>,
    /// The other node has left the stream.
    pub left: bool,
    /// The stream has ended otherwise than by being closed.
    pub ended: Option<EndReason>,
}

/// Positions of a stream, as shared memory has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Positions {
    /// Written by our program.
    pub head: u64,
    /// Returned to our program as credit.
    pub credit: u64,
    /// Read by our program.
    pub consumed: u64,
}

impl Node {
    /// What has to be kept of an established stream; `None` for any other.
    pub fn record(&self, id: StreamId) -> Option<Record> {
        let stream = &self.table[self.table.find(id)?];
        (stream.phase == Phase::Open).then_some(())?;
        Some(Record {
            stream: id,
            node: stream.node,
            peer: stream.peer?,
            addresses: stream.addresses,
            local: stream.local?,
            remote: stream.remote?,
            theirs: stream.theirs,
            peer_end: stream.rx.end,
            left: stream.left,
            ended: stream.ended,
        })
    }

    /// Gives a stream back after the daemon's worker has restarted. If its program has shut,
    /// closed or reset it, say so afterwards. Events follow as for a stream whose session was lost.
    ///
    /// # Errors
    /// [`LocalError::State`] when the id is taken or out of range; [`LocalError::Position`] when
    /// the positions contradict each other.
    pub fn restore(&mut self, record: &Record, at: Positions, now: u64) -> Result<(), LocalError> {
        let mut stream = Stream::new(record.node, Phase::Open, record.addresses);
        let size = record.local.size();
        if at.head < at.credit || at.head - at.credit > size || record.stream.generation == 0 {
            return Err(LocalError::Position);
        }
        let session = self
            .sessions
            .get_mut(record.node.index())
            .ok_or(LocalError::State)?;
        (stream.local, stream.remote) = (Some(record.local), Some(record.remote));
        (stream.peer, stream.theirs) = (Some(record.peer), record.theirs);
        let tx = &mut stream.tx;
        (tx.head, tx.high, tx.posted, tx.done) = (at.head, at.head, at.credit, at.credit);
        tx.consumed = at.credit.saturating_sub(record.remote.size());
        (stream.rx.consumed, stream.rx.credited) = (at.consumed, at.consumed);
        (stream.rx.head, stream.rx.end) = (at.consumed, record.peer_end);
        (stream.left, stream.ended) = (record.left, record.ended);
        if record.left {
            stream.want_leave(None);
        } else if record.ended.is_some() {
            stream.want_leave(Some(Cause::Program));
        }
        // The worker may have died before it told its programs.
        if record.peer_end.is_some() {
            stream.tell |= tell::PEER_SHUT;
        }
        if record.ended.is_some() {
            stream.tell |= tell::ENDED;
        }
        if !self.table.restore(record.stream, stream) {
            return Err(LocalError::State);
        }
        session.theirs += u32::from(record.theirs);
        session.give_up_at = now.saturating_add(self.config.resume_timeout);
        self.members.push(&mut session.members, record.stream.at());
        self.touch(record.stream.at());
        self.timer = 0;
        Ok(())
    }
}
