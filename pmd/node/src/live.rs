//! A stream as its poll core drives it: what the program has done since the last look, and where the
//! bytes lie that are to be sent.

use crate::memory::{Area, STAGING};
use crate::socket::POLL_CORE;
use crate::stream::{NONE, NodeStream, todo};
use rdsock_proto::{LocalError, Node, StreamId};
use rdsock_shm::layout::{anchor, mark, phase};
use rdsock_vfio::Piece;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Pieces of memory that a write is made of, at most: two of each area, of which the staging area is there twice, before the ring and behind it.
pub(crate) const PIECES: usize = 6;

/// A stream in a poll core's table.
#[derive(Debug)]
pub(crate) struct Live {
    pub stream: Arc<NodeStream>,
    pub id: StreamId,
    /// Out: the positions whose bytes the program has put into its ring. Those before and behind are in the staging area.
    ring: Range<u64>,
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
            ring: NONE..NONE,
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
                let told = self.stream.shared().rx().anchor.load(Ordering::Relaxed);
                let stream = self.stream.ticket;
                tracing::debug!(stream, ?error, marks, told, "broken by its program");
                self.break_it(node);
                true
            }
        }
    }

    fn try_look(&mut self, node: &mut Node) -> Result<bool, LocalError> {
        let mut worked = self.look_in(node)?;
        worked |= self.watches && self.look_at_head()?;
        worked |= self.look_out(node)?;
        if self.stream.has_told() {
            worked |= self.look_at_anchor(node)?;
        }
        Ok(worked)
    }

    /// The other node has said how far bytes have arrived. What the anchors' thread is to do: bits of [`mod@todo`].
    #[inline]
    pub fn notified(&mut self, head: u64, node: &mut Node) -> u32 {
        let head = head.max(self.stream.arrived());
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
            // As above.
            let _ = node.set_notify(self.id, true, self.stream.arrived());
        }
    }

    /// What the engine has written, which stores the head word after it.
    #[inline]
    fn look_at_head(&mut self) -> Result<bool, LocalError> {
        let head = self.stream.incoming().producer.head.load(Ordering::Acquire);
        let arrived = self.stream.arrived();
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
        stream.shared().tx().head.store(head, Ordering::SeqCst);
        if !stream.is_on_ring() {
            todo::ARRIVED
        } else if stream.answer(&stream.incoming().bytes) {
            todo::WAKE_BYTES
        } else if stream.has_left() {
            todo::LEFT
        } else {
            0
        }
    }

    /// The other node's direction has ended at this position, whose bytes are all there. What the anchors' thread is to do: bits
    /// of [`mod@todo`].
    pub fn peer_ended(&mut self, end: u64) -> u32 {
        let stream = &self.stream;
        let head = stream.incoming().producer.head.load(Ordering::Acquire);
        if stream.arrived() < end && end <= head {
            stream.shared().tx().head.store(end, Ordering::SeqCst);
        }
        stream.ends_at.store(end, Ordering::SeqCst);
        if !stream.is_on_ring() {
            return todo::ENDED;
        }
        stream.shared().end_in_place();
        if stream.answer(&stream.incoming().bytes) {
            todo::WAKE_BYTES
        } else {
            0
        }
    }

    /// What the program has read.
    #[inline]
    fn look_in(&mut self, node: &mut Node) -> Result<bool, LocalError> {
        let stream = &*self.stream;
        // What the anchor has taken counts as read, also while the program has not come to its ring.
        let mut consumed = stream.given();
        if stream.is_on_ring() {
            let tail = stream.incoming().consumer.tail.load(Ordering::Acquire);
            consumed = consumed.max(tail);
        }
        if consumed <= self.consumed {
            return Ok(false);
        }
        if consumed > stream.arrived() {
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
        let (producer, rx) = (&stream.out().producer, stream.shared().rx());
        if self.ring.start == NONE && stream.shared().try_settle_switch(POLL_CORE) {
            self.ring.start = rx.published.load(Ordering::Relaxed);
        }
        if self.ring.end == NONE && rx.phase.load(Ordering::Acquire) == phase::DEMOTED {
            self.ring.end = rx.seen_head.load(Ordering::Relaxed);
        }
        let since = self.ring.start;
        if since == NONE || self.ring.end != NONE {
            // The staging area is behind until the anchors' thread has come to the ring's end as well.
            let staged = stream.staged.load(Ordering::Acquire);
            let end = if since == NONE { 0 } else { self.ring.end };
            return self.advance(node, staged.max(end));
        }
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
            self.ring.end = head;
            let tail = &self.stream.shared().rx().tail;
            tail.store(head, Ordering::Release);
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
        let hung_up = self.stream.hung_up.load(Ordering::Acquire);
        let rx = self.stream.shared().rx();
        let is_broken = rx.phase.load(Ordering::Acquire) == phase::RESET
            || rx.anchor.load(Ordering::Acquire) & anchor::BROKEN != 0;
        // What the program has read and sent before that.
        let mut worked = self.look_in(node)?;
        worked |= self.look_out(node)?;
        if self.gone {
            return Ok(true);
        }
        if is_broken {
            return self.abort(node);
        }
        if self.behind {
            return Ok(worked);
        }
        let closed = hung_up || self.stream.is_closed();
        let on_ring = self.ring.start != NONE && self.ring.end == NONE;
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
            if self.stream.arrived() > self.consumed {
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
        if to > self.ring.start {
            let to = to.min(self.ring.end);
            stream.out().consumer.tail.store(to, Ordering::Release);
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

    /// The pieces of memory that hold `len` bytes from `position` on: [`PIECES`] at most.
    pub fn pieces(&self, position: u64, len: u32, pieces: &mut Vec<Piece>) -> bool {
        let (mut at, end) = (position, position + u64::from(len));
        pieces.clear();
        // Where the program keeps its ring's bytes. It moves its origin only while the ring is empty, so never while there is
        // something to send. It is read once: one that moves it all the same makes no more pieces by that.
        let origin = self.stream.out().producer.origin.load(Ordering::Relaxed);
        let ring = Area::Ring(self.stream.end);
        while at < end {
            let (area, offset, until) = if self.ring.contains(&at) {
                (ring, at.wrapping_sub(origin), self.ring.end)
            } else if at < self.ring.start {
                (Area::Staging, at, self.ring.start)
            } else {
                (Area::Staging, at, NONE)
            };
            let until = until.min(end);
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
}
