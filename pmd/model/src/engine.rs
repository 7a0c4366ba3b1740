//! The devices at work: what each does in a step. `execute.rs` has the execution of one item.

use crate::counters::Tally;
use crate::descriptor::{self, Descriptor, Slot};
use crate::dma::Dma;
use crate::fabric::Front;
use crate::faults::{Corruption, Dice};
use crate::management::Management;
use crate::page::Page;
use crate::port::{Inbound, MAX_SETS, Port};
use crate::queue_set::{Item, Lanes, QueueSet, Ring, Source, State};
use crate::sheet::*;
use crate::wire::{End, Peers, Wire};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::{self, Relaxed};

/// Slots taken from a work queue, and messages from a window, in one step.
const BATCH: usize = 16;
/// Items executed in one lane in one step.
const LANE_BATCH: usize = 16;

/// One device.
pub(crate) struct Node {
    /// What sources see of it.
    pub end: End,
    pub front: Arc<Front>,
    pub management: Management,
    pub sets: Vec<QueueSet>,
    /// What its own work did here.
    pub tally: Tally,
    pub corrupt: Option<Corruption>,
    pub reset_in_flight: bool,
    pub link_up: bool,
    /// It is in the routes.
    pub has_id: bool,
    pub link_cut: bool,
    pub link_cut_until: u64,
    pub generation: u64,
}

impl Node {
    pub fn new(dma: Arc<dyn Dma>, front: Arc<Front>) -> Self {
        let sets = front.queue_sets();
        for page in front.pages() {
            page.store32(page::DEVICE_STATUS, 1 << state::READY);
        }
        Node {
            end: End {
                memory: front.memory.clone(),
                dma,
                interrupts: vec![None; 1 + sets],
            },
            front,
            management: Management::new(),
            sets: (0..sets).map(|_| QueueSet::default()).collect(),
            tally: Tally::default(),
            corrupt: None,
            reset_in_flight: false,
            link_up: false,
            has_id: false,
            link_cut: false,
            link_cut_until: 0,
            generation: 0,
        }
    }

    pub fn page(&self, set: usize) -> &Page {
        &self.front.pages()[set]
    }

    pub fn port(&self) -> &Port {
        self.end.port()
    }

    /// A queue set as sources see it.
    pub fn inbound(&self, set: usize) -> &Inbound {
        &self.port().sets[set]
    }

    pub fn is_removed(&self) -> bool {
        self.front.removed.load(Ordering::Relaxed)
    }

    pub fn status(&self) -> u32 {
        1 << state::READY | u32::from(self.link_up) << state::LINK_UP
    }

    /// Word STATE of a status block.
    pub fn block_state(&self, failed: bool) -> u64 {
        u64::from(self.link_up) | u64::from(failed) << 1 | self.generation << 32
    }

    /// Stores an entry into host memory and counts a failure.
    pub fn store(&self, iova: u64, words: &[u64]) -> Result<(), u32> {
        self.end.dma.store(iova, words).map_err(|_| {
            self.tally.dma_faults.add(1);
            fault::DMA_FAULT
        })
    }

    pub fn store_status(&self, set: usize, offset: u64, words: &[u64]) -> Result<(), u32> {
        self.tally.status_writes.add(words.len() as u64);
        self.store(self.sets[set].status.wrapping_add(offset), words)
    }
}

/// All devices of a fabric that are in this process, and what they reach.
pub(crate) struct Core {
    pub nodes: Vec<Node>,
    pub dice: Dice,
    pub now: u64,
    /// Index in `nodes` by node id.
    pub routes: Vec<Option<usize>>,
    pub peers: Peers,
    /// What tells of the peers.
    pub wire: Option<Box<dyn Wire>>,
    /// The id under which the wire knows the first node.
    pub wire_id: Option<u16>,
    /// What is put into locks.
    pub token: u64,
    order: Vec<u16>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core")
            .field("nodes", &self.nodes.len())
            .field("peers", &self.peers)
            .field("now", &self.now)
            .finish_non_exhaustive()
    }
}

impl Core {
    pub fn new(dice: Dice) -> Self {
        Core {
            nodes: Vec::new(),
            dice,
            now: 0,
            routes: vec![None; MAX_NODE as usize + 1],
            peers: Peers::new(),
            wire: None,
            wire_id: None,
            token: 1,
            order: Vec::new(),
        }
    }

    pub fn step(&mut self, now: u64) -> bool {
        self.step_sets(0..MAX_SETS, now)
    }

    /// A step of some queue sets of each device.
    pub fn step_sets(&mut self, sets: Range<usize>, now: u64) -> bool {
        self.now = self.now.max(now);
        let mut worked = false;
        for node in 0..self.nodes.len() {
            if self.nodes[node].is_removed() {
                continue;
            }
            self.flap(node);
            let there = self.nodes[node].sets.len();
            for set in sets.start..sets.end.min(there) {
                self.control(node, set);
                if self.nodes[node].sets[set].state == State::Running {
                    worked |= self.serve(node, set);
                }
                worked |= !self.fire(node, set);
            }
        }
        worked
    }

