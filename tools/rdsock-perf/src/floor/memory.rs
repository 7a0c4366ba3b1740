//! Memory that two processes share, and the second process.

use crate::error::{Error, Result};
use std::ptr::NonNull;

/// Anonymous memory that stays shared over `fork`; written once, so that no page fault comes later.
pub struct Shared {
    start: NonNull<u8>,
    bytes: usize,
}

impl Shared {
    /// Maps `bytes` of zeros, in huge pages where the system gives them without being asked twice.
    pub fn new(bytes: usize) -> Result<Self> {
        // SAFETY: a new anonymous mapping at an address that the kernel chooses; nothing else is touched.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let start = NonNull::new(start.cast::<u8>()).filter(|_| start != libc::MAP_FAILED);
        let start =
            start.ok_or_else(|| Error::last_os(format!("map {bytes} bytes of shared memory")))?;
        // SAFETY: the mapping is `bytes` long, writable, and known to nobody else yet.
        unsafe {
            libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE);
            start.as_ptr().write_bytes(0, bytes);
        }
        Ok(Self { start, bytes })
    }

    /// The address `offset` bytes from the start; at least `bytes` more belong to the mapping.
    pub fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
        assert!(offset + bytes <= self.bytes, "inside the mapping");
        // SAFETY: the assertion keeps the result inside the mapping.
        unsafe { self.start.as_ptr().add(offset) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, and all pointers into it are gone with `self`'s borrowers.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// A forked process that runs one function; killed and reaped when dropped.
pub struct Fork {
    pid: libc::pid_t,
}

impl Fork {
    /// Runs `work` in a new process, which dies with this one.
    pub fn start(work: impl FnOnce()) -> Result<Self> {
        // SAFETY: this process has one thread (see `floor::run`), so the child may go on in any code.
        match unsafe { libc::fork() } {
            -1 => Err(Error::last_os("fork")),
            0 => {
                // SAFETY: PR_SET_PDEATHSIG takes one number; `_exit` ends the child without running the parent's
                // exit handlers a second time.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as usize);
                    work();
                    libc::_exit(0)
                }
            }
            pid => Ok(Self { pid }),
        }
    }
}

impl Drop for Fork {
    fn drop(&mut self) {
        // SAFETY: `pid` is our own child and has not been waited for, so it names no other process.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}
