//! Memory of linked processes, mapped here.
//!
//! Opts into `unsafe` to see a port in a mapping, and the files that come with messages. A file is mapped only
//! when it is sealed against shrinking: else whoever has it could make this process fault.

use crate::translation::Mapping;
use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use rdsock_model::sheet::PAGE_SIZE;
use rdsock_model::{Page, Port, PortMemory};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;

/// A port in memory that processes share.
#[derive(Debug)]
pub struct SharedPort {
    mapping: MmapRaw,
}

impl SharedPort {
    /// Makes one of zeroes, for this process's device, and its file.
    pub fn make() -> std::io::Result<(Self, File)> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"rdsock-port", flags)?);
        file.set_len(Port::BYTES as u64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok((Self::map(&file)?, file))
    }

    /// Maps that of another process.
    pub fn map(file: &impl AsFd) -> std::io::Result<Self> {
        check(file, 0, Port::BYTES as u64)?;
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
    check(file, offset, len)?;
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
        _memory: Some(mapping),
    })
}

/// The file has these bytes, and keeps them.
pub fn check(file: &impl AsFd, offset: u64, len: u64) -> std::io::Result<()> {
    let size = nix::sys::stat::fstat(file.as_fd())?.st_size;
    let end = offset.checked_add(len).filter(|_| len != 0);
    if end.is_none_or(|end| i64::try_from(end).is_ok_and(|end| end > size) || end > i64::MAX as u64)
    {
        return Err(std::io::Error::other("the file is too short"));
    }
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_truncate);
    if !seals.is_ok_and(|seals| seals.contains(SealFlag::F_SEAL_SHRINK)) {
        return Err(std::io::Error::other(
            "the file can shrink: it has to be a memfd with the seal F_SEAL_SHRINK",
        ));
    }
    Ok(())
}
