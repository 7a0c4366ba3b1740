//! What a poll core tells of its work.
#[allow(dead_code)]
mod site;

use rdsock_node::Stage;
use rdsock_proto::Count;
use site::*;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

#[test]
fn work_is_counted_and_its_time_is_measured() {
    let mut sites = pair_of([2, 2]);
    let connection = connect(&mut sites);
    let core = connection.streams[0].core;
    let [mut a, mut b] = connection.programs.each_ref();
    let counts = |core: u16| {
        let mut cores = sites[0].poller.cores();
        cores.nth(core.into()).unwrap()
    };
    let end = Instant::now() + LIMIT;
    let at_work = counts(core);
    // The protocol takes so little time that a few turns may show none.
    while at_work.timed_turns() < 5 || at_work.stage(Stage::Protocol) == 0 {
        assert!(Instant::now() < end, "no turn was measured");
        a.write_all(&[1; 100]).unwrap();
        b.read_exact(&mut [0; 100]).unwrap();
    }
    for (name, count) in at_work.counts() {
        // Queues need not fill up, nor need the other core be in the way, nor need this one sleep.
        assert!(
            count > 0 || matches!(name, "full" | "model_busy" | "sleeps"),
            "{name}"
        );
    }
    assert!(at_work.busy_turns.get() <= at_work.turns.get());
    assert!(at_work.doorbells.get() <= at_work.posted.get());
    // The other one has greeted, and carried nothing.
    let other = counts(1 - core);
    assert!(other.messages.get() > 0);
    assert_eq!((other.commands.get(), other.looks.get()), (0, 0));
}

#[test]
fn a_lost_session_is_counted_for_its_node() {
    let [first, second] = pair();
    let counted = |node, count| -> u64 {
        let cores = first.poller.cores();
        cores.map(|core| core.violations(node, count)).sum()
    };
    let lost = || counted(2, Count::SessionLost);
    assert_eq!(lost(), 0);
    drop(second);
    let end = Instant::now() + LIMIT;
    while lost() == 0 {
        assert!(Instant::now() < end, "never counted");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(counted(2, Count::BadHead), 0);
    assert_eq!(counted(9, Count::SessionLost), 0);
}
