//! Which addresses belong to other nodes, as the daemon has written it into this tenant's memory.

use super::link::link;
use super::memory::memory;
use super::messages::{await_message, look};
use crate::{clock, identity};
use std::sync::atomic::Ordering::*;

/// Nanoseconds that the first `connect` of a process waits, at most, for a daemon that is there.
const GREETING: u64 = 500_000_000;

/// True when an address could belong to another node. Two loads where none does.
#[inline]
pub fn may_lead_away() -> bool {
    // In this order: the greeting brings the memory with the routes.
    is_awaited() || memory().is_some_and(|memory| !memory.routes.is_empty())
}

/// True unless a daemon has said that there are no other nodes, from which connections may come.
pub fn may_be_reached() -> bool {
    may_lead_away() || link().control.load(Relaxed) < 0
}

/// True while the daemon has not greeted this process, whose routes are written by then.
#[inline]
fn is_awaited() -> bool {
    link().awaited.load(Relaxed) != 0 && {
        look();
        link().awaited.load(Relaxed) != 0
    }
}

/// True when an address belongs to another node. Waits for the greeting of a daemon that this process
/// has just attached to.
pub fn lead_to(ip: &[u8; 16]) -> bool {
    if is_awaited() && !identity::is_foreign() {
        await_message(clock::nanoseconds() + GREETING, |_| {
            (link().awaited.load(Relaxed) == 0).then_some(())
        });
        // A daemon that is late is not waited for again.
        link().awaited.store(0, Relaxed);
    }
    memory().is_some_and(|memory| memory.routes.lead_to(ip))
}
