//! Limits of the process, and what they leave of its address space.

use super::{call, close, open_read, pread};
use libc::c_int;
use std::ffi::CStr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The soft limit of a resource.
pub fn limit_of(resource: libc::__rlimit_resource_t) -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 1024,
        rlim_max: 1024,
    };
    syscall!(SYS_prlimit64, 0, resource, 0, &raw mut limit);
    limit.rlim_cur
}

/// Address space that this process has, in bytes: the 23rd field of `proc_pid_stat(5)`.
fn address_space() -> Option<u64> {
    let fd = open_read(c"/proc/self/stat".as_ptr()) as c_int;
    if fd < 0 {
        return None;
    }
    let mut text = [0_u8; 1024];
    // SAFETY: the buffer is valid for its length.
    let read = unsafe { pread(fd, text.as_mut_ptr(), text.len(), None) };
    close(fd);
    address_space_in(text.get(..read.max(0) as usize)?)
}

/// Behind the name of the program, which may have anything in it, the third field comes first.
fn address_space_in(stat: &[u8]) -> Option<u64> {
    let name = stat.iter().rposition(|byte| *byte == b')')?;
    let fields = stat.get(name + 2..)?;
    let field = fields.split(|byte| *byte == b' ').nth(23 - 3)?;
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// Whether so much more address space takes at most a quarter of what the program's limit leaves: the rest is its own.
pub fn leaves_room(len: usize) -> bool {
    let limit = limit_of(libc::RLIMIT_AS);
    if limit == libc::RLIM_INFINITY {
        return true;
    }
    let Some(used) = address_space() else {
        return false;
    };
    len as u64 <= limit.saturating_sub(used) / 4
}

/// Mappings that a process may have, where the system does not say.
const USUAL_MAPPINGS: u64 = 65_530;

/// Mappings that a process may have (`vm.max_map_count`), as it was when first asked for.
pub fn most_mappings() -> u64 {
    static MOST: AtomicU64 = AtomicU64::new(0);
    let known = MOST.load(Relaxed);
    if known != 0 {
        return known;
    }
    let most = number_in(c"/proc/sys/vm/max_map_count").unwrap_or(USUAL_MAPPINGS);
    MOST.store(most, Relaxed);
    most
}

/// The number that a file of one line holds.
fn number_in(path: &CStr) -> Option<u64> {
    let fd = open_read(path.as_ptr()) as c_int;
    if fd < 0 {
        return None;
    }
    let mut text = [0_u8; 32];
    // SAFETY: the buffer is valid for its length.
    let read = unsafe { pread(fd, text.as_mut_ptr(), text.len(), None) };
    close(fd);
    let text = std::str::from_utf8(text.get(..read.max(0) as usize)?).ok()?;
    text.trim().parse().ok().filter(|number| *number != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_may_have_some_mappings() {
        assert!(most_mappings() >= 1024);
        assert_eq!(number_in(c"/proc/self/no-such-file"), None);
        assert_eq!(number_in(c"/proc/self/comm"), None);
    }

    #[test]
    fn the_address_space_stands_behind_any_name() {
        let stat = b"7 (a) b) c) S 1 7 7 0 -1 4194560 90 0 0 0 0 0 0 0 20 0 1 0 5100 3072000 230";
        assert_eq!(address_space_in(stat), Some(3_072_000));
        for stat in [
            &b""[..],
            b"7",
            b"7 (a)",
            b"7 (a) S 1",
            b"7 (a) S x x x x x x x x x x x x x x x x x x x x x",
        ] {
            assert_eq!(address_space_in(stat), None);
        }
        assert!(address_space().is_some_and(|bytes| bytes > 1 << 20 && bytes % 4096 == 0));
    }
}
