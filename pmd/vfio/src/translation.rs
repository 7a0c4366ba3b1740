//! What stands for the IOMMU of a model: I/O virtual addresses, and the memory of this process that they lead to.
//!
//! Opts into `unsafe` to copy there on the model's behalf.

use crate::device::BusError;
use memmap2::MmapRaw;
use rdsock_model::{Dma, DmaFault};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// What is mapped where.
#[derive(Debug, Default)]
pub(crate) struct Translation {
    /// By first I/O virtual address. Engines access it, and buses change it, with their fabric's lock held, so that
    /// nobody ever waits here, and an access may hold it for reading twice.
    mappings: RwLock<BTreeMap<u64, Mapping>>,
}

/// Memory that stays mapped in this process for as long as it is in the translation.
#[derive(Clone, Debug)]
pub(crate) struct Mapping {
    pub host: NonNull<u8>,
    pub len: u64,
    pub writable: bool,
    /// What keeps it mapped, if nobody else does.
    pub _memory: Option<Arc<MmapRaw>>,
}

// SAFETY: an address; what is done with it is justified where it is done.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Translation {
    /// Adds memory where there is none.
    pub fn insert(&self, iova: u64, mapping: Mapping) -> Result<(), BusError> {
        let refused = BusError::Range {
            iova,
            len: mapping.len,
        };
        let mut mappings = self
            .mappings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(end) = iova.checked_add(mapping.len).filter(|_| mapping.len != 0) else {
            return Err(refused);
        };
        let before = mappings.range(..end).next_back();
        if before.is_some_and(|(start, other)| start + other.len > iova) {
            return Err(refused);
        }
        mappings.insert(iova, mapping);
        Ok(())
    }

    /// Takes out what [`Translation::insert`] put in with the same range.
    pub fn remove(&self, iova: u64, len: u64) -> Result<(), BusError> {
        let mut mappings = self
            .mappings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        match mappings.get(&iova) {
            Some(mapping) if mapping.len == len => {
                mappings.remove(&iova);
                Ok(())
            }
            _ => Err(BusError::Range { iova, len }),
        }
    }

    /// Takes out whatever lies in the range, parts of larger mappings too.
    pub fn cut(&self, iova: u64, len: u64) {
        let mut mappings = self
            .mappings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let end = iova.saturating_add(len);
        // From the last on: what is left of the first may begin before the range.
        while let Some((start, mapping)) = mappings.range(..end).next_back() {
            let (start, mapping) = (*start, mapping.clone());
            // It does not wrap: checked when it was put in.
            let old_end = start + mapping.len;
            if old_end <= iova {
                return;
            }
            mappings.remove(&start);
            if old_end > end {
                // SAFETY: inside the mapping, or one past its end.
                let host = unsafe { mapping.host.add((end - start) as usize) };
                let len = old_end - end;
                mappings.insert(
                    end,
                    Mapping {
                        host,
                        len,
                        ..mapping.clone()
                    },
                );
            }
            if start < iova {
                let len = iova - start;
                mappings.insert(start, Mapping { len, ..mapping });
                return;
            }
        }
    }

    /// Mappings, and their bytes.
    pub fn size(&self) -> (usize, u64) {
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let bytes = mappings.values().map(|mapping| mapping.len).sum();
        (mappings.len(), bytes)
    }

    /// Calls `access` with the host address of `len` bytes at `iova`.
    fn with(
        &self,
        iova: u64,
        len: usize,
        write: bool,
        access: impl FnOnce(NonNull<u8>),
    ) -> Result<(), DmaFault> {
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let (start, mapping) = mappings.range(..=iova).next_back().ok_or(DmaFault)?;
        let offset = iova - start;
        let inside = offset
            .checked_add(len as u64)
            .is_some_and(|end| end <= mapping.len);
        if !inside || (write && !mapping.writable) {
            return Err(DmaFault);
        }
        // SAFETY: inside a mapping.
        access(unsafe { mapping.host.add(offset as usize) });
        Ok(())
    }

    /// As above, where the bytes lie in several mappings, one behind the other, as where an IOMMU maps pages:
    /// for each part its place among the bytes, host address and length. Nothing is accessed when one is missing.
    #[cold]
    fn across(
        &self,
        iova: u64,
        len: usize,
        write: bool,
        mut access: impl FnMut(usize, NonNull<u8>, usize),
    ) -> Result<(), DmaFault> {
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let end = iova.checked_add(len as u64).ok_or(DmaFault)?;
        let (first, _) = mappings.range(..=iova).next_back().ok_or(DmaFault)?;
        let parts = || mappings.range(*first..end);
        let mut reached = iova;
        for (start, mapping) in parts() {
            if *start > reached || (write && !mapping.writable) {
                return Err(DmaFault);
            }
            reached = start + mapping.len;
        }
        if reached < end {
            return Err(DmaFault);
        }
        for (start, mapping) in parts() {
            let from = iova.max(*start);
            let until = end.min(start + mapping.len);
            // SAFETY: inside a mapping.
            let host = unsafe { mapping.host.add((from - start) as usize) };
            access((from - iova) as usize, host, (until - from) as usize);
        }
        Ok(())
    }

    /// As [`Translation::with`], for words.
    fn with_words(
        &self,
        iova: u64,
        count: usize,
        write: bool,
        access: impl FnOnce(&[AtomicU64]),
    ) -> Result<(), DmaFault> {
        if !iova.is_multiple_of(8) {
            return Err(DmaFault);
        }
        let mut aligned = true;
        self.with(iova, count * 8, write, |host| {
            aligned = host.cast::<u64>().is_aligned();
            if aligned {
                // SAFETY: inside a mapping, aligned, and shared with the driver through atomics. It stays
                // mapped while the translation's lock is held.
                access(unsafe { std::slice::from_raw_parts(host.as_ptr().cast(), count) });
            }
        })?;
        if aligned { Ok(()) } else { Err(DmaFault) }
    }
}

