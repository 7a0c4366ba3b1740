//! What a poll core tells of its work.
#[allow(dead_code)]
mod site;

use rdsock_proto::Count;
use site::*;
use std::time::{Duration, Instant};

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
