//! Connections that a program gives to the kernel, for it to use them itself: to a file system by `mount` (9p), to a map
//! of sockets by `bpf`, to a device by netlink (NBD, iSCSI) or by a text in a file (USB over IP, the server of NFS). Each
//! is demoted before. `ioctl` is in `options.rs`.

use crate::identity::{is_foreign, is_ready};
use crate::options::take_for_kernel;
use crate::program::PROGRAM;
use crate::{demote, real, sys, tenant};
use libc::{c_char, c_int, c_uint, c_ulong, c_void, iovec, mode_t};
use rdsock_shm::reason::Reason;
use std::ffi::CStr;
use std::sync::atomic::{AtomicI32, Ordering::*};

/// Of linux/mount.h: an option with a text, and one with a descriptor.
const FSCONFIG_SET_STRING: c_uint = 1;
const FSCONFIG_SET_FD: c_uint = 5;

/// A number in decimal digits, and nothing else.
fn number(text: &[u8]) -> Option<c_int> {
    let text = std::str::from_utf8(text).ok()?;
    text.parse().ok()
}

/// True for the name of an option that means a descriptor: `fd`, `rfdno`, `wfdno`, …
fn means_descriptor(name: &[u8]) -> bool {
    name.windows(2).any(|two| two == b"fd")
}

/// Takes each connection that stands in a file system's options, `name=value,name=value,…`.
fn take_named(options: &[u8]) {
    for option in options.split(|byte| *byte == b',') {
        let Some(at) = option.iter().position(|byte| *byte == b'=') else {
            continue;
        };
        let (name, value) = option.split_at(at);
        if means_descriptor(name)
            && let Some(fd) = number(value.get(1..).unwrap_or_default())
        {
            take_for_kernel(fd);
        }
    }
}

/// # Safety
/// As `mount(2)`.
pub unsafe fn mount(
    source: *const c_char,
    target: *const c_char,
    kind: *const c_char,
    flags: c_ulong,
    options: *const c_void,
) -> c_int {
    // SAFETY: arguments pass through; the options of this file system are a text, as the caller says.
    unsafe {
        if !sys::is_bad_pointer(kind.cast())
            && CStr::from_ptr(kind).to_bytes() == b"9p"
            && !sys::is_bad_pointer(options)
        {
            take_named(CStr::from_ptr(options.cast()).to_bytes());
        }
        real::mount(source, target, kind, flags, options)
    }
}

/// Before an option of a file system is set.
///
/// # Safety
/// As `fsconfig(2)`.
pub unsafe fn configuring(
    command: c_uint,
    key: *const c_char,
    value: *const c_char,
    descriptor: c_int,
) {
    if command == FSCONFIG_SET_FD {
        take_for_kernel(descriptor);
    }
    if command == FSCONFIG_SET_STRING
        && !sys::is_bad_pointer(key.cast())
        && !sys::is_bad_pointer(value.cast())
    {
        // SAFETY: both are texts, as the caller says.
        let (key, value) = unsafe { (CStr::from_ptr(key), CStr::from_ptr(value)) };
        if means_descriptor(key.to_bytes())
            && let Some(fd) = number(value.to_bytes())
        {
            take_for_kernel(fd);
        }
    }
}

/// # Safety
/// As `fsconfig(2)`.
pub unsafe fn fsconfig(
    fd: c_int,
    command: c_uint,
    key: *const c_char,
    value: *const c_void,
    descriptor: c_int,
) -> c_int {
    // SAFETY: arguments pass through.
    unsafe {
        configuring(command, key, value.cast(), descriptor);
        real::fsconfig(fd, command, key, value, descriptor)
    }
}

/// Before an element is put into a map of `bpf(2)`, which may be one of sockets. What looks like a connection's number is
/// taken for one: the program loses speed at most.
///
/// # Safety
/// `attributes` is null or points to `size` bytes.
pub unsafe fn put_into_map(attributes: *const u64, size: c_ulong) {
    /// Where the address of the value stands.
    const VALUE_AT: usize = 2;
    if size < 24 || sys::is_bad_pointer(attributes.cast()) {
        return;
    }
    // SAFETY: as the caller says.
    let value = unsafe { attributes.add(VALUE_AT).read_unaligned() } as *const c_int;
    if !sys::is_bad_pointer(value.cast()) {
        // SAFETY: a value of a map of sockets is at least an int.
        take_for_kernel(unsafe { value.read_unaligned() });
    }
}

/// Protocols of netlink whose messages can name a socket: iSCSI, and the generic one, which NBD uses.
const NAMING: [c_int; 2] = [8, 16];

/// The sockets of those protocols.
#[derive(Debug)]
pub struct Netlink {
    /// One more than the highest number; 0 where there was none, which is nearly everywhere.
    high: AtomicI32,
}

impl Netlink {
    /// None yet.
    pub const fn new() -> Self {
        Netlink {
            high: AtomicI32::new(0),
        }
    }

    fn note(&self, fd: c_int, domain: c_int, protocol: c_int) {
        if fd >= 0 && domain == libc::AF_NETLINK && NAMING.contains(&protocol) {
            self.high.fetch_max(fd + 1, Relaxed);
        }
    }

