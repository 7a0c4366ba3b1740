//! What the engine and the mailbox do between two nodes, when all goes well.
#[allow(dead_code)]
mod nodes;

use nodes::*;
use rdsock_model::Chaos;
use rdsock_rde::spec::Status;
use rdsock_rde::*;

#[test]
fn a_write_gathers_its_pieces_at_the_target() {
    let mut nodes = Nodes::pair();
    let (a, b) = nodes.two();
    assert!(a.local.copy_in(0, b"hello, ") && a.local.copy_in(100, b"world"));
    let pieces = [a.local.piece(0, 7).unwrap(), a.local.piece(100, 5).unwrap()];
    a.post(&work(2, 42, write(b.remote(1000), Data::Pieces(&pieces))));
    nodes.settle();
    let (a, b) = nodes.two();
    let done = a.completions();
    assert_eq!(done.len(), 1);
    assert_eq!((done[0].tag, done[0].target, done[0].length), (42, 2, 12));
    assert_eq!(done[0].status, Status::OK);
    assert_eq!(b.region_bytes(999, 14), b"\0hello, world\0");
    assert_eq!(b.messages(), []);
    assert_eq!(a.set.outstanding(), 0);
}

#[test]
fn a_read_scatters_into_its_pieces() {
    let mut nodes = Nodes::pair();
    let (a, b) = nodes.two();
    assert!(b.region.memory().unwrap().copy_in(500, b"0123456789"));
    let into = [a.local.piece(0, 3).unwrap(), a.local.piece(50, 7).unwrap()];
    let from = b.remote(500);
    a.post(&work(2, 1, Operation::Read { from, into: &into }));
    nodes.settle();
    let (a, _) = nodes.two();
    assert_eq!(a.completions()[0].status, Status::OK);
    let mut bytes = [0; 57];
    assert!(a.local.copy_out(0, &mut bytes));
    assert_eq!(
        (&bytes[..4], &bytes[50..]),
        (&b"012\0"[..], &b"3456789"[..])
    );
}

#[test]
fn a_notification_tells_of_data_and_word() {
    let mut nodes = Nodes::pair();
    let (a, b) = nodes.two();
    let payload: Vec<u8> = (1..=20).collect();
    let operation = Operation::Write {
        to: b.remote(64),
        data: Data::Inline(b"inline data"),
        word: Some((8, 0x1234_5678_9abc_def0)),
        notify: Some(Notify {
            set: 0,
            payload: &payload,
        }),
    };
    a.post(&work(2, 7, operation));
    nodes.settle();
    let (a, b) = nodes.two();
    let messages = b.messages();
    assert_eq!(messages.len(), 1);
    let message = messages[0];
    assert_eq!((message.source, message.source_set), (1, 0));
    assert_eq!((message.kind, message.length), (Kind::Notification, 11));
    assert_eq!(message.payload[..20], payload);
    assert_eq!(message.payload[20..], [0; 28]);
    assert_eq!(b.region_bytes(64, 11), b"inline data");
    assert_eq!(
        b.region.memory().unwrap().load_word(8),
        Some(0x1234_5678_9abc_def0)
    );
    assert_eq!(a.completions().len(), 1);
}

#[test]
fn a_report_covers_what_came_before() {
    let mut nodes = Nodes::pair();
    let (a, b) = nodes.two();
    for i in 0..5u8 {
        let data = [i + 1];
        let operation = write(b.remote(i.into()), Data::Inline(&data));
        let quiet = Work {
            report: false,
            ..work(2, i.into(), operation)
        };
        a.set.post(&quiet).unwrap();
    }
    a.set.post(&work(2, 99, Operation::Flush)).unwrap();
    assert_eq!(a.set.outstanding(), 6);
    a.set.ring();
    nodes.settle();
    let (a, b) = nodes.two();
    let done = a.completions();
    assert_eq!((done.len(), done[0].tag), (1, 99));
    assert_eq!(a.set.outstanding(), 0);
    assert_eq!(b.region_bytes(0, 5), [1, 2, 3, 4, 5]);
}

#[test]
fn a_write_of_a_megabyte_arrives_whole() {
    let mut nodes = Nodes::pair();
    let (a, b) = nodes.two();
    let memory = |node: &Node| {
        let memory = std::sync::Arc::new(node.rde.space().allocate(1 << 20).unwrap());
        rdsock_vfio::Shared::new(&memory, 0, 1 << 20).unwrap()
    };
    let (from, to) = (memory(a), memory(b));
    let bytes: Vec<u8> = (0..1u32 << 20)
        .map(|i| (i.wrapping_mul(i) >> 7) as u8)
        .collect();
    assert!(from.copy_in(0, &bytes));
    let region = b.rde.register(to, Rights::Write, Some(1)).unwrap();
    let pieces = [
        from.piece(0, 1 << 19).unwrap(),
        from.piece(1 << 19, 1 << 19).unwrap(),
    ];
    let remote = Remote {
        key: region.key(),
        offset: 0,
    };
    a.post(&work(2, 0, write(remote, Data::Pieces(&pieces))));
    nodes.settle();
    let mut back = vec![0; 1 << 20];
    assert!(region.memory().unwrap().copy_out(0, &mut back));
    assert!(back == bytes, "the data differ");
    assert_eq!(nodes.two().0.completions()[0].length, 1 << 20);
}

