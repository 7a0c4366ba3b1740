//! Questions whose answer a call of the program waits for: may this `connect` go to another node
//! (REACH), and for whom did the daemon open this connection (WHOIS).
//!
//! Several threads may ask at once, and whoever reads the control connection reads all that has come:
//! so who asks takes a place, and answers are put there.

use super::attach::{attach, await_greeting, ensure, is_as_attached, is_disabled};
use super::link::link;
use super::lock::{Guard, Shared};
use super::memory::make_memory;
use super::messages::{await_message, send_with};
use super::pauses::RETRY_MS;
use crate::state::PROCESS;
use crate::{clock, sys};
use libc::c_int;
use rdsock_shm::control::{Between, Caller, Message, Reached, Welcome, kind};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, Ordering::*};

/// Nanoseconds that a call of the program waits beyond the time that the daemon has for its answer.
const GRACE: u64 = 20_000_000;
/// Nanoseconds that a program waits, at most, for a daemon to greet it which is to be asked.
const GREETED_WITHIN: u64 = 500_000_000;
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
#[derive(Clone, Copy, Debug)]
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

/// The places of all threads.
#[derive(Debug)]
struct Places([Place; PLACES]);

impl Places {
    const fn new() -> Self {
        Places([FREE; PLACES])
    }

    /// Takes a place that nobody waits at, for a question of which none waits beyond `until`. False where there is none.
    fn take(&mut self, question: u64, until: u64, now: u64) -> bool {
        let free = self.0.iter_mut().find(|place| place.until < now);
        let is_there = free.is_some();
        if let Some(place) = free {
            *place = Place {
                question,
                until,
                answer: None,
            };
        }
        is_there
    }

    /// The answer to a question, once it has come.
    fn answer(&self, question: u64) -> Option<Answer> {
        let mut own = self.0.iter().filter(|place| place.question == question);
        own.next()?.answer
    }

    /// Puts an answer where who asked looks for it. Nobody waits for one that comes late.
    fn deliver(&mut self, answer: Answer) {
        let question = answer.question();
        for place in &mut self.0 {
            if place.question == question && question != 0 {
                place.answer = Some(answer);
            }
        }
    }

    /// Nobody waits for that answer any more.
    fn give_back(&mut self, question: u64) {
        for place in self.0.iter_mut().filter(|place| place.question == question) {
            *place = FREE;
        }
    }
}

/// The questions of a process.
#[derive(Debug)]
pub struct Questions {
    places: Shared<Places>,
    asked: AtomicU64,
    /// When the daemon last left one without an answer.
    silent_at: AtomicU64,
    /// Nanoseconds that the daemon has for an answer, as it said.
    answer: AtomicU64,
}

impl Questions {
    /// None yet.
    pub const fn new() -> Self {
        Questions {
            places: Shared(UnsafeCell::new(Places::new())),
            asked: AtomicU64::new(0),
            silent_at: AtomicU64::new(0),
            answer: AtomicU64::new(0),
        }
    }

    /// True when the daemon has left one without an answer a moment ago.
    fn is_silent(&self, now: u64) -> bool {
        let at = self.silent_at.load(Relaxed);
        at != 0 && now.wrapping_sub(at) < RETRY_MS * 1_000_000
    }

    fn welcomed(&self, welcome: &Welcome) {
        let answer = u64::from(welcome.answer_us) * 1000;
        self.answer.store(answer.min(LONGEST), Relaxed);
    }
}

fn questions() -> &'static Questions {
    &PROCESS.tenant.questions
}

fn with_places<T>(_guard: &Guard, use_them: impl FnOnce(&mut Places) -> T) -> T {
    // SAFETY: the lock is held, and no caller comes here again from within.
    use_them(unsafe { &mut *questions().places.0.get() })
}

/// The daemon has greeted this process.
pub(super) fn welcomed(welcome: &Welcome) {
    questions().welcomed(welcome);
}

/// When a `connect` that begins now stops waiting.
pub fn end_of_wait() -> u64 {
    clock::nanoseconds() + GRACE + questions().answer.load(Relaxed)
}

/// Which daemon has answered: the one of this attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answerer(u32);

impl Answerer {
    /// Is it there still? Then it has the port that it has told of: when it ends, it hangs up first.
    pub fn is_there(self) -> bool {
        let control = link().control.load(Acquire);
        let gone = libc::POLLHUP | libc::POLLERR | libc::POLLNVAL;
        let has_gone =
            control < 0 || sys::poll_one(control, 0, 0) as c_int & c_int::from(gone) != 0;
        // Else it was another one that was looked at, which has not greeted this process, or has since.
        let is_it = link().control.load(Acquire) == control
            && link().greeting.load(Acquire) == 0
            && link().epoch.load(Acquire) == self.0;
        !has_gone && is_it
    }
}

/// Asks whether a `connect` may go to another node, and who has answered. `None` when there is no daemon, or it does not
/// answer until `end`.
pub fn reach(question: Between, end: u64) -> Option<(Reached, Answerer)> {
    match ask(kind::REACH, question, end, false)? {
        (Answer::Reached(reached), answerer) => Some((reached, answerer)),
        (Answer::Caller(_), _) => None,
    }
}

