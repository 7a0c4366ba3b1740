//! One stream as one of its two nodes sees it: positions, and what is still to be said.
//!
//! Nothing is queued for a stream: what has to be sent is a set of [`wire`] flags, what the daemon
//! has to learn a set of [`tell`] flags, and the values are filled in when the message or event is
//! made. So memory does not grow, repeated news merge, and after a loss the state is simply said again.

use crate::action::{EndReason, Event};
use crate::counters::Count;
use crate::id::{NodeId, Place, StreamId};
use crate::message::{Cause, Refusal};
use crate::node::Addresses;

/// Messages that are to be sent for a stream.
pub(crate) mod wire {
    pub(crate) const CONNECT: u16 = 1;
    pub(crate) const ACCEPT: u16 = 2;
    pub(crate) const REFUSE: u16 = 4;
    pub(crate) const RESUME: u16 = 8;
    pub(crate) const DATA: u16 = 16;
    pub(crate) const CREDIT: u16 = 32;
    pub(crate) const SHUT: u16 = 64;
    /// CLOSE or RESET.
    pub(crate) const LEAVE: u16 = 128;
}

/// Events that the daemon is to be told of, in the order in which they are told.
pub(crate) mod tell {
    pub(crate) const INCOMING: u16 = 1;
    pub(crate) const ESTABLISHED: u16 = 2;
    pub(crate) const REFUSED: u16 = 4;
    pub(crate) const RESUME: u16 = 8;
    pub(crate) const PEER_HEAD: u16 = 16;
    pub(crate) const CREDIT: u16 = 32;
    pub(crate) const PEER_SHUT: u16 = 64;
    pub(crate) const ENDED: u16 = 128;
    pub(crate) const RELEASED: u16 = 256;
}

/// Where a stream is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// We asked, or are about to.
    Connecting,
    /// We asked, and do not want the stream any more; the answer is awaited to undo it.
    Abandoned,
    /// The other node asked; our daemon decides.
    Offered,
    /// Our daemon has refused.
    Refusing,
    /// Accepted.
    Open,
    /// Nothing is left to do but to tell the daemon.
    Over,
}

/// How we leave a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    /// Not yet.
    No,
    /// With CLOSE, or with RESET and its cause; not sent yet.
    Wanted(Option<Cause>),
    /// The message is in flight.
    Posted(Option<Cause>),
    /// The other node has it.
    Done(Option<Cause>),
}

/// The direction whose bytes our program writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tx {
    /// Position after the last byte that the program has written.
    pub(crate) head: u64,
    /// Position after the last byte posted.
    pub(crate) posted: u64,
    /// Largest value that `posted` ever had.
    pub(crate) high: u64,
    /// Position after the last byte known to be visible at the other end.
    pub(crate) done: u64,
    /// How far the consumer there has read.
    pub(crate) consumed: u64,
    /// The program has ended the direction at `head`.
    pub(crate) shut: bool,
    /// The consumer wants notifications.
    pub(crate) notify: bool,
    /// Writes in flight.
    pub(crate) writes: u32,
}

/// The direction whose bytes our program reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rx {
    /// Position after the last byte known to have arrived.
    pub(crate) head: u64,
    /// How far our program has read.
    pub(crate) consumed: u64,
    /// The `consumed` that was told last.
    pub(crate) credited: u64,
    /// How far our program has seen, when it asked for notifications.
    pub(crate) seen: u64,
    /// Position after the last byte of the direction, once known.
    pub(crate) end: Option<u64>,
    /// We want notifications.
    pub(crate) notify: bool,
}

/// One stream.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) node: NodeId,
    pub(crate) phase: Phase,
    pub(crate) addresses: Addresses,
    /// Where the other node writes. Our two rings have the same size.
    pub(crate) local: Option<Place>,
    /// Where we write.
    pub(crate) remote: Option<Place>,
    pub(crate) peer: Option<StreamId>,
    /// The other node opened it (it counts to its share of the table).
    pub(crate) theirs: bool,
    /// The daemon still uses the id.
    pub(crate) held: bool,
    pub(crate) tx: Tx,
    pub(crate) rx: Rx,
    pub(crate) leave: Leave,
    /// The other node has left: nothing more comes from it.
    pub(crate) left: bool,
    pub(crate) ended: Option<EndReason>,
    pub(crate) refusal: Option<Refusal>,
    /// A CONNECT may have reached the other node.
    pub(crate) asked: bool,
    pub(crate) wire: u16,
    pub(crate) tell: u16,
    /// Posts of this stream in flight.
    pub(crate) in_flight: u32,
    /// The session (our tag) in which we named the stream to the other node.
    pub(crate) named: u32,
    /// The session (our tag) in which the other node named the stream to us.
    pub(crate) settled: u32,
    /// The daemon was asked for the head word, to name the stream.
    pub(crate) resuming: bool,
    /// The last sweep over the session's streams that has seen this one.
    pub(crate) swept: u64,
    /// When the connect is given up, in ns.
    pub(crate) deadline: u64,
}

