//! A program that has the kernel judge what comes: what is accepted there is judged as well, and stays on the kernel.

use std::time::Duration;

use rdsock_tests::{Daemon, Folder, Program};

const LIMIT: Duration = Duration::from_secs(90);

/// Connections that a server accepts, and whether each goes over a stream. Filters let everything pass.
const BOTH: &str = r#"
import ctypes, os, socket, struct, sys, time
SO_ATTACH_FILTER, TCP_MD5SIG = 26, 14
def filtered(listener):
    steps = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0xffffffff))
    program = struct.pack("HxxxxxxQ", 1, ctypes.addressof(steps))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
def signed(listener):
    # Of an address from which nobody comes.
    address = struct.pack("=HH4s120x", socket.AF_INET, 0, socket.inet_aton("192.0.2.1"))
    key = struct.pack("=BBHI80s", 0, 0, 3, 0, b"key")
    listener.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG, address + key)
def streams(listener, guarded):
    if os.fork() == 0:
        connection = socket.create_connection(listener.getsockname())
        while connection.recv(1):
            connection.sendall(b"x")
        os._exit(0)
    connection = listener.accept()[0]
    end = time.monotonic() + (1 if guarded else 60)
    count = 0
    while count == 0 and time.monotonic() < end:
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        time.sleep(0.01)
        count = sum("rdsock-stream" in line for line in open("/proc/self/maps"))
    connection.close()
    assert os.wait()[1] == 0
    return count
def listening(*guards):
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    for guard in guards:
        guard(listener)
    listener.listen()
    return listener
if len(sys.argv) > 1:
    # Another program has set the filter.
    assert streams(socket.socket(fileno=int(sys.argv[1])), True) == 0
    print("inherited", flush=True)
    os._exit(0)
assert streams(listening(filtered), True) == 0
print("filtered", flush=True)
try:
    listener = listening(signed)
except OSError as error:
    print("no signatures here:", error)
else:
    assert streams(listener, True) == 0
    print("signed", flush=True)
if os.fork() == 0:
    listener = listening(filtered)
    listener.set_inheritable(True)
    os.execv(sys.executable, ["python3", sys.argv[0], str(listener.fileno())])
assert os.wait()[1] == 0
assert streams(listening(), False) != 0
"#;

#[test]
fn a_connection_that_the_kernel_judges_stays_there() {
    let (folder, daemon) = (Folder::new(), Daemon::start(""));
    let script = folder.at("both.py");
    std::fs::write(&script, BOTH).unwrap();
    let said = Program::new("python3", folder.path())
        .arg(&script)
        .preloaded(&daemon.socket())
        .run(LIMIT);
    for guard in ["filtered", "inherited"] {
        assert!(said.contains(guard), "{said}");
    }
}
