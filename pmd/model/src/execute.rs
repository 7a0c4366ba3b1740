//! Execution of one item of a lane: checks, data, word, message, completion (`docs/device.md`, 4 to 7).

use crate::descriptor::{Descriptor, Piece};
use crate::engine::{Core, Node};
use crate::faults::Corruption;
use crate::management::Right;
use crate::queue_set::{Lane, State};
use crate::sheet::*;

/// What an attempt to execute an item came to.
enum Attempt {
    /// It is done, with this status.
    Done(u8),
    /// The target is not ready; the status that it gets when this lasts too long.
    Wait(u8),
    /// The function was reset.
    Gone,
}

/// Where an item's effects go.
struct Plan {
    target: usize,
    data: u64,
    word: Option<(u64, u64)>,
    message: Option<usize>,
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
            Attempt::Gone => return false,
            Attempt::Wait(status) => {
                if lane.waiting.is_none() && status == status::STALLED {
                    self.nodes[n].counters.held += 1;
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
            self.nodes[n].counters.lanes_failed += 1;
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
        let plan = match self.plan(n, work) {
            Ok(plan) => plan,
            Err(attempt) => return attempt,
        };
        if self.nodes[n].reset_in_flight && work.length != 0 {
            // Half of the data gets through; no word, no message, no completion.
            let _ = self.transfer(n, work, &plan, work.length / 2);
            self.reset(n);
            return Attempt::Gone;
        }
        let done = self
            .transfer(n, work, &plan, work.length)
            .and_then(|()| self.store_word(&plan))
            .and_then(|()| self.deliver(n, s, work, &plan));
        Attempt::Done(done.err().unwrap_or(status::OK))
    }

    /// All checks, before anything moves.
    fn plan(&mut self, n: usize, work: &Descriptor) -> Result<Plan, Attempt> {
        let source = self.nodes[n].management.node_id;
        let target = Some(usize::from(work.target))
            .filter(|_| self.nodes[n].link_up)
            .and_then(|id| *self.routes.get(id)?)
            .filter(|target| self.nodes[*target].link_up)
            .ok_or(Attempt::Wait(status::UNREACHABLE))?;
        let refused = |core: &mut Core, status| {
            core.nodes[target].counters.refused_here += 1;
            core.nodes[n].counters.refused_there += 1;
            Attempt::Done(status)
        };
        let management = &self.nodes[target].management;
        if !management.admits(source) {
            return Err(refused(self, status::REFUSED_SOURCE));
        }
        let mut plan = Plan {
            target,
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
            let check = |offset, len| management.check(work.key, right, source, offset, len);
            let checked = check(work.offset, work.length.into()).and_then(|data| {
                let word = match work.word {
                    Some((offset, value)) => Some((check(offset, 8)?, value)),
                    None => None,
                };
                Ok((data, word))
            });
            let checked = match checked {
                Ok(_) if self.dice.refuses() => Err(status::REFUSED_KEY),
                checked => checked,
            };
            match checked {
                Ok((data, word)) => (plan.data, plan.word) = (data, word),
                Err(status) => return Err(refused(self, status)),
            }
        }
        if work.notifies() {
            self.room_for_message(target, work.target_set.into())?;
            plan.message = Some(work.target_set.into());
        }
        Ok(plan)
    }

    fn room_for_message(&mut self, t: usize, s: usize) -> Result<(), Attempt> {
        let node = &self.nodes[t];
        let Some(set) = node.sets.get(s).filter(|set| set.state == State::Running) else {
            return Err(Attempt::Done(status::NO_QUEUE));
        };
        let used = set
            .message_tail
            .wrapping_sub(node.page(s).load32(page::MQ_HEAD));
        if used > set.messages.entries() {
            self.fail(t, s, fault::BAD_HEAD);
            return Err(Attempt::Done(status::NO_QUEUE));
        }
        if used == set.messages.entries() || set.full || self.dice.finds_full() {
            return Err(Attempt::Wait(status::STALLED));
        }
        Ok(())
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

    /// Moves the first `length` bytes of an item's data.
    fn transfer(
        &mut self,
        n: usize,
        work: &Descriptor,
        plan: &Plan,
        length: u32,
    ) -> Result<(), u8> {
        let remote = [Piece {
            iova: plan.data,
            len: length,
        }];
        let reads = work.opcode == work::READ;
        if length == 0 {
            return Ok(());
        }
        if !work.inline().is_empty() {
            let data = &work.inline()[..length as usize];
            let node = &mut self.nodes[plan.target];
            node.counters.payload_writes += 1;
            node.counters.bytes_written += u64::from(length);
            return node.dma.write(plan.data, data).map_err(|_| {
                node.counters.dma_faults += 1;
                status::TARGET_ACCESS
            });
        }
        let (from, to) = if reads {
            (plan.target, n)
        } else {
            (n, plan.target)
        };
        let (from_pieces, to_pieces) = if reads {
            (&remote[..], work.pieces())
        } else {
            (work.pieces(), &remote[..])
        };
        let failed_from = copy(
            (&self.nodes[from], from_pieces),
            (&self.nodes[to], to_pieces),
            length,
            &mut self.buffer,
        );
        let counters = &mut self.nodes[from].counters;
        counters.payload_reads += from_pieces.len() as u64;
        counters.bytes_read += u64::from(length);
        let counters = &mut self.nodes[to].counters;
        counters.payload_writes += to_pieces.len() as u64;
        counters.bytes_written += u64::from(length);
        failed_from.map_err(|side| {
            let at = if side == Side::From { from } else { to };
            self.nodes[at].counters.dma_faults += 1;
            if (side == Side::From) == reads {
                status::TARGET_ACCESS
            } else {
                status::LOCAL_ACCESS
            }
        })
    }

    fn store_word(&mut self, plan: &Plan) -> Result<(), u8> {
        let Some((iova, value)) = plan.word else {
            return Ok(());
        };
        let node = &mut self.nodes[plan.target];
        node.counters.words += 1;
        node.store(iova, &[value])
            .map_err(|_| status::TARGET_ACCESS)
    }

    /// Puts the message of an item into the target's queue.
    fn deliver(&mut self, n: usize, s: usize, work: &Descriptor, plan: &Plan) -> Result<(), u8> {
        let Some(target_set) = plan.message else {
            return Ok(());
        };
        let source = u64::from(self.nodes[n].management.node_id);
        let window = work.opcode == 0;
        let kind = if window { 1 } else { 2 };
        let node = &mut self.nodes[plan.target];
        let set = &mut node.sets[target_set];
        let index = set.message_tail;
        let phase = set.messages.phase(index);
        let mut entry = [0; 8];
        entry[0] = source | (s as u64) << 16 | kind << 32 | phase << 63;
        entry[1] = u64::from(work.length) | u64::from(index) << 32;
        entry[2..].copy_from_slice(&work.payload);
        set.message_tail = index.wrapping_add(1);
        let iova = set.messages.entry(index, 64);
        if let Err(fault) = node.store(iova, &entry) {
            self.fail(plan.target, target_set, fault);
            return Err(status::TARGET_ACCESS);
        }
        if window {
            node.counters.messages_in += 1;
        } else {
            node.counters.notifications_in += 1;
        }
        self.nodes[n].counters.messages_out += 1;
        Ok(())
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
        node.counters.completions += 1;
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
        let node = &mut self.nodes[n];
        let Some(set) = node
            .sets
            .get_mut(s)
            .filter(|set| set.state == State::Running)
        else {
            return;
        };
        let index = set.message_tail;
        let word = 1 | 1 << 32 | set.messages.phase(index) << 63;
        set.message_tail = index.wrapping_add(1);
        let iova = set.messages.entry(index, 64);
        let entry = [word, u64::from(index ^ 5) << 32, 0, 0, 0, 0, 0, 0];
        if let Err(fault) = node.store(iova, &entry) {
            self.fail(n, s, fault);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    From,
    To,
}

/// Copies the first `length` bytes of some pieces to others, a buffer at a time.
fn copy(
    from: (&Node, &[Piece]),
    to: (&Node, &[Piece]),
    length: u32,
    buffer: &mut [u8],
) -> Result<(), Side> {
    let (mut reader, mut writer) = (Walk::new(from.1), Walk::new(to.1));
    let mut left = length as usize;
    while left != 0 {
        let chunk = left.min(buffer.len());
        let mut at = 0;
        while at < chunk {
            let (iova, len) = reader.next(chunk - at).ok_or(Side::From)?;
            let part = &mut buffer[at..at + len];
            from.0.dma.read(iova, part).map_err(|_| Side::From)?;
            at += len;
        }
        at = 0;
        while at < chunk {
            let (iova, len) = writer.next(chunk - at).ok_or(Side::To)?;
            to.0.dma
                .write(iova, &buffer[at..at + len])
                .map_err(|_| Side::To)?;
            at += len;
        }
        left -= chunk;
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

    /// Address and length of the next part, of at most `most` bytes.
    fn next(&mut self, most: usize) -> Option<(u64, usize)> {
        while self.now.len == 0 {
            self.now = *self.pieces.next()?;
        }
        let len = most.min(self.now.len as usize);
        let iova = self.now.iova;
        self.now.iova = iova.wrapping_add(len as u64);
        self.now.len -= len as u32;
        Some((iova, len))
    }
}
