//! Naps: whoever sleeps on a request is woken by what comes next, whatever that is. A lost wake-up is
//! a deadlock, which loom reports: no nap ends by itself here, but where a test says so.

use crate::model::check;
use crate::model::end::stream;
use loom::thread;

#[test]
fn a_napper_is_woken_for_each_message() {
    check(3, || {
        let [sender, receiver] = stream(8);
        let other = thread::spawn(move || {
            sender.send(&[1]);
            sender.send(&[2]);
        });
        assert_eq!(receiver.napping().receive_all(2), [1, 2]);
        other.join().unwrap();
    });
}

#[test]
fn request_and_reply() {
    check(2, || {
        let [client, server] = stream(8).map(|end| end.napping());
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

/// The time of a nap is over at any moment: the sleep goes on on the anchor.
#[test]
fn a_nap_that_is_over_is_followed_by_a_sleep() {
    check(2, || {
        let [sender, receiver] = stream(8);
        let timer = receiver.clone();
        let timing = thread::spawn(move || timer.end_nap());
        let sending = thread::spawn(move || sender.send(&[1]));
        let receiving = thread::spawn(move || receiver.napping().receive(1));
        sending.join().unwrap();
        timing.join().unwrap();
        assert_eq!(receiving.join().unwrap(), [1]);
    });
}

/// One thread of an end naps, the other one finds that, and sleeps on the anchor.
#[test]
fn two_threads_receive_on_one_socket() {
    check(2, || {
        let [sender, receiver] = stream(8);
        let (first, second) = (receiver.napping(), receiver.thread(1).napping());
        let receiving = thread::spawn(move || second.receive(1));
        let sending = thread::spawn(move || {
            sender.send(&[1]);
            sender.send(&[2]);
        });
        let one = first.receive(1);
        let other = receiving.join().unwrap();
        sending.join().unwrap();
        assert_eq!(one[0] + other[0], 3);
    });
}

#[test]
fn a_napper_hears_that_the_other_end_leaves() {
    check(2, || {
        let [sender, receiver] = stream(8);
        let other = thread::spawn(move || {
            sender.leave();
            sender.send(&[1]);
        });
        assert_eq!(receiver.napping().receive(1), [1]);
        other.join().unwrap();
    });
}

#[test]
fn a_napper_hears_of_the_end() {
    check(3, || {
        let [sender, receiver] = stream(8);
        let other = thread::spawn(move || sender.shut());
        assert!(receiver.napping().receive(1).is_empty());
        other.join().unwrap();
    });
}

#[test]
fn a_napper_hears_of_a_close() {
    check(2, || {
        let [sender, receiver] = stream(8);
        let other = thread::spawn(move || {
            sender.send(&[1]);
            sender.close();
        });
        let receiver = receiver.napping();
        assert_eq!(receiver.receive(1), [1]);
        assert!(receiver.receive(1).is_empty());
        other.join().unwrap();
    });
}

/// A thread of the same end takes the connection for the kernel.
#[test]
fn a_napper_hears_of_what_its_own_end_does() {
    check(1, || {
        let [sender, receiver] = stream(8);
        let second = receiver.thread(1);
        let leaving = thread::spawn(move || assert!(second.abandon()));
        let sending = thread::spawn(move || {
            sender.send(&[1]);
            sender.poll_until_kernel_sends();
        });
        assert_eq!(receiver.napping().receive(1), [1]);
        leaving.join().unwrap();
        sending.join().unwrap();
    });
}
