//! Two nodes in two network namespaces, so with true addresses of their own and a network between them:
//! what both programs are told of each other, and that a connection that the fabric does not take goes
//! over that network. Needs root.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rdsock_tests::why::{self, Connection};
use rdsock_tests::{Daemon, Folder, Namespaces, Program, Running, place};

const LIMIT: Duration = Duration::from_secs(60);

/// Echoes at an address; says of each connection what it was told of its ends.
const SERVER: &str = r#"
import socket, sys, threading
address, port = sys.argv[1], int(sys.argv[2])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
listener = socket.create_server((address, port), family=family, backlog=64, dualstack_ipv6=address == "::")
print("listening", flush=True)
def serve(s, peer):
    try:
        while block := s.recv(65536):
            s.sendall(block)
        print("served", *peer[:2], *s.getpeername()[:2], *s.getsockname()[:2], flush=True)
        s.close()
    except OSError as error:
        print("broken", error, flush=True)
while True:
    threading.Thread(target=serve, args=listener.accept(), daemon=True).start()
"#;

/// Sends and checks the echo: little, much, and little again until it is told to end.
const CLIENT: &str = r#"
import os, random, socket, sys, threading, time
address, port, end = sys.argv[1], int(sys.argv[2]), sys.argv[3]
s = socket.create_connection((address, port), timeout=30)
def echo(text):
    writer = threading.Thread(target=s.sendall, args=(text,))
    writer.start()
    got = bytearray()
    while len(got) < len(text):
        block = s.recv(len(text) - len(got))
        assert block, "the end"
        got += block
    writer.join()
    assert got == text, "wrong bytes"
for i in range(20):
    echo(b"hello %d" % i)
echo(random.Random(port).randbytes(8 << 20))
print("own", *s.getsockname()[:2], "peer", *s.getpeername()[:2], flush=True)
while not os.path.exists(end):
    echo(b"again")
    time.sleep(0.01)
s.shutdown(socket.SHUT_WR)
assert s.recv(1) == b"", "not the end"
print("ended", flush=True)
"#;

/// Two nodes, the server's and the client's.
struct Ground {
    folder: Folder,
    daemons: [Daemon; 2],
    // Dropped last, after who is in them.
    namespaces: Namespaces,
}

/// A client that goes on until it is told to end.
struct Client {
    running: Running,
    end: PathBuf,
    /// What it was told of its own end and of the other.
    own: SocketAddr,
    peer: SocketAddr,
}

impl Ground {
    /// `None`, and says so, without root.
    fn new() -> Option<Self> {
        if !place::is_root() {
            eprintln!("left out: network namespaces need root");
            return None;
        }
        let (namespaces, folder) = (Namespaces::new(), Folder::new());
        let fabric = folder.at("fabric");
        std::fs::create_dir(&fabric).unwrap();
        std::fs::set_permissions(&fabric, PermissionsExt::from_mode(0o700)).unwrap();
        let mut config = format!("device = \"model:{}\"\n", fabric.display());
        for side in 0..2 {
            let (id, v4, v6) = (side + 1, namespaces.v4(side), namespaces.v6(side));
            config += &format!("[[fabric.nodes]]\nid = {id}\naddresses = [\"{v4}\", \"{v6}\"]\n");
        }
        let mut daemons = [0, 1].map(|side| {
            let head = format!("log_level = \"debug\"\n[fabric]\nnode = {}", side + 1);
            // Long enough for a busy machine.
            let wait = "connect_timeout_us = 300000";
            let name = &namespaces.names[side];
            Daemon::start_inside(Some(name), &format!("{head}\n{wait}\n{config}"))
        });
        for daemon in &mut daemons {
            daemon.wait_for_nodes(1);
        }
        Some(Ground {
            folder,
            daemons,
            namespaces,
        })
    }

    fn python(&self, side: usize, script: &str) -> Program {
        Program::new(place::command(&["python3"]), self.folder.path())
            .inside(&self.namespaces.names[side])
            .arg("-c")
            .arg(script)
    }

    /// A server on side 0, which must be known to listen when it is preloaded.
    fn serve(&self, address: &str, port: u16, preloaded: bool) -> Running {
        let mut program = self.python(0, SERVER).arg(address).arg(port.to_string());
        if preloaded {
            program = program.preloaded(&self.daemons[0].socket());
        }
        let before = self.daemons[0].number("/fabric/listeners");
        let mut running = program.start();
        running.wait_for_output("listening", LIMIT);
        let end = Instant::now() + LIMIT;
        while preloaded && self.daemons[0].number("/fabric/listeners") == before {
            assert!(Instant::now() < end, "the daemon does not know who listens");
            std::thread::sleep(Duration::from_millis(5));
        }
        running
    }

    /// A preloaded client on side 1, when it has sent and received its lot.
    fn connect(&self, address: IpAddr, port: u16) -> Client {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let end = self.folder.at(&format!("end-{number}"));
        let mut running = self
            .python(1, CLIENT)
            .arg(address.to_string())
            .arg(port.to_string())
            .arg(&end)
            .preloaded(&self.daemons[1].socket())
            .start();
        let output = running.wait_for_output("own ", LIMIT);
        let line = output.lines().find(|line| line.starts_with("own "));
        let words: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
        let ["own", own, own_port, "peer", peer, peer_port] = words[..] else {
            panic!("the client says {output}");
        };
        let address =
            |ip: &str, port: &str| SocketAddr::new(ip.parse().unwrap(), port.parse().unwrap());
        Client {
            own: address(own, own_port),
            peer: address(peer, peer_port),
            running,
            end,
        }
    }

