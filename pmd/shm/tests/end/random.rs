//! Any order of operations, against a model that is nothing but the bytes: none is lost, doubled or out of order, no token
//! reaches a program, a short receive means that nothing more is there, and a short send that there is no room.

use crate::pair::{Gave, Program, RING, Wire};
use proptest::prelude::*;
use rdsock_shm::end::{How, Limits, Nap, Sleeper};
use rdsock_shm::layout::{phase, want};
use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;

#[derive(Clone, Copy, Debug)]
enum Step {
    Map,
    Send(usize),
    Receive(usize),
    Peek(usize),
    Poll,
    Ask,
    Sleep,
    Nap,
    Look,
    Leave,
    Abandon,
}

fn steps() -> impl Strategy<Value = Vec<(usize, Step)>> {
    let len = || prop_oneof![4 => 1..200_usize, 1 => 1..2 * RING];
    let step = prop_oneof![
        2 => Just(Step::Map),
        8 => len().prop_map(Step::Send),
        8 => len().prop_map(Step::Receive),
        2 => len().prop_map(Step::Peek),
        3 => Just(Step::Poll),
        3 => Just(Step::Ask),
        3 => Just(Step::Sleep),
        3 => Just(Step::Nap),
        1 => Just(Step::Look),
        1 => Just(Step::Leave),
        1 => Just(Step::Abandon),
    ];
    prop::collection::vec((0..2_usize, step), 1..80)
}

/// Those that a program has, or so low that each call crosses them.
fn limits() -> impl Strategy<Value = Limits> {
    let low = (1..300_u64, 1..300_u64).prop_map(|(piece, chunk)| Limits {
        piece,
        chunk,
        ..Limits::DEFAULT
    });
    prop_oneof![Just(Limits::DEFAULT), low]
}

/// What a program has sent and the other has not received, in both directions.
struct Model {
    bytes: [VecDeque<u8>; 2],
    next: u8,
}

impl Model {
    fn send(
        &mut self,
        ends: &[Program<'_>; 2],
        number: usize,
        len: usize,
    ) -> Result<(), TestCaseError> {
        let bytes: Vec<u8> = (0..len)
            .map(|at| self.next.wrapping_add(at as u8))
            .collect();
        let end = &ends[number];
        let sent = end.send(&bytes).expect("no direction ends here");
        self.bytes[number].extend(&bytes[..sent]);
        self.next = self.next.wrapping_add(sent as u8);
        if sent < len {
            let no_room = match end.sends_by() {
                phase::RING => !end.shared.is_sendable(1),
                _ => end.side.is_full(),
            };
            prop_assert!(
                no_room,
                "{sent} of {len} bytes were sent, and there is room"
            );
        }
        Ok(())
    }

    fn receive(
        &mut self,
        ends: &[Program<'_>; 2],
        number: usize,
        len: usize,
        peek: bool,
    ) -> Result<(), TestCaseError> {
        let there = &mut self.bytes[1 - number];
        let how = How {
            peek,
            ..How::default()
        };
        let got = match ends[number].receive(len, how) {
            Gave::Bytes(got) => got,
            Gave::Nothing => Vec::new(),
            Gave::Broken => return Err(TestCaseError::fail("broken")),
        };
        let expected: Vec<u8> = there.iter().copied().take(got.len()).collect();
        prop_assert_eq!(&got, &expected, "wrong bytes");
        if !peek {
            there.drain(..got.len());
        }
        let left = if peek {
            there.len() - got.len()
        } else {
            there.len()
        };
        if got.len() < len && !waits_for_peer(ends, number) {
            prop_assert_eq!(
                left,
                0,
                "a receive of {} of {} bytes was short, and more is there",
                got.len(),
                len
            );
        }
        Ok(())
    }
}

/// True while what was in a ring that this end has abandoned comes with the sender's next call.
fn waits_for_peer(ends: &[Program<'_>; 2], number: usize) -> bool {
    let peer = &ends[1 - number];
    peer.side.is_mapped() && (peer.shared.peer_has_left() || peer.shared.has_rest())
}

fn step(
    model: &mut Model,
    ends: &[Program<'_>; 2],
    number: usize,
    step: Step,
) -> Result<bool, TestCaseError> {
    let program = &ends[number];
    let on_rings = program.side.is_mapped() && program.shared.is_on_rings();
    match step {
        Step::Map => program.map(),
        Step::Send(len) => model.send(ends, number, len)?,
        Step::Receive(len) => model.receive(ends, number, len, false)?,
        Step::Peek(len) => model.receive(ends, number, len, true)?,
        Step::Poll => program.poll(),
        Step::Ask if on_rings => {
            program.end().ask_for_bytes(want::WAKE);
            program.end().ask_for_space(want::WAKE);
        }
        Step::Sleep if on_rings => drop(Sleeper::enter(&program.end())),
        Step::Nap if on_rings => drop(Nap::enter(&program.end())),
        Step::Look if on_rings => program.end().look(),
        Step::Leave if on_rings => program.end().leave(),
        Step::Abandon if on_rings => {
            // It may say that it can't: then the stream is reset.
            if program.end().abandon().is_err() {
                return Ok(false);
            }
            program.end().finished(rdsock_shm::reason::Reason::Passed);
        }
        _ => {}
    }
    Ok(true)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 4 } else { 2000 }, ..ProptestConfig::default() })]

    #[test]
    fn no_order_of_calls_loses_or_adds_a_byte(limits in limits(), steps in steps()) {
        let wire = Wire::with(limits);
        let [one, other] = wire.sides();
        let ends = [Program::new(&one), Program::new(&other)];
        let mut model = Model { bytes: Default::default(), next: 0 };
        for (number, what) in steps {
            if !step(&mut model, &ends, number, what)? {
                return Ok(());
            }
            for end in &ends {
                prop_assert_eq!(end.side.broken(), None, "after {:?}", what);
                prop_assert!(end.has_said_changes(), "{:?} says nothing of what it changes", what);
            }
            for number in [0, 1].into_iter().filter(|number| ends[*number].side.is_mapped()) {
                // FIONREAD, where the kernel does not know.
                let unread = ends[number].end().unread().filter(|_| !waits_for_peer(&ends, number));
                let there = model.bytes[1 - number].len() as u64;
                prop_assert_eq!(unread.unwrap_or(there), there, "can be received after {:?}", what);
            }
        }
        // Everything arrives in the end, and nothing but that.
        for _ in 0..20 {
            for number in [0, 1] {
                ends[number].poll();
                model.receive(&ends, number, 2 * RING, false)?;
            }
        }
        for number in [0, 1] {
            prop_assert!(model.bytes[number].is_empty(), "bytes are missing");
            let drained = ends[number].shared.rx().phase.load(Relaxed) == phase::DEMOTED;
            if drained {
                prop_assert_eq!(ends[number].side.on_anchor(), 0);
            }
        }
    }
}
