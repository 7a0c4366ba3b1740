//! Ends of directions, and what is sent to who takes nothing more.

use crate::pair::{Gave, Program, RING, Wire, stream};
use libc::{POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDHUP};
use rdsock_shm::end::{Anchor, How, Kernel, Sent, State};
use rdsock_shm::layout::{anchor, mark, phase};
use rdsock_shm::reason::Reason;
use std::sync::atomic::Ordering::Relaxed;

const PLAIN: How = How {
    peek: false,
    discard: false,
    whole: false,
};
const NOTHING: Kernel = Kernel {
    bits: 0,
    least: 1,
    behind: 0,
};

fn shut_both(end: &Program<'_>) {
    assert!(end.end().shut_sending());
    end.end().shut_receiving();
    end.end().shut_both();
}

/// The kernel answers it with a reset, as Linux does.
#[test]
fn what_is_sent_to_an_end_that_has_shut_both_ways_is_the_kernels() {
    stream(true, |a, b| {
        b.send(b"before");
        shut_both(a);
        let before = a.side.on_anchor();
        assert_eq!(b.send(b"later"), Some(5));
        assert_eq!(a.side.on_anchor() - before, 5);
        assert_eq!(b.sends_by(), phase::DEMOTED);
        assert_eq!(a.receive(100, PLAIN), Gave::Bytes(b"before".to_vec()));
        assert_eq!(a.receive(100, PLAIN), Gave::Bytes(Vec::new()));
        assert_eq!(b.receive(100, PLAIN), Gave::Bytes(Vec::new()));
    });
}

/// Both directions have ended before: TCP has no connection that a close with unread bytes could break, so neither the ring nor
/// the kernel does.
#[test]
fn a_close_behind_both_ends_breaks_nothing() {
    let wire = Wire::new();
    let [one, other] = wire.sides();
    let (a, b) = (Program::new(&one), Program::new(&other));
    a.send(b"before the ring");
    a.map();
    b.map();
    a.send(b"in the ring");
    b.send(b"x");
    assert!(b.end().shut_sending());
    shut_both(&a);
    assert_eq!(b.receives_by(), phase::SWITCHING);
    assert_ne!(b.side.on_anchor(), 0);
    (&b.side).set_linger(1 << 32);
    b.end().close(true);
    assert!(!b.side.is_cut());
    assert_eq!((&b.side).linger(), 0, "as the program has asked");
    assert_eq!(b.side.on_anchor(), 0, "the kernel would send a reset");
    assert_eq!(a.shared.marks() & mark::RESET, 0);
}

/// An error of the kernel's is told by the next call of any kind, also where a look has taken it.
#[test]
fn an_error_that_a_look_has_taken_is_told_by_a_send() {
    for has_shut in [false, true] {
        stream(true, |a, _| {
            if has_shut {
                shut_both(a);
            } else {
                a.end().leave();
            }
            assert_eq!(a.sends_by(), phase::DEMOTED);
            a.end().note_end(true);
            assert!(matches!(a.go_on(b"more", 0), Sent::Broken));
            assert!(matches!(a.go_on(b"more", 0), Sent::Kernel(None)));
            assert_eq!(a.receive(100, PLAIN), Gave::Bytes(Vec::new()));
        });
    }
}

#[test]
fn one_that_waits_for_room_hears_that_nobody_takes_anything() {
    stream(true, |a, b| {
        assert_eq!(b.send(&[7; RING + 1]), Some(RING));
        assert!(!b.shared.is_sendable(1));
        shut_both(a);
        assert!(b.shared.is_sendable(1));
        assert_eq!(b.send(b"later"), Some(5));
        assert_eq!(b.sends_by(), phase::DEMOTED);
    });
}

/// A send that has moved a part reports that, so the next call is told of the break, whichever it is.
#[test]
fn a_break_behind_a_part_is_told_by_the_next_call() {
    for next_sends in [false, true] {
        stream(true, |a, _| {
            a.shared.out().consumer.tail.store(u64::MAX / 2, Relaxed);
            assert!(matches!(a.go_on(&[7; RING + 2], 1), Sent::Broken));
            if next_sends {
                assert!(matches!(a.go_on(b"more", 0), Sent::Broken));
                assert!(matches!(a.go_on(b"more", 0), Sent::Pipe));
            } else {
                assert_eq!(a.receive(100, PLAIN), Gave::Broken);
            }
            assert_eq!(a.receive(100, PLAIN), Gave::Bytes(Vec::new()));
        });
    }
}

