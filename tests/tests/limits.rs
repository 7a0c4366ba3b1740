//! Programs with little address space, or few descriptors: what runs plain runs under the shim, and `rdsock why` says what
//! kept it there.

use std::time::{Duration, Instant};

use nix::sys::resource::Resource;
use rdsock_tests::{Daemon, Mode, Site, why};

const LIMIT: Duration = Duration::from_secs(60);

const SERVER: &str = r#"
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(f"port {listener.getsockname()[1]}.", flush=True)
end, _ = listener.accept()
while message := end.recv(100):
    end.sendall(message)
"#;

/// Prints after a while that lasts, and goes on, so that it can be asked for. Takes memory meanwhile, as it could plain.
const CLIENT: &str = r#"
import socket, sys, time
end = socket.socket()
end.connect(("127.0.0.1", int(sys.argv[1])))
kept = []
for turn in range(1000000):
    if turn < 50:
        kept.append(bytes(100000))
    end.sendall(b"x" * 100)
    assert len(end.recv(100, socket.MSG_WAITALL)) == 100
    if turn == 200:
        print("went on", flush=True)
    if turn > 200:
        time.sleep(0.01)
"#;

/// Runs both with so much address space; the reasons that `why` gives, if it is asked.
fn talk(mode: Mode, kib: u64) -> Vec<String> {
    let mut site = Site::new(mode);
    let limited = |program: rdsock_tests::Program| program.limit(Resource::RLIMIT_AS, kib << 10);
    let mut server = limited(site.server("python3").arg("-c").arg(SERVER)).start();
    let said = server.wait_for_output(".", LIMIT);
    let port = said
        .trim()
        .trim_start_matches("port ")
        .trim_end_matches('.')
        .to_owned();
    let mut client = limited(site.client("python3").arg("-c").arg(CLIENT).arg(&port)).start();
    client.wait_for_output("went on", LIMIT);
    let Some(socket) = site.daemon().map(|daemon: &mut Daemon| daemon.socket()) else {
        return Vec::new();
    };
    let port: u16 = port.parse().unwrap();
    let end = Instant::now() + LIMIT;
    loop {
        let told = why::ask(&socket, Some(client.pid()));
        let lines = told.connections.iter().filter(|line| line.touches(port));
        let reasons: Vec<String> = lines
            .map(|line| line.reason.clone().unwrap_or_else(|| "on rings".into()))
            .collect();
        let settled = reasons.iter().any(|reason| {
            reason == "on rings" || reason.contains("ulimit") || reason.contains("limits")
        });
        if settled || Instant::now() > end {
            return reasons;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_program_with_little_address_space_stays_on_the_kernel_with_a_reason() {
    talk(Mode::Neither, 40_000);
    let reasons = talk(Mode::Both, 40_000);
    assert!(
        reasons
            .iter()
            .any(|reason| reason.contains("address space")),
        "{reasons:?}"
    );
}

#[test]
fn a_program_with_room_is_on_rings_under_a_limit() {
    let reasons = talk(Mode::Both, 400_000);
    assert_eq!(reasons, ["on rings"]);
}

/// Talks, and then counts the descriptors that it can still have. Goes on, so that it can be asked for.
const COUNTER: &str = r#"
import os, socket, time
listener = socket.create_server(("127.0.0.1", 0))
one = socket.create_connection(listener.getsockname())
other, _ = listener.accept()
def talk():
    one.sendall(b"x" * 100)
    assert len(other.recv(100, socket.MSG_WAITALL)) == 100
    other.sendall(b"y" * 100)
    assert len(one.recv(100, socket.MSG_WAITALL)) == 100
for turn in range(60):
    talk()
    time.sleep(0.001)
more = []
try:
    while True:
        more.append(os.dup(one.fileno()))
except OSError:
    pass
talk()
print(f"{len(more)} more.", flush=True)
for fd in more:
    os.close(fd)
while True:
    talk()
    time.sleep(0.01)
"#;

#[test]
fn a_program_with_few_descriptors_has_all_of_them() {
    let few = |mode| {
        let mut site = Site::new(mode);
        let program = site.client("python3").arg("-c").arg(COUNTER);
        let mut running = program.limit(Resource::RLIMIT_NOFILE, 30).start();
        let said = running.wait_for_output("more.", LIMIT);
        let reason: Option<String> = site.daemon().map(|daemon: &mut Daemon| {
            let told = why::ask(&daemon.socket(), Some(running.pid()));
            let processes = told.processes.into_iter();
            processes.filter_map(|process| process.reason).collect()
        });
        (said, reason.unwrap_or_default())
    };
    let (plain, _) = few(Mode::Neither);
    let (preloaded, reason) = few(Mode::Both);
    assert_eq!(plain, preloaded);
    assert!(reason.contains("descriptors: 30"), "{reason}");
}
