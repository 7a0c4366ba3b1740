//! Memory that the daemon has made, in which nobody makes holes, however many others may write it.
//!
//! Why holes are a danger stands in `sealed.rs`. A seal against them would forbid new writable mappings, and streams are
//! mapped anew for as long as they live (`exec`). The kernel makes no holes in a file that is immutable, either, and that says nothing of
//! mappings: whoever has the descriptor maps it to be written. It takes `CAP_LINUX_IMMUTABLE` to make a file immutable, or not to be so any more.
//!
//! At a stream's end the daemon makes one hole of it ([`empty`]), so that who keeps the memory keeps no page of it.
//!
//! Where that can't be done (a kernel before 6.1, a daemon without that privilege, huge pages), who is handed memory can make holes in it. A
//! daemon without privilege serves one user, who stalls nobody else by that.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::LazyLock;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// `FS_IMMUTABLE_FL` of the kernel.
const IMMUTABLE: libc::c_int = 0x10;

/// From now on nobody makes holes in a memfd, nor opens it anew to write it. True when that could be done.
pub(super) fn make_whole(file: &impl AsFd) -> bool {
    set_flags(file, IMMUTABLE)
}

fn set_flags(file: &impl AsFd, flags: libc::c_int) -> bool {
    // SAFETY: the call reads one integer.
    let set = unsafe {
        libc::ioctl(
            file.as_fd().as_raw_fd(),
            libc::FS_IOC_SETFLAGS,
            &raw const flags,
        )
    };
    set == 0
}

/// Takes away what lies there from this byte on, also from those who have it mapped. From now on anybody who has the memfd makes holes in it.
/// To take memory apart may wait.
pub fn empty(file: &impl AsFd, from: u64) -> io::Result<()> {
    if is_whole(file) {
        set_flags(file, 0);
    }
    let len = nix::sys::stat::fstat(file)?.st_size - from as i64;
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file, how, from as i64, len)?)
}

/// Is this memory in which nobody makes holes? Asks nobody but the kernel; for memfds.
pub fn is_whole(file: &impl AsFd) -> bool {
    let mut flags: libc::c_int = 0;
    // SAFETY: the call writes one integer.
    let got = unsafe {
        libc::ioctl(
            file.as_fd().as_raw_fd(),
            libc::FS_IOC_GETFLAGS,
            &raw mut flags,
        )
    };
    got == 0 && flags & IMMUTABLE != 0
}

/// Can this process make such memory?
pub fn can_be_whole() -> bool {
    static CAN: LazyLock<bool> = LazyLock::new(|| {
        memfd_create(c"rdsock-try", MFdFlags::MFD_CLOEXEC).is_ok_and(|file| make_whole(&file))
    });
    *CAN
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::MmapOptions;
    use nix::errno::Errno;
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    const LEN: usize = 8192;

    #[test]
    fn who_keeps_what_was_emptied_keeps_no_page_of_it() {
        let file = memfd_create(c"test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING);
        let file = File::from(file.unwrap());
        file.set_len(4 * LEN as u64).unwrap();
        let seals = nix::fcntl::SealFlag::F_SEAL_SHRINK | nix::fcntl::SealFlag::F_SEAL_SEAL;
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_ADD_SEALS(seals)).unwrap();
        file.write_all_at(&[7; 4 * LEN], 0).unwrap();
        make_whole(&file);
        let map = MmapOptions::new().map_raw(&file).unwrap();
        let pages = || nix::sys::stat::fstat(&file).unwrap().st_blocks * 512 / 4096;
        // SAFETY: within the mapping, and nothing in it is referred to.
        let at = |at: usize| unsafe { map.as_ptr().add(at).read_volatile() };
        assert_eq!((pages(), at(0), at(LEN)), (8, 7, 7));
        empty(&file, LEN as u64).unwrap();
        assert_eq!(pages(), 2);
        assert_eq!((at(0), at(LEN), at(4 * LEN - 1)), (7, 0, 0));
    }

    #[test]
    fn nobody_makes_holes_in_it_and_who_has_it_maps_it() {
        let file = memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap();
        let file = File::from(file);
        file.set_len(LEN as u64).unwrap();
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, how, 0, LEN as i64).unwrap();
        assert!(!is_whole(&file));
        if !can_be_whole() {
            let why = "SKIPPED, NOTHING WAS CHECKED: needs CAP_LINUX_IMMUTABLE and Linux 6.1";
            return writeln!(std::io::stderr(), "{why}").unwrap();
        }
        assert!(make_whole(&file) && is_whole(&file));
        assert_eq!(fallocate(&file, how, 0, LEN as i64), Err(Errno::EPERM));
        let map = MmapOptions::new().len(LEN).map_raw(&file).unwrap();
        // SAFETY: the mapping is whole, and nothing in it is referred to.
        unsafe {
            map.as_mut_ptr().write_volatile(7);
            let removed = libc::madvise(map.as_mut_ptr().cast(), LEN, libc::MADV_REMOVE);
            assert_eq!((removed, Errno::last()), (-1, Errno::EPERM));
            assert_eq!(map.as_ptr().read_volatile(), 7);
        }
    }
}
