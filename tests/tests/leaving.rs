//! Clients that leave the rings and take nothing, or that owe what never comes: the server, which is not to block, goes on
//! serving others, and no byte is lost.

use std::time::{Duration, Instant};

use rdsock_tests::{Daemon, Folder, Program, Running, why};

const LIMIT: Duration = Duration::from_secs(60);

/// Bytes of a ring: more than the kernel takes for who reads nothing.
const RING: usize = 16 << 20;

/// Answers each text with itself, and `flood` with as many bytes as it is told. It never waits for one client: by epoll, by
/// poll, or in a thread for each.
const SERVER: &str = r#"
import select, socket, sys, threading
how, size = sys.argv[1], int(sys.argv[2])
flood = (bytes(range(251)) * (size // 251 + 1))[:size]
listener = socket.create_server(("127.0.0.1", 0))
print(f"port {listener.getsockname()[1]}", flush=True)
def serve(connection):
    while text := connection.recv(4096):
        connection.sendall(flood if text == b"flood" else text)
if how == "threads":
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],)).start()
poll = select.epoll() if how == "epoll" else select.poll()
poll.register(listener, select.EPOLLIN)
sockets, left = {}, {}
def go_on(number):
    try:
        # A view, so that nothing is copied for each piece.
        left[number] = left[number][sockets[number].send(left[number]):]
    except BlockingIOError:
        pass
    room = select.EPOLLOUT if left[number] else 0
    poll.modify(number, select.EPOLLIN | room)
while True:
    for number, events in poll.poll():
        if number == listener.fileno():
            accepted = listener.accept()[0]
            accepted.setblocking(False)
            sockets[accepted.fileno()], left[accepted.fileno()] = accepted, memoryview(b"")
            poll.register(accepted, select.EPOLLIN)
            continue
        if events & select.EPOLLIN:
            try:
                text = sockets[number].recv(4096)
            except BlockingIOError:
                continue
            if not text:
                poll.unregister(number)
                sockets.pop(number).close()
                continue
            left[number] = memoryview(bytes(left[number]) + (flood if text == b"flood" else text))
        if left[number]:
            go_on(number)
"#;

/// Is on rings, asks for the flood, and becomes another program.
const LEAVER: &str = r#"
import fcntl, os, socket, sys, termios, time
connection = socket.socket()
connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
connection.connect(("127.0.0.1", int(sys.argv[1])))
while not os.path.exists(sys.argv[5]):
    connection.sendall(b"text")
    assert connection.recv(4, socket.MSG_WAITALL) == b"text"
    time.sleep(0.01)
connection.sendall(b"flood")
assert connection.recv(1) == b"\0"
# The ring is full, or has all of it.
while int.from_bytes(fcntl.ioctl(connection, termios.FIONREAD, bytes(4)), "little") < int(sys.argv[6]):
    time.sleep(0.01)
os.set_inheritable(connection.fileno(), True)
environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
os.execve(sys.executable, [sys.executable, "-c", sys.argv[4], str(connection.fileno()), *sys.argv[2:4]], environment)
"#;

/// That other program: without the shim, it reads nothing until a file is there, and then all.
const READER: &str = r#"
import os, socket, sys, time
connection = socket.socket(fileno=int(sys.argv[1]))
size = int(sys.argv[2])
print("has left", flush=True)
while not os.path.exists(sys.argv[3]):
    time.sleep(0.01)
