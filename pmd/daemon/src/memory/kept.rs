//! Pages of which the daemon holds one, so that their neighbours stay where they are, too.
//!
//! Who has a file mapped can have its pages *collapsed* into a huge one (`MADV_COLLAPSE`), also where the file is smaller than that. The
//! pages are locked while all mappings of theirs are taken away, and whoever touches one meanwhile waits. The kernel leaves that,
//! at once, where a page is in use by somebody it does not know. So one of each two megabytes is: it lies in a pipe that nobody
//! reads. Used for all that the control thread or a poll core touches and programs can map: by `made.rs` and `stream.rs`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

use super::stream::HUGE_PAGE;
use crate::accounts::Charge;

const PAGE: u64 = 4096;
/// Pages in a pipe, at most: as many as the kernel gives to who has no privilege for more (`fs.pipe-max-size`).
const PIPE: u64 = 256;

/// Holds the pages until it is dropped.
#[derive(Debug)]
pub struct Kept {
    _pipes: Vec<OwnedFd>,
    // Goes behind them.
    _charge: Arc<Charge>,
}

impl Kept {
    /// Holds a page of each two megabytes of these files, whose first pages are written. Waits while somebody who has a file has such
    /// a page locked. What lies at the beginning of each *further* two megabytes is zero from then on.
    pub fn pages_of(files: &[BorrowedFd<'_>], charge: Arc<Charge>) -> io::Result<Self> {
        let mut parts = Vec::new();
        for file in files {
            let len = nix::sys::stat::fstat(file)?.st_size as u64;
            parts.extend((0..len).step_by(HUGE_PAGE as usize).map(|at| (*file, at)));
        }
        let pipes = parts.chunks(PIPE as usize).map(fill);
        Ok(Kept {
            _pipes: pipes.collect::<io::Result<_>>()?,
            _charge: charge,
        })
    }

    /// Nothing: for memory that others can make holes in all the same.
    pub fn nothing(charge: Arc<Charge>) -> Self {
        Kept {
            _pipes: Vec::new(),
            _charge: charge,
        }
    }
}

/// Descriptors that it takes to hold pages of a file of `bytes` bytes.
pub fn pipes_for(bytes: u64) -> u64 {
    bytes.div_ceil(HUGE_PAGE).div_ceil(PIPE)
}

/// A pipe that holds a page of each of these parts of files.
fn fill(parts: &[(BorrowedFd<'_>, u64)]) -> io::Result<OwnedFd> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    // As many places as it takes: what the kernel lets a user have of them is bounded.
    let size = parts.len() as u64 * PAGE;
    fcntl(&write, FcntlArg::F_SETPIPE_SZ(size as i32))?;
    for (file, at) in parts {
        if *at != 0 {
            // Else the kernel puts a page of zeroes there that is nobody's.
            nix::sys::uio::pwrite(file, &[0], *at as i64)?;
        }
        let mut at = *at as libc::off64_t;
        let (none, flags) = (std::ptr::null_mut(), libc::SPLICE_F_NONBLOCK);
        // SAFETY: the call reads and writes `at`, and no other memory of this process.
        let held = unsafe {
            libc::splice(
                file.as_raw_fd(),
                &raw mut at,
                write.as_raw_fd(),
                none,
                1,
                flags,
            )
        };
        if held != 1 {
            return Err(match Errno::last() {
                _ if held == 0 => io::ErrorKind::UnexpectedEof.into(),
                error => error.into(),
            });
        }
    }
    Ok(read)
}

/// What who has a file can do to it.
#[cfg(test)]
pub(super) mod collapse {
    use super::HUGE_PAGE;
    use memmap2::MmapOptions;
    use nix::errno::Errno;
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    const HUGE: usize = HUGE_PAGE as usize;
    const MADV_COLLAPSE: i32 = 25;

    /// Collapses the two megabytes at `at`.
    fn collapse(file: &File, at: u64) -> nix::Result<()> {
        let room = MmapOptions::new().len(2 * HUGE).map_anon().unwrap();
        let place = (room.as_ptr() as usize).next_multiple_of(HUGE) as *mut libc::c_void;
        let (protect, flags) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_FIXED);
        // SAFETY: within room of this function's own, that nobody refers to; nothing in it is touched.
        unsafe {
            let fd = file.as_raw_fd();
            assert_eq!(
                libc::mmap(place, HUGE, protect, flags, fd, at as i64),
                place
            );
            Errno::result(libc::madvise(place, HUGE, MADV_COLLAPSE)).map(drop)
        }
    }

    /// What was just written may not be on the kernel's lists yet.
    fn collapse_at_last(file: &File, at: u64) -> nix::Result<()> {
        let tries = (0..100).map(|_| collapse(file, at));
        let mut over = tries.skip_while(|result| *result == Err(Errno::EAGAIN));
        over.next().unwrap_or(Err(Errno::EAGAIN))
    }

    /// Nobody collapses a part of it, as far as the system collapses files of this size at all.
    pub fn are_not_collapsed(file: &File) {
        let len = file.metadata().unwrap().len();
        let free = super::super::stream::memfd(c"test", len).unwrap();
        for at in (0..len).step_by(HUGE) {
            free.write_all_at(&[1], at).unwrap();
            if let Err(error) = collapse_at_last(&free, at) {
                let what = format!("no memory is collapsed here: {error}");
                let skipped = format!("SKIPPED, NOTHING WAS CHECKED: {what}");
                return writeln!(std::io::stderr(), "{skipped}").unwrap();
            }
            assert_eq!(collapse_at_last(file, at), Err(Errno::EAGAIN), "at {at}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::stream::{make_stream_with, memfd};
    use super::super::tenant::{Bells, TenantMap};
    use super::super::whole::can_be_whole;
    use super::collapse::are_not_collapsed;
    use super::*;
    use crate::channel::closer_of_test;
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsFd;

    fn is_skipped() -> bool {
        let skipped = !can_be_whole();
        if skipped {
            let why = "SKIPPED, NOTHING WAS CHECKED: needs CAP_LINUX_IMMUTABLE and Linux 6.1";
            writeln!(std::io::stderr(), "{why}").unwrap();
        }
        skipped
    }

    #[test]
    fn files_of_any_size_are_not_collapsed() {
        for len in [PAGE, 10 * PAGE, HUGE_PAGE, 2 * HUGE_PAGE + PAGE] {
            let file = memfd(c"test", len).unwrap();
            nix::sys::uio::pwrite(&file, &[1], 0).unwrap();
            let _kept = Kept::pages_of(&[file.as_fd()], Arc::new(Charge::of_nothing())).unwrap();
            are_not_collapsed(&file);
        }
    }

    #[test]
    fn it_takes_as_many_pipes_as_are_paid_for() {
        for (parts, pipes) in [(1, 1), (PIPE, 1), (PIPE + 1, 2), (2 * PIPE + 1, 3)] {
            let len = parts * HUGE_PAGE;
            let file = memfd(c"test", len).unwrap();
            nix::sys::uio::pwrite(&file, &[1], 0).unwrap();
            let kept = Kept::pages_of(&[file.as_fd()], Arc::new(Charge::of_nothing())).unwrap();
            assert_eq!(kept._pipes.len(), pipes);
            assert_eq!(pipes_for(len), pipes as u64);
        }
        assert_eq!(pipes_for(PAGE), 1);
    }

    #[test]
    fn a_stream_to_another_node_is_not_collapsed() {
        if is_skipped() {
            return;
        }
        for ring_size in [64 << 10, 2 << 20] {
            let bytes = rdsock_node::memory::stream_bytes(ring_size);
            let paid = Arc::new(Charge::of_nothing());
            let (fds, _kept) = make_stream_with(7, ring_size, bytes, 0, paid).unwrap();
            are_not_collapsed(&File::from(fds.stream));
        }
    }

    /// Whether the daemon has made it, or the one before it: poll cores ring it.
    #[test]
    fn the_bells_of_a_tenant_are_not_collapsed() {
        if is_skipped() {
            return;
        }
        let closer = closer_of_test();
        let earlier = Bells::make(&closer).unwrap();
        let board = earlier.board.try_clone().unwrap();
        let brought = Bells::check(closer.foreign(board)).unwrap();
        for bells in [Bells::make(&closer).unwrap(), brought] {
            assert!(bells.may_be_rung);
            let map = TenantMap::make(&bells, Charge::of_nothing(), Charge::of_nothing()).unwrap();
            let kept = map.kept().clone();
            // Streams ring them when the tenant has gone, too.
            drop(map);
            are_not_collapsed(&File::from(bells.board.try_clone().unwrap()));
            drop(kept);
        }
    }
}
