//! What a message costs, counted by the model (`docs/device.md`, 10).
#[allow(dead_code)]
mod nodes;

use nodes::*;
use rdsock_model::Counters;
use rdsock_rde::*;

/// A write of 64 bytes with a notification, as a stream sends it.
fn message<'a>(b: &Node, pieces: &'a [rdsock_vfio::Piece]) -> Work<'a> {
    Work {
        report: false,
        ..work(
            2,
            0,
            Operation::Write {
                to: b.remote(0),
                data: Data::Pieces(pieces),
                word: None,
                notify: Some(Notify {
                    set: 0,
                    payload: b"stream, position",
                }),
            },
        )
    }
}

#[test]
fn a_message_of_64_bytes_costs_what_the_data_sheet_says() {
    let mut nodes = Nodes::pair();
    let before = [nodes.nodes[0].counters(), nodes.nodes[1].counters()];
    let (a, b) = nodes.two();
    let pieces = [a.local.piece(0, 64).unwrap()];
    a.post(&message(b, &pieces));
    nodes.settle();
    let (a, b) = nodes.two();
    assert_eq!(b.messages().len(), 1);
    assert_eq!(a.completions().len(), 0);
    let (source, target) = (a.counters(), b.counters());
    assert_eq!(
        source,
        Counters {
            register_writes: before[0].register_writes + 1,
            doorbells: before[0].doorbells + 1,
            descriptors: 1,
            descriptor_reads: 1,
            payload_reads: 1,
            bytes_read: 64,
            status_writes: before[0].status_writes + 1,
            messages_out: 1,
            ..before[0]
        }
    );
    assert_eq!(
        target,
        Counters {
            payload_writes: 1,
            bytes_written: 64,
            notifications_in: 1,
            ..before[1]
        }
    );
}

#[test]
fn a_batch_shares_the_doorbell_and_no_register_is_read() {
    let mut nodes = Nodes::pair();
    let before = [nodes.nodes[0].counters(), nodes.nodes[1].counters()];
    const MESSAGES: u64 = 16 * 500;
    for _ in 0..MESSAGES / 16 {
        let (a, b) = nodes.two();
        let pieces = [a.local.piece(0, 64).unwrap()];
        for _ in 0..16 {
            a.set.post(&message(b, &pieces)).unwrap();
        }
        a.set.ring();
        nodes.settle();
        let (a, b) = nodes.two();
        assert_eq!(b.messages().len(), 16);
        a.completions();
    }
    let (a, b) = nodes.two();
    let (source, target) = (a.counters(), b.counters());
    assert_eq!(source.register_reads, before[0].register_reads);
    assert_eq!(target.register_reads, before[1].register_reads);
    assert_eq!(source.doorbells - before[0].doorbells, MESSAGES / 16);
    assert_eq!(source.payload_reads, MESSAGES);
    assert_eq!(target.payload_writes, MESSAGES);
    assert_eq!(target.notifications_in, MESSAGES);
    // Reads of the work queue: one for each batch, two where it wraps.
    assert!(source.descriptor_reads <= 2 * (MESSAGES / 16));
    // Completions for the driver's own book, and heads: few.
    assert!(source.completions <= MESSAGES / 16, "{source:?}");
    assert!(
        target.head_updates - before[1].head_updates <= MESSAGES / 16,
        "{target:?}"
    );
}

#[test]
fn a_window_message_rings_no_doorbell_and_reads_no_memory() {
    let mut nodes = Nodes::pair();
    let before = nodes.nodes[0].counters();
    nodes.two().0.set.send(2, 0, b"ping").unwrap();
    nodes.settle();
    let after = nodes.nodes[0].counters();
    assert_eq!(
        after,
        Counters {
            register_writes: before.register_writes + 7,
            status_writes: before.status_writes + 1,
            window_messages: 1,
            messages_out: 1,
            ..before
        }
    );
    assert_eq!(nodes.two().1.messages().len(), 1);
}
