//! Leaving the rings: no byte is lost, doubled or out of order over ring and anchor, and no wake
//! byte reaches a program, whichever ends leave, and when.

use crate::model::Given;
use crate::model::check;
use crate::model::end::{End, connection, stream, stream_over};
use loom::thread;

/// Nothing is left on the anchor of an end but wake bytes that are counted, and none of those when
/// it has gone back to the kernel.
fn assert_quiet(end: &End) {
    assert_eq!(end.receives().unread(), u64::from(end.outstanding()));
    if end.reads_kernel() {
        assert_eq!(end.receives().look(1), Given::Nothing);
    }
}

#[test]
fn a_sender_leaves() {
    check(3, || {
        let [sender, receiver] = stream(8);
        let other = thread::spawn(move || {
            sender.send(&[1]);
            sender.leave();
            sender.send(&[2]);
        });
        assert_eq!(receiver.receive_all(2), [1, 2]);
        other.join().unwrap();
        assert_quiet(&receiver);
    });
}

#[test]
fn a_receiver_leaves() {
    check(3, || {
        let [sender, receiver] = stream(8);
        let other = thread::spawn(move || {
            sender.send(&[1]);
            sender.send(&[2]);
            sender.send(&[3]);
            sender
        });
        assert_eq!(receiver.receive_all(1), [1]);
        receiver.leave();
        assert_eq!(receiver.receive_all(2), [2, 3]);
        let sender = other.join().unwrap();
        sender.poll();
        sender.send(&[4]);
        assert_eq!(receiver.receive_all(1), [4]);
        assert_quiet(&receiver);
    });
}

#[test]
fn both_ends_leave_at_once() {
    check(2, || {
        let [a, b] = stream(8);
        let other = thread::spawn(move || {
            b.send(&[11]);
            b.leave();
            b.send(&[12]);
            assert_eq!(b.receive_all(2), [1, 2]);
            b
        });
        a.send(&[1]);
        a.leave();
        a.send(&[2]);
        assert_eq!(a.receive_all(2), [11, 12]);
        let b = other.join().unwrap();
        assert_quiet(&a);
        assert_quiet(&b);
    });
}

#[test]
fn an_end_leaves_before_it_has_switched() {
    check(2, || {
        let [a, b] = connection(8);
        assert!(a.map());
        a.send(&[1]);
        let other = thread::spawn(move || {
            while !b.map() {
                thread::yield_now();
            }
            b.send(&[11]);
            assert_eq!(b.receive_all(2), [1, 2]);
            b.send(&[12]);
            b
        });
        a.leave();
        a.send(&[2]);
        assert_eq!(a.receive_all(2), [11, 12]);
        let b = other.join().unwrap();
        assert_quiet(&a);
        assert_quiet(&b);
    });
}

#[test]
fn a_leaver_goes_on_taking_from_a_full_ring() {
    check(2, || {
        let [sender, receiver] = stream(8);
        let other = thread::spawn(move || sender.send(&[7; 11]));
        receiver.leave();
        assert_eq!(receiver.receive_all(11), [7; 11]);
        other.join().unwrap();
    });
}

#[test]
fn an_unswitched_leaver_goes_on_taking_from_a_full_ring() {
    check(2, || {
        let [sender, receiver] = connection(8);
        assert!(sender.map() && receiver.map());
        let other = thread::spawn(move || sender.send(&[7; 11]));
        receiver.leave();
        assert_eq!(receiver.receive_all(11), [7; 11]);
        other.join().unwrap();
    });
}

#[test]
fn a_receiver_abandons_what_is_in_the_ring() {
    check(3, || {
        let [sender, receiver] = stream(8);
        let other = thread::spawn(move || {
            sender.send(&[1]);
            sender.send(&[2]);
            sender.poll();
            sender.send(&[3]);
            sender
        });
        assert!(receiver.abandon());
        let sender = other.join().unwrap();
        // The last look may have come before the end was abandoned.
        sender.poll();
        assert_eq!(receiver.receive_all(3), [1, 2, 3]);
        assert_quiet(&receiver);
    });
}

