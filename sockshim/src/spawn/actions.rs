//! What a spawned program gets under another number: what `posix_spawn_file_actions_adddup2` was told, for all objects of
//! file actions, which hold that where the shim does not look. Used by `spawn.rs`; threads may prepare objects at once.

use crate::sys;
use libc::{c_int, c_void};
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering::*};

/// Actions that are remembered at once, of all objects.
const MOST: usize = 1 << 16;

/// A descriptor that a program gets under another number.
struct Action {
    /// The object, while it says so; else null.
    of: AtomicPtr<c_void>,
    /// The descriptor and its new number, in the upper and the lower half.
    copy: AtomicU64,
    /// Which of an object's actions comes first.
    turn: AtomicU32,
}

impl Action {
    fn numbers(&self) -> (c_int, c_int) {
        let copy = self.copy.load(Relaxed);
        ((copy >> 32) as c_int, copy as u32 as c_int)
    }
}

/// The actions of all objects.
#[derive(Debug)]
pub struct Actions {
    /// Mapped with the first action.
    table: AtomicPtr<Action>,
    /// One more than the highest entry ever used.
    high: AtomicU32,
    turns: AtomicU32,
    /// 1 when an action could not be noted: a spawned program may get anything then.
    missed: AtomicU32,
}

impl Actions {
    /// None.
    pub const fn new() -> Self {
        Actions {
            table: AtomicPtr::new(std::ptr::null_mut()),
            high: AtomicU32::new(0),
            turns: AtomicU32::new(0),
            missed: AtomicU32::new(0),
        }
    }

    fn entry(&self, index: usize) -> Option<&Action> {
        let table = self.table.load(Acquire);
        // SAFETY: the table has so many zeroed entries, of atomics, and is never unmapped.
        (index < MOST && !table.is_null()).then(|| unsafe { &*table.add(index) })
    }

    fn entries(&self) -> impl Iterator<Item = &Action> {
        (0..self.high.load(Acquire) as usize).map_while(|index| self.entry(index))
    }

    fn of(&self, object: *const c_void) -> impl Iterator<Item = &Action> {
        self.entries()
            .filter(move |action| action.of.load(Acquire).cast_const() == object)
    }

    fn make_table(&self) {
        let size = MOST * size_of::<Action>();
        if self.table.load(Acquire).is_null()
            && let Some(table) = sys::map(-1, size)
            && self
                .table
                .compare_exchange(std::ptr::null_mut(), table.cast(), AcqRel, Relaxed)
                .is_err()
        {
            // SAFETY: just mapped, and another thread's stands in its place.
            unsafe { sys::unmap(table, size) };
        }
    }

    /// Notes an action of an object.
    pub fn note(&self, object: *mut c_void, fd: c_int, new: c_int) {
        self.make_table();
        let copy = u64::from(fd as u32) << 32 | u64::from(new as u32);
        let turn = self.turns.fetch_add(1, Relaxed);
        // Taken under a name that is nobody's until the rest is there.
        let taken = std::ptr::without_provenance_mut(1);
        for index in 0..MOST {
            let Some(action) = self.entry(index) else {
                break;
            };
            let null = std::ptr::null_mut();
            if action
                .of
                .compare_exchange(null, taken, AcqRel, Relaxed)
                .is_ok()
            {
                action.copy.store(copy, Relaxed);
                action.turn.store(turn, Relaxed);
                action.of.store(object, Release);
                self.high.fetch_max(index as u32 + 1, AcqRel);
                return;
            }
        }
        self.missed.store(1, Relaxed);
    }

    /// True when there was no room for an action: any descriptor may be copied then.
    pub fn has_missed_some(&self) -> bool {
        self.missed.load(Relaxed) != 0
    }

    /// An object begins, or ends.
    pub fn forget(&self, object: *mut c_void) {
        for action in self.entries() {
            let _ = action
                .of
                .compare_exchange(object, std::ptr::null_mut(), AcqRel, Relaxed);
        }
    }

    /// The new numbers that an object's actions give, with the descriptor that each was copied from at first.
    pub fn copies(&self, object: *const c_void, mut found: impl FnMut(c_int, c_int)) {
        for action in self.of(object) {
            let (mut from, new) = action.numbers();
            // It may be a copy of a copy.
            let mut turn = action.turn.load(Relaxed);
            let before = |turn: u32, from: c_int| {
                self.of(object)
                    .filter(|other| other.turn.load(Relaxed) < turn && other.numbers().1 == from)
                    .max_by_key(|other| other.turn.load(Relaxed))
            };
            while let Some(other) = before(turn, from) {
                from = other.numbers().0;
                turn = other.turn.load(Relaxed);
            }
            found(from, new);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ptr::without_provenance_mut;

    /// What an object's actions come to, in order of the new numbers.
    fn copies(actions: &Actions, object: usize) -> Vec<(c_int, c_int)> {
        let mut all = Vec::new();
        actions.copies(without_provenance_mut(object), |from, new| {
            all.push((from, new))
        });
        all.sort_by_key(|(_, new)| *new);
        all
    }

    fn note(actions: &Actions, object: usize, list: &[(c_int, c_int)]) {
        for (fd, new) in list {
            actions.note(without_provenance_mut(object), *fd, *new);
        }
    }

    const ONE: usize = 0x1000;
    const OTHER: usize = 0x2000;

    #[test]
    fn each_object_has_its_own() {
        let actions = Actions::new();
        assert_eq!(copies(&actions, ONE), []);
        note(&actions, ONE, &[(7, 3)]);
        note(&actions, OTHER, &[(8, 3)]);
        assert_eq!(copies(&actions, ONE), [(7, 3)]);
        assert_eq!(copies(&actions, OTHER), [(8, 3)]);
        actions.forget(without_provenance_mut(ONE));
        assert_eq!(copies(&actions, ONE), []);
        assert_eq!(copies(&actions, OTHER), [(8, 3)]);
    }

    #[test]
    fn a_copy_of_a_copy_is_one_of_the_first() {
        let actions = Actions::new();
        note(&actions, ONE, &[(7, 3), (3, 4), (9, 3), (4, 5)]);
        // 3 was taken anew when 4 had been made of it.
        assert_eq!(copies(&actions, ONE), [(7, 3), (9, 3), (7, 4), (7, 5)]);
        // Freed places are taken again, in another order than the actions'.
        actions.forget(without_provenance_mut(ONE));
        note(&actions, OTHER, &[(1, 2)]);
        note(&actions, ONE, &[(2, 6), (6, 7)]);
        assert_eq!(copies(&actions, ONE), [(2, 6), (2, 7)]);
    }

    #[test]
    fn threads_note_at_once() {
        let actions = Actions::new();
        std::thread::scope(|scope| {
            for object in 1..5 {
                let actions = &actions;
                scope.spawn(move || {
                    for new in 0..500 {
                        note(actions, object * 0x1000, &[(1000 + new, new)]);
                    }
                });
            }
        });
        let expected: Vec<_> = (0..500).map(|new| (1000 + new, new)).collect();
        for object in 1..5 {
            assert_eq!(copies(&actions, object * 0x1000), expected);
        }
        assert!(!actions.has_missed_some());
    }

    #[test]
    fn one_too_many_is_not_overlooked() {
        let actions = Actions::new();
        actions.make_table();
        for index in 0..MOST {
            let place = actions.entry(index).map(|action| &action.of);
            assert!(place.is_some());
            place.inspect(|of| of.store(without_provenance_mut(OTHER), Relaxed));
        }
        note(&actions, ONE, &[(1, 2)]);
        assert!(actions.has_missed_some());
    }
}
