//! Waiting for the other end: first by spinning, as far as that has paid so far, then asleep in the
//! kernel on the program's own fd, so that signals, timeouts and the peer's death end the wait
//! exactly as they end a wait for plain TCP.

use crate::clock;
use crate::conn::{self, Conn, Kind, Use};
use crate::deadline::Deadline;
use crate::end::End;
use crate::signals::{self, Ended};
use crate::{limits, nap, stream, sys, tenant};
use libc::{POLLIN, POLLOUT, POLLRDHUP, c_int};
pub use rdsock_shm::end::Sleeper;
use rdsock_shm::end::{Anchor, Process, Shared};
use rdsock_shm::layout::{Counter, want};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*};

/// Microseconds of spinning before sleep, unless `RDSOCK_SPIN_US` says otherwise.
const DEFAULT_SPIN_US: u64 = 50;
/// Milliseconds without spinning after the core was lost: the least and the most.
const QUIET_MS: [u64; 2] = [8, 512];

/// While others want the core as well, a sleeper gets it back sooner than one that yields it. So
/// nobody in this process spins before this time, in ticks,
static QUIET_UNTIL: AtomicU64 = AtomicU64::new(0);
/// which was so many milliseconds away: twice as many each time the core is lost again.
static QUIET_FOR_MS: AtomicU64 = AtomicU64::new(0);

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

/// Budgets that a spin takes in which poll cores had their turns: one takes a moment for each.
const GIVEN: u64 = 20;

/// Spins until `ready` or until the budget is used. `score` learns from the result.
#[inline]
pub fn spin(score: &AtomicU32, mut ready: impl FnMut() -> bool) -> bool {
    let us = SPIN_US.load(Relaxed);
    if us == 0 {
        return false;
    }
    let points = score.load(Relaxed);
    if points == 0 && !limits::PROBE_EVERY.divides(PROBES.fetch_add(1, Relaxed)) {
        return false;
    }
    let start = clock::ticks();
    if start < QUIET_UNTIL.load(Relaxed) {
        return false;
    }
    let (mut budget, quiet) = (
        clock::ticks_of(us),
        clock::ticks_of(limits::YIELD_AFTER_US.get()),
    );
    let mut turns = 0_u32;
    loop {
        if ready() {
            score.store((points + 1).min(conn::FULL_SCORE), Relaxed);
            return true;
        }
        let has_given = give_core();
        if has_given {
            // The time is looked at behind each: who had the core may never make anything ready.
            budget = clock::ticks_of(GIVEN * us);
            turns |= 15;
        } else {
            std::hint::spin_loop();
        }
        turns = turns.wrapping_add(1);
        if turns.is_multiple_of(16) {
            let passed = clock::ticks().wrapping_sub(start);
            if passed > budget {
                score.store(points.saturating_sub(1), Relaxed);
                return false;
            }
            let yields = !has_given && turns.is_multiple_of(32);
            if yields && passed > quiet && yield_has_lost_core() {
                return ready();
            }
        }
    }
}

/// A call that waits for any of many things: `poll`, `select` and `epoll_wait`.
pub trait Many {
    /// What has learnt whether spinning pays for it; `None` where nothing is on rings.
    fn score(&self) -> Option<&'static AtomicU32>;

    /// What there is now, as a number of results.
    fn look(&mut self) -> usize;

    /// The same before anything else, where that is worth it.
    fn first_look(&mut self, _: Deadline) -> usize {
        self.look()
    }

    /// A signal that comes from now on ends the call, whatever it does then.
    fn hold(&mut self);

    /// What there is when the time is up, asked with the program's signal mask. A negated error number.
    fn last_look(&mut self) -> c_int;

    /// Asks all for a sign and sleeps in the kernel. A result, or `None`: look again.
    fn sleep(&mut self, deadline: Deadline) -> Option<c_int>;
}