/// The anchor has room for two bytes: what is left goes out piece by piece, before what is sent later.
#[test]
fn what_an_abandoner_left_goes_out_as_the_anchor_takes_it() {
    check(2, || {
        let [sender, receiver] = stream_over(8, 2);
        sender.send(&[1, 2, 3]);
        let other = thread::spawn(move || {
            assert!(receiver.abandon());
            assert_eq!(receiver.receive_all(4), [1, 2, 3, 4]);
            assert_quiet(&receiver);
        });
        sender.send(&[4]);
        sender.poll_until_kernel_sends();
        other.join().unwrap();
    });
}

/// Two threads send what is left, and something of their own behind it.
#[test]
fn two_threads_send_what_an_abandoner_left() {
    check(1, || {
        let [sender, receiver] = stream_over(8, 2);
        sender.send(&[1, 2, 3]);
        let second = sender.thread(1);
        let reading = thread::spawn(move || {
            assert!(receiver.abandon());
            let mut bytes = receiver.receive_all(5);
            assert_eq!(bytes.drain(..3).collect::<Vec<_>>(), [1, 2, 3]);
            bytes.sort_unstable();
            assert_eq!(bytes, [4, 5]);
            assert_quiet(&receiver);
        });
        let sending = thread::spawn(move || second.send(&[5]));
        sender.send(&[4]);
        sender.poll_until_kernel_sends();
        sending.join().unwrap();
        reading.join().unwrap();
    });
}

#[test]
fn an_end_that_abandons_both_directions() {
    check(2, || {
        let [a, b] = stream(8);
        let other = thread::spawn(move || {
            b.send(&[11]);
            assert_eq!(b.receive_all(2), [1, 2]);
            b.send(&[12]);
            b
        });
        a.send(&[1]);
        assert!(a.abandon());
        a.send(&[2]);
        assert_eq!(a.receive_all(2), [11, 12]);
        let b = other.join().unwrap();
        assert_quiet(&a);
        assert_quiet(&b);
    });
}

/// The stream may be reset here: what the leaver has left in its ring, it does not send again.
#[test]
fn one_end_abandons_and_the_other_leaves() {
    check(3, || {
        let [a, b] = stream(8);
        let other = thread::spawn(move || {
            b.send(&[11]);
            b.leave();
            b.send(&[12]);
            b
        });
        let kept = a.abandon();
        let b = other.join().unwrap();
        if kept {
            a.send(&[1]);
            assert_eq!(a.receive_all(2), [11, 12]);
            assert_eq!(b.receive_all(1), [1]);
            assert_quiet(&a);
            assert_quiet(&b);
        }
    });
}

/// A stream may be reset here, when unread bytes are in a ring that neither end will touch again,
/// but never silently lose or add anything.
#[test]
fn both_ends_abandon_at_once() {
    check(2, || {
        let [a, b] = stream(8);
        let other = thread::spawn(move || {
            let kept = b.abandon();
            if kept {
                b.send(&[11]);
            }
            (b, kept)
        });
        let kept_a = a.abandon();
        assert!(kept_a, "nothing was unread");
        a.send(&[1]);
        let (b, kept_b) = other.join().unwrap();
        assert!(kept_b, "nothing was unread");
        assert_eq!(a.receive_all(1), [11]);
        assert_eq!(b.receive_all(1), [1]);
        assert_quiet(&a);
        assert_quiet(&b);
    });
}

#[test]
fn a_thread_sends_and_a_thread_receives_while_the_peer_abandons() {
    check(2, || {
        let [near, far] = stream(8);
        far.send(&[21; 4]);
        let reader = near.thread(1);
        let reading = thread::spawn(move || assert_eq!(reader.receive_all(4), [21; 4]));
        let writing = thread::spawn(move || {
            near.send(&[1]);
            near.send(&[2]);
            near
        });
        assert!(far.abandon());
        let near = writing.join().unwrap();
        reading.join().unwrap();
        near.poll();
        assert_eq!(far.receive_all(2), [1, 2]);
        assert_quiet(&far);
        near.poll();
        assert_quiet(&near);
    });
}

/// One thread tells the peer of space while another leaves: its wake byte must not come behind the
/// last one.
#[test]
fn a_thread_tells_of_space_while_another_leaves() {
    check(2, || {
        let [near, far] = stream(8);
        far.send(&[21; 8]);
        far.asks_for_space();
        let reader = near.thread(1);
        let reading = thread::spawn(move || assert_eq!(reader.receive_all(8), [21; 8]));
        near.leave();
        near.send(&[1]);
        reading.join().unwrap();
        assert_eq!(far.receive_all(1), [1]);
        assert_quiet(&far);
    });
}

