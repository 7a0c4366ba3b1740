//! Sleep and wake between two ends: no wake-up is lost, whoever sleeps on the anchor, and exactly
//! the counted wake bytes travel on it. A lost one is a deadlock, which loom reports.

use crate::model::check;
use crate::model::end::stream;
use loom::thread;
use rdsock_shm::layout::phase;

#[test]
fn a_sleeper_is_woken_for_each_message() {
    check(3, || {
        let [sender, receiver] = stream(8);
        let other = thread::spawn(move || {
            sender.send(&[1]);
            sender.send(&[2]);
        });
        assert_eq!(receiver.receive_all(2), [1, 2]);
        other.join().unwrap();
        // Whatever is on the anchor was counted.
        let sent = receiver
            .incoming()
            .producer
            .wakes
            .load(loom::sync::atomic::Ordering::Acquire);
        let drained = receiver
            .rx()
            .drained
            .load(loom::sync::atomic::Ordering::Acquire);
        assert_eq!(u64::from(sent - drained), receiver.receives().unread());
        assert_eq!(
            receiver
                .rx()
                .phase
                .load(loom::sync::atomic::Ordering::Acquire),
            phase::RING
        );
    });
}

#[test]
fn a_sender_is_woken_when_there_is_space() {
    check(2, || {
        let [sender, receiver] = stream(8);
        let other = thread::spawn(move || sender.send(&[1; 18]));
        assert_eq!(receiver.receive_all(18), [1; 18]);
        other.join().unwrap();
    });
}

#[test]
fn request_and_reply() {
    check(2, || {
        let [client, server] = stream(8);
        let other = thread::spawn(move || {
            assert_eq!(server.receive(8), [1]);
            server.send(&[2]);
            assert_eq!(server.receive(8), [3]);
        });
        client.send(&[1]);
        assert_eq!(client.receive(8), [2]);
        client.send(&[3]);
        other.join().unwrap();
    });
}

#[test]
fn two_threads_receive_on_one_socket() {
    check(2, || {
        let [sender, receiver] = stream(8);
        let second = receiver.thread(1);
        let receiving = thread::spawn(move || second.receive(1));
        let sending = thread::spawn(move || {
            sender.send(&[1]);
            sender.send(&[2]);
        });
        let one = receiver.receive(1);
        let other = receiving.join().unwrap();
        sending.join().unwrap();
        assert_eq!(one[0] + other[0], 3);
    });
}

/// One thread of an end waits for bytes, another for space, both asleep on the same anchor.
#[test]
fn a_receiver_and_a_sender_sleep_on_one_socket() {
    check(2, || {
        let [near, far] = stream(8);
        let writer = near.thread(1);
        let writing = thread::spawn(move || writer.send(&[1; 9]));
        let peer = thread::spawn(move || {
            far.send(&[2]);
            assert_eq!(far.receive_all(9), [1; 9]);
            far.send(&[3]);
        });
        assert_eq!(near.receive_all(2), [2, 3]);
        writing.join().unwrap();
        peer.join().unwrap();
    });
}