/// Waits until there is something, or the time is up. `has_slept`: the call has slept before.
pub fn for_any(call: &mut impl Many, deadline: Deadline, mut has_slept: bool) -> c_int {
    loop {
        let mut found = call.first_look(deadline);
        if found == 0 && has_slept {
            call.hold();
        }
        if found == 0
            && !deadline.is_now()
            && let Some(score) = call.score()
        {
            spin(score, || {
                found = call.look();
                found != 0
            });
        }
        if found != 0 {
            return found as c_int;
        }
        tenant::stay_attached();
        if deadline.left() == Some(0) {
            return call.last_look();
        }
        if tenant::greeting().is_some() {
            call.hold();
        }
        if let Some(result) = call.sleep(deadline) {
            return result;
        }
        has_slept = true;
    }
}

/// Yields the core; true when somebody else had it meanwhile.
fn yield_has_lost_core() -> bool {
    let before = clock::ticks();
    sys::sched_yield();
    let now = clock::ticks();
    let lost = now.wrapping_sub(before) > clock::ticks_of(limits::LOST_US.get());
    let quiet_for = QUIET_FOR_MS.load(Relaxed);
    if lost {
        let [least, most] = QUIET_MS;
        let ms = (2 * quiet_for).clamp(least, most);
        QUIET_FOR_MS.store(ms, Relaxed);
        QUIET_UNTIL.store(now + clock::ticks_of(1000 * ms), Relaxed);
    } else if quiet_for != 0 {
        QUIET_FOR_MS.store(quiet_for - 1, Relaxed);
    }
    lost
}

/// The core, plus 1, on which a poll core has to run before anything goes on for a stream of this
/// process; 0 for none. Where it is this thread's own, spinning keeps it from that.
static OWED: AtomicU32 = AtomicU32::new(0);
/// A poll core on the same core gets a turn when so large a part of the ring was read: the other end may
/// wait for that.
const OWED_PER_RING: u64 = 8;

/// Bytes were put into a stream's ring: where a poll core takes them from there, and shares this core,
/// it gets its turn as soon as this process waits.
#[inline]
pub fn owe(conn: &Conn, stream: &Shared) {
    let core = stream.out().bytes.core.load(Relaxed);
    if core != 0 {
        owe_to(conn, core);
    }
}

/// Only the other end of a stream to another node is a poll core; a program could say what keeps this one from its sleep.
#[cold]
fn owe_to(conn: &Conn, core: u32) {
    if conn.names.are_told() && core == sys::core() {
        OWED.store(core, Relaxed);
    }
}

/// Bytes were taken off a stream's ring.
#[inline]
pub fn owe_for_space(conn: &Conn, stream: &Shared) {
    conn.misses.store(0, Relaxed);
    if stream.out().bytes.core.load(Relaxed) == 0 {
        return;
    }
    let tail = stream.rx().tail.load(Relaxed);
    if tail.wrapping_sub(conn.owed_at.load(Relaxed)) >= stream.ring_size() / OWED_PER_RING {
        conn.owed_at.store(tail, Relaxed);
        owe(conn, stream);
    }
}

/// Gives the core to a poll core that is owed it. True when it did: look again.
#[inline]
pub fn give_core() -> bool {
    OWED.load(Relaxed) != 0 && give_core_to_owed()
}

#[cold]
fn give_core_to_owed() -> bool {
    let here = OWED.swap(0, Relaxed) == sys::core();
    if here {
        sys::sched_yield();
    }
    here
}

/// A receive that does not wait has found nothing. True when a poll core had its turn: look again.
#[inline]
pub fn missed(conn: &Conn, stream: &Shared) -> bool {
    let core = stream.out().bytes.core.load(Relaxed);
    if core == 0 {
        return false;
    }
    let misses = conn.misses.load(Relaxed).wrapping_add(1);
    conn.misses.store(misses, Relaxed);
    if limits::MISSES.divides(misses) {
        owe_to(conn, core);
    }
    // One that asks once will do something else now, and then wait.
    misses > 1 && give_core()
}

/// True when the fd still names this connection, after a sleep.
pub fn is_still(held: &Use, fd: c_int) -> bool {
    conn::kind(fd) == Kind::Conn(held.index)
}

