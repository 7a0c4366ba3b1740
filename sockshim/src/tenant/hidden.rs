//! The shim's own descriptors: kept away from the numbers that the program gets and expects.

use super::attach::{CONTROL, INHERITED};
use super::memory::MEMFDS;
use crate::{conn, sys};
use libc::c_int;
use std::sync::atomic::Ordering::*;

/// Moves a descriptor of the shim's own out of the way of the program's numbers.
pub fn hide(fd: c_int) -> c_int {
    let base = (sys::limit_of(libc::RLIMIT_NOFILE).min(1024) as usize).saturating_sub(64);
    let high = sys::fcntl(fd, libc::F_DUPFD_CLOEXEC, base) as c_int;
    let hidden = if high >= 0 {
        sys::close(fd);
        high
    } else {
        fd
    };
    conn::set_kind(hidden, conn::Kind::Internal);
    hidden
}

/// Closes a descriptor of the shim's own.
pub fn close_hidden(fd: c_int) {
    conn::set_kind(fd, conn::Kind::Other);
    sys::close(fd);
}

/// The program wants a number that the shim uses: moves out of its way.
pub fn move_hidden(fd: c_int) {
    let new = sys::fcntl(fd, libc::F_DUPFD_CLOEXEC, fd as usize + 1) as c_int;
    if new < 0 {
        return;
    }
    conn::set_kind(new, conn::Kind::Internal);
    for place in MEMFDS.iter().chain([&CONTROL, &INHERITED]) {
        let _ = place.compare_exchange(fd, new, AcqRel, Relaxed);
    }
    crate::epoll::moved_inner(fd, new);
    close_hidden(fd);
}
