//! What each violation of `docs/protocol.md` leads to, and to nothing else.

mod pair;

use pair::{A, ADDRESSES, B, C, Wires, place};
use rdsock_proto::message::{Body, Message};
use rdsock_proto::{Cause, Count, EndReason, Event, LocalError, NodeId, Refusal, Status, StreamId};

/// The tag that `to` expects from `from`, from a message that is sent for the purpose.
fn session(wires: &mut Wires, from: NodeId, stream: StreamId) -> (u32, StreamId) {
    wires.node(from).set_notify(stream, true, 0).unwrap();
    wires.poll(from);
    let credit = Message::decode(&wires.posted[0].message.unwrap()).unwrap();
    wires.settle();
    match credit.body {
        Body::Credit { to, .. } => (credit.session, to),
        other => panic!("{other:?}"),
    }
}

#[test]
fn impossible_credits_heads_and_ends_break_that_stream_alone() {
    type Lie = fn(StreamId) -> Body;
    let lies: [(Lie, Count); 5] = [
        (
            |to| Body::Credit {
                to,
                consumed: 101,
                seen: 0,
                notify: true,
            },
            Count::BadCredit,
        ),
        (
            |to| Body::Credit {
                to,
                consumed: 0,
                seen: 101,
                notify: true,
            },
            Count::BadCredit,
        ),
        (|to| Body::Data { to, head: 4097 }, Count::BadHead),
        (|to| Body::Shut { to, end: 4097 }, Count::BadEnd),
        (
            |to| Body::Close {
                to,
                end: 0,
                consumed: 101,
            },
            Count::BadCredit,
        ),
    ];
    for (lie, count) in lies {
        let mut wires = Wires::new(3, |_| {});
        let (here, there) = wires.connect(A, B, 12);
        let (other, _) = wires.connect(A, C, 12);
        wires.node(A).advance_head(here, 100).unwrap();
        wires.settle();
        let (tag, to) = session(&mut wires, B, there);
        wires.events();
        let now = wires.now;
        let message = Message {
            session: tag,
            body: lie(to),
        }
        .encode();
        wires.node(A).handle_message(B, &message, now);
        wires.settle();
        let events = wires.events();
        assert!(
            events.contains(&(
                A,
                Event::Ended {
                    stream: here,
                    reason: EndReason::Violation
                }
            )),
            "{events:?}"
        );
        assert_eq!(wires.node(A).counters(B).unwrap().get(count), 1);
        wires.node(A).advance_head(other, 100).unwrap();
        wires.settle();
        assert_eq!(wires.node(A).progress(other), Some((100, 100, 0)));
    }
}

#[test]
fn a_node_may_not_speak_of_another_nodes_stream() {
    let mut wires = Wires::new(3, |_| {});
    let (here, _) = wires.connect(A, B, 12);
    let (_, third) = wires.connect(A, C, 12);
    let (tag, _) = session(&mut wires, C, third);
    wires.events();
    let now = wires.now;
    let body = Body::Reset {
        to: here,
        cause: Cause::Program,
    };
    wires
        .node(A)
        .handle_message(C, &Message { session: tag, body }.encode(), now);
    wires.settle();
    assert_eq!(wires.events(), []);
    assert_eq!(
        wires.node(A).counters(C).unwrap().get(Count::ForeignStream),
        1
    );
}

#[test]
fn a_node_gets_its_share_of_the_table() {
    let mut wires = Wires::new(2, |config| {
        config.streams_from_node = 3;
        config.pending = 2;
    });
    for _ in 0..3 {
        wires.connect(A, B, 12);
    }
    let now = wires.now;
    let stream = wires.node(A).connect(B, ADDRESSES, place(12), now).unwrap();
    wires.settle();
    let events = wires.events();
    assert!(
        events.contains(&(
            A,
            Event::Refused {
                stream,
                refusal: Refusal::Limit
            }
        )),
        "{events:?}"
    );
    assert_eq!(wires.node(B).counters(A).unwrap().get(Count::NoRoom), 1);
    assert_eq!(wires.node(B).streams(), 3);
}

#[test]
fn completions_for_nothing_are_counted() {
    let mut wires = Wires::new(2, |_| {});
    let now = wires.now;
    for seq in [0, 1, 999, u64::MAX] {
        wires
            .node(A)
            .handle_completion(B, seq, Status::Success, now);
    }
    assert_eq!(
        wires
            .node(A)
            .counters(B)
            .unwrap()
            .get(Count::StrayCompletion),
        4
    );
}

#[test]
fn nonsense_of_a_program_is_an_error_and_changes_nothing() {
    let mut wires = Wires::new(2, |_| {});
    let (here, _) = wires.connect(A, B, 12);
    wires.node(A).advance_head(here, 100).unwrap();
    wires.settle();
    for head in [99, 100 + 4097, u64::MAX] {
        assert_eq!(
            wires.node(A).advance_head(here, head),
            Err(LocalError::Position)
        );
    }
    for consumed in [4097, u64::MAX] {
        assert_eq!(
            wires.node(A).advance_consumed(here, consumed),
            Err(LocalError::Position)
        );
    }
    wires.node(A).shut(here).unwrap();
    assert_eq!(
        wires.node(A).advance_head(here, 101),
        Err(LocalError::State)
    );
}

#[test]
fn connects_beyond_the_agreed_number_are_ignored() {
    let mut wires = Wires::new(2, |config| config.pending = 2);
    let (here, _) = wires.connect(A, B, 12);
    let (tag, _) = session(&mut wires, A, here);
    wires.events();
    for n in 1..=5 {
        let from = StreamId::from_u64(n << 32).unwrap();
        let offer = Body::Offer {
            from,
            place: place(12),
            source_port: 1,
            destination_port: 2,
        };
        let (source, destination) = (ADDRESSES.source, ADDRESSES.destination);
        let connect = Body::Connect {
            from,
            source,
            destination,
        };
        for body in [offer, connect] {
            let now = wires.now;
            let message = Message { session: tag, body }.encode();
            wires.node(B).handle_message(A, &message, now);
        }
    }
    wires.settle();
    assert_eq!(wires.events().len(), 2);
    assert_eq!(wires.node(B).streams(), 3);
    assert_eq!(
        wires.node(B).counters(A).unwrap().get(Count::ConnectFlood),
        3
    );
}
