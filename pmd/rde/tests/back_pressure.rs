//! Full queues, slow targets, links that fail: nothing is dropped, others go on, and what is lost is lost
//! with a status and in order.
#[allow(dead_code)]
mod nodes;

use nodes::*;
use rdsock_model::{Chaos, Fault};
use rdsock_rde::spec::{Status, status};
use rdsock_rde::*;

fn note(target: u16, number: u64, payload: &[u8]) -> Work<'_> {
    work(
        target,
        number,
        Operation::Message(Notify { set: 0, payload }),
    )
}

fn number(message: &Message) -> u64 {
    u64::from_le_bytes(message.payload[..8].try_into().unwrap())
}

#[test]
fn a_full_message_queue_holds_the_sender_and_loses_nothing() {
    let mut nodes = Nodes::pair();
    let (mut sent, mut got) = (0u64, 0u64);
    for _ in 0..50 {
        let a = &mut nodes.nodes[0];
        while a.set.send(2, 0, &sent.to_le_bytes()).is_ok() {
            sent += 1;
        }
        nodes.settle();
    }
    // In the target's queue, in the lane, and in the window.
    assert_eq!(sent, 64 + 1024 + 32);
    assert_eq!(nodes.nodes[1].counters().messages_in, 64);
    assert_eq!(nodes.nodes[0].counters().held, 1);
    while got < sent {
        let b = &mut nodes.nodes[1];
        let taken = b.set.poll_messages(5, |message| {
            assert_eq!(number(message), got);
            got += 1;
        });
        assert_ne!(taken, Ok(0), "after {got} of {sent}");
        nodes.settle();
    }
    assert_eq!(nodes.two().1.messages(), []);
    assert_eq!(nodes.nodes[0].completions(), []);
}

#[test]
fn the_data_of_a_write_wait_with_its_notification_and_other_targets_go_on() {
    let mut nodes = Nodes::new(3, Chaos::default(), SMALL);
    nodes.nodes[1].inject(Fault::Full(0, true));
    let to = nodes.nodes[1].remote(0);
    let held = Operation::Write {
        to,
        data: Data::Inline(b"data"),
        word: None,
        notify: Some(Notify {
            set: 0,
            payload: b"",
        }),
    };
    nodes.nodes[0].set.post(&work(2, 1, held)).unwrap();
    nodes.nodes[0].post(&note(3, 2, b"passes"));
    nodes.settle();
    let tags: Vec<u64> = nodes.nodes[0].completions().iter().map(|c| c.tag).collect();
    assert_eq!(tags, [2]);
    assert_eq!(nodes.nodes[2].messages().len(), 1);
    assert_eq!(nodes.nodes[1].region_bytes(0, 4), [0; 4]);
    nodes.nodes[1].inject(Fault::Full(0, false));
    nodes.settle();
    assert_eq!(nodes.nodes[0].completions()[0].tag, 1);
    assert_eq!(nodes.nodes[1].region_bytes(0, 4), b"data");
    assert_eq!(nodes.nodes[1].messages().len(), 1);
}

#[test]
fn one_target_cannot_take_the_whole_queue_set() {
    let sizes = Sizes {
        work: 12,
        completions: 12,
        messages: 6,
    };
    let mut nodes = Nodes::new(3, Chaos::default(), sizes);
    nodes.nodes[1].inject(Fault::Full(0, true));
    let mut posted = 0;
    while nodes.nodes[0].set.post(&note(2, posted, &[])) != Err(NotPosted::TargetFull) {
        posted += 1;
        if posted % 100 == 0 {
            nodes.nodes[0].set.ring();
            nodes.settle();
        }
    }
    assert_eq!(posted, 1024);
    nodes.nodes[0].post(&note(3, 7, b"passes"));
    nodes.settle();
    assert_eq!(nodes.nodes[0].completions()[0].tag, 7);
    nodes.nodes[1].inject(Fault::Full(0, false));
    let mut got = 0;
    for _ in 0..100 {
        got += nodes.nodes[1].messages().len() as u64;
        nodes.settle();
    }
    assert_eq!(got, posted);
    assert_eq!(nodes.nodes[0].completions().len(), 1024);
}

#[test]
fn a_full_completion_queue_holds_the_work() {
    let sizes = Sizes {
        work: 8,
        completions: 6,
        messages: 10,
    };
    let mut nodes = Nodes::new(2, Chaos::default(), sizes);
    let mut posted = 0;
    while nodes.nodes[0].set.post(&note(2, posted, &[])).is_ok() {
        posted += 1;
    }
    assert_eq!(posted, 64, "as many as there is room for completions");
    // Window messages that fail need completions too: they wait.
    nodes.nodes[0].set.ring();
    nodes.settle();
    nodes.nodes[0].set.send(9, 0, b"to nobody").unwrap();
    nodes.pass(2_000_000_000);
    nodes.pass(2_000_000_000);
    let all = nodes.nodes[0].completions();
    assert_eq!(all.len(), 64);
    nodes.pass(2_000_000_000);
    nodes.pass(2_000_000_000);
    let late = nodes.nodes[0].completions();
    assert_eq!((late.len(), late[0].window), (1, true));
}