impl Stream {
    pub(crate) fn new(node: NodeId, phase: Phase, addresses: Addresses) -> Self {
        Stream {
            node,
            phase,
            addresses,
            local: None,
            remote: None,
            peer: None,
            theirs: false,
            held: true,
            tx: Tx {
                head: 0,
                posted: 0,
                high: 0,
                done: 0,
                consumed: 0,
                shut: false,
                notify: true,
                writes: 0,
            },
            rx: Rx {
                head: 0,
                consumed: 0,
                credited: 0,
                seen: 0,
                end: None,
                notify: true,
            },
            leave: Leave::No,
            left: false,
            ended: None,
            refusal: None,
            asked: false,
            wire: 0,
            tell: 0,
            in_flight: 0,
            named: 0,
            settled: 0,
            resuming: false,
            swept: 0,
            deadline: 0,
        }
    }

    /// Neither side will send anything more.
    pub(crate) fn wire_over(&self) -> bool {
        self.left && matches!(self.leave, Leave::Done(_))
    }

    /// Both directions can still carry something.
    pub(crate) fn is_live(&self) -> bool {
        self.phase == Phase::Open && !self.left && self.ended.is_none() && self.leave == Leave::No
    }

    /// What the other node says about bytes still matters, and ours are still sent: also after
    /// our program has closed, until all of them are.
    pub(crate) fn listens(&self) -> bool {
        let leaving = !matches!(
            self.leave,
            Leave::No | Leave::Wanted(None | Some(Cause::Unread))
        );
        self.phase == Phase::Open && !self.left && self.ended.is_none() && !leaving
    }

    /// How far bytes may be posted now.
    fn sendable(&self) -> u64 {
        let granted = self
            .remote
            .map_or(0, |place| self.tx.consumed + place.size());
        self.tx.head.min(granted)
    }

    /// The next write: position and length. `None` when there is nothing to write now, or when few
    /// bytes had better wait for a completion and travel with more.
    pub(crate) fn next_write(&self, most: u64, bulk: u64, small_writes: u32) -> Option<(u64, u64)> {
        let (local, remote) = (self.local?, self.remote?);
        if !self.listens() {
            return None;
        }
        let position = self.tx.posted;
        let bytes = self.sendable().saturating_sub(position);
        if bytes == 0 || (bytes < bulk && self.tx.writes >= small_writes) {
            return None;
        }
        let to_end = |place: Place| place.size() - position % place.size();
        Some((
            position,
            bytes.min(most).min(to_end(local)).min(to_end(remote)),
        ))
    }

    /// All bytes that the program has written are posted.
    pub(crate) fn all_posted(&self) -> bool {
        self.tx.posted == self.tx.head
    }

    /// SHUT can be sent.
    pub(crate) fn may_shut(&self) -> bool {
        self.wire & wire::SHUT != 0 && self.listens() && self.all_posted()
    }

    /// CLOSE or RESET can be sent. Of a program that has closed with unread bytes, what has credit is
    /// sent before, as the other end of a TCP connection has it by then.
    pub(crate) fn may_leave(&self) -> bool {
        match self.leave {
            Leave::Wanted(None) => self.left || self.all_posted(),
            Leave::Wanted(Some(Cause::Unread)) => {
                !self.listens() || self.local.is_none() || self.tx.posted >= self.sendable()
            }
            Leave::Wanted(Some(_)) => true,
            _ => false,
        }
    }

    /// Highest position that the other node may have written: it never has more credit.
    pub(crate) fn granted(&self) -> u64 {
        self.rx.consumed + self.local.map_or(0, |place| place.size())
    }

    /// The consumer at the other end has read up to `consumed`.
    fn check_consumed(&self, consumed: u64) -> Result<(), Count> {
        let possible = self.tx.consumed <= consumed && consumed <= self.tx.posted;
        if possible {
            Ok(())
        } else {
            Err(Count::BadCredit)
        }
    }

