//! What an operator sees of two nodes: streams spread over the poll cores, true addresses and nodes in
//! `rdsock why`, and for each connection that stays on the kernel the reason.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use rdsock_tests::why::{self, Connection};
use rdsock_tests::{Daemon, Folder, Program, Running, place};

const LIMIT: Duration = Duration::from_secs(60);

/// The addresses of the nodes' programs.
const ADDRESSES: [&str; 2] = ["127.0.0.1", "127.0.0.2"];

/// Two daemons, `servers` and `clients`.
struct Nodes {
    daemons: [Daemon; 2],
    folder: Folder,
}

impl Nodes {
    /// With these lines in the `[fabric]` table of each, and in front of it.
    fn start(fabric: [&str; 2], top: [&str; 2]) -> Self {
        let folder = Folder::new();
        let meet = folder.at("fabric");
        std::fs::create_dir(&meet).unwrap();
        std::fs::set_permissions(&meet, PermissionsExt::from_mode(0o700)).unwrap();
        let config = |node: usize| {
            format!(
                "{}\n[fabric]\nnode = {}\ndevice = \"model:{}\"\nconnect_timeout_us = 10000000\n{}\n\
                 nodes = [{{ id = 1, name = \"servers\", addresses = [\"{}\"] }},\n\
                 {{ id = 2, name = \"clients\", addresses = [\"{}\"] }}]\n",
                top[node],
                node + 1,
                meet.display(),
                fabric[node],
                ADDRESSES[0],
                ADDRESSES[1],
            )
        };
        let mut daemons = [0, 1].map(|node| Daemon::start(&config(node)));
        for daemon in &mut daemons {
            daemon.wait_for_nodes(1);
        }
        Nodes { daemons, folder }
    }

    fn python(&self, node: Option<usize>, script: &str) -> Program {
        let program = Program::new("python3", self.folder.path());
        let program = match node {
            Some(node) => program.preloaded(&self.daemons[node].socket()),
            None => program,
        };
        program.arg("-c").arg(script)
    }

    /// An echo on the first node, preloaded or not.
    fn server(&self, preloaded: bool) -> (Running, u16) {
        let port = place::free_port();
        let script = format!(
            "import socketserver\n\
             class Echo(socketserver.BaseRequestHandler):\n\
             \x20   def handle(self):\n\
             \x20       while block := self.request.recv(65536): self.request.sendall(block)\n\
             class Server(socketserver.ThreadingTCPServer):\n\
             \x20   allow_reuse_address, daemon_threads, request_queue_size = True, True, 64\n\
             server = Server((\"127.0.0.1\", {port}), Echo)\n\
             print(\"listening\", flush=True)\n\
             server.serve_forever()\n"
        );
        let mut server = self.python(preloaded.then_some(0), &script).start();
        server.wait_for_output("listening", LIMIT);
        (server, port)
    }

    /// A program of the second node with so many connections, which it keeps until it is ended. On a busy machine
    /// an answer may come too late, and then the connection is the kernel's: if it shall be `carried`, the program
    /// tries again.
    fn client(&self, port: u16, connections: usize, carried: bool) -> Running {
        let carried = if carried { "True" } else { "False" };
        let script = format!(
            "import socket, time\n\
             def connect():\n\
             \x20   while True:\n\
             \x20       s = socket.create_connection((\"127.0.0.1\", {port}))\n\
             \x20       if s.getsockname()[0] == \"127.0.0.2\" or not {carried}: return s\n\
             \x20       s.close()\n\
             all = [connect() for _ in range({connections})]\n\
             for turn in range(20):\n\
             \x20   for s in all:\n\
             \x20       s.sendall(b\"x\" * 100)\n\
             \x20       assert s.recv(100, socket.MSG_WAITALL) == b\"x\" * 100\n\
             print(\"ready\", flush=True)\n\
             time.sleep(600)\n"
        );
        let mut client = self.python(Some(1), &script).start();
        client.wait_for_output("ready", LIMIT);
        client
    }

