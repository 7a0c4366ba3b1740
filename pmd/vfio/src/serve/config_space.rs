//! The PCI configuration space of a served model (`docs/device.md`, 2).

use rdsock_model::sheet::BAR0_SIZE;

/// Bytes of it.
pub const SIZE: usize = 4096;
/// Bytes of BAR4, and of its part before the pending bits.
pub const BAR4_SIZE: u64 = 0x10000;
pub const PENDING_BITS: u64 = 0x8000;

const PCI_EXPRESS: usize = 0x40;
const DEVICE_CONTROL: usize = PCI_EXPRESS + 8;
const MSI_X: usize = 0x80;

/// See the module's text.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    at_reset: Vec<u8>,
    /// Bits that can be written.
    writable: Vec<u8>,
}

impl ConfigSpace {
    /// Of a function with so many vectors, and so many bytes of queue pages (a power of two).
    pub fn new(vectors: u32, bar2_size: u64) -> Self {
        let mut space = ConfigSpace {
            bytes: vec![0; SIZE],
            at_reset: Vec::new(),
            writable: vec![0; SIZE],
        };
        space.set(0x00, &[0x44, 0x52, 0x31, 0x45]); // vendor 0x5244, device 0x4531
        space.set(0x06, &[0x10]); // status: there is a list of capabilities
        space.set(0x08, &[0x01, 0x00, 0x80, 0x02]); // revision 1, class 0x028000
        space.set(0x2c, &[0x44, 0x52, 0x31, 0x45]); // subsystem: the same
        space.set(0x34, &[PCI_EXPRESS as u8]);
        space.allow(0x04, &[0x46, 0x05]); // command: memory, master, parity, SERR, INTx off
        space.allow(0x0c, &[0xff]); // cache line size
        space.allow(0x3c, &[0xff]); // interrupt line
        // 64-bit memory; bit 3: prefetchable.
        for (at, size, kind) in [
            (0x10, BAR0_SIZE, 0x4),
            (0x18, bar2_size, 0xc),
            (0x20, BAR4_SIZE, 0x4),
        ] {
            space.set(at, &[kind]);
            space.allow(at, &(!(size - 1)).to_le_bytes());
        }
        space.set(PCI_EXPRESS, &[0x10, MSI_X as u8, 0x02, 0x00]); // version 2, endpoint
        space.set(PCI_EXPRESS + 4, &[0x00, 0x80, 0x00, 0x10]); // role-based errors, FLR
        space.allow(DEVICE_CONTROL, &[0xff, 0x7f]);
        space.set(PCI_EXPRESS + 0xc, &[0x11, 0x00, 0x00, 0x00]); // link: 2.5 GT/s, one lane
        space.allow(PCI_EXPRESS + 0x10, &[0xf3, 0x0f]);
        space.set(PCI_EXPRESS + 0x12, &[0x11, 0x00]);
        let last = vectors.clamp(1, 2048) - 1;
        space.set(MSI_X, &[0x11, 0x00, last as u8, (last >> 8) as u8]);
        space.allow(MSI_X + 3, &[0xc0]); // enable, mask all
        space.set(MSI_X + 4, &[4, 0, 0, 0]); // table: BAR4, at 0
        space.set(MSI_X + 8, &(PENDING_BITS as u32 | 4).to_le_bytes());
        space.at_reset = space.bytes.clone();
        space
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }

    /// Bytes at an offset; the caller has checked that they lie inside.
    pub fn read(&self, at: usize, to: &mut [u8]) {
        to.copy_from_slice(&self.bytes[at..at + to.len()]);
    }

    /// Stores what can be stored. True when it starts a function level reset.
    pub fn write(&mut self, at: usize, from: &[u8]) -> bool {
        for (place, byte) in (at..).zip(from) {
            let writable = self.writable[place];
            self.bytes[place] = self.bytes[place] & !writable | byte & writable;
        }
        let resets = DEVICE_CONTROL + 1;
        let high = resets.checked_sub(at).and_then(|at| from.get(at));
        high.is_some_and(|byte| byte & 0x80 != 0)
    }

    /// What a reset leaves.
    pub fn reset(&mut self) {
        self.bytes.clone_from(&self.at_reset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(space: &ConfigSpace, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        space.read(at, &mut bytes);
        bytes
    }

    #[test]
    fn it_is_what_the_data_sheet_says() {
        let space = ConfigSpace::new(5, 4 * 4096);
        assert_eq!(u16::from_le_bytes(read(&space, 0)), 0x5244);
        assert_eq!(u16::from_le_bytes(read(&space, 2)), 0x4531);
        assert_eq!(u32::from_le_bytes(read(&space, 8)), 0x0280_0001);
        let mut at = read::<1>(&space, 0x34)[0] as usize;
        let mut found = Vec::new();
        while at != 0 {
            let [id, next] = read(&space, at);
            found.push(id);
            at = next as usize;
        }
        assert_eq!(found, [0x10, 0x11]);
        let abilities = u32::from_le_bytes(read(&space, PCI_EXPRESS + 4));
        assert_ne!(abilities & 1 << 28, 0, "function level reset");
        assert_eq!(u16::from_le_bytes(read(&space, MSI_X + 2)), 4);
    }

    #[test]
    fn a_bar_says_its_size_and_only_what_can_be_written_is() {
        let mut space = ConfigSpace::new(5, 4 * 4096);
        for (at, size, kind) in [
            (0x10, 0x20000u64, 4),
            (0x18, 0x4000, 0xc),
            (0x20, 0x10000, 4),
        ] {
            assert!(!space.write(at, &[0xff; 8]));
            let bar = u64::from_le_bytes(read(&space, at));
            assert_eq!((!(bar & !0xf)).wrapping_add(1), size);
            assert_eq!(bar & 0xf, kind);
        }
        space.write(0, &[0; 4]);
        assert_eq!(u16::from_le_bytes(read(&space, 0)), 0x5244);
        space.write(4, &[0x07, 0]);
        assert_eq!(read(&space, 4), [0x06, 0]);
        space.reset();
        assert_eq!(read(&space, 4), [0, 0]);
        assert_eq!(read(&space, 0x10), [4, 0, 0, 0]);
    }

    #[test]
    fn a_function_level_reset_is_a_write_of_its_bit() {
        let mut space = ConfigSpace::new(2, 4096);
        assert!(space.write(DEVICE_CONTROL, &[0, 0x80]));
        assert!(space.write(DEVICE_CONTROL + 1, &[0x80]));
        assert!(space.write(DEVICE_CONTROL - 4, &[0, 0, 0, 0, 0, 0xff, 0, 0]));
        assert!(!space.write(DEVICE_CONTROL, &[0x80, 0x7f]));
        assert!(!space.write(DEVICE_CONTROL + 2, &[0x80]));
        assert_eq!(read(&space, DEVICE_CONTROL), [0x80, 0x7f]);
    }
}
