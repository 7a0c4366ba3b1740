//! The rules of `docs/protocol.md`, one by one, on nodes that are wired without delay.

mod pair;

use pair::{A, ADDRESSES, B, Wires, place};
use rdsock_proto::{
    Config, Count, EndReason, Event, LocalError, Node, NodeId, Refusal, Status, StreamId,
};

const MS: u64 = 1_000_000;

#[test]
fn small_messages_of_a_batch_share_a_descriptor() {
    let mut wires = Wires::new(2, |_| {});
    let (here, there) = wires.connect(A, B, 16);
    for n in 1..=10 {
        wires.node(A).advance_head(here, 64 * n).unwrap();
    }
    wires.settle();
    assert_eq!(wires.writes.len(), 1);
    let write = wires.writes[0].1;
    assert_eq!((write.position, write.len, write.head), (0, 640, 640));
    assert_eq!((write.key, write.offset, write.word), (7, 4096, 64));
    assert!(write.notify.is_some());
    let events = wires.events();
    assert!(events.contains(&(
        B,
        Event::PeerHead {
            stream: there,
            head: 640
        }
    )));
    assert!(events.contains(&(
        A,
        Event::Credit {
            stream: here,
            to: 640
        }
    )));
}

#[test]
fn bulk_takes_a_descriptor_for_each_16_kib_at_most() {
    let mut wires = Wires::new(2, |_| {});
    let (here, there) = wires.connect(A, B, 20);
    let total = 64 << 20;
    let (mut head, mut credit, mut read) = (0, 0, 0);
    for round in 0.. {
        assert!(round < 1_000_000, "it stands still at {read}");
        if read == total {
            break;
        }
        head = (credit + (1 << 20)).min(total).min(head + 10_000);
        wires.node(A).advance_head(here, head).unwrap();
        wires.poll(A);
        if wires.posted.len() < 40 && head < credit + (1 << 20) && head < total {
            continue;
        }
        wires.settle();
        for (_, event) in wires.events() {
            match event {
                Event::Credit { to, .. } => credit = to,
                Event::PeerHead { head, .. } => {
                    read = head;
                    wires.node(B).advance_consumed(there, read).unwrap();
                }
                _ => {}
            }
        }
    }
    let writes = wires.writes.len() as u64;
    assert!(writes * (16 << 10) <= total, "{writes} descriptors");
    assert!(
        wires
            .writes
            .iter()
            .all(|(_, write)| write.position % (1 << 20) + u64::from(write.len) <= 1 << 20)
    );
}

#[test]
fn only_the_last_write_of_a_turn_notifies() {
    let mut wires = Wires::new(2, |_| {});
    let (here, there) = wires.connect(A, B, 12);
    for (head, read) in [(3000, 3000), (6000, 6000)] {
        wires.node(A).advance_head(here, head).unwrap();
        wires.settle();
        wires.node(B).advance_consumed(there, read).unwrap();
        wires.settle();
    }
    let shape: Vec<_> = wires
        .writes
        .iter()
        .map(|(_, write)| (write.position, write.len, write.notify.is_some()))
        .collect();
    assert_eq!(
        shape,
        [(0, 3000, true), (3000, 1096, false), (4096, 1904, true)]
    );
}

#[test]
fn a_quiet_consumer_is_not_notified_until_it_asks() {
    let mut wires = Wires::new(2, |_| {});
    let (here, there) = wires.connect(A, B, 16);
    wires.node(B).set_notify(there, false, 0).unwrap();
    wires.settle();
    wires.node(A).advance_head(here, 100).unwrap();
    wires.settle();
    assert!(wires.writes[0].1.notify.is_none());
    assert!(
        !wires
            .events()
            .iter()
            .any(|(node, event)| *node == B && matches!(event, Event::PeerHead { .. }))
    );
    // It asks having seen 100: there is nothing to say. Having seen less: at once.
    wires.node(B).set_notify(there, true, 100).unwrap();
    wires.settle();
    assert_eq!(wires.events(), []);
    wires.node(B).set_notify(there, true, 99).unwrap();
    wires.settle();
    assert_eq!(
        wires.events(),
        [(
            B,
            Event::PeerHead {
                stream: there,
                head: 100
            }
        )]
    );
}

