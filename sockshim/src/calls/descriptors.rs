//! Descriptors that are closed and copied: `close`, `dup` and their kin. A number that the shim
//! uses for itself is never the program's to close, and is given up when the program wants it.

use crate::conn::{self, Kind};
use crate::{demote, epoll, process, real, sys, tenant};
use libc::{c_int, c_uint};
use rdsock_shm::reason::Reason;
use std::sync::atomic::Ordering::*;

/// Before an fd of the program is closed, whichever way: what stands behind it is let go. False
/// when it is not the program's to close.
fn closing(fd: c_int) -> bool {
    match conn::kind(fd) {
        Kind::Other => true,
        _ if process::is_foreign() => true,
        Kind::Internal => false,
        Kind::Conn(_) => {
            tenant::stay_attached();
            if let Some(held) = conn::of(fd)
                && held.conn.refs.load(Acquire) == 1
            {
                demote::before_close(&held, fd);
            } else if let Some(held) = conn::of(fd) {
                epoll::renumber(&held, fd);
            }
            conn::replace(fd, Kind::Other);
            true
        }
        Kind::Epoll(_) => {
            conn::replace(fd, Kind::Other);
            true
        }
    }
}

/// # Safety
/// As `close(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    if !closing(fd) {
        sys::set_errno(libc::EBADF);
        return -1;
    }
    // SAFETY: arguments pass through.
    unsafe { real::close(fd) }
}

/// # Safety
/// As `close_range(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    const UNSHARE: c_int = 2;
    const CLOEXEC: c_int = 4;
    if first > last
        || flags & !(UNSHARE | CLOEXEC) != 0
        || flags & CLOEXEC != 0
        || process::is_foreign()
        || !process::is_ready()
    {
        // SAFETY: arguments pass through.
        return unsafe { real::close_range(first, last, flags) };
    }
    // The shim's own descriptors stay: the range is closed piece by piece around them.
    let end = (last as usize).min(conn::FDS - 1) as c_uint;
    let mut start = first;
    let mut fd = first;
    while fd <= end {
        if closing(fd as c_int) {
            fd += 1;
            continue;
        }
        if fd > start {
            // SAFETY: a piece of the program's range.
            unsafe { real::close_range(start, fd - 1, flags) };
        }
        fd += 1;
        start = fd;
    }
    if start > last {
        return 0;
    }
    // SAFETY: the rest of the program's range.
    unsafe { real::close_range(start, last, flags) }
}

/// # Safety
/// As `closefrom(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn closefrom(first: c_int) {
    // SAFETY: any numbers are sound.
    unsafe { close_range(first.max(0) as c_uint, c_uint::MAX, 0) };
}

/// Records a copy of a descriptor, made whichever way.
pub fn copied(old: c_int, new: c_int) -> c_int {
    if new < 0 || process::is_foreign() {
        return new;
    }
    match conn::kind(old) {
        Kind::Conn(index) => conn::add_ref(new, index),
        Kind::Epoll(index) => epoll::add_ref(new, index),
        _ if conn::kind(new) != Kind::Other => conn::replace(new, Kind::Other),
        _ => {}
    }
    new
}

/// # Safety
/// As `dup(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup(fd: c_int) -> c_int {
    // SAFETY: arguments pass through.
    copied(fd, unsafe { real::dup(fd) })
}

/// The number that a descriptor is to be copied to is about to be taken. False: EBADF.
fn making_room(old: c_int, new: c_int) -> bool {
    if process::is_foreign() || old == new {
        return true;
    }
    if conn::kind(old) == Kind::Internal {
        sys::set_errno(libc::EBADF);
        return false;
    }
    if conn::kind(new) == Kind::Internal {
        tenant::move_hidden(new);
    } else if sys::fcntl(old, libc::F_GETFD, 0) >= 0 {
        closing(new);
        // stdin, stdout and stderr are used by stdio, behind the shim's back.
        if new <= 2
            && let Some(held) = conn::of(old)
        {
            demote::abandon(&held, old, Reason::Stdio);
        }
    }
    true
}

/// # Safety
/// As `dup2(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup2(old: c_int, new: c_int) -> c_int {
    if !making_room(old, new) {
        return -1;
    }
    // SAFETY: arguments pass through.
    let result = unsafe { real::dup2(old, new) };
    if old == new {
        result
    } else {
        copied(old, result)
    }
}

/// # Safety
/// As `dup3(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
    if !making_room(old, new) {
        return -1;
    }
    // SAFETY: arguments pass through.
    let result = unsafe { real::dup3(old, new, flags) };
    if old == new {
        result
    } else {
        copied(old, result)
    }
}
