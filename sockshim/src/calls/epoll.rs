//! `epoll_create`, `epoll_ctl`, `epoll_wait` and their kin: what they do when a connection is
//! registered is in [`crate::epoll`].

use crate::deadline::nanoseconds_of;
use crate::real::{asked, told};
use crate::{epoll, identity, numbers, real};
use libc::{c_int, epoll_event, sigset_t, timespec};

/// # Safety
/// As `epoll_create(2)`.
pub unsafe fn epoll_create(size: c_int) -> c_int {
    // SAFETY: arguments pass through.
    made_epoll(unsafe { real::epoll_create(size) })
}

/// # Safety
/// As `epoll_create1(2)`.
pub unsafe fn epoll_create1(flags: c_int) -> c_int {
    // SAFETY: arguments pass through.
    made_epoll(unsafe { real::epoll_create1(flags) })
}

fn made_epoll(fd: c_int) -> c_int {
    if fd >= 0 && identity::is_ready() && !identity::is_foreign() {
        numbers::track_instance(fd);
    }
    fd
}

/// # Safety
/// As `epoll_ctl(2)`.
pub unsafe fn epoll_ctl(epfd: c_int, op: c_int, fd: c_int, event: *mut epoll_event) -> c_int {
    // SAFETY: arguments pass through.
    unsafe {
        match epoll::ctl(epfd, op, fd, event) {
            Some(result) => told(result),
            None => real::epoll_ctl(epfd, op, fd, event),
        }
    }
}

/// # Safety
/// As `epoll_wait(2)`.
pub unsafe fn epoll_wait(epfd: c_int, events: *mut epoll_event, most: c_int, ms: c_int) -> c_int {
    let ns = u64::try_from(ms).ok().map(|ms| ms * 1_000_000);
    // SAFETY: arguments pass through.
    unsafe {
        let kernel = || asked(real::epoll_wait(epfd, events, most, ms));
        told(epoll::wait_on(
            epfd,
            events,
            most,
            ns,
            std::ptr::null(),
            kernel,
        ))
    }
}

/// # Safety
/// As `epoll_pwait(2)`.
pub unsafe fn epoll_pwait(
    epfd: c_int,
    events: *mut epoll_event,
    most: c_int,
    ms: c_int,
    mask: *const sigset_t,
) -> c_int {
    let ns = u64::try_from(ms).ok().map(|ms| ms * 1_000_000);
    // SAFETY: arguments pass through.
    unsafe {
        let kernel = || asked(real::epoll_pwait(epfd, events, most, ms, mask));
        told(epoll::wait_on(epfd, events, most, ns, mask, kernel))
    }
}

/// # Safety
/// As `epoll_pwait2(2)`.
pub unsafe fn epoll_pwait2(
    epfd: c_int,
    events: *mut epoll_event,
    most: c_int,
    limit: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: arguments pass through.
    unsafe {
        let kernel = || asked(real::epoll_pwait2(epfd, events, most, limit, mask));
        told(match nanoseconds_of(limit) {
            Ok(ns) => epoll::wait_on(epfd, events, most, ns, mask, kernel),
            Err(_) => kernel(),
        })
    }
}