    fn serve(&mut self, node: usize, set: usize) -> bool {
        if self.nodes[node].sets[set].stuck {
            return false;
        }
        let mut worked = match self.fetch(node, set).and_then(|some| {
            let more = self.take_window(node, set)?;
            Ok(some | more)
        }) {
            Ok(worked) => worked,
            Err(fault) => {
                self.fail(node, set, fault);
                return true;
            }
        };
        for source in [Source::WorkQueue, Source::Window] {
            worked |= self.run_lanes(node, set, source);
        }
        worked
    }

    /// Follows ENABLE, and what sources found.
    pub fn control(&mut self, n: usize, set: usize) {
        let node = &self.nodes[n];
        let enable = node.page(set).load32(page::ENABLE) & 1 != 0;
        match (node.sets[set].state, enable) {
            (State::Stopped, true) => match self.start(n, set) {
                Ok(()) => {
                    let node = &mut self.nodes[n];
                    node.sets[set].state = State::Running;
                    node.page(set)
                        .store32(page::SET_STATE, State::Running as u32);
                }
                Err(fault) => self.fail(n, set, fault),
            },
            (State::Running | State::Failed, false) => {
                self.hold(n, |node| node.inbound(set).stop());
                let node = &mut self.nodes[n];
                node.sets[set] = QueueSet::default();
                node.page(set).store32(page::FAULT, 0);
                node.page(set)
                    .store32(page::SET_STATE, State::Stopped as u32);
            }
            (State::Running, true) => {
                let fault = node.inbound(set).fault.load(Relaxed) as u32;
                if fault != 0 {
                    self.fail(n, set, fault);
                }
            }
            _ => {}
        }
    }

    fn start(&mut self, n: usize, set: usize) -> Result<(), u32> {
        let node = &mut self.nodes[n];
        let page = node.page(set);
        let sizes = page.load32(page::SIZES);
        let ring = |register, shift: u32, entry: u64| {
            let (addr, log2) = (page.load64(register), sizes >> shift & 0xff);
            let fits = (MIN_QUEUE..=MAX_QUEUE).contains(&log2)
                && addr.is_multiple_of(64)
                && addr.checked_add(entry << log2).is_some();
            fits.then_some(Ring { addr, log2 }).ok_or(fault::BAD_SETUP)
        };
        let status = page.load64(page::STATUS_ADDR);
        let fresh = QueueSet {
            work: ring(page::WQ_ADDR, 0, 64)?,
            completions: ring(page::CQ_ADDR, 8, 16)?,
            status,
            ..Default::default()
        };
        let messages = ring(page::MQ_ADDR, 16, 64)?;
        if !status.is_multiple_of(64) {
            return Err(fault::BAD_SETUP);
        }
        node.sets[set] = fresh;
        let state = node.block_state(false);
        node.store_status(set, 0, &[state, 0, 0, 0, 0, 0, 0, 0])?;
        self.hold(n, |node| node.inbound(set).start(messages));
        Ok(())
    }

    /// Stops a queue set for good.
    pub fn fail(&mut self, n: usize, set: usize, fault: u32) {
        self.hold(n, |node| node.inbound(set).stop());
        let node = &mut self.nodes[n];
        node.tally.sets_failed.add(1);
        node.sets[set].state = State::Failed;
        if fault != fault::BAD_SETUP {
            let state = node.block_state(true);
            // The set has failed whether or not the block can be written.
            let _ = node.store_status(set, block::STATE, &[state]);
        }
        let page = node.page(set);
        page.store32(page::FAULT, fault);
        page.store32(page::SET_STATE, State::Failed as u32);
    }

