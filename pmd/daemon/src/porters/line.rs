//! Users of whom a porter may take up a load, in turn.

use std::collections::VecDeque;

use super::{MOST, OF_CROWD};
use crate::shares::Known;

/// For whom a porter carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crew {
    /// For those that are known.
    OfKnown,
    /// For the crowd.
    OfCrowd,
}

impl Crew {
    /// Both.
    pub const ALL: [Crew; 2] = [Crew::OfKnown, Crew::OfCrowd];

    /// Porters of it, at most.
    pub fn most(self) -> usize {
        match self {
            Crew::OfKnown => MOST,
            Crew::OfCrowd => OF_CROWD,
        }
    }
}

/// Those that are known, and the crowd.
#[derive(Debug)]
pub struct Line {
    known: Known,
    users: VecDeque<u32>,
    crowd: VecDeque<u32>,
    /// Porters that carry something for the crowd.
    of_crowd: usize,
}

impl Line {
    /// Nobody waits.
    pub fn new(known: Known) -> Self {
        Line {
            known,
            users: VecDeque::new(),
            crowd: VecDeque::new(),
            of_crowd: 0,
        }
    }

    /// One more, who is not in it.
    pub fn push(&mut self, uid: u32) {
        match self.known.has(uid) {
            true => self.users.push_back(uid),
            false => self.crowd.push_back(uid),
        }
    }

    /// A porter of this crew takes up a load of this user, which it has to [put down](Self::put_down).
    pub fn pop(&mut self, crew: Crew) -> Option<u32> {
        match crew {
            Crew::OfKnown => self.users.pop_front(),
            Crew::OfCrowd if self.len(crew) == 0 => None,
            Crew::OfCrowd => {
                self.of_crowd += 1;
                self.crowd.pop_front()
            }
        }
    }

    /// A porter has carried a load of this user.
    pub fn put_down(&mut self, uid: u32) {
        if !self.known.has(uid) {
            self.of_crowd -= 1;
        }
    }

    /// How many may be taken up now.
    pub fn len(&self, crew: Crew) -> usize {
        match crew {
            Crew::OfKnown => self.users.len(),
            Crew::OfCrowd => self.crowd.len().min(OF_CROWD - self.of_crowd),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Crew::{OfCrowd, OfKnown};
    use super::*;

    #[test]
    fn the_crowd_has_so_many_porters_at_most() {
        let mut line = Line::new([1, 2].into_iter().collect());
        let crowd = 100..100 + MOST as u32;
        crowd.clone().for_each(|uid| line.push(uid));
        assert_eq!((line.len(OfCrowd), line.len(OfKnown)), (OF_CROWD, 0));
        line.push(1);
        line.push(2);
        assert_eq!(
            [(); 3].map(|()| line.pop(OfKnown)),
            [Some(1), Some(2), None]
        );
        assert_eq!(line.pop(OfCrowd), Some(100));
        let taken = std::iter::from_fn(|| line.pop(OfCrowd)).count();
        assert_eq!((taken, line.len(OfCrowd)), (OF_CROWD - 1, 0));
        // Who is known is served nevertheless,
        line.push(1);
        assert_eq!((line.len(OfKnown), line.pop(OfKnown)), (1, Some(1)));
        line.put_down(1);
        assert_eq!(line.pop(OfCrowd), None);
        // and the crowd when it has put something down.
        line.put_down(100);
        assert_eq!(line.pop(OfCrowd), Some(100 + OF_CROWD as u32));
    }
}
