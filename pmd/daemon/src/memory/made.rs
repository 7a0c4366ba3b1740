//! Memory of a tenant that the daemon has made and mapped, so that no touch of it has to wait.
//!
//! The control thread touches a tenant's memory, and the tenant has it, too. Whoever touches a page waits while somebody else
//! holds it: for seconds, where the file is mapped some hundred thousand times. So nobody may be able to:
//!
//! - Who may write a file may make *holes* in it (`FALLOC_FL_PUNCH_HOLE`, `MADV_REMOVE`). The kernel makes none in a file that is
//!   immutable (`whole.rs`). Where a daemon may not make it so, it seals the memory with `F_SEAL_FUTURE_WRITE` once the tenant has
//!   mapped it ([`Made::keep_whole`]), and does not touch it before.
//! - Who has a page mapped that nobody else has can have it *paged out* (`MADV_PAGEOUT`, also where nothing comes of it). The kernel
//!   leaves what the caller may not open to write, and pages that a second process has mapped. So what is touched later is
//!   touched at once.
//! - Who has a file mapped can have its pages *collapsed* into a huge one. So the daemon holds some (`kept.rs`).
//!
//! All of this is done before anybody else has the memory, so making it waits for nobody. Whoever unmaps it may wait for those
//! who map it at that time: a porter.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use rdsock_shm::sync::{AtomicU32, Ordering};

use super::kept::Kept;
use super::stream::memfd;
use super::whole::make_whole;
use crate::accounts::Charge;
use crate::channel::{Closer, Foreign};

const PAGE: usize = 4096;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Made {
    map: MmapRaw,
    file: Arc<Foreign>,
    /// Nobody makes holes in it.
    whole: bool,
    /// Of its pages, and of the file beside it.
    kept: Arc<Kept>,
}

/// What is paid for such memory.
pub(super) struct Charges {
    /// For its descriptor.
    pub memory: Charge,
    /// For that which keeps its pages.
    pub pages: Charge,
}

impl Made {
    /// Makes memory of `len` bytes that begins with these. No other part of it than `parts` is touched later. Pages of `beside` are
    /// kept with its own.
    pub(super) fn new(
        name: &std::ffi::CStr,
        start: &[u8],
        len: usize,
        parts: &[Range<usize>],
        beside: Option<BorrowedFd<'_>>,
        charges: Charges,
        closer: &Closer,
    ) -> io::Result<Self> {
        Self::with(
            name,
            start,
            len,
            parts,
            beside,
            (charges, closer),
            make_whole,
        )
    }

    fn with(
        name: &std::ffi::CStr,
        start: &[u8],
        len: usize,
        parts: &[Range<usize>],
        beside: Option<BorrowedFd<'_>>,
        (charges, closer): (Charges, &Closer),
        make_whole: fn(&File) -> bool,
    ) -> io::Result<Self> {
        use std::os::unix::fs::FileExt;
        let file = memfd(name, len as u64)?;
        file.write_all_at(start, 0)?;
        let map = MmapOptions::new().len(len).map_raw(&file)?;
        let mut seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        let whole = make_whole(&file);
        // Else another seal follows.
        seals.set(SealFlag::F_SEAL_SEAL, whole);
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        for part in parts {
            touch(&map, part);
        }
        let files: Vec<_> = std::iter::once(file.as_fd()).chain(beside).collect();
        let kept = Kept::pages_of(&files, Arc::new(charges.pages))?;
        Ok(Made {
            kept: Arc::new(kept),
            map,
            file: Arc::new(closer.foreign(OwnedFd::from(file)).paid_by(charges.memory)),
            whole,
        })
    }

    /// From now on nobody makes holes in it, also where it could not be made immutable. Who has it has mapped it by now: no new
    /// mapping can be written. Fails where somebody has sealed it. May wait for a hole that is being made: for a porter.
    pub(super) fn keep_whole(&self) -> io::Result<()> {
        if self.whole {
            return Ok(());
        }
        let seals = SealFlag::F_SEAL_FUTURE_WRITE | SealFlag::F_SEAL_SEAL;
        match fcntl(&self.file, FcntlArg::F_ADD_SEALS(seals)) {
            Ok(_) => Ok(()),
            Err(error) => Err(Errno::into(error)),
        }
    }

    /// The mapping's start, as long as `self` lives. Others write to it.
    pub(super) fn as_ptr(&self) -> *const u8 {
        self.map.as_ptr()
    }

    /// What keeps its pages, and those of the file beside it.
    pub(super) fn kept(&self) -> &Arc<Kept> {
        &self.kept
    }

    /// The file.
    pub(super) fn file(&self) -> &Arc<Foreign> {
        &self.file
    }
}

