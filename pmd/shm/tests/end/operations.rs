//! Each operation by itself.

use crate::pair::{Gave, Program, RING, Wire, stream, stream_over};
use rdsock_shm::end::{Anchor, How, Received, Shut, Sleeper};
use rdsock_shm::layout::{anchor, mark, phase, want};
use rdsock_shm::reason::Reason;
use std::sync::atomic::Ordering::Relaxed;

const PLAIN: How = How {
    peek: false,
    discard: false,
    whole: false,
};
const PEEK: How = How {
    peek: true,
    ..PLAIN
};

fn bytes(range: std::ops::Range<usize>) -> Vec<u8> {
    range.map(|at| (at % 251) as u8).collect()
}

fn gave(range: std::ops::Range<usize>) -> Gave {
    Gave::Bytes(bytes(range))
}

#[test]
fn a_promoted_end_switches_with_its_next_send() {
    stream(false, |a, b| {
        assert_eq!(a.sends_by(), phase::ANCHOR);
        assert_eq!(a.send(&bytes(0..10)), Some(10));
        assert_eq!(a.sends_by(), phase::RING);
        assert_eq!(b.receives_by(), phase::SWITCHING);
        assert_eq!(b.receive(100, PLAIN), gave(0..10));
        assert_eq!(b.receives_by(), phase::RING);
    });
}

/// A short receive means that nothing more is there: the anchor's last bytes and the ring's first are one receive.
#[test]
fn a_receive_goes_on_from_the_anchor_to_the_ring() {
    let wire = crate::pair::Wire::new();
    let [one, other] = wire.sides();
    let (a, b) = (Program::new(&one), Program::new(&other));
    assert_eq!(a.send(&bytes(0..10)), Some(10));
    b.map();
    a.map();
    assert_eq!(a.send(&bytes(10..30)), Some(20));
    assert_eq!(b.receives_by(), phase::SWITCHING);
    assert_eq!(b.receive(100, PEEK), gave(0..30));
    assert_eq!(b.receive(100, PLAIN), gave(0..30));
    assert_eq!(b.receive(100, PLAIN), Gave::Nothing);
}

#[test]
fn a_receive_goes_on_from_the_ring_to_the_anchor() {
    stream(true, |a, b| {
        assert_eq!(a.send(&bytes(0..10)), Some(10));
        a.end().leave();
        assert_eq!(a.sends_by(), phase::DEMOTED);
        assert_eq!(a.send(&bytes(10..30)), Some(20));
        assert_eq!(b.end().unread(), Some(30));
        assert_eq!(b.receive(100, PEEK), gave(0..30));
        assert_eq!(b.receive(5, PLAIN), gave(0..5));
        assert_eq!(b.receive(100, PLAIN), gave(5..30));
        assert_eq!(b.receives_by(), phase::DEMOTED);
    });
}

/// The other end's last token lies between the ring's bytes and those behind them.
#[test]
fn a_receive_that_wants_all_goes_on_behind_the_ring() {
    stream(true, |a, b| {
        assert_eq!(a.send(&bytes(0..10)), Some(10));
        a.end().leave();
        let whole = How {
            whole: true,
            ..PLAIN
        };
        let mut room = [0; 30];
        let part = libc::iovec {
            iov_base: room.as_mut_ptr().cast(),
            iov_len: room.len(),
        };
        // SAFETY: one entry, valid as long as this.
        let to = unsafe { rdsock_shm::end::Buffers::new(&part, 1, |_| Ok::<_, ()>(())) }.unwrap();
        let mut done = 0;
        assert_eq!(b.end().receive(&to, whole, &mut done), Received::Kernel);
        assert_eq!(done, 10);
        assert_eq!(b.side.on_anchor(), 0, "the token is gone");
    });
}

