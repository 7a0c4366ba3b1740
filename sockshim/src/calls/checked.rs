//! The names that programs built with `_FORTIFY_SOURCE` use: each checks the size of the program's
//! buffer, and is the plain call then.

use super::{poll, ppoll, read, recv, recvfrom};
use libc::{
    c_int, c_void, nfds_t, pollfd, sigset_t, size_t, sockaddr, socklen_t, ssize_t, timespec,
};

unsafe extern "C" {
    /// Of `csrc/libc.c`.
    fn rdsock_overflow() -> !;
}

/// Ends the program, as glibc's fortified functions do, when a buffer is smaller than asked.
fn fortify(len: size_t, room: size_t) {
    if len > room {
        // SAFETY: glibc's own end of a program whose buffer overflows.
        unsafe { rdsock_overflow() }
    }
}

/// # Safety
/// As `read(2)`, with the buffer's size.
pub unsafe fn __read_chk(fd: c_int, buf: *mut c_void, len: size_t, room: size_t) -> ssize_t {
    fortify(len, room);
    // SAFETY: as the caller says.
    unsafe { read(fd, buf, len) }
}

/// # Safety
/// As `recv(2)`, with the buffer's size.
pub unsafe fn __recv_chk(
    fd: c_int,
    buf: *mut c_void,
    len: size_t,
    room: size_t,
    flags: c_int,
) -> ssize_t {
    fortify(len, room);
    // SAFETY: as the caller says.
    unsafe { recv(fd, buf, len, flags) }
}

/// # Safety
/// As `recvfrom(2)`, with the buffer's size.
pub unsafe fn __recvfrom_chk(
    fd: c_int,
    buf: *mut c_void,
    len: size_t,
    room: size_t,
    flags: c_int,
    from: *mut sockaddr,
    from_len: *mut socklen_t,
) -> ssize_t {
    fortify(len, room);
    // SAFETY: as the caller says.
    unsafe { recvfrom(fd, buf, len, flags, from, from_len) }
}

/// # Safety
/// As `poll(2)`, with the array's size.
pub unsafe fn __poll_chk(fds: *mut pollfd, count: nfds_t, ms: c_int, room: size_t) -> c_int {
    fortify(count as usize, room / size_of::<pollfd>());
    // SAFETY: as the caller says.
    unsafe { poll(fds, count, ms) }
}

/// # Safety
/// As `ppoll(2)`, with the array's size.
pub unsafe fn __ppoll_chk(
    fds: *mut pollfd,
    count: nfds_t,
    limit: *const timespec,
    mask: *const sigset_t,
    room: size_t,
) -> c_int {
    fortify(count as usize, room / size_of::<pollfd>());
    // SAFETY: as the caller says.
    unsafe { ppoll(fds, count, limit, mask) }
}
