//! Who holds an end: the last close is known as the last, whatever became of the others.

use crate::pair::stream;
use proptest::prelude::*;
use rdsock_shm::layout::HOLDERS;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering::Relaxed;

/// The numbers of processes. The first has the end from the beginning.
const FIRST: u32 = 100;
const CHILD: u32 = 101;

/// A new end, that one process holds.
fn held(test: impl FnOnce(&crate::pair::Program<'_>)) {
    stream(true, |a, _| {
        a.shared.page().holders.store(1, Relaxed);
        a.end().hold(FIRST);
        test(a);
    });
}

/// A child that has said who it is.
fn fork(a: &crate::pair::Program<'_>, pid: u32) {
    a.shared.count_holder();
    a.end().hold(pid);
}

fn count(a: &crate::pair::Program<'_>) -> u32 {
    a.shared.page().holders.load(Relaxed)
}

#[test]
fn one_process_is_the_last() {
    held(|a| assert!(a.end().is_last_to_close(FIRST)));
}

#[test]
fn a_child_that_just_ends_holds_nothing() {
    held(|a| {
        fork(a, CHILD);
        assert!(!a.end().is_last_to_close(FIRST));
        a.side.ends(CHILD);
        assert!(a.end().is_last_to_close(FIRST));
        assert_eq!(count(a), 1);
    });
}

#[test]
fn a_child_that_closes_holds_nothing() {
    held(|a| {
        fork(a, CHILD);
        assert!(!a.end().is_last_to_close(CHILD));
        a.shared.let_go(CHILD);
        assert_eq!(count(a), 1);
        assert!(a.end().is_last_to_close(FIRST));
    });
}

/// A server that hands each connection to a child.
#[test]
fn a_child_that_is_left_alone_is_the_last() {
    held(|a| {
        fork(a, CHILD);
        assert!(!a.end().is_last_to_close(FIRST));
        a.shared.let_go(FIRST);
        assert!(a.end().is_last_to_close(CHILD));
    });
}

/// It was killed before it could say who it is, perhaps; or it has just come to be.
#[test]
fn who_has_not_said_who_it_is_holds() {
    held(|a| {
        a.shared.count_holder();
        assert!(!a.end().is_last_to_close(FIRST));
        a.end().hold(CHILD);
        a.side.ends(CHILD);
        assert!(a.end().is_last_to_close(FIRST));
    });
}

#[test]
fn a_child_that_never_came_to_be_holds_nothing() {
    held(|a| {
        a.shared.count_holder();
        a.shared.uncount_holder();
        assert!(a.end().is_last_to_close(FIRST));
    });
}

#[test]
fn of_two_that_close_at_once_one_is_the_last() {
    held(|a| {
        fork(a, CHILD);
        let first = a.end().is_last_to_close(FIRST);
        let second = a.end().is_last_to_close(CHILD);
        assert_eq!((first, second), (false, true));
        a.shared.let_go(FIRST);
        a.shared.let_go(CHILD);
        assert_eq!(count(a), 0);
    });
}

#[test]
fn a_child_that_runs_another_program_may_hold_until_it_is_known_not_to() {
    held(|a| {
        fork(a, CHILD);
        a.shared.go(CHILD);
        assert!(!a.end().is_last_to_close(FIRST), "it may have failed to");
        a.side.runs_another(CHILD);
        assert!(a.end().is_last_to_close(FIRST));
    });
    held(|a| {
        fork(a, CHILD);
        a.shared.go(CHILD);
        // It has failed to, or the other program has asked for the end.
        a.shared.stay(CHILD);
        a.side.runs_another(CHILD);
        assert!(!a.end().is_last_to_close(FIRST));
        a.shared.go(CHILD);
        a.end().hold(CHILD);
        assert!(!a.end().is_last_to_close(FIRST));
    });
}

#[test]
fn the_table_has_room_for_those_that_run() {
    held(|a| {
        for pid in 0..3 * HOLDERS as u32 {
            fork(a, 1000 + pid);
            a.side.ends(1000 + pid);
        }
        assert!(a.end().is_last_to_close(FIRST));
        // More than there is room for: one that is not known to have ended counts.
        for pid in 0..2 * HOLDERS as u32 {
            fork(a, 2000 + pid);
        }
        for pid in 0..2 * HOLDERS as u32 {
            a.side.ends(2000 + pid);
        }
        assert!(!a.end().is_last_to_close(FIRST));
    });
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Fork(bool),
    Register,
    Close,
    End,
    Exec,
    Fail,
}

fn steps() -> impl Strategy<Value = Vec<(usize, Step)>> {
    let step = prop_oneof![
        any::<bool>().prop_map(Step::Fork),
        Just(Step::Register),
        Just(Step::Close),
        Just(Step::End),
        Just(Step::Exec),
        Just(Step::Fail),
    ];
    prop::collection::vec((0..6_usize, step), 1..60)
}

proptest! {
    /// Nobody is told to be the last while another holds; and who is, where all others have said who they are, is told so.
    #[test]
    fn whoever_is_the_last_is_alone(steps in steps()) {
        stream(true, |a, _| {
            a.shared.page().holders.store(1, Relaxed);
            a.end().hold(FIRST);
            let (mut alive, mut silent, mut next) = (vec![FIRST], BTreeSet::new(), FIRST);
            for (which, step) in steps {
                let Some(pid) = alive.get(which % alive.len().max(1)).copied() else { break };
                match step {
                    Step::Fork(says) if alive.len() < HOLDERS => {
                        next += 1;
                        a.shared.count_holder();
                        if says {
                            a.end().hold(next);
                        } else {
                            silent.insert(next);
                        }
                        alive.push(next);
                    }
                    Step::Register => {
                        if silent.remove(&pid) {
                            a.end().hold(pid);
                        }
                    }
                    Step::Close | Step::End if silent.contains(&pid) => {}
                    Step::Close => {
                        let is_last = a.end().is_last_to_close(pid);
                        assert_eq!(is_last, alive.len() == 1 && silent.is_empty());
                        a.shared.let_go(pid);
                        alive.retain(|other| *other != pid);
                    }
                    Step::End => {
                        a.side.ends(pid);
                        alive.retain(|other| *other != pid);
                    }
                    Step::Exec => a.shared.go(pid),
                    Step::Fail => a.shared.stay(pid),
                    Step::Fork(_) => {}
                }
            }
        });
    }
}
