//! Connections that a program gives to the kernel, for it to use them itself: to a file system by `mount` (9p), to a map
//! of sockets by `bpf`. Each is demoted before. `ioctl` is in `options.rs`.

use crate::options::take_for_kernel;
use crate::{real, sys};
use libc::{c_char, c_int, c_uint, c_ulong, c_void};
use std::ffi::CStr;

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
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mount(
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
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fsconfig(
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_with_descriptors() {
        assert!(means_descriptor(b"rfdno") && !means_descriptor(b"trans"));
        assert_eq!(number(b"12"), Some(12));
        assert_eq!(number(b"12x"), None);
    }
}
