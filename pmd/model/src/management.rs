//! Management page and region table of one function (`docs/device.md`, 3 and 4): registers and the
//! checks that hang on them.

use crate::sheet::*;

/// Entry of the region table.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Region {
    control: u32,
    tag: u32,
    addr: u64,
    length: u64,
    source: u32,
}

/// What a remote operation wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Right {
    Write = 1,
    Read = 2,
}

/// Registers that the host may change, with their reset values.
#[derive(Debug)]
pub(crate) struct Management {
    pub node_id: u32,
    pub fabric: bool,
    pub stall_timeout: u32,
    pub peers: [u64; 16],
    regions: Box<[Region]>,
}

impl Management {
    pub fn new() -> Self {
        Management {
            node_id: 0,
            fabric: false,
            stall_timeout: STALL_TIMEOUT,
            peers: [0; 16],
            regions: vec![Region::default(); REGIONS as usize].into(),
        }
    }

    /// A capability or a register that is stored here.
    pub fn read32(&self, offset: u64, queue_sets: u32) -> Option<u32> {
        Some(match offset {
            management::VERSION => VERSION,
            management::QUEUE_SETS => queue_sets,
            management::MAX_NODE => MAX_NODE,
            management::REGIONS => REGIONS,
            management::MAX_QUEUE => MAX_QUEUE,
            management::MAX_TRANSFER => MAX_TRANSFER,
            management::LANE_DEPTH => LANE_DEPTH,
            management::MAX_PIECES => MAX_PIECES,
            management::MAX_INLINE => MAX_INLINE,
            management::NODE_ID => self.node_id,
            management::CONTROL => u32::from(self.fabric) << state::FABRIC,
            management::STALL_TIMEOUT => self.stall_timeout,
            _ => {
                let (entry, field) = place(offset)?;
                let entry = self.regions.get(entry)?;
                match field {
                    region::REGION_CONTROL => entry.control,
                    region::REGION_TAG => entry.tag,
                    region::REGION_SOURCE => entry.source,
                    _ => return None,
                }
            }
        })
    }

    pub fn read64(&self, offset: u64) -> Option<u64> {
        match offset {
            management::MAGIC => Some(MAGIC),
            management::FEATURES => Some(FEATURES),
            _ => {
                if let Some(word) = peer_word(offset) {
                    return Some(self.peers[word]);
                }
                let (entry, field) = place(offset)?;
                let entry = self.regions.get(entry)?;
                match field {
                    region::REGION_ADDR => Some(entry.addr),
                    region::REGION_LENGTH => Some(entry.length),
                    _ => None,
                }
            }
        }
    }

    pub fn write32(&mut self, offset: u64, value: u32) {
        match offset {
            management::NODE_ID if !self.fabric && value <= MAX_NODE => self.node_id = value,
            management::STALL_TIMEOUT => self.stall_timeout = value,
            _ => {
                let Some((entry, field)) = place(offset) else {
                    return;
                };
                let Some(entry) = self.regions.get_mut(entry) else {
                    return;
                };
                match field {
                    region::REGION_CONTROL => entry.control = value & 7,
                    region::REGION_TAG => entry.tag = value & 0xffff,
                    region::REGION_SOURCE => entry.source = value,
                    _ => {}
                }
            }
        }
    }

    pub fn write64(&mut self, offset: u64, value: u64) {
        if let Some(word) = peer_word(offset) {
            self.peers[word] = value;
        } else if let Some((entry, field)) = place(offset)
            && let Some(entry) = self.regions.get_mut(entry)
        {
            match field {
                region::REGION_ADDR => entry.addr = value & !7,
                region::REGION_LENGTH => entry.length = value,
                _ => {}
            }
        }
    }

    /// Whether `source` may reach this node at all.
    pub fn admits(&self, source: u32) -> bool {
        let word = self.peers.get(source as usize / 64).copied().unwrap_or(0);
        source == self.node_id || word & 1 << (source % 64) != 0
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
        let entry = self.regions.get((key & 0xffff) as usize);
        let entry = entry
            .filter(|entry| entry.control & 1 != 0 && entry.tag == key >> 16)
            .ok_or(status::REFUSED_KEY)?;
        if entry.control >> right as u32 & 1 == 0 {
            return Err(status::REFUSED_RIGHTS);
        }
        if entry.source != 0 && entry.source != source {
            return Err(status::REFUSED_SOURCE);
        }
        offset
            .checked_add(len)
            .filter(|end| *end <= entry.length)
            .and_then(|_| entry.addr.checked_add(offset))
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
    let word = offset.checked_sub(management::PEERS)? / 8;
    (word < 16).then_some(word as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: u32 = 7 << 16 | 3;

    fn with_region(control: u32, source: u32) -> Management {
        let mut management = Management::new();
        let at = REGION_TABLE + 3 * REGION_SIZE;
        management.write32(at + region::REGION_TAG, 7);
        management.write64(at + region::REGION_ADDR, 0x1000);
        management.write64(at + region::REGION_LENGTH, 0x100);
        management.write32(at + region::REGION_SOURCE, source);
        management.write32(at + region::REGION_CONTROL, control);
        management
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
        let mut management = Management::new();
        management.write32(crate::sheet::management::NODE_ID, 9);
        management.write64(crate::sheet::management::PEERS + 8, 1 << 3);
        assert!(management.admits(67) && management.admits(9));
        assert!(!management.admits(3) && !management.admits(66) && !management.admits(5000));
    }
}
