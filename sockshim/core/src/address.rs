//! IPv4 and IPv6 addresses with their ports, as the messages to the daemon have them, and as programs
//! give and get them.

use crate::sys;
use libc::{c_int, sockaddr, sockaddr_in, sockaddr_in6, sockaddr_storage, socklen_t};
use rdsock_shm::control::FABRIC_SOURCE_V4;

/// Bytes of a `sockaddr_in6` without its scope, which a program may leave out.
const WITHOUT_SCOPE: usize = 24;

/// An address and its port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// IPv4 as a v4-mapped IPv6 address.
    pub ip: [u8; 16],
    /// In the host's order.
    pub port: u16,
}

impl Address {
    /// Of a name that the kernel gave; `None` for another family.
    pub fn of(name: &sockaddr_storage) -> Option<Self> {
        let at = name as *const sockaddr_storage;
        match name.ss_family as c_int {
            libc::AF_INET => {
                // SAFETY: the storage holds an address of this family.
                let v4 = unsafe { &*at.cast::<sockaddr_in>() };
                Some(Address {
                    ip: mapped(v4.sin_addr.s_addr.to_ne_bytes()),
                    port: u16::from_be(v4.sin_port),
                })
            }
            libc::AF_INET6 => {
                // SAFETY: as above.
                let v6 = unsafe { &*at.cast::<sockaddr_in6>() };
                Some(Address {
                    ip: v6.sin6_addr.s6_addr,
                    port: u16::from_be(v6.sin6_port),
                })
            }
            _ => None,
        }
    }

    /// Reads an address that the program gives, with its family. `None` where the kernel is to say
    /// what is wrong with it, and for an address of one link.
    ///
    /// # Safety
    /// `address` is null, the kernel's, or valid for reads of `len` bytes.
    pub unsafe fn given(address: *const sockaddr, len: socklen_t) -> Option<(c_int, Self)> {
        let len = len as usize;
        if sys::is_bad_pointer(address.cast()) || len < 2 || len > size_of::<sockaddr_storage>() {
            return None;
        }
        // SAFETY: zeroes are a value, and of the caller's bytes no more are read than there are.
        let name = unsafe {
            let mut name: sockaddr_storage = std::mem::zeroed();
            let needed = match (*address).sa_family as c_int {
                libc::AF_INET => size_of::<sockaddr_in>(),
                libc::AF_INET6 => WITHOUT_SCOPE,
                _ => return None,
            };
            if len < needed {
                return None;
            }
            let known = len.min(size_of::<sockaddr_in6>());
            std::ptr::copy_nonoverlapping(address.cast::<u8>(), (&raw mut name).cast(), known);
            name
        };
        let family = name.ss_family as c_int;
        // SAFETY: an address of this family, or zeroes behind it.
        let scoped = family == libc::AF_INET6
            && unsafe { (*(&raw const name).cast::<sockaddr_in6>()).sin6_scope_id } != 0;
        (!scoped).then_some((family, Self::of(&name)?))
    }

    /// As a socket of this family has it, with its length. `None` where it has no such address.
    pub fn name(&self, family: c_int) -> Option<(sockaddr_storage, socklen_t)> {
        // SAFETY: made of integers; zeroes are a value.
        let mut name: sockaddr_storage = unsafe { std::mem::zeroed() };
        let at = &raw mut name;
        match (family, v4(&self.ip)) {
            (libc::AF_INET, Some(v4)) => {
                // SAFETY: the storage has room for an address of any family.
                let to = unsafe { &mut *at.cast::<sockaddr_in>() };
                to.sin_family = libc::AF_INET as _;
                to.sin_port = self.port.to_be();
                to.sin_addr.s_addr = u32::from_ne_bytes(v4);
                Some((name, size_of::<sockaddr_in>() as socklen_t))
            }
            (libc::AF_INET6, _) => {
                // SAFETY: as above.
                let to = unsafe { &mut *at.cast::<sockaddr_in6>() };
                to.sin6_family = libc::AF_INET6 as _;
                to.sin6_port = self.port.to_be();
                to.sin6_addr.s6_addr = self.ip;
                Some((name, size_of::<sockaddr_in6>() as socklen_t))
            }
            _ => None,
        }
    }

    /// Puts it, as a socket of this family has it, over one that the kernel has just put into
    /// `room` bytes: cut off where it is longer, as the kernel does.
    ///
    /// # Safety
    /// `to` is valid for writes of `room` bytes, or of as many as such an address has.
    pub unsafe fn put(&self, to: *mut sockaddr, room: socklen_t, family: c_int) {
        if let Some((name, len)) = self.name(family) {
            let most = room.min(len) as usize;
            // SAFETY: as the caller says; the name is longer.
            unsafe {
                std::ptr::copy_nonoverlapping((&raw const name).cast::<u8>(), to.cast(), most)
            };
        }
    }

    /// True for an address of loopback.
    pub fn is_loopback(&self) -> bool {
        match v4(&self.ip) {
            Some([first, ..]) => first == 127,
            None => self.is_v6_loopback(),
        }
    }

    /// True for `::1`.
    pub fn is_v6_loopback(&self) -> bool {
        u128::from_be_bytes(self.ip) == 1
    }

    /// True for the one that the daemon connects from, on behalf of a program on another node, and for that of IPv6, from which others come
    /// as well.
    pub fn may_be_daemons(&self) -> bool {
        v4(&self.ip) == Some(FABRIC_SOURCE_V4) || self.is_v6_loopback()
    }

    /// True for `0.0.0.0` and `::`.
    pub fn is_any(&self) -> bool {
        self.ip == [0; 16] || v4(&self.ip) == Some([0; 4])
    }
}

/// The family of the name of `len` bytes that the kernel gave.
pub fn family_of(len: socklen_t) -> c_int {
    if len as usize == size_of::<sockaddr_in>() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    }
}

/// The IPv4 address that a v4-mapped address stands for.
pub fn v4(ip: &[u8; 16]) -> Option<[u8; 4]> {
    match ip {
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => Some([*a, *b, *c, *d]),
        _ => None,
    }
}

/// An IPv4 address as a v4-mapped IPv6 address.
fn mapped([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}
