//! What is posted and has not completed: the driver's own book, against which each completion is checked.
//!
//! Entries are linked in the order of posting for each target, since a completion covers everything
//! before it in its lane (`docs/device.md`, 5.3). Nothing is allocated after the start.

use crate::error::DeviceFailed;
use crate::spec::{CompletionHead, CompletionTail};

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    tag: u64,
    cookie: u32,
    index: u32,
    length: u32,
    next: u32,
    target: u16,
    opcode: u8,
    live: bool,
    /// The device was asked for a completion.
    completes: bool,
    /// The caller was promised a report.
    report: bool,
}

#[derive(Clone, Copy, Debug)]
struct List {
    first: u32,
    last: u32,
    count: u32,
    /// Entries since the last one that completes.
    silent: u32,
}

/// The book of one queue set.
#[derive(Debug)]
pub(crate) struct Outstanding {
    entries: Box<[Entry]>,
    free: Vec<u32>,
    lists: Box<[List]>,
    lane_depth: u32,
    /// Most entries to one target between two that complete.
    silence: u32,
}

/// What an entry is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Posted {
    pub tag: u64,
    pub index: u32,
    pub length: u32,
    pub target: u16,
    pub opcode: u8,
    pub report: bool,
}

/// An entry whose completion came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Finished {
    pub tag: u64,
    pub report: bool,
}

impl Outstanding {
    /// A book of `capacity` entries (at most 65 536) to nodes up to `max_node`, `lane_depth` to each.
    pub fn new(capacity: u32, max_node: u16, lane_depth: u32) -> Self {
        let empty = List {
            first: NONE,
            last: NONE,
            count: 0,
            silent: 0,
        };
        Outstanding {
            entries: vec![Entry::default(); capacity as usize].into(),
            free: (0..capacity).rev().collect(),
            lists: vec![empty; usize::from(max_node) + 1].into(),
            lane_depth,
            silence: capacity.min(lane_depth) / 8,
        }
    }

    /// Entries in the book.
    pub fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    pub fn target_is_full(&self, target: u16) -> bool {
        let list = self.lists.get(usize::from(target));
        list.is_none_or(|list| list.count >= self.lane_depth)
    }

    /// Enters what is posted: its cookie, and whether the device must complete it. It must when the caller
    /// asks, and often enough that entries come free by themselves.
    pub fn enter(&mut self, posted: Posted) -> Option<(u32, bool)> {
        let list = self.lists.get_mut(usize::from(posted.target))?;
        let half_empty = self.free.len() * 2 > self.entries.len();
        let place = self.free.pop()?;
        let completes = posted.report || !half_empty || list.silent >= self.silence;
        list.silent = if completes { 0 } else { list.silent + 1 };
        let entry = self.entries.get_mut(place as usize)?;
        let turn = (entry.cookie >> 16).wrapping_add(1);
        *entry = Entry {
            tag: posted.tag,
            cookie: turn << 16 | place,
            index: posted.index,
            length: posted.length,
            next: NONE,
            target: posted.target,
            opcode: posted.opcode,
            live: true,
            completes,
            report: posted.report,
        };
        let cookie = entry.cookie;
        if let Some(last) = self.entries.get_mut(list.last as usize) {
            last.next = place;
        } else {
            list.first = place;
        }
        list.last = place;
        list.count += 1;
        Some((cookie, completes))
    }

    /// Checks a completion, and takes its entry and those that it covers out of the book.
    pub fn finish(
        &mut self,
        head: CompletionHead,
        tail: CompletionTail,
    ) -> Result<Finished, DeviceFailed> {
        let cookie = tail.cookie();
        let place = cookie & 0xffff;
        let for_nothing = DeviceFailed::ForNothing {
            cookie,
            index: tail.index(),
        };
        let contradiction = DeviceFailed::Contradiction { cookie };
        let entry = *self
            .entries
            .get(place as usize)
            .filter(|entry| entry.live && entry.cookie == cookie)
            .ok_or(for_nothing)?;
        let status = head.status();
        let length = if status.is_ok() { entry.length } else { 0 };
        if entry.index != tail.index()
            || entry.target != head.target()
            || entry.opcode != head.opcode()
            || head.length() != length
            || !status.is_known()
            || (status.is_ok() && !entry.completes)
        {
            return Err(contradiction);
        }
        let list = self
            .lists
            .get_mut(usize::from(entry.target))
            .ok_or(contradiction)?;
        loop {
            let first = list.first;
            let done = self.entries.get_mut(first as usize).ok_or(contradiction)?;
            if first != place && done.completes {
                // It should have completed before.
                return Err(contradiction);
            }
            done.live = false;
            list.first = done.next;
            list.count -= 1;
            self.free.push(first);
            if first == place {
                break;
            }
        }
        if list.first == NONE {
            list.last = NONE;
        }
        Ok(Finished {
            tag: entry.tag,
            report: entry.report || !status.is_ok(),
        })
    }
}
