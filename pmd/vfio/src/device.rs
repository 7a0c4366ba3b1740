//! What a bus offers: a device, its regions, its interrupts, and the mapping of memory for it.

use nix::sys::eventfd::EventFd;
use std::fmt::Debug;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

/// What a device may do with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Read and write it.
    ReadWrite,
}

/// A local fault of the bus, and what was being done.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The device has no such region or vector.
    #[error("the device has no {what} {index}")]
    Missing {
        /// "region" or "interrupt vector".
        what: &'static str,
        /// Its number.
        index: u32,
    },
    /// The range of I/O virtual addresses is in use, or not one that the IOMMU translates.
    #[error("I/O virtual addresses {iova:#x} to +{len:#x} are in use or out of reach")]
    Range {
        /// First address.
        iova: u64,
        /// Bytes.
        len: u64,
    },
    /// All usable I/O virtual addresses are in use.
    #[error("no {0} bytes of I/O virtual addresses are left")]
    NoAddresses(u64),
    /// The memory is no file, so that the other processes in which the device is cannot map it.
    #[error("a device in another process can be given files only")]
    NoFile,
    /// The device cannot be opened as things are.
    #[error("cannot use {device}: {cause}; {remedy}")]
    Unusable {
        /// Its address.
        device: String,
        /// Why not.
        cause: String,
        /// What to do.
        remedy: String,
    },
    /// The server of a vfio-user device refused something. It goes on.
    #[error("the vfio-user server refused to {what}: {source}")]
    Refused {
        /// What it was asked to do.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The server of a vfio-user device did what it may not, or has gone. The device is not used any more.
    #[error("the vfio-user server {0}; its device counts as gone")]
    Server(String),
    /// Nothing can be allocated or mapped with a length of 0 or so great a one.
    #[error("{0} bytes cannot be mapped")]
    BadLength(usize),
}

/// Size of a region, and whether it can be mapped into the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Bytes.
    pub size: u64,
    /// Accesses are plain loads and stores.
    pub mappable: bool,
}

/// The registers of a region. Offsets are multiples of the width and inside the region; a load
/// elsewhere gives all ones, a store does nothing. A device that is gone reads all ones too.
pub trait Registers: Send + Sync + Debug {
    /// Loads 32 bits.
    fn read32(&self, offset: u64) -> u32;
    /// Loads 64 bits.
    fn read64(&self, offset: u64) -> u64;
    /// Stores 32 bits.
    fn write32(&self, offset: u64, value: u32);
    /// Stores 64 bits.
    fn write64(&self, offset: u64, value: u64);
}

/// A device on a bus. Regions and vectors are numbered as VFIO numbers them: regions 0 to 5 are the
/// BARs.
pub trait Device: Send + Sync + Debug {
    /// What to call it in messages.
    fn name(&self) -> String;

    /// I/O virtual addresses that the IOMMU translates.
    fn iova_ranges(&self) -> Vec<RangeInclusive<u64>>;

    /// Lets the device reach `len` bytes at `host` by the addresses from `iova` on.
    ///
    /// # Safety
    /// The memory stays mapped in this process, and nobody holds a reference into it, until
    /// [`Device::unmap`] has returned.
    unsafe fn map(
        &self,
        iova: u64,
        host: NonNull<u8>,
        len: usize,
        access: Access,
    ) -> Result<(), BusError>;

    /// As [`Device::map`], for memory that is the bytes of `file` from `offset` on: a bus whose device is in another
    /// process needs to know.
    ///
    /// # Safety
    /// As [`Device::map`].
    unsafe fn map_file(
        &self,
        iova: u64,
        host: NonNull<u8>,
        len: usize,
        access: Access,
        _file: BorrowedFd<'_>,
        _offset: u64,
    ) -> Result<(), BusError> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.map(iova, host, len, access) }
    }

    /// Takes back what [`Device::map`] gave, with the same `iova` and `len`. When it has returned,
    /// the device does not touch the memory any more.
    fn unmap(&self, iova: u64, len: usize) -> Result<(), BusError>;

    /// A region of the device.
    fn region(&self, index: u32) -> Result<RegionInfo, BusError>;

    /// The registers of a region.
    fn registers(&self, index: u32) -> Result<Arc<dyn Registers>, BusError>;

    /// Number of interrupt vectors.
    fn vectors(&self) -> u32;

    /// Has a vector add 1 to an eventfd, or nothing.
    fn set_interrupt(&self, vector: u32, to: Option<Arc<EventFd>>) -> Result<(), BusError>;

    /// Has 1 added to an eventfd when the system wants the device back, since it is being unbound or taken out. The system
    /// waits until it is closed. A bus on which that does not happen does nothing.
    fn set_wanted_back(&self, _to: &Arc<EventFd>) -> Result<(), BusError> {
        Ok(())
    }

    /// Resets the function. Every register has its reset value afterwards, and no DMA is under way.
    fn reset(&self) -> Result<(), BusError>;
}