#[test]
fn a_send_goes_on_from_the_ring_to_the_anchor() {
    stream(true, |a, b| {
        b.end().leave();
        // It is told of that when it publishes, and its bytes go on behind the ring.
        assert_eq!(a.send(&bytes(0..RING + 1000)), Some(RING + 1000));
        assert_eq!(a.sends_by(), phase::DEMOTED);
        let Gave::Bytes(got) = b.receive(2 * RING, PLAIN) else {
            panic!("nothing came");
        };
        assert_eq!(got, bytes(0..RING + 1000));
    });
}

#[test]
fn a_full_ring_takes_no_more_until_it_is_read() {
    stream(true, |a, b| {
        assert_eq!(a.send(&bytes(0..RING + 10)), Some(RING));
        assert!(!a.shared.is_sendable(1));
        assert_eq!(b.receive(100, PLAIN), gave(0..100));
        assert!(a.shared.is_sendable(100));
        assert_eq!(a.send(&bytes(RING..RING + 200)), Some(100));
        assert_eq!(b.receive(2 * RING, PLAIN), gave(100..RING + 100));
    });
}

#[test]
fn a_sleeper_is_woken_by_one_token_that_no_program_sees() {
    stream(true, |a, b| {
        let end = b.end();
        let sleeper = Sleeper::enter(&end).expect("nobody else sleeps");
        end.ask_for_bytes(want::WAKE);
        assert!(!b.shared.may_receive());
        a.send(&bytes(0..4));
        a.send(&bytes(4..8));
        assert_eq!(b.side.on_anchor(), 1);
        assert_eq!(end.outstanding(), 1);
        drop(sleeper);
        assert_eq!(b.receive(100, PLAIN), gave(0..8));
        drop(Sleeper::enter(&end).expect("nobody else sleeps"));
        assert_eq!((b.side.on_anchor(), end.outstanding()), (0, 0));
    });
}

/// Nobody else tells of what changes at one's own end.
#[test]
fn a_change_at_the_own_end_is_said() {
    stream(true, |a, b| {
        assert!(a.has_said_changes() && b.has_said_changes());
        let end = b.end();
        drop(Sleeper::enter(&end).expect("nobody else sleeps"));
        end.ask_for_bytes(want::WAKE);
        a.send(&bytes(0..4));
        // Takes the token off.
        end.look();
        assert_eq!((b.side.on_anchor(), end.outstanding()), (0, 0));
        assert!(b.has_said_changes());
        assert!(end.shut_sending());
        assert!(b.has_said_changes());
        end.shut_receiving();
        assert!(b.has_said_changes());
        a.side.shut(Shut::Sending);
        end.look();
        assert!(b.has_said_changes());
        a.end().leave();
        assert!(a.has_said_changes());
        end.reset(Reason::Bypass);
        assert!(b.has_said_changes());
    });
}

/// Nobody rings the bell of another user's program: who asks for that has a place on its board all the same.
#[test]
fn who_has_no_bells_of_its_peer_sends_a_token() {
    let place = rdsock_shm::bell::Place { bell: 2, bit: 9 };
    let tokens = |wire| {
        let mut tokens = [0; 2];
        stream_over(wire, true, |a, b| {
            let ask = &b.shared.incoming().bytes;
            ask.place.store(place.to_word(), Relaxed);
            let before = b.side.on_anchor();
            for sent in &mut tokens {
                b.end().ask_for_bytes(want::BELL);
                assert_eq!(a.send(b"x"), Some(1));
                // Not taken twice, and nobody waits for the end of it.
                assert_eq!(ask.want.load(Relaxed), 0);
                *sent = b.side.on_anchor() - before;
            }
        });
        tokens
    };
    assert_eq!(tokens(Wire::between_users()), [1, 2]);
    // Nobody sleeps on the bell.
    assert_eq!(tokens(Wire::new()), [0, 0]);
}

