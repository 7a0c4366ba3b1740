//! A server with a memory limit of its own (a control group), whose clients ask for much and read nothing. Who fills a ring is charged for it
//! and can't give it back; over TCP it would be throttled, and live.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rdsock_tests::cgroup::Cgroup;
use rdsock_tests::program::Running;
use rdsock_tests::{Daemon, Folder, Program, why};

const LIMIT: Duration = Duration::from_secs(60);
const MEMORY: u64 = 150 << 20;
const CLIENTS: u64 = 100;

/// Joins the group, answers a question with a byte, and sends who asks for much as much as there is room for.
const SERVER: &str = r#"
import selectors, socket, sys
if sys.argv[1]:
    with open(sys.argv[1], "w") as door:
        door.write("0")
listener = socket.create_server(("127.0.0.1", 0), backlog=256)
print("port", listener.getsockname()[1], flush=True)
much = bytes(8 << 20)
waits = selectors.DefaultSelector()
waits.register(listener, selectors.EVENT_READ)
while True:
    for key, _ in waits.select():
        if key.fileobj is listener:
            accepted = listener.accept()[0]
            accepted.setblocking(False)
            waits.register(accepted, selectors.EVENT_READ)
            continue
        try:
            asked = key.fileobj.recv(1)
        except ConnectionError:
            asked = b""
        if asked == b"?":
            key.fileobj.send(b"!")
        elif asked == b"m":
            try:
                while True:
                    key.fileobj.send(much)
            except BlockingIOError:
                pass
        else:
            waits.unregister(key.fileobj)
            key.fileobj.close()
"#;

/// Has so many connections with questions on each, until it is told to ask for much. Then it reads nothing.
const CLIENT: &str = r#"
import signal, socket, sys, time
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
def ask(server):
    server.sendall(b"?")
    assert server.recv(1) == b"!"
to = ("127.0.0.1", int(sys.argv[1]))
servers = [socket.create_connection(to) for _ in range(int(sys.argv[2]))]
while not told:
    for server in servers:
        ask(server)
    time.sleep(0.02)
for server in servers:
    server.sendall(b"m")
time.sleep(1)
last = socket.create_connection(to)
last.settimeout(20)
for _ in range(20):
    ask(last)
print("answered", flush=True)
signal.pause()
"#;

fn python(code: &str, folder: &Folder, daemon: &Daemon) -> Program {
    let program = Program::new("python3", folder.path()).arg("-c").arg(code);
    program.preloaded(&daemon.socket())
}

fn start_server(folder: &Folder, daemon: &Daemon, group: &Cgroup) -> (Running, String) {
    let server = python(SERVER, folder, daemon).arg(group.door());
    let mut server = server.start();
    let said = server.wait_for_output("port", LIMIT);
    let port = said.split_whitespace().last().unwrap().to_owned();
    (server, port)
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_server_with_a_limit_outlives_clients_that_read_nothing() {
    let group = match Cgroup::limited("server", MEMORY) {
        Ok(group) => group,
        Err(why) => return eprintln!("SKIPPED, NOTHING WAS CHECKED: {why}"),
    };
    let mut daemon = Daemon::start("huge_pages = \"never\"");
    let folder = Folder::new();
    let (mut server, port) = start_server(&folder, &daemon, &group);
    let client = python(CLIENT, &folder, &daemon);
    let mut client = client.arg(port).arg(CLIENTS.to_string()).start();
    let limit = |daemon: &Daemon, what: &str| -> u64 {
        let stat = daemon.stat();
        let limits = stat["memory_limits"].as_array().cloned();
        let own = limits.iter().flatten().find(|limit| {
            let folder = limit["folder"].as_str().unwrap_or_default();
            group.folder().to_str() == Some(folder)
        });
        own.and_then(|limit| limit[what].as_u64()).unwrap_or(0)
    };
    let opened = |daemon: &Daemon| daemon.number("/counters/streams_opened");
    wait_for("all are promoted, or turned down", || {
        opened(&daemon) + limit(&daemon, "refused") >= CLIENTS
    });
    client.signal(Signal::SIGUSR1);
    client.wait_for_output("answered", LIMIT);
    assert_eq!(server.ended(), None, "{}", daemon.log());

    assert_eq!(limit(&daemon, "limit"), MEMORY);
    let on_rings = daemon.number("streams_now");
    assert!(on_rings > CLIENTS / 2, "{on_rings} streams");
    let rings = limit(&daemon, "rings");
    assert!(
        rings > MEMORY / 8 && rings <= MEMORY / 4,
        "{rings} bytes of rings"
    );

    // Who is turned down is told why.
    if limit(&daemon, "refused") != 0 {
        let told = why::ask(&daemon.socket(), Some(client.pid()));
        let mut reasons = told
            .connections
            .iter()
            .filter_map(|one| one.reason.as_ref());
        let is_told = reasons.any(|reason| reason.contains("memory limit"));
        assert!(is_told, "{told:?}");
    }
    client.kill();
    wait_for("all is given back", || limit(&daemon, "rings") == 0);
    assert_eq!(server.ended(), None);
    drop(server);
}
