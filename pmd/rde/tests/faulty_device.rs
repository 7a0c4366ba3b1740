//! A device that lies, breaks or goes away is reported as failed: no panic, and no use after that.
#[allow(dead_code)]
mod nodes;

use nodes::*;
use rdsock_model::{Corruption, Fault};
use rdsock_rde::*;

fn poll(node: &mut Node) -> Result<Vec<Completion>, DeviceFailed> {
    let mut all = Vec::new();
    node.set.poll_completions(usize::MAX, |c| all.push(c))?;
    Ok(all)
}

/// The queue set has failed for good, and says the same whatever it is asked.
fn is_failed(node: &mut Node, with: DeviceFailed) {
    let flush = work(2, 0, Operation::Flush);
    assert_eq!(node.set.post(&flush), Err(NotPosted::Failed(with)));
    assert_eq!(node.set.send(2, 0, b""), Err(NotPosted::Failed(with)));
    assert_eq!(node.set.poll_completions(1, |_| {}), Err(with));
    assert_eq!(node.set.poll_messages(1, |_| {}), Err(with));
    assert_eq!(node.set.check(), Err(with));
    let before = node.set.stats();
    node.set.ring();
    node.set.arm();
    assert_eq!(node.set.stats(), before);
}

/// What comes of three flushes of which one's completion is wrong.
fn corrupted(corruption: Corruption) -> DeviceFailed {
    let mut nodes = Nodes::pair();
    nodes.nodes[0].post(&work(2, 0, Operation::Flush));
    nodes.settle();
    assert_eq!(poll(&mut nodes.nodes[0]).unwrap().len(), 1);
    nodes.nodes[0].inject(Fault::Corrupt(corruption));
    nodes.nodes[0].post(&work(2, 1, Operation::Flush));
    nodes.nodes[0].post(&work(2, 2, Operation::Flush));
    nodes.settle();
    let a = &mut nodes.nodes[0];
    let failed = poll(a).and_then(|_| a.set.check()).unwrap_err();
    is_failed(a, failed);
    failed
}

#[test]
fn a_wrong_completion_is_found() {
    use DeviceFailed as F;
    let queue = "completion";
    assert_eq!(corrupted(Corruption::Phase), F::WrongPhase { queue });
    assert!(matches!(
        corrupted(Corruption::Cookie),
        F::ForNothing { .. }
    ));
    assert!(matches!(
        corrupted(Corruption::Index),
        F::Contradiction { .. }
    ));
    assert!(matches!(
        corrupted(Corruption::Target),
        F::Contradiction { .. }
    ));
    assert!(matches!(
        corrupted(Corruption::Status),
        F::Contradiction { .. }
    ));
    assert!(matches!(corrupted(Corruption::Twice), F::ForNothing { .. }));
}

#[test]
fn a_completion_for_nothing_is_found() {
    let mut nodes = Nodes::pair();
    nodes.nodes[0].inject(Fault::CompletionForNothing(0));
    let failed = poll(&mut nodes.nodes[0]).unwrap_err();
    assert_eq!(
        failed,
        DeviceFailed::ForNothing {
            cookie: 3,
            index: 0
        }
    );
    is_failed(&mut nodes.nodes[0], failed);
}

#[test]
fn a_message_out_of_place_is_found() {
    let mut nodes = Nodes::pair();
    nodes.nodes[1].set.send(1, 0, b"good").unwrap();
    nodes.settle();
    nodes.nodes[0].inject(Fault::MessageOutOfPlace(0));
    let a = &mut nodes.nodes[0];
    let mut good = 0;
    let failed = a.set.poll_messages(9, |_| good += 1).unwrap_err();
    assert_eq!(good, 1);
    let (index, expected) = (4, 1);
    assert_eq!(failed, DeviceFailed::BadMessage { index, expected });
    is_failed(a, failed);
}

#[test]
fn a_device_that_is_gone_reads_all_ones_and_the_others_go_on() {
    let mut nodes = Nodes::new(3, Default::default(), SMALL);
    nodes.nodes[0].post(&work(
        2,
        1,
        Operation::Message(Notify {
            set: 0,
            payload: b"",
        }),
    ));
    nodes.nodes[0].inject(Fault::Remove);
    nodes.settle();
    let a = &mut nodes.nodes[0];
    assert_eq!(poll(a), Ok(vec![]));
    assert_eq!(a.set.check(), Err(DeviceFailed::Gone));
    is_failed(a, DeviceFailed::Gone);
    assert!(a.rde.management().status().is_gone());
    let again = a.rde.queue_set(1, SMALL);
    assert!(matches!(again, Err(OpenError::Failed(DeviceFailed::Gone))));
    let opened = Rde::open(a.rde.space().clone());
    assert!(matches!(opened, Err(OpenError::Failed(DeviceFailed::Gone))));
    assert_eq!(nodes.nodes[1].messages(), []);
    nodes.nodes[1].set.send(3, 0, b"still here").unwrap();
    nodes.settle();
    assert_eq!(nodes.nodes[2].messages().len(), 1);
    // It is dropped without waiting for a device that does not answer.
    let start = std::time::Instant::now();
    drop(nodes);
    assert!(start.elapsed().as_millis() < 900);
}

