//! The completion queue (`docs/device.md`, 5.3): read by phase, checked against the book.

use crate::error::DeviceFailed;
use crate::outstanding::Outstanding;
use crate::spec::{CompletionHead, CompletionTail, Status};
use rdsock_vfio::{Words, barrier};

/// Words of an entry.
pub(crate) const ENTRY_WORDS: usize = 2;

/// What became of something that was posted, or of a window message that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The tag of the work; of a window message, its number as `send` returned it, modulo 2^32.
    pub tag: u64,
    /// Node id.
    pub target: u16,
    /// Whether it is done, or why not.
    pub status: Status,
    /// Bytes moved.
    pub length: u32,
    /// It was a message sent through the window.
    pub window: bool,
}

/// The driver's end of a completion queue.
#[derive(Debug)]
pub(crate) struct CompletionQueue {
    words: Words,
    mask: u32,
    /// Free-running index of the next entry.
    head: u32,
    /// What CQ_HEAD was told.
    told: u32,
}

impl CompletionQueue {
    pub fn new(words: Words, log2: u8) -> Self {
        CompletionQueue {
            words,
            mask: (1 << log2) - 1,
            head: 0,
            told: 0,
        }
    }

    fn phase(&self, index: u32) -> bool {
        index & (self.mask + 1) == 0
    }

    fn word(&self, index: u32, word: usize) -> u64 {
        self.words
            .load((index & self.mask) as usize * ENTRY_WORDS + word)
    }

    /// The next entry, checked. `Some(None)` is one that nobody asked for.
    #[inline]
    pub fn next(
        &mut self,
        book: &mut Outstanding,
        sent: u64,
    ) -> Result<Option<Option<Completion>>, DeviceFailed> {
        let head = CompletionHead(self.word(self.head, 0));
        if head.phase() != self.phase(self.head) {
            return Ok(None);
        }
        barrier::after_phase();
        let tail = CompletionTail(self.word(self.head, 1));
        self.head = self.head.wrapping_add(1);
        let mut completion = Completion {
            tag: tail.index().into(),
            target: head.target(),
            status: head.status(),
            length: head.length(),
            window: head.opcode() == 0,
        };
        if completion.window {
            let ago = (sent as u32).wrapping_sub(tail.index());
            let possible = u64::from(ago) < sent && !head.status().is_ok();
            if !possible || !head.status().is_known() || tail.cookie() != 0 {
                return Err(DeviceFailed::ForNothing {
                    cookie: tail.cookie(),
                    index: tail.index(),
                });
            }
            return Ok(Some(Some(completion)));
        }
        let finished = book.finish(head, tail)?;
        completion.tag = finished.tag;
        Ok(Some(finished.report.then_some(completion)))
    }

    /// The head to tell the device, when it is time: a quarter of the queue after the last time, or
    /// any progress when `exact`.
    pub fn due_head(&mut self, exact: bool) -> Option<u32> {
        let behind = self.head.wrapping_sub(self.told);
        let due = behind > self.mask / 4 || (exact && behind != 0);
        due.then(|| {
            self.told = self.head;
            self.head
        })
    }

    /// Whether an entry lies behind the next one that is not there. For the slow path: the device
    /// may write the next one meanwhile, so the next is looked at last.
    pub fn has_gap(&self) -> bool {
        let there = |index: u32| CompletionHead(self.word(index, 0)).phase() == self.phase(index);
        let behind = there(self.head.wrapping_add(1));
        barrier::after_phase();
        behind && !there(self.head)
    }
}
