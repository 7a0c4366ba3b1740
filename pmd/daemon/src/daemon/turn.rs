//! A turn of the control thread: what is done in it, how much, and how long that takes.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;

use crate::agenda::Token;
use crate::found::Found;
use crate::journal::Journal;
use crate::own;
use crate::porters::Here;
use crate::shares::{Known, Turns};

/// Orders events so that the one that was served last comes last. Those for which there was no time are told of in the same order
/// again: else they would stand behind one that happens again and again for good.
pub(super) fn put_behind(events: &mut [(Token, EpollFlags)], served: Token) {
    events.sort_by_key(|(token, _)| (*token <= served, *token));
}

/// A kind of [`Work`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Here,
    Requests,
    Event,
}

impl Kind {
    /// How many kinds come before another one when this one was last.
    pub(super) fn behind(self, other: Self) -> u8 {
        (other as u8 + 2 - self as u8) % 3
    }
}

/// What is done for a user.
#[expect(
    clippy::large_enum_variant,
    reason = "it is done at once, and never stored"
)]
pub(super) enum Work {
    /// An event of its connections.
    Event(Token, EpollFlags),
    /// What a connection has left from an earlier turn.
    Requests(u64),
    /// A look, or what porters have found.
    Here(Here<Found>),
}

impl Work {
    /// What it is called in the log.
    pub(super) fn what(&self) -> &'static str {
        match self {
            Work::Event(Token::Listener(_), _) => "calls",
            Work::Event(..) => "an event",
            Work::Requests(_) => "requests",
            Work::Here(Here::Look(..)) => "a look",
            Work::Here(Here::Found(_)) => "what a porter has found",
        }
    }
}

/// What is done in a turn: so many things, and no further one when these have taken long. However much there is
/// to do, what is new is looked at then.
#[derive(Debug)]
pub(super) struct Portion {
    left: usize,
    end: Instant,
}

impl Portion {
    const MOST: usize = 64;
    const TIME: Duration = Duration::from_micros(200);
    /// The same while several users use this thread: about as long as one thing takes. Who comes meanwhile waits for that, and
    /// is first then. It costs a turn for each thing.
    const TIME_OF_MANY: Duration = Duration::from_micros(25);

    pub(super) fn new(of_many: bool) -> Self {
        let time = match of_many {
            true => Self::TIME_OF_MANY,
            false => Self::TIME,
        };
        Portion {
            left: Self::MOST,
            end: Instant::now() + time,
        }
    }

    /// May one more be taken? It is counted. The first one always may.
    pub(super) fn has_room(&mut self) -> bool {
        let is_late = self.left < Self::MOST && Instant::now() >= self.end;
        let has_room = self.left > 0 && !is_late;
        self.left -= usize::from(has_room);
        has_room
    }
}

/// Connections with work left from an earlier turn, each in it once, however often it asks.
#[derive(Debug)]
pub(super) struct Busy {
    pub(super) turns: Turns<u64>,
    queued: HashSet<u64>,
}

impl Busy {
    pub(super) fn new(known: Known) -> Self {
        Busy {
            turns: Turns::new(known),
            queued: HashSet::new(),
        }
    }

    pub(super) fn push(&mut self, uid: u32, id: u64) {
        if self.queued.insert(id) {
            self.turns.push(uid, id);
        }
    }

    /// User and connection.
    pub(super) fn next<O: Ord>(&mut self, order: impl Fn(u32) -> O) -> Option<(u32, u64)> {
        let next = self.turns.next(order)?;
        self.queued.remove(&next.1);
        Some(next)
    }
}

/// A turn of the control thread.
#[derive(Debug)]
pub(super) struct Turn {
    start: Instant,
    /// Anchors that were looked for in it.
    pub(super) arrivals: usize,
    pub(super) last: Instant,
    longest: (Duration, String),
}

impl Turn {
    /// A part of a turn that is worth a name.
    const WORTH: Duration = Duration::from_millis(5);

    pub(super) fn start() -> Self {
        let now = Instant::now();
        Turn {
            start: now,
            arrivals: 0,
            last: now,
            longest: (Self::WORTH, String::new()),
        }
    }

    /// How long the last thing took, which was this.
    pub(super) fn did(&mut self, what: impl FnOnce() -> String) -> Duration {
        let now = Instant::now();
        let took = now.duration_since(self.last);
        self.last = now;
        if took > self.longest.0 {
            self.longest = (took, what());
        }
        took
    }

    pub(super) fn end(&self, journal: &mut Journal) {
        journal.turn(self.start.elapsed(), own::processor_time(), &self.longest.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_portion_ends_by_number_or_by_time() {
        let mut portion = Portion::new(false);
        portion.end += Duration::from_secs(60);
        let taken = std::iter::from_fn(|| portion.has_room().then_some(()));
        assert_eq!(taken.count(), Portion::MOST);
        let mut late = Portion::new(false);
        late.end = Instant::now();
        assert_eq!((late.has_room(), late.has_room()), (true, false));
    }

    #[test]
    fn events_that_happen_again_and_again_are_served_in_turn() {
        let mut served = Token::Signals;
        let mut next = || {
            let told = [3, 1, 2].map(Token::Connection);
            let mut told = told.map(|token| (token, EpollFlags::EPOLLIN));
            put_behind(&mut told, served);
            served = told[0].0;
            served
        };
        let all = [(); 4].map(|()| next());
        assert_eq!(all, [1, 2, 3, 1].map(Token::Connection));
    }

    #[test]
    fn kinds_of_work_take_turns() {
        let kinds = [Kind::Here, Kind::Requests, Kind::Event];
        let mut last = Kind::Event;
        let mut next = || {
            last = kinds
                .into_iter()
                .min_by_key(|kind| last.behind(*kind))
                .unwrap();
            last
        };
        assert_eq!([next(), next(), next()], kinds);
        assert_eq!(next(), Kind::Here);
    }

    #[test]
    fn who_asks_often_is_served_once_in_turn() {
        let mut busy = Busy::new(Known::default());
        for id in [1, 1, 2, 1, 3] {
            busy.push(7, id);
        }
        assert_eq!(busy.turns.len(), 3);
        assert_eq!(busy.next(|uid| uid), Some((7, 1)));
        // Who is not done comes last.
        busy.push(7, 1);
        let rest = std::iter::from_fn(|| busy.next(|uid| uid));
        let rest: Vec<u64> = rest.map(|(_, id)| id).collect();
        assert_eq!(rest, [2, 3, 1]);
    }
}
