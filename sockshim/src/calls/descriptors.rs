//! Descriptors that are closed and copied: `close`, `dup` and their kin. A number that the shim
//! uses for itself is never the program's to close, and is given up when the program wants it.

use crate::conn::{self, Kind};
use crate::{demote, epoll, fds, hidden, identity, numbers, real, signals, sys, tenant};
use libc::{c_int, c_uint};
use rdsock_shm::reason::Reason;
use std::sync::atomic::Ordering::*;

/// Before an fd of the program is closed, whichever way: what stands behind it is let go. False
/// when it is not the program's to close.
fn closing(fd: c_int) -> bool {
    match conn::kind(fd) {
        Kind::Other => true,
        _ if identity::is_foreign() => true,
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
            numbers::replace(fd, Kind::Other);
            true
        }
        Kind::Epoll(_) => {
            numbers::replace(fd, Kind::Other);
            true
        }
    }
}

/// # Safety
/// As `close(2)`.
pub unsafe fn close(fd: c_int) -> c_int {
    if !closing(fd) {
        real::set_errno(libc::EBADF);
        return -1;
    }
    // SAFETY: arguments pass through.
    unsafe { real::close(fd) }
}

/// # Safety
/// As `close_range(2)`.
pub unsafe fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    const UNSHARE: c_int = 2;
    const CLOEXEC: c_int = 4;
    if first > last
        || flags & !(UNSHARE | CLOEXEC) != 0
        || flags & CLOEXEC != 0
        || identity::is_foreign()
        || !identity::is_ready()
        // Nothing is let go that stays open.
        || !sys::has_close_range()
    {
        // SAFETY: arguments pass through.
        return unsafe { real::close_range(first, last, flags) };
    }
    // The shim's own descriptors stay: the range is closed piece by piece around them.
    let mut start = first;
    let mut from = first.min(c_int::MAX as c_uint) as c_int;
    while let Some(fd) = conn::next_noted(from).filter(|fd| *fd as c_uint <= last) {
        from = fd + 1;
        if closing(fd) {
            continue;
        }
        if fd as c_uint > start {
            sys::close_range(start, fd as c_uint - 1, flags);
        }
        start = fd as c_uint + 1;
    }
    if start > last {
        return 0;
    }
    real::to_c(sys::close_range(start, last, flags)) as c_int
}

/// # Safety
/// As `closefrom(3)`.
pub unsafe fn closefrom(first: c_int) {
    let first = first.max(0);
    if sys::has_close_range() {
        // SAFETY: any numbers are sound.
        unsafe { close_range(first as c_uint, c_uint::MAX, 0) };
    } else {
        close_listed(first);
    }
}

/// Closes one by one what is open from a number on, as glibc does where the kernel has no `close_range`.
#[cold]
fn close_listed(first: c_int) {
    let list = sys::open_folder(c"/proc/self/fd") as c_int;
    if list < 0 {
        let most = sys::limit_of(libc::RLIMIT_NOFILE).min(conn::FDS as u64) as c_int;
        for fd in first..most.max(conn::high_fd()) {
            // SAFETY: any number is sound.
            unsafe { close(fd) };
        }
        return;
    }
    // What is closed while the list is read may hide others from it: read until nothing more is to be done.
    let mut closed_any = true;
    while closed_any {
        closed_any = false;
        sys::rewind(list);
        let mut part = [0_u64; 256];
        loop {
            let got = sys::list(list, &mut part);
            if got <= 0 {
                break;
            }
            sys::each_number(&part, got as usize, |fd| {
                // SAFETY: any number is sound.
                closed_any |= fd >= first && fd != list && unsafe { close(fd) } == 0;
            });
        }
    }
    sys::close(list);
}

/// Records a copy of a descriptor, made whichever way.
pub fn copied(old: c_int, new: c_int) -> c_int {
    if new < 0 || identity::is_foreign() {
        return new;
    }
    match conn::kind(old) {
        Kind::Conn(index) => {
            if new <= fds::STDERR
                && let Some(held) = conn::of(old)
            {
                demote::abandon(&held, old, Reason::Stdio);
            }
            numbers::add(new, Kind::Conn(index));
        }
        Kind::Epoll(index) => numbers::add(new, Kind::Epoll(index)),
        _ if conn::kind(new) != Kind::Other => numbers::replace(new, Kind::Other),
        _ => {}
    }
    new
}

/// # Safety
/// As `dup(2)`.
pub unsafe fn dup(fd: c_int) -> c_int {
    // SAFETY: arguments pass through.
    copied(fd, unsafe { real::dup(fd) })
}

/// The program wants a number that the shim uses: what has it gets another.
fn give_up(fd: c_int) {
    if let Some(new) = hidden::copy_behind(fd) {
        tenant::moved(fd, new);
        epoll::moved_inner(fd, new);
        signals::moved(fd, new);
        hidden::close_hidden(fd);
    }
}

/// The number that a descriptor is to be copied to is about to be taken. False: EBADF.
fn making_room(old: c_int, new: c_int) -> bool {
    if identity::is_foreign() || old == new {
        return true;
    }
    if conn::kind(old) == Kind::Internal {
        real::set_errno(libc::EBADF);
        return false;
    }
    if conn::kind(new) == Kind::Internal {
        give_up(new);
    } else if sys::fcntl(old, libc::F_GETFD, 0) >= 0 {
        closing(new);
        // stdin, stdout and stderr are used by stdio, behind the shim's back.
        if new <= fds::STDERR
            && let Some(held) = conn::of(old)
        {
            demote::abandon(&held, old, Reason::Stdio);
        }
    }
    true
}

/// # Safety
/// As `dup2(2)`.
pub unsafe fn dup2(old: c_int, new: c_int) -> c_int {
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
pub unsafe fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
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
