//! What a program sees of a connection that it has closed, while the daemon has a duplicate of its socket for a moment, to
//! look who it is: nothing. A test that holds such a duplicate, for longer, stands for the daemon.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::sys::signal::Signal;
use rdsock_tests::{Daemon, Folder, Program, Running};

const LIMIT: Duration = Duration::from_secs(60);
const PUMP: &str = env!("CARGO_BIN_EXE_rdsock-test-pump");

/// A duplicate of another process's descriptor. `None` where that is forbidden.
fn duplicate(pid: u32, fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: plain system calls; what they return is owned by nobody else.
    unsafe {
        let process = libc::syscall(libc::SYS_pidfd_open, pid, 0) as RawFd;
        assert!(process >= 0, "{}", std::io::Error::last_os_error());
        let process = OwnedFd::from_raw_fd(process);
        let process = std::os::fd::AsRawFd::as_raw_fd(&process);
        let fd = libc::syscall(libc::SYS_pidfd_getfd, process, fd, 0) as RawFd;
        (fd >= 0).then(|| OwnedFd::from_raw_fd(fd))
    }
}

fn echo(peer: &mut TcpStream) {
    for _ in 0..8 {
        let mut bytes = [0; 8];
        peer.read_exact(&mut bytes).unwrap();
        peer.write_all(&bytes).unwrap();
    }
}

fn descriptor(program: &mut Running) -> RawFd {
    let output = program.wait_for_output("ready", LIMIT);
    let number = output.split("fd ").nth(1).unwrap();
    number.split(' ').next().unwrap().parse().unwrap()
}

/// How many events a program gets for a connection that it has closed in this way, while somebody else has the socket.
/// `None` where nobody can.
fn events_after(how: &str, daemon: Option<&Daemon>) -> Option<String> {
    let folder = Folder::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut program = Program::new(PUMP, folder.path()).args(&format!("close {port} {how}"));
    if let Some(daemon) = daemon {
        program = program.preloaded(&daemon.socket());
    }
    let mut program = program.start();
    let (mut peer, _) = listener.accept().unwrap();
    echo(&mut peer);
    let fd = descriptor(&mut program);
    let Some(duplicate) = duplicate(program.pid(), fd) else {
        eprintln!("SKIPPED, NOTHING WAS CHECKED: pidfd_getfd is forbidden here");
        return None;
    };
    peer.write_all(&[1]).unwrap();
    program.wait_for_output("closed", LIMIT);
    peer.write_all(&[2]).unwrap();
    drop(peer);
    let output = program.wait_for_output("events", LIMIT);
    drop(duplicate);
    output.lines().last().map(str::to_owned)
}

const WAYS: [&str; 3] = ["close", "dup2", "close_range"];

/// On plain Linux an event comes, so the others of these tests can fail.
#[test]
fn on_plain_linux_a_duplicate_keeps_events_coming() {
    for how in WAYS {
        if let Some(events) = events_after(how, None) {
            assert_eq!(events, "1 events", "{how}");
        }
    }
}

#[test]
fn no_event_comes_for_a_connection_that_was_announced_and_closed() {
    let daemon = Daemon::start("");
    for how in WAYS {
        if let Some(events) = events_after(how, Some(&daemon)) {
            assert_eq!(events, "0 events", "{how}");
        }
    }
}

/// Where a forked child has the connection as well, all is as on Linux: the parent's epoll goes on.
#[test]
fn a_forked_childs_connection_stays_registered_as_on_linux() {
    let daemon = Daemon::start("");
    for daemon in [None, Some(&daemon)] {
        if let Some(events) = events_after("fork", daemon) {
            assert_eq!(events, "1 events", "{daemon:?}");
        }
    }
}

/// More connections than the queue to the daemon has places, which go all at once while it reads nothing.
const MANY: usize = 300;

/// Opens so many connections to itself, sends on each now and then, and closes all but one when it is told. It lives on, and uses that.
const CLOSER: &str = r#"
import signal, socket, sys, time
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
listener = socket.create_server(("127.0.0.1", 0), backlog=64)
pairs = []
for _ in range(int(sys.argv[1])):
    one = socket.create_connection(listener.getsockname())
    pairs.append((one, listener.accept()[0]))
def talk(one, other):
    one.sendall(b"x"); other.recv(1)
    other.sendall(b"y"); one.recv(1)
print("open", flush=True)
while not told:
    for pair in pairs:
        talk(*pair)
    time.sleep(0.02)
while len(pairs) > 1:
    for end in pairs.pop():
        end.close()
print("closed", flush=True)
pairs[0][0].settimeout(0.02)
while True:
    talk(*pairs[0])
    try:
        pairs[0][0].recv(1)
    except TimeoutError:
        pass
"#;

/// The daemon is told of each, by and by: what it has for a connection goes while the program lives.
#[test]
fn a_daemon_that_was_busy_is_told_of_all_that_was_closed() {
    let mut daemon = Daemon::start("ring_size = 65536\nhuge_pages = \"never\"");
    let folder = Folder::new();
    let program = Program::new("python3", folder.path())
        .arg("-c")
        .arg(CLOSER)
        .arg(MANY.to_string())
        .preloaded(&daemon.socket());
    let mut program = program.start();
    program.wait_for_output("open", LIMIT);
    let wait_for_streams = |daemon: &Daemon, count: u64| {
        let start = std::time::Instant::now();
        while daemon.number("/streams_now") != count {
            let streams = daemon.number("/streams_now");
            assert!(start.elapsed() < LIMIT, "{streams} streams, not {count}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    wait_for_streams(&daemon, MANY as u64);
    daemon.running().signal(Signal::SIGSTOP);
    program.signal(Signal::SIGUSR1);
    program.wait_for_output("closed", LIMIT);
    daemon.running().signal(Signal::SIGCONT);
    wait_for_streams(&daemon, 1);
}
