//! Memory that a tenant has made, mapped here, and sealed by the daemon so that no touch of it has to wait.
//!
//! Who may write a file may make holes in it (`FALLOC_FL_PUNCH_HOLE`, `MADV_REMOVE`), and who touches a page in a hole
//! that is being made waits until it is made: for seconds, where the file is mapped some hundred thousand times. With
//! `F_SEAL_FUTURE_WRITE` the kernel makes none any more. It allows no new mapping to be written, either, so the daemon can't ask for
//! a file that is sealed already: it maps it first, and seals it then.
//!
//! Likewise, who has a file mapped can have its pages *collapsed* into a huge one (`MADV_COLLAPSE`), and they are locked while
//! all mappings of theirs are taken away. The kernel leaves that, at once, where a page is in use by somebody it does not know. So
//! [`Sealed`] uses one of each two megabytes: it lies in a pipe that nobody reads.
//!
//! And who has a page mapped that nobody else has can have it *paged out* (`MADV_PAGEOUT`, also where nothing comes of it): it is
//! locked for as long. The kernel leaves pages that a second process has mapped. So what is touched later is touched at once, and
//! locked where that is allowed, which keeps the pages where there is swap, too.
//!
//! [`Sealed::new`] may have to wait for a hole that is being made, so a porter calls it. The control thread gets a
//! [`Sealed`] or nothing.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::unistd::pipe2;
use rdsock_shm::sync::{AtomicU32, Ordering};

use super::{BadMemory, HUGE_PAGE};

const PAGE: usize = 4096;

/// Against holes, and so that nothing is sealed later: a mapping that is there could not be made useless by that, but the
/// daemon need not rely on it.
const SEALS: SealFlag = SealFlag::F_SEAL_FUTURE_WRITE.union(SealFlag::F_SEAL_SEAL);

/// See the module's text.
#[derive(Debug)]
pub(super) struct Sealed {
    map: MmapRaw,
    file: Arc<File>,
    /// Keeps its pages from being collapsed.
    _used: OwnedFd,
}

impl Sealed {
    /// Maps a memfd whose size can't change, and seals it. May wait. Fails where somebody else has sealed it: then it
    /// takes no more seals, or is one that another tenant has brought.
    ///
    /// No other part of it than these is touched later.
    pub(super) fn new(file: File, len: usize, parts: &[Range<usize>]) -> Result<Self, BadMemory> {
        // Most of these need not be mapped to see it, which could wait as well.
        if seals_of(&file)?.intersects(SEALS) {
            return Err(BadMemory::SealedAlready);
        }
        let map = MmapOptions::new().len(len).map_raw(&file)?;
        match fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS)) {
            Ok(_) => {}
            Err(Errno::EPERM) => return Err(BadMemory::SealedAlready),
            Err(error) => return Err(io::Error::from(error).into()),
        }
        match seals_of(&file)?.contains(SEALS) {
            true => {
                for part in parts {
                    keep(&map, part);
                }
                Ok(Sealed {
                    _used: use_pages(&map)?,
                    map,
                    file: Arc::new(file),
                })
            }
            false => Err(BadMemory::SealedAlready),
        }
    }

    /// The mapping's start, as long as `self` lives. Others write to it.
    pub(super) fn as_ptr(&self) -> *const u8 {
        self.map.as_ptr()
    }

    /// The file.
    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }
}

/// Maps the pages of a part, and keeps them in memory where that is allowed.
fn keep(map: &MmapRaw, part: &Range<usize>) {
    let start = part.start - part.start % PAGE;
    let end = part.end.min(map.len());
    // SAFETY: within the mapping. It only says what is to become of the pages when they are there: to make them be there would hold
    // the lock of all of the daemon's mappings while it waits. Where it is refused, they are as others are.
    unsafe {
        let from = map.as_ptr().add(start).cast();
        libc::mlock2(from, end.saturating_sub(start), libc::MLOCK_ONFAULT);
    }
    for at in (start..end).step_by(PAGE) {
        // SAFETY: within the mapping, and aligned; others use this word as an atomic, if at all.
        let word = unsafe { &*map.as_ptr().add(at).cast::<AtomicU32>() };
        // As one who writes, without a change.
        word.fetch_or(0, Ordering::Relaxed);
    }
}

/// A pipe that holds a page of each part of a mapping that could become a huge page.
fn use_pages(map: &MmapRaw) -> io::Result<OwnedFd> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    for at in (0..map.len()).step_by(HUGE_PAGE as usize) {
        let byte = libc::iovec {
            // SAFETY: within the mapping.
            iov_base: unsafe { map.as_mut_ptr().add(at) }.cast(),
            iov_len: 1,
        };
        // SAFETY: the byte is in the mapping; the pipe refers to its page, and nothing ever reads it.
        let used = unsafe { libc::vmsplice(write.as_raw_fd(), &raw const byte, 1, 0) };
        if used != 1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(read)
}

fn seals_of(file: &File) -> io::Result<SealFlag> {
    let seals = fcntl(file, FcntlArg::F_GET_SEALS)?;
    Ok(SealFlag::from_bits_retain(seals))
}

