//! The libc of the program, for the core, which needs none.

use crate::real::{self, asked, errno};
use crate::sys::Host;
use libc::nfds_t;

unsafe extern "C" {
    /// Of `csrc/thread.c`: a word of the calling thread's own.
    fn rdsock_thread_name() -> *mut u64;
}

/// What it gives.
pub static LIBC: Host = Host {
    ppoll: |fds, count, limit, mask| {
        // SAFETY: the caller vouches for the arguments.
        asked(unsafe { real::ppoll(fds, count as nfds_t, limit, mask) })
    },
    epoll_pwait2: |fd, events, most, limit, mask| {
        // SAFETY: as above.
        asked(unsafe { real::epoll_pwait2(fd, events, most, limit, mask) })
    },
    epoll_pwait: |fd, events, most, ms, mask| {
        // SAFETY: as above.
        asked(unsafe { real::epoll_pwait(fd, events, most, ms, mask) })
    },
    recv: |fd, buf, len, flags| {
        // SAFETY: as above.
        match unsafe { real::recv(fd, buf.cast(), len, flags) } {
            -1 => -(errno() as isize),
            got => got,
        }
    },
    clock_gettime: |clock, now| {
        // SAFETY: as above.
        unsafe { libc::clock_gettime(clock, now) };
    },
    test_cancel: || {
        static TEST_CANCEL: real::Symbol = real::Symbol::new(c"pthread_testcancel");
        let address = TEST_CANCEL.address_now();
        if !address.is_null() {
            // SAFETY: the symbol of this name has this type in C.
            let test: unsafe extern "C" fn() = unsafe { std::mem::transmute(address) };
            // SAFETY: it takes nothing.
            unsafe { test() };
        }
    },
    getcpu: || {
        // SAFETY: it takes nothing, and reads memory of this thread that the kernel keeps up to date.
        unsafe { libc::sched_getcpu() }
    },
    word: || {
        // SAFETY: it takes nothing.
        unsafe { rdsock_thread_name() }
    },
};
