//! A receiver of small messages in one direction looks away for a moment, so that several come together.

use crate::conn::Conn;
use crate::limits;
use std::sync::atomic::Ordering::Relaxed;

/// Pauses of each step of looking away: some hundred nanoseconds.
const GATHER_PAUSES: u32 = 6;

/// On a stream of messages in one direction, a receiver that looks all the time takes the
/// producer's cache lines away for each single message. So it looks away for a moment when it has
/// found few bytes, as long as more come meanwhile: for a microsecond at most, and never where a
/// request waits for its reply. `found` bytes are there; `look` says how many are there now.
#[inline]
pub fn let_gather(conn: &Conn, found: u64, look: impl FnOnce() -> u64) {
    let calls = conn.one_way.load(Relaxed);
    if u64::from(calls) < limits::ONE_WAY_AFTER.get() || found >= limits::GATHERED.get() {
        return;
    }
    let steps = conn
        .gather
        .load(Relaxed)
        .min(limits::GATHER_STEPS.get() as u32);
    if steps == 0 && !limits::GATHER_PROBE.divides(calls) {
        return;
    }
    for _ in 0..steps.max(1) * GATHER_PAUSES {
        std::hint::spin_loop();
    }
    conn.gather
        .store(if look() > found { steps + 1 } else { 0 }, Relaxed);
}
