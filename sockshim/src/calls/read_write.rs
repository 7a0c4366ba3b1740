//! `read`, `write` and their kin: the calls that any descriptor takes.

use super::transfer::{IOV_MAX, one, receive, transmit};
use crate::conn::{self, Kind};
use crate::{handing_over, real, sys};
use libc::{c_int, c_void, iovec, off_t, size_t, ssize_t};

/// # Safety
/// As `read(2)`.
pub unsafe fn read(fd: c_int, buf: *mut c_void, len: size_t) -> ssize_t {
    // SAFETY: arguments pass through; a tracked fd's buffer is described by the local entry.
    unsafe {
        if conn::kind(fd) == Kind::Other || len == 0 {
            return real::read(fd, buf, len);
        }
        if is_too_much(fd, len) {
            real::set_errno(libc::EFAULT);
            return -1;
        }
        receive(fd, &one(buf, len), 1, 0, &|| real::read(fd, buf, len))
    }
}

/// # Safety
/// As `write(2)`.
pub unsafe fn write(fd: c_int, buf: *const c_void, len: size_t) -> ssize_t {
    // SAFETY: as in `read`.
    unsafe {
        if conn::kind(fd) == Kind::Other || len == 0 {
            handing_over::telling(fd, &one(buf, len), 1);
            return real::write(fd, buf, len);
        }
        if is_too_much(fd, len) {
            real::set_errno(libc::EFAULT);
            return -1;
        }
        transmit(fd, &one(buf, len), 1, 0, &|| real::write(fd, buf, len))
    }
}

/// # Safety
/// As `readv(2)`.
pub unsafe fn readv(fd: c_int, iov: *const iovec, count: c_int) -> ssize_t {
    // SAFETY: arguments pass through.
    unsafe {
        if are_kernels(fd, iov, count) {
            return real::readv(fd, iov, count);
        }
        receive(fd, iov, count as usize, 0, &|| real::readv(fd, iov, count))
    }
}

/// # Safety
/// As `writev(2)`.
pub unsafe fn writev(fd: c_int, iov: *const iovec, count: c_int) -> ssize_t {
    // SAFETY: arguments pass through.
    unsafe {
        if are_kernels(fd, iov, count) {
            return real::writev(fd, iov, count);
        }
        transmit(fd, iov, count as usize, 0, &|| real::writev(fd, iov, count))
    }
}

/// # Safety
/// As `preadv2(2)`.
pub unsafe fn preadv2(
    fd: c_int,
    iov: *const iovec,
    count: c_int,
    offset: off_t,
    flags: c_int,
) -> ssize_t {
    // SAFETY: arguments pass through.
    unsafe {
        let in_kernel = || real::preadv2(fd, iov, count, offset, flags);
        match flags_of(offset, flags).filter(|_| !are_kernels(fd, iov, count)) {
            Some(flags) => receive(fd, iov, count as usize, flags, &in_kernel),
            None => in_kernel(),
        }
    }
}

/// # Safety
/// As `pwritev2(2)`.
pub unsafe fn pwritev2(
    fd: c_int,
    iov: *const iovec,
    count: c_int,
    offset: off_t,
    flags: c_int,
) -> ssize_t {
    // SAFETY: arguments pass through.
    unsafe {
        let in_kernel = || real::pwritev2(fd, iov, count, offset, flags);
        match flags_of(offset, flags).filter(|_| !are_kernels(fd, iov, count)) {
            Some(flags) => transmit(fd, iov, count as usize, flags, &in_kernel),
            None => in_kernel(),
        }
    }
}

/// True when a stream can't take so many bytes; of other descriptors the kernel says so.
fn is_too_much(fd: c_int, len: size_t) -> bool {
    len > isize::MAX as usize && conn::of(fd).is_some_and(|held| held.conn.stream().is_some())
}

/// True when these buffers are the kernel's business alone: the descriptor is, or they are wrong.
fn are_kernels(fd: c_int, iov: *const iovec, count: c_int) -> bool {
    conn::kind(fd) == Kind::Other
        || !(1..=IOV_MAX).contains(&count)
        || sys::is_bad_pointer(iov.cast())
}

/// What `preadv2` and `pwritev2` are told, in flags of a receive or a send; `None` where the kernel decides.
fn flags_of(offset: off_t, flags: c_int) -> Option<c_int> {
    let is_known = offset == -1 && flags & !(libc::RWF_NOWAIT | libc::RWF_HIPRI) == 0;
    is_known.then_some(if flags & libc::RWF_NOWAIT != 0 {
        libc::MSG_DONTWAIT
    } else {
        0
    })
}
