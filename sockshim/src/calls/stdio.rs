//! What stands between stdio and a connection: `fdopen`, and what the C part (`csrc/variadic.c`)
//! needs for `dprintf`. stdio reads and writes behind the shim's back.

use super::read_write::write;
use super::transfer::one;
use crate::conn::{self, Kind, Use};
use crate::io::{self, Outcome};
use crate::stream::Stream;
use crate::{demote, real, sys};
use libc::{c_int, size_t};
use rdsock_shm::reason::Reason;

/// # Safety
/// As `fdopen(3)`.
pub unsafe fn fdopen(fd: c_int, mode: *const libc::c_char) -> *mut libc::FILE {
    // SAFETY: arguments pass through; the mode is a C string.
    unsafe {
        let file = real::fdopen(fd, mode);
        let Some(held) = conn::of(fd) else {
            return file;
        };
        if file.is_null() {
            return file;
        }
        // stdio reads and writes behind the shim's back: the connection becomes the kernel's, and
        // what was received already goes into the stream's own buffer.
        let reads = std::ffi::CStr::from_ptr(mode)
            .to_bytes()
            .iter()
            .any(|byte| matches!(byte, b'r' | b'+'));
        if reads && let Some(stream) = held.conn.stream() {
            stdio_takes(&held, stream, fd, file);
        }
        demote::abandon(&held, fd, Reason::Stdio);
        file
    }
}

unsafe extern "C" {
    fn rdsock_stdio_take(file: *mut libc::FILE, bytes: *const libc::c_char, len: size_t) -> c_int;
}

/// Puts what is in the ring into a stdio stream's buffer.
fn stdio_takes(held: &Use, stream: &Stream, fd: c_int, file: *mut libc::FILE) {
    let Some(unread) = io::unread(&stream.at(held, fd)).filter(|unread| *unread > 0) else {
        return;
    };
    let Some(bytes) = sys::map(-1, unread as usize) else {
        return;
    };
    let part = one(bytes.cast(), unread as usize);
    // SAFETY: the mapping has room for what is asked; it is unmapped when nobody uses it.
    unsafe {
        if let Ok(buffers) = io::buffers(&part, 1, 0)
            && let Outcome::Done(got) = io::recv(held, stream, fd, &buffers, libc::MSG_DONTWAIT)
            && got > 0
        {
            rdsock_stdio_take(file, bytes.cast(), got.max(0) as usize);
        }
        sys::unmap(bytes, unread as usize);
    }
}

/// A file in memory, for what a stdio stream takes over.
#[unsafe(no_mangle)]
pub extern "C" fn rdsock_memory_file() -> c_int {
    sys::memfd(c"rdsock-stdio", libc::MFD_CLOEXEC) as c_int
}

/// `write` of a whole text, for `dprintf`.
///
/// # Safety
/// `text` is valid for reads of `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdsock_write_all(
    fd: c_int,
    text: *const libc::c_char,
    len: size_t,
) -> c_int {
    let mut done = 0;
    while done < len {
        // SAFETY: the rest of the text.
        let sent = unsafe { write(fd, text.add(done).cast(), len - done) };
        if sent < 0 {
            return -1;
        }
        done += sent as usize;
    }
    len as c_int
}

/// Whether stdio must not write to this fd by itself.
#[unsafe(no_mangle)]
pub extern "C" fn rdsock_is_ours(fd: c_int) -> c_int {
    c_int::from(matches!(conn::kind(fd), Kind::Conn(_)))
}
