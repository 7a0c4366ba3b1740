//! Memory that the daemon has made, in which nobody makes holes, however many others may write it.
//!
//! Why holes are a danger stands in `sealed.rs`. A seal against them would forbid new writable mappings, and streams are
//! mapped anew for as long as they live (`exec`). The kernel makes no holes in a file that is immutable, either, and that says nothing of
//! mappings: whoever has the descriptor maps it to be written. It takes `CAP_LINUX_IMMUTABLE` to make a file immutable, or not to be so any more.
//!
//! Where that can't be done (a kernel before 6.1, a daemon without that privilege, huge pages), who is handed memory can make holes in it. A
//! daemon without privilege serves one user, who stalls nobody else by that.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::LazyLock;

use nix::sys::memfd::{MFdFlags, memfd_create};

/// `FS_IMMUTABLE_FL` of the kernel.
const IMMUTABLE: libc::c_int = 0x10;

/// From now on nobody makes holes in a memfd, nor opens it anew to write it. True when that could be done.
pub(super) fn make_whole(file: &impl AsFd) -> bool {
    let flags = IMMUTABLE;
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
    use nix::fcntl::{FallocateFlags, fallocate};
    use std::fs::File;
    use std::io::Write;

    const LEN: usize = 8192;

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
