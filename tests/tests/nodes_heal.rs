//! Nodes on linked models find each other again, whatever has happened to their links, to the directory in which they
//! meet, or to what they need for it; without a restart, and without leaving anything behind.

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rdsock_tests::{Daemon, Nodes, Running, place};

const LIMIT: Duration = Duration::from_secs(60);
const PUMP: &str = env!("CARGO_BIN_EXE_rdsock-test-pump");
/// Fewer descriptors than any process has: it gets no more.
const NONE: u64 = 3;

/// A server of node 1, and its port.
fn serve(nodes: &Nodes) -> (Running, u16) {
    let port = place::free_port();
    let mut server = nodes.program(1, PUMP, &format!("serve {port}")).start();
    server.wait_for_output("listening", LIMIT);
    (server, port)
}

/// The nodes meet, and carry a stream.
fn work(nodes: &mut Nodes) {
    nodes.wait_until_met();
    let (mut server, port) = serve(nodes);
    nodes.begin(PUMP, &format!("send {port} 10000 100")).kill();
    server.kill();
}

fn restart(daemon: &mut Daemon) {
    daemon.kill();
    daemon.restart();
}

#[test]
fn the_directory_is_deleted_and_a_node_restarts() {
    let mut nodes = Nodes::start(2, 2);
    for node in [2, 1, 2] {
        std::fs::remove_dir_all(nodes.fabric()).expect("it is there");
        restart(nodes.daemon(node));
        work(&mut nodes);
    }
    nodes.wait_until_empty();
}

#[test]
fn the_directory_is_moved_away_or_emptied() {
    let mut nodes = Nodes::start(2, 2);
    std::fs::rename(nodes.fabric(), nodes.folder.at("elsewhere")).expect("it is there");
    restart(nodes.daemon(2));
    work(&mut nodes);
    for entry in std::fs::read_dir(nodes.fabric()).expect("it was made anew") {
        std::fs::remove_file(entry.expect("an entry").path()).expect("a file");
    }
    restart(nodes.daemon(1));
    work(&mut nodes);
}

#[test]
fn no_descriptors_are_left_for_a_while() {
    let mut nodes = Nodes::start(2, 2);
    let (mut server, port) = serve(&nodes);
    let before = nodes.daemon(1).limit_descriptors(NONE);
    // Node 2 shares the memory of the stream that it asks for, which node 1 can't map now.
    let args = format!("send {port} 20 100");
    let client = nodes.program(2, PUMP, &args).start();
    assert!(client.finish(LIMIT).contains("done"));
    let end = Instant::now() + LIMIT;
    while !nodes.daemon(1).log().contains("no descriptors are left") {
        assert!(Instant::now() < end, "node 1 does not say what it lacks");
        std::thread::sleep(Duration::from_millis(20));
    }
    nodes.daemon(1).limit_descriptors(before);
    work(&mut nodes);
    server.kill();
    nodes.wait_until_empty();
}

#[test]
fn a_node_restarts_while_the_other_has_no_descriptors() {
    let mut nodes = Nodes::start(2, 2);
    let before = nodes.daemon(1).limit_descriptors(NONE);
    restart(nodes.daemon(2));
    let (start, busy) = (Instant::now(), nodes.daemon(1).busy("rde-link"));
    std::thread::sleep(Duration::from_secs(2));
    let (elapsed, busy) = (start.elapsed(), nodes.daemon(1).busy("rde-link") - busy);
    assert!(busy * 5 < elapsed, "it spins: {busy:?} of {elapsed:?}");
    let log = nodes.daemon(1).log();
    let said = log.lines().filter(|line| line.contains("link")).count();
    assert!(said < 20, "it says so again and again: {said} lines");
    nodes.daemon(1).limit_descriptors(before);
    work(&mut nodes);
    nodes.wait_until_empty();
}

#[test]
fn a_node_restarts_while_the_other_is_stopped() {
    let mut nodes = Nodes::start(2, 2);
    for _ in 0..2 {
        nodes.daemon(1).running().signal(Signal::SIGSTOP);
        std::thread::sleep(Duration::from_secs(2));
        for _ in 0..3 {
            restart(nodes.daemon(2));
            std::thread::sleep(Duration::from_millis(300));
        }
        nodes.daemon(1).running().signal(Signal::SIGCONT);
        work(&mut nodes);
    }
    nodes.wait_until_empty();
}

#[test]
fn a_node_that_restarts_many_times_leaves_nothing_in_the_other() {
    let mut nodes = Nodes::start(2, 2);
    work(&mut nodes);
    nodes.wait_until_empty();
    let threads = nodes.daemon(1).threads();
    let maps = nodes.daemon(1).mappings("memfd").len();
    for round in 0..20 {
        // Some of them in the middle of setting up.
        restart(nodes.daemon(2));
        std::thread::sleep(Duration::from_millis(round % 5 * 7));
    }
    work(&mut nodes);
    nodes.wait_until_empty();
    assert_eq!(nodes.daemon(1).threads(), threads);
    assert_eq!(nodes.daemon(1).mappings("memfd").len(), maps);
}

#[test]
fn what_no_node_has_made_is_left_alone() {
    let mut nodes = Nodes::start(2, 2);
    let outside = nodes.folder.write("outside", "precious");
    let fabric = nodes.fabric();
    symlink(&outside, fabric.join("7.sock")).expect("a new link");
    symlink(nodes.folder.at("nowhere"), fabric.join("7.lock")).expect("a new link");
    std::fs::write(fabric.join("8.sock"), "precious").expect("a new file");
    std::fs::create_dir(fabric.join("9.sock")).expect("a new directory");
    let _stream = UnixListener::bind(fabric.join("10.sock")).expect("a new socket");
    drop(UnixListener::bind(fabric.join("11.sock")).expect("a new socket"));
    for node in [1, 2] {
        restart(nodes.daemon(node));
        work(&mut nodes);
    }
    let name = |id: u16| fabric.join(format!("{id}.sock"));
    for id in 7..=11 {
        let found = std::fs::symlink_metadata(name(id));
        assert!(found.is_ok(), "{id}.sock: {found:?}");
    }
    for file in [outside, name(8)] {
        assert_eq!(std::fs::read_to_string(file).expect("a file"), "precious");
    }
    assert!(!nodes.folder.at("nowhere").exists());
}
