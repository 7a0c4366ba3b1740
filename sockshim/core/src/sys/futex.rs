//! Sleeping on a word that other processes have mapped as well.

use super::{call, close, open_read, pread};
use std::sync::atomic::AtomicU32;

/// As the kernel takes it: from linux/futex.h.
#[repr(C)]
struct Waiter {
    value: u64,
    address: u64,
    flags: u32,
    reserved: u32,
}

/// Four bytes, shared between processes.
const SIZE_U32: u32 = 2;

/// Sleeps as long as the word has this value, until somebody wakes it or the monotonic clock says so many nanoseconds. 0, or a negated
/// error: handlers without `SA_RESTART` end it alone. Not a cancellation point.
pub fn futex_wait(word: &AtomicU32, value: u32, until: u64) -> isize {
    let waiter = Waiter {
        value: u64::from(value),
        address: word.as_ptr() as u64,
        flags: SIZE_U32,
        reserved: 0,
    };
    let limit = libc::timespec {
        tv_sec: (until / 1_000_000_000) as i64,
        tv_nsec: (until % 1_000_000_000) as i64,
    };
    syscall!(
        SYS_futex_waitv,
        &raw const waiter,
        1,
        0,
        &raw const limit,
        libc::CLOCK_MONOTONIC
    )
}

/// Wakes one who sleeps on the word.
pub fn futex_wake(word: &AtomicU32) {
    syscall!(SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1, 0, 0, 0);
}

/// True when no filter decides which system calls this thread may make. In doubt one does.
pub fn is_unfiltered() -> bool {
    let fd = open_read(c"/proc/thread-self/status".as_ptr()) as libc::c_int;
    if fd < 0 {
        return false;
    }
    let mut text = [0_u8; 4096];
    // SAFETY: the buffer is valid for its length.
    let got = unsafe { pread(fd, text.as_mut_ptr(), text.len(), None) };
    close(fd);
    let text = text.get(..got.max(0) as usize).unwrap_or_default();
    let mut lines = text.split(|byte| *byte == b'\n');
    lines.any(|line| line == b"Seccomp:\t0")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use std::sync::Arc;
    use std::sync::atomic::Ordering::*;

    #[test]
    fn a_word_that_has_changed_is_not_slept_on() {
        let word = AtomicU32::new(1);
        let forever = u64::MAX >> 8;
        assert_eq!(
            futex_wait(&word, 0, forever),
            -(libc::EAGAIN as isize),
            "a value that it does not have"
        );
        assert_eq!(
            futex_wait(&word, 1, clock::nanoseconds() + 1_000_000),
            -(libc::ETIMEDOUT as isize)
        );
    }

    #[test]
    fn a_sleeper_is_woken() {
        let word = Arc::new(AtomicU32::new(1));
        let sleeper = {
            let word = word.clone();
            std::thread::spawn(move || {
                while word.load(Acquire) == 1 {
                    futex_wait(&word, 1, clock::nanoseconds() + 60_000_000_000);
                }
            })
        };
        word.store(2, Release);
        futex_wake(&word);
        sleeper.join().unwrap();
    }
}
