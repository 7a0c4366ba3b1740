//! `poll`, `select` and their kin: what they do when a connection is among the fds is in
//! [`crate::poll`].

use crate::deadline::{Deadline, nanoseconds_of};
use crate::poll::{self, Sets};
use crate::real::told;
use crate::{conn, real, sys, tenant, wait};
use libc::{c_int, fd_set, nfds_t, pollfd, sigset_t, timespec, timeval};

/// # Safety
/// As `poll(2)`.
pub unsafe fn poll(fds: *mut pollfd, count: nfds_t, ms: c_int) -> c_int {
    let ns = u64::try_from(ms).ok().map(|ms| ms * 1_000_000);
    // SAFETY: arguments pass through; bad ones are the kernel's to refuse.
    unsafe {
        if sys::is_bad_pointer(fds.cast())
            || count > conn::FDS as nfds_t
            || !poll::concerns(fds, count)
        {
            return real::poll(fds, count, ms);
        }
        told(poll::ppoll(fds, count as usize, ns, std::ptr::null()))
    }
}

/// # Safety
/// As `ppoll(2)`.
pub unsafe fn ppoll(
    fds: *mut pollfd,
    count: nfds_t,
    limit: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: as in `poll`.
    unsafe {
        match nanoseconds_of(limit) {
            Ok(ns)
                if !sys::is_bad_pointer(fds.cast())
                    && count <= conn::FDS as nfds_t
                    && poll::concerns(fds, count) =>
            {
                told(poll::ppoll(fds, count as usize, ns, mask))
            }
            _ => real::ppoll(fds, count, limit, mask),
        }
    }
}

/// # Safety
/// As `select(2)`.
pub unsafe fn select(
    count: c_int,
    read: *mut fd_set,
    write: *mut fd_set,
    except: *mut fd_set,
    limit: *mut timeval,
) -> c_int {
    let sets = Sets {
        count: count.max(0) as usize,
        sets: [read, write, except],
    };
    if !sets.concern() {
        // SAFETY: arguments pass through.
        return unsafe { real::select(count, read, write, except, limit) };
    }
    // SAFETY: null or valid, as the caller says.
    let Some(limit) = (unsafe { limit.as_mut() }) else {
        // SAFETY: no mask.
        return told(unsafe { sets.select(None, std::ptr::null()) });
    };
    if limit.tv_sec < 0 || limit.tv_usec < 0 {
        real::set_errno(libc::EINVAL);
        return -1;
    }
    let ns = (limit.tv_sec as u64)
        .saturating_mul(1_000_000_000)
        .saturating_add(limit.tv_usec as u64 * 1000);
    let deadline = Deadline::after(Some(ns));
    // SAFETY: no mask.
    let result = told(unsafe { sets.select(Some(ns), std::ptr::null()) });
    // Linux says how much time was left.
    let left = deadline.left().unwrap_or(0);
    limit.tv_sec = (left / 1_000_000_000) as i64;
    limit.tv_usec = (left % 1_000_000_000 / 1000) as i64;
    result
}

/// # Safety
/// As `pselect(2)`.
pub unsafe fn pselect(
    count: c_int,
    read: *mut fd_set,
    write: *mut fd_set,
    except: *mut fd_set,
    limit: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    let sets = Sets {
        count: count.max(0) as usize,
        sets: [read, write, except],
    };
    // SAFETY: arguments pass through.
    unsafe {
        match nanoseconds_of(limit) {
            Ok(ns) if sets.concern() => told(sets.select(ns, mask)),
            _ => real::pselect(count, read, write, except, limit, mask),
        }
    }
}

/// # Safety
/// As `sigsuspend(2)`.
pub unsafe fn sigsuspend(mask: *const sigset_t) -> c_int {
    if tenant::greeting().is_none() || sys::is_bad_pointer(mask.cast()) {
        // SAFETY: arguments pass through.
        return unsafe { real::sigsuspend(mask) };
    }
    told(wait::for_signal(mask))
}

/// # Safety
/// As `pause(2)`.
pub unsafe fn pause() -> c_int {
    if tenant::greeting().is_none() {
        // SAFETY: there is no argument.
        return unsafe { real::pause() };
    }
    told(wait::for_signal(std::ptr::null()))
}