/// Whoever has shut both directions has not died with what it did not read.
#[test]
fn an_end_that_has_shut_both_ways_is_alive() {
    stream(true, |a, b| {
        b.send(b"before");
        shut_both(a);
        b.end().look();
        assert_eq!(b.shared.rx().anchor.load(Relaxed), anchor::EOF);
        assert_eq!(b.receive(100, PLAIN), Gave::Bytes(Vec::new()));
    });
}

/// The kernel has told of it: what the ring says of a break would be a second error.
#[test]
fn an_end_that_has_shut_both_ways_hears_of_a_break_from_the_kernel() {
    stream(true, |a, b| {
        shut_both(a);
        b.end().close(true);
        assert_ne!(
            a.shared.incoming().producer.mark.load(Relaxed) & mark::RESET,
            0
        );
        let state = State::of(&a.shared);
        let ready = state.readiness(&NOTHING, RING as u64, POLLIN);
        assert_eq!(ready & POLLERR, 0);
        assert_eq!(a.end().take_error(0), 0);
    });
}

#[test]
fn the_first_send_to_who_has_closed_is_the_kernels() {
    stream(true, |a, b| {
        a.end().close(false);
        let before = a.side.on_anchor();
        assert_eq!(b.send(b"late"), Some(4));
        assert_eq!(a.side.on_anchor() - before, 4);
        assert_eq!(b.sends_by(), phase::DEMOTED);
    });
}

#[test]
fn the_first_send_after_a_reset_is_told() {
    stream(true, |a, b| {
        b.send(b"unread");
        a.end().close(false);
        let head = b.shared.tx().head.load(Relaxed);
        assert_eq!(b.send(b"late"), None);
        assert_eq!(b.shared.tx().head.load(Relaxed), head, "nothing is taken");
        assert_eq!(b.side.broken(), Some(Reason::PeerReset));
    });
}

/// A question about readiness may have found the break on the anchor before.
#[test]
fn the_first_send_after_a_reset_is_told_of_it_with_bytes_unread_and_the_anchor_seen() {
    stream(true, |a, b| {
        a.send(b"still to be read");
        b.send(b"unread");
        a.end().close(false);
        b.end().note_end(true);
        assert_ne!(b.shared.rx().anchor.load(Relaxed) & anchor::ERROR, 0);
        assert!(matches!(b.go_on(b"late", 0), Sent::Broken));
        assert!(matches!(b.go_on(b"late", 0), Sent::Pipe));
    });
}

/// As of TCP, whatever lies on the anchor; and a token that tells of the break is no byte.
#[test]
fn what_came_before_a_break_is_received_before_the_switch_as_well() {
    for by_token in [false, true] {
        let wire = Wire::new();
        let [one, other] = wire.sides();
        let (a, b) = (Program::new(&one), Program::new(&other));
        a.map();
        b.map();
        b.side.slip(b"bytes");
        if by_token {
            a.end().reset(Reason::Bypass);
        } else {
            a.end().close(true);
        }
        assert_eq!(b.receives_by(), phase::SWITCHING);
        assert_eq!(b.receive(100, PLAIN), Gave::Bytes(b"bytes".to_vec()));
        assert_eq!(b.receive(100, PLAIN), Gave::Broken);
        assert_eq!(b.receive(100, PLAIN), Gave::Bytes(Vec::new()), "told once");
    }
}