/// An own SHUT_RD ends the anchor for who looks at it; nobody has died.
#[test]
fn an_own_end_is_not_the_peers_death() {
    for shut in [false, true] {
        stream(true, |_, b| {
            let end = b.end();
            b.send(&bytes(0..4));
            if shut {
                end.shut_receiving();
            }
            end.note_end(false);
            let noted = b.shared.rx().anchor.load(Relaxed);
            assert_eq!(noted & anchor::EOF, anchor::EOF);
            assert_eq!(noted & anchor::BROKEN == 0, shut);
        });
    }
}

/// What is sent to a socket that is closed is answered with a reset: an end is not a byte.
#[test]
fn an_end_for_a_peer_that_has_closed_provokes_nothing() {
    stream(true, |a, b| {
        a.end().close(false);
        let before = a.side.on_anchor();
        assert!(b.end().shut_sending());
        assert_eq!(a.side.on_anchor(), before);
        assert_eq!(b.shared.tx().phase.load(Relaxed), phase::DEMOTED);
        assert!(!b.shared.is_reset());
    });
}

/// Whoever is counted in has not looked yet, and a token that is taken away would let it sleep on.
#[test]
fn a_second_sleeper_leaves_the_token_to_the_first() {
    stream(true, |a, b| {
        let end = b.end();
        let first = Sleeper::enter(&end).expect("nobody else sleeps");
        end.ask_for_bytes(want::WAKE);
        a.send(&bytes(0..4));
        assert!(Sleeper::enter(&end).is_none());
        assert_eq!(b.side.on_anchor(), 1);
        drop(first);
        assert!(Sleeper::enter(&end).is_some());
        assert_eq!(b.side.on_anchor(), 0);
    });
}

#[test]
fn a_byte_that_nobody_counted_breaks_the_stream() {
    stream(true, |a, b| {
        b.end().look();
        assert_eq!(b.side.broken(), None);
        b.side.slip(b"raw");
        b.end().look();
        assert_eq!(b.side.broken(), Some(Reason::Bypass));
        assert_eq!(b.receive(100, PLAIN), Gave::Broken);
        assert_eq!(b.receive(100, PLAIN), Gave::Bytes(Vec::new()), "told once");
        // The other end reads what came before, then hears of it.
        a.end().settle_reset();
        assert_eq!(a.receive(100, PLAIN), Gave::Broken);
        assert_eq!(a.side.broken(), Some(Reason::PeerReset));
    });
}

#[test]
fn a_foreign_byte_among_tokens_breaks_the_stream() {
    stream(true, |a, b| {
        b.end().ask_for_bytes(want::WAKE);
        b.side.slip(b"raw");
        a.send(&bytes(0..4));
        assert!(Sleeper::enter(&b.end()).is_some());
        assert_eq!(b.side.broken(), Some(Reason::Bypass));
    });
}

#[test]
fn an_end_that_leaves_takes_both_directions_along() {
    stream(true, |a, b| {
        a.send(&bytes(0..3));
        b.send(&bytes(0..4));
        a.end().leave();
        b.poll();
        assert_eq!(b.sends_by(), phase::DEMOTED);
        assert_eq!(a.receive(100, PLAIN), gave(0..4));
        assert_eq!(b.receive(100, PLAIN), gave(0..3));
        a.poll();
        b.poll();
        assert_eq!(
            (a.receives_by(), b.receives_by()),
            (phase::DEMOTED, phase::DEMOTED)
        );
        assert_eq!(b.side.left(), Some(Reason::PeerDemoted));
        assert_eq!((a.side.on_anchor(), b.side.on_anchor()), (0, 0));
    });
}

#[test]
fn what_an_abandoner_has_not_read_is_sent_again() {
    stream(true, |a, b| {
        a.send(&bytes(0..10));
        assert_eq!(b.receive(4, PLAIN), gave(0..4));
        assert_eq!(b.end().abandon(), Ok(()));
        assert_eq!(b.receives_by(), phase::DEMOTED);
        assert_eq!(b.receive(100, PLAIN), Gave::Nothing, "not yet");
        a.poll();
        assert_eq!(b.receive(100, PLAIN), gave(4..10));
        assert_eq!(a.send(&bytes(10..12)), Some(2));
        assert_eq!(b.receive(100, PLAIN), gave(10..12));
    });
}

