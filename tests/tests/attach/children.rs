//! Children that a program forks: one may have fewer rights than its parent has, and be taken over.

use rdsock_tests::{Daemon, Folder, Program, place};

use crate::LIMIT;

/// Attaches, and has a child that makes no call on a connection say how many control connections it could read.
const PARENT: &str = r#"
import os, socket, time
listener = socket.create_server(("127.0.0.1", 0))
def pair():
    connector = socket.socket()
    connector.connect(listener.getsockname())
    return connector, listener.accept()[0]
def is_control(fd):
    try:
        with socket.socket(fileno=os.dup(fd)) as one:
            return (one.family, one.type & 15) == (socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError:
        return False
def controls():
    return len([fd for fd in map(int, os.listdir("/proc/self/fd")) if is_control(fd)])
first = pair()
while controls() == 0:
    pair()
print("parent has", controls(), flush=True)
child = os.fork()
if child == 0:
    print("child has", controls(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("over", flush=True)
"#;

#[test]
fn a_child_can_not_read_what_its_parent_is_told() {
    let (folder, daemon) = (Folder::new(), Daemon::start(""));
    let mut parent = Program::new("python3", folder.path())
        .arg("-c")
        .arg(PARENT)
        .preloaded(&daemon.socket())
        .start();
    let said = parent.wait_for_output("over", LIMIT);
    assert!(said.contains("parent has 1"), "{said}");
    assert!(said.contains("child has 0"), "{said}");
}

/// A server with a stream, which forks a child that closes it, and says what of the bells that its peers ring is mapped.
const BELLS: &str = r#"
import os, socket, time
listener = socket.create_server(("127.0.0.1", 0))
if os.fork() == 0:
    connection = socket.create_connection(listener.getsockname())
    while connection.recv(1):
        connection.sendall(b"a")
    os._exit(0)
connection = listener.accept()[0]
def exchange():
    connection.sendall(b"k")
    assert connection.recv(1) == b"a"
while "rdsock-stream" not in open("/proc/self/maps").read():
    exchange()
    time.sleep(0.01)
def is_board(fd):
    try:
        return "rdsock-bells" in os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return False
board, = [os.stat(f"/proc/self/fd/{fd}").st_ino for fd in os.listdir("/proc/self/fd") if is_board(fd)]
def mapped():
    return sum(line.split()[4] == str(board) for line in open("/proc/self/maps"))
print("parent has", mapped(), flush=True)
if os.fork() == 0:
    print("child has", mapped(), flush=True)
    exchange()
    connection.close()
    print("child still has", mapped(), flush=True)
    os._exit(0)
os.wait()
for _ in range(100):
    exchange()
print("over", flush=True)
"#;

#[test]
fn a_child_can_not_clear_its_parents_bells() {
    let (folder, daemon) = (Folder::new(), Daemon::start(""));
    let mut parent = Program::new("python3", folder.path())
        .arg("-c")
        .arg(BELLS)
        .preloaded(&daemon.socket())
        .start();
    let said = parent.wait_for_output("over", LIMIT);
    assert!(said.contains("parent has 1"), "{said}");
    assert!(said.contains("child has 0"), "{said}");
    assert!(said.contains("child still has 0"), "{said}");
}

/// A server that gives up root and runs another program with its connection, in a child of its own or itself.
const SERVER: &str = r#"
import os, socket, sys, time
user, forks = int(sys.argv[1]), sys.argv[2] == "fork"
HELPER = '''
import socket, sys
connection, got = socket.socket(fileno=int(sys.argv[1])), b""
connection.settimeout(20)
while len(got) < 5000:
    part = connection.recv(5000)
    if not part: break
    got += part
maps = open("/proc/self/maps").read()
print("received", len(got), set(got), "with rings" if "rdsock-stream" in maps else "without rings", flush=True)
'''
listener = socket.create_server(("127.0.0.1", 0))
if os.fork() == 0:
    connection = socket.create_connection(listener.getsockname())
    while True:
        connection.sendall(b"a" * 2000)
        if connection.recv(1) != b"k":
            break
    time.sleep(1)
    connection.sendall(b"b" * 5000)
    connection.recv(1)
    os._exit(0)
connection = listener.accept()[0]
def exchange(answer):
    connection.recv(2000, socket.MSG_WAITALL)
    connection.sendall(answer)
while "rdsock-stream" not in open("/proc/self/maps").read():
    exchange(b"k")
    time.sleep(0.01)
for _ in range(20):
    exchange(b"k")
exchange(b"!")
os.set_inheritable(connection.fileno(), True)
if not forks or os.fork() == 0:
    os.setgid(user)
    os.setuid(user)
    os.execv("/usr/bin/python3", ["python3", "-c", HELPER, str(connection.fileno())])
os.wait()
"#;

/// What was said before is not that program's: it gets the kernel's connection, and each byte that comes from then on.
#[test]
fn who_gives_up_root_and_runs_a_program_gives_it_no_rings() {
    if !place::is_root() {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: only root can become another user");
    }
    let daemon = Daemon::start("");
    for way in ["fork", "itself"] {
        let folder = Folder::new();
        let mut server = Program::new("python3", folder.path())
            .arg("-c")
            .arg(SERVER)
            .args(&format!("64022 {way}"))
            .preloaded(&daemon.socket())
            .start();
        let said = server.wait_for_output("received", LIMIT);
        assert!(
            said.contains("received 5000 {98} without rings"),
            "{way}: {said}"
        );
    }
}