    fn why(&self, node: usize, port: u16) -> Vec<Connection> {
        let connections = why::ask(&self.daemons[node].socket(), None).connections;
        let touching = connections.into_iter();
        touching
            .filter(|connection| connection.touches(port))
            .collect()
    }

    fn rdsock(&self, node: usize, command: &str) -> String {
        let output = Command::new(place::binary("rdsock"))
            .arg(command)
            .env("RDSOCK_SOCKET", self.daemons[node].socket())
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    }
}

/// Cores of the machine that this process may use, two at most.
fn cpus() -> Vec<usize> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let ranges = list.unwrap().trim().split(',');
    let cpus = ranges.flat_map(|range| {
        let (from, to) = range.split_once('-').unwrap_or((range, range));
        from.parse().unwrap()..=to.parse().unwrap()
    });
    cpus.take(2).collect()
}

#[test]
fn streams_are_spread_over_the_poll_cores_and_shown() {
    let cpus = cpus();
    let cores = format!("poll_cores = {cpus:?}");
    let nodes = Nodes::start([&cores, &cores], ["", ""]);
    for daemon in &nodes.daemons {
        let end = Instant::now() + LIMIT;
        let up = || {
            let stat = daemon.stat();
            let cores = stat["fabric"]["cores"].as_array().unwrap().clone();
            let up = cores
                .iter()
                .filter(|core| core["nodes_up"] != serde_json::json!([]));
            up.count()
        };
        while up() != cpus.len() {
            assert!(Instant::now() < end, "only {} cores greet each other", up());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let (_server, port) = nodes.server(true);
    let all = 3 * cpus.len();
    let _client = nodes.client(port, all, true);
    for (node, daemon) in nodes.daemons.iter().enumerate() {
        // Those that were given up are over in a moment.
        let end = Instant::now() + LIMIT;
        while daemon.number("/fabric/streams") != all as u64 {
            assert!(Instant::now() < end, "{:#}", daemon.stat());
            std::thread::sleep(Duration::from_millis(20));
        }
        let fabric = &daemon.stat()["fabric"];
        for (core, cpu) in fabric["cores"].as_array().unwrap().iter().zip(&cpus) {
            assert_eq!(core["cpu"], *cpu);
            assert!(core["streams"].as_u64() > Some(0), "{fabric:#}");
            assert_eq!(core["failed"], false);
            for counted in ["turns", "busy_turns", "messages", "posted", "doorbells"] {
                assert!(
                    core["counts"][counted].as_u64() > Some(0),
                    "{counted}: {core}"
                );
            }
        }
        let other = &fabric["nodes"][0];
        assert_eq!(
            (&other["up"], &other["streams"]),
            (&true.into(), &(all).into())
        );
        assert_eq!(other["violations"]["bad_head"], 0);

        let connections = nodes.why(node, port);
        assert_eq!(connections.len(), all, "{connections:#?}");
        for connection in &connections {
            assert!(connection.accelerated, "{connection:#?}");
            // As the programs see them: the kernel's sockets lead to the daemon.
            let (server, client) = match node {
                0 => (&connection.local, &connection.peer),
                _ => (&connection.peer, &connection.local),
            };
            assert_eq!(*server, format!("{}:{port}", ADDRESSES[0]));
            assert!(
                client.starts_with(&format!("{}:", ADDRESSES[1])),
                "{client}"
            );
            assert_eq!(connection.node, Some(2 - node as u16));
        }
    }
    let table = nodes.rdsock(1, "why");
    assert!(table.contains("servers (node 1)"), "{table}");
    let stat = nodes.rdsock(0, "stat");
    assert!(stat.contains("other end on node 2"), "{stat}");
    for (core, cpu) in cpus.iter().enumerate() {
        let line = format!("poll core {core}, pinned to CPU {cpu}: streams ");
        assert!(stat.contains(&line), "{stat}");
    }
    assert!(
        stat.contains("clients") && stat.contains("127.0.0.2/32"),
        "{stat}"
    );
}

#[test]
fn a_connection_that_stays_on_the_kernel_names_the_node_and_the_reason() {
    let closed = place::free_port();
    let deny = format!("[policy]\ndeny_ports = [{closed}]");
    let mut nodes = Nodes::start(["", ""], [&deny, ""]);
    // On a busy machine the reason may be another one: that there was no answer in time.
    let expect = |nodes: &Nodes, port, expected: &str| {
        let mut reasons = Vec::new();
        for _ in 0..10 {
            let client = nodes.client(port, 1, false);
            let connections = nodes.why(1, port);
            drop(client);
            assert_eq!(connections.len(), 1, "{connections:#?}");
            assert!(!connections[0].accelerated);
            assert_eq!(connections[0].node, Some(1));
            reasons.extend(connections[0].reason.clone());
            if reasons
                .last()
                .is_some_and(|reason| reason.starts_with(expected))
            {
                return;
            }
        }
        panic!("not {expected}: {reasons:#?}");
    };
    let (_plain, plain) = nodes.server(false);
    let expected = "to servers (node 1): no preloaded program listens there on the other node";
    expect(&nodes, plain, expected);

    let refusing = std::net::TcpListener::bind(("127.0.0.1", closed)).unwrap();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = refusing.accept() {
            std::thread::spawn(move || {
                // Its client ends as it likes.
                let _ = std::io::copy(&mut stream.try_clone().unwrap(), &mut stream);
            });
        }
    });
    let expected = "to servers (node 1): the other node refused: its policy or a limit";
    expect(&nodes, closed, expected);

    let (_server, port) = nodes.server(true);
    nodes.daemons[0].kill();
    let end = Instant::now() + LIMIT;
    while nodes.daemons[1].stat()["fabric"]["nodes"][0]["up"] == true {
        assert!(Instant::now() < end, "a dead node is up");
        std::thread::sleep(Duration::from_millis(20));
    }
    let expected = "to servers (node 1, absent): the other node does not answer";
    expect(&nodes, port, expected);
}

