//! Several poll cores: streams are spread over those that both nodes have, and one core's end is not the
//! others'.
#[allow(dead_code)]
mod site;

use rdsock_model::Fault;
use rdsock_node::Notice;
use site::*;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

fn echo(connection: &Connection, text: &[u8]) {
    let [mut a, mut b] = connection.programs.each_ref();
    for _ in 0..3 {
        a.write_all(text).unwrap();
        let mut got = vec![0; text.len()];
        b.read_exact(&mut got).unwrap();
        assert_eq!(got, text);
        b.write_all(&got).unwrap();
        a.read_exact(&mut got).unwrap();
        assert_eq!(got, text);
    }
}

fn cores(connections: &[Connection]) -> Vec<[u16; 2]> {
    let cores = |connection: &Connection| connection.streams.each_ref().map(|stream| stream.core);
    connections.iter().map(cores).collect()
}

#[test]
fn streams_are_spread_over_the_cores() {
    let mut sites = pair_of([2, 2]);
    let connections: Vec<Connection> = (0..10).map(|_| connect(&mut sites)).collect();
    for site in &sites {
        assert_eq!([0, 1].map(|core| site.poller.streams_of(core)), [5, 5]);
    }
    for [asking, asked] in cores(&connections) {
        assert_eq!(asking, asked);
    }
    for (at, connection) in connections.iter().enumerate() {
        echo(connection, format!("on connection {at}").as_bytes());
    }
    // All at once.
    std::thread::scope(|scope| {
        for connection in &connections {
            scope.spawn(|| echo(connection, &[7; 100_000]));
        }
    });
}

#[test]
fn nodes_use_the_cores_that_both_have() {
    for numbers in [[2, 1], [1, 3]] {
        let mut sites = pair_of(numbers);
        let connections: Vec<Connection> = (0..4).map(|_| connect(&mut sites)).collect();
        assert_eq!(cores(&connections), [[0, 0]; 4]);
        for connection in &connections {
            echo(connection, b"on the only core");
        }
    }
}

#[test]
fn the_failure_of_a_core_ends_its_streams_alone() {
    let mut sites = pair_of([2, 2]);
    let connections: Vec<Connection> = (0..4).map(|_| connect(&mut sites)).collect();
    let on = |core: u16| {
        connections
            .iter()
            .filter(move |c| c.streams[0].core == core)
    };
    assert_eq!(on(0).count(), 2);
    sites[0]
        .device
        .function()
        .inject(Fault::CompletionForNothing(1));
    for broken in on(1) {
        let ticket = broken.streams[0].ticket;
        sites[0].until(|notice| *notice == Notice::Released { ticket });
        let error = broken.programs.each_ref()[0].read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    // Both nodes learn that the core is not there any more, and use the other one.
    sites[0].until_up(2, 1);
    sites[1].until_up(1, 1);
    let more: Vec<Connection> = (0..4).map(|_| connect(&mut sites)).collect();
    assert_eq!(cores(&more), [[0, 0]; 4]);
    for connection in on(0).chain(&more) {
        echo(connection, b"goes on");
    }
    let is_end = |notice: &Notice| matches!(notice, Notice::DeviceFailed | Notice::NodeGone { .. });
    assert!(!sites[0].notices.iter().any(is_end));

    sites[0]
        .device
        .function()
        .inject(Fault::CompletionForNothing(0));
    sites[0].until(|notice| *notice == Notice::DeviceFailed);
    sites[0].until(|notice| *notice == Notice::NodeGone { node: 2 });
    assert!(!sites[0].poller.is_up(2));
}

#[test]
fn a_sleeping_core_does_not_keep_another_one_awake() {
    let mut sites = pair_of([2, 2]);
    let connections: Vec<Connection> = (0..2).map(|_| connect(&mut sites)).collect();
    let quiet = &connections[0].streams[0];
    let sleeps = |site: &Site, core: u16| {
        let mut cores = site.poller.cores();
        cores.nth(core.into()).unwrap().sleeps.get()
    };
    let before = sleeps(&sites[0], quiet.core);
    let end = Instant::now() + LIMIT;
    while sleeps(&sites[0], quiet.core) < before + 3 {
        echo(&connections[1], b"not to be slept through");
        assert!(Instant::now() < end, "the other core never sleeps");
    }
    // It wakes for a byte.
    std::thread::sleep(Duration::from_millis(20));
    echo(&connections[0], b"wake up");
}