#[test]
fn messages_go_to_and_fro_in_order() {
    let mut nodes = Nodes::pair();
    for round in 0..500u64 {
        let (a, b) = nodes.two();
        a.set.send(2, 0, &round.to_le_bytes()).unwrap();
        assert_eq!(b.messages(), []);
        nodes.settle();
        let (_, b) = nodes.two();
        let got = b.messages();
        assert_eq!(
            (got.len(), got[0].source, got[0].kind),
            (1, 1, Kind::Window)
        );
        b.set.send(1, 0, &got[0].payload[..8]).unwrap();
        nodes.settle();
        let (a, _) = nodes.two();
        let got = a.messages();
        assert_eq!((got.len(), got[0].source), (1, 2));
        assert_eq!(got[0].payload[..8], round.to_le_bytes());
    }
}

#[test]
fn a_node_reaches_itself_and_messages_reach_the_set_they_name() {
    let mut nodes = Nodes::new(1, Chaos::default(), SMALL);
    let mut other = nodes.nodes[0].rde.queue_set(1, SMALL).unwrap();
    let node = &mut nodes.nodes[0];
    node.set.send(1, 1, b"to the other set").unwrap();
    let to = node.remote(0);
    node.post(&work(1, 0, write(to, Data::Inline(b"self"))));
    nodes.settle();
    let mut got = Vec::new();
    other
        .poll_messages(9, |message| got.push(*message))
        .unwrap();
    assert_eq!((got.len(), got[0].source_set), (1, 0));
    assert_eq!(&got[0].payload[..16], b"to the other set");
    assert_eq!(nodes.nodes[0].messages(), []);
    assert_eq!(nodes.nodes[0].region_bytes(0, 4), b"self");
}

#[test]
fn queues_wrap_with_descriptors_of_every_length() {
    let mut nodes = Nodes::pair();
    let mut expected = vec![0u8; MEMORY];
    for round in 0..2000u64 {
        let (a, b) = nodes.two();
        let len = (round * 7 % 129) as usize;
        let at = (round * 131 % 60_000) as usize;
        let data = vec![round as u8; len];
        let payload = [round as u8; 48];
        let operation = Operation::Write {
            to: b.remote(at as u64),
            data: Data::Inline(&data),
            word: None,
            notify: Some(Notify {
                set: 0,
                payload: &payload[..(round % 49) as usize],
            }),
        };
        expected[at..at + len].copy_from_slice(&data);
        a.set.post(&work(2, round, operation)).unwrap();
        if round % 3 == 0 {
            continue;
        }
        a.set.ring();
        nodes.settle();
        let (a, b) = nodes.two();
        let tags: Vec<u64> = a.completions().iter().map(|done| done.tag).collect();
        assert!(tags.is_sorted() && tags.last() == Some(&round));
        assert_eq!(b.messages().len(), tags.len());
    }
    assert!(nodes.nodes[1].region_bytes(0, MEMORY) == expected);
}

#[test]
fn an_armed_queue_set_is_interrupted_once() {
    let mut nodes = Nodes::pair();
    let eventfd = std::sync::Arc::new(
        rdsock_vfio::EventFd::from_flags(rdsock_vfio::EventFlags::EFD_NONBLOCK).unwrap(),
    );
    let (a, b) = nodes.two();
    let device = b.rde.space().device();
    device.set_interrupt(1, Some(eventfd.clone())).unwrap();
    a.set.send(2, 0, b"not armed").unwrap();
    nodes.settle();
    assert!(eventfd.read().is_err());
    // Armed with a message that was not taken: fires at once.
    nodes.two().1.set.arm();
    nodes.settle();
    assert_eq!(eventfd.read(), Ok(1));
    assert_eq!(nodes.two().1.messages().len(), 1);
    // Armed with nothing there: fires with the next, and not again.
    nodes.two().1.set.arm();
    nodes.settle();
    assert!(eventfd.read().is_err());
    for _ in 0..3 {
        nodes.two().0.set.send(2, 0, b"armed").unwrap();
        nodes.settle();
    }
    assert_eq!(eventfd.read(), Ok(1));
    assert_eq!(nodes.two().1.messages().len(), 3);
}