/// As on one host, where they are in the other end's socket by then.
#[test]
fn last_words_before_a_reset_arrive() {
    let nodes = Nodes::start(["", ""], ["", ""]);
    let close = "s.close()";
    let abort =
        "s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(\"ii\", 1, 0)); s.close()";
    for way in [close, abort, "os._exit(0)"] {
        let port = place::free_port();
        let server = format!(
            "import os, select, socket, struct\n\
             listener = socket.create_server((\"127.0.0.1\", {port}))\n\
             print(\"listening\", flush=True)\n\
             while True:\n\
             \x20   s, peer = listener.accept()\n\
             \x20   if peer[0] == \"127.0.0.2\": break\n\
             for turn in range(50):\n\
             \x20   s.sendall(s.recv(100, socket.MSG_WAITALL))\n\
             select.select([s], [], [])\n\
             s.sendall(b\"z\" * 20000)\n\
             {way}\n"
        );
        let mut server = nodes.python(Some(0), &server).start();
        server.wait_for_output("listening", LIMIT);
        let client = format!(
            "import socket\n\
             while True:\n\
             \x20   s = socket.create_connection((\"127.0.0.1\", {port}))\n\
             \x20   if s.getsockname()[0] == \"127.0.0.2\": break\n\
             \x20   s.close()\n\
             for turn in range(50):\n\
             \x20   s.sendall(b\"x\" * 100)\n\
             \x20   assert s.recv(100, socket.MSG_WAITALL) == b\"x\" * 100\n\
             s.sendall(b\"never read\")\n\
             got = 0\n\
             try:\n\
             \x20   while block := s.recv(3000): got += len(block)\n\
             \x20   print(got, \"end\")\n\
             except ConnectionResetError: print(got, \"reset\")\n"
        );
        let output = nodes.python(Some(1), &client).run(LIMIT);
        assert_eq!(output.trim(), "20000 reset", "{way}");
        server.finish(LIMIT);
    }
}
