//! Bytes that go between a connection and a file or a pipe: `sendfile` and `splice`.

use super::transfer::{Moves, transfer};
use crate::conn::{self, Kind};
use crate::{io, real, sys};
use libc::{c_int, c_uint, off_t, off64_t, size_t, ssize_t};

/// # Safety
/// As `sendfile(2)`.
pub unsafe fn sendfile(out: c_int, from: c_int, offset: *mut off_t, count: size_t) -> ssize_t {
    // SAFETY: arguments pass through.
    unsafe {
        send_file(out, from, offset, count, &|| {
            real::sendfile(out, from, offset, count)
        })
    }
}

/// # Safety
/// As `sendfile(2)`.
pub unsafe fn sendfile64(out: c_int, from: c_int, offset: *mut off64_t, count: size_t) -> ssize_t {
    // SAFETY: arguments pass through.
    unsafe {
        send_file(out, from, offset, count, &|| {
            real::sendfile64(out, from, offset, count)
        })
    }
}

/// # Safety
/// `offset` is null or valid.
unsafe fn send_file(
    out: c_int,
    from: c_int,
    offset: *mut off64_t,
    count: size_t,
    in_kernel: &dyn Fn() -> isize,
) -> isize {
    if conn::kind(out) == Kind::Other || conn::kind(from) != Kind::Other || count == 0 {
        return in_kernel();
    }
    // SAFETY: the caller vouches for the offset.
    if !offset.is_null() && (sys::is_bad_pointer(offset.cast()) || unsafe { *offset } < 0) {
        // Nothing is sent.
        return in_kernel();
    }
    transfer(
        out,
        Moves::Out,
        // SAFETY: the caller vouches for the offset.
        &|held, stream| io::send_file(held, stream, out, from, unsafe { offset.as_mut() }, count),
        in_kernel,
    )
}

/// # Safety
/// As `splice(2)`.
pub unsafe fn splice(
    from: c_int,
    from_at: *mut off64_t,
    to: c_int,
    to_at: *mut off64_t,
    len: size_t,
    flags: c_uint,
) -> ssize_t {
    // SAFETY: arguments pass through.
    let in_kernel = || unsafe { real::splice(from, from_at, to, to_at, len, flags) };
    if len == 0
        || !from_at.is_null()
        || !to_at.is_null()
        || (conn::of(from).is_some() && conn::of(to).is_some())
    {
        return in_kernel();
    }
    let wait = flags & libc::SPLICE_F_NONBLOCK == 0;
    if conn::kind(to) != Kind::Other {
        transfer(
            to,
            Moves::Out,
            &|held, stream| io::splice_in(held, stream, to, from, len, wait),
            &in_kernel,
        )
    } else if conn::kind(from) != Kind::Other {
        transfer(
            from,
            Moves::In { waits: wait },
            &|held, stream| io::splice_out(held, stream, from, to, len, wait),
            &in_kernel,
        )
    } else {
        in_kernel()
    }
}