/// Process and thread, as they stand in a stream's table of sleepers.
pub fn own_name() -> u64 {
    sys::thread_name(stream::pid())
}

/// Lets others run, who are awake and about to look.
pub fn give_way() {
    sys::sched_yield();
}

/// The waits of one call. When it has slept in vain, signals are held back until it returns (see [`signals`]): so one that comes
/// between two sleeps ends the call as well. The first sleep of a receive, and of most sends, is the kernel's own blocking receive,
/// which costs nothing more; what it can't tell is that a handler has run while it was being woken for something that does not
/// suffice. Then the next signal ends the call.
#[derive(Debug, Default)]
pub struct Waits {
    held: Option<signals::Held>,
    /// When the call first slept, in nanoseconds; 0 if it has not.
    began: u64,
    /// The program's time limit, once it was asked for.
    limit: Option<u64>,
    /// The longest sleep, once it was asked for.
    slice: Option<u64>,
    /// What it has moved.
    done: usize,
    /// How often it went round since it has moved that,
    rounds: u32,
    /// and when that was looked at, in nanoseconds.
    looked_at: u64,
}

/// Rounds of a call that has found nothing, after which it looks at the time: milliseconds that they are to take at least.
const ROUNDS: u32 = 16;

/// Nanoseconds of a sleep that nothing but a signal ends.
const MOMENT_NS: u64 = 1_000_000;

/// What a call waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum For {
    /// To receive some.
    Bytes,
    /// Room for what is sent.
    Space,
}

impl Waits {
    /// Of a call that has not waited yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The call goes on in the kernel, or ends: handlers run now.
    pub fn end(&mut self) {
        self.held = None;
    }

    /// The call has found nothing, and goes round, with so many bytes moved. True when it does so faster than it could be told of
    /// anything: then it is to [rest](for_a_moment). What says that something is ready, and what moves it, are words of the other
    /// end's, and may contradict each other.
    pub fn go_in_vain(&mut self, done: usize) -> bool {
        if done != self.done {
            self.done = done;
            self.rounds = 0;
        }
        self.rounds += 1;
        if self.rounds < ROUNDS {
            return false;
        }
        self.rounds = 0;
        let before = std::mem::replace(&mut self.looked_at, clock::nanoseconds());
        self.looked_at - before < u64::from(ROUNDS) * MOMENT_NS
    }

    /// True in the first round since the call began, or has moved something.
    pub fn are_new(&self) -> bool {
        self.rounds == 1
    }

    /// Begins a sleep: with signals held back where the kernel's own receive will not do. `partial`: the call has moved a part.
    fn begin(&mut self, held: &Use, fd: c_int, what: For, partial: bool) {
        let is_first = self.note_begin();
        let own_sleep = match what {
            _ if self.held.is_some() || partial || !is_first => false,
            For::Bytes => true,
            For::Space => {
                self.ask_limits(held, fd, what);
                let other = limit_of(fd, libc::SO_RCVTIMEO);
                self.limit.is_none() && self.slice.is_none() && other.is_none()
            }
        };
        if !own_sleep {
            self.hold(held, fd, what, partial);
        }
    }

    /// Notes when the call first sleeps. True where it has not slept before.
    fn note_begin(&mut self) -> bool {
        let is_first = self.began == 0;
        if is_first {
            self.began = clock::nanoseconds().max(1);
        }
        is_first
    }

    fn ask_limits(&mut self, held: &Use, fd: c_int, what: For) {
        self.limit = limit_of(
            fd,
            match what {
                For::Bytes => libc::SO_RCVTIMEO,
                For::Space => libc::SO_SNDTIMEO,
            },
        );
        self.slice = slice(held).filter(|_| what == For::Space);
    }

    /// Holds signals back from now on.
    fn hold(&mut self, held: &Use, fd: c_int, what: For, partial: bool) {
        if let Some(signals) = &mut self.held {
            if partial {
                signals.end_by_any();
            }
            return;
        }
        self.ask_limits(held, fd, what);
        // With a limit, a handler interrupts the call whether it restarts others or not; with a part moved, that is the result.
        let ended = if partial || self.limit.is_some() {
            Ended::ByAny
        } else {
            Ended::ByInterrupting
        };
        self.held = Some(signals::Held::hold(ended));
    }