impl Dma for Translation {
    fn read(&self, iova: u64, to: &mut [u8]) -> Result<(), DmaFault> {
        self.with(iova, to.len(), false, |host| {
            // SAFETY: `with` has checked the range; `to` is the model's own. Bytes that the host
            // writes meanwhile are old or new, as with a real device.
            unsafe { host.copy_to_nonoverlapping(NonNull::from(&mut *to).cast(), to.len()) }
        })
        .or_else(|_| {
            self.across(iova, to.len(), false, |at, host, len| {
                let part = NonNull::from(&mut to[at..at + len]).cast();
                // SAFETY: as above, for a part.
                unsafe { host.copy_to_nonoverlapping(part, len) }
            })
        })
    }

    fn write(&self, iova: u64, from: &[u8]) -> Result<(), DmaFault> {
        self.with(iova, from.len(), true, |host| {
            // SAFETY: as above, and nobody holds a reference into mapped memory.
            unsafe { host.copy_from_nonoverlapping(NonNull::from(from).cast(), from.len()) }
        })
        .or_else(|_| {
            self.across(iova, from.len(), true, |at, host, len| {
                let part = NonNull::from(&from[at..at + len]).cast();
                // SAFETY: as above, for a part.
                unsafe { host.copy_from_nonoverlapping(part, len) }
            })
        })
    }

    fn load(&self, iova: u64, to: &mut [u64]) -> Result<(), DmaFault> {
        let load = |words: &[AtomicU64], to: &mut [u64]| {
            for (word, to) in words.iter().zip(to) {
                *to = word.load(Ordering::Acquire);
            }
        };
        let whole = self.with_words(iova, to.len(), false, |words| load(words, to));
        if whole.is_ok() || !iova.is_multiple_of(8) {
            return whole;
        }
        let mut aligned = true;
        self.across(iova, to.len() * 8, false, |at, host, len| {
            aligned &= host.cast::<u64>().is_aligned() && at % 8 == 0 && len % 8 == 0;
            if aligned {
                // SAFETY: as in `with_words`.
                let words = unsafe { std::slice::from_raw_parts(host.as_ptr().cast(), len / 8) };
                load(words, &mut to[at / 8..]);
            }
        })?;
        if aligned { Ok(()) } else { Err(DmaFault) }
    }

    fn store(&self, iova: u64, from: &[u64]) -> Result<(), DmaFault> {
        // An entry does not cross a page.
        self.with_words(iova, from.len(), true, |words| {
            for (word, from) in words.iter().zip(from).skip(1).rev() {
                word.store(*from, Ordering::Relaxed);
            }
            if let (Some(word), Some(from)) = (words.first(), from.first()) {
                word.store(*from, Ordering::Release);
            }
        })
    }

