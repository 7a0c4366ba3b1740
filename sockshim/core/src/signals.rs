//! Signals in waits of the shim's own, as in a blocking call of the kernel: one that comes after the call has begun to sleep runs
//! its handler, and ends the call with `EINTR` or is followed by more of the wait, as the handler was installed (`SA_RESTART`).
//!
//! A wait is made of several sleeps, with looks between them, and a handler that ran between two of them would end nothing. So
//! signals are held back for as long as the call lasts, and come through where it sleeps: those that end it inside `ppoll`, which
//! every handler ends. So a signal for the whole process still goes to the thread that Linux would choose: it prefers those that
//! do not block it. Signals whose handlers restart calls, and real-time ones, stay blocked there, are seen by a descriptor for them (a
//! `signalfd`), and are let through at once.
//!
//! Called by [`crate::wait`], by `poll` and by `epoll`. Holds no lock, and never decides what a wait is for.

use crate::state::PROCESS;
use crate::{hidden, limits, sys};
use libc::{c_int, sigset_t, timespec};
use std::sync::atomic::{AtomicU64, Ordering::*};

/// No time to wait.
const NOW: timespec = timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

/// glibc's signal to a thread that is cancelled.
const CANCEL: c_int = 32;
/// Never held back: what a thread brings upon itself, and may have a handler for that mends it (a page that the program has
/// protected); and that of a cancellation, for which glibc waits inside its own calls.
const FREE: u64 = bit(CANCEL)
    | bit(libc::SIGSEGV)
    | bit(libc::SIGBUS)
    | bit(libc::SIGFPE)
    | bit(libc::SIGILL)
    | bit(libc::SIGTRAP)
    | bit(libc::SIGSYS);

/// Those that libc uses, and the real-time ones.
const REAL_TIME: u64 = u64::MAX << 31;

const fn bit(signal: c_int) -> u64 {
    1 << (signal - 1)
}

/// Descriptors for signals: in the upper half the thread that has one, in the lower one its number, plus 1. A handler that never
/// returns leaves that of its thread behind, and the next wait of the thread takes it.
#[derive(Debug)]
pub struct Watches([AtomicU64; 16]);

impl Watches {
    /// None.
    pub const fn new() -> Self {
        Watches([const { AtomicU64::new(0) }; 16])
    }

    /// The descriptor `old` is now `new`.
    fn moved(&self, old: c_int, new: c_int) {
        for place in &self.0 {
            let word = place.load(Acquire);
            if word as u32 == old as u32 + 1 {
                let moved = word & !u64::from(u32::MAX) | (new as u64 + 1);
                let _ = place.compare_exchange(word, moved, AcqRel, Relaxed);
            }
        }
    }
}

fn owner(word: u64) -> u32 {
    (word >> 32) as u32
}

fn fd_in(place: &AtomicU64) -> c_int {
    place.load(Acquire) as u32 as c_int - 1
}

/// A descriptor for these signals, for this thread; `None` where there are too many.
fn open(signals: u64) -> Option<&'static AtomicU64> {
    let me = sys::gettid();
    let is_mine = |place: &&AtomicU64| owner(place.load(Relaxed)) == me;
    let all = &PROCESS.watches.0;
    if let Some(place) = all.iter().find(is_mine) {
        if fd_in(place) >= 0 && sys::signal_fd(fd_in(place), signals) >= 0 {
            return Some(place);
        }
        place.store(0, Release);
    }
    let mine = u64::from(me) << 32;
    let is_taken = |place: &&AtomicU64| {
        let was = place.load(Relaxed);
        let is_free = was == 0 || !sys::is_thread_alive(sys::getpid(), owner(was));
        is_free && {
            let taken = place.compare_exchange(was, mine, AcqRel, Relaxed).is_ok();
            if taken && was as u32 != 0 {
                hidden::close_hidden(was as u32 as c_int - 1);
            }
            taken
        }
    };
    let place = all.iter().find(is_taken)?;
    let fd = sys::signal_fd(-1, signals);
    if fd < 0 {
        place.store(0, Release);
        return None;
    }
    place.store(mine | (hidden::hide(fd) as u64 + 1), Release);
    Some(place)
}

/// Closes it, unless a wait of a handler of this thread has done so.
fn close(place: &AtomicU64) {
    let word = place.load(Acquire);
    let is_mine = owner(word) == sys::gettid();
    if is_mine && place.compare_exchange(word, 0, AcqRel, Relaxed).is_ok() {
        hidden::close_hidden(word as u32 as c_int - 1);
    }
}

/// The shim's own descriptor `old` is now `new`.
pub fn moved(old: c_int, new: c_int) {
    PROCESS.watches.moved(old, new);
}

/// A signal has ended the call: its handler has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupted;

/// Which handlers end a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Any: the call has a time limit, has moved a part, or is one that is never started again.
    ByAny,
    /// Those without `SA_RESTART`.
    ByInterrupting,
}

fn set_of(signals: u64) -> sigset_t {
    let mut set = std::mem::MaybeUninit::<sigset_t>::zeroed();
    // SAFETY: zeroed, made of integers, and larger than a word.
    unsafe {
        set.as_mut_ptr().cast::<u64>().write(signals);
        set.assume_init()
    }
}

/// This thread's signals, held back until this is dropped.
#[derive(Debug)]
#[must_use]
pub struct Held {
    /// What the program has blocked.
    mask: u64,
    /// Those of the others that are blocked also while it sleeps.
    watched: u64,
    /// The place among the [`Watches`] of a descriptor that is readable when one of these has come, unless there is none to be had.
    place: Option<&'static AtomicU64>,
}