/// Asks for whom the daemon opened an accepted connection. `None` as for [`reach`]. That is asked for even when it was silent a moment ago:
/// it has just shown that it runs.
pub fn who_is(question: Between, end: u64) -> Option<Caller> {
    match ask(kind::WHOIS, question, end, true)? {
        (Answer::Caller(caller), _) => Some(caller),
        (Answer::Reached(_), _) => None,
    }
}

/// A daemon that has not answered a question is not asked for a while, but by who `insists`.
fn ask(what: u16, question: Between, end: u64, insists: bool) -> Option<(Answer, Answerer)> {
    if is_disabled() || !insists && questions().is_silent(clock::nanoseconds()) {
        return None;
    }
    // A handler could ask as well, and find the places in use.
    let mask = sys::block_signals();
    let answer = ask_with_signals_blocked(what, question, end);
    sys::restore_signals(mask);
    answer
}

fn ask_with_signals_blocked(
    what: u16,
    mut question: Between,
    end: u64,
) -> Option<(Answer, Answerer)> {
    ensure();
    let mut end = end;
    if link().greeting.load(Relaxed) != 0 {
        // The daemon's time for its answer begins when it can be asked.
        if !await_greeting(clock::nanoseconds() + GREETED_WITHIN) {
            return None;
        }
        end = end.max(end_of_wait());
    }
    question.question = questions().asked.fetch_add(1, Relaxed) + 1;
    let number = question.question;
    let asked = loop {
        if let Some(asked) = put(what, &question, end)? {
            break asked;
        }
        if clock::nanoseconds() >= end {
            return None;
        }
        // All places are taken, by threads that wait for an answer.
        sys::poll_one(-1, 0, 1);
    };
    let answer = await_message(end, |guard| {
        with_places(guard, |places| places.answer(number))
    });
    if let Some(guard) = Guard::take() {
        with_places(&guard, |places| places.give_back(number));
    }
    if answer.is_none() {
        questions().silent_at.store(clock::nanoseconds(), Relaxed);
    }
    Some((answer?, asked))
}

/// Sends a question; to whom, or `None` when there is no place for its answer now. `None` at all when there is no daemon.
fn put(what: u16, question: &Between, end: u64) -> Option<Option<Answerer>> {
    let number = question.question;
    let guard = Guard::take()?;
    make_memory();
    attach(&guard);
    let control = link().control.load(Relaxed);
    if control < 0 || link().greeting.load(Relaxed) != 0 || !is_as_attached() {
        return None;
    }
    let now = clock::nanoseconds();
    if !with_places(&guard, |places| places.take(number, end, now)) {
        return Some(None);
    }
    if send_with(control, &Message::new(what, question), &[]) < 0 {
        with_places(&guard, |places| places.give_back(number));
        return None;
    }
    Some(Some(Answerer(link().epoch.load(Acquire))))
}

/// Puts an answer where who asked looks for it. Nobody waits for one that comes late.
pub(super) fn deliver(guard: &Guard, answer: Answer) {
    with_places(guard, |places| places.deliver(answer));
}

/// After fork, in the child: who asked was another process, and its daemon may answer this one.
pub(super) fn after_fork_in_child() {
    questions().silent_at.store(0, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_was_silent_is_so_for_a_while() {
        let questions = Questions::new();
        assert!(!questions.is_silent(1));
        questions.silent_at.store(5, Relaxed);
        let pause = RETRY_MS * 1_000_000;
        assert!(questions.is_silent(4 + pause) && !questions.is_silent(5 + pause));
    }

    fn reached(question: u64, ticket: u64) -> Answer {
        Answer::Reached(Reached {
            question,
            ticket,
            anchor: [0; 16],
            local: [0; 16],
            anchor_port: 0,
            reason: 0,
        })
    }

    fn ticket(places: &Places, question: u64) -> Option<u64> {
        match places.answer(question)? {
            Answer::Reached(reached) => Some(reached.ticket),
            Answer::Caller(_) => None,
        }
    }

    #[test]
    fn each_who_asks_finds_the_own_answer() {
        let mut places = Places::new();
        assert!(places.take(1, 100, 10) && places.take(2, 100, 10));
        assert_eq!(ticket(&places, 1), None);
        places.deliver(reached(2, 22));
        places.deliver(reached(1, 11));
        assert_eq!(
            (ticket(&places, 1), ticket(&places, 2)),
            (Some(11), Some(22))
        );
    }

    #[test]
    fn an_answer_that_comes_late_is_nobodys() {
        let mut places = Places::new();
        assert!(places.take(1, 100, 10));
        places.give_back(1);
        places.deliver(reached(1, 11));
        assert!(places.take(2, 200, 101));
        assert_eq!((ticket(&places, 1), ticket(&places, 2)), (None, None));
        // A question has a number: 0 is in no message, and in each free place.
        places.deliver(reached(0, 9));
        assert_eq!(ticket(&places, 0), None);
    }

    #[test]
    fn one_too_many_waits_until_a_place_is_free() {
        let mut places = Places::new();
        for question in 1..=PLACES as u64 {
            assert!(places.take(question, 100, 10));
        }
        assert!(!places.take(99, 100, 100));
        // Given back, or of one that was cancelled while it waited.
        places.give_back(7);
        assert!(places.take(99, 100, 100));
        assert!(!places.take(100, 200, 100));
        assert!(places.take(100, 200, 101));
    }
}