flood = (bytes(range(251)) * (size // 251 + 1))[1:size]
connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
got = bytearray()
try:
    while len(got) < len(flood) and (piece := connection.recv(1 << 20)):
        got += piece
except ConnectionResetError:
    assert flood.startswith(got)
    print("was reset", flush=True)
    sys.exit()
assert got == flood, (len(got), next((at for at, byte in enumerate(got) if byte != flood[at]), None))
connection.sendall(b"text")
assert connection.recv(5) == b"text"
print("has read all", flush=True)
"#;

/// Is answered each time.
const HONEST: &str = r#"
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for _ in range(300):
    connection.sendall(b"text")
    assert connection.recv(4) == b"text"
print("answered", flush=True)
"#;

fn python(folder: &Folder, daemon: &Daemon, source: &str) -> Program {
    Program::new("python3", folder.path())
        .arg("-c")
        .arg(source)
        .preloaded(&daemon.socket())
}

/// The one connection of a program has come to rings, and has gone on for a moment.
fn wait_for_rings(daemon: &Daemon, program: &Running) {
    let end = Instant::now() + LIMIT;
    loop {
        let connections = why::ask(&daemon.socket(), Some(program.pid())).connections;
        if connections.len() == 1 && connections.iter().all(|c| c.accelerated) {
            return std::thread::sleep(Duration::from_millis(200));
        }
        assert!(Instant::now() < end, "{connections:#?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A client leaves `size` bytes in its ring and reads none of them for a while; `meanwhile` is done then, and `expected` is what it
/// says in the end.
fn leave(
    how: &str,
    size: usize,
    meanwhile: impl FnOnce(&mut Running, &str, &Folder, &Daemon),
    expected: &str,
) {
    let config = format!("ring_size = {RING}\n");
    let (folder, daemon) = (Folder::new(), Daemon::start(&config));
    let mut server = python(&folder, &daemon, SERVER)
        .arg(how)
        .arg(size.to_string())
        .start();
    let said = server.wait_for_output("port", LIMIT);
    let port = said.split_whitespace().nth(1).unwrap();
    let (flood, go) = (folder.at("flood"), folder.at("go"));
    let mut leaver = python(&folder, &daemon, LEAVER)
        .arg(port)
        .arg(size.to_string())
        .arg(&go)
        .arg(READER)
        .arg(&flood)
        .arg((size.min(RING) - 1).to_string())
        .start();
    wait_for_rings(&daemon, &server);
    folder.write("flood", "");
    leaver.wait_for_output("has left", LIMIT);
    meanwhile(&mut server, port, &folder, &daemon);
    assert!(leaver.ended().is_none(), "{}", leaver.output());
    folder.write("go", "");
    leaver.wait_for_output(expected, LIMIT);
}

/// Others are served meanwhile, and then all of it arrives.
fn leave_and_serve(how: &str, size: usize) {
    let meanwhile = |server: &mut Running, port: &str, folder: &Folder, daemon: &Daemon| {
        for _ in 0..2 {
            let mut honest = python(folder, daemon, HONEST).arg(port).start();
            honest.wait_for_output("answered", LIMIT);
        }
        assert!(server.ended().is_none(), "{}", server.output());
    };
    leave(how, size, meanwhile, "has read all");
}

/// All of it is in the ring: the server only waits for texts from then on, and the rest goes out in its waits.
#[test]
fn what_fits_into_the_ring_goes_out_while_epoll_waits() {
    leave_and_serve("epoll", RING - 4096);
}

#[test]
fn what_fits_into_the_ring_goes_out_while_poll_waits() {
    leave_and_serve("poll", RING - 4096);
}

#[test]
fn what_fits_into_the_ring_goes_out_while_a_receive_waits() {
    leave_and_serve("threads", RING - 4096);
}

/// The server has more to send, and waits for room.
#[test]
fn what_comes_behind_the_ring_goes_out_behind_it() {
    for how in ["epoll", "poll", "threads"] {
        leave_and_serve(how, RING + (4 << 20));
    }
}

/// A part of the bytes and an end behind it would look like all of them.
#[test]
fn a_server_that_is_killed_leaves_a_reset_and_no_end() {
    let kill = |server: &mut Running, port: &str, folder: &Folder, daemon: &Daemon| {
        // Who is served later shows that the server has seen the other one leave.
        let mut honest = python(folder, daemon, HONEST).arg(port).start();
        honest.wait_for_output("answered", LIMIT);
        server.kill();
    };
    leave("epoll", RING - 4096, kill, "was reset");
}

/// Answers whoever connects, and closes whoever says so, a moment later; says of each close whether it took long.
const CLOSER: &str = r#"
import os, select, socket, time
"".encode("idna")
os.setgroups([]); os.setgid(64010); os.setuid(64010)
listener = socket.create_server(("127.0.0.1", 0))
poll = select.epoll()
poll.register(listener, select.EPOLLIN)
sockets = {}
print(f"port {listener.getsockname()[1]}", flush=True)
while True:
    for number, _ in poll.poll():
        if number == listener.fileno():
            accepted = listener.accept()[0]
            sockets[accepted.fileno()] = accepted
            poll.register(accepted, select.EPOLLIN)
            continue
        try:
            text = sockets[number].recv(4096)
        except OSError:
            text = b""
        if text not in (b"", b"quit"):
            sockets[number].send(text)
            continue
        if text == b"quit":
            time.sleep(0.01)
        poll.unregister(number)
        start = time.monotonic()
        sockets.pop(number).close()
        if text == b"quit":
            print("long" if time.monotonic() - start > 0.05 else "short", flush=True)
"#;

/// Says that a wake byte is on its way, for as long as the server has the connection.
const OWES: &str = r#"
import ctypes, os, socket, sys
"".encode("idna")
os.setgroups([]); os.setgid(64011); os.setuid(64011)
for number in range(int(sys.argv[2])):
    connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    streams = []
    for _ in range(2000):
        connection.sendall(b"text")
        assert connection.recv(4, socket.MSG_WAITALL) == b"text"
        with open("/proc/self/maps") as maps:
            streams = [int(line.split("-")[0], 16) for line in maps if "rdsock-stream" in line]
        if streams:
            break
    assert streams, "it came to no rings"
    for _ in range(20):
        connection.sendall(b"text")
        assert connection.recv(4, socket.MSG_WAITALL) == b"text"
    words = [ctypes.c_uint32.from_address(streams[0] + at) for at in (384, 1024)]
    connection.sendall(b"quit")
    connection.setblocking(False)
    while True:
        for word in words:
            word.value |= 4
        try:
            connection.recv(1)
            break
        except BlockingIOError:
            pass
        except OSError:
            break
    connection.close()
print("has done so", flush=True)
"#;

#[test]
fn closes_do_not_wait_for_who_owes_a_wake_byte() {
    // SAFETY: it only asks.
    if unsafe { libc::geteuid() } != 0 {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: only root may change its user");
    }
    let (folder, daemon) = (Folder::new(), Daemon::start(""));
    let mut server = python(&folder, &daemon, CLOSER).start();
    let said = server.wait_for_output("port", LIMIT);
    let port = said.split_whitespace().nth(1).unwrap();
    let count = 30;
    let mut owes = python(&folder, &daemon, OWES)
        .arg(port)
        .arg(count.to_string())
        .start();
    owes.wait_for_output("has done so", LIMIT);
    let end = Instant::now() + LIMIT;
    let long = loop {
        let said = server.output();
        let lines = |what| said.lines().filter(|line| *line == what).count();
        if lines("long") + lines("short") == count {
            break lines("long");
        }
        assert!(Instant::now() < end && server.ended().is_none(), "{said}");
        std::thread::sleep(Duration::from_millis(20));
    };
    // One or two in each ten seconds, for whom it has patience.
    assert!(2 * long < count, "{long} of {count} closes took long");
}
