//! Execution of one item of a lane: checks, data, word, message, completion (`docs/device.md`, 4 to 7).

use crate::descriptor::{Descriptor, Piece};
use crate::dma::Dma;
use crate::engine::{Core, Node};
use crate::faults::{Corruption, Dice};
use crate::port::{Inbound, Port};
use crate::protection::Right;
use crate::queue_set::{Lane, Ring, State};
use crate::sheet::*;
use crate::wire::End;
use std::sync::atomic::Ordering::{Relaxed, Release};

/// What an attempt to execute an item came to.
enum Attempt {
    /// It is done, with this status.
    Done(u8),
    /// The target is not ready; the status that it gets when this lasts too long.
    Wait(u8),
    /// The function is to be reset.
    Reset,
}

/// Where the target of an item is.
#[derive(Clone, Copy)]
enum Place {
    /// In this process.
    Here(usize),
    /// In another one.
    There(u16),
}

/// An item at its target, whose port is locked.
struct Execution<'a> {
    node: &'a Node,
    set: usize,
    work: &'a Descriptor,
    end: &'a End,
    port: &'a Port,
    dice: &'a mut Dice,
    /// The vector that the target asked to be fired.
    fires: Option<usize>,
}

/// Where an item's effects go.
struct Plan<'a> {
    data: u64,
    word: Option<(u64, u64)>,
    message: Option<(usize, &'a Inbound, Ring)>,
}

impl Core {
    /// Executes the head of a lane that was taken out of its set. False when it has to wait.
    pub fn advance(&mut self, n: usize, s: usize, lane: &mut Lane) -> bool {
        if self.nodes[n].sets[s].state != State::Running {
            return false;
        }
        let Some(item) = lane.items.front() else {
            return false;
        };
        match self.room_for_completion(n, s) {
            Ok(true) => {}
            Ok(false) => return false,
            Err(fault) => {
                self.fail(n, s, fault);
                return false;
            }
        }
        if item.ready > self.now {
            return false;
        }
        let attempt = if item.work.opcode == work::RESUME && item.work.verdict == status::OK {
            lane.failed = false;
            if let Some(other) = self.nodes[n].sets[s]
                .window
                .by_node
                .get_mut(&item.work.lane())
            {
                other.failed = false;
            }
            Attempt::Done(status::OK)
        } else if lane.failed {
            Attempt::Done(status::FLUSHED)
        } else {
            self.attempt(n, s, &item.work)
        };
        let status = match attempt {
            Attempt::Done(status) => status,
            Attempt::Reset => {
                self.reset(n);
                return false;
            }
            Attempt::Wait(status) => {
                if lane.waiting.is_none() && status == status::STALLED {
                    self.nodes[n].tally.held.add(1);
                }
                let since = *lane.waiting.get_or_insert(self.now);
                let limit = u64::from(self.nodes[n].management.stall_timeout) * 1000;
                if limit == 0 || self.now - since < limit {
                    return false;
                }
                status
            }
        };
        lane.waiting = None;
        if matches!(
            status,
            status::NO_QUEUE | status::UNREACHABLE | status::STALLED
        ) {
            lane.failed = true;
            self.nodes[n].tally.lanes_failed.add(1);
        }
        if let Err(fault) = self.complete(n, s, &item.work, status) {
            self.fail(n, s, fault);
        }
        lane.items.pop_front();
        true
    }

    fn attempt(&mut self, n: usize, s: usize, work: &Descriptor) -> Attempt {
        if work.verdict != status::OK {
            return Attempt::Done(work.verdict);
        }
        if work.opcode == work::FLUSH {
            return Attempt::Done(status::OK);
        }
        let unreachable = Attempt::Wait(status::UNREACHABLE);
        let Some(place) = self.place(n, work.target) else {
            return unreachable;
        };
        let node = &self.nodes[n];
        let (end, peer) = match place {
            Place::Here(target) => (&self.nodes[target].end, None),
            Place::There(id) => match self.peers.get(id) {
                Some(peer) => (&peer.end, Some(peer)),
                None => return unreachable,
            },
        };
        let port = end.port();
        if !port.try_lock(self.token) {
            return unreachable;
        }
        if peer.is_some_and(|peer| !peer.is_current()) {
            port.unlock(self.token);
            self.poll_wire();
            return unreachable;
        }
        let mut execution = Execution {
            node,
            set: s,
            work,
            end,
            port,
            dice: &mut self.dice,
            fires: None,
        };
        let attempt = execution.run();
        let fires = execution.fires;
        port.unlock(self.token);
        if let Some(vector) = fires {
            end.fire(vector);
        }
        attempt
    }