    /// Sleeps until `fd` (or -1: the time alone) has what `events` names, at most `ns` nanoseconds. A result as the kernel's
    /// receive has it.
    fn sleep(&mut self, fd: c_int, events: i16, ns: Option<u64>) -> isize {
        tenant::count(Counter::Sleeps);
        let Some(signals) = self.held.take() else {
            return 1;
        };
        let left = self
            .limit
            .map(|limit| (self.began + limit).saturating_sub(clock::nanoseconds()));
        if left == Some(0) {
            self.held = Some(signals);
            return -(libc::EAGAIN as isize);
        }
        let ns = [ns, left].into_iter().flatten().min();
        match signals.wait(fd, events, ns) {
            Ok((signals, _)) => {
                self.held = Some(signals);
                1
            }
            Err(signals::Interrupted) => -(libc::EINTR as isize),
        }
    }

    /// Waits for a pipe to be ready. An error is negated.
    pub fn for_pipe(&mut self, pipe: c_int, events: i16) -> isize {
        if self.held.is_none() {
            self.held = Some(signals::Held::hold(Ended::ByInterrupting));
        }
        self.sleep(pipe, events, None)
    }
}

/// The longest sleep, in nanoseconds, of a call that what another thread or process does may have to end: its shutdown, say, leaves no
/// trace on the anchor. `None`: there is no other one.
pub fn slice(held: &Use) -> Option<u64> {
    let alone = conn::is_single_threaded() && held.conn.shared.load(Relaxed) == 0;
    (!alone).then(|| limits::SLICE_MS.get() * 1_000_000)
}

/// A time limit of the program, in nanoseconds.
pub fn limit_of(fd: c_int, name: c_int) -> Option<u64> {
    let value: libc::timeval = sys::getsockopt(fd, libc::SOL_SOCKET, name)?;
    let ns = (value.tv_sec as u64)
        .saturating_mul(1_000_000_000)
        .saturating_add(value.tv_usec as u64 * 1000);
    (ns != 0).then_some(ns.min(i64::MAX as u64))
}

/// A wait of one call on a stream.
struct Sleep<'a> {
    held: &'a Use,
    waits: &'a mut Waits,
    what: For,
    partial: bool,
}

impl Sleep<'_> {
    /// Sleeps, counted in as a sleeper: asks for a sign, and sleeps unless `is_ready` by then. Unless it `suffices` then, the call
    /// goes on to wait. An error is negated.
    fn until(
        self,
        end: &End<'_>,
        ask: impl FnOnce(),
        is_ready: impl Fn() -> bool,
        suffices: impl Fn() -> bool,
    ) -> Result<(), isize> {
        let Sleep {
            held,
            waits,
            what,
            partial,
        } = self;
        tenant::stay_attached();
        let fd = end.socket.wait_fd();
        waits.begin(held, fd, what, partial);
        let is_kernels = waits.held.is_none();
        if is_kernels
            && what == For::Bytes
            && let Some(result) = nap::until(end, held, waits.began, &is_ready)
        {
            if result > 0 && !suffices() {
                waits.hold(held, fd, what, is_ready());
            }
            return if result > 0 { Ok(()) } else { Err(result) };
        }
        let Some(sleeper) = Sleeper::enter(end) else {
            // It waits, though it does not sleep.
            waits.hold(held, fd, what, partial);
            end.socket.give_way();
            let result = waits.sleep(-1, 0, Some(0));
            return finish(end, held, result);
        };
        ask();
        let result = match &waits.held {
            _ if is_ready() => 1,
            None => peek(fd),
            Some(_) => waits.sleep(fd, POLLIN, waits.slice),
        };
        drop(sleeper);
        if is_kernels && what == For::Bytes {
            nap::learn(held.conn, waits.began);
        }
        if result > 0 && !suffices() {
            waits.hold(held, fd, what, partial || is_ready());
        }
        // The end of the other direction is looked at by a sender itself: it is awake.
        let result = match what {
            For::Space if result == 0 => 1,
            _ => result,
        };
        finish(end, held, result)
    }
}

