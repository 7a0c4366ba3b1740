//! Promotion: a direction moves from the anchor to its ring at an exact position, whatever the
//! other end and other threads do meanwhile.

use crate::model::check;
use crate::model::end::{End, connection};
use loom::thread;

/// The offer is followed as soon as no kernel call is under way.
fn map(end: &End) {
    while !end.map() {
        thread::yield_now();
    }
}

#[test]
fn a_sender_switches_while_the_receiver_becomes_ready() {
    check(3, || {
        let [sender, receiver] = connection(8);
        sender.send(&[1]);
        let other = thread::spawn(move || {
            map(&sender);
            sender.send(&[2]);
            sender.send(&[3]);
        });
        map(&receiver);
        assert_eq!(receiver.receive_all(3), [1, 2, 3]);
        other.join().unwrap();
    });
}

#[test]
fn both_directions_switch_at_once() {
    check(2, || {
        let [a, b] = connection(8);
        let other = thread::spawn(move || {
            map(&b);
            b.send(&[11]);
            b.send(&[12]);
            assert_eq!(b.receive_all(2), [1, 2]);
        });
        map(&a);
        a.send(&[1]);
        a.send(&[2]);
        assert_eq!(a.receive_all(2), [11, 12]);
        other.join().unwrap();
    });
}

/// Bytes of two threads may mix, but neither thread's own order may change.
fn assert_order(all: &[u8], of_each: &[&[u8]]) {
    assert_eq!(
        all.len(),
        of_each.iter().map(|one| one.len()).sum::<usize>()
    );
    for one in of_each {
        let found: Vec<u8> = all
            .iter()
            .copied()
            .filter(|byte| one.contains(byte))
            .collect();
        assert_eq!(&found, one, "in {all:?}");
    }
}

#[test]
fn two_threads_send_on_one_socket() {
    check(2, || {
        let [first, receiver] = connection(8);
        let second = first.thread(1);
        let sending = thread::spawn(move || {
            second.send(&[11]);
            second.send(&[12]);
        });
        let receiving = thread::spawn(move || {
            map(&receiver);
            receiver.receive_all(4)
        });
        first.send(&[1]);
        map(&first);
        first.send(&[2]);
        sending.join().unwrap();
        assert_order(&receiving.join().unwrap(), &[&[1, 2], &[11, 12]]);
    });
}

/// An end that has only received so far is asked for space: its wake bytes may not mix with what
/// another of its threads is sending on the anchor.
#[test]
fn space_is_told_by_an_end_that_has_not_switched() {
    check(2, || {
        let [sender, receiver] = connection(8);
        map(&sender);
        map(&receiver);
        let writing = thread::spawn(move || {
            sender.send(&[7; 9]);
            assert_eq!(sender.receive_all(1), [1]);
        });
        assert_eq!(receiver.receive_all(9), [7; 9]);
        receiver.send(&[1]);
        writing.join().unwrap();
    });
}

/// A program may ask for space before its direction has moved, and not again when it has.
#[test]
fn space_that_was_asked_for_before_the_switch_is_told() {
    check(2, || {
        let [sender, receiver] = connection(8);
        map(&sender);
        map(&receiver);
        sender.asks_for_space();
        let writing = thread::spawn(move || {
            sender.send(&[7; 9]);
            sender
        });
        assert_eq!(receiver.receive_all(9), [7; 9]);
        let sender = writing.join().unwrap();
        assert_eq!(sender.receives().unread(), u64::from(sender.outstanding()));
    });
}

#[test]
fn space_is_told_amid_a_kernel_send() {
    check(1, || {
        let [sender, receiver] = connection(8);
        map(&receiver);
        let replying = receiver.thread(1);
        let reply = thread::spawn(move || replying.send(&[1]));
        let writing = thread::spawn(move || {
            map(&sender);
            sender.send(&[7; 9]);
            assert_eq!(sender.receive_all(1), [1]);
        });
        assert_eq!(receiver.receive_all(9), [7; 9]);
        reply.join().unwrap();
        writing.join().unwrap();
    });
}

#[test]
fn a_poll_in_vain_before_the_switch_loses_no_wake_up() {
    check(3, || {
        let [sender, receiver] = connection(8);
        map(&sender);
        map(&receiver);
        let other = thread::spawn(move || {
            sender.send(&[1]);
            sender
        });
        receiver.poll_in_vain();
        assert_eq!(receiver.receive_all(1), [1]);
        other.join().unwrap();
    });
}

#[test]
fn a_peer_that_switches_and_closes_is_read_to_its_end() {
    check(3, || {
        let [sender, receiver] = connection(8);
        map(&sender);
        map(&receiver);
        receiver.poll_in_vain();
        let other = thread::spawn(move || {
            sender.send(&[1]);
            sender.close();
        });
        assert_eq!(receiver.receive_all(1), [1]);
        assert_eq!(receiver.receive(8), []);
        other.join().unwrap();
    });
}

/// Wake bytes behind unread bytes of the program are not taken for those.
#[test]
fn a_look_at_the_anchor_amid_the_switch_takes_no_bytes() {
    check(3, || {
        let [sender, receiver] = connection(8);
        sender.send(&[1]);
        let other = thread::spawn(move || {
            sender.send(&[2]);
            map(&sender);
            sender.send(&[3]);
        });
        map(&receiver);
        let mut all = Vec::new();
        while all.len() < 3 {
            match receiver.try_receive(8, true) {
                Some(bytes) => all.extend(bytes),
                None => thread::yield_now(),
            }
        }
        assert_eq!(all, [1, 2, 3]);
        other.join().unwrap();
    });
}
