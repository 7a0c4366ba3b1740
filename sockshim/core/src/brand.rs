//! The brand on the socket of a stream: an option of its own, so that a program which inherits the socket by exec knows that bytes may lie
//! elsewhere, also where no daemon says so. Set before the other end may use the ring, taken off when both directions are the kernel's again.
//!
//! It is an option that does nothing to TCP (what it asks for comes with datagrams alone), which every holder of the socket sees and nobody
//! else. A program that sets it itself is told what it has set, and the kernel is not ([`crate::known`]).

use crate::sys;
use libc::c_int;

/// `IP_PASSSEC` of linux/in.h, for sockets of IPv6 as well.
const PASSSEC: c_int = 18;

/// Is this the option?
#[inline]
pub fn is_it(level: c_int, name: c_int) -> bool {
    (level, name) == (libc::IPPROTO_IP, PASSSEC)
}

/// False where the kernel does not do it, or a filter of system calls.
pub fn put_on(fd: c_int) -> bool {
    sys::setsockopt(fd, libc::IPPROTO_IP, PASSSEC, &1_i32) == 0
}

/// Both directions are the kernel's.
pub fn take_off(fd: c_int) {
    sys::setsockopt(fd, libc::IPPROTO_IP, PASSSEC, &0_i32);
}

/// Has a program had a stream here, which may go on?
pub fn is_on(fd: c_int) -> bool {
    sys::getsockopt::<c_int>(fd, libc::IPPROTO_IP, PASSSEC).is_some_and(|value| value != 0)
}