#[test]
fn no_byte_is_sent_beyond_the_credit() {
    let mut wires = Wires::new(2, |config| config.quantum = 1000);
    let (here, there) = wires.connect(A, B, 12);
    wires.node(A).advance_head(here, 4096).unwrap();
    wires.settle();
    wires.node(A).advance_head(here, 8192).unwrap();
    wires.settle();
    assert_eq!(wires.node(A).progress(here), Some((4096, 4096, 0)));
    wires.node(B).advance_consumed(there, 1023).unwrap();
    wires.settle();
    assert_eq!(
        wires.node(A).progress(here),
        Some((4096, 4096, 0)),
        "less than a quarter"
    );
    wires.node(B).advance_consumed(there, 1024).unwrap();
    wires.settle();
    assert_eq!(wires.node(A).progress(here), Some((5120, 5120, 0)));
}

#[test]
fn streams_take_turns() {
    let mut wires = Wires::new(2, |_| {});
    let (bulk, _) = wires.connect(A, B, 20);
    let small: Vec<_> = (0..20).map(|_| wires.connect(A, B, 12).0).collect();
    wires.node(A).advance_head(bulk, 1 << 20).unwrap();
    for stream in &small {
        wires.node(A).advance_head(*stream, 64).unwrap();
    }
    wires.poll(A);
    let place = |stream| {
        wires
            .writes
            .iter()
            .position(|(_, write)| write.stream == stream)
            .unwrap()
    };
    let second = wires
        .writes
        .iter()
        .skip(1)
        .position(|(_, write)| write.stream == bulk)
        .unwrap();
    assert!(
        small.iter().all(|stream| place(*stream) <= second + 1),
        "bulk goes twice before others"
    );
}

#[test]
fn an_unanswered_connect_stays_on_tcp_after_a_millisecond() {
    let mut wires = Wires::new(2, |_| {});
    let now = wires.now;
    let stream = wires.node(A).connect(B, ADDRESSES, place(12), now).unwrap();
    wires.settle();
    let offered = wires
        .events()
        .into_iter()
        .find_map(|(_, event)| match event {
            Event::Incoming { stream, .. } => Some(stream),
            _ => None,
        });
    assert_eq!(wires.node(A).deadline().min(now + MS), now + MS);
    wires.pass(MS - 1);
    assert_eq!(wires.events(), []);
    wires.pass(1);
    assert_eq!(
        wires.events(),
        [(
            A,
            Event::Refused {
                stream,
                refusal: Refusal::Timeout
            }
        )]
    );
    // The late answer is undone, and both forget the stream.
    let offered = offered.unwrap();
    wires.node(B).accept(offered, place(12)).unwrap();
    wires.settle();
    assert_eq!(
        wires.events(),
        [
            (
                B,
                Event::Ended {
                    stream: offered,
                    reason: EndReason::PeerReset
                }
            ),
            (A, Event::Released { stream }),
        ]
    );
    wires.node(B).close(offered).unwrap();
    wires.settle();
    assert_eq!(wires.events(), [(B, Event::Released { stream: offered })]);
    assert_eq!((wires.node(A).streams(), wires.node(B).streams()), (0, 0));
}

