//! Allocation of I/O virtual addresses, first fit, within the ranges that the IOMMU translates.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// No memory is mapped below this address, so that a zeroed address is an error.
const LOWEST: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// The addresses of one device.
#[derive(Debug)]
pub struct Iovas {
    ranges: Vec<RangeInclusive<u64>>,
    /// Start and length of what is in use.
    used: BTreeMap<u64, u64>,
}

impl Iovas {
    /// All addresses of some ranges.
    pub fn new(ranges: Vec<RangeInclusive<u64>>) -> Self {
        Iovas {
            ranges,
            used: BTreeMap::new(),
        }
    }

    /// Takes `len` bytes at a multiple of `align`, a power of two of at least a page.
    pub fn take(&mut self, len: u64, align: u64) -> Option<u64> {
        let len = len.checked_next_multiple_of(PAGE).filter(|len| *len != 0)?;
        for range in &self.ranges {
            let mut at = (*range.start())
                .max(LOWEST)
                .checked_next_multiple_of(align)?;
            while at
                .checked_add(len - 1)
                .is_some_and(|last| last <= *range.end())
            {
                let Some(busy_end) = self.overlap(at, len) else {
                    self.used.insert(at, len);
                    return Some(at);
                };
                at = busy_end.checked_next_multiple_of(align)?;
            }
        }
        None
    }

    /// Gives back what starts at `iova`.
    pub fn give_back(&mut self, iova: u64) {
        self.used.remove(&iova);
    }

    /// End of something in use that overlaps `[at, at + len)`.
    fn overlap(&self, at: u64, len: u64) -> Option<u64> {
        let (start, used) = self.used.range(..at + len).next_back()?;
        (start + used > at).then_some(start + used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_do_not_overlap_and_avoid_the_holes() {
        let mut iovas = Iovas::new(vec![0..=0x1f_ffff, 0x30_0000..=0x30_2fff]);
        assert_eq!(iovas.take(0x1000, 0x1000), Some(LOWEST));
        assert_eq!(iovas.take(1, 0x1000), Some(LOWEST + 0x1000));
        assert_eq!(iovas.take(0xff000, 0x1000), None);
        assert_eq!(iovas.take(0xfe000, 0x1000), Some(LOWEST + 0x2000));
        assert_eq!(iovas.take(0x3000, 0x1000), Some(0x30_0000));
        assert_eq!(iovas.take(1, 0x1000), None);
        iovas.give_back(LOWEST + 0x1000);
        assert_eq!(iovas.take(0x1000, 0x1000), Some(LOWEST + 0x1000));
        assert_eq!(iovas.take(0, 0x1000), None);
        assert_eq!(iovas.take(u64::MAX, 0x1000), None);
    }

    #[test]
    fn alignment_is_kept() {
        let mut iovas = Iovas::new(vec![0..=u64::MAX]);
        iovas.take(0x1000, 0x1000);
        assert_eq!(iovas.take(0x20_0000, 0x20_0000), Some(0x20_0000));
        assert_eq!(iovas.take(0x20_0000, 0x20_0000), Some(0x40_0000));
    }
}
