//! The bus to a PCI device that the kernel's VFIO gives out, behind an IOMMU.
//!
//! The counterpart is the kernel. The device reaches what was mapped for it and nothing else; where no IOMMU
//! sees to that, the device is not opened. IOMMU groups work with every kernel; the character devices with `/dev/iommu`
//! are taken where the kernel has them and this process may open them.

mod ioctl;
mod opened;
mod sysfs;

pub use opened::Way;
pub use sysfs::PciAddress;

use crate::device::{Access, BusError, Device, RegionInfo, Registers};
use crate::mapped::{Far, MappedArea, RegionRegisters};
use ioctl::Region;
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use nix::sys::uio::{pread, pwrite};
use opened::{Opened, io};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX,
};

/// Offset and bits of the command register: memory space, bus master.
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 0b110;

/// A PCI device.
#[derive(Debug)]
pub struct PciDevice {
    address: PciAddress,
    opened: Arc<Opened>,
    flags: u32,
    iova_ranges: Vec<RangeInclusive<u64>>,
    /// BARs, ROM and configuration space; empty where the kernel has none to give.
    regions: Vec<Region>,
    interrupts: Mutex<Interrupts>,
}

/// The message signalled interrupts of a device.
#[derive(Debug)]
struct Interrupts {
    /// VFIO's index: MSI-X, or MSI.
    index: u32,
    to: Vec<Option<Arc<EventFd>>>,
    enabled: bool,
}

impl PciDevice {
    /// Opens a device, and lets it access memory and send interrupts. It was reset by the kernel.
    pub fn open(address: &PciAddress) -> Result<Self, BusError> {
        Self::open_with(address, None)
    }

    /// As [`PciDevice::open`], in the way given.
    pub fn open_by(address: &PciAddress, way: Way) -> Result<Self, BusError> {
        Self::open_with(address, Some(way))
    }

    fn open_with(address: &PciAddress, way: Option<Way>) -> Result<Self, BusError> {
        let opened = Arc::new(Opened::open(address, way)?);
        let info = ioctl::device_info(opened.as_fd()).map_err(io("asking what a device is"))?;
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(BusError::Unusable {
                device: address.to_string(),
                cause: "the kernel says that it is no PCI device".into(),
                remedy: format!("rdsock bind {address}"),
            });
        }
        let region = |index| match ioctl::region(opened.as_fd(), index) {
            // A module may keep a region for itself.
            Err(Errno::EINVAL | Errno::EPERM | Errno::EACCES) => Ok(Region::default()),
            region => region.map_err(io("asking for a region of a device")),
        };
        let regions = (0..=VFIO_PCI_CONFIG_REGION_INDEX).map(region);
        let regions = regions.collect::<Result<_, _>>()?;
        let mut interrupts = Interrupts {
            index: VFIO_PCI_MSIX_IRQ_INDEX,
            to: Vec::new(),
            enabled: false,
        };
        for index in [VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX] {
            let count = ioctl::vectors(opened.as_fd(), index);
            let count = count.map_err(io("asking for the interrupts of a device"))?;
            if count != 0 {
                interrupts.index = index;
                interrupts.to = vec![None; count as usize];
            }
        }
        let device = PciDevice {
            address: address.clone(),
            iova_ranges: opened.iova_ranges()?,
            flags: info.flags,
            regions,
            interrupts: Mutex::new(interrupts),
            opened,
        };
        device.enable()?;
        Ok(device)
    }

    /// How it was opened.
    pub fn way(&self) -> Way {
        self.opened.way()
    }

    /// The kernel gives it out as no master of its bus: then it could neither access memory nor interrupt.
    fn enable(&self) -> Result<(), BusError> {
        let config = self.far(VFIO_PCI_CONFIG_REGION_INDEX)?;
        let what = "enabling a device in its configuration space";
        let mut bytes = [0; 2];
        config.try_read(COMMAND, &mut bytes).map_err(io(what))?;
        let enabled = u16::from_le_bytes(bytes) | MEMORY_AND_MASTER;
        let written = config.try_write(COMMAND, &enabled.to_le_bytes());
        written.map_err(io(what))
    }

    fn known_region(&self, index: u32) -> Result<&Region, BusError> {
        let region = self.regions.get(index as usize);
        region.filter(|region| region.size != 0).ok_or({
            BusError::Missing {
                what: "region",
                index,
            }
        })
    }

    fn far(&self, index: u32) -> Result<FarRegion, BusError> {
        let at = self.known_region(index)?.offset;
        let opened = self.opened.clone();
        Ok(FarRegion { opened, at })
    }
}

impl Device for PciDevice {
    fn name(&self) -> String {
        format!("vfio:{}", self.address)
    }

    fn iova_ranges(&self) -> Vec<RangeInclusive<u64>> {
        self.iova_ranges.clone()
    }

    unsafe fn map(
        &self,
        iova: u64,
        host: NonNull<u8>,
        len: usize,
        access: Access,
    ) -> Result<(), BusError> {
        let writable = access == Access::ReadWrite;
        // SAFETY: the caller's promise.
        unsafe { self.opened.map(iova, host.as_ptr(), len, writable) }
    }

    fn unmap(&self, iova: u64, len: usize) -> Result<(), BusError> {
        self.opened.unmap(iova, len)
    }

    fn region(&self, index: u32) -> Result<RegionInfo, BusError> {
        let region = self.known_region(index)?;
        Ok(RegionInfo {
            size: region.size,
            mappable: !region.areas.is_empty(),
        })
    }