#[cfg(test)]
// One part of a memory is a list of one range.
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;
    use nix::fcntl::{FallocateFlags, fallocate};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    const LEN: usize = 8192;

    fn memory(seals: SealFlag) -> File {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"test", flags).unwrap());
        file.set_len(LEN as u64).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        file
    }

    fn punch(file: &File) -> nix::Result<()> {
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(file, how, 0, LEN as i64)
    }

    #[test]
    fn nobody_makes_holes_in_it_and_who_had_it_mapped_writes_on() {
        let file = memory(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW);
        let tenants = MmapOptions::new().len(LEN).map_raw(&file).unwrap();
        punch(&file).unwrap();
        let sealed = Sealed::new(file.try_clone().unwrap(), LEN, &[]).unwrap();
        assert_eq!(punch(&file), Err(Errno::EPERM));
        // SAFETY: the mapping is whole, and nothing in it is used.
        let removed = unsafe { libc::madvise(tenants.as_mut_ptr().cast(), LEN, libc::MADV_REMOVE) };
        assert_eq!((removed, Errno::last()), (-1, Errno::EPERM));
        assert!(MmapOptions::new().len(LEN).map_raw(&file).is_err());
        // SAFETY: within both mappings, and no other thread writes.
        unsafe {
            tenants.as_mut_ptr().add(5000).write_volatile(7);
            assert_eq!(sealed.as_ptr().add(5000).read_volatile(), 7);
        }
    }

    /// As far as the system collapses memory at all.
    #[test]
    fn its_pages_are_not_collapsed() {
        const HUGE: usize = HUGE_PAGE as usize;
        const MADV_COLLAPSE: i32 = 25;
        let collapse = |file: &File| {
            let room = MmapOptions::new().len(2 * HUGE).map_anon().unwrap();
            let at = (room.as_ptr() as usize).next_multiple_of(HUGE) as *mut libc::c_void;
            let (protect, flags) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_FIXED);
            // SAFETY: within room of this function's own, that nobody refers to.
            unsafe {
                assert_eq!(
                    libc::mmap(at, HUGE, protect, flags, file.as_raw_fd(), 0),
                    at
                );
                match libc::madvise(at, HUGE, MADV_COLLAPSE) {
                    0 => Ok(()),
                    _ => Err(Errno::last()),
                }
            }
        };
        let make = || {
            let file = memory(SealFlag::empty());
            file.set_len(HUGE as u64).unwrap();
            let fixed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
            fcntl(&file, FcntlArg::F_ADD_SEALS(fixed)).unwrap();
            file.write_all_at(&[1; HUGE], 0).unwrap();
            file
        };
        // What was just written may not be on the kernel's lists yet.
        let (mut tries, free) = (0, make());
        while collapse(&free) == Err(Errno::EAGAIN) && tries < 100 {
            tries += 1;
        }
        if let Err(error) = collapse(&free) {
            let mut stderr = std::io::stderr();
            let why = format!("SKIPPED, NOTHING WAS CHECKED: no memory is collapsed here: {error}");
            return writeln!(stderr, "{why}").unwrap();
        }
        let file = make();
        let _sealed = Sealed::new(file.try_clone().unwrap(), HUGE, &[]).unwrap();
        for _ in 0..100 {
            assert_eq!(collapse(&file), Err(Errno::EAGAIN));
        }
    }

    /// The kernel leaves a page that somebody else has mapped.
    #[test]
    fn its_pages_are_mapped_before_they_are_used() {
        const PAGES: usize = 32;
        let len = PAGES * PAGE;
        let fixed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        let file = memory(SealFlag::empty());
        file.set_len(len as u64).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(fixed)).unwrap();
        let parts = [0..2 * PAGE, 20 * PAGE + 100..30 * PAGE];
        let sealed = Sealed::new(file, len, &parts).unwrap();
        let mapped = |page: usize| {
            let mut entry = [0; 8];
            let at = (sealed.as_ptr() as usize / PAGE + page) * 8;
            let pages = File::open("/proc/self/pagemap").unwrap();
            pages.read_exact_at(&mut entry, at as u64).unwrap();
            u64::from_ne_bytes(entry) >> 63 == 1
        };
        for page in (0..2).chain(20..30) {
            assert!(mapped(page), "page {page}");
        }
    }

    #[test]
    fn memory_that_takes_no_seals_is_refused() {
        let fixed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        for seals in [SealFlag::F_SEAL_SEAL, SealFlag::F_SEAL_FUTURE_WRITE, SEALS] {
            let refused = Sealed::new(memory(fixed | seals), LEN, &[]);
            assert!(
                matches!(refused, Err(BadMemory::SealedAlready)),
                "{seals:?}"
            );
        }
    }

    /// Of several that seal one file at once, one has it.
    #[test]
    fn one_memory_is_one_tenants() {
        for _ in 0..200 {
            let file = memory(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW);
            let sealed = std::thread::scope(|scope| {
                let threads = [(); 3].map(|()| {
                    scope.spawn(|| Sealed::new(file.try_clone().unwrap(), LEN, &[]).is_ok())
                });
                threads.map(|thread| thread.join().unwrap())
            });
            assert_eq!(sealed.into_iter().filter(|sealed| *sealed).count(), 1);
        }
    }
}
