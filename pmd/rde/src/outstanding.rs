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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::work;

    fn enter(book: &mut Outstanding, target: u16, index: u32, report: bool) -> Option<(u32, bool)> {
        book.enter(Posted {
            tag: index.into(),
            index,
            length: 0,
            target,
            opcode: work::FLUSH,
            report,
        })
    }

    fn finish(book: &mut Outstanding, target: u16, cookie: u32, index: u32) -> Option<u64> {
        let head = u64::from(target) << 32 | u64::from(work::FLUSH) << 56;
        let tail = u64::from(cookie) | u64::from(index) << 32;
        let finished = book.finish(CompletionHead(head), CompletionTail(tail));
        finished.ok().map(|finished| finished.tag)
    }

    #[test]
    fn completions_of_a_lane_come_in_order_and_those_of_others_as_they_like() {
        let mut book = Outstanding::new(64, 4, 64);
        let cookies =
            [1, 1, 2].map(|target| enter(&mut book, target, target.into(), true).unwrap().0);
        assert_eq!(finish(&mut book, 2, cookies[2], 2), Some(2));
        assert_eq!(
            finish(&mut book, 1, cookies[1], 1),
            None,
            "the first is missing"
        );
    }

    #[test]
    fn a_completion_covers_the_silent_ones_before_it() {
        let mut book = Outstanding::new(64, 4, 64);
        let silent: Vec<_> = (0..3)
            .map(|i| enter(&mut book, 1, i, false).unwrap())
            .collect();
        assert!(silent.iter().all(|(_, completes)| !completes));
        let (cookie, completes) = enter(&mut book, 1, 3, true).unwrap();
        assert!(completes && book.len() == 4);
        assert_eq!(
            finish(&mut book, 1, silent[1].0, 1),
            None,
            "nobody asked for it"
        );
        assert_eq!(finish(&mut book, 1, cookie, 3), Some(3));
        assert_eq!(book.len(), 0);
        assert_eq!(finish(&mut book, 1, cookie, 3), None, "once is enough");
    }

    #[test]
    fn silence_ends_before_the_book_is_full() {
        let mut book = Outstanding::new(64, 64, 64);
        let mut last = (0, false);
        for i in 0..64 {
            last = enter(&mut book, i as u16 + 1, i, false).unwrap();
        }
        assert!(book.is_full() && last.1);
        assert_eq!(enter(&mut book, 1, 64, true), None);
    }
}
