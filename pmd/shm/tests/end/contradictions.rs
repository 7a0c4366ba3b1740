//! What the other end writes may contradict itself, and what its anchor tells. A step comes to its end all the same; and what has said
//! that there is something for a step does not say so any more, once that has found nothing: a call that waits would go round between
//! the two for ever, whatever time limit it has.

use crate::pair::{Gave, Program, RING, Wire, stream, with_buffers};
use libc::POLLRDHUP;
use proptest::prelude::*;
use rdsock_shm::end::bit::{IN, OUT};
use rdsock_shm::end::{How, Kernel, Received, Sent, State};
use rdsock_shm::layout::{NOT_SWITCHED, mark, phase, want};
use rdsock_shm::reason::Reason;
use std::sync::atomic::Ordering::Relaxed;

/// Calls on the anchor that one step makes at most. A look takes many tokens.
const MOST_CALLS: u32 = 1000;

/// What the other end does, to its words or to its anchor.
#[derive(Clone, Copy, Debug)]
enum Lie {
    Mark(u32),
    Want(u32),
    /// In what it was asked by this end, which it answers.
    Asked(u32),
    /// From where it reads.
    Tail(u64),
    /// Behind what this end has received.
    Head(u64),
    /// The same, or never.
    SwitchAt(Option<u64>),
    Wakes(u32),
    Stop(u64),
    Ready(u32),
    Slip(usize),
    Urgent,
    End(Option<i32>),
}

/// What the victim does.
#[derive(Clone, Copy, Debug)]
enum Step {
    Lie(Lie),
    Send(usize),
    Receive(usize, How),
    Look,
    NoteEnd(bool),
    Leave,
    ShutSending,
}

