//! What the device holds for one queue set: positions, lanes, state. No access to memory here; that is
//! `engine.rs`.

use crate::descriptor::Descriptor;
use crate::sheet::LANE_DEPTH;
use std::collections::{BTreeMap, VecDeque};

/// A queue in host memory.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ring {
    pub addr: u64,
    pub log2: u32,
}

impl Ring {
    pub fn entries(self) -> u32 {
        1 << self.log2
    }

    /// Address of the entry with a free-running index.
    pub fn entry(self, index: u32, size: u64) -> u64 {
        let place = index & (self.entries() - 1);
        self.addr.wrapping_add(u64::from(place) * size)
    }

    /// 1 on even passes through the ring.
    pub fn phase(self, index: u32) -> u64 {
        u64::from(!(index.checked_shr(self.log2).unwrap_or(0)) & 1)
    }
}

/// State of a queue set; the values are those of SET_STATE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum State {
    #[default]
    Stopped = 0,
    Running = 1,
    Failed = 2,
}

/// An item that waits in a lane.
#[derive(Debug)]
pub(crate) struct Item {
    pub work: Descriptor,
    /// Not before this time (a delay that was injected).
    pub ready: u64,
}

/// Items from one queue set (its work queue, or its window) to one node.
#[derive(Debug, Default)]
pub(crate) struct Lane {
    pub items: VecDeque<Item>,
    /// Since when the head waits for the target.
    pub waiting: Option<u64>,
    /// Everything completes with FLUSHED.
    pub failed: bool,
}

impl Lane {
    pub fn is_full(&self) -> bool {
        self.items.len() >= LANE_DEPTH as usize
    }
}

/// The lanes of a work queue or window.
#[derive(Debug, Default)]
pub(crate) struct Lanes {
    pub by_node: BTreeMap<u16, Lane>,
    /// Items in all of them.
    pub held: usize,
    /// The lane whose being full stops the queue.
    pub blocked_on: Option<u16>,
}

impl Lanes {
    /// Puts an item into its lane; false, and the queue stops, when that is full.
    pub fn push(&mut self, item: Item) -> bool {
        let target = item.work.lane();
        let lane = self.by_node.entry(target).or_default();
        if lane.is_full() {
            self.blocked_on = Some(target);
            return false;
        }
        lane.items.push_back(item);
        self.held += 1;
        true
    }

    /// Whether the queue may be read.
    pub fn has_room(&mut self) -> bool {
        if let Some(node) = self.blocked_on
            && self.by_node.get(&node).is_some_and(Lane::is_full)
        {
            return false;
        }
        self.blocked_on = None;
        true
    }
}

/// One queue set.
#[derive(Debug, Default)]
pub(crate) struct QueueSet {
    pub state: State,
    pub work: Ring,
    pub completions: Ring,
    pub status: u64,
    /// Slots taken since the start.
    pub fetched: u64,
    /// Messages taken from the window since the start.
    pub window_taken: u64,
    /// Free-running index of the next completion.
    pub completion_tail: u32,
    /// Descriptors by target.
    pub descriptors: Lanes,
    /// Window messages by target.
    pub window: Lanes,
    /// Value of ARM that has fired, as last seen.
    pub fired: u32,
    /// A fault that was injected.
    pub stuck: bool,
}

/// Which of a set's two groups of lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    WorkQueue,
    Window,
}

impl QueueSet {
    pub fn lanes(&mut self, source: Source) -> &mut Lanes {
        match source {
            Source::WorkQueue => &mut self.descriptors,
            Source::Window => &mut self.window,
        }
    }
}