    fn registers(&self, index: u32) -> Result<Arc<dyn Registers>, BusError> {
        let region = self.known_region(index)?;
        let map = |area| MappedArea::map(&*self.opened, region.offset, area);
        let areas: Result<_, _> = region.areas.iter().copied().map(map).collect();
        let areas = areas.unwrap_or_else(|error| {
            let device = self.name();
            tracing::warn!(%device, region = index, %error, "cannot map a region, each access is a system call");
            Vec::new()
        });
        Ok(Arc::new(RegionRegisters {
            size: region.size,
            areas,
            far: self.far(index)?,
        }))
    }

    fn vectors(&self) -> u32 {
        self.lock().to.len() as u32
    }

    fn set_interrupt(&self, vector: u32, to: Option<Arc<EventFd>>) -> Result<(), BusError> {
        self.lock().set(&self.opened, vector, to)
    }

    fn set_wanted_back(&self, to: &Arc<EventFd>) -> Result<(), BusError> {
        let fd = to.as_fd().as_raw_fd();
        let set = ioctl::set_eventfds(self.opened.as_fd(), VFIO_PCI_REQ_IRQ_INDEX, 0, &[fd]);
        set.map(|_| ())
            .map_err(io("asking to be told when a device is wanted back"))
    }

    fn reset(&self) -> Result<(), BusError> {
        let what = "resetting a device";
        if self.flags & VFIO_DEVICE_FLAGS_RESET == 0 {
            return Err(io(what)(Errno::EOPNOTSUPP));
        }
        ioctl::reset(self.opened.as_fd()).map_err(io(what))?;
        self.enable()
    }
}

impl PciDevice {
    fn lock(&self) -> std::sync::MutexGuard<'_, Interrupts> {
        self.interrupts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Interrupts {
    fn set(
        &mut self,
        opened: &Opened,
        vector: u32,
        to: Option<Arc<EventFd>>,
    ) -> Result<(), BusError> {
        let what = "setting an interrupt";
        let place = self.to.get_mut(vector as usize);
        let place = place.ok_or(BusError::Missing {
            what: "interrupt vector",
            index: vector,
        })?;
        let before = std::mem::replace(place, to);
        let done = match (self.enabled, self.to.iter().any(Option::is_some)) {
            (false, false) => Ok(()),
            (true, false) => ioctl::disable_irqs(opened.as_fd(), self.index),
            (true, true) => {
                let fd = self.fd(vector as usize);
                ioctl::set_eventfds(opened.as_fd(), self.index, vector, &[fd]).map(|_| ())
            }
            (false, true) => self.enable(opened, vector),
        };
        match done {
            Ok(()) => {
                self.enabled = self.to.iter().any(Option::is_some);
                Ok(())
            }
            Err(errno) => {
                if let Some(place) = self.to.get_mut(vector as usize) {
                    *place = before;
                }
                Err(io(what)(errno))
            }
        }
    }

    /// Sets all vectors at once, since some kernels and devices cannot add any later. If there are not as many to be
    /// had as the device has, it gets what there are.
    fn enable(&mut self, opened: &Opened, needed: u32) -> Result<(), Errno> {
        loop {
            let fds: Vec<i32> = (0..self.to.len()).map(|vector| self.fd(vector)).collect();
            match ioctl::set_eventfds(opened.as_fd(), self.index, 0, &fds)? {
                0 => return Ok(()),
                fewer if fewer > needed && (fewer as usize) < fds.len() => {
                    self.to.truncate(fewer as usize);
                }
                _ => return Err(Errno::ENOSPC),
            }
        }
    }

    fn fd(&self, vector: usize) -> i32 {
        let to = self.to.get(vector).and_then(Option::as_ref);
        to.map_or(-1, |eventfd| eventfd.as_fd().as_raw_fd())
    }
}

/// A region that is reached by system calls.
#[derive(Debug)]
struct FarRegion {
    opened: Arc<Opened>,
    /// Where it is in the device's file.
    at: u64,
}

impl FarRegion {
    fn place(&self, offset: u64) -> Result<i64, Errno> {
        let place = self.at.checked_add(offset);
        let place = place.and_then(|place| i64::try_from(place).ok());
        place.ok_or(Errno::EOVERFLOW)
    }

    fn try_read(&self, offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        match pread(&*self.opened, to, self.place(offset)?)? {
            read if read == to.len() => Ok(()),
            _ => Err(Errno::EIO),
        }
    }

    fn try_write(&self, offset: u64, from: &[u8]) -> Result<(), Errno> {
        match pwrite(&*self.opened, from, self.place(offset)?)? {
            written if written == from.len() => Ok(()),
            _ => Err(Errno::EIO),
        }
    }

    fn report(&self, offset: u64, errno: Errno) {
        let offset = format_args!("{offset:#x}");
        tracing::warn!(offset, %errno, "the kernel refuses access to a register");
    }
}

impl Far for FarRegion {
    fn read(&self, offset: u64, to: &mut [u8]) -> bool {
        let read = self.try_read(offset, to);
        read.inspect_err(|errno| self.report(offset, *errno))
            .is_ok()
    }

    fn write(&self, offset: u64, from: &[u8]) {
        if let Err(errno) = self.try_write(offset, from) {
            self.report(offset, errno);
        }
    }

    fn is_gone(&self) -> bool {
        // Loads from a device that is gone are answered with all ones by the bus.
        false
    }
}
