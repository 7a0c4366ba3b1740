//! Leaving beside somebody who takes nothing, or owes what never comes: no call waits that must not, a close and an abandon
//! wait for so long as the process has patience, and no byte is lost or doubled without a reset.

use crate::pair::{EVERY, Gave, PATIENCE, Program, RING, Wire, stream, stream_over};
use libc::{POLLIN, POLLOUT};
use rdsock_shm::end::{Anchor, How, Kernel, Limits, Sent, Shut, State};
use rdsock_shm::layout::{AGAIN, mark, phase, want};
use rdsock_shm::reason::Reason;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

fn bytes(range: std::ops::Range<usize>) -> Vec<u8> {
    range.map(|at| (at % 251) as u8).collect()
}

fn receive(program: &Program<'_>) -> Vec<u8> {
    match program.receive(2 * RING, How::default()) {
        Gave::Bytes(bytes) => bytes,
        Gave::Nothing => Vec::new(),
        Gave::Broken => panic!("broken"),
    }
}

/// What a program is told that the kernel says there is room.
fn ready(program: &Program<'_>) -> i16 {
    let kernel = Kernel {
        bits: POLLOUT,
        least: 1,
        behind: 0,
    };
    State::of(&program.shared).readiness(&kernel, RING as u64, POLLIN | POLLOUT)
}

/// `a` has sent `count` bytes that `b` has left in the ring.
fn abandoned(count: usize, with: impl FnOnce(&Program<'_>, &Program<'_>)) {
    stream(true, |a, b| {
        assert_eq!(a.send(&bytes(0..count)), Some(count));
        assert_eq!(b.end().abandon(), Ok(()));
        with(a, b);
    });
}

/// Another process may have the socket by then, and reads on.
#[test]
fn what_an_abandoner_has_not_read_comes_though_it_has_closed() {
    abandoned(10, |a, b| {
        b.end().close(false);
        assert_eq!(a.send(&bytes(10..12)), Some(2));
        assert_eq!(receive(b), bytes(0..12));
    });
    abandoned(10, |a, b| {
        b.end().close(false);
        a.end().shut_sending();
        assert_eq!(receive(b), bytes(0..10));
        assert_eq!(receive(b), [], "and the end");
    });
    abandoned(10, |a, b| {
        b.end().close(false);
        a.poll();
        assert_eq!(receive(b), bytes(0..10));
    });
}

/// The kernel may answer the first part with a reset, and the send would be short.
#[test]
fn a_send_to_an_abandoner_goes_one_way_as_a_whole() {
    let limits = Limits {
        chunk: 4,
        ..Limits::DEFAULT
    };
    stream_over(Wire::with(limits), true, |a, b| {
        assert_eq!(b.end().abandon(), Ok(()));
        let head = &a.shared.out().producer.head;
        let before = head.load(Relaxed);
        assert!(matches!(a.go_on(b"in pieces", 0), Sent::Kernel(None)));
        assert_eq!(head.load(Relaxed), before);
    });
}

#[test]
fn a_send_to_an_anchor_that_takes_nothing_does_not_wait() {
    abandoned(1000, |a, b| {
        a.side.set_room(0);
        // Its bytes go behind the others, or nowhere: none of it waits.
        assert_eq!(a.send(&bytes(1000..1010)), Some(0));
        assert_eq!(a.sends_by(), phase::LEAVING);
        a.poll();
        assert_eq!(a.side.waits(), [0, 0]);
        assert_eq!(a.shared.rest(), 1000);
        // Room on the anchor is not room for the program.
        assert_eq!(ready(a), 0);
        a.side.set_room(5000);
        a.poll();
        assert_eq!(a.sends_by(), phase::DEMOTED);
        assert_eq!(receive(b), bytes(0..1000));
        assert_eq!(a.send(&bytes(1000..1010)), Some(10));
        assert_eq!(receive(b), bytes(1000..1010));
        assert_eq!(a.side.waits(), [0, 0]);
    });
}

