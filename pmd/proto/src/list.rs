//! Lists of table places without allocation: the links lie in an array beside the table.
//!
//! One [`Links`] serves any number of [`List`]s of one purpose; a place is in at most one of them.
//! All operations take constant time.

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
    linked: bool,
}

/// First and last place of a list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct List {
    first: u32,
    last: u32,
    len: u32,
}

impl List {
    pub(crate) const fn new() -> Self {
        List {
            first: NONE,
            last: NONE,
            len: 0,
        }
    }

    pub(crate) fn front(&self) -> Option<usize> {
        (self.first != NONE).then_some(self.first as usize)
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// The links of all places, for lists of one purpose.
pub(crate) struct Links(Vec<Link>);

impl Links {
    pub(crate) fn new(places: usize) -> Self {
        Links(vec![
            Link {
                previous: NONE,
                next: NONE,
                linked: false
            };
            places
        ])
    }

    /// Puts a place at the end, unless it is in a list already.
    pub(crate) fn push(&mut self, list: &mut List, place: usize) {
        if self.0[place].linked {
            return;
        }
        self.0[place] = Link {
            previous: list.last,
            next: NONE,
            linked: true,
        };
        match list.last {
            NONE => list.first = place as u32,
            last => self.0[last as usize].next = place as u32,
        }
        list.last = place as u32;
        list.len += 1;
    }

    /// Takes a place out of its list, which must be `list`, if it is in one.
    pub(crate) fn remove(&mut self, list: &mut List, place: usize) {
        let Link {
            previous,
            next,
            linked,
        } = self.0[place];
        if !linked {
            return;
        }
        match previous {
            NONE => list.first = next,
            previous => self.0[previous as usize].next = next,
        }
        match next {
            NONE => list.last = previous,
            next => self.0[next as usize].previous = previous,
        }
        self.0[place].linked = false;
        list.len -= 1;
    }

    pub(crate) fn pop(&mut self, list: &mut List) -> Option<usize> {
        let place = list.front()?;
        self.remove(list, place);
        Some(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        /// A list behaves as a queue from which things can also be taken out of the middle.
        #[test]
        fn behaves_as_a_queue(steps in prop::collection::vec((0..3_u8, 0..8_usize), 0..200)) {
            let (mut links, mut list, mut model) = (Links::new(8), List::new(), VecDeque::new());
            for (step, place) in steps {
                match step {
                    0 => {
                        links.push(&mut list, place);
                        if !model.contains(&place) { model.push_back(place); }
                    }
                    1 => {
                        links.remove(&mut list, place);
                        model.retain(|other| *other != place);
                    }
                    _ => prop_assert_eq!(links.pop(&mut list), model.pop_front()),
                }
                prop_assert_eq!(list.front(), model.front().copied());
                prop_assert_eq!(list.len() as usize, model.len());
                prop_assert_eq!(links.0[place].linked, model.contains(&place));
            }
        }
    }
}
