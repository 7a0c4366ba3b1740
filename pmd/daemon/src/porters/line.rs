//! Users of whom a porter may take up a load, in turn.

use std::collections::VecDeque;

use super::MOST;
use crate::shares::Known;

/// Porters of all those together who are not [`Known`]: one attacker may be very many of them.
pub const OF_CROWD: usize = MOST / 2;

/// Those that are known, and the crowd, by turns.
#[derive(Debug)]
pub struct Line {
    known: Known,
    users: VecDeque<u32>,
    crowd: VecDeque<u32>,
    /// Porters that carry something for the crowd.
    of_crowd: usize,
    is_crowds_turn: bool,
}

impl Line {
    /// Nobody waits.
    pub fn new(known: Known) -> Self {
        Line {
            known,
            users: VecDeque::new(),
            crowd: VecDeque::new(),
            of_crowd: 0,
            is_crowds_turn: false,
        }
    }

    /// One more, who is not in it.
    pub fn push(&mut self, uid: u32) {
        match self.known.has(uid) {
            true => self.users.push_back(uid),
            false => self.crowd.push_back(uid),
        }
    }

    /// A porter takes up a load of this user, which it has to [put down](Self::put_down).
    pub fn pop(&mut self) -> Option<u32> {
        let has_crowd = self.takeable_of_crowd() != 0;
        let is_crowds = has_crowd && (self.is_crowds_turn || self.users.is_empty());
        self.is_crowds_turn = !is_crowds;
        if is_crowds {
            self.of_crowd += 1;
            return self.crowd.pop_front();
        }
        self.users.pop_front()
    }

    /// A porter has carried a load of this user.
    pub fn put_down(&mut self, uid: u32) {
        if !self.known.has(uid) {
            self.of_crowd -= 1;
        }
    }

    /// How many may be taken up now.
    pub fn len(&self) -> usize {
        self.users.len() + self.takeable_of_crowd()
    }

    fn takeable_of_crowd(&self) -> usize {
        self.crowd.len().min(OF_CROWD - self.of_crowd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crowd_has_half_of_the_porters_at_most() {
        let mut line = Line::new([1, 2].into_iter().collect());
        let crowd = 100..100 + MOST as u32;
        crowd.clone().for_each(|uid| line.push(uid));
        assert_eq!(line.len(), OF_CROWD);
        line.push(1);
        line.push(2);
        let first: Vec<_> = std::iter::from_fn(|| line.pop()).take(4).collect();
        assert_eq!(first, [1, 100, 2, 101]);
        let taken = std::iter::from_fn(|| line.pop()).count();
        assert_eq!((taken, line.len()), (OF_CROWD - 2, 0));
        // Who is known is served nevertheless,
        line.push(1);
        assert_eq!((line.len(), line.pop()), (1, Some(1)));
        line.put_down(1);
        assert_eq!(line.pop(), None);
        // and the crowd when it has put something down.
        line.put_down(100);
        assert_eq!(line.pop(), Some(100 + OF_CROWD as u32));
    }
}
