//! Waiting for the other end: first by spinning, as far as that has paid so far, then asleep in the
//! kernel on the program's own fd, so that signals, timeouts and the peer's death end the wait
//! exactly as they end a wait for plain TCP.

use crate::clock;
use crate::conn::{self, Conn, Kind, Use};
use crate::stream::{RxGuard, Stream};
use crate::{real, sys};
use libc::c_int;
use rdsock_shm::layout::{Counter, phase, want};
use rdsock_shm::wake;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*};

/// Best [`Conn::spin_score`].
pub const FULL_SCORE: u32 = 8;
/// Of the waits of a connection whose spinning does not pay, one in so many tries it again.
const PROBE_EVERY: u32 = 16;
/// Microseconds of spinning before sleep, unless `RDSOCK_SPIN_US` says otherwise.
const DEFAULT_SPIN_US: u64 = 50;
/// Spins at first without giving the core away; later it yields in between.
const YIELD_AFTER_US: u64 = 4;

/// Milliseconds that a sender of a process with threads sleeps at a time.
const SLICE_MS: c_int = 50;

static SPIN_US: AtomicU64 = AtomicU64::new(DEFAULT_SPIN_US);
static PROBES: AtomicU32 = AtomicU32::new(0);

/// Sets the budget: from the environment, or 0 where there is one core only.
pub fn start(configured: Option<u64>, cores: usize) {
    let budget = if cores < 2 {
        0
    } else {
        configured.unwrap_or(DEFAULT_SPIN_US).min(1_000_000)
    };
    SPIN_US.store(budget, Relaxed);
}

/// Spins until `ready` or until the budget is used. `score` learns from the result.
#[inline]
pub fn spin(score: &AtomicU32, mut ready: impl FnMut() -> bool) -> bool {
    let us = SPIN_US.load(Relaxed);
    if us == 0 {
        return false;
    }
    let points = score.load(Relaxed);
    if points == 0 && !PROBES.fetch_add(1, Relaxed).is_multiple_of(PROBE_EVERY) {
        return false;
    }
    let start = clock::ticks();
    let (budget, quiet) = (clock::ticks_of(us), clock::ticks_of(YIELD_AFTER_US));
    let mut turns = 0_u32;
    loop {
        if ready() {
            score.store((points + 1).min(FULL_SCORE), Relaxed);
            return true;
        }
        std::hint::spin_loop();
        turns = turns.wrapping_add(1);
        if turns.is_multiple_of(16) {
            let passed = clock::ticks().wrapping_sub(start);
            if passed > budget {
                score.store(points.saturating_sub(1), Relaxed);
                return false;
            }
            if passed > quiet && turns.is_multiple_of(32) {
                sys::sched_yield();
            }
        }
    }
}

/// True when the fd still names this connection, after a sleep.
pub fn is_still(held: &Use, fd: c_int) -> bool {
    conn::kind(fd) == Kind::Conn(held.index)
}

/// Something for a receiver to look at: bytes, a mark, an end, or a phase that is not the ring's.
#[inline]
pub fn receivable(stream: &Stream) -> bool {
    stream.has_bytes()
        || stream.incoming().producer.mark.load(Acquire) != 0
        || stream.rx().shut.load(Relaxed) != 0
        || stream.rx().anchor.load(Relaxed) != 0
        || stream.rx().phase.load(Relaxed) != phase::RING
}

/// No more bytes will come on the ring.
pub fn has_ended(stream: &Stream) -> bool {
    stream.incoming().producer.mark.load(Acquire) != 0
        || stream.rx().shut.load(Relaxed) != 0
        || stream.rx().anchor.load(Relaxed) != 0
}

/// Something for a sender to look at.
#[inline]
pub fn sendable(stream: &Stream, enough: u64) -> bool {
    let head = stream.tx().head.load(Relaxed) & !(1 << 63);
    let tail = stream.out().consumer.tail.load(Acquire);
    stream.ring_size().saturating_sub(head.saturating_sub(tail)) >= enough
        || stream.out().bytes.want.load(Relaxed) & (want::DEMOTED | want::CLOSED | want::LEAVE) != 0
        || stream.tx().shut.load(Relaxed) != 0
        || stream.rx().anchor.load(Relaxed) != 0
        || stream.tx().phase.load(Relaxed) != phase::RING
}