#[test]
fn both_close_and_nothing_is_left() {
    let mut wires = Wires::new(2, |_| {});
    let (here, there) = wires.connect(A, B, 12);
    wires.node(A).advance_head(here, 10).unwrap();
    wires.node(A).shut(here).unwrap();
    wires.settle();
    let events = wires.events();
    assert!(events.contains(&(
        B,
        Event::PeerShut {
            stream: there,
            end: 10
        }
    )));
    wires.node(B).advance_consumed(there, 10).unwrap();
    wires.node(B).close(there).unwrap();
    wires.settle();
    assert!(wires.events().contains(&(
        A,
        Event::PeerShut {
            stream: here,
            end: 0
        }
    )));
    wires.node(A).close(here).unwrap();
    wires.settle();
    let events = wires.events();
    assert!(events.contains(&(A, Event::Released { stream: here })));
    assert_eq!((wires.node(A).streams(), wires.node(B).streams()), (0, 0));
    // The id has outlived its stream, also when its place is used again.
    let (again, _) = wires.connect(A, B, 12);
    assert_eq!(
        again.to_u64() as u32,
        here.to_u64() as u32,
        "the same place"
    );
    assert_eq!(
        wires.node(A).advance_head(here, 1),
        Err(LocalError::Unknown)
    );
}

#[test]
fn bytes_for_a_program_that_has_closed_reset_the_stream() {
    let mut wires = Wires::new(2, |_| {});
    let (here, there) = wires.connect(A, B, 12);
    wires.node(B).close(there).unwrap();
    wires.settle();
    wires.events();
    wires.node(A).advance_head(here, 1).unwrap();
    wires.settle();
    assert_eq!(
        wires.events(),
        [(
            A,
            Event::Ended {
                stream: here,
                reason: EndReason::PeerReset
            }
        )]
    );
}

#[test]
fn idle_sessions_stay_and_silent_ones_are_lost_then_given_up() {
    let mut wires = Wires::new(2, |_| {});
    let (here, _) = wires.connect(A, B, 12);
    for _ in 0..40 {
        wires.pass(50 * MS);
    }
    assert_eq!(
        wires.node(A).counters(B).unwrap().get(Count::SessionLost),
        0
    );
    // B says nothing more: its posts get lost, and so do those to it.
    wires.events();
    for _ in 0..40_000 {
        wires.now += MS;
        wires.poll(A);
        let posted = std::mem::take(&mut wires.posted);
        let now = wires.now;
        for post in posted {
            wires
                .node(A)
                .handle_completion(B, post.seq, Status::Failed, now);
        }
    }
    let events = wires.events();
    assert!(events.contains(&(A, Event::NodeGone { node: B })));
    assert!(events.contains(&(
        A,
        Event::Ended {
            stream: here,
            reason: EndReason::NodeGone
        }
    )));
    wires.node(A).close(here).unwrap();
    wires.poll(A);
    assert_eq!(wires.node(A).streams(), 0);
}

#[test]
fn a_refused_write_ends_its_stream_and_the_others_go_on() {
    let mut wires = Wires::new(2, |_| {});
    let (here, _) = wires.connect(A, B, 12);
    let (other, _) = wires.connect(A, B, 12);
    wires.node(A).advance_head(here, 10).unwrap();
    wires.node(A).advance_head(other, 20).unwrap();
    wires.poll(A);
    let now = wires.now;
    let posted = std::mem::take(&mut wires.posted);
    assert_eq!(posted.len(), 2);
    wires
        .node(A)
        .handle_completion(B, posted[0].seq, Status::Refused, now);
    wires
        .node(A)
        .handle_completion(B, posted[1].seq, Status::Flushed, now);
    wires.settle();
    assert_eq!(wires.restarts, 1);
    let events = wires.events();
    assert!(events.contains(&(
        A,
        Event::Ended {
            stream: here,
            reason: EndReason::AccessRefused
        }
    )));
    assert_eq!(wires.node(A).progress(other), Some((20, 20, 0)));
}

#[test]
fn a_restarted_node_loses_its_streams_and_their_keys_first() {
    let mut wires = Wires::new(2, |_| {});
    let (here, _) = wires.connect(A, B, 12);
    *wires.node(B) = Node::new(B, 2, 999, Config::new(2));
    wires.pass(20 * MS);
    let events = wires.events();
    let place = |wanted| {
        events
            .iter()
            .position(|(node, event)| *node == A && *event == wanted)
    };
    let gone = place(Event::NodeGone { node: B }).expect("the keys are withdrawn");
    let ended = place(Event::Ended {
        stream: here,
        reason: EndReason::NodeGone,
    });
    assert!(ended.is_some_and(|ended| gone < ended), "{events:?}");
    assert!(place(Event::NodeUp { node: B }) > ended, "{events:?}");
    assert_eq!(
        wires.node(A).counters(B).unwrap().get(Count::PeerRestarted),
        1
    );
}

