//! The lock of a half: one owner at a time, also when one has died.

use crate::model::{check, take};
use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU64;
use loom::thread;
use rdsock_shm::lock::{Owner, Taken, release, take_from_dead, try_take};
use std::sync::Arc;

struct Half {
    lock: AtomicU64,
    /// What the lock protects; loom reports a race on it.
    state: UnsafeCell<u32>,
}

// SAFETY: the cell is used under the lock, which is what is tested.
unsafe impl Sync for Half {}
// SAFETY: as above.
unsafe impl Send for Half {}

fn half() -> Arc<Half> {
    Arc::new(Half {
        lock: AtomicU64::new(0),
        state: UnsafeCell::new(0),
    })
}

impl Half {
    fn add(&self) {
        // SAFETY: loom checks that nobody else is here.
        self.state.with_mut(|state| unsafe { *state += 1 });
    }
}

fn owner(number: u32) -> Owner {
    Owner::new(number, 16)
}

#[test]
fn owners_take_turns() {
    check(3, || {
        let half = half();
        let twice = |half: &Half, number| {
            for _ in 0..2 {
                let taken = take(&half.lock, owner(number));
                half.add();
                release(&half.lock, taken);
            }
        };
        let other = {
            let half = half.clone();
            thread::spawn(move || twice(&half, 1))
        };
        twice(&half, 2);
        other.join().unwrap();
        // SAFETY: the other one has ended.
        half.state.with(|state| assert_eq!(unsafe { *state }, 4));
    });
}

#[test]
fn a_nested_taker_leaves_the_lock_to_the_outer_one() {
    check(3, || {
        let half = half();
        let other = {
            let half = half.clone();
            thread::spawn(move || {
                let taken = take(&half.lock, owner(1));
                half.add();
                release(&half.lock, taken);
            })
        };
        let outer = take(&half.lock, owner(2));
        half.add();
        let inner = take(&half.lock, owner(2));
        assert_eq!(inner, Taken::Nested);
        half.add();
        release(&half.lock, inner);
        half.add();
        release(&half.lock, outer);
        other.join().unwrap();
    });
}

/// `stream::take_slowly`, where the owner may have ended.
fn take_or_inherit(half: &Half, me: Owner, dead: u32) -> bool {
    loop {
        match try_take(&half.lock, me) {
            Ok(_) => return false,
            Err(word) if Owner::pid_of(word) == dead => {
                if take_from_dead(&half.lock, word, me) {
                    return true;
                }
            }
            Err(_) => thread::yield_now(),
        }
    }
}

#[test]
fn one_of_two_takes_the_lock_of_a_dead_owner() {
    check(3, || {
        let half = half();
        // The owner of before dies in its critical section.
        assert_eq!(try_take(&half.lock, owner(7)), Ok(Taken::Outer));
        half.add();
        let other = {
            let half = half.clone();
            thread::spawn(move || {
                let inherited = take_or_inherit(&half, owner(1), 7);
                half.add();
                release(&half.lock, Taken::Outer);
                inherited
            })
        };
        let mine = take_or_inherit(&half, owner(2), 7);
        half.add();
        release(&half.lock, Taken::Outer);
        let theirs = other.join().unwrap();
        assert!(mine != theirs, "one of them finds the dead owner's lock");
    });
}
