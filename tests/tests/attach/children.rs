//! Children that a program forks: one may have fewer rights than its parent has, and be taken over.

use rdsock_tests::{Daemon, Folder, Program};

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
