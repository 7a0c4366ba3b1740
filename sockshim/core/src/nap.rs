//! Naps of a blocking receive (`rdsock_shm::end::Nap`): it sleeps on the request itself, for a short time, and then on the anchor. The
//! other end ends a nap by one call that costs half of what a byte on the anchor does.
//!
//! What the anchor alone tells is heard of late by the rest of a nap. So only a stream naps whose last sleep was over within such a time.
//! An other end that does not end a nap when it should is not believed for many sleeps.

use crate::conn::{self, Conn, Use};
use crate::end::End;
use crate::state::PROCESS;
use crate::{clock, limits, sys, tenant, wait};
use libc::c_int;
use rdsock_shm::end::{Anchor, Nap};
use rdsock_shm::layout::Counter;
use std::sync::atomic::{AtomicU32, Ordering::*};

/// Short sleeps on the anchor before a stream naps again, where its other end did not end a nap when it should have.
const DISTRUST: u32 = 1000;

/// Whether this process may nap.
#[derive(Debug)]
pub struct Naps(AtomicU32);

const UNKNOWN: u32 = 0;
const ALLOWED: u32 = 1;
const FORBIDDEN: u32 = 2;

impl Naps {
    /// Not known yet.
    pub const fn new() -> Self {
        Naps(AtomicU32::new(UNKNOWN))
    }

    /// False under a filter of system calls, which may end a process for one that it does not know. (Where the program makes one itself,
    /// it leaves the rings.)
    fn may(&self) -> bool {
        match self.0.load(Relaxed) {
            UNKNOWN => {
                let state = if sys::is_unfiltered() {
                    ALLOWED
                } else {
                    FORBIDDEN
                };
                self.0.store(state, Relaxed);
                state == ALLOWED
            }
            state => state == ALLOWED,
        }
    }
}

/// Naps until there may be bytes. A result as the kernel's receive has it, or `None`: to be slept for on the anchor. `began`: when the
/// call began to sleep.
pub fn until(end: &End<'_>, held: &Use, began: u64, is_ready: impl Fn() -> bool) -> Option<isize> {
    let (conn, fd) = (held.conn, end.socket.wait_fd());
    if conn.until_nap.load(Relaxed) != 0 || !may(conn, fd) {
        return None;
    }
    if !conn::is_single_threaded() {
        // Every sleep of a receive is a cancellation point.
        (sys::host().test_cancel)();
    }
    let nap = Nap::enter(end)?;
    if is_ready() {
        return Some(1);
    }
    tenant::count(Counter::Naps);
    let (word, value) = nap.place();
    let result = sys::futex_wait(word, value, began + limits::NAP_US.get() * 1000);
    drop(nap);
    if !wait::is_still(held, fd) {
        return Some(-(libc::EBADF as isize));
    }
    let is_in_time = result != -(libc::ETIMEDOUT as isize);
    if is_ready() {
        if !is_in_time {
            conn.until_nap.store(DISTRUST, Relaxed);
        }
        return Some(1);
    }
    let error = -result as c_int;
    if error == libc::EINTR {
        // A thread that is cancelled may have been told so by this signal.
        (sys::host().test_cancel)();
        return Some(result);
    }
    if sys::is_missing(error) {
        PROCESS.naps.0.store(FORBIDDEN, Relaxed);
    }
    // Nothing has come, or somebody else has taken it, or the other end has woken it for nothing.
    conn.until_nap.store(1, Relaxed);
    None
}

/// Of a sleep on the anchor that began then, and has ended.
pub fn learn(conn: &Conn, began: u64) {
    let was_short = clock::nanoseconds() - began < limits::NAP_US.get() * 1000;
    let until = conn.until_nap.load(Relaxed);
    conn.until_nap.store(
        if was_short {
            until.saturating_sub(1)
        } else {
            until.max(1)
        },
        Relaxed,
    );
}

/// Poll cores answer bells and bytes alone, and with a time limit of the program's any handler ends the call.
fn may(conn: &Conn, fd: c_int) -> bool {
    PROCESS.naps.may() && !conn.names.are_told() && !has_limit(conn, fd)
}

/// Values of the lowest bits of [`Conn::limited`], of which the others count how often it was forgotten.
const LIMITED: u32 = 1;
const UNLIMITED: u32 = 2;
const KNOWN: u32 = LIMITED | UNLIMITED;

/// Whether the program has set a time limit for receives.
fn has_limit(conn: &Conn, fd: c_int) -> bool {
    let known = conn.limited.load(Acquire);
    // Another process may set one.
    if known & KNOWN != 0 && conn.shared.load(Relaxed) == 0 {
        return known & LIMITED != 0;
    }
    let has = wait::limit_of(fd, libc::SO_RCVTIMEO).is_some();
    let now = known & !KNOWN | if has { LIMITED } else { UNLIMITED };
    let _ = conn.limited.compare_exchange(known, now, Release, Relaxed);
    has
}

/// The program has set one, or none.
pub fn forget_limit(conn: &Conn) {
    let forget = |known: u32| Some((known & !KNOWN).wrapping_add(KNOWN + 1));
    let _ = conn.limited.fetch_update(AcqRel, Relaxed, forget);
}
