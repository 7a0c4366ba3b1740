//! Registers that are mapped into the process where the bus allows it, and reached through the bus elsewhere.
//!
//! Opts into `unsafe` for loads and stores in the mapped areas.

use crate::capabilities::Area;
use crate::device::Registers;
use memmap2::{MmapOptions, MmapRaw};
use std::fmt::Debug;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

/// How a bus reaches a region that is not mapped.
pub(crate) trait Far: Send + Sync + Debug {
    /// Reads bytes; false when that failed.
    fn read(&self, offset: u64, to: &mut [u8]) -> bool;
    /// Writes bytes; a failure is logged.
    fn write(&self, offset: u64, from: &[u8]);
    /// Whether the device is known to have gone, though mapped memory still answers.
    fn is_gone(&self) -> bool;
}

/// A part of a region, mapped.
#[derive(Debug)]
pub(crate) struct MappedArea {
    offset: u64,
    mapping: MmapRaw,
}

impl MappedArea {
    /// Maps an area of a region whose offset 0 is at `region` in the file.
    pub fn map(file: &impl AsFd, region: u64, area: Area) -> std::io::Result<Self> {
        let absurd = || std::io::Error::other("an area of absurd size");
        let offset = region.checked_add(area.offset).ok_or_else(absurd)?;
        let len = usize::try_from(area.size).map_err(|_| absurd())?;
        if len == 0 || !area.offset.is_multiple_of(8) {
            return Err(absurd());
        }
        let mapping = MmapOptions::new()
            .offset(offset)
            .len(len)
            .map_raw(file.as_fd().as_raw_fd())?;
        Ok(MappedArea {
            offset: area.offset,
            mapping,
        })
    }

    /// Address of a register that lies in it as a whole.
    #[inline]
    fn at(&self, offset: u64, width: u64) -> Option<NonNull<u8>> {
        let inside = offset.checked_sub(self.offset)?;
        if inside.checked_add(width)? > self.mapping.len() as u64 {
            return None;
        }
        // SAFETY: inside the mapping.
        NonNull::new(unsafe { self.mapping.as_mut_ptr().add(inside as usize) })
    }
}

/// The registers of a region.
#[derive(Debug)]
pub(crate) struct RegionRegisters<F> {
    pub size: u64,
    pub areas: Vec<MappedArea>,
    pub far: F,
}

impl<F: Far> RegionRegisters<F> {
    /// Address of a register, if it is mapped.
    #[inline]
    fn mapped(&self, offset: u64, width: u64) -> Option<NonNull<u8>> {
        if !offset.is_multiple_of(width) {
            return None;
        }
        self.areas.iter().find_map(|area| area.at(offset, width))
    }

    fn is_inside(&self, offset: u64, width: u64) -> bool {
        offset.is_multiple_of(width)
            && offset
                .checked_add(width)
                .is_some_and(|end| end <= self.size)
    }

    fn far_read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0xff; N];
        if self.is_inside(offset, N as u64) && !self.far.read(offset, &mut bytes) {
            return [0xff; N];
        }
        bytes
    }

    fn far_write(&self, offset: u64, bytes: &[u8]) {
        if self.is_inside(offset, bytes.len() as u64) {
            self.far.write(offset, bytes);
        }
    }
}

// Volatile accesses: each is one load or store of its width, as `at` has found it aligned (a mapping starts
// at a page, and an area's offset is a multiple of 8). Order is the caller's: see `barrier`.
impl<F: Far> Registers for RegionRegisters<F> {
    fn read32(&self, offset: u64) -> u32 {
        match self.mapped(offset, 4) {
            Some(_) if self.far.is_gone() => u32::MAX,
            // SAFETY: mapped and aligned; no reference to it exists.
            Some(at) => unsafe { at.cast::<u32>().read_volatile() },
            None => u32::from_le_bytes(self.far_read(offset)),
        }
    }

    fn read64(&self, offset: u64) -> u64 {
        match self.mapped(offset, 8) {
            Some(_) if self.far.is_gone() => u64::MAX,
            // SAFETY: as above.
            Some(at) => unsafe { at.cast::<u64>().read_volatile() },
            None => u64::from_le_bytes(self.far_read(offset)),
        }
    }

    #[inline]
    fn write32(&self, offset: u64, value: u32) {
        match self.mapped(offset, 4) {
            // SAFETY: as above.
            Some(at) => unsafe { at.cast::<u32>().write_volatile(value) },
            None => self.far_write(offset, &value.to_le_bytes()),
        }
    }

    #[inline]
    fn write64(&self, offset: u64, value: u64) {
        match self.mapped(offset, 8) {
            // SAFETY: as above.
            Some(at) => unsafe { at.cast::<u64>().write_volatile(value) },
            None => self.far_write(offset, &value.to_le_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Bytes of a region, of which the first page is mapped somewhere else.
    #[derive(Debug)]
    struct Bytes(Mutex<Vec<u8>>, bool);

    impl Far for Bytes {
        fn read(&self, offset: u64, to: &mut [u8]) -> bool {
            let bytes = self.0.lock().unwrap();
            to.copy_from_slice(&bytes[offset as usize..][..to.len()]);
            true
        }
        fn write(&self, offset: u64, from: &[u8]) {
            self.0.lock().unwrap()[offset as usize..][..from.len()].copy_from_slice(from);
        }
        fn is_gone(&self) -> bool {
            self.1
        }
    }

    fn registers(gone: bool) -> (std::fs::File, RegionRegisters<Bytes>) {
        let file = crate::sealed::make(c"test", 8192, nix::sys::memfd::MFdFlags::empty()).unwrap();
        let area = Area {
            offset: 4096,
            size: 4096,
        };
        let registers = RegionRegisters {
            size: 8192,
            areas: vec![MappedArea::map(&file, 0, area).unwrap()],
            far: Bytes(Mutex::new(vec![0; 8192]), gone),
        };
        (file, registers)
    }

    #[test]
    fn an_access_goes_where_the_register_is() {
        let (file, registers) = registers(false);
        registers.write32(4096, 0x1234);
        registers.write64(8184, 7);
        registers.write32(4092, 0x5678);
        let mut bytes = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 4096).unwrap();
        assert_eq!(bytes, 0x1234u64.to_le_bytes());
        assert_eq!(
            (registers.read32(4096), registers.read64(8184)),
            (0x1234, 7)
        );
        assert_eq!(registers.read32(4092), 0x5678);
        assert_eq!(registers.far.0.lock().unwrap()[4092..4094], [0x78, 0x56]);
        // Neither aligned nor inside.
        for offset in [1, 4098, 8192, 8190, u64::MAX, u64::MAX - 3] {
            registers.write32(offset, 1);
            assert_eq!(registers.read32(offset), u32::MAX, "{offset:#x}");
        }
        assert_eq!(registers.read64(4100), u64::MAX);
        assert_eq!(registers.read64(4092), u64::MAX);
    }

    #[test]
    fn a_device_that_is_gone_reads_all_ones_from_mapped_memory_too() {
        let (_, registers) = registers(true);
        assert_eq!(registers.read32(4096), u32::MAX);
        assert_eq!(registers.read64(4096), u64::MAX);
    }
}
