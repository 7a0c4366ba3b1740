//! A stream as its poll core drives it: what the program has done since the last look, and where the
//! bytes lie that are to be sent.

use crate::memory::{Area, STAGING};
use crate::stream::{NodeStream, seen, todo};
use rdsock_proto::{LocalError, Node, StreamId};
use rdsock_shm::layout::{NOT_SWITCHED, mark};
use rdsock_vfio::Piece;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Where the bytes from the program come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// The staging area.
    Anchor,
    /// The ring, from this position on.
    Ring(u64),
    /// The ring between these positions, then the staging area again.
    Again(u64, u64),
}

/// A stream in a poll core's table.
#[derive(Debug)]
pub(crate) struct Live {
    pub stream: Arc<NodeStream>,
    pub id: StreamId,
    from: From,
    /// Out: position that the protocol was told.
    head: u64,
    /// Out: the program has written more, which waits for credit.
    behind: bool,
    /// In: position that the protocol was told.
    consumed: u64,
    shut: bool,
    /// The protocol was told that the program has gone, or broke it.
    pub gone: bool,
    /// The other node has accepted it, or we have.
    pub open: bool,
    /// It is in the list of streams that are polled.
    pub hot: bool,
    /// When something happened last.
    pub moved: u64,
    /// What the anchors' thread is to do: bits of [`mod@todo`].
    pub ask: u32,
    /// The core that the program was told, plus 1.
    core: u32,
    /// Notifications since it was polled.
    notified: u32,
    /// The head word is polled, and the other node was told not to notify.
    watches: bool,
}

/// Notifications of a stream that is polled, after which its head word is polled instead. A stream that sleeps after
/// each message does better with notifications, since each change costs a message.
const WATCH_AFTER: u32 = 32;

impl Live {
    pub fn new(stream: Arc<NodeStream>, id: StreamId, now: u64) -> Self {
        Live {
            stream,
            id,
            from: From::Anchor,
            head: 0,
            behind: false,
            consumed: 0,
            shut: false,
            gone: false,
            open: false,
            hot: false,
            moved: now,
            ask: 0,
            core: 0,
            notified: 0,
            watches: false,
        }
    }

    /// Tells the program on which core its bytes are awaited: its number plus 1, 0 when that is not known.
    #[inline]
    pub fn tell_core(&mut self, core: u32) {
        if core != self.core {
            self.core = core;
            self.stream.out().bytes.core.store(core, Ordering::Relaxed);
        }
    }

    /// Looks what the program has done, and tells the protocol. True when there was something.
    #[inline]
    pub fn look(&mut self, node: &mut Node) -> bool {
        if self.gone || !self.open {
            return false;
        }
        match self.try_look(node) {
            Ok(worked) => worked,
            // Nonsense in its memory, or the stream is over: either way it ends.
            Err(error) => {
                let marks = self.stream.out().producer.mark.load(Ordering::Relaxed);
                let seen = self.stream.seen.load(Ordering::Relaxed);
                let stream = self.stream.ticket;
                tracing::debug!(stream, ?error, marks, seen, "broken by its program");
                self.break_it(node);
                true
            }
        }
    }

    fn try_look(&mut self, node: &mut Node) -> Result<bool, LocalError> {
        let mut worked = self.look_in(node)?;
        worked |= self.watches && self.look_at_head()?;
        worked |= self.look_out(node)?;
        if self.stream.seen.load(Ordering::Relaxed) != 0 {
            worked |= self.look_at_anchor(node)?;
        }
        Ok(worked)
    }

    /// The other node has said how far bytes have arrived. What the anchors' thread is to do: bits of [`mod@todo`].
    #[inline]
    pub fn notified(&mut self, head: u64, node: &mut Node) -> u32 {
        let head = head.max(self.stream.arrived.load(Ordering::Relaxed));
        self.notified = self.notified.saturating_add(1);
        if self.hot && self.notified >= WATCH_AFTER && !self.watches {
            // It fails for a stream that is over.
            self.watches = node.set_notify(self.id, false, head).is_ok();
        }
        self.arrived(head)
    }

    /// Asks for notifications again, before the stream is not polled any more. Whatever came since the last look is
    /// then told.
    pub fn stop_watching(&mut self, node: &mut Node) {
        self.notified = 0;
        if std::mem::take(&mut self.watches) {
            let seen = self.stream.arrived.load(Ordering::Relaxed);
            // As above.
            let _ = node.set_notify(self.id, true, seen);
        }
    }