    /// What `rdsock why` says of a program's connections on a side.
    fn why(&self, side: usize, running: &Running) -> Vec<Connection> {
        why::ask(&self.daemons[side].socket(), Some(running.pid())).connections
    }

    /// Waits until a program's only connection is on rings; that.
    fn on_rings(&self, side: usize, running: &Running) -> Connection {
        let end = Instant::now() + LIMIT;
        loop {
            let connections = self.why(side, running);
            if let [connection] = &connections[..]
                && connection.accelerated
            {
                return connection.clone();
            }
            assert!(Instant::now() < end, "not on rings: {connections:#?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A client whose connection the kernel carries: it has the true addresses and says why.
    fn on_the_kernel(&self, port: u16, why: &str) {
        let server = IpAddr::V4(self.namespaces.v4(0));
        let client = self.connect(server, port);
        assert_eq!(client.peer, SocketAddr::new(server, port));
        assert_eq!(client.own.ip(), IpAddr::V4(self.namespaces.v4(1)));
        let connections = self.why(1, &client.running);
        let [connection] = &connections[..] else {
            panic!("not one connection: {connections:#?}");
        };
        let reason = connection.reason.clone().unwrap_or_default();
        assert!(
            !connection.accelerated && reason.contains(why),
            "{connection:#?}"
        );
        client.finish();
    }
}

impl Client {
    fn finish(self) {
        std::fs::write(&self.end, "").unwrap();
        let output = self.running.finish(LIMIT);
        assert!(output.contains("ended"), "{output}");
    }
}

#[test]
fn both_programs_are_told_the_true_addresses() {
    let Some(mut ground) = Ground::new() else {
        return;
    };
    let (v4, v6) = (
        ground.namespaces.v4(0).into(),
        ground.namespaces.v6(0).into(),
    );
    let descriptors = ground.daemons.each_mut().map(Daemon::descriptors);
    let cases: [(&str, IpAddr); 5] = [
        ("0.0.0.0", v4),
        (&ground.namespaces.v4(0).to_string(), v4),
        ("::", v6),
        (&ground.namespaces.v6(0).to_string(), v6),
        ("::", v4),
    ];
    for (listen, address) in cases {
        let port = place::free_port();
        let mut server = ground.serve(listen, port, true);
        let client = ground.connect(address, port);
        let target = SocketAddr::new(address, port);
        assert_eq!(client.peer, target, "getpeername of the client");
        let own: IpAddr = match address {
            IpAddr::V4(_) => ground.namespaces.v4(1).into(),
            IpAddr::V6(_) => ground.namespaces.v6(1).into(),
        };
        assert_eq!(client.own.ip(), own, "getsockname of the client");
        let source = client.own;
        let at_client = ground.on_rings(1, &client.running);
        assert_eq!(
            (&at_client.local, &at_client.peer),
            (&source.to_string(), &target.to_string())
        );
        let at_server = ground.on_rings(0, &server);
        assert_eq!(
            (&at_server.local, &at_server.peer),
            (&target.to_string(), &source.to_string())
        );
        client.finish();
        let output = server.wait_for_output("served", LIMIT);
        // What accept, getpeername and getsockname say. A socket of IPv6 sees IPv4 as mapped.
        let mapped = |ip: IpAddr| match ip {
            IpAddr::V4(ip) if listen == "::" => format!("::ffff:{ip}"),
            ip => ip.to_string(),
        };
        let (peer, here) = (mapped(own), mapped(address));
        let source = source.port();
        let expected = format!("served {peer} {source} {peer} {source} {here} {port}");
        assert!(output.contains(&expected), "not {expected:?} in {output}");
        drop(server);
    }
    for (daemon, descriptors) in ground.daemons.iter_mut().zip(descriptors) {
        daemon.wait_until_empty(descriptors);
        assert_eq!(daemon.number("/fabric/streams"), 0);
    }
}

#[test]
fn a_connection_goes_over_the_network_when_the_fabric_does_not_take_it() {
    let Some(mut ground) = Ground::new() else {
        return;
    };
    let (plain, preloaded) = (place::free_port(), place::free_port());
    let _plain = ground.serve("0.0.0.0", plain, false);
    let _preloaded = ground.serve("0.0.0.0", preloaded, true);
    ground.on_the_kernel(plain, "no preloaded program listens there");

    // The other node is late: what it answers in the end is undone.
    ground.daemons[0].running().signal(Signal::SIGSTOP);
    ground.on_the_kernel(preloaded, "does not answer");
    ground.daemons[0].running().signal(Signal::SIGCONT);
    // New connections go over the fabric as soon as the nodes have found each other again.
    let end = Instant::now() + LIMIT;
    loop {
        let client = ground.connect(ground.namespaces.v4(0).into(), preloaded);
        let at_client = ground.why(1, &client.running);
        client.finish();
        if at_client.iter().any(|connection| connection.accelerated) {
            break;
        }
        assert!(
            Instant::now() < end,
            "never over the fabric again: {at_client:#?}"
        );
    }

    ground.daemons[0].kill();
    ground.on_the_kernel(preloaded, "does not answer");
    // And goes on without its own daemon.
    ground.daemons[1].kill();
    let client = ground.connect(ground.namespaces.v4(0).into(), preloaded);
    assert_eq!(client.own.ip(), IpAddr::V4(ground.namespaces.v4(1)));
    client.finish();
}
