//! The bus to a model of the device in the same process, alone or linked with models in others.

use crate::device::{Access, BusError, Device, RegionInfo, Registers};
use crate::link::{Link, LinkError};
use crate::translation::{Mapping, Translation};
use nix::sys::eventfd::EventFd;
use rdsock_model::{Bar, Fabric, Function};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

/// A model on the in-process bus.
#[derive(Debug)]
pub struct ModelDevice {
    link: Option<Link>,
    function: Function,
    translation: Arc<Translation>,
}

impl ModelDevice {
    /// Adds a device with so many queue sets to a fabric.
    pub fn new(fabric: &Fabric, queue_sets: usize) -> Self {
        let translation = Arc::new(Translation::default());
        ModelDevice {
            link: None,
            function: fabric.add(translation.clone(), queue_sets),
            translation,
        }
    }

    /// Adds a device to a fabric that has none, and links it, as node `id`, with those in the other processes that meet
    /// in `dir`, now and later. Whoever steps the fabric runs this device; the others are run by their own
    /// processes. They can write into all memory that the device is given: see [`crate::link`].
    ///
    /// All memory that it is given must be files ([`Device::map_file`]). Dropping it ends the links.
    ///
    /// # Panics
    /// When the fabric has a device.
    pub fn linked(
        fabric: &Fabric,
        dir: &Path,
        id: u16,
        queue_sets: usize,
    ) -> Result<Self, LinkError> {
        let translation = Arc::new(Translation::default());
        let (link, function) = Link::connect(fabric, dir, id, translation.clone(), queue_sets)?;
        Ok(ModelDevice {
            link: Some(link),
            function,
            translation,
        })
    }

    /// How many pieces of memory the device reaches, and how many bytes.
    pub fn mapped(&self) -> (usize, u64) {
        self.translation.size()
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
        if self.link.is_some() {
            return Err(BusError::NoFile);
        }
        let mapping = mapping(host, len, access);
        self.function
            .change_reach(|_| self.translation.insert(iova, mapping))
    }

    unsafe fn map_file(
        &self,
        iova: u64,
        host: NonNull<u8>,
        len: usize,
        access: Access,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<(), BusError> {
        let mapping = mapping(host, len, access);
        self.function.change_reach(|change| {
            self.translation.insert(iova, mapping)?;
            let Some(link) = &self.link else {
                return Ok(());
            };
            let told = link.map(change, iova, (file, offset, len), access);
            if told.is_err() {
                self.translation.remove(iova, len as u64)?;
            }
            told
        })
    }

    fn unmap(&self, iova: u64, len: usize) -> Result<(), BusError> {
        self.function.change_reach(|change| {
            self.translation.remove(iova, len as u64)?;
            if let Some(link) = &self.link {
                link.unmap(change, iova, len);
            }
            Ok(())
        })
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
        if let Some(link) = &self.link {
            let eventfd = to.as_deref().map(AsFd::as_fd);
            self.function
                .change_reach(|change| link.set_interrupt(change, vector, eventfd))?;
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

fn mapping(host: NonNull<u8>, len: usize, access: Access) -> Mapping {
    Mapping {
        host,
        len: len as u64,
        writable: access == Access::ReadWrite,
        _memory: None,
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
