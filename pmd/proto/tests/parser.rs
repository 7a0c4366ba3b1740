//! The parser: every message comes back as it was, and nothing else is understood.

use proptest::prelude::*;
use rdsock_proto::message::{Body, Malformed, Message, SIZE};
use rdsock_proto::{Cause, Place, Refusal, StreamId};
use std::net::Ipv6Addr;

fn id() -> impl Strategy<Value = StreamId> {
    any::<u64>().prop_filter_map("generation 0", StreamId::from_u64)
}

fn place() -> impl Strategy<Value = Place> {
    let fields = (any::<u32>(), any::<u64>(), any::<u64>(), 12..=30_u8);
    fields.prop_filter_map("impossible", |(key, ring, word, log2)| {
        Place {
            key,
            ring,
            word: word & !7,
            log2,
        }
        .checked()
        .ok()
    })
}

fn address() -> impl Strategy<Value = Ipv6Addr> {
    any::<u128>().prop_map(Ipv6Addr::from)
}

fn body() -> impl Strategy<Value = Body> {
    let position = any::<u64>;
    prop_oneof![
        (1..u64::MAX, 1..u32::MAX, any::<u32>()).prop_map(|(epoch, tag, pending)| Body::Hello {
            epoch,
            tag,
            pending
        }),
        (id(), place(), any::<u16>(), any::<u16>()).prop_map(
            |(from, place, source_port, destination_port)| Body::Offer {
                from,
                place,
                source_port,
                destination_port
            }
        ),
        (id(), address(), address()).prop_map(|(from, source, destination)| Body::Connect {
            from,
            source,
            destination
        }),
        (id(), id(), place()).prop_map(|(to, from, place)| Body::Accept { to, from, place }),
        (id(), prop::sample::select(Refusal::ALL))
            .prop_map(|(to, refusal)| Body::Refuse { to, refusal }),
        (id(), position()).prop_map(|(to, head)| Body::Data { to, head }),
        (id(), position(), position(), any::<bool>()).prop_map(|(to, consumed, seen, notify)| {
            Body::Credit {
                to,
                consumed,
                seen,
                notify,
            }
        }),
        (id(), position()).prop_map(|(to, end)| Body::Shut { to, end }),
        (id(), position(), position()).prop_map(|(to, end, consumed)| Body::Close {
            to,
            end,
            consumed
        }),
        (id(), prop::sample::select(Cause::ALL)).prop_map(|(to, cause)| Body::Reset { to, cause }),
        (id(), id(), position(), position(), any::<bool>()).prop_map(
            |(to, from, arrived, consumed, notify)| Body::Resume {
                to,
                from,
                arrived,
                consumed,
                notify
            }
        ),
        Just(Body::Resumed),
        Just(Body::Alive),
    ]
}

proptest! {
    #[test]
    fn a_message_comes_back(session in 1..u32::MAX, body in body()) {
        let message = Message { session, body };
        prop_assert_eq!(Message::decode(&message.encode()), Ok(message));
    }

    /// A changed bit is refused or says something else: no two forms mean the same.
    #[test]
    fn a_changed_bit_does_not_pass_unseen(session in 1..u32::MAX, body in body(), bit in 0..SIZE * 8) {
        let message = Message { session, body };
        let mut bytes = message.encode();
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert_ne!(Message::decode(&bytes), Ok(message));
    }
}

/// The bytes of `docs/protocol.md`, literally.
#[test]
fn the_layout_is_that_of_the_document() {
    let to = StreamId::from_u64(0x0807_0605_0403_0201).unwrap();
    let from = StreamId::from_u64(0x1817_1615_1413_1211).unwrap();
    let place = Place {
        key: 0x4443_4241,
        ring: 0x2827_2625_2423_0000,
        word: 0x3837_3635_3433_3230,
        log2: 16,
    };
    let bytes = Message {
        session: 0x0D0C_0B0A,
        body: Body::Accept { to, from, place },
    }
    .encode();
    let mut expected = vec![1, 4, 16, 0, 0x0A, 0x0B, 0x0C, 0x0D];
    expected.extend([1, 2, 3, 4, 5, 6, 7, 8]);
    expected.extend([0, 0, 0x23, 0x24, 0x25, 0x26, 0x27, 0x28]);
    expected.extend([0x30, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37, 0x38]);
    expected.extend([0x41, 0x42, 0x43, 0x44]);
    expected.extend([0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18]);
    expected.resize(SIZE, 0);
    assert_eq!(bytes.to_vec(), expected);
}

#[test]
fn each_check_refuses() {
    let to = StreamId::from_u64(1 << 32).unwrap();
    let good = Message {
        session: 1,
        body: Body::Data { to, head: 5 },
    }
    .encode();
    let with = |at: usize, value: u8| {
        let mut bytes = good;
        bytes[at] = value;
        Message::decode(&bytes)
    };
    assert!(Message::decode(&good).is_ok());
    assert_eq!(Message::decode(&good[..47]), Err(Malformed::Length));
    assert_eq!(Message::decode(&[0; 64]), Err(Malformed::Length));
    assert_eq!(with(0, 2), Err(Malformed::Version));
    assert_eq!(with(1, 0), Err(Malformed::Kind));
    assert_eq!(with(1, 14), Err(Malformed::Kind));
    assert_eq!(with(2, 1), Err(Malformed::Reserved));
    assert_eq!(with(4, 0), Err(Malformed::Field), "no session");
    assert_eq!(with(12, 0), Err(Malformed::Field), "generation 0");
    assert_eq!(with(47, 1), Err(Malformed::Reserved));
}

#[test]
fn impossible_places_are_refused() {
    let good = Place {
        key: 1,
        ring: 4096,
        word: 64,
        log2: 12,
    };
    assert!(good.checked().is_ok());
    for bad in [
        Place { log2: 11, ..good },
        Place { log2: 31, ..good },
        Place {
            ring: u64::MAX - 4095,
            ..good
        },
        Place {
            word: u64::MAX - 7,
            ..good
        },
        Place { word: 65, ..good },
        Place { word: 4096, ..good },
        Place { word: 8184, ..good },
    ] {
        assert_eq!(bad.checked(), Err(Malformed::Field), "{bad:?}");
    }
    assert!(Place { word: 8192, ..good }.checked().is_ok());
}
