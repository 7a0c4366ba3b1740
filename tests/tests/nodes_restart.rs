//! Nodes and programs that die, stop and come back while bytes flow between nodes: whoever is left sees what TCP
//! may show, no wrong bytes, and nothing hangs or leaks.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rdsock_tests::{Nodes, Running, place};

const LIMIT: Duration = Duration::from_secs(60);
const PUMP: &str = env!("CARGO_BIN_EXE_rdsock-test-pump");

/// A server of node 1, and its port.
fn serve(nodes: &Nodes) -> (Running, u16) {
    let port = place::free_port();
    let mut server = nodes.program(1, PUMP, &format!("serve {port}")).start();
    server.wait_for_output("listening", LIMIT);
    (server, port)
}

/// A client of node 2 that checks the echo of what it sends.
fn send(nodes: &Nodes, port: u16, megabytes: u64, rate: u64) -> Running {
    let args = format!("send {port} {megabytes} {rate}");
    nodes.program(2, PUMP, &args).start()
}

/// The same, well on its way on rings.
fn begin(nodes: &Nodes, port: u16, megabytes: u64, rate: u64) -> Running {
    nodes.begin(PUMP, &format!("send {port} {megabytes} {rate}"))
}

/// Waits until a server has said what became of so many connections; all of it is what TCP may do.
fn endings(server: &Running, count: usize, limit: Duration) {
    let end = Instant::now() + limit;
    loop {
        let output = server.output();
        let is_end = |line: &&str| line.starts_with("ended") || line.starts_with("broke");
        let lines: Vec<&str> = output.lines().filter(is_end).collect();
        let known = ["ended", ": ConnectionReset", ": BrokenPipe"];
        let strange = lines.iter().find(|l| !known.iter().any(|k| l.contains(k)));
        assert!(strange.is_none(), "{strange:?}");
        if lines.len() >= count {
            return;
        }
        let seen = lines.len();
        assert!(Instant::now() < end, "it has seen {seen} of {count} ends");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until a client's connection has ended otherwise than by being done, but as TCP may end.
fn breaks(mut client: Running, limit: Duration) {
    let status = client.wait(limit);
    let output = client.output();
    assert_eq!(status.code(), Some(3), "{output}");
    let known = ["ConnectionReset", "UnexpectedEof"];
    assert!(known.iter().any(|word| output.contains(word)), "{output}");
}

#[test]
fn a_killed_client_is_seen_at_once_and_leaves_nothing() {
    let mut nodes = Nodes::start(2, 2);
    let (mut server, port) = serve(&nodes);
    for round in 1..=5 {
        begin(&nodes, port, 10_000, 500).kill();
        endings(&server, round, Duration::from_secs(5));
    }
    server.kill();
    nodes.wait_until_empty();
}

#[test]
fn a_killed_server_is_seen_at_once_and_leaves_nothing() {
    let mut nodes = Nodes::start(2, 2);
    for _ in 0..5 {
        let (mut server, port) = serve(&nodes);
        let client = begin(&nodes, port, 10_000, 500);
        server.kill();
        breaks(client, Duration::from_secs(5));
    }
    nodes.wait_until_empty();
}

/// Kills the daemon of a node under load and starts it again, twice.
fn restart(node: usize) {
    let mut nodes = Nodes::start(2, 2);
    let (mut server, port) = serve(&nodes);
    let mut ended = 0;
    for _ in 0..2 {
        let clients: Vec<Running> = (0..3).map(|_| begin(&nodes, port, 10_000, 100)).collect();
        nodes.daemon(node).kill();
        nodes.daemon(node).restart();
        for client in clients {
            breaks(client, Duration::from_secs(10));
            ended += 1;
        }
        endings(&server, ended, Duration::from_secs(10));
        // Who connects meanwhile goes through the kernel.
        assert!(send(&nodes, port, 20, 500).finish(LIMIT).contains("done"));
        ended += 1;
        nodes.wait_until_met();
    }
    // The server has outlived its daemon; so does a new one find it.
    begin(&nodes, port, 10_000, 100).kill();
    let (mut other, port) = serve(&nodes);
    begin(&nodes, port, 10_000, 100).kill();
    server.kill();
    other.kill();
    nodes.wait_until_empty();
}

#[test]
fn the_servers_node_restarts_under_load() {
    restart(1);
}

#[test]
fn the_clients_node_restarts_under_load() {
    restart(2);
}

#[test]
fn a_node_that_does_not_come_back_is_given_up() {
    let mut nodes = Nodes::start(2, 2);
    let (mut server, port) = serve(&nodes);
    let client = begin(&nodes, port, 10_000, 100);
    nodes.daemon(1).kill();
    endings(&server, 1, Duration::from_secs(5));
    // New connections do not wait for it.
    assert!(send(&nodes, port, 20, 500).finish(LIMIT).contains("done"));
    breaks(client, LIMIT);
    server.kill();
    nodes.daemons.remove(0);
    nodes.wait_until_empty();
}

#[test]
fn a_node_that_is_stopped_for_a_moment_loses_nothing() {
    let mut nodes = Nodes::start(2, 2);
    let (_server, port) = serve(&nodes);
    for node in [1, 2] {
        let client = begin(&nodes, port, 200, 100);
        nodes.daemon(node).running().signal(Signal::SIGSTOP);
        std::thread::sleep(Duration::from_millis(800));
        nodes.daemon(node).running().signal(Signal::SIGCONT);
        let output = client.finish(LIMIT);
        assert!(output.contains("done 209715200"), "{output}");
    }
}

#[test]
fn a_program_that_is_stopped_for_a_moment_loses_nothing() {
    let nodes = Nodes::start(2, 2);
    let (server, port) = serve(&nodes);
    let client = begin(&nodes, port, 200, 100);
    for program in [&server, &client] {
        program.signal(Signal::SIGSTOP);
        std::thread::sleep(Duration::from_millis(700));
        program.signal(Signal::SIGCONT);
        std::thread::sleep(Duration::from_millis(100));
    }
    let output = client.finish(LIMIT);
    assert!(output.contains("done 209715200"), "{output}");
}
