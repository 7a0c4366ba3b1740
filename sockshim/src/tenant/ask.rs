//! Questions whose answer a call of the program waits for: may this `connect` go to another node
//! (REACH), and for whom did the daemon open this connection (WHOIS).
//!
//! Several threads may ask at once, and whoever reads the control connection reads all that has come:
//! so who asks takes a place, and answers are put there.

use super::attach::{CONTROL, attach, is_as_attached, is_disabled};
use super::lock::{Guard, Shared};
use super::memory::make_memory;
use super::messages::{await_message, send_with};
use super::pauses::RETRY_MS;
use crate::{clock, sys};
use rdsock_shm::control::{Between, Caller, Message, Reached, Welcome, kind};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, Ordering::*};

/// Nanoseconds that a call of the program waits beyond the time that the daemon has for its answer.
const GRACE: u64 = 20_000_000;
/// Nanoseconds, at most, of the time that a daemon may claim for an answer.
const LONGEST: u64 = 10_000_000_000;
/// Threads that may ask at once; a further one waits for its turn.
const PLACES: usize = 32;

/// The answer to a question.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    Reached(Reached),
    Caller(Caller),
}

impl Answer {
    fn question(&self) -> u64 {
        match self {
            Answer::Reached(reached) => reached.question,
            Answer::Caller(caller) => caller.question,
        }
    }
}

/// Where an answer is put.
#[derive(Clone, Copy)]
struct Place {
    /// The question's number.
    question: u64,
    /// When nobody waits any more, on the clock of [`clock::nanoseconds`]: the place is free.
    until: u64,
    answer: Option<Answer>,
}

const FREE: Place = Place {
    question: 0,
    until: 0,
    answer: None,
};

static PLACES_TAKEN: Shared<[Place; PLACES]> = Shared(UnsafeCell::new([FREE; PLACES]));
static QUESTIONS: AtomicU64 = AtomicU64::new(0);
/// When the daemon last left a question without an answer.
static SILENT_AT: AtomicU64 = AtomicU64::new(0);
/// Nanoseconds that the daemon has for an answer, as it said.
static ANSWER: AtomicU64 = AtomicU64::new(0);

fn with_places<T>(_guard: &Guard, use_them: impl FnOnce(&mut [Place; PLACES]) -> T) -> T {
    // SAFETY: the lock is held, and no caller comes here again from within.
    use_them(unsafe { &mut *PLACES_TAKEN.0.get() })
}

/// Takes a place that nobody waits at.
fn take_place(guard: &Guard, question: u64, until: u64) -> Option<()> {
    let now = clock::nanoseconds();
    with_places(guard, |places| {
        let place = places.iter_mut().find(|place| place.until < now)?;
        *place = Place {
            question,
            until,
            answer: None,
        };
        Some(())
    })
}

/// The daemon has greeted this process.
pub(super) fn welcomed(welcome: &Welcome) {
    let answer = u64::from(welcome.answer_us) * 1000;
    ANSWER.store(answer.min(LONGEST), Relaxed);
}

/// When a `connect` that begins now stops waiting.
pub fn end_of_wait() -> u64 {
    clock::nanoseconds() + GRACE + ANSWER.load(Relaxed)
}

/// Asks whether a `connect` may go to another node. `None` when there is no daemon, or it does not
/// answer until `end`.
pub fn reach(question: Between, end: u64) -> Option<Reached> {
    match ask(kind::REACH, question, end, false)? {
        Answer::Reached(reached) => Some(reached),
        Answer::Caller(_) => None,
    }
}

/// Asks for whom the daemon opened an accepted connection. `None` as for [`reach`]. What the daemon has
/// `certain`ly opened is asked for even when it was silent a moment ago: it has just shown that it runs.
pub fn who_is(question: Between, end: u64, certain: bool) -> Option<Caller> {
    match ask(kind::WHOIS, question, end, certain)? {
        Answer::Caller(caller) => Some(caller),
        Answer::Reached(_) => None,
    }
}

/// A daemon that has not answered a question is not asked for a while, but by who `insists`.
fn ask(what: u16, question: Between, end: u64, insists: bool) -> Option<Answer> {
    let silent_at = SILENT_AT.load(Relaxed);
    let is_silent =
        silent_at != 0 && clock::nanoseconds().wrapping_sub(silent_at) < RETRY_MS * 1_000_000;
    if is_disabled() || (is_silent && !insists) {
        return None;
    }
    // A handler could ask as well, and find the places in use.
    let mask = sys::block_signals();
    let answer = ask_with_signals_blocked(what, question, end);
    sys::restore_signals(mask);
    answer
}

fn ask_with_signals_blocked(what: u16, mut question: Between, end: u64) -> Option<Answer> {
    question.question = QUESTIONS.fetch_add(1, Relaxed) + 1;
    let number = question.question;
    while !put(what, &question, end)? {
        if clock::nanoseconds() >= end {
            return None;
        }
        // All places are taken, by threads that wait for an answer.
        sys::poll_one(-1, 0, 1);
    }
    let answer = await_message(end, |guard| {
        with_places(guard, |places| {
            places.iter().find(|place| place.question == number)?.answer
        })
    });
    if let Some(guard) = Guard::take() {
        give_back(&guard, number);
    }
    if answer.is_none() {
        SILENT_AT.store(clock::nanoseconds(), Relaxed);
    }
    answer
}

/// Sends a question. False when there is no place for its answer now; `None` when there is no daemon.
fn put(what: u16, question: &Between, end: u64) -> Option<bool> {
    let number = question.question;
    let guard = Guard::take()?;
    make_memory();
    attach(&guard);
    let control = CONTROL.load(Relaxed);
    if control < 0 || !is_as_attached() {
        return None;
    }
    if take_place(&guard, number, end).is_none() {
        return Some(false);
    }
    if send_with(control, &Message::new(what, question), &[]) < 0 {
        give_back(&guard, number);
        return None;
    }
    Some(true)
}

fn give_back(guard: &Guard, question: u64) {
    with_places(guard, |places| {
        for place in places.iter_mut().filter(|place| place.question == question) {
            *place = FREE;
        }
    });
}

/// Puts an answer where who asked looks for it. Nobody waits for one that comes late.
pub(super) fn deliver(guard: &Guard, answer: Answer) {
    let question = answer.question();
    with_places(guard, |places| {
        for place in places.iter_mut() {
            if place.question == question && question != 0 {
                place.answer = Some(answer);
            }
        }
    });
}

/// After fork, in the child: who asked was another process, and its daemon may answer this one.
pub(super) fn after_fork_in_child() {
    SILENT_AT.store(0, Relaxed);
}