/// Linux tells of the peer's FIN whatever is unread before it.
#[test]
fn an_end_in_the_ring_shows_behind_bytes_of_the_anchor() {
    let wire = Wire::new();
    let [one, other] = wire.sides();
    let (a, b) = (Program::new(&one), Program::new(&other));
    assert_eq!(a.send(b"early"), Some(5));
    a.map();
    b.map();
    assert_eq!(b.send(b"!"), Some(1));
    assert!(a.end().shut_sending());
    assert_eq!(b.receives_by(), phase::SWITCHING);
    let marks = b.shared.incoming().producer.mark.load(Relaxed);
    assert_eq!(marks, mark::FIN);
    let kernel = Kernel {
        bits: POLLIN,
        ..NOTHING
    };
    let ready = |b: &Program<'_>| {
        State::of(&b.shared).readiness(&kernel, RING as u64, POLLIN | POLLOUT | POLLRDHUP)
    };
    assert_eq!(ready(&b), POLLIN | POLLOUT | POLLRDHUP);
    assert!(b.end().shut_sending());
    assert_eq!(ready(&b), POLLIN | POLLOUT | POLLRDHUP | POLLHUP);
}

/// As of TCP: the socket has one error, and the first call that fails takes it.
#[test]
fn a_break_is_told_once_by_a_send_or_a_receive() {
    for sends in [false, true] {
        stream(true, |a, b| {
            b.send(b"unread");
            a.end().close(false);
            if sends {
                assert_eq!(b.send(b"x"), None);
                assert_eq!(b.receive(100, PLAIN), Gave::Bytes(Vec::new()));
            } else {
                assert_eq!(b.receive(100, PLAIN), Gave::Broken);
                assert!(!b.end().take_send_error());
            }
            assert_eq!(b.end().take_error(0), 0);
        });
    }
}

#[test]
fn a_send_hears_of_a_break_before_the_last_bytes_are_received() {
    stream(true, |a, b| {
        a.send(b"last");
        b.send(b"unread");
        a.end().close(false);
        assert_eq!(b.send(b"x"), None);
        let ready = State::of(&b.shared).readiness(&NOTHING, RING as u64, POLLIN | POLLOUT);
        assert_eq!(ready, POLLIN | POLLOUT | POLLHUP, "the error was told");
        assert_eq!(b.receive(100, PLAIN), Gave::Bytes(b"last".to_vec()));
        assert_eq!(b.receive(100, PLAIN), Gave::Bytes(Vec::new()));
    });
}

#[test]
fn a_break_behind_an_end_is_no_error_of_a_receive() {
    stream(true, |a, b| {
        b.send(b"unread");
        assert!(a.end().shut_sending());
        a.end().close(false);
        assert_eq!(b.receive(100, PLAIN), Gave::Bytes(Vec::new()));
        assert_eq!(b.end().take_error(0), libc::EPIPE);
        assert_eq!(b.end().take_error(0), 0);
    });
}

#[test]
fn nobody_is_told_of_a_break_of_what_is_over() {
    stream(true, |a, b| {
        b.send(b"unread");
        assert!(a.end().shut_sending());
        assert!(b.end().shut_sending());
        a.end().close(false);
        b.end().look();
        assert!(!b.shared.is_reset());
        let ready = State::of(&b.shared).readiness(&NOTHING, RING as u64, POLLIN | POLLOUT);
        assert_eq!(ready, POLLIN | POLLOUT | POLLHUP);
        assert_eq!(b.end().take_error(0), 0);
    });
}

/// The kernel breaks the anchor, behind the bytes that lie there.
#[test]
fn bytes_behind_the_ring_come_before_a_break() {
    stream(true, |a, b| {
        a.send(b"ring");
        b.send(b"unread");
        a.end().leave();
        assert_eq!(a.send(b" anchor"), Some(7));
        a.end().close(false);
        let marks = b.shared.incoming().producer.mark.load(Relaxed);
        assert_eq!(marks, mark::END | mark::RESET);
        assert_eq!(b.receive(100, PLAIN), Gave::Bytes(b"ring anchor".to_vec()));
    });
}

#[test]
fn a_broken_stream_has_nothing_to_receive() {
    stream(true, |a, b| {
        b.end().ask_for_bytes(rdsock_shm::layout::want::WAKE);
        a.end().reset(Reason::Bypass);
        assert_ne!(b.side.on_anchor(), 0, "tokens");
        b.end().settle_reset();
        assert_eq!(b.end().unread(), Some(0));
    });
}
