//! The device's other side: links, resets, faults, and the registers of BAR0. What data do is in
//! `engine.rs`.

use crate::counters::Counters;
use crate::engine::{Core, Node};
use crate::faults::Fault;
use crate::management::Management;
use crate::queue_set::{QueueSet, State};
use crate::sheet::*;
use std::sync::atomic::Ordering::{self, Relaxed};

/// Tries for the lock of an own port before a holder that lives is taken for one that never comes back.
const HOLD_TRIES: u32 = 200_000;

impl Core {
    /// Takes in what the wire has to tell, without waiting.
    pub fn poll_wire(&mut self) {
        let Some(mut wire) = self.wire.take() else {
            return;
        };
        wire.poll(&mut self.peers);
        self.wire = Some(wire);
        self.bury();
    }

    /// Releases the locks of nodes that have gone.
    pub fn bury(&mut self) {
        while let Some(token) = self.peers.gone.pop() {
            for n in 0..self.nodes.len() {
                if self.nodes[n].port().take_over(token, self.token) {
                    self.recover(n);
                    self.nodes[n].port().unlock(self.token);
                }
            }
        }
    }

    /// Does something to a function while no source is at work there.
    pub fn hold<R>(&mut self, n: usize, change: impl FnOnce(&Node) -> R) -> R {
        let mut tries = 0;
        while !self.nodes[n].port().try_lock(self.token) {
            // Perhaps the holder has died, and the wire tells of it.
            self.poll_wire();
            tries += 1;
            if tries < HOLD_TRIES {
                std::thread::yield_now();
                continue;
            }
            // It was stopped in the middle of an item. When it goes on, it finds itself cut off; a copy that
            // was under way goes on.
            let holder = self.nodes[n].port().holder();
            self.peers.cut(holder);
            if self.nodes[n].port().take_over(holder, self.token) {
                self.recover(n);
                break;
            }
        }
        let done = change(&self.nodes[n]);
        self.nodes[n].port().unlock(self.token);
        done
    }

    /// Brings a port into order whose lock was taken from somebody: a message whose entry is complete has been
    /// delivered, and one whose entry is not has not.
    fn recover(&mut self, n: usize) {
        let node = &self.nodes[n];
        for set in 0..node.sets.len() {
            let inbound = node.inbound(set);
            let tail = inbound.tail.load(Relaxed) as u32;
            if let Some(ring) = inbound.ring().filter(|_| inbound.open.load(Relaxed) != 0) {
                let mut word = [0];
                let loaded = node.end.dma.load(ring.entry(tail, 64), &mut word);
                if loaded.is_ok() && word[0] >> 63 == ring.phase(tail) {
                    inbound.tail.store(tail.wrapping_add(1).into(), Relaxed);
                }
            }
        }
    }

    /// Takes a link down by chance, and up again.
    pub fn flap(&mut self, n: usize) {
        if self.dice.chaos.link_ppm != 0
            && let Some(for_ns) = self.dice.link_down()
        {
            self.nodes[n].link_cut_until = self.now + for_ns;
            self.refresh_links();
        }
        let node = &mut self.nodes[n];
        if node.link_cut_until != 0 && node.link_cut_until <= self.now {
            node.link_cut_until = 0;
            self.refresh_links();
        }
    }

    /// Brings routes and link states up to date, and tells the hosts.
    pub fn refresh_links(&mut self) {
        self.routes.fill(None);
        // Who has an id keeps it; then who wants one gets it, if it is free.
        for keeps in [true, false] {
            for (n, node) in self.nodes.iter_mut().enumerate() {
                if node.has_id != keeps {
                    continue;
                }
                let id = node.management.node_id as usize;
                let free = match self.wire_id {
                    Some(own) if n == 0 => usize::from(own) == id,
                    _ => self.wire_id.map(usize::from) != Some(id) && !self.peers.knows(id as u16),
                };
                let joined = node.management.fabric && id != 0 && free && !node.is_removed();
                node.has_id = joined && self.routes[id].is_none();
                if node.has_id {
                    self.routes[id] = Some(n);
                }
            }
        }
        for n in 0..self.nodes.len() {
            let node = &self.nodes[n];
            let up = node.has_id && !node.link_cut && node.link_cut_until <= self.now;
            if up != node.link_up {
                self.set_link(n, up);
            }
        }
    }