fn lies() -> impl Strategy<Value = Lie> {
    let position = || prop_oneof![4 => 0..4_u64, 2 => 0..2 * RING as u64, 1 => any::<u64>()];
    let wants = || {
        let bits = [
            0,
            want::LEAVE,
            want::CLOSED,
            want::SHUT,
            want::DEMOTED,
            want::WAKE,
        ];
        prop_oneof![4 => prop::sample::select(bits.to_vec()), 1 => any::<u32>()]
    };
    prop_oneof![
        6 => (0..8_u32).prop_map(Lie::Mark),
        2 => wants().prop_map(Lie::Want),
        1 => wants().prop_map(Lie::Asked),
        1 => position().prop_map(Lie::Tail),
        3 => position().prop_map(Lie::Head),
        3 => prop::option::of(position()).prop_map(Lie::SwitchAt),
        1 => prop_oneof![0..4_u32, any::<u32>()].prop_map(Lie::Wakes),
        1 => position().prop_map(Lie::Stop),
        1 => (0..2_u32).prop_map(Lie::Ready),
        3 => (1..4_usize).prop_map(Lie::Slip),
        2 => Just(Lie::Urgent),
        2 => prop_oneof![Just(None), Just(Some(libc::ECONNRESET)), Just(Some(libc::ETIMEDOUT))]
            .prop_map(Lie::End),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let how =
        (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(peek, discard, whole)| How {
            peek,
            discard,
            whole,
        });
    let step = prop_oneof![
        8 => lies().prop_map(Step::Lie),
        3 => prop_oneof![1..4_usize, Just(2 * RING)].prop_map(Step::Send),
        4 => (1..40_usize, how).prop_map(|(len, how)| Step::Receive(len, how)),
        1 => Just(Step::Look),
        1 => any::<bool>().prop_map(Step::NoteEnd),
        1 => Just(Step::Leave),
        1 => Just(Step::ShutSending),
    ];
    prop::collection::vec(step, 1..16)
}

fn tell(victim: &Program<'_>, lie: Lie) {
    let (out, incoming) = (victim.shared.out(), victim.shared.incoming());
    let received = victim.shared.rx().tail.load(Relaxed);
    match lie {
        Lie::Mark(marks) => incoming.producer.mark.store(marks, Relaxed),
        Lie::Want(wants) => out.bytes.want.store(wants, Relaxed),
        Lie::Asked(wants) => incoming.bytes.want.store(wants, Relaxed),
        Lie::Tail(ahead) => {
            let tail = victim.shared.tx().seen_tail.load(Relaxed);
            out.consumer.tail.store(tail.wrapping_add(ahead), Relaxed);
        }
        Lie::Head(ahead) => incoming
            .producer
            .head
            .store(received.wrapping_add(ahead), Relaxed),
        Lie::SwitchAt(ahead) => {
            let at = ahead.map_or(NOT_SWITCHED, |ahead| received.wrapping_add(ahead));
            incoming.producer.switch_at.store(at, Relaxed);
        }
        Lie::Wakes(wakes) => incoming.producer.wakes.store(wakes, Relaxed),
        Lie::Stop(stop) => out.consumer.stop.store(stop, Relaxed),
        Lie::Ready(ready) => out.consumer.ready.store(ready, Relaxed),
        Lie::Slip(len) => victim.side.slip(&vec![b's'; len]),
        Lie::Urgent => victim.side.slip_urgent(),
        Lie::End(error) => victim.side.slip_end(error),
    }
}

/// What a question says of these events, as the shim asks it.
fn readiness(victim: &Program<'_>, events: i16) -> i16 {
    victim.poll();
    let state = State::of(&victim.shared);
    let bits = state.asks_kernel(events, false).map_or(0, |asks| {
        victim.side.bits() & (asks | libc::POLLERR | libc::POLLHUP)
    });
    let kernel = Kernel {
        bits,
        least: 1,
        behind: 0,
    };
    state.readiness(&kernel, RING as u64, events)
}

fn receive(victim: &Program<'_>, len: usize, how: How) -> Result<(), TestCaseError> {
    let (mut bytes, mut done) = (vec![0; len], 0);
    let received = with_buffers(bytes.as_mut_ptr(), len, |to| {
        victim.end().receive(to, how, &mut done)
    });
    let is_receivable = victim.shared.may_receive();
    prop_assert!(
        received != Received::Nothing || !is_receivable,
        "it may receive, and finds nothing"
    );
    if let Received::Few(position) = received {
        let (shared, more) = (&victim.shared, victim.shared.has_bytes_after(position));
        prop_assert!(!more && !shared.has_ended(), "there is more than a few");
    }
    Ok(())
}

/// Sends; true when that has found the ring full.
fn is_full_for(victim: &Program<'_>, len: usize) -> bool {
    let (bytes, mut done) = (vec![b'v'; len], 0);
    with_buffers(bytes.as_ptr().cast_mut(), len, |from| {
        matches!(victim.end().send(from, &mut done), Sent::Full)
    })
}

fn send(victim: &Program<'_>, len: usize) -> Result<(), TestCaseError> {
    prop_assert!(
        !is_full_for(victim, len) || !victim.shared.is_sendable(1),
        "it may send, and there is no room"
    );
    Ok(())
}

fn step(victim: &Program<'_>, step: Step) -> Result<(), TestCaseError> {
    victim.side.count_calls(MOST_CALLS);
    match step {
        Step::Lie(lie) => tell(victim, lie),
        Step::Send(len) => send(victim, len)?,
        Step::Receive(len, how) => receive(victim, len, how)?,
        Step::Look => victim.end().look(),
        // Only of an anchor that has.
        Step::NoteEnd(error) if victim.side.has_heard_end() => victim.end().note_end(error),
        Step::NoteEnd(_) => {}
        Step::Leave => victim.end().leave(),
        Step::ShutSending => {
            victim.end().shut_sending();
        }
    }
    Ok(())
}

/// Both ends, before either has sent anything.
fn with_unswitched(with: impl FnOnce(&Program<'_>, &Program<'_>)) {
    stream(false, |attacker, victim| {
        victim.side.count_calls(MOST_CALLS);
        with(attacker, victim);
    });
}

#[test]
fn urgent_data_before_the_switch_is_passed_over() {
    with_unswitched(|other, victim| {
        victim.side.slip_urgent();
        assert_eq!(victim.receive(10, How::default()), Gave::Nothing);
        victim.side.slip(b"a");
        let peek = How {
            peek: true,
            ..How::default()
        };
        assert_eq!(victim.receive(10, peek), Gave::Bytes(b"a".into()));
        assert_eq!(victim.receive(10, How::default()), Gave::Bytes(b"a".into()));
        // Its position counts, so the ring is found behind it.
        assert_eq!(other.send(b"b"), Some(1));
        assert_eq!(victim.receive(10, How::default()), Gave::Bytes(b"b".into()));
    });
}

/// As words that contradict each other again and again would have it look without an end.
#[test]
fn an_anchor_that_can_not_be_counted_breaks_the_stream() {
    with_unswitched(|_, victim| {
        victim.side.lose_count();
        victim.side.slip(b"a");
        assert_eq!(victim.receive(10, How::default()), Gave::Broken);
        assert_eq!(victim.side.broken(), Some(Reason::Violation));
    });
}

#[test]
fn an_end_before_the_switch_is_none() {
    with_unswitched(|attacker, victim| {
        attacker
            .shared
            .out()
            .producer
            .mark
            .store(mark::FIN, Relaxed);
        assert_eq!(readiness(victim, IN | POLLRDHUP), 0);
        assert!(!victim.shared.may_receive());
        assert_eq!(victim.receive(10, How::default()), Gave::Nothing);
        // Beside one that lies behind bytes which never come.
        attacker.shared.out().producer.head.store(5, Relaxed);
        attacker.shared.out().producer.switch_at.store(5, Relaxed);
        assert_eq!(readiness(victim, IN | POLLRDHUP), POLLRDHUP);
        assert!(!victim.shared.may_receive());
        assert_eq!(victim.receive(10, How::default()), Gave::Nothing);
    });
}

/// Its anchor has ended, and then it says that the rest comes there: it takes nothing more off the ring.
#[test]
fn nobody_waits_for_room_in_a_ring_that_was_left() {
    for ends_anchor in [false, true] {
        stream(true, |attacker, victim| {
            if ends_anchor {
                victim.side.slip_end(None);
                victim.end().look();
            }
            attacker
                .shared
                .out()
                .producer
                .mark
                .store(mark::END, Relaxed);
            assert_eq!(readiness(victim, OUT), OUT);
            assert!(!is_full_for(victim, 2 * RING));
            assert_eq!(victim.sends_by(), phase::DEMOTED);
        });
    }
}

/// The kernel tells of what comes behind the end of a ring, so a break in the mark must not hide its end, and this end follows.
#[test]
fn a_break_behind_the_end_of_a_ring_is_the_kernels() {
    stream(true, |attacker, victim| {
        let marks = mark::END | mark::RESET;
        attacker
            .shared
            .out()
            .producer
            .mark
            .store(mark::END, Relaxed);
        assert_eq!(victim.receive(1, How::default()), Gave::Nothing);
        assert_eq!(victim.receives_by(), phase::DEMOTED);
        attacker.shared.out().producer.mark.store(marks, Relaxed);
        assert_eq!(victim.shared.marks() & mark::RESET, 0);
        victim.poll();
        assert_eq!(victim.sends_by(), phase::DEMOTED);
        assert!(!victim.shared.is_on_rings() && !victim.shared.is_reset());
    });
}

/// What can be received counts, as far as it can be.
#[test]
fn bytes_behind_others_that_never_come_are_not_unread() {
    with_unswitched(|attacker, victim| {
        let producer = &attacker.shared.out().producer;
        producer.head.store(100, Relaxed);
        producer.switch_at.store(10, Relaxed);
        victim.side.slip(b"four");
        assert_eq!(victim.end().unread(), Some(4));
    });
}

/// An end that nothing announces is the other end's process's.
#[test]
fn nobody_waits_for_room_behind_the_end_of_the_anchor() {
    stream(true, |_, victim| {
        victim.side.slip_end(None);
        victim.end().look();
        assert!(!is_full_for(victim, 2 * RING));
        assert_eq!(victim.sends_by(), phase::DEMOTED);
    });
}

/// The break comes behind bytes that the program does not receive.
#[test]
fn nobody_waits_for_room_in_a_broken_ring() {
    stream(true, |attacker, victim| {
        attacker.send(b"unread");
        attacker.end().reset(Reason::Call);
        assert!(!is_full_for(victim, 2 * RING));
        assert_eq!(
            victim.receive(10, How::default()),
            Gave::Bytes(b"unread".into())
        );
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 4 } else { 5000 }, ..ProptestConfig::default() })]

    #[test]
    fn what_is_ready_by_the_other_ends_words_is_not_found_in_vain(
        on_rings in any::<bool>(),
        steps in steps(),
    ) {
        let wire = Wire::new();
        let [one, other] = wire.sides();
        let (victim, attacker) = (Program::new(&one), Program::new(&other));
        victim.map();
        attacker.map();
        if on_rings {
            for (from, to) in [(&attacker, &victim), (&victim, &attacker)] {
                from.send(b"x");
                to.receive(1, How::default());
            }
        }
        for what in steps {
            step(&victim, what)?;
        }
        // A program that waits by asking, and then makes a call that may wait.
        victim.side.count_calls(MOST_CALLS);
        if readiness(&victim, IN) & IN != 0 {
            prop_assert_ne!(victim.receive(1, How::default()), Gave::Nothing, "readable in vain");
        }
        if readiness(&victim, OUT) & OUT != 0 {
            prop_assert!(!is_full_for(&victim, 1), "writable in vain");
        }
        receive(&victim, 1, How::default())?;
        send(&victim, 2 * RING)?;
    }
}
