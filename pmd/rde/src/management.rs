//! The management page (`docs/device.md`, 3): who this node is, and who may reach it. Where the kernel module
//! keeps the page, it does this; the daemon does it for a model in its own process.

use crate::error::OpenError;
use crate::spec::{DeviceStatus, management, page, state};
use crate::start::wait;
use rdsock_vfio::Registers;
use std::sync::Arc;
use std::time::Duration;

/// The registers of the management page.
#[derive(Clone, Debug)]
pub struct Management {
    registers: Arc<dyn Registers>,
    pages: Arc<dyn Registers>,
}

impl Management {
    pub(crate) fn new(registers: Arc<dyn Registers>, pages: Arc<dyn Registers>) -> Self {
        Management { registers, pages }
    }

    /// Whether a kernel module keeps the page (3.4). Then the device is the node that the module was told:
    /// [`Management::join`], [`Management::leave`] and [`Management::set_stall_timeout`] do nothing.
    pub fn is_kept(&self) -> bool {
        self.registers.read32(management::KEPT) == 1
    }

    /// Joins the fabric as a node that only `peers` (and itself) may reach.
    pub fn join(&self, node: u16, peers: &[u16]) {
        if self.is_kept() {
            return;
        }
        self.leave();
        let mut words = [0u64; 16];
        for peer in peers {
            if let Some(word) = words.get_mut(usize::from(peer / 64)) {
                *word |= 1 << (peer % 64);
            }
        }
        for (i, word) in words.iter().enumerate() {
            self.registers
                .write64(management::PEERS + 8 * i as u64, *word);
        }
        self.registers.write32(management::NODE_ID, node.into());
        self.registers
            .write32(management::CONTROL, 1 << state::FABRIC);
    }

    /// Leaves the fabric.
    pub fn leave(&self) {
        if !self.is_kept() {
            self.registers.write32(management::CONTROL, 0);
        }
    }

    /// Time without progress after which a lane fails (7.3), rounded down to microseconds; zero: never.
    pub fn set_stall_timeout(&self, timeout: Duration) {
        if !self.is_kept() {
            let micros = timeout.as_micros().try_into().unwrap_or(u32::MAX);
            self.registers.write32(management::STALL_TIMEOUT, micros);
        }
    }

    /// Register STATUS, by its copy on the first queue page.
    pub fn status(&self) -> DeviceStatus {
        DeviceStatus(self.pages.read32(page::DEVICE_STATUS))
    }

    /// This node's id, 0 for none.
    pub fn node(&self) -> u32 {
        self.registers.read32(management::NODE_ID)
    }

    /// One of the device's own counters (3.3), by its word; `None` when the page can't be read: the device is gone, or
    /// the kernel keeps the page for itself.
    pub fn counter(&self, word: usize) -> Option<u64> {
        if self.is_kept() {
            // It would refuse, and count the attempt.
            return None;
        }
        let value = (self.registers).read64(management::COUNTERS + 8 * word as u64);
        (value != u64::MAX).then_some(value)
    }

    /// Resets the device. All queue sets and regions are gone when it returns.
    pub fn reset(&self) -> Result<(), OpenError> {
        if self.is_kept() {
            return Err(OpenError::Kept);
        }
        self.registers
            .write32(management::CONTROL, 1 << state::RESET);
        let read = || self.registers.read32(management::CONTROL);
        wait("reset", read, |control| control & 1 << state::RESET == 0).map(|_| ())
    }
}
