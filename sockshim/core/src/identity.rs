//! Which process this is: whether the constructor has run, and whose state the shim's is. Asked by everybody; calls the kernel
//! and libc alone.

use crate::state::PROCESS;
use crate::sys;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering::*};

/// What is noted of it.
#[derive(Debug)]
pub struct Identity {
    /// 1 once the constructor has run.
    ready: AtomicU32,
    /// This process, for locks. Set by the constructor and in forked children.
    pid: AtomicU32,
    /// 1 when this process takes part in membarriers.
    has_barriers: AtomicU32,
    /// glibc's flag, a char, where it has it.
    single_threaded: AtomicPtr<u8>,
}

impl Identity {
    /// Nothing yet.
    pub const fn new() -> Self {
        Identity {
            ready: AtomicU32::new(0),
            pid: AtomicU32::new(0),
            has_barriers: AtomicU32::new(0),
            single_threaded: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// True in a process that did not make these notes.
    fn is_foreign_to(&self, pid: u32) -> bool {
        self.pid.load(Relaxed) != pid
    }
}

/// Notes which process this is, and takes part in membarriers, where the kernel has them.
pub fn note() {
    let own = &PROCESS.identity;
    own.pid.store(sys::getpid(), Relaxed);
    own.has_barriers
        .store(u32::from(sys::register_membarrier()), Relaxed);
}

/// Libc says there whether there is one thread only, or it is null.
pub fn note_threads(flag: *mut u8) {
    PROCESS.identity.single_threaded.store(flag, Relaxed);
}

/// The constructor has run.
pub fn note_ready() {
    PROCESS.identity.ready.store(1, Release);
}

/// True once the constructor has run: before, everything is the kernel's.
pub fn is_ready() -> bool {
    PROCESS.identity.ready.load(Acquire) != 0
}

/// The process that owns the shim's private state. A `vfork` child sees its parent's.
#[inline]
pub fn pid() -> u32 {
    PROCESS.identity.pid.load(Relaxed)
}

/// True while the process has never had a second thread.
#[inline]
pub fn is_single_threaded() -> bool {
    let flag = PROCESS.identity.single_threaded.load(Relaxed);
    // SAFETY: glibc's flag, written only before a thread is made.
    !flag.is_null() && unsafe { flag.read_volatile() } != 0
}

/// Whether this process takes part in membarriers.
#[inline]
pub fn has_barriers() -> bool {
    PROCESS.identity.has_barriers.load(Relaxed) != 0
}

/// True in a `vfork` child and in one made by a raw `clone`: memory is (or was copied from) the
/// parent's, and the shim's state is not this process's.
pub fn is_foreign() -> bool {
    PROCESS.identity.is_foreign_to(sys::getpid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_those_of_the_process_that_made_them() {
        let own = Identity::new();
        own.pid.store(7, Relaxed);
        assert!(!own.is_foreign_to(7) && own.is_foreign_to(8));
    }
}