    /// Where a target is, if there is a link to it from here.
    fn place(&self, n: usize, target: u16) -> Option<Place> {
        if !self.nodes[n].link_up {
            return None;
        }
        match *self.routes.get(usize::from(target))? {
            Some(index) => Some(Place::Here(index)),
            None => Some(Place::There(target)),
        }
    }

    fn room_for_completion(&self, n: usize, s: usize) -> Result<bool, u32> {
        let set = &self.nodes[n].sets[s];
        let head = self.nodes[n].page(s).load32(page::CQ_HEAD);
        let used = set.completion_tail.wrapping_sub(head);
        if used > set.completions.entries() {
            return Err(fault::BAD_HEAD);
        }
        Ok(used < set.completions.entries())
    }

    /// Writes the completion of an item, if it gets one.
    fn complete(&mut self, n: usize, s: usize, work: &Descriptor, status: u8) -> Result<(), u32> {
        if status == status::OK && !work.has(work::COMPLETE) {
            return Ok(());
        }
        let length = if status == status::OK { work.length } else { 0 };
        let mut entry = [
            u64::from(length)
                | u64::from(work.target) << 32
                | u64::from(status) << 48
                | u64::from(work.opcode & 0x7f) << 56,
            u64::from(work.cookie) | u64::from(work.index) << 32,
        ];
        let corrupt = self.nodes[n].corrupt.take();
        match corrupt {
            Some(Corruption::Phase) => entry[0] ^= 1 << 63,
            Some(Corruption::Cookie) => entry[1] ^= 0x5a5a_5a5a,
            Some(Corruption::Index) => entry[1] ^= 1 << 40,
            Some(Corruption::Target) => entry[0] ^= 1 << 33,
            Some(Corruption::Status) => entry[0] |= 0xff << 48,
            Some(Corruption::Twice) => self.write_completion(n, s, entry)?,
            None => {}
        }
        self.write_completion(n, s, entry)
    }

    /// Writes an entry, its phase bit flipped if it is set in `entry`.
    fn write_completion(&mut self, n: usize, s: usize, mut entry: [u64; 2]) -> Result<(), u32> {
        let node = &mut self.nodes[n];
        let set = &mut node.sets[s];
        let index = set.completion_tail;
        entry[0] ^= set.completions.phase(index) << 63;
        set.completion_tail = index.wrapping_add(1);
        node.tally.completions.add(1);
        let iova = set.completions.entry(index, 16);
        node.store(iova, &entry)
    }

    /// A fault: a completion of a descriptor that was never posted.
    pub fn completion_for_nothing(&mut self, n: usize, s: usize) {
        let running = |core: &Core| Some(core.nodes[n].sets.get(s)?.state == State::Running);
        if running(self) == Some(true) {
            let word = u64::from(work::WRITE) << 56 | 1 << 32;
            if let Err(fault) = self.write_completion(n, s, [word, 3]) {
                self.fail(n, s, fault);
            }
        }
    }

    /// A fault: an inbound message that says it is another entry than the one where it lies.
    pub fn message_out_of_place(&mut self, n: usize, s: usize) {
        let set = self.nodes[n].sets.get(s);
        if set.is_none_or(|set| set.state != State::Running) {
            return;
        }
        let stored = self.hold(n, |node| {
            let inbound = node.inbound(s);
            let ring = inbound.ring().ok_or(fault::BAD_SETUP)?;
            let index = inbound.tail.load(Relaxed) as u32;
            let word = 1 | 1 << 32 | ring.phase(index) << 63;
            inbound.tail.store(index.wrapping_add(1).into(), Relaxed);
            let entry = [word, u64::from(index ^ 5) << 32, 0, 0, 0, 0, 0, 0];
            node.store(ring.entry(index, 64), &entry)
        });
        if let Err(fault) = stored {
            self.fail(n, s, fault);
        }
    }
}

