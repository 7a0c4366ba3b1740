//! Questions: the whole answer is what the words say, and the quick ones never contradict it.

use crate::pair::{Program, RING, Wire};
use libc::{POLLERR, POLLHUP, POLLIN, POLLOUT, POLLPRI, POLLRDHUP};
use proptest::prelude::*;
use rdsock_shm::end::{Incoming, Kernel, Outgoing, State, Then, Told};
use rdsock_shm::layout::{anchor, mark, phase};
use std::sync::atomic::Ordering::Relaxed;

const ALL: i16 = POLLIN | POLLOUT | POLLRDHUP;
const NOTHING: Kernel = Kernel {
    bits: 0,
    least: 1,
    behind: 0,
};

fn of(set: impl FnOnce(&Program<'_>)) -> (State, i16) {
    let wire = Wire::new();
    let [one, _] = wire.sides();
    let program = Program::new(&one);
    program.shared.rx().phase.store(phase::RING, Relaxed);
    program.shared.tx().phase.store(phase::RING, Relaxed);
    set(&program);
    let state = State::of(&program.shared);
    (state, state.readiness(&NOTHING, RING as u64, ALL))
}

#[test]
fn an_idle_stream_is_writable() {
    let (state, ready) = of(|_| {});
    assert_eq!(
        state.incoming,
        Incoming::Ring {
            bytes: 0,
            then: Then::More
        }
    );
    assert_eq!((state.anchor, ready), (Told::Nothing, POLLOUT));
}

#[test]
fn bytes_and_an_end_are_readable() {
    let head = |program: &Program<'_>, at| {
        program.shared.incoming().producer.head.store(at, Relaxed);
    };
    assert_eq!(of(|program| head(program, 9)).1, POLLIN | POLLOUT);
    let fin = |program: &Program<'_>| {
        let marks = &program.shared.incoming().producer.mark;
        marks.store(mark::FIN, Relaxed);
    };
    assert_eq!(of(fin).1, POLLIN | POLLRDHUP | POLLOUT);
    // An own end beside it is a hang-up, and what can't be waits for a receive to find it.
    let both = |program: &Program<'_>| {
        fin(program);
        program.shared.tx().shut.store(1, Relaxed);
    };
    assert_eq!(of(both).1, POLLIN | POLLRDHUP | POLLOUT | POLLHUP);
    let (state, ready) = of(|program| head(program, RING as u64 + 1));
    assert_eq!(
        (state.incoming, ready),
        (Incoming::Impossible, POLLIN | POLLOUT)
    );
}

#[test]
fn a_broken_stream_is_everything_at_once() {
    let broken = |program: &Program<'_>| {
        program.shared.rx().phase.store(phase::RESET, Relaxed);
        program.shared.tx().phase.store(phase::RESET, Relaxed);
    };
    assert_eq!(of(broken).1, ALL | POLLHUP | POLLERR);
    let told = |program: &Program<'_>| {
        broken(program);
        program.shared.rx().anchor.store(anchor::ERROR, Relaxed);
    };
    assert_eq!(of(told).1, ALL | POLLHUP);
}

#[test]
fn the_kernel_is_asked_for_what_it_has_and_for_no_more() {
    let (state, _) = of(|_| {});
    assert_eq!(state.asks_kernel(ALL, false), None);
    assert_eq!(state.asks_kernel(0, false), Some(0), "for its end alone");
    let (state, _) = of(|program| program.shared.tx().phase.store(phase::ANCHOR, Relaxed));
    assert_eq!(state.asks_kernel(ALL, false), Some(POLLOUT));
    let (state, _) = of(|program| {
        let shared = &program.shared;
        shared.rx().phase.store(phase::SWITCHING, Relaxed);
    });
    assert_eq!(state.asks_kernel(ALL, false), Some(POLLIN | POLLRDHUP));
}

/// The other end has closed, and the program's own bytes still go to the kernel, which alone knows of the reset that they bring.
#[test]
fn the_kernel_is_asked_for_errors_of_what_it_sends_behind_the_end() {
    let sends_to_kernel = |program: &Program<'_>| {
        program.shared.tx().phase.store(phase::ANCHOR, Relaxed);
    };
    let (state, _) = of(sends_to_kernel);
    assert_eq!(state.asks_kernel(POLLRDHUP, false), None);
    let (state, _) = of(|program| {
        sends_to_kernel(program);
        let marks = &program.shared.incoming().producer.mark;
        marks.store(mark::FIN, Relaxed);
    });
    assert_eq!(state.asks_kernel(POLLRDHUP, false), Some(0));
    let (state, _) = of(|program| {
        sends_to_kernel(program);
        program.shared.rx().anchor.store(anchor::EOF, Relaxed);
    });
    assert_eq!(state.asks_kernel(POLLRDHUP, false), Some(0));
}

/// A token on the anchor, behind the last byte before the switch, is nothing to read.
#[test]
fn a_token_before_the_ring_is_not_readable() {
    let (state, _) = of(|program| {
        let shared = &program.shared;
        shared.rx().phase.store(phase::SWITCHING, Relaxed);
        shared.rx().tail.store(7, Relaxed);
        shared.incoming().producer.switch_at.store(7, Relaxed);
        shared.incoming().producer.head.store(7, Relaxed);
    });
    let kernel = Kernel {
        bits: POLLIN,
        ..NOTHING
    };
    assert_eq!(state.readiness(&kernel, RING as u64, ALL), POLLOUT);
}

