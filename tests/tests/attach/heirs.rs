//! Programs that get a connection from the one before them, by exec or by a spawn, and can't ask for what it had there.

use nix::sys::signal::Signal;
use rdsock_tests::{Daemon, Folder, Program, Running};

use crate::LIMIT;

/// A server with a connection on rings, which turns into another program, or starts one, when the file `go` is there.
const SERVER: &str = r#"
import os, resource, socket, sys, time
way, folder = sys.argv[1:]
HELPER = '''
import errno, socket, sys
connection, got = socket.socket(fileno=int(sys.argv[1])), b""
connection.settimeout(20)
try:
    while len(got) < 5000:
        part = connection.recv(5000)
        if not part: break
        got += part
    maps = open("/proc/self/maps").read()
    print("received", len(got), set(got), "with rings" if "rdsock-stream" in maps else "without rings", flush=True)
except OSError as error:
    print("failed", errno.errorcode[error.errno], "then", connection.recv(1), flush=True)
'''
listener = socket.create_server(("127.0.0.1", 0))
if os.fork() == 0:
    connection = socket.create_connection(listener.getsockname())
    while True:
        connection.sendall(b"a" * 2000)
        if connection.recv(1) != b"k":
            break
    time.sleep(0.5)
    try:
        connection.sendall(b"b" * 5000)
        connection.recv(1)
    except OSError:
        pass
    os._exit(0)
connection = listener.accept()[0]
def exchange(answer):
    connection.recv(2000, socket.MSG_WAITALL)
    connection.sendall(answer)
def streams():
    return sum("rdsock-stream" in line for line in open("/proc/self/maps"))
while streams() == 0:
    exchange(b"k")
    time.sleep(0.01)
for _ in range(20):
    exchange(b"k")
print("on rings", flush=True)
while not os.path.exists(folder + "/go"):
    exchange(b"k")
    time.sleep(0.01)
exchange(b"!")
connection.set_inheritable(True)
program, environment = sys.executable, dict(os.environ)
if way == "elsewhere":
    del environment["RDSOCK_SOCKET"]
elif way == "limited":
    resource.setrlimit(resource.RLIMIT_AS, (32 << 20, 32 << 20))
elif way == "denied":
    program = folder + "/denied"
    os.symlink(sys.executable, program)
arguments = [program, "-c", HELPER, str(connection.fileno())]
if way != "full":
    os.execve(program, arguments, environment)
os.waitpid(os.posix_spawn(program, arguments, environment), 0)
got = connection.recv(5000, socket.MSG_WAITALL)
print("kept", len(got), set(got), streams(), flush=True)
"#;

struct Heirs {
    daemon: Daemon,
    folder: Folder,
    server: Running,
}

impl Heirs {
    /// A server that is about to go this way.
    fn of(way: &str, config: &str) -> Self {
        let (daemon, folder) = (Daemon::start(config), Folder::new());
        let mut server = Program::new("python3", folder.path())
            .arg("-c")
            .arg(SERVER)
            .arg(way)
            .arg(folder.path())
            .preloaded(&daemon.socket())
            .start();
        server.wait_for_output("on rings", LIMIT);
        Heirs {
            daemon,
            folder,
            server,
        }
    }

    /// It goes; what is said then, up to some text.
    fn go(&mut self, text: &str) -> String {
        std::fs::write(self.folder.at("go"), "").unwrap();
        self.server.wait_for_output(text, LIMIT)
    }
}

#[test]
fn who_can_not_have_a_stream_gets_the_kernels_connection() {
    for (way, config) in [
        ("elsewhere", ""),
        ("limited", ""),
        ("denied", "[policy]\ndeny_programs = [\"denied\"]"),
    ] {
        let said = Heirs::of(way, config).go("received");
        assert!(
            said.contains("received 5000 {98} without rings"),
            "{way}: {said}"
        );
    }
}

/// Nobody knows what was said on the rings: the connection ends.
#[test]
fn a_program_that_is_not_told_of_its_stream_finds_it_broken() {
    let mut heirs = Heirs::of("stopped", "");
    heirs.daemon.running().signal(Signal::SIGSTOP);
    let said = heirs.go("then");
    heirs.daemon.running().signal(Signal::SIGCONT);
    assert!(said.contains("failed ECONNRESET then b''"), "{said}");
    assert!(said.contains("an inherited connection was reset"), "{said}");
}

/// For the program alone: who started it goes on.
#[test]
fn a_program_that_is_not_told_of_its_stream_leaves_it_to_others() {
    let mut heirs = Heirs::of("full", "max_tenants = 4");
    let said = heirs.go("kept");
    assert!(said.contains("failed ECONNRESET then b''"), "{said}");
    assert!(said.contains("kept 5000 {98} 1"), "{said}");
}

/// A client with a stream that the other end has declined: what the daemon forgets, and what nothing was said on.
const ALONE: &str = r#"
import os, socket, sys, time
HELPER = '''
import socket, sys
connection = socket.socket(fileno=int(sys.argv[1]))
for _ in range(100):
    connection.sendall(b"x")
    assert connection.recv(1) == b"y"
print("goes on", flush=True)
'''
SO_TIMESTAMP = 29
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMP, 1)
listener.bind(("127.0.0.1", 0))
listener.listen()
if os.fork() == 0:
    connection = listener.accept()[0]
    while connection.recv(1):
        connection.sendall(b"y")
    os._exit(0)
connection = socket.create_connection(listener.getsockname())
def exchange():
    connection.sendall(b"x")
    assert connection.recv(1) == b"y"
while "rdsock-stream" not in open("/proc/self/maps").read():
    exchange()
    time.sleep(0.01)
for _ in range(20):
    exchange()
    time.sleep(0.01)
connection.set_inheritable(True)
os.execv(sys.executable, ["python3", "-c", HELPER, str(connection.fileno())])
"#;

#[test]
fn a_stream_that_the_other_end_has_declined_is_none() {
    let (folder, daemon) = (Folder::new(), Daemon::start(""));
    let mut client = Program::new("python3", folder.path())
        .arg("-c")
        .arg(ALONE)
        .preloaded(&daemon.socket())
        .start();
    client.wait_for_output("goes on", LIMIT);
}
