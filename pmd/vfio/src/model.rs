//! The bus to a model of the device in the same process.
//!
//! Opts into `unsafe` to play the IOMMU: it turns I/O virtual addresses into the addresses that
//! [`Device::map`] was given, and copies there on the model's behalf.

use crate::device::{Access, BusError, Device, RegionInfo, Registers};
use nix::sys::eventfd::EventFd;
use rdsock_model::{Bar, Dma, DmaFault, Fabric, Function};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// A model on the in-process bus.
#[derive(Debug)]
pub struct ModelDevice {
    function: Function,
    translation: Arc<Translation>,
}

impl ModelDevice {
    /// Adds a device with so many queue sets to a fabric.
    pub fn new(fabric: &Fabric, queue_sets: usize) -> Self {
        let translation = Arc::new(Translation::default());
        ModelDevice {
            function: fabric.add(translation.clone(), queue_sets),
            translation,
        }
    }

    /// The model's side: faults, counters.
    pub fn function(&self) -> &Function {
        &self.function
    }
}

impl Device for ModelDevice {
    fn name(&self) -> String {
        "model".into()
    }

    fn iova_ranges(&self) -> Vec<RangeInclusive<u64>> {
        // As an x86 IOMMU reports them: the window of message signalled interrupts is a hole.
        vec![0..=0xfedf_ffff, 0xfef0_0000..=0xffff_ffff_ffff]
    }

    unsafe fn map(
        &self,
        iova: u64,
        host: NonNull<u8>,
        len: usize,
        access: Access,
    ) -> Result<(), BusError> {
        self.translation.insert(
            iova,
            Mapping {
                host,
                len: len as u64,
                writable: access == Access::ReadWrite,
            },
        )
    }

    fn unmap(&self, iova: u64, len: usize) -> Result<(), BusError> {
        self.translation.remove(iova, len as u64)
    }

    fn region(&self, index: u32) -> Result<RegionInfo, BusError> {
        Ok(RegionInfo {
            size: self.function.bar_size(bar(index)?),
            mappable: false,
        })
    }

    fn registers(&self, index: u32) -> Result<Arc<dyn Registers>, BusError> {
        Ok(Arc::new(ModelRegisters {
            function: self.function.clone(),
            bar: bar(index)?,
        }))
    }

    fn vectors(&self) -> u32 {
        self.function.vectors()
    }

    fn set_interrupt(&self, vector: u32, to: Option<Arc<EventFd>>) -> Result<(), BusError> {
        if vector >= self.vectors() {
            return Err(BusError::Missing {
                what: "interrupt vector",
                index: vector,
            });
        }
        let fire = to.map(|eventfd| -> rdsock_model::Interrupt {
            Arc::new(move || {
                // It fails only when 2^64 - 2 interrupts are pending, which says as much as one more.
                let _ = eventfd.write(1);
            })
        });
        self.function.set_interrupt(vector, fire);
        Ok(())
    }

    fn reset(&self) -> Result<(), BusError> {
        self.function.reset();
        Ok(())
    }
}

fn bar(index: u32) -> Result<Bar, BusError> {
    match index {
        0 => Ok(Bar::Management),
        2 => Ok(Bar::Pages),
        _ => Err(BusError::Missing {
            what: "region",
            index,
        }),
    }
}

#[derive(Debug)]
struct ModelRegisters {
    function: Function,
    bar: Bar,
}

impl Registers for ModelRegisters {
    fn read32(&self, offset: u64) -> u32 {
        self.function.read(self.bar, offset, 4) as u32
    }

    fn read64(&self, offset: u64) -> u64 {
        self.function.read(self.bar, offset, 8)
    }

    #[inline]
    fn write32(&self, offset: u64, value: u32) {
        self.function.write(self.bar, offset, 4, value.into());
    }

    #[inline]
    fn write64(&self, offset: u64, value: u64) {
        self.function.write(self.bar, offset, 8, value);
    }
}

/// The IOMMU: what is mapped where.
#[derive(Debug, Default)]
struct Translation {
    /// By first I/O virtual address. An access holds the lock for reading, so that unmapping waits
    /// until none is under way.
    mappings: RwLock<BTreeMap<u64, Mapping>>,
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    host: NonNull<u8>,
    len: u64,
    writable: bool,
}

// SAFETY: an address; what is done with it is justified where it is done.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Translation {
    fn insert(&self, iova: u64, mapping: Mapping) -> Result<(), BusError> {
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

    fn remove(&self, iova: u64, len: u64) -> Result<(), BusError> {
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
        // SAFETY: inside the memory that `map` was given.
        access(unsafe { mapping.host.add(offset as usize) });
        Ok(())
    }

    /// As above, for words.
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
                // SAFETY: inside the memory that `map` was given, aligned, and shared with the driver
                // through atomics. It stays mapped while the translation's lock is held.
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
    }

    fn write(&self, iova: u64, from: &[u8]) -> Result<(), DmaFault> {
        self.with(iova, from.len(), true, |host| {
            // SAFETY: as above, and `map` was promised that nobody holds a reference.
            unsafe { host.copy_from_nonoverlapping(NonNull::from(from).cast(), from.len()) }
        })
    }

    fn load(&self, iova: u64, to: &mut [u64]) -> Result<(), DmaFault> {
        self.with_words(iova, to.len(), false, |words| {
            for (word, to) in words.iter().zip(to) {
                *to = word.load(Ordering::Acquire);
            }
        })
    }

    fn store(&self, iova: u64, from: &[u64]) -> Result<(), DmaFault> {
        self.with_words(iova, from.len(), true, |words| {
            for (word, from) in words.iter().zip(from).skip(1).rev() {
                word.store(*from, Ordering::Relaxed);
            }
            if let (Some(word), Some(from)) = (words.first(), from.first()) {
                word.store(*from, Ordering::Release);
            }
        })
    }
}
