//! Memory of linked processes, mapped here.
//!
//! Opts into `unsafe` to see a port in a mapping, and the files that come with messages. A file is mapped only
//! when it is sealed against shrinking: else whoever has it could make this process fault.

use crate::sealed;
use crate::translation::Mapping;
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::MFdFlags;
use rdsock_model::sheet::PAGE_SIZE;
use rdsock_model::{Page, Port, PortMemory};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// A port in memory that processes share.
#[derive(Debug)]
pub struct SharedPort {
    mapping: MmapRaw,
}

impl SharedPort {
    /// Makes one of zeroes, for this process's device, and its file.
    pub fn make() -> std::io::Result<(Self, File)> {
        let file = sealed::make(c"rdsock-port", Port::BYTES as u64, MFdFlags::empty())?;
        Ok((Self::map(&file)?, file))
    }

    /// Maps that of another process.
    pub fn map(file: &impl AsFd) -> std::io::Result<Self> {
        sealed::check(file, 0, Port::BYTES as u64)?;
        let mapping = MmapOptions::new()
            .len(Port::BYTES)
            .map_raw(file.as_fd().as_raw_fd())?;
        Ok(SharedPort { mapping })
    }
}

impl PortMemory for SharedPort {
    fn port(&self) -> &Port {
        // SAFETY: a port lies at the start of the mapping, which is aligned to pages and as long as the object; it is
        // made of atomics of which any contents are valid, and nobody accesses it in another way.
        unsafe { &*self.mapping.as_ptr().cast() }
    }

    fn pages(&self) -> &[Page] {
        let count = (Port::BYTES - size_of::<Port>()) / PAGE_SIZE as usize;
        // SAFETY: as above; the pages follow the port.
        unsafe {
            let pages = self.mapping.as_ptr().add(size_of::<Port>()).cast();
            std::slice::from_raw_parts(pages, count)
        }
    }
}

/// Maps memory that another process's device reaches.
pub fn map(file: &OwnedFd, offset: u64, len: u64, writable: bool) -> std::io::Result<Mapping> {
    sealed::check(file, offset, len)?;
    let bytes = usize::try_from(len).map_err(std::io::Error::other)?;
    let mut options = MmapOptions::new();
    options.offset(offset).len(bytes);
    let fd = file.as_fd().as_raw_fd();
    let mapping = if writable {
        options.map_raw(fd)?
    } else {
        options.map_raw_read_only(fd)?
    };
    let host = NonNull::new(mapping.as_mut_ptr());
    Ok(Mapping {
        host: host.ok_or_else(|| std::io::Error::other("mapped at address 0"))?,
        len,
        writable,
        _memory: Some(Arc::new(mapping)),
    })
}
