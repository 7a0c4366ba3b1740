//! The shim's own descriptors: kept away from the numbers that the program gets and expects.

use crate::fds::{self, Kind};
use crate::sys;
use libc::c_int;

/// The least number of a descriptor of the shim's own, where there is room: below are those that a program counts from, or
/// expects to be closed.
const LEAST: usize = 64;
/// Descriptors that a program may have at least where the shim takes some for itself.
const ENOUGH: u64 = 128;

/// True when the program may have so few descriptors that it could miss those that the shim takes.
pub fn are_few() -> bool {
    sys::limit_of(libc::RLIMIT_NOFILE) < ENOUGH
}

/// A copy of a descriptor, as high as the program's limit allows, up to some number.
fn copy_high(fd: c_int) -> Option<c_int> {
    let top = sys::limit_of(libc::RLIMIT_NOFILE).min(1024) as usize;
    [
        top.saturating_sub(64).max(LEAST),
        LEAST,
        fds::STDERR as usize + 1,
    ]
    .into_iter()
    .find_map(|least| copy_from(fd, least))
}

/// A copy with this number, or a higher one.
fn copy_from(fd: c_int, least: usize) -> Option<c_int> {
    let copy = sys::fcntl(fd, libc::F_DUPFD_CLOEXEC, least) as c_int;
    (copy >= 0).then_some(copy)
}

fn note(fd: c_int) -> c_int {
    fds::set_kind(fd, Kind::Internal);
    fd
}

/// Moves a descriptor of the shim's own out of the way of the program's numbers.
pub fn hide(fd: c_int) -> c_int {
    note(match copy_high(fd) {
        Some(high) => {
            sys::close(fd);
            high
        }
        None => fd,
    })
}

/// The shim's own copy of a descriptor of the program's.
pub fn hidden_copy(fd: c_int) -> Option<c_int> {
    copy_high(fd).map(note)
}

/// The program wants a number that the shim uses: a copy with a higher one. Who has it under the old number is to be told of the
/// new one, and then the old one to be closed.
#[must_use]
pub fn copy_behind(fd: c_int) -> Option<c_int> {
    copy_from(fd, fd as usize + 1).map(note)
}

/// Closes a descriptor of the shim's own.
pub fn close_hidden(fd: c_int) {
    fds::set_kind(fd, Kind::Other);
    sys::close(fd);
}
