//! Who may reach a node's memory, and what of it (`docs/device.md`, 4): PEERS and the region table, as they lie in
//! the node's [port](crate::port), where sources look.
//!
//! Each word is loaded once for a check: in a port that processes share, another one may be storing.

use crate::sheet::*;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Entry of the region table.
#[derive(Debug, Default)]
#[repr(C, align(64))]
struct Region {
    control: AtomicU64,
    tag: AtomicU64,
    addr: AtomicU64,
    length: AtomicU64,
    source: AtomicU64,
}

/// What a remote operation wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Right {
    Write = 1,
    Read = 2,
}

/// Registers of BAR0 that sources look at.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Protection {
    /// NODE_ID: a node reaches itself.
    node_id: AtomicU64,
    _reserved: [AtomicU64; 15],
    peers: [AtomicU64; 16],
    _reserved_too: [AtomicU64; 32],
    regions: [Region; REGIONS as usize],
}

impl Protection {
    pub fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Protection {
            node_id: zero(),
            _reserved: std::array::from_fn(|_| zero()),
            peers: std::array::from_fn(|_| zero()),
            _reserved_too: std::array::from_fn(|_| zero()),
            regions: std::array::from_fn(|_| Region::default()),
        }
    }

    /// Back to reset values.
    pub fn clear(&self) {
        self.node_id.store(0, Relaxed);
        for word in &self.peers {
            word.store(0, Relaxed);
        }
        for region in &self.regions {
            for field in [
                &region.control,
                &region.tag,
                &region.addr,
                &region.length,
                &region.source,
            ] {
                field.store(0, Relaxed);
            }
        }
    }

    pub fn set_node_id(&self, id: u32) {
        self.node_id.store(id.into(), Relaxed);
    }

    /// A register of `width` bytes that is stored here.
    pub fn read(&self, offset: u64, width: u32) -> Option<u64> {
        self.register(offset, width).map(|word| word.load(Relaxed))
    }

    /// Stores to such a register; nothing happens where there is none.
    pub fn write(&self, offset: u64, width: u32, value: u64) {
        let Some(word) = self.register(offset, width) else {
            return;
        };
        let value = match place(offset) {
            Some((_, region::REGION_CONTROL)) => value & 7,
            Some((_, region::REGION_TAG)) => value & 0xffff,
            Some((_, region::REGION_ADDR)) => value & !7,
            Some((_, region::REGION_SOURCE)) => value & u64::from(u32::MAX),
            _ => value,
        };
        word.store(value, Relaxed);
    }

    fn register(&self, offset: u64, width: u32) -> Option<&AtomicU64> {
        if let Some(word) = peer_word(offset) {
            return (width == 8).then(|| &self.peers[word]);
        }
        let (entry, field) = place(offset)?;
        let entry = self.regions.get(entry)?;
        match (field, width) {
            (region::REGION_CONTROL, 4) => Some(&entry.control),
            (region::REGION_TAG, 4) => Some(&entry.tag),
            (region::REGION_SOURCE, 4) => Some(&entry.source),
            (region::REGION_ADDR, 8) => Some(&entry.addr),
            (region::REGION_LENGTH, 8) => Some(&entry.length),
            _ => None,
        }
    }

    /// Entries that are in use.
    pub fn valid_regions(&self) -> usize {
        let valid = |region: &&Region| region.control.load(Relaxed) & 1 != 0;
        self.regions.iter().filter(valid).count()
    }

    /// Whether `source` may reach this node at all.
    pub fn admits(&self, source: u32) -> bool {
        let word = self.peers.get(source as usize / 64);
        let word = word.map_or(0, |word| word.load(Relaxed));
        u64::from(source) == self.node_id.load(Relaxed) || word & 1 << (source % 64) != 0
    }

    /// The check of an access to `[offset, offset + len)` by `source`: the address of its start, or
    /// the status of the refusal.
    pub fn check(
        &self,
        key: u32,
        right: Right,
        source: u32,
        offset: u64,
        len: u64,
    ) -> Result<u64, u8> {
        let entry = self
            .regions
            .get((key & 0xffff) as usize)
            .ok_or(status::REFUSED_KEY)?;
        let control = entry.control.load(Relaxed);
        if control & 1 == 0 || entry.tag.load(Relaxed) != u64::from(key >> 16) {
            return Err(status::REFUSED_KEY);
        }
        if control >> right as u32 & 1 == 0 {
            return Err(status::REFUSED_RIGHTS);
        }
        let only = entry.source.load(Relaxed);
        if only != 0 && only != u64::from(source) {
            return Err(status::REFUSED_SOURCE);
        }
        let length = entry.length.load(Relaxed);
        offset
            .checked_add(len)
            .filter(|end| *end <= length)
            .and_then(|_| entry.addr.load(Relaxed).checked_add(offset))
            .ok_or(status::REFUSED_BOUNDS)
    }
}

