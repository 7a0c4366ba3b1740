//! How long a call may wait.

use crate::clock;
use libc::{c_int, timespec};

/// Time left until a deadline.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Option<u64>);

impl Deadline {
    /// From now; `None` waits for ever.
    pub fn after(nanoseconds: Option<u64>) -> Self {
        Deadline(nanoseconds.map(|ns| {
            if ns == 0 {
                0
            } else {
                clock::nanoseconds().saturating_add(ns)
            }
        }))
    }

    /// True when there was nothing to wait for to begin with.
    pub fn is_now(self) -> bool {
        self.0 == Some(0)
    }

    /// Nanoseconds left; `None` is for ever.
    pub fn left(self) -> Option<u64> {
        self.0.map(|at| {
            if at == 0 {
                0
            } else {
                at.saturating_sub(clock::nanoseconds())
            }
        })
    }

    /// As a `timespec`.
    pub fn left_timespec(self) -> Option<timespec> {
        self.left().map(|ns| timespec {
            tv_sec: (ns / 1_000_000_000) as i64,
            tv_nsec: (ns % 1_000_000_000) as i64,
        })
    }
}

/// Nanoseconds of a `timespec`; `None` for ever. A negated error number for one that the kernel refuses.
///
/// # Safety
/// `limit` is null or valid.
pub unsafe fn nanoseconds_of(limit: *const timespec) -> Result<Option<u64>, c_int> {
    if limit.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller vouches for it.
    let limit = unsafe { &*limit };
    if limit.tv_sec < 0 || !(0..1_000_000_000).contains(&limit.tv_nsec) {
        return Err(-libc::EINVAL);
    }
    Ok(Some(
        (limit.tv_sec as u64)
            .saturating_mul(1_000_000_000)
            .saturating_add(limit.tv_nsec as u64),
    ))
}