    /// Takes descriptors from the work queue into their lanes.
    fn fetch(&mut self, n: usize, s: usize) -> Result<bool, u32> {
        let node = &mut self.nodes[n];
        let tail = node.page(s).load32(page::WQ_TAIL);
        let set = &mut node.sets[s];
        let start = set.fetched as u32;
        let pending = tail.wrapping_sub(start);
        if pending > set.work.entries() {
            return Err(fault::BAD_DOORBELL);
        }
        if pending == 0 || !set.descriptors.has_room() {
            return Ok(false);
        }
        let count = (pending as usize).min(BATCH);
        let mut slots: [Slot; BATCH] = [[0; 8]; BATCH];
        let to_end = (set.work.entries() - (start & (set.work.entries() - 1))) as usize;
        let (first, second) = slots[..count].split_at_mut(count.min(to_end));
        for (at, part) in [(start, first), (start.wrapping_add(to_end as u32), second)] {
            if !part.is_empty() {
                node.tally.descriptor_reads.add(1);
                let loaded = node
                    .end
                    .dma
                    .load(set.work.entry(at, 64), part.as_flattened_mut());
                if loaded.is_err() {
                    node.tally.dma_faults.add(1);
                    return Err(fault::DMA_FAULT);
                }
            }
        }
        let mut at = 0;
        while at < count {
            let needs = descriptor::slots(&slots[at]).ok_or(fault::BAD_FRAMING)?;
            if at + needs > count {
                if at + needs > pending as usize {
                    return Err(fault::BAD_FRAMING);
                }
                break;
            }
            let index = start.wrapping_add(at as u32);
            let work = Descriptor::read(&slots[at..at + needs], index);
            let ready = self.now + self.dice.delay();
            if !set.descriptors.push(Item { work, ready }) {
                break;
            }
            node.tally.descriptors.add(1);
            at += needs;
        }
        set.fetched += at as u64;
        let fetched = set.fetched;
        if at != 0 {
            node.store_status(s, block::WQ_FETCHED, &[fetched])?;
        }
        Ok(at != 0)
    }

    /// Takes messages from the send window into their lanes.
    fn take_window(&mut self, n: usize, s: usize) -> Result<bool, u32> {
        let node = &mut self.nodes[n];
        let page = &node.front.pages()[s];
        let set = &mut node.sets[s];
        let before = set.window_taken;
        while set.window_taken - before < BATCH as u64 {
            let at = page::WINDOW + set.window_taken % WINDOW_SLOTS * 64;
            let word = page.load64(at);
            let sequence = (set.window_taken as u32).wrapping_add(1);
            if (word >> 32) as u32 != sequence || !set.window.has_room() {
                break;
            }
            let payload = std::array::from_fn(|i| page.load64(at + 16 + 8 * i as u64));
            let work = Descriptor::message(sequence, word as u16, (word >> 16) as u16, payload);
            let ready = self.now + self.dice.delay();
            if !set.window.push(Item { work, ready }) {
                break;
            }
            set.window_taken += 1;
            node.tally.window_messages.add(1);
        }
        let taken = set.window_taken;
        if taken != before {
            node.store_status(s, block::WINDOW_TAKEN, &[taken])?;
        }
        Ok(taken != before)
    }

    fn run_lanes(&mut self, node: usize, set: usize, source: Source) -> bool {
        let lanes = self.nodes[node].sets[set].lanes(source);
        if lanes.held == 0 {
            return false;
        }
        let mut order = std::mem::take(&mut self.order);
        order.clear();
        let busy = |(node, lane): (&u16, &crate::queue_set::Lane)| {
            (!lane.items.is_empty()).then_some(*node)
        };
        order.extend(lanes.by_node.iter().filter_map(busy));
        self.dice.order(&mut order);
        let mut worked = false;
        for &key in &order {
            worked |= self.run_lane(node, set, source, key);
        }
        self.order = order;
        worked
    }

    /// Executes what a lane holds, as far as it can be done now.
    fn run_lane(&mut self, n: usize, s: usize, source: Source, key: u16) -> bool {
        let generation = self.nodes[n].generation;
        let lanes: &mut Lanes = self.nodes[n].sets[s].lanes(source);
        let Some(mut lane) = lanes.by_node.get_mut(&key).map(std::mem::take) else {
            return false;
        };
        let mut done = 0;
        while done < LANE_BATCH && self.advance(n, s, &mut lane) {
            done += 1;
        }
        if self.nodes[n].generation == generation {
            let lanes = self.nodes[n].sets[s].lanes(source);
            lanes.held -= done;
            lanes.by_node.insert(key, lane);
        }
        done != 0
    }

    /// Fires the vector of a queue set that asked for it. False when that could not be looked at now.
    ///
    /// A source that delivers does the same, and no request is missed between the two: both look at ARM and at
    /// the message queue's tail with the port's lock held. If the source comes first, its tail is seen here; if
    /// it comes later, it sees ARM.
    fn fire(&mut self, n: usize, s: usize) -> bool {
        let node = &mut self.nodes[n];
        let page = &node.front.pages()[s];
        let arm = page.load32(page::ARM);
        let set = &mut node.sets[s];
        // What has fired is remembered here too: the port's word lies where sources store with each message.
        if arm == 0 || arm == set.fired || set.state == State::Stopped {
            return true;
        }
        let port = node.end.port();
        if !port.try_lock(self.token) {
            return false;
        }
        let tail = port.sets[s].tail.load(Relaxed) as u32;
        let due = set.state == State::Failed
            || page.load32(page::CQ_HEAD) != set.completion_tail
            || page.load32(page::MQ_HEAD) != tail;
        let fires = due && node.end.wants_interrupt(s);
        set.fired = port.sets[s].fired.load(Relaxed) as u32;
        port.unlock(self.token);
        if fires {
            node.end.fire(1 + s);
        }
        true
    }
}
