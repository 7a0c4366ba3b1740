//! `getsockname` and `getpeername`: the kernel's own, but for connections to other nodes.

use crate::address::{Address, family_of};
use crate::conn;
use crate::{real, sys};
use libc::{c_int, c_void, sockaddr, socklen_t};

/// # Safety
/// As `getsockname(2)`.
pub unsafe fn getsockname(fd: c_int, address: *mut sockaddr, len: *mut socklen_t) -> c_int {
    let told = conn::of(fd).and_then(|held| held.conn.names.local());
    // SAFETY: arguments pass through.
    unsafe { name(told, address, len, || real::getsockname(fd, address, len)) }
}

/// # Safety
/// As `getpeername(2)`.
pub unsafe fn getpeername(fd: c_int, address: *mut sockaddr, len: *mut socklen_t) -> c_int {
    let told = conn::of(fd).and_then(|held| held.conn.names.peer());
    // SAFETY: arguments pass through.
    unsafe { name(told, address, len, || real::getpeername(fd, address, len)) }
}

/// `getsockopt` of `SO_PEERNAME`.
///
/// # Safety
/// As `getsockopt(2)`.
pub unsafe fn peer_name(fd: c_int, value: *mut c_void, len: *mut socklen_t) -> c_int {
    // SAFETY: arguments pass through; the kernel gives as many bytes as it was asked for.
    unsafe {
        let result = real::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERNAME, value, len);
        if result == 0
            && let Some(told) = conn::of(fd).and_then(|held| held.conn.names.peer())
            && let Some(name) = sys::name_of(fd, true)
        {
            told.put(value.cast(), *len, name.ss_family.into());
        }
        result
    }
}

/// Calls the kernel, which checks the arguments and the socket's state, and puts what the program is
/// told over what the kernel said.
///
/// # Safety
/// `address` and `len` are what the program gave.
unsafe fn name(
    told: Option<Address>,
    address: *mut sockaddr,
    len: *mut socklen_t,
    in_kernel: impl FnOnce() -> c_int,
) -> c_int {
    let Some(told) = told.filter(|_| !sys::is_bad_pointer(len.cast())) else {
        return in_kernel();
    };
    // SAFETY: the program's own length.
    let room = unsafe { *len };
    let result = in_kernel();
    if result == 0 {
        // SAFETY: the kernel has written there: as many bytes, or as many as there is room for.
        unsafe { told.put(address, room, family_of(*len)) };
    }
    result
}