/// Sleeps for a moment, whatever is ready, where it can't be slept for that.
#[cold]
pub fn for_a_moment(
    end: &End<'_>,
    held: &Use,
    waits: &mut Waits,
    what: For,
    partial: bool,
) -> Result<(), isize> {
    tenant::stay_attached();
    let fd = end.socket.wait_fd();
    waits.begin(held, fd, what, partial);
    waits.hold(held, fd, what, partial);
    finish(end, held, waits.sleep(-1, 0, Some(MOMENT_NS)))
}

/// Sleeps until there are bytes behind `position`, for a call that wants many and takes none.
pub fn for_more(end: &End<'_>, held: &Use, waits: &mut Waits, position: u64) -> Result<(), isize> {
    let sleep = Sleep {
        held,
        waits,
        what: For::Bytes,
        partial: false,
    };
    let is_ready = || end.shared.has_bytes_after(position) || end.shared.has_ended();
    let ask = || {
        end.ask_for_bytes(want::WAKE);
    };
    sleep.until(end, ask, is_ready, is_ready)
}

/// Sleeps until bytes may be there, on the ring or before the switch on the anchor. `wanted`: the call goes on to wait until it has
/// so many; `partial`: it has some already.
pub fn for_bytes(
    end: &End<'_>,
    held: &Use,
    waits: &mut Waits,
    wanted: u64,
    partial: bool,
) -> Result<(), isize> {
    let stream = end.shared;
    let sleep = Sleep {
        held,
        waits,
        what: For::Bytes,
        partial,
    };
    let suffices = || {
        let last = stream
            .rx()
            .tail
            .load(Relaxed)
            .saturating_add(wanted.saturating_sub(1));
        stream.may_receive() && (wanted <= 1 || stream.has_bytes_after(last) || stream.has_ended())
    };
    let ask = || {
        end.ask_for_bytes(want::WAKE);
    };
    sleep.until(end, ask, || stream.may_receive(), suffices)
}

/// Sleeps until space may be there. `partial`: the call has sent some.
pub fn for_space(end: &End<'_>, held: &Use, waits: &mut Waits, partial: bool) -> Result<(), isize> {
    let stream = end.shared;
    end.settle_switch();
    if stream.is_switching() && sys::poll_one(end.socket.wait_fd(), POLLIN, 0) > 0 {
        // Unread bytes are still on the anchor, so it cannot be slept on.
        return for_a_moment(end, held, waits, For::Space, partial);
    }
    let sleep = Sleep {
        held,
        waits,
        what: For::Space,
        partial,
    };
    let is_ready = || stream.is_sendable(stream.ring_size() / 3);
    sleep.until(end, || end.ask_for_space(want::WAKE), is_ready, is_ready)
}

/// Sleeps while what the other end has left in the ring goes out on the anchor: until there is room for more of it, or bytes for who
/// waits for these; until it is out; or until the program has ended the direction.
pub fn for_rest(
    end: &End<'_>,
    held: &Use,
    waits: &mut Waits,
    what: For,
    partial: bool,
) -> Result<(), isize> {
    let (fd, stream) = (end.socket.wait_fd(), end.shared);
    let (events, shut) = match what {
        For::Bytes => (POLLIN | POLLRDHUP | POLLOUT, &stream.rx().shut),
        For::Space => (POLLOUT, &stream.tx().shut),
    };
    tenant::stay_attached();
    waits.note_begin();
    waits.hold(held, fd, what, partial);
    loop {
        let result = waits.sleep(fd, events, slice(held));
        if result < 0 {
            return Err(result);
        }
        if !is_still(held, fd) {
            return Err(-(libc::EBADF as isize));
        }
        let is_over = shut.load(Acquire) != 0 || !stream.has_rest();
        if is_over || sys::poll_one(fd, events, 0) != 0 {
            return Ok(());
        }
    }
}

