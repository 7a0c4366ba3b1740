//! Programs that lock their memory. What they map later is in `sys::map`; here is `mlockall` of what is mapped already:
//! rings would be filled to their size, and locked, though most of each is never used. So the rest is locked piece by
//! piece, as the kernel would, and streams are left out.

use crate::{identity, process, real, sys};
use libc::c_int;

/// What stands in the name of a mapping of the shim's own, in `/proc/self/maps`.
const OWN: &[u8] = b"memfd:rdsock-";

/// # Safety
/// As `mlockall(2)`.
pub unsafe fn mlockall(flags: c_int) -> c_int {
    let known = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    if flags & libc::MCL_CURRENT == 0
        || flags & !known != 0
        || !identity::is_ready()
        || identity::is_foreign()
        || !process::has_streams()
    {
        // SAFETY: arguments pass through.
        return unsafe { real::mlockall(flags) };
    }
    let later = flags & !libc::MCL_CURRENT;
    // Asks, too, whether the program may lock anything.
    // SAFETY: arguments pass through.
    if later & libc::MCL_FUTURE != 0 && unsafe { real::mlockall(later) } != 0 {
        return -1;
    }
    match lock_all_others(flags & libc::MCL_ONFAULT != 0) {
        Ok(()) => 0,
        Err(error) => {
            real::set_errno(error);
            -1
        }
    }
}

/// Locks every mapping but the shim's. A mapping that can't be filled is no failure, one too many is.
fn lock_all_others(on_fault: bool) -> Result<(), c_int> {
    let maps = sys::open_read(c"/proc/self/maps".as_ptr()) as c_int;
    if maps < 0 {
        return Err(libc::ENOMEM);
    }
    let mut lines = Lines::new(maps);
    let mut result = Ok(());
    while let Some(line) = lines.next_line() {
        let is_own = line.windows(OWN.len()).any(|part| part == OWN);
        if is_own || line.windows(2).any(|part| part == b"[v") {
            continue;
        }
        if let Some((start, end)) = range_of(line)
            && sys::lock(start, end - start, on_fault) == -(libc::EAGAIN as isize)
        {
            result = Err(libc::ENOMEM);
        }
    }
    sys::close(maps);
    result
}

/// The addresses that a line of `/proc/self/maps` begins with.
fn range_of(line: &[u8]) -> Option<(usize, usize)> {
    let hex = |text: &[u8]| {
        let text = std::str::from_utf8(text).ok()?;
        usize::from_str_radix(text, 16).ok()
    };
    let addresses = line.split(|byte| *byte == b' ').next()?;
    let mut ends = addresses.split(|byte| *byte == b'-');
    let (start, end) = (hex(ends.next()?)?, hex(ends.next()?)?);
    (start < end).then_some((start, end))
}

/// The lines of a file, a part of which is read at a time.
struct Lines {
    file: c_int,
    part: [u8; 1024],
    read: usize,
    at: usize,
    line: [u8; 512],
}

impl Lines {
    fn new(file: c_int) -> Self {
        Lines {
            file,
            part: [0; 1024],
            read: 0,
            at: 0,
            line: [0; 512],
        }
    }

    /// The next line, as much of it as there is room for.
    fn next_line(&mut self) -> Option<&[u8]> {
        let mut len = 0;
        loop {
            if self.at == self.read {
                // SAFETY: the buffer is valid for its length.
                let got = unsafe { sys::pread(self.file, self.part.as_mut_ptr(), 1024, None) };
                (self.read, self.at) = (got.max(0) as usize, 0);
                if got <= 0 {
                    return None;
                }
            }
            let byte = *self.part.get(self.at)?;
            self.at += 1;
            if byte == b'\n' {
                return self.line.get(..len);
            }
            if let Some(place) = self.line.get_mut(len) {
                *place = byte;
                len += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps() {
        let line = b"7f00-7f10 rw-s 00000000 00:01 7 /memfd:rdsock-stream (deleted)";
        assert_eq!(range_of(line), Some((0x7f00, 0x7f10)));
        assert_eq!(range_of(b"nothing"), None);
    }
}
