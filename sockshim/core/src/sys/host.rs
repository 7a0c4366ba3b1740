//! What the libc of a program gives, where there is one: waits in which a thread can be cancelled, clocks that need no system call,
//! and a word for each thread. Without it, the kernel is asked.

use super::call;
use libc::{c_int, clockid_t, epoll_event, pollfd, sigset_t, size_t, timespec};
use std::ptr::{from_ref, null_mut};
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

/// See the module's text. Those that may fail return a negated error number.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// As `ppoll(2)`.
    pub ppoll: unsafe fn(*mut pollfd, size_t, *const timespec, *const sigset_t) -> c_int,
    /// As `epoll_pwait2(2)`.
    pub epoll_pwait2:
        unsafe fn(c_int, *mut epoll_event, c_int, *const timespec, *const sigset_t) -> c_int,
    /// As `epoll_pwait(2)`.
    pub epoll_pwait: unsafe fn(c_int, *mut epoll_event, c_int, c_int, *const sigset_t) -> c_int,
    /// As `recv(2)`.
    pub recv: unsafe fn(c_int, *mut u8, size_t, c_int) -> isize,
    /// As `clock_gettime(2)`.
    pub clock_gettime: unsafe fn(clockid_t, *mut timespec),
    /// As `pthread_testcancel(3)`.
    pub test_cancel: fn(),
    /// The core that this thread runs on, or a number below 0.
    pub getcpu: fn() -> c_int,
    /// A word of the calling thread's own, zero at first; null where there is none.
    pub word: fn() -> *mut u64,
}

/// Size of the kernel's set of signals, in bytes.
const SET: usize = 8;

impl Host {
    /// The kernel alone.
    pub const KERNEL: Host = Host {
        ppoll: |fds, count, limit, mask| {
            // The kernel writes to what it is given how much time is left.
            // SAFETY: null or valid, as the caller vouches for.
            let mut left = unsafe { limit.as_ref() }.copied();
            let limit = left.as_mut().map_or(null_mut(), |left| left);
            let args = [fds as usize, count, limit as usize, mask as usize, SET, 0];
            // SAFETY: the caller vouches for the rest.
            unsafe { call(libc::SYS_ppoll, args) as c_int }
        },
        epoll_pwait2: |fd, events, most, limit, mask| {
            let args = [
                fd as usize,
                events as usize,
                most as usize,
                limit as usize,
                mask as usize,
                SET,
            ];
            // SAFETY: the caller vouches for it.
            unsafe { call(libc::SYS_epoll_pwait2, args) as c_int }
        },
        epoll_pwait: |fd, events, most, ms, mask| {
            let args = [
                fd as usize,
                events as usize,
                most as usize,
                ms as usize,
                mask as usize,
                SET,
            ];
            // SAFETY: the caller vouches for it.
            unsafe { call(libc::SYS_epoll_pwait, args) as c_int }
        },
        recv: |fd, buf, len, flags| {
            // SAFETY: the caller vouches for it.
            unsafe { super::recv_raw(fd, buf, len, flags) }
        },
        clock_gettime: |clock, now| {
            // SAFETY: the caller vouches for it.
            unsafe {
                call(
                    libc::SYS_clock_gettime,
                    [clock as usize, now as usize, 0, 0, 0, 0],
                )
            };
        },
        test_cancel: || {},
        getcpu: || {
            let mut core: u32 = 0;
            // SAFETY: one word is written.
            let got = unsafe { call(libc::SYS_getcpu, [&raw mut core as usize, 0, 0, 0, 0, 0]) };
            if got < 0 { -1 } else { core as c_int }
        },
        word: || null_mut(),
    };
}

static HOST: AtomicPtr<Host> = AtomicPtr::new(from_ref(&Host::KERNEL).cast_mut());

/// This one from now on. Before there is a second thread.
pub fn live_beside(host: &'static Host) {
    HOST.store(from_ref(host).cast_mut(), Relaxed);
}

/// The one that this process has.
#[inline]
pub fn host() -> &'static Host {
    // SAFETY: `live_beside` was given a reference to one that lives for ever, and nobody writes to it.
    unsafe { &*HOST.load(Relaxed) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unit tests live beside nobody.
    #[test]
    fn the_kernel_gives_what_a_libc_would() {
        let host = host();
        let mut now = timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: valid for writes.
        unsafe { (host.clock_gettime)(libc::CLOCK_MONOTONIC, &mut now) };
        assert!(now.tv_sec > 0 && (host.getcpu)() >= 0 && (host.word)().is_null());
        let limit = timespec {
            tv_sec: 0,
            tv_nsec: 1,
        };
        // SAFETY: no entry; and bad descriptors.
        unsafe {
            assert_eq!((host.ppoll)(null_mut(), 0, &limit, std::ptr::null()), 0);
            assert_eq!(limit.tv_nsec, 1);
            let (mut byte, mut event) = (0, epoll_event { events: 0, u64: 0 });
            let bad = -libc::EBADF;
            assert_eq!((host.recv)(-1, &mut byte, 1, 0), bad as isize);
            assert_eq!(
                (host.epoll_pwait)(-1, &mut event, 1, 0, std::ptr::null()),
                bad
            );
            assert_eq!(
                (host.epoll_pwait2)(-1, &mut event, 1, &limit, std::ptr::null()),
                bad
            );
        }
    }
}
