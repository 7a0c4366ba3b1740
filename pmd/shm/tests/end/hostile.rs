//! The other end writes what it likes into every word that it can reach, at any time: this end neither panics nor hangs, and
//! a look at readiness has an answer. What the program is given is the other end's own affair.

use crate::pair::{Program, RING, Wire, stream};
use proptest::prelude::*;
use rdsock_shm::end::{How, Kernel, Nap, Sleeper, State};
use rdsock_shm::layout::{Direction, want};
use rdsock_shm::wake::WAKE_BYTE;
use std::sync::atomic::Ordering::Relaxed;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A word of 8 bytes, or the half of one.
    Write {
        word: usize,
        value: u64,
    },
    Slip(usize),
    Send(usize),
    Receive(usize, bool),
    Poll,
    Ask,
    Sleep,
    Nap,
    Look,
    Leave,
    Abandon,
    Shut,
    Close,
}

fn values() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..2 * RING as u64,
        Just(u64::MAX),
        (1_u64 << 63) - 3..(1 << 63) + 3,
        any::<u64>(),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..10_usize, values()).prop_map(|(word, value)| Step::Write { word, value }),
        1 => (1..100_usize).prop_map(Step::Slip),
        6 => (1..2 * RING).prop_map(Step::Send),
        6 => (1..2 * RING, any::<bool>()).prop_map(|(len, peek)| Step::Receive(len, peek)),
        3 => Just(Step::Poll),
        2 => Just(Step::Ask),
        2 => Just(Step::Sleep),
        2 => Just(Step::Nap),
        2 => Just(Step::Look),
        1 => Just(Step::Leave),
        1 => Just(Step::Abandon),
        1 => Just(Step::Shut),
        1 => Just(Step::Close),
    ];
    prop::collection::vec(step, 1..60)
}

/// Writes as the other end may: its own producer's line, its own consumer's line, and the requests.
fn write(incoming: &Direction, out: &Direction, word: usize, value: u64) {
    let half = value as u32;
    match word {
        0 => incoming.producer.head.store(value, Relaxed),
        1 => incoming.producer.origin.store(value, Relaxed),
        2 => incoming.producer.switch_at.store(value, Relaxed),
        3 => incoming.producer.mark.store(half & 7, Relaxed),
        4 => incoming.producer.wakes.store(half, Relaxed),
        5 => out.consumer.tail.store(value, Relaxed),
        6 => out.consumer.ready.store(half & 1, Relaxed),
        7 => out.consumer.stop.store(value, Relaxed),
        8 => out.bytes.want.store(half, Relaxed),
        _ => {
            out.bytes.place.store(half, Relaxed);
            // RINGING in this end's own requests is taken by the other end.
            incoming.space.want.store(half, Relaxed);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 4 } else { 1000 }, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_the_other_end_writes_ends_in_a_panic_or_a_hang(steps in steps()) {
        let wire = Wire::new();
        let [one, other] = wire.sides();
        let (victim, attacker) = (Program::new(&one), Program::new(&other));
        victim.map();
        attacker.map();
        for step in steps {
            let end = victim.end();
            match step {
                Step::Write { word, value } => {
                    write(attacker.shared.out(), attacker.shared.incoming(), word, value);
                }
                Step::Slip(len) => one.slip(&vec![rdsock_shm::wake::WAKE_BYTE; len]),
                Step::Send(len) => {
                    victim.send(&vec![7; len]);
                }
                Step::Receive(len, peek) => {
                    victim.receive(len, How { peek, ..How::default() });
                }
                Step::Poll => victim.poll(),
                Step::Ask => {
                    end.ask_for_bytes(want::WAKE | want::BELL);
                    end.ask_for_space(want::WAKE);
                }
                Step::Sleep => drop(Sleeper::enter(&end)),
                Step::Nap => drop(Nap::enter(&end)),
                Step::Look => end.look(),
                Step::Leave => end.leave(),
                Step::Abandon => {
                    let _ = end.abandon();
                }
                Step::Shut => {
                    end.shut_sending();
                }
                Step::Close => end.close(false),
            }
            let kernel = Kernel { bits: 0, least: 1, behind: 0 };
            State::of(&victim.shared).readiness(&kernel, RING as u64, -1);
        }
    }
}

/// How many tokens there are is the other end's word, and it may send them faster than they are taken: a look takes some, so that
/// the call that looks comes to an end.
#[test]
fn a_look_takes_no_tokens_without_end() {
    const ALL: usize = 100_000;
    stream(true, |a, b| {
        a.side.set_room(2 * ALL);
        a.shared.out().producer.wakes.fetch_add(ALL as u32, Relaxed);
        assert_eq!(a.send_on_anchor(&[WAKE_BYTE; ALL]), ALL);
        b.end().look();
        let left = b.side.on_anchor();
        assert!((ALL - 10_000..ALL).contains(&left), "{left} are left");
        assert_eq!(b.end().outstanding() as usize, left);
        (0..100).for_each(|_| b.end().look());
        assert_eq!((b.side.on_anchor(), b.end().outstanding()), (0, 0));
        assert!(!b.shared.is_reset());
    });
}
