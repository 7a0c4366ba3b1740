//! The tenant's lock: over its queue of requests, its control connection and the offers that wait.
//! The first in the order of locks (see `epoll.rs`), but for those who give up soon. Never held while
//! its holder waits for the daemon.

use crate::state::PROCESS;
use crate::{identity, stream, sys};
use rdsock_shm::lock::{self, Owner, Taken};
use std::cell::UnsafeCell;

/// The tenant's lock. `None` when this thread holds it already, further up its stack, and in a process
/// that is not the tenant (a `vfork` child, or one made by a raw `clone`), which must say nothing in its
/// parent's name and take none of its messages: the caller gives up, which is always possible.
pub(super) struct Guard;

impl Guard {
    pub(super) fn take() -> Option<Guard> {
        Self::take_within(u32::MAX)
    }

    /// For one who may hold the lock of an epoll instance or of a half, for which the holder of
    /// this one may wait: gives up after a while.
    pub(super) fn take_soon() -> Option<Guard> {
        Self::take_within(1 << 17)
    }

    /// Also for a `vfork` child, which notes in its parent's memory what it does to a connection. It
    /// must not use the queue or the control connection: see [`identity::is_foreign`].
    pub(super) fn take_as_child() -> Option<Guard> {
        Self::take_for(u32::MAX)
    }

    fn take_within(most: u32) -> Option<Guard> {
        if identity::is_foreign() {
            return None;
        }
        Self::take_for(most)
    }

    fn take_for(most: u32) -> Option<Guard> {
        let me = Owner::new(stream::pid(), sys::thread_pointer());
        let mut turns = 0_u32;
        loop {
            match lock::try_take(&PROCESS.tenant.lock, me) {
                Ok(Taken::Outer) => return Some(Guard),
                Ok(Taken::Nested) => return None,
                Err(_) => {
                    turns = turns.wrapping_add(1);
                    if turns == most && most != u32::MAX {
                        return None;
                    }
                    if turns.is_multiple_of(64) {
                        sys::sched_yield();
                    }
                    std::hint::spin_loop();
                }
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        lock::release(&PROCESS.tenant.lock, Taken::Outer);
    }
}

/// What is changed under the lock only (the path: by the constructor only).
#[derive(Debug)]
pub(super) struct Shared<T>(pub(super) UnsafeCell<T>);
// SAFETY: used under the lock only (the path: written by the constructor only).
unsafe impl<T> Sync for Shared<T> {}
