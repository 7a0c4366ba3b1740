//! Who has used how much of the control thread lately: who has used little of it is served first.
//!
//! A user with a thousand connections that always ask for something gets what the others leave; one who asks for
//! something now and then waits for what is being done, and for nobody's queue. The loop of the daemon and the porters
//! call this.
//!
//! One attacker may be very many users (`/etc/subuid`), each of whom has used next to nothing. So only those that are [`Known`]
//! stand for themselves. All others are a crowd, which is one user beside these; within it, too, who has used the least is first.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What was used counts for half after this time.
const HALVED: Duration = Duration::from_millis(10);
/// Less than this is forgotten.
const LITTLE: Duration = Duration::from_micros(10);
/// Of the crowd, only so many are compared, those that have waited longest: else the choice would take longer than what is done.
const COMPARED: usize = 64;

/// Users who stand for themselves: those with a control socket of their own.
#[derive(Clone, Debug, Default)]
pub struct Known(Arc<HashSet<u32>>);

impl FromIterator<u32> for Known {
    fn from_iter<I: IntoIterator<Item = u32>>(users: I) -> Self {
        Known(Arc::new(users.into_iter().collect()))
    }
}

impl Known {
    /// Is this one of them?
    pub fn has(&self, uid: u32) -> bool {
        self.0.contains(&uid)
    }

    /// How many there are but for these.
    pub fn but_for(&self, others: &[u32]) -> usize {
        let counted = self.0.iter().filter(|uid| !others.contains(uid));
        counted.count()
    }
}

/// What was used lately: by a user, or by the whole crowd for one of it; and by the user alone.
pub type Used = (Duration, Duration);

/// See the module's text.
#[derive(Debug)]
pub struct Shares {
    known: Known,
    used: HashMap<u32, Duration>,
    by_crowd: Duration,
    halved: Instant,
}

impl Shares {
    /// Nobody has used anything.
    pub fn new(now: Instant, known: Known) -> Self {
        Shares {
            known,
            used: HashMap::new(),
            by_crowd: Duration::ZERO,
            halved: now,
        }
    }

    /// A user has used this much, until `now`.
    pub fn charge(&mut self, uid: u32, time: Duration, now: Instant) {
        let halvings = now.saturating_duration_since(self.halved).as_nanos() / HALVED.as_nanos();
        if halvings != 0 {
            self.halved = now;
            let divisor = 1 << halvings.min(30);
            self.by_crowd /= divisor;
            self.used.retain(|_, used| {
                *used /= divisor;
                *used >= LITTLE
            });
        }
        if !self.known.has(uid) {
            self.by_crowd += time;
        }
        *self.used.entry(uid).or_default() += time;
    }

    /// How many users have used some of it lately, beside this one.
    pub fn users_beside(&self, uid: u32) -> usize {
        self.used.len() - usize::from(self.used.contains_key(&uid))
    }

    /// What a user has used lately.
    pub fn of(&self, uid: u32) -> Used {
        let own = self.used.get(&uid).copied().unwrap_or_default();
        match self.known.has(uid) {
            true => (own, own),
            false => (self.by_crowd, own),
        }
    }
}

/// Things that wait, each on behalf of a user: those of one user in their order. Of users who have used as much, the one who has
/// waited longest comes first.
#[derive(Debug)]
pub struct Turns<T> {
    known: Known,
    waiting: HashMap<u32, VecDeque<T>>,
    /// Users of whom something waits, who has waited longest first: those that are known, and the others.
    line: VecDeque<u32>,
    crowd: VecDeque<u32>,
    len: usize,
}

impl<T> Turns<T> {
    /// Nothing waits.
    pub fn new(known: Known) -> Self {
        Turns {
            known,
            waiting: HashMap::new(),
            line: VecDeque::new(),
            crowd: VecDeque::new(),
            len: 0,
        }
    }

    fn line_of(&mut self, uid: u32) -> &mut VecDeque<u32> {
        match self.known.has(uid) {
            true => &mut self.line,
            false => &mut self.crowd,
        }
    }