#[test]
fn a_reset_in_flight_leaves_no_notification_and_is_noticed() {
    let mut nodes = Nodes::pair();
    let (a, b) = nodes.two();
    assert!(a.local.copy_in(0, &[7; 4096]));
    a.inject(Fault::ResetInFlight);
    let pieces = [a.local.piece(0, 4096).unwrap()];
    let operation = Operation::Write {
        to: b.remote(0),
        data: Data::Pieces(&pieces),
        word: Some((8192, 1)),
        notify: Some(Notify {
            set: 0,
            payload: b"",
        }),
    };
    a.post(&work(2, 0, operation));
    nodes.settle();
    let (a, b) = nodes.two();
    let bytes = b.region_bytes(0, 8200);
    assert!(bytes[..2048] == [7; 2048] && bytes[2048..] == [0; 6152]);
    assert_eq!(b.messages(), []);
    assert_eq!(poll(a), Ok(vec![]));
    assert_eq!(a.set.check(), Err(DeviceFailed::Reset));
    is_failed(a, DeviceFailed::Reset);
}

#[test]
fn after_a_reset_the_device_works_again() {
    let mut nodes = Nodes::pair();
    nodes.nodes[0].set.send(2, 0, b"before").unwrap();
    nodes.settle();
    let a = nodes.nodes.remove(0);
    assert_eq!(a.rde.management().node(), 1);
    let (rde, function) = (a.rde, a.function);
    drop((a.set, a.region));
    rde.management().reset().unwrap();
    assert_eq!(rde.management().node(), 0);
    assert_eq!(function.counters().resets, 1);
    rde.management().join(1, &[2]);
    let mut set = rde.queue_set(0, SMALL).unwrap();
    set.check().unwrap();
    set.send(2, 0, b"after").unwrap();
    nodes.settle();
    let got = nodes.nodes[0].messages();
    assert_eq!(got.len(), 2);
    assert_eq!(&got[1].payload[..5], b"after");
}

#[test]
fn a_set_that_the_device_stops_is_noticed_and_can_be_started_again() {
    let mut nodes = Nodes::pair();
    let a = &mut nodes.nodes[0];
    let pages = a.rde.space().device().registers(2).unwrap();
    pages.write32(0x080, 1000);
    nodes.settle();
    let a = &mut nodes.nodes[0];
    let failed = DeviceFailed::SetFailed { set: 0, fault: 2 };
    assert_eq!(a.set.check(), Err(failed));
    is_failed(a, failed);
    assert!(matches!(a.rde.queue_set(0, SMALL), Err(OpenError::Busy(0))));
    let Node {
        rde,
        set,
        server: _server,
        ..
    } = nodes.nodes.remove(0);
    drop(set);
    rde.queue_set(0, SMALL).unwrap().check().unwrap();
}

#[test]
fn a_stuck_queue_loses_nothing_when_it_goes_on() {
    let mut nodes = Nodes::pair();
    nodes.nodes[0].inject(Fault::Stuck(0, true));
    nodes.nodes[0].post(&work(2, 5, Operation::Flush));
    nodes.nodes[0].set.send(2, 0, b"late").unwrap();
    nodes.pass(5_000_000_000);
    assert_eq!(poll(&mut nodes.nodes[0]), Ok(vec![]));
    nodes.nodes[0].set.check().unwrap();
    nodes.nodes[0].inject(Fault::Stuck(0, false));
    nodes.settle();
    assert_eq!(poll(&mut nodes.nodes[0]).unwrap()[0].tag, 5);
    assert_eq!(nodes.nodes[1].messages().len(), 1);
}

#[test]
fn a_queue_set_is_checked_before_it_starts() {
    let nodes = Nodes::pair();
    let rde = &nodes.nodes[0].rde;
    let sizes = |work| Sizes { work, ..SMALL };
    assert!(matches!(
        rde.queue_set(1, sizes(5)),
        Err(OpenError::Sizes(16))
    ));
    assert!(matches!(
        rde.queue_set(1, sizes(17)),
        Err(OpenError::Sizes(16))
    ));
    assert!(matches!(
        rde.queue_set(2, SMALL),
        Err(OpenError::NoQueueSet(2))
    ));
    assert!(matches!(rde.queue_set(0, SMALL), Err(OpenError::Busy(0))));
    rde.queue_set(1, SMALL).unwrap();
    rde.queue_set(1, SMALL).unwrap();
}