#[test]
fn all_bytes_arrive_once_where_one_is_taken_at_a_time() {
    abandoned(600, |a, b| {
        a.side.set_room(1);
        let (mut sent, mut got) = (600, Vec::new());
        for turn in 0.. {
            // By each kind of call that may come.
            match turn % 3 {
                0 => a.poll(),
                1 => a.end().send_rest(),
                _ => sent += a.send(&bytes(sent..sent + 1)).unwrap_or(0),
            }
            got.extend(receive(b));
            if turn > 1500 {
                break;
            }
        }
        assert_eq!(a.sends_by(), phase::DEMOTED);
        assert!(sent > 600 && got.len() == sent);
        assert_eq!(got, bytes(0..sent));
    });
}

/// Where the other end stopped is asked once.
#[test]
fn another_place_said_later_changes_nothing() {
    abandoned(1000, |a, b| {
        a.side.set_room(100);
        a.poll();
        assert_eq!(receive(b), bytes(0..100));
        b.shared.incoming().consumer.stop.store(3, Relaxed);
        a.side.set_room(5000);
        a.poll();
        assert_eq!(receive(b), bytes(100..1000));
    });
}

/// Behind the ring's end the anchor carries data.
#[test]
fn a_break_behind_the_rings_end_is_no_byte_of_data() {
    stream(true, |a, b| {
        assert_eq!(a.send(&bytes(0..10)), Some(10));
        a.end().leave();
        assert_eq!(a.sends_by(), phase::DEMOTED);
        assert_eq!(receive(b), bytes(0..10));
        b.poll();
        assert_eq!(b.receives_by(), phase::DEMOTED);
        a.end().reset(Reason::Bypass);
        assert_eq!(receive(b), b"");
        assert!(a.side.is_cut());
    });
}

#[test]
fn an_end_goes_behind_the_rest() {
    abandoned(1000, |a, b| {
        a.side.set_room(100);
        assert!(a.end().shut_sending());
        assert_eq!(a.send(b"x"), None);
        assert!(!a.side.has_shut());
        assert_eq!(receive(b), bytes(0..100));
        a.side.set_room(5000);
        a.poll();
        assert!(a.side.has_shut());
        assert_eq!(receive(b), bytes(100..1000));
        assert_eq!(receive(b), b"");
        assert_eq!(a.side.waits(), [0, 0]);
    });
}

/// Who ends then, however it ends, leaves a connection that breaks.
#[test]
fn a_close_breaks_the_connection_as_long_as_there_is_a_rest() {
    const BREAKS: u64 = 1 << 32;
    abandoned(1000, |a, b| {
        a.side.set_linger(BREAKS | 7);
        a.side.set_room(100);
        a.poll();
        assert_eq!(a.side.linger(), BREAKS);
        // The program is told what it has said, and may say something else.
        assert_eq!(a.end().said_linger(), Some(BREAKS | 7));
        assert!(a.end().say_linger(BREAKS | 9));
        assert_eq!(a.side.linger(), BREAKS);
        a.side.set_room(5000);
        a.poll();
        assert_eq!(a.side.linger(), BREAKS | 9);
        assert_eq!(a.end().said_linger(), None);
        assert!(!a.end().say_linger(0));
        assert_eq!(receive(b), bytes(0..1000));
    });
}

/// Nobody knows what a process has sent that was killed in a send: nothing is sent twice, and nothing left out.
#[test]
fn who_dies_in_the_middle_breaks_the_stream() {
    abandoned(1000, |a, b| {
        a.side.set_room(100);
        a.poll();
        assert_eq!(receive(b), bytes(0..100));
        a.shared.tx().again.fetch_or(AGAIN, Relaxed);
        a.side.set_room(5000);
        a.poll();
        assert_eq!(a.side.broken(), Some(Reason::Lost));
        // The kernel's connection as well: nobody reads marks there, and a token would be data.
        assert!(a.side.is_cut());
        assert_eq!(receive(b), b"");
        assert_eq!(a.receive(10, How::default()), Gave::Broken);
    });
}

#[test]
fn a_place_that_cannot_be_breaks_the_connection_and_sends_no_token() {
    stream(true, |a, b| {
        a.send(&bytes(0..10));
        b.shared.incoming().consumer.stop.store(1 << 40, Relaxed);
        let wants = &b.shared.incoming().bytes.want;
        wants.fetch_or(want::DEMOTED, Relaxed);
        let before = b.side.on_anchor();
        a.poll();
        assert_eq!(a.side.broken(), Some(Reason::Violation));
        assert!(a.side.is_cut());
        assert_eq!(b.side.on_anchor(), before);
    });
}