    /// One more, behind those of the same user.
    pub fn push(&mut self, uid: u32, thing: T) {
        let things = self.waiting.entry(uid).or_default();
        let is_new = things.is_empty();
        things.push_back(thing);
        self.len += 1;
        if is_new {
            self.line_of(uid).push_back(uid);
        }
    }

    /// The user of whom `order` is the least, and its place in its line.
    fn least<O: Ord>(&self, order: impl Fn(u32) -> O) -> Option<(O, u32, usize)> {
        let places = |line: &VecDeque<u32>, most| {
            let users = line.iter().copied().enumerate().take(most);
            let orders = users.map(|(at, uid)| (order(uid), uid, at));
            orders.min_by(|(one, ..), (other, ..)| one.cmp(other))
        };
        let firsts = [
            places(&self.line, usize::MAX),
            places(&self.crowd, COMPARED),
        ];
        let firsts = firsts.into_iter().flatten();
        firsts.min_by(|(one, ..), (other, ..)| one.cmp(other))
    }

    /// The least `order` of the users of whom something waits.
    pub fn first<O: Ord>(&self, order: impl Fn(u32) -> O) -> Option<O> {
        self.least(order).map(|(order, ..)| order)
    }

    /// The first one of the user of whom `order` is the least, and that user.
    pub fn next<O: Ord>(&mut self, order: impl Fn(u32) -> O) -> Option<(u32, T)> {
        let (_, uid, at) = self.least(order)?;
        let things = self.waiting.get_mut(&uid)?;
        let thing = things.pop_front()?;
        let is_last = things.is_empty();
        if is_last {
            self.waiting.remove(&uid);
        }
        let line = self.line_of(uid);
        line.remove(at);
        if !is_last {
            line.push_back(uid);
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
        let mut turns = Turns::new(Known::default());
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
        let mut shares = Shares::new(start, (7..10).collect());
        shares.charge(7, Duration::from_micros(400), start);
        shares.charge(8, Duration::from_micros(30), start);
        let of = |shares: &Shares, uid| shares.of(uid).0;
        assert_eq!(of(&shares, 7), Duration::from_micros(400));
        assert_eq!(of(&shares, 9), Duration::ZERO);
        assert_eq!((shares.users_beside(9), shares.users_beside(8)), (2, 1));
        shares.charge(9, Duration::from_micros(1), start + 2 * HALVED);
        assert_eq!(of(&shares, 7), Duration::from_micros(100));
        assert_eq!(of(&shares, 8), Duration::ZERO);
        shares.charge(9, Duration::ZERO, start + 1000 * HALVED);
        assert!(shares.used.len() == 1 && of(&shares, 7).is_zero());
    }

    #[test]
    fn of_those_who_have_used_as_much_who_has_waited_longest_comes_first() {
        let mut turns = Turns::new([5].into_iter().collect());
        let users = 10 * COMPARED as u32;
        // All but one always have something there.
        (100..100 + users).for_each(|uid| turns.push(uid, ()));
        turns.push(7, ());
        let (mut served, order) = (HashSet::new(), |_| 0);
        while !served.contains(&7) {
            let (uid, ()) = turns.next(order).unwrap();
            assert!(served.insert(uid), "{uid} comes before others again");
            turns.push(uid, ());
        }
        // Who is known is seen behind however many.
        turns.push(5, ());
        assert_eq!(turns.next(|uid| uid != 5), Some((5, ())));
    }

    #[test]
    fn the_crowd_is_one_user_beside_those_who_are_known() {
        let now = Instant::now();
        let mut shares = Shares::new(now, [7].into_iter().collect());
        (100..200).for_each(|uid| shares.charge(uid, LITTLE, now));
        shares.charge(7, 50 * LITTLE, now);
        assert!(shares.of(7) < shares.of(100) && shares.of(7) < shares.of(300));
        assert!(shares.of(300) < shares.of(100));
        shares.charge(7, 51 * LITTLE, now);
        assert!(shares.of(300) < shares.of(7));
    }
}