impl<'a> Execution<'a> {
    fn run(&mut self) -> Attempt {
        let plan = match self.plan() {
            Ok(plan) => plan,
            Err(attempt) => return attempt,
        };
        if self.node.reset_in_flight && self.work.length != 0 {
            // Half of the data gets through; no word, no message, no completion.
            let _ = self.transfer(&plan, self.work.length / 2);
            return Attempt::Reset;
        }
        let done = self
            .transfer(&plan, self.work.length)
            .and_then(|()| self.store_word(&plan))
            .and_then(|()| self.deliver(&plan));
        Attempt::Done(done.err().unwrap_or(status::OK))
    }

    /// All checks, before anything moves.
    fn plan(&mut self) -> Result<Plan<'a>, Attempt> {
        let (work, port) = (self.work, self.port);
        if port.link_up.load(Relaxed) != 1 {
            return Err(Attempt::Wait(status::UNREACHABLE));
        }
        let source = self.node.management.node_id;
        if !port.protection.admits(source) {
            return Err(self.refused(status::REFUSED_SOURCE));
        }
        let mut plan = Plan {
            data: 0,
            word: None,
            message: None,
        };
        if !work.notifies() || work.length != 0 || work.word.is_some() {
            let right = if work.opcode == work::READ {
                Right::Read
            } else {
                Right::Write
            };
            let check = |offset, len| (port.protection).check(work.key, right, source, offset, len);
            let checked = check(work.offset, work.length.into()).and_then(|data| {
                let word = match work.word {
                    Some((offset, value)) => Some((check(offset, 8)?, value)),
                    None => None,
                };
                Ok((data, word))
            });
            match checked {
                Ok(_) if self.dice.refuses() => return Err(self.refused(status::REFUSED_KEY)),
                Ok((data, word)) => (plan.data, plan.word) = (data, word),
                Err(status) => return Err(self.refused(status)),
            }
        }
        if work.notifies() {
            plan.message = Some(self.room_for_message(work.target_set.into())?);
        }
        Ok(plan)
    }

    fn refused(&self, status: u8) -> Attempt {
        self.port.tally.refused_here.add(1);
        self.node.tally.refused_there.add(1);
        Attempt::Done(status)
    }

    /// The queue that gets the message.
    fn room_for_message(&mut self, s: usize) -> Result<(usize, &'a Inbound, Ring), Attempt> {
        let no_queue = Attempt::Done(status::NO_QUEUE);
        let port = self.port;
        let inbound = port.sets.get(s).filter(|set| set.open.load(Relaxed) == 1);
        let page = self.end.memory.pages().get(s);
        let (Some(inbound), Some(page)) = (inbound, page) else {
            return Err(no_queue);
        };
        let Some(ring) = inbound.ring() else {
            return Err(no_queue);
        };
        let tail = inbound.tail.load(Relaxed) as u32;
        let used = tail.wrapping_sub(page.load32(page::MQ_HEAD));
        if used > ring.entries() {
            self.fail(s, inbound, fault::BAD_HEAD);
            return Err(no_queue);
        }
        let full = used == ring.entries() || inbound.full.load(Relaxed) != 0;
        if full || self.dice.finds_full() {
            return Err(Attempt::Wait(status::STALLED));
        }
        Ok((s, inbound, ring))
    }

    /// Fails a queue set of the target. Its owner does the rest, when it next looks.
    fn fail(&mut self, s: usize, inbound: &Inbound, fault: u32) {
        inbound.fail(fault);
        self.fires = self.end.wants_interrupt(s).then_some(1 + s);
    }

    /// Moves the first `length` bytes of an item's data.
    fn transfer(&self, plan: &Plan<'_>, length: u32) -> Result<(), u8> {
        if length == 0 {
            return Ok(());
        }
        let (work, own, tally) = (self.work, &self.node.tally, &self.port.tally);
        if !work.inline().is_empty() {
            tally.payload_writes.add(1);
            tally.bytes_written.add(length.into());
            let data = &work.inline()[..length as usize];
            return self.end.dma.write(plan.data, data).map_err(|_| {
                tally.dma_faults.add(1);
                status::TARGET_ACCESS
            });
        }
        let remote = [Piece {
            iova: plan.data,
            len: length,
        }];
        let here = (&*self.node.end.dma, work.pieces(), own);
        let there = (&*self.end.dma, &remote[..], tally);
        let reads = work.opcode == work::READ;
        let (from, to) = if reads { (there, here) } else { (here, there) };
        from.2.payload_reads.add(from.1.len() as u64);
        from.2.bytes_read.add(length.into());
        to.2.payload_writes.add(to.1.len() as u64);
        to.2.bytes_written.add(length.into());
        copy((from.0, from.1), (to.0, to.1), length).map_err(|side| {
            let at = if side == Side::From { from.2 } else { to.2 };
            at.dma_faults.add(1);
            if (side == Side::From) == reads {
                status::TARGET_ACCESS
            } else {
                status::LOCAL_ACCESS
            }
        })
    }

    fn store_word(&self, plan: &Plan<'_>) -> Result<(), u8> {
        let Some((iova, value)) = plan.word else {
            return Ok(());
        };
        self.port.tally.words.add(1);
        self.store(iova, &[value])
    }

    /// Stores an entry into the target's memory.
    fn store(&self, iova: u64, words: &[u64]) -> Result<(), u8> {
        self.end.dma.store(iova, words).map_err(|_| {
            self.port.tally.dma_faults.add(1);
            status::TARGET_ACCESS
        })
    }

    /// Puts the message of an item into the target's queue.
    fn deliver(&mut self, plan: &Plan<'_>) -> Result<(), u8> {
        let Some((target_set, inbound, ring)) = plan.message else {
            return Ok(());
        };
        let source = u64::from(self.node.management.node_id);
        let window = self.work.opcode == 0;
        let kind = if window { 1 } else { 2 };
        let index = inbound.tail.load(Relaxed) as u32;
        let mut entry = [0; 8];
        entry[0] = source | (self.set as u64) << 16 | kind << 32 | ring.phase(index) << 63;
        entry[1] = u64::from(self.work.length) | u64::from(index) << 32;
        entry[2..].copy_from_slice(&self.work.payload);
        if let Err(status) = self.store(ring.entry(index, 64), &entry) {
            self.fail(target_set, inbound, fault::DMA_FAULT);
            return Err(status);
        }
        // After the entry: see `Core::recover`.
        inbound.tail.store(index.wrapping_add(1).into(), Release);
        let tally = &self.port.tally;
        if window {
            tally.messages_in.add(1);
        } else {
            tally.notifications_in.add(1);
        }
        self.node.tally.messages_out.add(1);
        self.fires = self
            .end
            .wants_interrupt(target_set)
            .then_some(1 + target_set);
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    From,
    To,
}