/// A sleeper on a stream: counted, so that nobody takes the wake byte that is meant for it before
/// it has looked.
#[derive(Debug)]
pub struct Sleeper<'a> {
    stream: &'a Stream,
    receives: bool,
    sends: bool,
}

impl<'a> Sleeper<'a> {
    /// Counts the caller in. It looks for what it waits for after this.
    pub fn enter(stream: &'a Stream, receives: bool, sends: bool) -> Self {
        let wakes = stream.incoming().producer.wakes.load(SeqCst);
        if receives {
            stream.rx().acknowledged.store(wakes, SeqCst);
            stream.rx().waiters.fetch_add(1, SeqCst);
        }
        if sends {
            stream.tx().acknowledged.store(wakes, SeqCst);
            stream.tx().waiters.fetch_add(1, SeqCst);
        }
        Sleeper {
            stream,
            receives,
            sends,
        }
    }

    /// Takes the wake bytes that nobody waits for any more off the anchor, so that it can be slept
    /// on. False when some must stay for another sleeper, which has the core now.
    pub fn clear(&self, guard: &RxGuard<'_>, fd: c_int) -> bool {
        static TURNS: AtomicU32 = AtomicU32::new(0);
        guard.drain(fd);
        if guard.outstanding() == 0 {
            return true;
        }
        // A sleeper that was cancelled never looks.
        if TURNS.fetch_add(1, Relaxed) % 4096 == 4095 {
            guard.drain_all(fd);
        }
        // Counted, but not here yet: it will end the sleep at once.
        sys::poll_one(fd, libc::POLLIN, 0) <= 0
    }
}

impl Sleeper<'_> {
    /// Counts out one that was counted in and forgotten.
    pub fn leave(stream: &Stream, receives: bool, sends: bool) {
        drop(Sleeper {
            stream,
            receives,
            sends,
        });
    }
}

fn count_out(waiters: &AtomicU32) {
    let _ = waiters.fetch_update(SeqCst, SeqCst, |count| count.checked_sub(1));
}

impl Drop for Sleeper<'_> {
    fn drop(&mut self) {
        if self.receives {
            count_out(&self.stream.rx().waiters);
        }
        if self.sends {
            count_out(&self.stream.tx().waiters);
        }
    }
}

/// Sleeps until there are bytes behind `position`, for a call that wants many and takes none.
pub fn for_more(held: &Use, stream: &Stream, fd: c_int, position: u64) -> Result<(), isize> {
    let sleeper = Sleeper::enter(stream, true, false);
    let guard = stream.lock_rx();
    let cleared = sleeper.clear(&guard, fd);
    drop(guard);
    stream.ask_for_bytes(want::WAKE);
    let result = if !cleared || stream.has_bytes_after(position) || has_ended(stream) {
        1
    } else {
        peek(fd)
    };
    drop(sleeper);
    finish(held, stream, fd, result)
}

/// Sleeps until bytes may be there. The guard is released meanwhile. An error is negated.
pub fn for_bytes(held: &Use, stream: &Stream, guard: RxGuard<'_>, fd: c_int) -> Result<(), isize> {
    let sleeper = Sleeper::enter(stream, true, false);
    let cleared = sleeper.clear(&guard, fd);
    drop(guard);
    if !cleared {
        drop(sleeper);
        sys::sched_yield();
        return Ok(());
    }
    crate::epoll::kick_all(held.conn);
    stream.ask_for_bytes(want::WAKE);
    let result = if receivable(stream) { 1 } else { peek(fd) };
    drop(sleeper);
    finish(held, stream, fd, result)
}

/// Sleeps until the anchor has something, while bytes may still come on it.
pub fn for_anchor(held: &Use, stream: &Stream, fd: c_int) -> Result<(), isize> {
    stream.ask_for_bytes(want::WAKE);
    let switched =
        stream.incoming().producer.switch_at.load(Acquire) == stream.rx().tail.load(Relaxed);
    if switched || has_ended(stream) {
        return Ok(());
    }
    let result = peek(fd);
    finish(held, stream, fd, result)
}