/// Maps the pages of a part.
fn touch(map: &MmapRaw, part: &Range<usize>) {
    let start = part.start - part.start % PAGE;
    for at in (start..part.end.min(map.len())).step_by(PAGE) {
        // SAFETY: within the mapping, and aligned; others use this word as an atomic, if at all.
        let word = unsafe { &*map.as_ptr().add(at).cast::<AtomicU32>() };
        // As one who writes, without a change.
        word.fetch_or(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
// One part of a memory is a list of one range.
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::super::kept::collapse::are_not_collapsed;
    use super::super::stream::HUGE_PAGE;
    use super::super::whole::can_be_whole;
    use super::*;
    use crate::channel::closer_of_test;
    use nix::fcntl::{FallocateFlags, fallocate};
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    const LEN: usize = 8192;

    /// As a daemon makes it that may make files immutable, or not.
    fn made(len: usize, parts: &[Range<usize>], privileged: bool) -> Made {
        let whole = if privileged {
            make_whole
        } else {
            |_: &File| false
        };
        let charges = Charges {
            memory: Charge::of_nothing(),
            pages: Charge::of_nothing(),
        };
        let charges = (charges, &closer_of_test());
        Made::with(c"test", b"start", len, parts, None, charges, whole).unwrap()
    }

    fn punch(file: &impl AsFd) -> nix::Result<()> {
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(file, how, 0, LEN as i64)
    }

    fn skipped(why: &str) {
        let _ = writeln!(std::io::stderr(), "SKIPPED, NOTHING WAS CHECKED: {why}");
    }

    /// Nobody makes holes, also through a mapping, and who has it mapped writes on.
    fn has_no_holes(made: &Made, tenants: &MmapRaw) {
        assert_eq!(punch(made.file()), Err(Errno::EPERM));
        // SAFETY: the mapping is whole, and nothing in it is used.
        let removed = unsafe { libc::madvise(tenants.as_mut_ptr().cast(), LEN, libc::MADV_REMOVE) };
        assert_eq!((removed, Errno::last()), (-1, Errno::EPERM));
        // SAFETY: within both mappings, and no other thread writes.
        unsafe {
            tenants.as_mut_ptr().add(5000).write_volatile(7);
            assert_eq!(made.as_ptr().add(5000).read_volatile(), 7);
        }
    }

    #[test]
    fn nobody_makes_holes_in_it_from_its_making_on() {
        if !can_be_whole() {
            return skipped("needs CAP_LINUX_IMMUTABLE and Linux 6.1");
        }
        let made = made(LEN, &[], true);
        let file = File::from(made.file().as_fd().try_clone_to_owned().unwrap());
        let mut start = [0; 5];
        file.read_exact_at(&mut start, 0).unwrap();
        assert_eq!(&start, b"start");
        assert!(file.set_len(0).is_err() && file.set_len(1 << 30).is_err());
        has_no_holes(&made, &MmapOptions::new().len(LEN).map_raw(&file).unwrap());
        made.keep_whole().unwrap();
        has_no_holes(&made, &MmapOptions::new().len(LEN).map_raw(&file).unwrap());
    }

    #[test]
    fn without_privilege_nobody_makes_holes_once_it_is_mapped() {
        let made = made(LEN, &[], false);
        let tenants = MmapOptions::new().len(LEN).map_raw(made.file()).unwrap();
        punch(made.file()).unwrap();
        made.keep_whole().unwrap();
        has_no_holes(&made, &tenants);
        assert!(MmapOptions::new().len(LEN).map_raw(made.file()).is_err());
    }

    #[test]
    fn without_privilege_who_seals_it_first_is_found_out() {
        let made = made(LEN, &[], false);
        let seal = FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SEAL);
        fcntl(made.file(), seal).unwrap();
        assert!(made.keep_whole().is_err());
    }

    #[test]
    fn its_pages_are_not_collapsed() {
        let len = HUGE_PAGE as usize + LEN;
        let made = made(len, &[], true);
        let file = File::from(made.file().as_fd().try_clone_to_owned().unwrap());
        // However many of them there are.
        file.write_all_at(&vec![1; len], 0).unwrap();
        are_not_collapsed(&file);
    }

    /// The kernel leaves a page that somebody else has mapped.
    #[test]
    fn its_pages_are_mapped_before_they_are_used() {
        const PAGES: usize = 32;
        let len = PAGES * PAGE;
        let made = made(len, &[0..2 * PAGE, 20 * PAGE + 100..30 * PAGE], false);
        let mapped = |page: usize| {
            let mut entry = [0; 8];
            let at = (made.as_ptr() as usize / PAGE + page) * 8;
            let pages = File::open("/proc/self/pagemap").unwrap();
            pages.read_exact_at(&mut entry, at as u64).unwrap();
            u64::from_ne_bytes(entry) >> 63 == 1
        };
        for page in (0..2).chain(20..30) {
            assert!(mapped(page), "page {page}");
        }
    }

    /// Nor does anybody have its pages paged out: the kernel does that for who may open the file to write it alone.
    #[test]
    fn nobody_else_could_open_it_to_write() {
        if !can_be_whole() {
            return skipped("needs CAP_LINUX_IMMUTABLE and Linux 6.1");
        }
        let made = made(LEN, &[], true);
        let path = format!("/proc/self/fd/{}", made.file().as_raw_fd());
        assert!(File::options().write(true).open(&path).is_err());
        assert!(File::open(&path).is_ok());
    }
}