#[test]
fn nobody_is_greeted_before_all_posts_of_the_lost_session_are_back() {
    let mut wires = Wires::new(2, |_| {});
    let (here, _) = wires.connect(A, B, 12);
    wires.node(A).advance_head(here, 10).unwrap();
    wires.poll(A);
    let late = std::mem::take(&mut wires.posted);
    // B's worker is another one: it greets anew.
    *wires.node(B) = Node::new(B, 1, 999, Config::new(2));
    wires.poll(B);
    wires.deliver();
    wires.poll(A);
    assert!(wires.posted.is_empty(), "greeted with a write in flight");
    let now = wires.now;
    wires
        .node(A)
        .handle_completion(B, late[0].seq, Status::Success, now);
    wires.poll(A);
    assert_eq!(wires.posted.len(), 1, "now the HELLO");
}

/// What a node posts succeeds, and does not arrive, until it has lost its session with the other one.
fn lose(wires: &mut Wires, id: NodeId, other: NodeId) {
    let lost = |wires: &mut Wires| {
        let counters = wires.node(id).counters(other);
        counters.unwrap().get(Count::SessionLost)
    };
    let before = lost(wires);
    while lost(wires) == before {
        wires.now += 50 * MS;
        wires.poll(id);
        let now = wires.now;
        for post in std::mem::take(&mut wires.posted) {
            wires
                .node(post.from)
                .handle_completion(post.to, post.seq, Status::Success, now);
        }
    }
}

/// Answers the questions of a node where its streams stand, the last first.
fn resume(wires: &mut Wires, id: NodeId) -> usize {
    let events = wires.events();
    let asked = events.iter().filter_map(|(at, event)| match event {
        Event::Resume { stream } if *at == id => Some(*stream),
        _ => None,
    });
    let asked: Vec<StreamId> = asked.collect();
    wires.events = events.into_iter().filter(|(at, _)| *at != id).collect();
    for stream in asked.iter().rev() {
        // It may have lost the session meanwhile.
        let _ = wires.node(id).resume(*stream, 0);
    }
    asked.len()
}

/// More streams than are looked at in one step. The session is lost again when the node has just learnt where they stand.
#[test]
fn streams_are_named_once_in_each_session() {
    const STREAMS: usize = 40;
    let mut wires = Wires::new(2, |_| {});
    (0..STREAMS).for_each(|_| {
        wires.connect(A, B, 12);
    });
    wires.events();
    lose(&mut wires, A, B);
    wires.settle();
    assert_eq!(resume(&mut wires, A), STREAMS);
    // It is lost again before A has posted anything.
    lose(&mut wires, B, A);
    wires.settle();
    for _ in 0..10 {
        for id in [A, B] {
            resume(&mut wires, id);
        }
        wires.pass(10 * MS);
    }
    assert!(wires.node(A).is_up(B), "the session does not begin");
    assert!(wires.node(B).is_up(A), "the session does not begin");
}

#[test]
fn a_peer_that_falls_silent_is_lost_although_posts_succeed() {
    let mut wires = Wires::new(2, |_| {});
    wires.connect(A, B, 12);
    for _ in 0..11 {
        wires.now += 50 * MS;
        wires.poll(A);
        let now = wires.now;
        for post in std::mem::take(&mut wires.posted) {
            wires
                .node(A)
                .handle_completion(B, post.seq, Status::Success, now);
        }
    }
    assert!(!wires.node(A).is_up(B));
    assert_eq!(
        wires.node(A).counters(B).unwrap().get(Count::SessionLost),
        1
    );
}
