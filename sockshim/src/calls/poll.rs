//! `poll`, `select` and their kin: what they do when a connection is among the fds is in
//! [`crate::poll`].

use crate::poll::{self, Sets, nanoseconds_of};
use crate::{conn, real, sys};
use libc::{c_int, fd_set, nfds_t, pollfd, sigset_t, timespec, timeval};

/// # Safety
/// As `poll(2)`.
pub unsafe fn poll(fds: *mut pollfd, count: nfds_t, ms: c_int) -> c_int {
    let ns = u64::try_from(ms).ok().map(|ms| ms * 1_000_000);
    // SAFETY: arguments pass through; bad ones are the kernel's to refuse.
    unsafe {
        if sys::is_bad_pointer(fds.cast())
            || count > conn::FDS as nfds_t
            || !poll::concerns(fds, count, ns)
        {
            return real::poll(fds, count, ms);
        }
        poll::ppoll(fds, count as usize, ns, std::ptr::null())
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
                    && poll::concerns(fds, count, ns) =>
            {
                poll::ppoll(fds, count as usize, ns, mask)
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
    if !sets.concern(|| time_of(limit)) {
        // SAFETY: arguments pass through.
        return unsafe { real::select(count, read, write, except, limit) };
    }
    // SAFETY: null or valid, as the caller says.
    let Some(limit) = (unsafe { limit.as_mut() }) else {
        return sets.select(None, std::ptr::null());
    };
    if limit.tv_sec < 0 || limit.tv_usec < 0 {
        sys::set_errno(libc::EINVAL);
        return -1;
    }
    let ns = nanoseconds_in(limit);
    let deadline = poll::Deadline::after(Some(ns));
    let result = sets.select(Some(ns), std::ptr::null());
    // Linux says how much time was left.
    let left = deadline.left().unwrap_or(0);
    limit.tv_sec = (left / 1_000_000_000) as i64;
    limit.tv_usec = (left % 1_000_000_000 / 1000) as i64;
    result
}

fn nanoseconds_in(limit: &timeval) -> u64 {
    (limit.tv_sec.max(0) as u64)
        .saturating_mul(1_000_000_000)
        .saturating_add(limit.tv_usec.max(0) as u64 * 1000)
}

/// The time limit of a `select`; none where it is nonsense, which the kernel refuses at once.
fn time_of(limit: *const timeval) -> Option<u64> {
    if sys::is_bad_pointer(limit.cast()) {
        return (!limit.is_null()).then_some(0);
    }
    // SAFETY: null was ruled out, and the caller of `select` vouches for the rest.
    unsafe { limit.as_ref() }.map(nanoseconds_in)
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
            Ok(ns) if sets.concern(|| ns) => sets.select(ns, mask),
            _ => real::pselect(count, read, write, except, limit, mask),
        }
    }
}
