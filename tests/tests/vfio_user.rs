//! Two nodes whose devices are models in a third process, `rdsock-model`, each reached over a vfio-user socket: the same
//! driver, over a bus that messages, mapped registers and shared files make.

use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rdsock_tests::{Daemon, Folder, Program, Running, place, why};

const LIMIT: Duration = Duration::from_secs(60);
const PUMP: &str = env!("CARGO_BIN_EXE_rdsock-test-pump");

struct Ground {
    folder: Folder,
    model: Running,
    servers: Daemon,
    clients: Daemon,
}

impl Ground {
    fn new() -> Self {
        let folder = Folder::new();
        let sockets = [folder.at("a.sock"), folder.at("b.sock")];
        let model = Program::new(place::binary("rdsock-model"), folder.path())
            .arg("--node")
            .arg(format!("1={}", sockets[0].display()))
            .arg("--node")
            .arg(format!("2={}", sockets[1].display()))
            .arg("--stats")
            .start();
        for socket in &sockets {
            wait_for_socket(socket);
        }
        let mut servers = Daemon::start(&config(1, &sockets[0]));
        let mut clients = Daemon::start(&config(2, &sockets[1]));
        servers.wait_for_nodes(1);
        clients.wait_for_nodes(1);
        Ground {
            folder,
            model,
            servers,
            clients,
        }
    }

    fn serve(&self) -> (Running, u16) {
        let port = place::free_port();
        let mut server = Program::new(PUMP, self.folder.path())
            .args(&format!("serve {port}"))
            .preloaded(&self.servers.socket())
            .start();
        server.wait_for_output("listening", LIMIT);
        (server, port)
    }

    fn send(&self, port: u16, megabytes: u64, rate: u64) -> Running {
        Program::new(PUMP, self.folder.path())
            .args(&format!("send {port} {megabytes} {rate}"))
            .preloaded(&self.clients.socket())
            .start()
    }

    fn is_on_rings(&self, client: &Running) -> bool {
        let why = why::ask(&self.clients.socket(), Some(client.pid()));
        why.connections
            .iter()
            .any(|connection| connection.accelerated)
    }

    fn wait_for_rings(&self, client: &Running) {
        let end = Instant::now() + LIMIT;
        while !self.is_on_rings(client) {
            assert!(Instant::now() < end, "never on rings");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn config(node: u16, socket: &std::path::Path) -> String {
    format!(
        "log_level = \"debug\"
[fabric]
node = {node}
device = \"vfio-user:{}\"
connect_timeout_us = 10000000
[[fabric.nodes]]
id = 1
name = \"servers\"
addresses = [\"127.0.0.1\"]
[[fabric.nodes]]
id = 2
name = \"clients\"
addresses = [\"127.0.0.2\"]
",
        socket.display()
    )
}

fn wait_for_socket(path: &PathBuf) {
    let end = Instant::now() + LIMIT;
    let is_there = || std::fs::metadata(path).is_ok_and(|found| found.file_type().is_socket());
    while !is_there() {
        assert!(Instant::now() < end, "rdsock-model does not serve");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_stream_goes_from_node_to_node_through_models_in_another_process() {
    let ground = Ground::new();
    let (_server, port) = ground.serve();
    let mut client = ground.send(port, 64, 40);
    client.wait_for_output("begun", LIMIT);
    ground.wait_for_rings(&client);
    client.finish(LIMIT);
    // The models have moved all of it, both ways.
    let Ground {
        mut model,
        servers,
        clients,
        ..
    } = ground;
    drop((servers, clients));
    model.signal(Signal::SIGTERM);
    assert!(model.wait(LIMIT).success());
    let output = model.output();
    let lines: Vec<serde_json::Value> = output
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    assert_eq!(lines.len(), 2, "{output}");
    for line in &lines {
        let written = line["bytes_written"].as_u64().unwrap_or(0);
        // What went on the kernel before the stream was on rings is less than half of it.
        assert!(written > 32 << 20, "{line}");
        assert_eq!(line["dma_faults"], 0, "{line}");
        assert_eq!(line["refused_here"], 0, "{line}");
    }
}

#[test]
fn when_the_models_are_killed_daemons_live_and_connections_work() {
    let mut ground = Ground::new();
    let (_server, port) = ground.serve();
    let mut client = ground.send(port, 512, 20);
    client.wait_for_output("begun", LIMIT);
    ground.wait_for_rings(&client);
    ground.model.kill();
    // The stream breaks, as a TCP connection may; with no wrong byte (4).
    assert_eq!(client.wait(LIMIT).code(), Some(3), "{}", client.output());
    for daemon in [&mut ground.servers, &mut ground.clients] {
        let end = Instant::now() + LIMIT;
        while daemon.stat()["fabric"]["failed"] != true {
            assert!(Instant::now() < end, "the daemon does not notice");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    ground.send(port, 8, 50).finish(LIMIT);
}
