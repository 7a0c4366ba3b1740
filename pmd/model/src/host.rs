//! The device's other side: links, resets, faults, and the registers of BAR0. What data do is in
//! `engine.rs`.

use crate::counters::Counters;
use crate::engine::Core;
use crate::faults::Fault;
use crate::management::Management;
use crate::queue_set::{QueueSet, State};
use crate::sheet::*;
use std::sync::atomic::Ordering;

impl Core {
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
                let joined = node.management.fabric && id != 0 && !node.is_removed();
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
        self.nodes[n].interrupt(0);
    }

    /// Resets a function.
    pub fn reset(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        node.management = Management::new();
        node.generation += 1;
        node.counters.resets += 1;
        node.link_up = false;
        node.reset_in_flight = false;
        for (set, page) in node.sets.iter_mut().zip(&node.front.pages) {
            *set = QueueSet::default();
            page.fill(0);
            page.store32(page::DEVICE_STATUS, 1 << state::READY);
        }
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
                if let Some(set) = node.sets.get_mut(set as usize) {
                    set.full = full;
                }
            }
            Fault::Corrupt(corruption) => node.corrupt = Some(corruption),
            Fault::CompletionForNothing(set) => self.completion_for_nothing(n, set as usize),
            Fault::MessageOutOfPlace(set) => self.message_out_of_place(n, set as usize),
            Fault::ResetInFlight => node.reset_in_flight = true,
            Fault::Remove => {
                node.front.removed.store(true, Ordering::Relaxed);
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
                Some(counter_word(&node.counters, word as usize))
            }
            (_, 4) => {
                let sets = node.sets.len() as u32;
                node.management.read32(offset, sets).map(u64::from)
            }
            _ => node.management.read64(offset),
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
            (_, 4) => self.nodes[n].management.write32(offset, value as u32),
            (_, 8) => self.nodes[n].management.write64(offset, value),
            _ => {}
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