    /// What the engine has written, which stores the head word after it.
    #[inline]
    fn look_at_head(&mut self) -> Result<bool, LocalError> {
        let head = self.stream.incoming().producer.head.load(Ordering::Acquire);
        let arrived = self.stream.arrived.load(Ordering::Relaxed);
        if head == arrived {
            return Ok(false);
        }
        let granted = self.consumed + self.stream.memory.ring_size();
        if head < arrived || head > granted {
            return Err(LocalError::Position);
        }
        self.ask |= self.arrived(head);
        Ok(true)
    }

    /// The other node has ended the stream: what came before that is the program's.
    pub fn take_rest(&mut self) {
        // Nonsense makes no difference any more.
        let _ = self.look_at_head();
    }

    /// Bytes have arrived up to `head`.
    #[inline]
    fn arrived(&self, head: u64) -> u32 {
        let stream = &self.stream;
        stream.arrived.store(head, Ordering::SeqCst);
        if !stream.on_ring.load(Ordering::SeqCst) {
            todo::ARRIVED
        } else if stream.answer(&stream.incoming().bytes) {
            todo::WAKE_BYTES
        } else if stream.has_left() {
            todo::LEFT
        } else {
            0
        }
    }

    /// What the program has read.
    #[inline]
    fn look_in(&mut self, node: &mut Node) -> Result<bool, LocalError> {
        let stream = &*self.stream;
        // What the anchor has taken counts as read, also while the program has not come to its ring.
        let mut consumed = stream.given.load(Ordering::Acquire);
        if stream.on_ring.load(Ordering::Acquire) {
            let tail = stream.incoming().consumer.tail.load(Ordering::Acquire);
            consumed = consumed.max(tail);
        }
        if consumed <= self.consumed {
            return Ok(false);
        }
        if consumed > stream.arrived.load(Ordering::Relaxed) {
            // The engine stores the head word before it notifies.
            let head = stream.incoming().producer.head.load(Ordering::Acquire);
            if consumed > head {
                return Err(LocalError::Position);
            }
        }
        node.advance_consumed(self.id, consumed)?;
        self.consumed = consumed;
        Ok(true)
    }

    /// What the program has written.
    #[inline]
    fn look_out(&mut self, node: &mut Node) -> Result<bool, LocalError> {
        let stream = &*self.stream;
        let producer = &stream.out().producer;
        if self.from == From::Anchor {
            let switch_at = producer.switch_at.load(Ordering::Acquire);
            if switch_at != NOT_SWITCHED && switch_at == stream.staged.load(Ordering::Acquire) {
                self.from = From::Ring(switch_at);
            }
        }
        let since = match self.from {
            From::Ring(since) => since,
            From::Anchor => {
                let staged = stream.staged.load(Ordering::Acquire);
                return self.advance(node, staged);
            }
            From::Again(_, end) => {
                // The staging area is behind until the anchors' thread has come to the end as well.
                let staged = stream.staged.load(Ordering::Acquire).max(end);
                return self.advance(node, staged);
            }
        };
        // The mark first: what it says is true of a head that is read after it.
        let marks = producer.mark.load(Ordering::Acquire);
        let head = producer.head.load(Ordering::Acquire);
        let freed = stream.freed.load(Ordering::Relaxed).max(since);
        if head < since || head > freed + stream.memory.ring_size() {
            return Err(LocalError::Position);
        }
        let mut worked = self.advance(node, head)?;
        if marks == 0 || self.shut {
            return Ok(worked);
        }
        if marks & mark::RESET != 0 {
            return self.abort(node);
        }
        if marks & mark::END != 0 {
            self.from = From::Again(since, head);
            self.stream.resumes_at.store(head, Ordering::Release);
            self.ask |= todo::RESUMED;
            if self.stream.has_left() {
                self.ask |= todo::LEFT;
            }
            worked = true;
        } else if marks & mark::FIN != 0 && !self.behind {
            self.shut = true;
            node.shut(self.id)?;
            worked = true;
        }
        Ok(worked)
    }