    /// CREDIT came.
    pub(crate) fn on_credit(
        &mut self,
        consumed: u64,
        seen: u64,
        notify: bool,
    ) -> Result<(), Count> {
        self.check_consumed(consumed)?;
        if seen > self.tx.posted {
            return Err(Count::BadCredit);
        }
        self.tx.consumed = consumed;
        self.tx.notify = notify;
        self.wire &= !wire::DATA;
        if notify && self.tx.posted > seen {
            self.wire |= wire::DATA;
        }
        Ok(())
    }

    /// DATA came, or bytes are known to have arrived for another reason.
    pub(crate) fn on_head(&mut self, head: u64) -> Result<(), Count> {
        if head > self.rx.end.unwrap_or(u64::MAX).min(self.granted()) {
            return Err(Count::BadHead);
        }
        if head > self.rx.head {
            self.rx.head = head;
            self.tell |= tell::PEER_HEAD;
        }
        Ok(())
    }

    /// SHUT or CLOSE came.
    pub(crate) fn on_end(&mut self, end: u64) -> Result<(), Count> {
        if end < self.rx.head
            || end < self.rx.consumed
            || self.rx.end.is_some_and(|said| said != end)
        {
            return Err(Count::BadEnd);
        }
        self.on_head(end).map_err(|_| Count::BadEnd)?;
        if self.rx.end.is_none() {
            self.rx.end = Some(end);
            self.tell |= tell::PEER_SHUT;
        }
        Ok(())
    }

    /// CLOSE came: the other program has read up to `consumed` and will read no more. True when
    /// bytes of ours were or are for nobody, for which TCP would answer RST.
    pub(crate) fn on_close(&mut self, end: u64, consumed: u64) -> Result<bool, Count> {
        self.check_consumed(consumed)?;
        self.on_end(end)?;
        self.tx.consumed = consumed;
        Ok(self.tx.head > consumed)
    }

    /// RESUME came: whatever we had posted, the bytes before `arrived` are there.
    pub(crate) fn on_resume(
        &mut self,
        arrived: u64,
        consumed: u64,
        notify: bool,
    ) -> Result<(), Count> {
        let tx = &mut self.tx;
        let possible = tx.done <= arrived
            && arrived <= tx.high
            && tx.consumed <= consumed
            && consumed <= arrived;
        if !possible {
            return Err(Count::BadResume);
        }
        if arrived > tx.done {
            self.tell |= tell::CREDIT;
        }
        (tx.posted, tx.done, tx.consumed, tx.notify) = (arrived, arrived, consumed, notify);
        if tx.shut && self.leave == Leave::No {
            self.wire |= wire::SHUT;
        }
        Ok(())
    }

    /// Bytes for a program that has closed.
    pub(crate) fn has_unread(&self) -> bool {
        !self.held && self.rx.head > self.rx.consumed
    }

    /// A credit is worth a message: a quarter of the ring. A producer that has used up its credit
    /// gets one, since its consumer then reads a whole ring.
    pub(crate) fn credit_is_due(&self) -> bool {
        let quarter = self.local.map_or(0, |place| place.size() / 4);
        self.rx.consumed - self.rx.credited >= quarter
    }

    /// Ends the stream for the program, if it has not ended and somebody is there to be told.
    pub(crate) fn end(&mut self, reason: EndReason) {
        if self.ended.is_none() && self.held && self.phase != Phase::Connecting {
            self.ended = Some(reason);
            self.tell |= tell::ENDED;
        }
    }

    /// The event of a [`tell`] flag; `None` when it is of no use any more.
    pub(crate) fn event(&self, stream: StreamId, flag: u16) -> Option<Event> {
        Some(match flag {
            tell::INCOMING => Event::Incoming {
                stream,
                node: self.node,
                addresses: self.addresses,
            },
            tell::ESTABLISHED => Event::Established { stream },
            tell::REFUSED => Event::Refused {
                stream,
                refusal: self.refusal?,
            },
            tell::RESUME => Event::Resume { stream },
            tell::PEER_HEAD => Event::PeerHead {
                stream,
                head: self.rx.head,
            },
            tell::CREDIT => Event::Credit {
                stream,
                to: self.tx.done,
            },
            tell::PEER_SHUT => Event::PeerShut {
                stream,
                end: self.rx.end?,
            },
            tell::ENDED => Event::Ended {
                stream,
                reason: self.ended?,
            },
            _ => Event::Released { stream },
        })
    }

    /// Wants to leave, unless that was said already. A RESET replaces a CLOSE that still waits.
    pub(crate) fn want_leave(&mut self, cause: Option<Cause>) {
        if matches!(self.leave, Leave::No | Leave::Wanted(None)) {
            self.leave = Leave::Wanted(cause);
            self.wire |= wire::LEAVE;
        }
    }
}