    fn show(
        &self,
        iova: u64,
        len: usize,
        see: &mut dyn FnMut(&[AtomicU8]),
    ) -> Result<(), DmaFault> {
        self.with(iova, len, false, |host| {
            // SAFETY: inside a mapping, which stays while the translation's lock is held, and which is only
            // accessed through atomics, or by copies that take bytes as they come.
            see(unsafe { std::slice::from_raw_parts(host.as_ptr().cast(), len) })
        })
        .or_else(|_| {
            let mut bytes = vec![0; len];
            self.read(iova, &mut bytes)?;
            let bytes: Vec<AtomicU8> = bytes.into_iter().map(AtomicU8::new).collect();
            see(&bytes);
            Ok(())
        })
    }

    fn write_shown(&self, iova: u64, from: &[AtomicU8]) -> Result<(), DmaFault> {
        self.with(iova, from.len(), true, |host| {
            let shown = NonNull::from(from).cast::<u8>();
            // SAFETY: both are mapped, and may overlap. Bytes that somebody writes meanwhile are old or new, as
            // with a real device.
            unsafe { host.copy_from(shown, from.len()) }
        })
        .or_else(|_| {
            self.across(iova, from.len(), true, |at, host, len| {
                let part = NonNull::from(&from[at..at + len]).cast::<u8>();
                // SAFETY: as above, for a part.
                unsafe { host.copy_from(part, len) }
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages in any order in the host's memory, as an IOMMU has them, each of 16 bytes.
    fn pages(memory: &mut [u8], places: &[(u64, usize, bool)]) -> Translation {
        let translation = Translation::default();
        let base = NonNull::from(memory).cast::<u8>();
        for (iova, at, writable) in places {
            let mapping = Mapping {
                // SAFETY: the tests stay inside.
                host: unsafe { base.add(*at) },
                len: 16,
                writable: *writable,
                _memory: None,
            };
            translation.insert(*iova, mapping).unwrap();
        }
        translation
    }

    #[test]
    fn bytes_lie_in_several_mappings() {
        let mut memory: Vec<u8> = (0..64).collect();
        let translation = pages(
            &mut memory,
            &[(0x100, 32, true), (0x110, 0, true), (0x120, 48, true)],
        );
        let expected: Vec<u8> = (40..48).chain(0..16).chain(48..50).collect();
        let mut read = [0; 26];
        translation.read(0x108, &mut read).unwrap();
        assert_eq!(read, expected[..]);
        let mut shown = Vec::new();
        let see = &mut |bytes: &[AtomicU8]| {
            shown = bytes.iter().map(|b| b.load(Ordering::Relaxed)).collect();
        };
        translation.show(0x108, 26, see).unwrap();
        assert_eq!(shown, expected);
        let mut words = [0; 3];
        translation.load(0x108, &mut words).unwrap();
        let expected: Vec<[u8; 8]> = words.map(u64::to_le_bytes).into();
        assert_eq!(expected.concat(), read[..24]);
        translation.write(0x10e, &[100, 101, 102]).unwrap();
        let from = [103, 104, 105].map(AtomicU8::new);
        translation.write_shown(0x11e, &from).unwrap();
        let mut read = [0; 19];
        translation.read(0x10e, &mut read).unwrap();
        assert_eq!(read[..4], [100, 101, 102, 1]);
        assert_eq!(read[15..], [14 - 1, 103, 104, 105]);
    }

    #[test]
    fn a_gap_and_memory_that_is_not_to_be_written_are_faults() {
        let mut memory: Vec<u8> = (0..64).collect();
        let places = [(0x100, 0, true), (0x110, 16, false), (0x130, 32, true)];
        let translation = pages(&mut memory, &places);
        let mut read = [0; 32];
        assert!(translation.read(0x118, &mut read[..9]).is_err());
        assert!(translation.read(0x0f8, &mut read).is_err());
        assert!(translation.read(0x138, &mut read[..9]).is_err());
        assert!(translation.read(u64::MAX - 3, &mut read).is_err());
        assert!(translation.read(0x100, &mut read).is_ok());
        assert!(translation.write(0x10c, &[1; 8]).is_err());
        translation.read(0x100, &mut read).unwrap();
        assert_eq!(read[12], 12, "nothing was written");
    }
}
