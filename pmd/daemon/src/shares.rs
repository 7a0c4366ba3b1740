//! Who has used how much of the control thread lately: who has used little of it is served first.
//!
//! A user with a thousand connections that always ask for something gets what the others leave; one who asks for
//! something now and then waits for what is being done, and for nobody's queue. The loop of the daemon and the porters
//! call this.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// What was used counts for half after this time.
const HALVED: Duration = Duration::from_millis(10);
/// Less than this is forgotten.
const LITTLE: Duration = Duration::from_micros(10);

/// See the module's text.
#[derive(Debug)]
pub struct Shares {
    used: HashMap<u32, Duration>,
    halved: Instant,
}

impl Shares {
    /// Nobody has used anything.
    pub fn new(now: Instant) -> Self {
        Shares {
            used: HashMap::new(),
            halved: now,
        }
    }

    /// A user has used this much, until `now`.
    pub fn charge(&mut self, uid: u32, time: Duration, now: Instant) {
        let halvings = now.saturating_duration_since(self.halved).as_nanos() / HALVED.as_nanos();
        if halvings != 0 {
            self.halved = now;
            let divisor = 1 << halvings.min(30);
            self.used.retain(|_, used| {
                *used /= divisor;
                *used >= LITTLE
            });
        }
        *self.used.entry(uid).or_default() += time;
    }

    /// How many users have used some of it lately.
    pub fn users(&self) -> usize {
        self.used.len()
    }

    /// What a user has used lately.
    pub fn of(&self, uid: u32) -> Duration {
        self.used.get(&uid).copied().unwrap_or_default()
    }
}

/// Things that wait, each on behalf of a user: those of one user in their order.
#[derive(Debug)]
pub struct Turns<T> {
    waiting: HashMap<u32, VecDeque<T>>,
    len: usize,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Turns {
            waiting: HashMap::new(),
            len: 0,
        }
    }
}

impl<T> Turns<T> {
    /// One more, behind those of the same user.
    pub fn push(&mut self, uid: u32, thing: T) {
        self.waiting.entry(uid).or_default().push_back(thing);
        self.len += 1;
    }

    /// The least `order` of the users of whom something waits.
    pub fn first<O: Ord>(&self, order: impl Fn(u32) -> O) -> Option<O> {
        self.waiting.keys().map(|uid| order(*uid)).min()
    }

    /// The first one of the user of whom `order` is the least, and that user.
    pub fn next<O: Ord>(&mut self, order: impl Fn(u32) -> O) -> Option<(u32, T)> {
        let uid = *self.waiting.keys().min_by_key(|uid| order(**uid))?;
        let things = self.waiting.get_mut(&uid)?;
        let thing = things.pop_front()?;
        if things.is_empty() {
            self.waiting.remove(&uid);
        }
        self.len -= 1;
        Some((uid, thing))
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_come_first() {
        let mut turns = Turns::default();
        for (uid, thing) in [(7, 1), (8, 2), (7, 3), (9, 4)] {
            turns.push(uid, thing);
        }
        assert_eq!(turns.len(), 4);
        let order = |uid| [9, 7, 8].iter().position(|of| *of == uid);
        assert_eq!(turns.first(order), Some(Some(0)));
        let all: Vec<_> = std::iter::from_fn(|| turns.next(order)).collect();
        assert_eq!(all, [(9, 4), (7, 1), (7, 3), (8, 2)]);
        assert!(turns.is_empty());
    }

    #[test]
    fn what_was_used_is_forgotten_by_and_by() {
        let start = Instant::now();
        let mut shares = Shares::new(start);
        shares.charge(7, Duration::from_micros(400), start);
        shares.charge(8, Duration::from_micros(30), start);
        assert_eq!(shares.of(7), Duration::from_micros(400));
        assert_eq!(shares.of(9), Duration::ZERO);
        assert_eq!(shares.users(), 2);
        shares.charge(9, Duration::from_micros(1), start + 2 * HALVED);
        assert_eq!(shares.of(7), Duration::from_micros(100));
        assert_eq!(shares.of(8), Duration::ZERO);
        shares.charge(9, Duration::ZERO, start + 1000 * HALVED);
        assert!(shares.used.len() == 1 && shares.of(7).is_zero());
    }
}