    /// True for a number that one of them may have.
    #[inline]
    fn may_be(&self, fd: c_int) -> bool {
        fd < self.high.load(Relaxed)
    }
}

/// The program has made a socket.
pub fn made_socket(fd: c_int, domain: c_int, protocol: c_int) {
    PROGRAM.netlink.note(fd, domain, protocol);
}

/// Before something is sent on another descriptor than a connection's: to netlink it may name connections. What looks
/// like a connection's number in a message is taken for one.
///
/// # Safety
/// `parts` is null or points to `count` entries that describe the program's buffers.
#[inline]
pub unsafe fn telling(fd: c_int, parts: *const iovec, count: usize) {
    if PROGRAM.netlink.may_be(fd) {
        // SAFETY: as the caller says.
        unsafe { look_for_names(fd, parts, count) };
    }
}

/// # Safety
/// As [`telling`].
#[cold]
unsafe fn look_for_names(fd: c_int, parts: *const iovec, count: usize) {
    let domain = sys::getsockopt::<c_int>(fd, libc::SOL_SOCKET, libc::SO_DOMAIN);
    if domain != Some(libc::AF_NETLINK) || sys::is_bad_pointer(parts.cast()) {
        return;
    }
    for i in 0..count.min(64) {
        // SAFETY: the caller vouches for the entries, and for what they describe.
        unsafe {
            let part = &*parts.add(i);
            let words = part.iov_base.cast::<c_int>();
            if !sys::is_bad_pointer(words.cast()) {
                for word in 0..part.iov_len / size_of::<c_int>() {
                    take_for_kernel(words.add(word).read_unaligned());
                }
            }
        }
    }
}

/// Parts of the names of files that take a socket by its number, in decimal digits.
const TAKERS: [&[u8]; 3] = [b"/usbip_sockfd", b"/vhci_hcd", b"/fs/nfsd/portlist"];

/// A file was opened. One that takes sockets may be told of any, by calls that are not followed: then all connections
/// are the kernel's.
///
/// # Safety
/// The kernel has just read `path`.
#[inline]
unsafe fn opened(fd: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: as the caller says.
    if fd >= 0 && flags & libc::O_ACCMODE != libc::O_RDONLY && unsafe { *path } != 0 {
        // SAFETY: likewise.
        let path = unsafe { CStr::from_ptr(path) }.to_bytes();
        if TAKERS.iter().any(|name| contains(path, name)) && is_ready() && !is_foreign() {
            demote::abandon_all(Reason::HandedOver);
            tenant::disable(Reason::HandedOver);
        }
    }
    fd
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// What the function of a 64-bit name gave; in a libc that has no such names, what the plain one gives.
fn or_plain(result: c_int, plain: impl FnOnce() -> c_int) -> c_int {
    if result < 0 && real::errno() == libc::ENOSYS {
        return plain();
    }
    result
}

macro_rules! opens {
    ($($name:ident by $real:ident;)*) => {
        $(
            /// # Safety
            /// As `open(2)`; its third argument comes in one register.
            pub unsafe fn $name(
                path: *const c_char,
                flags: c_int,
                mode: mode_t,
            ) -> c_int {
                // SAFETY: arguments pass through.
                unsafe {
                    let fd = real::$real(path, flags, mode);
                    let fd = or_plain(fd, || real::open(path, flags, mode));
                    opened(fd, path, flags)
                }
            }
        )*
    };
}

macro_rules! opens_at {
    ($($name:ident by $real:ident;)*) => {
        $(
            /// # Safety
            /// As `openat(2)`; its fourth argument comes in one register.
            pub unsafe fn $name(
                folder: c_int,
                path: *const c_char,
                flags: c_int,
                mode: mode_t,
            ) -> c_int {
                // SAFETY: arguments pass through.
                unsafe {
                    let fd = real::$real(folder, path, flags, mode);
                    let fd = or_plain(fd, || real::openat(folder, path, flags, mode));
                    opened(fd, path, flags)
                }
            }
        )*
    };
}

opens! {
    open by open;
    open64 by open64;
    // Those of programs that are built with checks, of the flags alone.
    __open_2 by open;
    __open64_2 by open64;
}
opens_at! {
    openat by openat;
    openat64 by openat64;
    __openat_2 by openat;
    __openat64_2 by openat64;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_with_descriptors() {
        assert!(means_descriptor(b"rfdno") && !means_descriptor(b"trans"));
        assert_eq!(number(b"12"), Some(12));
        assert_eq!(number(b"12x"), None);
    }

    #[test]
    fn only_sockets_that_can_name_others_are_noted() {
        let netlink = Netlink::new();
        let [generic, route] = [16, 0];
        netlink.note(5, libc::AF_NETLINK, route);
        netlink.note(6, libc::AF_INET, generic);
        netlink.note(-1, libc::AF_NETLINK, generic);
        assert!(!netlink.may_be(0));
        netlink.note(7, libc::AF_NETLINK, generic);
        netlink.note(4, libc::AF_NETLINK, generic);
        assert!(netlink.may_be(7) && !netlink.may_be(8));
    }
}