#[test]
fn a_lane_that_fails_flushes_until_it_is_resumed() {
    let mut nodes = Nodes::pair();
    nodes.nodes[1].inject(Fault::Full(0, true));
    for number in 0..3 {
        nodes.nodes[0].set.post(&note(2, number, b"lost")).unwrap();
    }
    nodes.nodes[0].set.ring();
    nodes.nodes[0].set.send(2, 0, b"lost too").unwrap();
    nodes.settle();
    nodes.pass(999_000_000);
    assert_eq!(nodes.nodes[0].completions(), []);
    nodes.pass(2_000_000);
    let mut done = nodes.nodes[0].completions();
    done.sort_by_key(|completion| completion.window);
    let statuses: Vec<u8> = done.iter().map(|completion| completion.status.0).collect();
    let (stalled, flushed) = (status::STALLED, status::FLUSHED);
    assert_eq!(statuses, [stalled, flushed, flushed, stalled]);
    assert!(
        done.iter()
            .all(|completion| completion.status.lane_failed())
    );
    // There is room again, but nothing overtakes what was lost.
    nodes.nodes[1].inject(Fault::Full(0, false));
    nodes.nodes[0].post(&note(2, 10, b"flushed"));
    nodes.nodes[0].set.send(2, 0, b"flushed").unwrap();
    nodes.settle();
    let done = nodes.nodes[0].completions();
    assert!(done.len() == 2 && done.iter().all(|c| c.status == Status(flushed)));
    assert_eq!(nodes.nodes[1].messages(), []);
    nodes.nodes[0]
        .set
        .post(&work(2, 11, Operation::Resume))
        .unwrap();
    nodes.nodes[0].post(&note(2, 12, b"again"));
    nodes.settle();
    nodes.nodes[0].set.send(2, 0, b"again").unwrap();
    nodes.settle();
    let done = nodes.nodes[0].completions();
    assert!(done.len() == 2 && done.iter().all(|c| c.status.is_ok()));
    assert_eq!(nodes.nodes[1].messages().len(), 2);
    assert_eq!(nodes.nodes[0].counters().lanes_failed, 2);
}

#[test]
fn a_target_whose_set_does_not_run_fails_the_lane_at_once() {
    let mut nodes = Nodes::pair();
    let message = Operation::Message(Notify {
        set: 1,
        payload: b"",
    });
    nodes.nodes[0].post(&work(2, 0, message));
    nodes.nodes[0].post(&note(2, 1, b""));
    nodes.settle();
    let statuses: Vec<u8> = nodes.nodes[0]
        .completions()
        .iter()
        .map(|c| c.status.0)
        .collect();
    assert_eq!(statuses, [status::NO_QUEUE, status::FLUSHED]);
}

#[test]
fn a_link_that_comes_back_in_time_loses_nothing() {
    let mut nodes = Nodes::pair();
    assert!(nodes.nodes[0].set.link_up());
    nodes.nodes[1].inject(Fault::LinkDown(true));
    assert!(!nodes.nodes[1].set.link_up() && nodes.nodes[0].set.link_up());
    for number in 0..10 {
        nodes.nodes[0]
            .set
            .post(&note(2, number, &number.to_le_bytes()))
            .unwrap();
    }
    nodes.nodes[0].set.ring();
    nodes.settle();
    nodes.pass(900_000_000);
    assert_eq!(nodes.nodes[0].completions(), []);
    nodes.nodes[1].inject(Fault::LinkDown(false));
    nodes.settle();
    let got: Vec<u64> = nodes.nodes[1].messages().iter().map(number).collect();
    assert_eq!(got, Vec::from_iter(0..10));
    assert!(nodes.nodes[1].set.link_up());
}

#[test]
fn a_node_that_stays_away_is_unreachable() {
    let mut nodes = Nodes::pair();
    nodes.nodes[0].post(&note(700, 1, b""));
    nodes.settle();
    nodes.pass(1_001_000_000);
    assert_eq!(
        nodes.nodes[0].completions()[0].status,
        Status(status::UNREACHABLE)
    );
}

#[test]
fn an_id_belongs_to_the_device_that_has_it() {
    for [thief, owner] in [[0, 1], [1, 0]] {
        let nodes = Nodes::pair();
        let id = owner as u16 + 1;
        let (thief, owner) = (&nodes.nodes[thief], &nodes.nodes[owner]);
        thief.rde.management().join(id, &[1, 2]);
        assert!(!thief.set.link_up() && owner.set.link_up());
        assert!(!thief.rde.management().status().link_up());
        owner.rde.management().leave();
        assert!(thief.set.link_up() && !owner.set.link_up());
    }
}

#[test]
fn the_window_and_the_work_queue_say_when_they_are_full() {
    let mut nodes = Nodes::pair();
    let a = &mut nodes.nodes[0];
    for _ in 0..32 {
        a.set.send(2, 0, b"").unwrap();
    }
    assert_eq!(a.set.send(2, 0, b""), Err(NotPosted::Full));
    for number in 0..64 {
        a.set.post(&note(2, number, b"")).unwrap();
    }
    assert_eq!(a.set.post(&note(2, 64, b"")), Err(NotPosted::Full));
    assert_eq!(a.set.stats().full, 2);
    a.set.ring();
    nodes.settle();
    let a = &mut nodes.nodes[0];
    assert_eq!(a.set.send(2, 0, b""), Ok(33));
    a.set.post(&note(2, 64, b"")).unwrap();
}
