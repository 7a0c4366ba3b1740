//! `getsockname` and `getpeername`: the kernel's own, but for connections to other nodes.

use crate::address::{Address, family_of};
use crate::conn::{self, Use};
use crate::{between, real, sys};
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
    let held = conn::of(fd);
    let told = held.as_ref().and_then(|held| held.conn.names.peer());
    let room = match sys::is_bad_pointer(len.cast()) {
        true => 0,
        // SAFETY: the program's own length.
        false => unsafe { *len },
    };
    // SAFETY: arguments pass through.
    let result = unsafe { name(told, address, len, || real::getpeername(fd, address, len)) };
    match held {
        // SAFETY: the kernel has written there, as much as there is room for.
        Some(held) if result == 0 => unsafe {
            unless_nameless(&held, fd, Address::given(address, room.min(*len)))
        },
        _ => result,
    }
}

/// `getsockopt` of `SO_PEERNAME`.
///
/// # Safety
/// As `getsockopt(2)`.
pub unsafe fn peer_name(fd: c_int, value: *mut c_void, len: *mut socklen_t) -> c_int {
    // SAFETY: arguments pass through; the kernel gives as many bytes as it was asked for.
    unsafe {
        let result = real::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERNAME, value, len);
        let Some(held) = conn::of(fd).filter(|_| result == 0) else {
            return result;
        };
        if let Some(told) = held.conn.names.peer()
            && let Some(name) = sys::name_of(fd, true)
        {
            told.put(value.cast(), *len, name.ss_family.into());
        }
        unless_nameless(&held, fd, Address::given(value.cast(), *len))
    }
}

/// Success, but for a connection of another node's of which nobody has said from where it comes: it has no peer that could be told.
fn unless_nameless(held: &Use, fd: c_int, peer: Option<(c_int, Address)>) -> c_int {
    if between::is_nameless(held, fd, peer.map(|(_, peer)| peer)) {
        real::set_errno(libc::ENOTCONN);
        return -1;
    }
    0
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
