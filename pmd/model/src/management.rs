//! Registers of the management page (`docs/device.md`, 3) that only the function itself looks at; those that
//! other nodes' operations look at are in `protection.rs`.

use crate::sheet::*;

/// Registers that the host may change, with their reset values.
#[derive(Debug)]
pub(crate) struct Management {
    pub node_id: u32,
    pub fabric: bool,
    pub stall_timeout: u32,
}

impl Management {
    pub fn new() -> Self {
        Management {
            node_id: 0,
            fabric: false,
            stall_timeout: STALL_TIMEOUT,
        }
    }

    /// A capability or a register that is stored here.
    pub fn read(&self, offset: u64, width: u32, queue_sets: u32) -> Option<u64> {
        let value = match (offset, width) {
            (management::MAGIC, 8) => return Some(MAGIC),
            (management::FEATURES, 8) => return Some(FEATURES),
            (_, 8) => return None,
            (management::VERSION, _) => VERSION,
            (management::QUEUE_SETS, _) => queue_sets,
            (management::MAX_NODE, _) => MAX_NODE,
            (management::REGIONS, _) => REGIONS,
            (management::MAX_QUEUE, _) => MAX_QUEUE,
            (management::MAX_TRANSFER, _) => MAX_TRANSFER,
            (management::LANE_DEPTH, _) => LANE_DEPTH,
            (management::MAX_PIECES, _) => MAX_PIECES,
            (management::MAX_INLINE, _) => MAX_INLINE,
            (management::KEPT, _) => 0,
            (management::NODE_ID, _) => self.node_id,
            (management::CONTROL, _) => u32::from(self.fabric) << state::FABRIC,
            (management::STALL_TIMEOUT, _) => self.stall_timeout,
            _ => return None,
        };
        Some(value.into())
    }

    /// Stores to a 32-bit register; nothing happens where there is none.
    pub fn write32(&mut self, offset: u64, value: u32) {
        match offset {
            management::NODE_ID if !self.fabric && value <= MAX_NODE => self.node_id = value,
            management::STALL_TIMEOUT => self.stall_timeout = value,
            _ => {}
        }
    }
}