proptest! {
    /// Any words at all: the questions answer, and agree.
    #[test]
    fn quick_questions_agree_with_the_whole(
        phases in (0_u32..7, 0_u32..7),
        head in prop_oneof![0_u64..RING as u64 + 2, any::<u64>()],
        tail in prop_oneof![0_u64..RING as u64 + 2, any::<u64>()],
        switch_at in prop_oneof![0_u64..RING as u64 + 2, any::<u64>(), Just(u64::MAX)],
        bits in (any::<u32>(), 0_u32..8, 0_u32..16),
        shut in (0_u32..2, 0_u32..2),
        kernel in any::<i16>(),
        asked in any::<i16>(),
    ) {
        let (state, _) = of(|_| {});
        prop_assert_ne!(state.outgoing, Outgoing::Broken);
        let wire = Wire::new();
        let [one, _] = wire.sides();
        let program = Program::new(&one);
        let shared = &program.shared;
        shared.rx().phase.store(phases.0, Relaxed);
        shared.tx().phase.store(phases.1, Relaxed);
        shared.incoming().producer.head.store(head, Relaxed);
        shared.incoming().producer.switch_at.store(switch_at, Relaxed);
        shared.incoming().producer.mark.store(bits.1, Relaxed);
        shared.out().bytes.want.store(bits.0, Relaxed);
        shared.out().consumer.tail.store(tail, Relaxed);
        shared.rx().tail.store(tail, Relaxed);
        shared.tx().head.store(head, Relaxed);
        shared.rx().anchor.store(bits.2, Relaxed);
        shared.rx().shut.store(shut.0, Relaxed);
        shared.tx().shut.store(shut.1, Relaxed);
        let state = State::of(shared);
        let kernel = Kernel { bits: kernel, ..NOTHING };
        let ready = state.readiness(&kernel, RING as u64, ALL);
        prop_assert_eq!(ready & !(ALL | POLLHUP | POLLERR), 0);
        for asked in [ALL, POLLIN, POLLOUT, asked] {
            if let Some(usual) = shared.usual(asked) {
                prop_assert_eq!(state.asks_kernel(asked, false), None);
                prop_assert!(!state.asks_behind_ring());
                prop_assert_eq!(usual, state.readiness(&NOTHING, RING as u64, asked));
            }
        }
        if let Incoming::Ring { bytes, then } = state.incoming {
            prop_assert!(bytes <= RING as u64);
            // Where there is something to read, a receiver that spins sees it, and the other way round, but for what is on
            // the anchor behind the ring.
            let readable = ready & POLLIN != 0;
            let is_on_ring = !matches!(then, Then::Anchor { .. });
            prop_assert!(readable == shared.is_receivable() || !is_on_ring);
            prop_assert_eq!(shared.has_ended(), then != Then::More || state.anchor != Told::Nothing);
        }
        if let Outgoing::Ring { .. } = state.outgoing {
            let writable = shared.is_sendable(RING as u64 / 3);
            // A hang-up of the kernel's says nothing of the ring.
            let broken = state.readiness(&NOTHING, RING as u64, ALL) & POLLHUP != 0;
            prop_assert_eq!(ready & POLLOUT != 0, writable || broken);
        }
    }

    /// Where all is as usual but for one word, the same: and nothing is missed that is asked for.
    #[test]
    fn the_usual_answer_is_that_of_the_whole(
        word in 0_usize..9,
        value in prop_oneof![0_u32..8, any::<u32>()],
        bytes in 0_u64..RING as u64 + 2,
        room in 0_u64..RING as u64 + 2,
        asked in prop_oneof![Just(POLLIN), Just(POLLOUT), Just(POLLIN | POLLRDHUP), Just(ALL), any::<i16>()],
    ) {
        let mut usual = None;
        let (state, _) = of(|program| {
            let shared = &program.shared;
            let words = [
                &shared.rx().phase, &shared.tx().phase, &shared.rx().anchor, &shared.rx().shut, &shared.tx().shut,
                &shared.incoming().producer.mark, &shared.out().bytes.want,
            ];
            shared.rx().phase.store(phase::RING, Relaxed);
            shared.tx().phase.store(phase::RING, Relaxed);
            shared.incoming().producer.head.store(bytes, Relaxed);
            shared.tx().head.store(room, Relaxed);
            if let Some(word) = words.get(word) {
                word.store(value, Relaxed);
            }
            usual = shared.usual(asked);
        });
        if let Some(usual) = usual {
            prop_assert_eq!(state.asks_kernel(asked, false), None);
            prop_assert_eq!(usual, state.readiness(&NOTHING, RING as u64, asked));
        } else if bytes <= RING as u64 && asked & ALL != 0 && asked & POLLPRI == 0 {
            prop_assert!(word < 7, "all was as usual, and it does not say so");
        }
    }
}
