//! Naps: what ends one, and that this sends nothing.

use crate::pair::{Gave, Program, stream};
use rdsock_shm::end::{How, Nap};
use rdsock_shm::layout::want;
use rdsock_shm::reason::Reason;
use std::sync::atomic::Ordering::Relaxed;

/// True while a request for the end of a nap waits for the other end.
fn asks(program: &Program<'_>) -> bool {
    program.shared.incoming().bytes.want.load(Relaxed) & want::NAP != 0
}

/// `act` ends the nap of the second end. How many tokens it sends there.
fn ends_a_nap(act: impl FnOnce(&Program<'_>, &Program<'_>)) -> u32 {
    let mut tokens = 0;
    stream(true, |near, far| {
        // What was asked for when it was mapped is answered.
        assert_eq!(near.send(b"y"), Some(1));
        assert_eq!(far.receive(1, How::default()), Gave::Bytes(b"y".into()));
        let sent = || far.shared.incoming().producer.wakes.load(Relaxed);
        let tokens_before = sent();
        let before = near.side.naps_ended() + far.side.naps_ended();
        let nap = Nap::enter(&far.end()).expect("nobody else naps");
        let (word, value) = nap.place();
        assert!(asks(far) && word.load(Relaxed) == value);
        act(near, far);
        assert!(!asks(far), "the request was not taken");
        assert_eq!(near.side.naps_ended() + far.side.naps_ended(), before + 1);
        tokens = sent() - tokens_before;
    });
    tokens
}

#[test]
fn bytes_end_a_nap_without_a_token() {
    let tokens = ends_a_nap(|near, far| {
        assert_eq!(near.send(b"abc"), Some(3));
        assert_eq!(far.receive(9, How::default()), Gave::Bytes(b"abc".into()));
        // Nobody asks any more.
        assert_eq!(near.send(b"abc"), Some(3));
    });
    assert_eq!(tokens, 0);
}

#[test]
fn an_end_ends_a_nap() {
    let shut = ends_a_nap(|near, _| assert!(near.end().shut_sending()));
    let close = ends_a_nap(|near, _| near.end().close(false));
    assert_eq!((shut, close), (0, 0));
}

/// What comes unasked sends its token as ever, for whoever sleeps on the anchor.
#[test]
fn what_comes_unasked_ends_a_nap() {
    let leave = ends_a_nap(|near, _| near.end().leave());
    let abandon = ends_a_nap(|near, _| assert_eq!(near.end().abandon(), Ok(())));
    let reset = ends_a_nap(|near, _| near.end().reset(Reason::Violation));
    assert_eq!((leave, abandon, reset), (1, 1, 1));
}

#[test]
fn what_another_thread_of_the_same_end_does_ends_a_nap() {
    ends_a_nap(|_, far| far.end().shut_receiving());
    ends_a_nap(|_, far| far.end().note_end(false));
    ends_a_nap(|_, far| far.end().reset(Reason::Violation));
    ends_a_nap(|_, far| assert_eq!(far.end().abandon(), Ok(())));
}

#[test]
fn one_thread_naps_at_a_time() {
    stream(true, |_, far| {
        let end = far.end();
        let nap = Nap::enter(&end).expect("nobody else naps");
        assert!(Nap::enter(&end).is_none());
        assert!(
            asks(far),
            "the second one has taken the first one's request"
        );
        drop(nap);
        assert!(!asks(far));
        assert!(Nap::enter(&end).is_some());
    });
}

/// A thread napped when its process executed another program.
#[test]
fn a_nap_ends_with_the_program() {
    stream(true, |_, far| {
        let end = far.end();
        std::mem::forget(Nap::enter(&end));
        let pid = (far.shared.rx().napper.load(Relaxed) >> 32) as u32;
        end.free_own_locks(pid + 1);
        assert!(Nap::enter(&end).is_none());
        end.free_own_locks(pid);
        assert!(Nap::enter(&end).is_some());
    });
}

#[test]
fn bytes_that_come_on_the_anchor_are_not_napped_for() {
    stream(false, |_, far| {
        assert!(Nap::enter(&far.end()).is_none());
        assert!(!asks(far));
    });
}