/// Entry and field of an offset in the region table.
fn place(offset: u64) -> Option<(usize, u64)> {
    let offset = offset.checked_sub(REGION_TABLE)?;
    Some(((offset / REGION_SIZE) as usize, offset % REGION_SIZE))
}

/// Number of the word of PEERS at `offset`.
fn peer_word(offset: u64) -> Option<usize> {
    let offset = offset.checked_sub(management::PEERS)?;
    (offset < 128 && offset.is_multiple_of(8)).then_some(offset as usize / 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: u32 = 7 << 16 | 3;

    fn with_region(control: u64, source: u64) -> Box<Protection> {
        let protection = Box::new(Protection::new());
        let at = REGION_TABLE + 3 * REGION_SIZE;
        protection.write(at + region::REGION_TAG, 4, 7);
        protection.write(at + region::REGION_ADDR, 8, 0x1000);
        protection.write(at + region::REGION_LENGTH, 8, 0x100);
        protection.write(at + region::REGION_SOURCE, 4, source);
        protection.write(at + region::REGION_CONTROL, 4, control);
        protection
    }

    #[test]
    fn a_region_is_checked_by_key_right_source_and_bounds() {
        let check = |control, source, key, right, offset, len| {
            with_region(control, source).check(key, right, 5, offset, len)
        };
        assert_eq!(check(3, 5, KEY, Right::Write, 0x10, 0xf0), Ok(0x1010));
        assert_eq!(check(3, 0, KEY, Right::Write, 0x100, 0), Ok(0x1100));
        let refused = [
            (check(2, 5, KEY, Right::Write, 0, 1), status::REFUSED_KEY),
            (
                check(3, 5, KEY + 1, Right::Write, 0, 1),
                status::REFUSED_KEY,
            ),
            (
                check(3, 5, KEY ^ 1 << 16, Right::Write, 0, 1),
                status::REFUSED_KEY,
            ),
            (check(3, 5, KEY, Right::Read, 0, 1), status::REFUSED_RIGHTS),
            (check(5, 5, KEY, Right::Write, 0, 1), status::REFUSED_RIGHTS),
            (check(3, 6, KEY, Right::Write, 0, 1), status::REFUSED_SOURCE),
            (
                check(3, 5, KEY, Right::Write, 0x10, 0xf1),
                status::REFUSED_BOUNDS,
            ),
            (
                check(3, 5, KEY, Right::Write, u64::MAX, 2),
                status::REFUSED_BOUNDS,
            ),
        ];
        for (got, status) in refused {
            assert_eq!(got, Err(status));
        }
    }

    #[test]
    fn peers_are_admitted_by_their_bit_and_a_node_admits_itself() {
        let protection = Box::new(Protection::new());
        protection.set_node_id(9);
        protection.write(management::PEERS + 8, 8, 1 << 3);
        assert!(protection.admits(67) && protection.admits(9));
        assert!(!protection.admits(3) && !protection.admits(66) && !protection.admits(5000));
    }
}