impl Held {
    /// Holds back all from now on.
    pub fn hold(ended: Ended) -> Self {
        let mask = sys::block_these_signals(!FREE);
        let others = !mask & !FREE;
        let watched = match ended {
            Ended::ByAny => 0,
            // To ask for each of the real-time ones would cost more than it is worth.
            Ended::ByInterrupting => {
                sys::restarting_signals(others & !REAL_TIME) | others & REAL_TIME
            }
        };
        Held {
            mask,
            watched,
            place: if watched == 0 { None } else { open(watched) },
        }
    }

    /// From now on any handler ends the wait.
    pub fn end_by_any(&mut self) {
        self.close();
        self.watched = 0;
    }

    /// What is blocked while the thread sleeps.
    pub fn asleep(&self) -> sigset_t {
        set_of(self.mask | self.watched)
    }

    /// Waits until `fd` has what `events` names (or -1: for the time alone), a signal comes, or the time is up (`None`: never).
    /// `false` in the last case; it may also be sooner. A cancellation point.
    pub fn wait(
        self,
        fd: c_int,
        events: i16,
        ns: Option<u64>,
    ) -> Result<(Self, bool), Interrupted> {
        self.wait_for_either(fd, events, -1, ns)
    }

    /// As [`wait`](Self::wait), which the input of `other` (or -1) ends, too.
    pub fn wait_for_either(
        self,
        fd: c_int,
        events: i16,
        other: c_int,
        ns: Option<u64>,
    ) -> Result<(Self, bool), Interrupted> {
        let entry = |fd, events| libc::pollfd {
            fd,
            events,
            revents: 0,
        };
        let watch = self.place.map_or(-1, fd_in);
        let mut fds = [
            entry(fd, events),
            entry(watch, libc::POLLIN),
            entry(other, libc::POLLIN),
        ];
        let is_blind = self.watched != 0 && watch < 0;
        // Without a descriptor, such a signal is found only at the end of a wait.
        let step = limits::STEP_MS.get() * 1_000_000;
        let ns = match ns {
            _ if !is_blind => ns,
            Some(ns) => Some(ns.min(step)),
            None => Some(step),
        };
        let limit = ns.map(|ns| timespec {
            tv_sec: (ns / 1_000_000_000) as i64,
            tv_nsec: (ns % 1_000_000_000) as i64,
        });
        let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let asleep = self.asleep();
        // SAFETY: three valid entries, a valid limit and mask.
        let got = unsafe { (sys::host().ppoll)(fds.as_mut_ptr(), 3, limit, &asleep) };
        if got == -libc::EINTR {
            drop(self);
            // A thread that is cancelled may have been told so by this signal.
            // SAFETY: no pollfd, and a valid limit.
            unsafe { (sys::host().ppoll)(std::ptr::null_mut(), 0, &NOW, std::ptr::null()) };
            return Err(Interrupted);
        }
        let has_come =
            fds[1].revents != 0 || is_blind && sys::pending_signals() & self.watched != 0;
        if has_come {
            return self.let_through().map(|held| (held, true));
        }
        Ok((self, got > 0))
    }

    /// Lets through what has come: handlers run now, with the program's mask. All is held again from the moment in which they
    /// return, so that a signal which comes then ends the wait.
    fn let_through(mut self) -> Result<Self, Interrupted> {
        if sys::interrupt(sys::pending_signals() & !self.mask) {
            return Err(Interrupted);
        }
        let mask = set_of(self.mask);
        // SAFETY: no pollfd, a valid limit and mask.
        unsafe { (sys::host().ppoll)(std::ptr::null_mut(), 0, &NOW, &mask) };
        // A wait of a handler's own may have had the descriptor meanwhile.
        self.place = open(self.watched);
        Ok(self)
    }

    fn close(&mut self) {
        if let Some(place) = self.place.take() {
            close(place);
        }
    }
}

impl Drop for Held {
    /// Lets them through: handlers run now.
    fn drop(&mut self) {
        // First: a handler may never return.
        self.close();
        sys::restore_signals(self.mask);
    }
}

/// The signals of a wait that any handler ends (`poll`, `select`, `epoll_wait`), with the mask that the program gave, or none.
#[derive(Debug)]
pub struct Mask {
    given: *const sigset_t,
    held: Option<Held>,
    asleep: Option<sigset_t>,
}

impl Mask {
    /// Of a call with this mask: null, or valid for as long as this lives.
    pub fn new(given: *const sigset_t) -> Self {
        Mask {
            given,
            held: None,
            asleep: None,
        }
    }

    /// True when the program gave one.
    pub fn is_given(&self) -> bool {
        !self.given.is_null()
    }

    /// The call has slept, and goes on to wait: what comes before the next sleep must end that.
    pub fn hold(&mut self) {
        if self.held.is_none() {
            let held = Held::hold(Ended::ByAny);
            self.asleep = Some(held.asleep());
            self.held = Some(held);
        }
    }

    /// As `ppoll` and its kin take it.
    pub fn for_sleep(&self) -> *const sigset_t {
        match &self.asleep {
            Some(asleep) if self.given.is_null() => asleep,
            _ => self.given,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_that_has_moved_is_still_its_threads() {
        let watches = Watches::new();
        let [first, second] = [7_u64 << 32 | 4, 8 << 32 | 5];
        watches.0[0].store(first, Relaxed);
        watches.0[2].store(second, Relaxed);
        watches.moved(4, 9);
        assert_eq!(
            (owner(watches.0[2].load(Relaxed)), fd_in(&watches.0[2])),
            (8, 9)
        );
        assert_eq!(watches.0[0].load(Relaxed), first);
        assert_eq!(watches.0[1].load(Relaxed), 0);
    }
}