/// Before an `accept`, which sleeps in the kernel: as long as the daemon's greeting is awaited, sleeps until that or a connection has
/// come. Where the call does not sleep for good, it is followed by others, which look for it.
pub fn for_connection(listener: c_int) -> Result<(), signals::Interrupted> {
    if tenant::greeting().is_none()
        || sys::fcntl(listener, libc::F_GETFL, 0) & libc::O_NONBLOCK as isize != 0
        || limit_of(listener, libc::SO_RCVTIMEO).is_some()
    {
        return Ok(());
    }
    let mut signals = signals::Held::hold(Ended::ByInterrupting);
    while let Some(greeting) = tenant::greeting() {
        (signals, _) = signals.wait_for_either(listener, POLLIN, greeting, None)?;
        if sys::poll_one(listener, POLLIN, 0) != 0 {
            break;
        }
        if sys::poll_one(greeting, POLLIN, 0) != 0 {
            tenant::take_greeting();
        }
    }
    Ok(())
}

/// `sigsuspend` and `pause` as long as the daemon's greeting is awaited: it ends the sleep, and the wait goes on. A negated error
/// number.
pub fn for_signal(mask: *const libc::sigset_t) -> c_int {
    let mut mask = signals::Mask::new(mask);
    mask.hold();
    loop {
        let greeting = tenant::greeting();
        let mut fds = [libc::pollfd {
            fd: greeting.unwrap_or(-1),
            events: POLLIN,
            revents: 0,
        }];
        // SAFETY: a valid entry; the caller vouches for the mask.
        let got =
            unsafe { (sys::host().ppoll)(fds.as_mut_ptr(), 1, std::ptr::null(), mask.for_sleep()) };
        if got < 0 {
            return got;
        }
        tenant::take_greeting();
    }
}

/// The kernel's own blocking receive, which takes nothing: it honours SO_RCVTIMEO, SA_RESTART and
/// cancellation.
fn peek(fd: c_int) -> isize {
    tenant::count(Counter::Sleeps);
    let mut byte = 0_u8;
    // SAFETY: one byte is valid for writes.
    unsafe { (sys::host().recv)(fd, &raw mut byte, 1, libc::MSG_PEEK) }
}

fn finish(end: &End<'_>, held: &Use, result: isize) -> Result<(), isize> {
    held.conn.look.store(1, Relaxed);
    if !is_still(held, end.socket.wait_fd()) {
        return Err(-(libc::EBADF as isize));
    }
    match -result as c_int {
        libc::EINTR | libc::EAGAIN | libc::EBADF => return Err(result),
        _ if result <= 0 => end.note_end(result < 0),
        _ => {}
    }
    Ok(())
}

/// Spins for bytes on behalf of a connection.
pub fn spin_for_bytes(conn: &Conn, stream: &Shared) -> bool {
    !stream.is_switching() && spin(&conn.spin_score, || stream.is_receivable())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn a_call_that_goes_round_in_vain_rests() {
        let mut waits = Waits::new();
        let rests = (0..1000).filter(|_| waits.go_in_vain(7)).count();
        assert!(rests >= 1000 / ROUNDS as usize - 2, "{rests} rests");
        let rests = (0..1000).filter(|done| waits.go_in_vain(8 + done)).count();
        assert_eq!(rests, 0, "with a byte each time");
        let slow = (0..5 * ROUNDS).filter(|_| {
            std::thread::sleep(Duration::from_millis(2));
            waits.go_in_vain(2000)
        });
        // The first time it looks at may have begun before.
        assert!(slow.count() <= 1, "where it sleeps by itself");
    }

    #[test]
    fn a_spin_ends_however_often_the_core_is_given_away() {
        let (score, began) = (AtomicU32::new(conn::FULL_SCORE), Instant::now());
        let is_ready = spin(&score, || {
            OWED.store(sys::core(), Relaxed);
            assert!(began.elapsed() < Duration::from_secs(20), "it has no end");
            false
        });
        assert!(!is_ready);
    }
}