/// Sleeps until space may be there. An error is negated.
pub fn for_space(held: &Use, stream: &Stream, fd: c_int) -> Result<(), isize> {
    let enough = stream.ring_size() / 3;
    crate::io::settle_switch(stream);
    if stream.rx().phase.load(Acquire) == phase::SWITCHING && sys::poll_one(fd, libc::POLLIN, 0) > 0
    {
        // Unread bytes are still on the anchor, so it cannot be slept on.
        sys::poll_one(-1, 0, 1);
        return if is_still(held, fd) {
            Ok(())
        } else {
            Err(-(libc::EBADF as isize))
        };
    }
    let sleeper = Sleeper::enter(stream, false, true);
    let guard = stream.lock_rx();
    let cleared = stream.rx().phase.load(Acquire) != phase::RING || sleeper.clear(&guard, fd);
    drop(guard);
    if !cleared {
        drop(sleeper);
        sys::sched_yield();
        return Ok(());
    }
    crate::epoll::kick_all(held.conn);
    wake::ask(&stream.out().space.want, want::WAKE);
    let result = if sendable(stream, enough) {
        1
    } else {
        sleep_for_send(fd)
    };
    drop(sleeper);
    finish(held, stream, fd, result)
}

/// The kernel's own blocking receive, which takes nothing: it honours SO_RCVTIMEO, SA_RESTART and
/// cancellation.
fn peek(fd: c_int) -> isize {
    crate::tenant::count(Counter::Sleeps);
    let mut byte = 0_u8;
    // SAFETY: one byte is valid for writes.
    let got = unsafe { real::recv(fd, (&raw mut byte).cast(), 1, libc::MSG_PEEK) };
    if got < 0 {
        -(sys::errno() as isize)
    } else {
        got
    }
}

/// As [`peek`], with the send timeout where the program has set timeouts.
fn sleep_for_send(fd: c_int) -> isize {
    let limit = |name| {
        let value: Option<libc::timeval> = sys::getsockopt(fd, libc::SOL_SOCKET, name);
        value.map_or(0, |value| value.tv_sec * 1000 + value.tv_usec / 1000)
    };
    let (send, receive) = (limit(libc::SO_SNDTIMEO), limit(libc::SO_RCVTIMEO));
    if !conn::is_single_threaded() && send == 0 {
        // Another thread's shutdown leaves no trace on the anchor: look for it now and then.
        let mut one = libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        crate::tenant::count(Counter::Sleeps);
        // SAFETY: one valid pollfd.
        let got = unsafe { real::poll(&mut one, 1, SLICE_MS) };
        return if got < 0 { -(sys::errno() as isize) } else { 1 };
    }
    if send == 0 && receive == 0 {
        let got = peek(fd);
        // The end of the other direction is looked at by the caller: report it as awake.
        return if got == 0 { 1 } else { got };
    }
    crate::tenant::count(Counter::Sleeps);
    let mut one = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let ms = if send == 0 {
        -1
    } else {
        send.min(c_int::MAX as i64) as c_int
    };
    // SAFETY: one valid pollfd.
    match unsafe { real::poll(&mut one, 1, ms) } {
        0 => -(libc::EAGAIN as isize),
        n if n < 0 => -(sys::errno() as isize),
        _ => 1,
    }
}

fn finish(held: &Use, stream: &Stream, fd: c_int, result: isize) -> Result<(), isize> {
    held.conn.look.store(1, Relaxed);
    if !is_still(held, fd) {
        return Err(-(libc::EBADF as isize));
    }
    match -result as c_int {
        libc::EINTR | libc::EAGAIN | libc::EBADF => return Err(result),
        _ if result <= 0 => stream.note_end(result < 0),
        _ => {}
    }
    Ok(())
}

/// Receives in a row, without a send between them, after which a connection is taken for a stream
/// of messages in one direction.
const ONE_WAY_AFTER: u32 = 64;
/// Pauses between two looks at the ring of such a connection.
const GATHER_PAUSES: u32 = 16;

/// On a stream of messages in one direction, a receiver that looks all the time takes the
/// producer's cache lines away for each single message. It looks away for a moment, so that several
/// come at once: less than a microsecond, and never where a request waits for its reply.
#[inline]
pub fn let_gather(conn: &Conn) {
    if conn.one_way.load(Relaxed) > ONE_WAY_AFTER {
        for _ in 0..GATHER_PAUSES {
            std::hint::spin_loop();
        }
    }
}

/// Spins for bytes on behalf of a connection.
pub fn spin_for_bytes(conn: &Conn, stream: &Stream) -> bool {
    spin(&conn.spin_score, || receivable(stream))
}
