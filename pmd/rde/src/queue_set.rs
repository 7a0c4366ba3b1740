//! A queue set: everything that one poll core needs of the device. One thread uses it.
//!
//! The loop of a poll core is: [`QueueSet::poll_completions`], [`QueueSet::poll_messages`],
//! [`QueueSet::post`] as often as there is work, [`QueueSet::ring`] once. None of them allocates, makes a
//! system call or reads a register. Once any of them has reported [`DeviceFailed`], all of them do.

use crate::completions::{Completion, CompletionQueue};
use crate::error::{DeviceFailed, NotPosted, OpenError};
use crate::inbound::{Inbound, Message};
use crate::outstanding::{Outstanding, Posted};
use crate::rde::{Capabilities, Claim};
use crate::spec::{DeviceStatus, PAGE_SIZE, SLOT_WORDS, SetStatus, block, page};
use crate::start::{Memory, Sizes, start, stop};
use crate::window::Window;
use crate::work::Work;
use rdsock_vfio::{Registers, Space, Words, barrier};
use std::sync::Arc;

/// What a queue set has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Operations posted.
    pub posted: u64,
    /// Stores to the doorbell.
    pub doorbells: u64,
    /// Stores to CQ_HEAD and MQ_HEAD.
    pub head_updates: u64,
    /// Completions taken, whether reported or not.
    pub completions: u64,
    /// Completions with a status other than OK.
    pub failures: u64,
    /// Messages sent through the window.
    pub sent: u64,
    /// Messages and notifications taken.
    pub received: u64,
    /// Times that a queue, the window or a lane was full.
    pub full: u64,
}

/// A running queue set. Dropping it stops it: what has not completed, and messages that have not arrived,
/// may be forgotten. To be sure, post something with a report last (in each lane that matters), and wait for it.
#[derive(Debug)]
pub struct QueueSet {
    pages: Arc<dyn Registers>,
    capabilities: Capabilities,
    /// Offset of the queue page.
    at: u64,
    work: Words,
    work_entries: u32,
    status: Words,
    /// Slots filled, told by doorbell, and taken by the device, since the start.
    filled: u64,
    rung: u64,
    fetched: u64,
    book: Outstanding,
    completions: CompletionQueue,
    inbound: Inbound,
    window: Window,
    generation: u32,
    armed: u32,
    failed: Option<DeviceFailed>,
    stats: Stats,
    claim: Claim,
}

impl QueueSet {
    pub(crate) fn start(
        space: &Space,
        pages: Arc<dyn Registers>,
        capabilities: Capabilities,
        claim: Claim,
        sizes: Sizes,
    ) -> Result<Self, OpenError> {
        let memory = Memory::allocate(space, sizes)?;
        start(&*pages, claim.set, sizes, &memory)?;
        let capacity = 1 << sizes.completions;
        let status = SetStatus(memory.status.load(block::STATE as usize / 8));
        Ok(QueueSet {
            at: u64::from(claim.set) * PAGE_SIZE,
            pages,
            work: memory.work,
            work_entries: 1 << sizes.work,
            status: memory.status,
            filled: 0,
            rung: 0,
            fetched: 0,
            book: Outstanding::new(capacity, capabilities.max_node, capabilities.lane_depth),
            completions: CompletionQueue::new(memory.completions, sizes.completions),
            inbound: Inbound::new(memory.messages, sizes.messages, capabilities.max_node),
            window: Window::default(),
            generation: status.generation(),
            armed: 0,
            failed: None,
            stats: Stats::default(),
            capabilities,
            claim,
        })
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.claim.set
    }

    /// What it has done.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Operations that were posted and have not completed.
    pub fn outstanding(&self) -> usize {
        self.book.len()
    }

    /// Posts an operation. The device learns of it with the next [`QueueSet::ring`].
    #[inline]
    pub fn post(&mut self, work: &Work<'_>) -> Result<(), NotPosted> {
        self.alive()?;
        let mut encoded = work.encode(&self.capabilities)?;
        let posted = Posted {
            tag: work.tag,
            index: self.filled as u32,
            length: encoded.length,
            target: work.target,
            opcode: encoded.opcode,
            report: work.report,
        };
        if self.book.target_is_full(work.target) {
            self.stats.full += 1;
            return Err(NotPosted::TargetFull);
        }
        if self.book.is_full() || !self.has_slots(encoded.slots())? {
            self.stats.full += 1;
            return Err(NotPosted::Full);
        }
        let (cookie, completes) = self.book.enter(posted).ok_or(NotPosted::Full)?;
        for slot in encoded.finish(cookie, completes).chunks_exact(SLOT_WORDS) {
            let place = self.filled as usize % self.work_entries as usize * SLOT_WORDS;
            for (i, word) in slot.iter().enumerate() {
                self.work.store(place + i, *word);
            }
            self.filled += 1;
        }
        self.stats.posted += 1;
        Ok(())
    }

    /// Tells the device of everything that was posted since the last time: one store, or none.
    #[inline]
    pub fn ring(&mut self) {
        if self.filled != self.rung && self.failed.is_none() {
            self.rung = self.filled;
            barrier::before_doorbell();
            self.pages
                .write32(self.at + page::WQ_TAIL, self.filled as u32);
            self.stats.doorbells += 1;
        }
    }

