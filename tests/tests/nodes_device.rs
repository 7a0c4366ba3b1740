//! The device of a live daemon fails under load: its streams end as TCP may end, the daemon lives and says what
//! to do, and everything new goes through the kernel.

use std::time::{Duration, Instant};

use rdsock_model::Port;
use rdsock_rde::spec::page;
use rdsock_tests::{Nodes, Running, place};

const LIMIT: Duration = Duration::from_secs(60);
const PUMP: &str = env!("CARGO_BIN_EXE_rdsock-test-pump");

fn send(nodes: &Nodes, port: u16, megabytes: u64, rate: u64) -> Running {
    let args = format!("send {port} {megabytes} {rate}");
    nodes.program(2, PUMP, &args).start()
}

#[test]
fn a_device_that_stops_its_queue_set() {
    let mut nodes = Nodes::start(2, 2);
    let port = place::free_port();
    let mut server = nodes.program(1, PUMP, &format!("serve {port}")).start();
    server.wait_for_output("listening", LIMIT);
    let mut client = nodes.begin(PUMP, &format!("send {port} 10000 100"));
    assert_eq!(nodes.fabric_stat(2)["failed"], false);

    // A doorbell beyond what the queue holds, which no driver rings: the device stops. The queue pages of the model lie
    // behind its port.
    let daemon = nodes.daemon(2);
    let own = daemon.open_files("rdsock-port");
    let ports = daemon.mappings("rdsock-port");
    let (_, port_at) = ports
        .into_iter()
        .find(|(inode, _)| own.contains(inode))
        .expect("the model's port is mapped");
    let doorbell = port_at + size_of::<Port>() as u64 + page::WQ_TAIL;
    let end = Instant::now() + LIMIT;
    while nodes.fabric_stat(2)["failed"] != true {
        assert!(Instant::now() < end, "the device does not fail");
        nodes.daemon(2).poke(doorbell, 0x7fff_0000);
        std::thread::sleep(Duration::from_millis(20));
    }
    let status = client.wait(Duration::from_secs(10));
    assert_eq!(status.code(), Some(3), "{}", client.output());
    assert!(client.output().contains("ConnectionReset"));
    let log = nodes.daemon(2).log();
    assert!(log.contains("does not use the device any more"), "{log}");
    assert!(log.contains("restart rdsockd"), "{log}");

    // The daemon lives, and what is new goes through the kernel, or over rings of the same node.
    assert!(send(&nodes, port, 20, 500).finish(LIMIT).contains("done"));
    let near = place::free_port();
    let mut near_server = nodes.program(2, PUMP, &format!("serve {near}")).start();
    near_server.wait_for_output("listening", LIMIT);
    let local = send(&nodes, near, 100, 100);
    assert!(local.finish(LIMIT).contains("done"));

    // As the log says, a restart helps.
    nodes.daemon(2).kill();
    nodes.daemon(2).restart();
    nodes.wait_until_met();
    let mut client = nodes.begin(PUMP, &format!("send {port} 10000 100"));
    client.kill();
    server.kill();
    near_server.kill();
    nodes.wait_until_empty();
}
