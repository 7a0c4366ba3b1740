//! What the kernel says of a registration.

use crate::sys;
use libc::{EPOLLERR, EPOLLHUP, c_int};

/// True when the kernel has disabled a registration with EPOLLONESHOT: only its private bits are
/// left of what it was asked for.
pub(super) fn has_fired(epfd: c_int, fd: c_int) -> bool {
    let mut path = [0_u8; 48];
    let mut digits = [0; 10];
    let parts = [
        "/proc/self/fdinfo/",
        sys::decimal(epfd.max(0) as u32, &mut digits),
    ];
    let bytes = parts.iter().flat_map(|part| part.bytes());
    for (to, from) in path.iter_mut().take(47).zip(bytes) {
        *to = from;
    }
    let file = sys::open_read(path.as_ptr().cast()) as c_int;
    if file < 0 {
        return false;
    }
    let mut fired = false;
    let mut line = [0_u8; 64];
    let mut len = 0;
    let mut part = [0_u8; 2048];
    'file: loop {
        // SAFETY: the buffer is valid for its length.
        let got = unsafe { sys::pread(file, part.as_mut_ptr(), part.len(), None) };
        if got <= 0 {
            break;
        }
        for byte in part.iter().take(got as usize) {
            if *byte == b'\n' {
                if let Some(events) = line.get(..len).and_then(|line| events_of(line, fd)) {
                    // An armed one always has these.
                    fired = events & (EPOLLERR | EPOLLHUP) as u32 == 0;
                    break 'file;
                }
                len = 0;
            } else if let Some(place) = line.get_mut(len) {
                *place = *byte;
                len += 1;
            }
        }
    }
    sys::close(file);
    fired
}

/// The events of a line `tfd: N events: X data: …`, if it is that of `fd`.
fn events_of(line: &[u8], fd: c_int) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    if words.next()? != "tfd:" || words.next()?.parse() != Ok(fd) {
        return None;
    }
    words.next()?;
    u32::from_str_radix(words.next()?, 16).ok()
}
