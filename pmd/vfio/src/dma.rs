//! Memory that a device can reach: allocated in huge pages where the host has them, or mapped from a
//! file that others share, at I/O virtual addresses that we choose.
//!
//! Opts into `unsafe` to give memory to a device: the mapping outlives the device's access because
//! [`DmaMemory`] unmaps at the device before it unmaps here.

use crate::device::{Access, BusError, Device};
use crate::iova::Iovas;
use crate::sealed;
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::MFdFlags;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a huge page.
pub const HUGE_PAGE: usize = 2 << 20;
const PAGE: usize = 4096;

/// The address space of a device: everything that is mapped for it comes from here.
#[derive(Clone, Debug)]
pub struct Space {
    device: Arc<dyn Device>,
    iovas: Arc<Mutex<Iovas>>,
}

/// Memory that the device can reach, until it is dropped.
#[derive(Debug)]
pub struct DmaMemory {
    mapping: MmapRaw,
    iova: u64,
    huge: bool,
    space: Space,
    /// The window in which it lies, if it does.
    window: Option<Window>,
}

impl Space {
    /// The space of a device. There must be only one.
    pub fn new(device: Arc<dyn Device>) -> Self {
        let iovas = Iovas::new(device.iova_ranges());
        Space {
            device,
            iovas: Arc::new(Mutex::new(iovas)),
        }
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Allocates at least `len` zeroed bytes: whole huge pages, or (with a warning) ordinary ones where
    /// none are free. Less than half a huge page is given ordinary pages.
    pub fn allocate(&self, len: usize) -> Result<DmaMemory, BusError> {
        if len >= HUGE_PAGE / 2
            && let Some(whole) = len.checked_next_multiple_of(HUGE_PAGE)
        {
            match make(whole, MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB) {
                Ok((mapping, file)) => return self.give(mapping, &file, true, Access::ReadWrite),
                Err(error) => tracing::warn!(
                    bytes = whole,
                    %error,
                    "no huge pages for DMA memory, taking ordinary ones (see /proc/sys/vm/nr_hugepages)"
                ),
            }
        }
        let whole = len
            .checked_next_multiple_of(PAGE)
            .filter(|len| *len != 0)
            .ok_or(BusError::BadLength(len))?;
        let made = make(whole, MFdFlags::empty());
        let (mapping, file) = made.map_err(|source| BusError::Io {
            what: "allocating DMA memory",
            source,
        })?;
        self.give(mapping, &file, false, Access::ReadWrite)
    }

    /// Maps the first `len` bytes of a file that others have mapped too. It must be sealed against
    /// shrinking (a memfd): whoever could shrink it could make this process fault.
    pub fn map_file(
        &self,
        file: &impl AsFd,
        len: usize,
        access: Access,
    ) -> Result<DmaMemory, BusError> {
        let mapping = map(file, len)?;
        self.give(mapping, file, false, access)
    }

    /// Sets `len` bytes of I/O virtual addresses aside, in which files are mapped and unmapped while
    /// other nodes may reach the whole of it.
    pub fn window(&self, len: u64) -> Result<Window, BusError> {
        let iova = self
            .iovas()
            .take(len, HUGE_PAGE as u64)
            .ok_or(BusError::NoAddresses(len))?;
        Ok(Window(Arc::new(Reserved {
            iova,
            len,
            space: self.clone(),
        })))
    }

    fn give(
        &self,
        mapping: MmapRaw,
        file: &impl AsFd,
        huge: bool,
        access: Access,
    ) -> Result<DmaMemory, BusError> {
        let len = mapping.len();
        let align = if len >= HUGE_PAGE { HUGE_PAGE } else { PAGE };
        let iova = self
            .iovas()
            .take(len as u64, align as u64)
            .ok_or(BusError::NoAddresses(len as u64))?;
        let host = NonNull::new(mapping.as_mut_ptr()).ok_or(BusError::BadLength(len))?;
        // SAFETY: the mapping is owned by the DmaMemory made below, which unmaps at the device
        // before it drops the mapping; nothing in this crate makes a reference into it.
        let mapped = unsafe {
            let file = file.as_fd();
            self.device.map_file(iova, host, len, access, file, 0)
        };
        if let Err(error) = mapped {
            self.iovas().give_back(iova);
            return Err(error);
        }
        Ok(DmaMemory {
            mapping,
            iova,
            huge,
            space: self.clone(),
            window: None,
        })
    }

    pub(crate) fn iovas(&self) -> std::sync::MutexGuard<'_, Iovas> {
        self.iovas.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes memory of `len` zeroed bytes that another process can map too: the device may be a model there.
fn make(len: usize, pages: MFdFlags) -> std::io::Result<(MmapRaw, File)> {
    let file = sealed::make(c"rdsock-dma", len as u64, pages)?;
    let mapping = MmapOptions::new().len(len).populate().map_raw(&file)?;
    Ok((mapping, file))
}

/// Maps the first `len` bytes of a file into this process.
fn map(file: &impl AsFd, len: usize) -> Result<MmapRaw, BusError> {
    let what = "mapping a file for DMA";
    let fd = file.as_fd().as_raw_fd();
    let size = sealed::size(file).map_err(|source| BusError::Io { what, source })?;
    if len == 0 || size < len as u64 {
        return Err(BusError::BadLength(len));
    }
    MmapOptions::new()
        .len(len)
        .map_raw(fd)
        .map_err(|source| BusError::Io { what, source })
}

/// A range of I/O virtual addresses in which memory comes and goes. Clones are the same window; the
/// range is given back with the last of them and the last memory in it.
#[derive(Clone, Debug)]
pub struct Window(Arc<Reserved>);

#[derive(Debug)]
struct Reserved {
    iova: u64,
    len: u64,
    space: Space,
}

impl Window {
    /// First I/O virtual address.
    pub fn iova(&self) -> u64 {
        self.0.iova
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.0.len
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// As [`Space::map_file`], readable and writable, at `offset` (whole pages) in the window, where nothing
    /// may be mapped.
    pub fn map_file(
        &self,
        offset: u64,
        file: &impl AsFd,
        len: usize,
    ) -> Result<DmaMemory, BusError> {
        let Reserved {
            iova,
            len: room,
            space,
        } = &*self.0;
        let inside = offset.is_multiple_of(PAGE as u64)
            && offset
                .checked_add(len as u64)
                .is_some_and(|end| end <= *room);
        if !inside {
            return Err(BusError::Range {
                iova: offset,
                len: len as u64,
            });
        }
        let iova = iova + offset;
        let mapping = map(file, len)?;
        let host = NonNull::new(mapping.as_mut_ptr()).ok_or(BusError::BadLength(len))?;
        // SAFETY: as in `Space::give`.
        unsafe {
            let file = file.as_fd();
            (space.device).map_file(iova, host, len, Access::ReadWrite, file, 0)
        }?;
        Ok(DmaMemory {
            mapping,
            iova,
            huge: false,
            space: space.clone(),
            window: Some(self.clone()),
        })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.space.iovas().give_back(self.iova);
    }
}

impl DmaMemory {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.mapping.len() == 0
    }

    /// I/O virtual address of the first byte.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Whether it is made of huge pages.
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// Address of `len` bytes at `offset`, if they lie inside.
    pub(crate) fn at(&self, offset: usize, len: usize) -> Option<NonNull<u8>> {
        let end = offset.checked_add(len)?;
        if end > self.mapping.len() {
            return None;
        }
        // SAFETY: the offset is inside the mapping, or one past its end.
        NonNull::new(unsafe { self.mapping.as_mut_ptr().add(offset) })
    }
}

impl Drop for DmaMemory {
    fn drop(&mut self) {
        match self.space.device.unmap(self.iova, self.mapping.len()) {
            Ok(()) if self.window.is_some() => {}
            Ok(()) => self.space.iovas().give_back(self.iova),
            Err(error) => {
                // The device may still reach the memory: it must not be used for anything else.
                let len = self.mapping.len();
                tracing::error!(%error, len, "DMA memory stays mapped for the device, and is leaked");
                let anonymous = MmapOptions::new().len(PAGE).map_anon();
                if let Ok(anonymous) = anonymous {
                    std::mem::forget(std::mem::replace(&mut self.mapping, anonymous.into()));
                }
            }
        }
    }
}