    /// Sends a message of at most 48 bytes through the window, without descriptor or doorbell. It is in order
    /// with what the window sends to this target, and with nothing else. Returns the number under which a
    /// failure is reported.
    #[inline]
    pub fn send(&mut self, target: u16, set: u16, payload: &[u8]) -> Result<u64, NotPosted> {
        self.alive()?;
        if target == 0 || target > self.capabilities.max_node {
            return Err(NotPosted::Invalid("no such node id"));
        }
        if self.window.is_full() {
            let taken = self.position(block::WINDOW_TAKEN, self.window.taken, self.window.sent)?;
            self.window.taken = taken;
            if self.window.is_full() {
                self.stats.full += 1;
                return Err(NotPosted::Full);
            }
        }
        let number = self
            .window
            .store(&*self.pages, self.at, target, set, payload)?;
        self.stats.sent += 1;
        Ok(number)
    }

    /// Takes up to `most` completions, and gives those that were asked for, and all failures, to `each`.
    /// Returns how many it took.
    #[inline]
    pub fn poll_completions(
        &mut self,
        most: usize,
        mut each: impl FnMut(Completion),
    ) -> Result<usize, DeviceFailed> {
        self.alive()?;
        let mut taken = 0;
        while taken < most {
            match self.completions.next(&mut self.book, self.window.sent) {
                Ok(None) => break,
                Ok(Some(completion)) => {
                    taken += 1;
                    if let Some(completion) = completion {
                        self.stats.failures += u64::from(!completion.status.is_ok());
                        each(completion);
                    }
                }
                Err(failed) => return Err(self.fail(failed)),
            }
        }
        self.stats.completions += taken as u64;
        self.tell_heads(false);
        Ok(taken)
    }

    /// Takes up to `most` inbound messages and gives them to `each`. Returns how many it took.
    #[inline]
    pub fn poll_messages(
        &mut self,
        most: usize,
        mut each: impl FnMut(&Message),
    ) -> Result<usize, DeviceFailed> {
        self.alive()?;
        let mut taken = 0;
        while taken < most {
            match self.inbound.next() {
                Ok(None) => break,
                Ok(Some(message)) => {
                    taken += 1;
                    each(&message);
                }
                Err(failed) => return Err(self.fail(failed)),
            }
        }
        self.stats.received += taken as u64;
        self.tell_heads(false);
        Ok(taken)
    }

    /// Asks for one interrupt as soon as there is, or already is, a completion or message that was not
    /// taken. The caller polls once more after it, and then sleeps.
    pub fn arm(&mut self) {
        if self.failed.is_some() {
            return;
        }
        self.tell_heads(true);
        self.armed = self.armed.checked_add(1).unwrap_or(1);
        self.pages.write32(self.at + page::ARM, self.armed);
        barrier::before_sleep();
    }

    /// Whether the link is up, as the device last said in host memory.
    pub fn link_up(&self) -> bool {
        self.state().link_up()
    }

    /// Looks whether the device is alive and says what can be. Reads registers: not for the data path, but
    /// for a timer, and for when something outstanding makes no progress.
    pub fn check(&mut self) -> Result<(), DeviceFailed> {
        self.alive()?;
        let status = DeviceStatus(self.pages.read32(self.at + page::DEVICE_STATUS));
        let state = self.state();
        let set = self.claim.set;
        let failed = if status.is_gone() {
            Some(DeviceFailed::Gone)
        } else if status.has_failed() {
            Some(DeviceFailed::Stopped)
        } else if state.has_failed() {
            let fault = self.pages.read32(self.at + page::FAULT);
            Some(DeviceFailed::SetFailed { set, fault })
        } else if self.pages.read32(self.at + page::ENABLE) != 1
            || state.generation() != self.generation
        {
            Some(DeviceFailed::Reset)
        } else if self.completions.has_gap() {
            let queue = "completion";
            Some(DeviceFailed::WrongPhase { queue })
        } else {
            None
        };
        failed.map_or(Ok(()), |failed| Err(self.fail(failed)))
    }

    #[inline]
    fn alive(&self) -> Result<(), DeviceFailed> {
        self.failed.map_or(Ok(()), Err)
    }

    fn fail(&mut self, failed: DeviceFailed) -> DeviceFailed {
        *self.failed.get_or_insert(failed)
    }

    fn state(&self) -> SetStatus {
        SetStatus(self.status.load(block::STATE as usize / 8))
    }

    /// A position of the status block: between what it was and what we have done.
    fn position(&mut self, offset: u64, before: u64, ours: u64) -> Result<u64, DeviceFailed> {
        let position = self.status.load(offset as usize / 8);
        if !(before..=ours).contains(&position) {
            return Err(self.fail(DeviceFailed::BadPosition { position, ours }));
        }
        barrier::after_phase();
        Ok(position)
    }

    fn has_slots(&mut self, needed: usize) -> Result<bool, DeviceFailed> {
        let fits = |fetched, filled| filled + needed as u64 - fetched <= self.work_entries.into();
        if fits(self.fetched, self.filled) {
            return Ok(true);
        }
        self.fetched = self.position(block::WQ_FETCHED, self.fetched, self.rung)?;
        let free = u64::from(self.work_entries) - (self.filled - self.fetched);
        Ok(needed as u64 <= free)
    }

    fn tell_heads(&mut self, exact: bool) {
        let heads = [
            (page::CQ_HEAD, self.completions.due_head(exact)),
            (page::MQ_HEAD, self.inbound.due_head(exact)),
        ];
        for (register, head) in heads {
            if let Some(head) = head {
                barrier::before_return();
                self.pages.write32(self.at + register, head);
                self.stats.head_updates += 1;
            }
        }
    }
}

impl Drop for QueueSet {
    fn drop(&mut self) {
        // If the device does not stop, its accesses fail in the IOMMU once the memory is unmapped.
        let _ = stop(&*self.pages, self.claim.set);
    }
}