/// The last wake byte ends the sleep of everybody on the anchor, whoever takes it.
#[test]
fn a_receiver_and_a_sender_sleep_when_the_peer_leaves() {
    check(2, || {
        let [near, far] = stream(8);
        let writer = near.thread(1);
        let writing = thread::spawn(move || writer.send(&[1; 11]));
        let peer = thread::spawn(move || {
            far.leave();
            far.send(&[2]);
            assert_eq!(far.receive_all(11), [1; 11]);
            far
        });
        assert_eq!(near.receive_all(1), [2]);
        writing.join().unwrap();
        let far = peer.join().unwrap();
        assert_quiet(&near);
        assert_quiet(&far);
    });
}

/// A kernel send is under way when its end leaves: the thread in it ends the direction.
#[test]
fn an_end_leaves_amid_a_kernel_send() {
    check(2, || {
        let [a, b] = connection(8);
        let sending = a.thread(1);
        assert!(a.map());
        let kernel = thread::spawn(move || {
            sending.send(&[1]);
            sending.send(&[2]);
        });
        let peer = thread::spawn(move || {
            while !b.map() {
                thread::yield_now();
            }
            b.send(&[11; 9]);
            assert_eq!(b.receive_all(2), [1, 2]);
            b
        });
        a.leave();
        assert_eq!(a.receive_all(9), [11; 9]);
        kernel.join().unwrap();
        let b = peer.join().unwrap();
        assert_quiet(&a);
        assert_quiet(&b);
    });
}

/// Both directions, two threads on each socket, and both ends leave.
#[test]
fn two_threads_on_each_socket_while_both_ends_leave() {
    check(1, || {
        let [a, b] = stream(8);
        let threads = [(a.thread(1), 1), (b.thread(1), 11)].map(|(end, first)| {
            thread::spawn(move || {
                end.send(&[first]);
                end.leave();
                end.send(&[first + 1]);
            })
        });
        let reader = {
            let b = b.thread(2);
            thread::spawn(move || assert_eq!(b.receive_all(2), [1, 2]))
        };
        assert_eq!(a.receive_all(2), [11, 12]);
        reader.join().unwrap();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_quiet(&a);
        assert_quiet(&b);
    });
}

/// An end is abandoned while the other one switches.
#[test]
fn an_end_is_abandoned_while_its_peer_switches() {
    check(3, || {
        let [a, b] = connection(8);
        b.send(&[1]);
        assert_eq!(a.receive_all(1), [1]);
        assert!(a.map());
        let peer = thread::spawn(move || {
            while !b.map() {
                thread::yield_now();
            }
            b.send(&[2]);
            b.send(&[3]);
            b
        });
        assert!(a.abandon());
        let b = peer.join().unwrap();
        b.poll();
        assert_eq!(a.receive_all(2), [2, 3]);
        a.send(&[11]);
        assert_eq!(b.receive_all(1), [11]);
        assert_quiet(&a);
        assert_quiet(&b);
    });
}

/// Half-close: what was sent before is read to its end, and the other direction goes on.
#[test]
fn a_direction_ends_while_the_other_goes_on() {
    check(3, || {
        let [a, b] = stream(8);
        let peer = thread::spawn(move || {
            b.send(&[11]);
            assert_eq!(b.receive_all(1), [1]);
            assert_eq!(b.receive(8), []);
            b.send(&[12]);
            b
        });
        a.send(&[1]);
        a.shut();
        assert_eq!(a.receive_all(2), [11, 12]);
        peer.join().unwrap();
    });
}

/// A process that is killed says nothing: its kernel closes the anchor.
#[test]
fn what_a_dead_sender_has_published_is_read_to_its_end() {
    check(3, || {
        let [a, b] = stream(8);
        let peer = thread::spawn(move || {
            b.send(&[1]);
            b.send(&[2]);
            b.sends().end();
        });
        assert_eq!(a.receive_all(2), [1, 2]);
        assert_eq!(a.receive(8), []);
        peer.join().unwrap();
    });
}
