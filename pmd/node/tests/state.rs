//! What the device holds grows with nodes and not with connections. Prints the table of `docs/figures.md`:
//! `cargo test -p rdsock-node --test state -- --nocapture`.
#[allow(dead_code)]
mod site;

use rdsock_model::Footprint;
use rdsock_node::{Command, Notice, Opening};
use site::*;
use std::time::Instant;

/// Connections that are asked for at once.
const BATCH: usize = 512;

/// Adds connections to those that there are. Their programs have no sockets: only the device is looked at.
fn add(sites: &mut [Site; 2], count: usize) {
    let (mut asked, mut open) = (0, 0);
    let end = Instant::now() + 4 * LIMIT;
    while open < count {
        assert!(Instant::now() < end, "{open} of {count} are open");
        while asked < count && asked - open < BATCH {
            let stream = sites[0].stream(2, Opening::Connect, &memory(RING));
            let addresses = addresses();
            sites[0]
                .poller
                .command(Command::Connect { stream, addresses });
            asked += 1;
        }
        while let Some(notice) = sites[1].poller.notice() {
            let Notice::Incoming { id, .. } = notice else {
                panic!("{notice:?}");
            };
            let stream = sites[1].stream(1, Opening::Accept(id), &memory(RING));
            sites[1].poller.command(Command::Accept { id, stream });
        }
        while let Some(notice) = sites[0].poller.notice() {
            assert!(matches!(notice, Notice::Established { .. }), "{notice:?}");
            open += 1;
        }
        std::thread::yield_now();
    }
}

#[test]
fn device_state_grows_with_nodes_and_not_with_connections() {
    let mut sites = pair_with(&Setup {
        streams: 10_000,
        ..Setup::default()
    });
    println!("| connections | queue sets | lanes | regions | waiting | mappings | mapped |");
    println!("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    let mut have = 0;
    for connections in [1, 10, 100, 1000, 10_000] {
        add(&mut sites, connections - have);
        have = connections;
        for site in &sites {
            let held = site.device.function().footprint();
            let expected = Footprint {
                queue_sets: 1,
                lanes: 1,
                regions: 1,
                // Messages of the session itself.
                items: held.items.min(4),
            };
            assert_eq!(held, expected, "with {connections} connections");
            // The rings themselves, in the host's memory.
            let (mappings, _) = site.device.mapped();
            assert_eq!(mappings, connections + 1);
        }
        let Footprint {
            queue_sets,
            lanes,
            items,
            regions,
        } = sites[0].device.function().footprint();
        let (mappings, bytes) = sites[0].device.mapped();
        let mib = bytes >> 20;
        println!(
            "| {connections} | {queue_sets} | {lanes} | {regions} | {items} | {mappings} | {mib} MiB |"
        );
    }
}
