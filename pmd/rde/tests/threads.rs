//! Devices on a thread of their own, and a thread for each node, in real time.

use rdsock_model::{Chaos, Fabric, Running};
use rdsock_rde::*;
use rdsock_vfio::{Shared, Space, model::ModelDevice};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

const RINGS: u64 = 256;
const PIECE: u64 = 64;
const MESSAGES: u64 = 50_000;
/// Much more than it takes, even on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

fn open(fabric: &Fabric, id: u16) -> Rde {
    let rde = Rde::open(Space::new(Arc::new(ModelDevice::new(fabric, 1)))).unwrap();
    rde.management().join(id, &[1, 2]);
    rde
}

/// Writes numbered pieces to the other node, reads its ones, and says how far it has read, all at once.
fn exchange(rde: &Rde, me: u16, region: &Region, key: spec::Key, both: &Barrier) {
    let mut set = rde.queue_set(0, Sizes::default()).unwrap();
    let memory = Arc::new(rde.space().allocate((RINGS * PIECE) as usize).unwrap());
    let local = Shared::new(&memory, 0, (RINGS * PIECE) as usize).unwrap();
    let (mut sent, mut credit, mut received, mut completed) = (0, RINGS, 0, 0);
    let mut told = 0;
    // Nothing can be sent to a queue set that is not there yet.
    both.wait();
    let start = Instant::now();
    while received < MESSAGES || completed < MESSAGES + 1 || credit < MESSAGES {
        set.poll_completions(64, |done| {
            assert!(done.status.is_ok(), "{done:?}");
            completed += 1;
        })
        .unwrap();
        set.poll_messages(64, |message| {
            let value = u64::from_le_bytes(message.payload[..8].try_into().unwrap());
            if message.kind == Kind::Window {
                assert!(value > credit - RINGS, "credits go back");
                credit = value + RINGS;
                return;
            }
            assert_eq!((value, message.length), (received, PIECE as u32));
            let mut bytes = [0; PIECE as usize];
            let at = (value % RINGS * PIECE) as usize;
            assert!(region.memory().unwrap().copy_out(at, &mut bytes));
            assert!(
                bytes.iter().all(|byte| *byte == value as u8),
                "{value}: {bytes:?}"
            );
            received += 1;
        })
        .unwrap();
        while sent < MESSAGES && sent < credit {
            let at = sent % RINGS * PIECE;
            assert!(local.copy_in(at as usize, &[sent as u8; PIECE as usize]));
            let pieces = [local.piece(at as usize, PIECE as u32).unwrap()];
            let operation = Operation::Write {
                to: Remote { key, offset: at },
                data: Data::Pieces(&pieces),
                word: None,
                notify: Some(Notify {
                    set: 0,
                    payload: &sent.to_le_bytes(),
                }),
            };
            let posted = set.post(&Work {
                target: 3 - me,
                operation,
                tag: sent,
                report: true,
            });
            if posted.is_err() {
                break;
            }
            sent += 1;
        }
        let due = received - told >= RINGS / 4 || (received == MESSAGES && told != received);
        if due && set.send(3 - me, 0, &received.to_le_bytes()).is_ok() {
            told = received;
        }
        if completed == MESSAGES && set.outstanding() == 0 {
            let (operation, report) = (Operation::Flush, true);
            let flush = Work {
                target: 3 - me,
                operation,
                tag: 0,
                report,
            };
            set.post(&flush).unwrap();
        }
        set.ring();
        std::thread::yield_now();
        assert!(start.elapsed() < LIMIT, "the other end has given up");
    }
    set.check().unwrap();
    // The other end may still wait for the last credit, which dropping the set could forget.
    both.wait();
}

#[test]
fn two_threads_and_their_devices_exchange_in_both_directions() {
    let fabric = Fabric::new(Chaos::default());
    let nodes = [open(&fabric, 1), open(&fabric, 2)];
    let regions = [0, 1].map(|i: usize| {
        let memory = Arc::new(nodes[i].space().allocate((RINGS * PIECE) as usize).unwrap());
        let view = Shared::new(&memory, 0, (RINGS * PIECE) as usize).unwrap();
        nodes[i].register(view, Rights::Write, None).unwrap()
    });
    let _running = Running::start(fabric, false, || {}).unwrap();
    let both = Barrier::new(2);
    std::thread::scope(|scope| {
        for i in [0, 1] {
            let (nodes, regions, both) = (&nodes, &regions, &both);
            scope.spawn(move || {
                exchange(
                    &nodes[i],
                    i as u16 + 1,
                    &regions[i],
                    regions[1 - i].key(),
                    both,
                )
            });
        }
    });
}
