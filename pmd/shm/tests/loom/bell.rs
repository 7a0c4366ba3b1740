//! Bells: no bit is lost, and no sleeper.

use crate::model::{Pipe, check};
use loom::thread;
use rdsock_shm::bell::{end_sleep, is_rung, ring, start_sleep, take};
use rdsock_shm::layout::Bell;
use std::sync::Arc;

struct Board {
    bell: Bell,
    /// The anchor that the epoll instance sleeps on.
    anchor: Pipe,
}

fn board() -> Arc<Board> {
    Arc::new(Board {
        bell: Bell::default(),
        anchor: Pipe::new(),
    })
}

/// `Stream::answer`, of a request for a bell.
fn ring_and_wake(board: &Board, bit: usize) {
    if ring(&board.bell, bit) {
        board.anchor.send(&[1]);
    }
}

fn bits(board: &Board) -> Vec<usize> {
    let mut all = Vec::new();
    take(&board.bell, |word, bits| {
        all.extend(
            (0..64)
                .filter(|bit| bits >> bit & 1 == 1)
                .map(|bit| word * 64 + bit),
        );
    });
    all
}

/// `epoll::wait`: sleeps until all of `wanted` were found, each at least once.
fn wait_for(board: &Board, wanted: &[usize]) {
    let mut found = bits(board);
    while !wanted.iter().all(|bit| found.contains(bit)) {
        start_sleep(&board.bell.sleepers);
        if !is_rung(&board.bell) {
            board.anchor.sleep();
            board.anchor.receive(1);
        }
        end_sleep(&board.bell.sleepers);
        found.extend(bits(board));
    }
}

#[test]
fn two_ringers_wake_a_sleeper() {
    check(3, || {
        let board = board();
        let ringers = [3, 70].map(|bit| {
            let board = board.clone();
            thread::spawn(move || ring_and_wake(&board, bit))
        });
        wait_for(&board, &[3, 70]);
        for ringer in ringers {
            ringer.join().unwrap();
        }
        assert!(bits(&board).iter().all(|bit| [3, 70].contains(bit)));
    });
}

#[test]
fn a_bit_that_is_set_again_while_it_is_taken_is_found_again() {
    check(3, || {
        let board = board();
        let ringer = {
            let board = board.clone();
            thread::spawn(move || {
                ring(&board.bell, 5);
                ring(&board.bell, 6);
            })
        };
        let mut found = bits(&board);
        ringer.join().unwrap();
        found.extend(bits(&board));
        found.sort_unstable();
        found.dedup();
        assert_eq!(found, [5, 6]);
    });
}

#[test]
fn two_threads_sleep_on_one_bell() {
    check(2, || {
        let board = board();
        let sleeper = {
            let board = board.clone();
            thread::spawn(move || {
                // Whoever finds the bit tells the other one, as the kernel does for an epoll
                // instance that stays ready.
                wait_once(&board);
            })
        };
        let ringer = {
            let board = board.clone();
            thread::spawn(move || ring_and_wake(&board, 9))
        };
        wait_once(&board);
        sleeper.join().unwrap();
        ringer.join().unwrap();
    });
}

/// Sleeps until the bell was rung, and leaves bit and byte for the others.
fn wait_once(board: &Board) {
    start_sleep(&board.bell.sleepers);
    if !is_rung(&board.bell) {
        board.anchor.sleep();
    }
    end_sleep(&board.bell.sleepers);
}
