//! Files that processes share as memory: memfds that cannot shrink, or whoever has one could make the others fault.

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::AsFd;

/// Makes a file of `len` zeroes that keeps its size.
pub fn make(name: &CStr, len: u64, pages: MFdFlags) -> std::io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | pages;
    let file = File::from(memfd_create(name, flags)?);
    file.set_len(len)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

/// The file has these bytes, and keeps them.
pub fn check(file: &impl AsFd, offset: u64, len: u64) -> std::io::Result<()> {
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_truncate);
    if !seals.is_ok_and(|seals| seals.contains(SealFlag::F_SEAL_SHRINK)) {
        return Err(std::io::Error::other(
            "the file can shrink: it has to be a memfd with the seal F_SEAL_SHRINK",
        ));
    }
    // What it has by now, it keeps.
    let end = offset.checked_add(len).filter(|_| len != 0);
    if end.is_none_or(|end| end > size(file).unwrap_or(0)) {
        return Err(std::io::Error::other("the file is too short"));
    }
    Ok(())
}

/// Bytes of a file.
pub fn size(file: &impl AsFd) -> std::io::Result<u64> {
    let size = nix::sys::stat::fstat(file.as_fd())?.st_size;
    Ok(size.try_into().unwrap_or(0))
}
