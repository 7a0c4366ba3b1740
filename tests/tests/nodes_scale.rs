//! Many connections between two nodes, and many bytes. `RDSOCK_SOAK=1` moves ten times as many.

use std::time::Duration;

use nix::sys::resource::Resource;
use rdsock_tests::{Nodes, Running, place};

const LIMIT: Duration = Duration::from_secs(120);
const PUMP: &str = env!("CARGO_BIN_EXE_rdsock-test-pump");
/// Descriptors that programs may have.
const DESCRIPTORS: u64 = 8192;

fn serve(nodes: &Nodes) -> (Running, u16) {
    let port = place::free_port();
    let program = nodes.program(1, PUMP, &format!("serve {port}"));
    let mut server = program.limit(Resource::RLIMIT_NOFILE, DESCRIPTORS).start();
    server.wait_for_output("listening", LIMIT);
    (server, port)
}

#[test]
fn a_thousand_connections_at_once() {
    let mut nodes = Nodes::start(2, 2);
    let (mut server, port) = serve(&nodes);
    let program = nodes.program(2, PUMP, &format!("hold {port} 1000 8"));
    let mut client = program.limit(Resource::RLIMIT_NOFILE, DESCRIPTORS).start();
    client.wait_for_output("held", LIMIT);
    nodes.wait_for_rings(2, &client, 1000);
    nodes.wait_for_rings(1, &server, 1000);
    assert_eq!(nodes.fabric_stat(1)["nodes"][0]["streams"], 1000);
    let output = client.finish(LIMIT);
    assert!(output.contains("done 1000"), "{output}");
    server.kill();
    nodes.wait_until_empty();
}

#[test]
fn gigabytes_both_ways_at_once() {
    let soak = std::env::var_os("RDSOCK_SOAK").is_some();
    let (megabytes, limit) = if soak {
        (10_240_u64, 10 * LIMIT)
    } else {
        (1024, LIMIT)
    };
    let mut nodes = Nodes::start(2, 2);
    let (mut server, port) = serve(&nodes);
    // The server sends back what comes, as it comes.
    let client = nodes.begin(PUMP, &format!("send {port} {megabytes} 100000"));
    let output = client.finish(limit);
    assert!(
        output.contains(&format!("done {}", megabytes << 20)),
        "{output}"
    );
    server.kill();
    nodes.wait_until_empty();
}
