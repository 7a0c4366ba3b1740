//! The shim's own descriptors: kept away from the numbers that the program gets and expects.

use super::attach::{CONTROL, INHERITED};
use super::memory::BOARD_FD;
use crate::{conn, fds, sys};
use libc::c_int;
use std::sync::atomic::Ordering::*;

/// The least number of a descriptor of the shim's own, where there is room: below are those that a program counts from, or
/// expects to be closed.
const LEAST: usize = 64;
/// Descriptors that a program may have at least where the shim takes some for itself.
const ENOUGH: u64 = 128;

/// True when the program may have so few descriptors that it could miss those that the shim takes.
pub(super) fn are_few() -> bool {
    sys::limit_of(libc::RLIMIT_NOFILE) < ENOUGH
}

/// A copy of a descriptor, as high as the program's limit allows, up to some number.
fn copy_high(fd: c_int) -> Option<c_int> {
    let top = sys::limit_of(libc::RLIMIT_NOFILE).min(1024) as usize;
    let copy = |base| sys::fcntl(fd, libc::F_DUPFD_CLOEXEC, base) as c_int;
    [
        top.saturating_sub(64).max(LEAST),
        LEAST,
        fds::STDERR as usize + 1,
    ]
    .into_iter()
    .map(copy)
    .find(|copy| *copy >= 0)
}

/// Moves a descriptor of the shim's own out of the way of the program's numbers.
pub fn hide(fd: c_int) -> c_int {
    let hidden = match copy_high(fd) {
        Some(high) => {
            sys::close(fd);
            high
        }
        None => fd,
    };
    conn::set_kind(hidden, conn::Kind::Internal);
    hidden
}

/// The shim's own copy of a descriptor of the program's.
pub fn hidden_copy(fd: c_int) -> Option<c_int> {
    let copy = copy_high(fd)?;
    conn::set_kind(copy, conn::Kind::Internal);
    Some(copy)
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
    for place in [&BOARD_FD, &CONTROL, &INHERITED] {
        let _ = place.compare_exchange(fd, new, AcqRel, Relaxed);
    }
    crate::epoll::moved_inner(fd, new);
    crate::signals::moved(fd, new);
    close_hidden(fd);
}