#[test]
fn a_direction_ends_behind_its_bytes() {
    stream(true, |a, b| {
        a.send(&bytes(0..10));
        assert!(a.end().shut_sending());
        assert_eq!(a.send(b"more"), None);
        assert_eq!(b.receive(100, PLAIN), gave(0..10));
        assert_eq!(b.receive(100, PLAIN), Gave::Bytes(Vec::new()));
        assert_eq!(b.send(&bytes(0..5)), Some(5));
        assert_eq!(a.receive(100, PLAIN), gave(0..5));
    });
}

#[test]
fn a_close_with_unread_bytes_breaks_the_connection() {
    stream(true, |a, b| {
        a.send(&bytes(0..10));
        b.end().close(false);
        let marks = b.shared.out().producer.mark.load(Relaxed);
        assert_ne!(marks & mark::RESET, 0);
        assert_eq!(a.receive(100, PLAIN), Gave::Broken);
        assert_eq!(a.send(b"x"), None);
    });
}

#[test]
fn a_close_without_unread_bytes_is_an_end() {
    stream(true, |a, b| {
        b.send(&bytes(0..10));
        b.end().close(false);
        assert_eq!(a.receive(100, PLAIN), gave(0..10));
        assert_eq!(a.receive(100, PLAIN), Gave::Bytes(Vec::new()));
    });
}

/// A program that is asked where its bytes are, and one that asks for less than there is.
#[test]
fn unread_and_unsent_bytes_are_counted() {
    stream(true, |a, b| {
        a.send(&bytes(0..10));
        assert_eq!((a.end().unsent(), b.end().unread()), (Some(10), Some(10)));
        b.receive(4, PLAIN);
        assert_eq!((a.end().unsent(), b.end().unread()), (Some(6), Some(6)));
        let rest = How {
            discard: true,
            ..PLAIN
        };
        assert_eq!(b.receive(100, rest), Gave::Bytes(vec![0; 6]));
        assert_eq!(b.end().unread(), Some(0));
    });
}

/// Where the other end has made no call since this one moved to the ring, its word says nothing of what it has read on the anchor.
#[test]
fn an_end_that_has_read_all_on_the_anchor_leaves_nothing_unread() {
    let wire = Wire::new();
    let [one, other] = wire.sides();
    let (a, b) = (Program::new(&one), Program::new(&other));
    assert_eq!(a.send(&bytes(0..10)), Some(10));
    assert_eq!(b.receive(100, PLAIN), gave(0..10));
    a.map();
    b.map();
    assert_eq!(b.send(&bytes(0..20)), Some(20));
    assert_eq!(a.receive(100, PLAIN), gave(0..20));
    a.end().answer_space();
    assert_eq!(a.sends_by(), phase::RING);
    // Its process ends.
    (&b.side).shut(Shut::Sending);
    a.end().look();
    assert_eq!(a.shared.rx().anchor.load(Relaxed), anchor::EOF);
}

/// An end that goes back to the kernel and shuts what it sends has not gone: its anchor's end belongs to what comes behind the ring.
#[test]
fn an_end_behind_the_ring_is_not_judged() {
    stream(true, |a, b| {
        assert_eq!(a.send(&bytes(0..10)), Some(10));
        assert_eq!(b.send(&bytes(0..10)), Some(10));
        b.end().leave();
        assert!(b.end().shut_sending());
        assert!(b.side.has_shut());
        a.end().look();
        assert_eq!(a.shared.rx().anchor.load(Relaxed), 0);
        assert_eq!(a.receive(100, PLAIN), gave(0..10));
        assert_eq!(a.receive(100, PLAIN), Gave::Bytes(Vec::new()));
        assert_eq!(a.end().take_error(0), 0);
    });
}