/// Copies the first `length` bytes of some pieces to others.
fn copy(from: (&dyn Dma, &[Piece]), to: (&dyn Dma, &[Piece]), length: u32) -> Result<(), Side> {
    let (mut reader, mut writer) = (Walk::new(from.1), Walk::new(to.1));
    let mut left = length;
    while left != 0 {
        let source = reader.piece().ok_or(Side::From)?;
        let target = writer.piece().ok_or(Side::To)?;
        let len = left.min(source.len).min(target.len);
        let mut written = Ok(());
        from.0
            .show(source.iova, len as usize, &mut |bytes| {
                written = to.0.write_shown(target.iova, bytes);
            })
            .map_err(|_| Side::From)?;
        written.map_err(|_| Side::To)?;
        reader.pass(len);
        writer.pass(len);
        left -= len;
    }
    Ok(())
}

/// Walks over pieces.
struct Walk<'a> {
    pieces: std::slice::Iter<'a, Piece>,
    now: Piece,
}

impl<'a> Walk<'a> {
    fn new(pieces: &'a [Piece]) -> Self {
        Walk {
            pieces: pieces.iter(),
            now: Piece::default(),
        }
    }

    /// What is left of the next piece that has anything left.
    fn piece(&mut self) -> Option<Piece> {
        while self.now.len == 0 {
            self.now = *self.pieces.next()?;
        }
        Some(self.now)
    }

    /// Goes on by `len` bytes, no more than that piece has.
    fn pass(&mut self, len: u32) {
        self.now.iova = self.now.iova.wrapping_add(len.into());
        self.now.len -= len;
    }
}
