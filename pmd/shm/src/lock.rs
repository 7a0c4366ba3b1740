//! The lock of one half of an end: threads of a process, and processes after `fork`, that use the
//! same socket take turns. The other end of the stream never takes it, so a dead or stopped
//! process can hold up only those who share its own descriptor, and a dead one not even them.
//!
//! The owner is the process and the thread pointer, so it needs no thread-local storage; a signal
//! handler that interrupts the owner finds that the lock is its own, and goes ahead
//! ([`Taken::Nested`]): every critical section is written so that a nested one may run at any of
//! its instructions (see [`crate::ring`]).

use crate::ring::swap_if;
use crate::sync::{AtomicU64, Ordering};

/// Who may own a lock: a thread of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner(u64);

impl Owner {
    /// `pid` must fit 22 bits (Linux's largest pid does); `thread` is the thread pointer, of
    /// which the lowest four bits are dropped.
    pub const fn new(pid: u32, thread: u64) -> Self {
        Owner(((pid as u64) << 42) | ((thread >> 4) & ((1 << 42) - 1)))
    }

    /// As it stands in a lock that it holds.
    pub const fn word(self) -> u64 {
        self.0
    }

    /// The process of an owner word.
    pub const fn pid_of(word: u64) -> u32 {
        (word >> 42) as u32
    }
}

/// How the lock was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It was free: release it.
    Outer,
    /// This thread holds it already, further up the stack: leave it to that holder.
    Nested,
}

/// Tries to take the lock; the word of the present owner when somebody else has it.
#[inline]
pub fn try_take(lock: &AtomicU64, me: Owner) -> Result<Taken, u64> {
    match lock.compare_exchange(0, me.0, Ordering::Acquire, Ordering::Relaxed) {
        Ok(_) => Ok(Taken::Outer),
        Err(owner) if owner == me.0 => Ok(Taken::Nested),
        Err(owner) => Err(owner),
    }
}

/// As [`try_take`], for a caller whose process has one thread and alone holds the end: only a signal
/// handler can come between. A locked instruction would wait until all earlier stores have reached
/// the cache, which those to the ring take long to do.
#[inline]
pub fn try_take_alone(lock: &AtomicU64, me: Owner) -> Result<Taken, u64> {
    if swap_if(lock, 0, me.0) {
        return Ok(Taken::Outer);
    }
    try_take(lock, me)
}

/// Takes the lock for `me` from `dead`, a process that has ended. True when it worked.
/// A process that died in a critical section has published nothing of it.
pub fn take_from_dead(lock: &AtomicU64, dead: u64, me: Owner) -> bool {
    lock.compare_exchange(dead, me.0, Ordering::Acquire, Ordering::Relaxed)
        .is_ok()
}

/// Releases what [`try_take`] took.
#[inline]
pub fn release(lock: &AtomicU64, taken: Taken) {
    if taken == Taken::Outer {
        lock.store(0, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn nested_and_foreign_owners_are_told_apart() {
        let lock = AtomicU64::new(0);
        let me = Owner::new(4_194_303, 0x7fff_1234_5670);
        let other = Owner::new(4_194_302, 0x7fff_1234_5670);
        assert_eq!(try_take(&lock, me), Ok(Taken::Outer));
        assert_eq!(try_take(&lock, me), Ok(Taken::Nested));
        release(&lock, Taken::Nested);
        let held = try_take(&lock, other).unwrap_err();
        assert_eq!(Owner::pid_of(held), 4_194_303);
        assert!(take_from_dead(&lock, held, other));
        release(&lock, Taken::Outer);
        assert_eq!(try_take(&lock, me), Ok(Taken::Outer));
    }
}
