//! The send window (`docs/device.md`, 5.5): messages stored straight into the device.

use crate::error::NotPosted;
use crate::spec::{PAYLOAD, WINDOW_SLOTS, page};
use rdsock_vfio::{Registers, barrier};

/// The driver's end of a send window.
#[derive(Debug, Default)]
pub(crate) struct Window {
    /// Messages sent since the start.
    pub sent: u64,
    /// Messages taken by the device, when last looked.
    pub taken: u64,
}

impl Window {
    pub fn is_full(&self) -> bool {
        self.sent - self.taken >= WINDOW_SLOTS
    }

    /// Stores a message into the next slot, which must be free. Returns its number.
    #[inline]
    pub fn store(
        &mut self,
        registers: &dyn Registers,
        queue_page: u64,
        target: u16,
        set: u16,
        payload: &[u8],
    ) -> Result<u64, NotPosted> {
        if payload.len() > PAYLOAD {
            return Err(NotPosted::Invalid("a message has at most 48 bytes"));
        }
        let at = queue_page + page::WINDOW + self.sent % WINDOW_SLOTS * 64;
        let mut bytes = [0; PAYLOAD];
        bytes[..payload.len()].copy_from_slice(payload);
        for (i, eight) in bytes.chunks_exact(8).enumerate() {
            let mut word = [0; 8];
            word.copy_from_slice(eight);
            registers.write64(at + 16 + 8 * i as u64, u64::from_le_bytes(word));
        }
        barrier::before_message_header();
        self.sent += 1;
        let sequence = self.sent as u32;
        let header = u64::from(target) | u64::from(set) << 16 | u64::from(sequence) << 32;
        registers.write64(at, header);
        Ok(self.sent)
    }
}