    fn set_link(&mut self, n: usize, up: bool) {
        self.hold(n, |node| node.port().link_up.store(up.into(), Relaxed));
        let node = &mut self.nodes[n];
        node.link_up = up;
        if node.is_removed() {
            return;
        }
        let (status, state) = (node.status(), node.block_state(false));
        for set in 0..node.sets.len() {
            let node = &mut self.nodes[n];
            node.page(set).store32(page::DEVICE_STATUS, status);
            if node.sets[set].state == State::Running
                && let Err(fault) = node.store_status(set, block::STATE, &[state])
            {
                self.fail(n, set, fault);
            }
        }
        let node = &self.nodes[n];
        if node.end.has_vector(0) {
            node.tally.interrupts.add(1);
            node.end.fire(0);
        }
    }

    /// Resets a function.
    pub fn reset(&mut self, n: usize) {
        self.hold(n, |node| {
            node.port().link_up.store(0, Relaxed);
            node.port().protection.clear();
            for (set, page) in node.front.pages().iter().enumerate() {
                node.inbound(set).stop();
                page.fill(0);
                page.store32(page::DEVICE_STATUS, 1 << state::READY);
            }
        });
        let node = &mut self.nodes[n];
        node.management = Management::new();
        node.generation += 1;
        node.tally.resets.add(1);
        node.link_up = false;
        node.reset_in_flight = false;
        node.sets.fill_with(QueueSet::default);
        self.refresh_links();
    }

    /// Plays a fault at a node.
    pub fn inject(&mut self, n: usize, fault: Fault) {
        let node = &mut self.nodes[n];
        match fault {
            Fault::LinkDown(down) => {
                node.link_cut = down;
                self.refresh_links();
            }
            Fault::Stuck(set, stuck) => {
                if let Some(set) = node.sets.get_mut(set as usize) {
                    set.stuck = stuck;
                }
            }
            Fault::Full(set, full) => {
                if (set as usize) < node.sets.len() {
                    let inbound = node.inbound(set as usize);
                    inbound.full.store(full.into(), Relaxed);
                }
            }
            Fault::Corrupt(corruption) => node.corrupt = Some(corruption),
            Fault::CompletionForNothing(set) => self.completion_for_nothing(n, set as usize),
            Fault::MessageOutOfPlace(set) => self.message_out_of_place(n, set as usize),
            Fault::ResetInFlight => node.reset_in_flight = true,
            Fault::Remove => {
                node.front.removed.store(true, Ordering::Relaxed);
                // For a driver that has them mapped.
                node.front
                    .pages()
                    .iter()
                    .for_each(|page| page.fill(u64::MAX));
                self.refresh_links();
            }
        }
    }

    /// Loads a register of BAR0.
    pub fn read(&self, n: usize, offset: u64, width: u32) -> Option<u64> {
        let node = self.nodes.get(n)?;
        match (offset, width) {
            (management::STATUS, 4) => Some(node.status().into()),
            (management::GENERATION, 8) => Some(node.generation),
            (management::COUNTERS..0x300, 8) => {
                let word = (offset - management::COUNTERS) / 8;
                let counters = node.tally.sum(&node.port().tally);
                Some(counter_word(&counters, word as usize))
            }
            _ => node
                .management
                .read(offset, width, node.sets.len() as u32)
                .or_else(|| node.port().protection.read(offset, width)),
        }
    }

    /// Stores to a register of BAR0.
    pub fn write(&mut self, n: usize, offset: u64, width: u32, value: u64) {
        match (offset, width) {
            (management::CONTROL, 4) if value >> state::RESET & 1 != 0 => self.reset(n),
            (management::CONTROL, 4) => {
                self.nodes[n].management.fabric = value >> state::FABRIC & 1 != 0;
                self.refresh_links();
            }
            _ => {
                let management = &mut self.nodes[n].management;
                if width == 4 {
                    management.write32(offset, value as u32);
                }
                let id = management.node_id;
                // Nothing that other nodes do here is under way while it changes (4).
                self.hold(n, |node| {
                    node.port().protection.set_node_id(id);
                    node.port().protection.write(offset, width, value);
                });
            }
        }
    }
}

fn counter_word(counters: &Counters, word: usize) -> u64 {
    match word {
        counter::DESCRIPTORS => counters.descriptors,
        counter::MESSAGES_OUT => counters.messages_out,
        counter::MESSAGES_IN => counters.messages_in + counters.notifications_in,
        counter::BYTES_OUT => counters.bytes_read,
        counter::BYTES_IN => counters.bytes_written,
        counter::REFUSED_HERE => counters.refused_here,
        counter::REFUSED_THERE => counters.refused_there,
        counter::DMA_FAULTS => counters.dma_faults,
        counter::HELD => counters.held,
        counter::LANES_FAILED => counters.lanes_failed,
        _ => 0,
    }
}