    /// The anchors' thread has seen the program's end.
    fn look_at_anchor(&mut self, node: &mut Node) -> Result<bool, LocalError> {
        let bits = self.stream.seen.load(Ordering::Acquire);
        // What the program has read and sent before that.
        let mut worked = self.look_in(node)?;
        worked |= self.look_out(node)?;
        if self.gone {
            return Ok(true);
        }
        if bits & seen::BROKEN != 0 {
            return self.abort(node);
        }
        if self.behind {
            return Ok(worked);
        }
        let closed = bits & seen::CLOSED != 0 || self.stream.is_closed();
        let on_ring = matches!(self.from, From::Ring(_));
        // On a ring, a program that only ends its direction marks that, and leaves its anchor open. One that has gone says no end before:
        // if it has left bytes unread, the other end sees a break, and no end.
        let is_over = closed || on_ring;
        if !std::mem::replace(&mut self.shut, true) && !is_over {
            node.shut(self.id)?;
            worked = true;
        }
        if is_over {
            self.gone = true;
            // Of what has come while it was watched, nobody else knows.
            self.look_at_head()?;
            if self.stream.arrived.load(Ordering::Relaxed) > self.consumed {
                node.abort(self.id)?;
            } else {
                node.close(self.id)?;
            }
            worked = true;
        }
        Ok(worked)
    }

    /// The program has reset the connection: the other end sees what it sent before, then ECONNRESET.
    fn abort(&mut self, node: &mut Node) -> Result<bool, LocalError> {
        self.gone = true;
        node.abort(self.id)?;
        Ok(true)
    }

    /// Breaks the stream: the other end sees ECONNRESET.
    pub fn break_it(&mut self, node: &mut Node) {
        self.gone = true;
        // It may be over already.
        let _ = node.reset(self.id);
    }

    /// Bytes of the program are at the other end. What the anchors' thread is to do: bits of [`mod@todo`].
    pub fn credit(&mut self, to: u64) -> u32 {
        let stream = &*self.stream;
        let mut what = 0;
        if let From::Ring(since) | From::Again(since, _) = self.from
            && to > since
        {
            let end = match self.from {
                From::Again(_, end) => end.min(to),
                _ => to,
            };
            stream.out().consumer.tail.store(end, Ordering::Release);
            if stream.answer(&stream.out().space) {
                what |= todo::WAKE_SPACE;
            }
        }
        let before = stream.freed.swap(to, Ordering::SeqCst);
        if stream.staged.load(Ordering::SeqCst).saturating_sub(before) >= STAGING {
            what |= todo::ROOM;
        }
        what
    }

    /// The pieces of memory that hold `len` bytes from `position` on.
    pub fn pieces(&self, position: u64, len: u32, pieces: &mut Vec<Piece>) -> bool {
        let (mut at, end) = (position, position + u64::from(len));
        pieces.clear();
        let ring = Area::Ring(self.stream.end);
        while at < end {
            let (area, offset, until) = match self.from {
                From::Ring(since) if at >= since => (ring, self.in_ring(at), end),
                From::Again(since, until) if at >= since && at < until => {
                    (ring, self.in_ring(at), until.min(end))
                }
                From::Ring(since) => (Area::Staging, at, since.min(end)),
                From::Again(since, _) if at < since => (Area::Staging, at, since.min(end)),
                _ => (Area::Staging, at, end),
            };
            let Some(piece) = self.stream.memory.piece(area, offset, (until - at) as u32) else {
                return false;
            };
            at += u64::from(piece.len());
            pieces.push(piece);
        }
        true
    }

    /// Tells the protocol that the program has written up to `to`, as far as the protocol can know: it counts with one
    /// ring of bytes under way, and the staging area holds some beside. True when that is news.
    #[inline]
    fn advance(&mut self, node: &mut Node, to: u64) -> Result<bool, LocalError> {
        let stream = &*self.stream;
        let most = stream.freed.load(Ordering::Relaxed) + stream.memory.ring_size();
        self.behind = to > most;
        let to = to.min(most);
        if to == self.head {
            return Ok(false);
        }
        node.advance_head(self.id, to)?;
        self.head = to;
        Ok(true)
    }

    /// True when what the program has done waits for credit, so that it has to be looked at after that.
    pub fn is_behind(&self) -> bool {
        self.behind
    }

    /// Where the program keeps a position in its ring. It moves its origin only while the ring is empty, so
    /// never while there is something to send.
    fn in_ring(&self, position: u64) -> u64 {
        let origin = self.stream.out().producer.origin.load(Ordering::Relaxed);
        position.wrapping_sub(origin)
    }
}