#[test]
fn a_close_waits_for_the_rest_as_long_as_there_is_patience() {
    for (room, kept) in [(5000, true), (100, false)] {
        abandoned(1000, |a, b| {
            a.side.set_room(0);
            a.poll();
            a.side.set_room(room);
            a.end().close(false);
            assert_eq!(a.side.is_cut(), !kept);
            assert_eq!(a.side.broken(), (!kept).then_some(Reason::Late));
            assert!(a.side.waits()[1] <= PATIENCE);
            assert_eq!(receive(b), bytes(0..room.min(1000)));
        });
    }
}

/// Both have left: who is the kernel's from now on sends nothing again.
#[test]
fn an_abandon_with_a_rest_that_nobody_takes_is_a_reset() {
    abandoned(1000, |a, _| {
        a.side.set_room(0);
        assert_eq!(a.end().abandon(), Err(Reason::Late));
        assert!(a.side.waits()[1] <= PATIENCE);
        a.end().give_up(Reason::Late);
        assert!(a.side.is_cut());
    });
}

/// The milliseconds that `count` ends of one process wait for, each of which `then` treats.
fn waited(
    account: &Rc<AtomicU64>,
    count: usize,
    then: impl Fn(&Program<'_>, &Program<'_>),
) -> (u32, usize) {
    let (mut all, mut broken) = (0, 0);
    for _ in 0..count {
        stream_over(Wire::of_process(account), true, |a, b| {
            then(a, b);
            all += b.side.waits()[1];
            broken += usize::from(b.side.broken().is_some());
        });
    }
    (all, broken)
}

fn ring(b: &Program<'_>) {
    for asked in [&b.shared.incoming().bytes, &b.shared.out().space] {
        asked.want.fetch_or(want::RINGING, Relaxed);
    }
}

#[test]
fn all_closes_of_a_process_have_one_patience() {
    let account = Rc::new(AtomicU64::new(0));
    // What is under way on the anchor would be lost with the token that comes later. Else nothing would.
    for (unsent, expected) in [(1, 50), (0, 0)] {
        let (all, broken) = waited(&account, 50, |_, b| {
            ring(b);
            b.side.set_unsent(unsent);
            b.end().close(false);
        });
        assert!(all <= PATIENCE, "{all}");
        assert_eq!(broken, expected);
    }
    // A while later there is some again.
    let (all, _) = waited(&account, 1, |_, b| {
        b.side.pass(2 * u64::from(EVERY));
        ring(b);
        b.end().close(false);
    });
    assert!(all > 0 && all <= PATIENCE, "{all}");
}

#[test]
fn tokens_that_never_come_cost_no_more() {
    let account = Rc::new(AtomicU64::new(0));
    let owe = |a: &Program<'_>| {
        a.shared.out().producer.wakes.fetch_add(1, Relaxed);
    };
    let (mut all, _) = waited(&account, 50, |a, b| {
        owe(a);
        b.end().close(false);
    });
    all += waited(&account, 50, |a, b| {
        owe(a);
        a.shared.out().producer.mark.store(mark::END, Relaxed);
        b.poll();
    })
    .0;
    all += waited(&account, 50, |_, b| {
        ring(b);
        assert_eq!(b.end().abandon(), Err(Reason::Late));
    })
    .0;
    assert!(all <= PATIENCE, "{all}");
}

/// Who has closed sends nothing more, whatever the words say.
#[test]
fn nothing_is_waited_for_behind_an_end() {
    let account = Rc::new(AtomicU64::new(0));
    let (all, broken) = waited(&account, 50, |a, b| {
        ring(b);
        a.shared.out().producer.wakes.fetch_add(1, Relaxed);
        a.side.shut(Shut::Sending);
        b.end().close(false);
    });
    assert_eq!((all, broken), (0, 0));
}

/// An honest end is slow now and then, and its bytes arrive all the same.
#[test]
fn nobody_is_broken_who_is_in_time() {
    let account = Rc::new(AtomicU64::new(0));
    let (all, broken) = waited(&account, 50, |_, b| b.end().close(false));
    assert_eq!((all, broken), (0, 0));
}
