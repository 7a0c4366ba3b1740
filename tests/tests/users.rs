//! A program that changes its user after it has attached: it is another one for the daemon, attaches anew by itself, and
//! keeps what it has on rings.

use std::time::{Duration, Instant};

use rdsock_tests::{Daemon, Folder, Program, place, why};

const LIMIT: Duration = Duration::from_secs(60);

/// A connection from before the change of user, and one from after it, each end of each in this process.
const PROGRAM: &str = r#"
import os, socket, time
def pair():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        connector = socket.create_connection(listener.getsockname())
        return connector, listener.accept()[0]
def play(a, b):
    for number in range(200):
        for one, other in ((a, b), (b, a)):
            text = b"%08d" % number
            one.sendall(text)
            assert other.recv(8, socket.MSG_WAITALL) == text
before = pair()
play(*before)
os.setgroups([])
os.setgid(64009)
os.setuid(64009)
after = pair()
print("ready", flush=True)
for _ in range(600):
    play(*before)
    play(*after)
    time.sleep(0.1)
"#;

#[test]
fn a_program_that_gives_up_root_attaches_anew() {
    // SAFETY: it only asks.
    if unsafe { libc::geteuid() } != 0 {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: only root may change its user");
    }
    let (folder, daemon) = (Folder::new(), Daemon::start(""));
    let mut program = Program::new("python3", folder.path())
        .arg("-c")
        .arg(PROGRAM)
        .preloaded(&daemon.socket())
        .start();
    program.wait_for_output("ready", LIMIT);
    let end = Instant::now() + LIMIT;
    loop {
        let connections = why::ask(&daemon.socket(), Some(program.pid())).connections;
        if connections.iter().filter(|c| c.accelerated).count() == 4 {
            return;
        }
        assert!(Instant::now() < end, "{connections:#?}");
        assert!(program.ended().is_none(), "{}", program.output());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Works as one user and as another in turns, as a file server does.
const CHANGELING: &str = r#"
import os, socket, time
listener = socket.create_server(("127.0.0.1", 0))
connector = socket.create_connection(listener.getsockname())
accepted = listener.accept()[0]
def play():
    for one, other in ((connector, accepted), (accepted, connector)):
        one.sendall(b"text")
        assert other.recv(4, socket.MSG_WAITALL) == b"text"
for _ in range(200):
    for user in (64009, 0):
        os.seteuid(user)
        # A call of which the shim tells the daemon.
        socket.create_server(("127.0.0.1", 0)).close()
        socket.create_connection(listener.getsockname()).close()
        listener.accept()[0].close()
        play()
print("ready", flush=True)
while True:
    play()
    time.sleep(0.01)
"#;

#[test]
fn a_program_that_changes_its_user_again_and_again_attaches_seldom() {
    // SAFETY: it only asks.
    if unsafe { libc::geteuid() } != 0 {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: only root may change its user");
    }
    let (folder, daemon) = (Folder::new(), Daemon::start(""));
    let start = Instant::now();
    let mut program = Program::new("python3", folder.path())
        .arg("-c")
        .arg(CHANGELING)
        .preloaded(&daemon.socket())
        .start();
    program.wait_for_output("ready", LIMIT);
    let attached = daemon.number("/counters/attached");
    // By itself at most once a second, and as often since the daemon has seen it as another user.
    let most = 4 + 2 * start.elapsed().as_secs();
    assert!(
        attached <= most,
        "attached {attached} times, {most} are bearable"
    );
    // It is itself again, and so are its connections.
    let end = Instant::now() + LIMIT;
    loop {
        let connections = why::ask(&daemon.socket(), Some(program.pid())).connections;
        if connections.iter().filter(|c| c.accelerated).count() == 2 {
            return;
        }
        assert!(Instant::now() < end, "{connections:#?}");
        assert!(program.ended().is_none(), "{}", program.output());
        std::thread::sleep(Duration::from_millis(50));
    }
}

// As those users, Python may not read its own modules any more: what they need is loaded before.

/// Answers whoever connects, by epoll.
const SERVER: &str = r#"
import os, select, socket
"".encode("idna")
os.setgroups([]); os.setgid(64010); os.setuid(64010)
listener = socket.create_server(("127.0.0.1", 0))
poll = select.epoll()
poll.register(listener, select.EPOLLIN)
sockets = {}
print("port", listener.getsockname()[1], flush=True)
while True:
    for number, _ in poll.poll():
        if number == listener.fileno():
            accepted = listener.accept()[0]
            sockets[accepted.fileno()] = accepted
            poll.register(accepted, select.EPOLLIN)
            continue
        text = sockets[number].recv(4096)
        if text:
            sockets[number].send(text)
        else:
            poll.unregister(number)
            sockets.pop(number).close()
"#;

/// Clears all bells that it has, when it has a stream.
const SILENCER: &str = r#"
import ctypes, os, socket, sys, time
"".encode("idna")
os.setgroups([]); os.setgid(64011); os.setuid(64011)
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
for _ in range(100):
    connection.sendall(b"text")
    assert connection.recv(4, socket.MSG_WAITALL) == b"text"
    time.sleep(0.01)
boards = []
for line in open("/proc/self/maps"):
    if "rdsock-bells" in line:
        boards.append([int(number, 16) for number in line.split()[0].split("-")])
print("has", len(boards), "boards", flush=True)
while True:
    for start, end in boards:
        ctypes.memset(start + 128, 0, end - start - 128)
"#;

/// Is answered each time.
const HONEST: &str = r#"
import os, socket, sys, time
"".encode("idna")
os.setgroups([]); os.setgid(64012); os.setuid(64012)
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.settimeout(20)
end = time.monotonic() + 3
rounds = 0
while time.monotonic() < end:
    connection.sendall(b"text")
    assert connection.recv(4) == b"text"
    rounds += 1
    time.sleep(0.003)
print("answered", rounds, flush=True)
"#;

#[test]
fn a_client_does_not_silence_the_server_for_other_users() {
    // SAFETY: it only asks.
    if unsafe { libc::geteuid() } != 0 {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: only root may change its user");
    }
    let (folder, daemon) = (Folder::new(), Daemon::start(""));
    let python = |source: &str| {
        Program::new("python3", folder.path())
            .arg("-c")
            .arg(source)
            .preloaded(&daemon.socket())
    };
    let mut server = python(SERVER).start();
    let said = server.wait_for_output("port", LIMIT);
    let port = said.split_whitespace().nth(1).unwrap();
    let mut silencer = python(SILENCER).arg(port).start();
    silencer.wait_for_output("boards", LIMIT);
    let connections = why::ask(&daemon.socket(), Some(silencer.pid())).connections;
    assert!(
        connections.iter().any(|c| c.accelerated),
        "{connections:#?}"
    );
    for _ in 0..2 {
        let mut honest = python(HONEST).arg(port).start();
        let said = honest.wait_for_output("answered", LIMIT);
        println!("{said}");
    }
    assert!(silencer.ended().is_none(), "{}", silencer.output());
}

/// Has a stream, and a name that clears the screen, begins a line and turns the rest of it round.
const ODD: &str = r#"
import ctypes, os, socket, time
name = "\x1b[2J\u009bK\n\u202eui".encode()
assert ctypes.CDLL(None).prctl(15, name, 0, 0, 0) == 0
"".encode("idna")
os.setgroups([]); os.setgid(64011); os.setuid(64011)
listener = socket.create_server(("127.0.0.1", 0))
connector = socket.create_connection(listener.getsockname())
accepted = listener.accept()[0]
print("ready", flush=True)
while True:
    for one, other in ((connector, accepted), (accepted, connector)):
        one.sendall(b"text")
        assert other.recv(4, socket.MSG_WAITALL) == b"text"
    time.sleep(0.05)
"#;

#[test]
fn no_name_of_a_program_does_something_to_a_terminal() {
    // SAFETY: it only asks.
    if unsafe { libc::geteuid() } != 0 {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: only root may change its user");
    }
    const NAME: &str = "\x1b[2J\u{9b}K\n\u{202e}ui";
    let (folder, mut daemon) = (Folder::new(), Daemon::start("log_level = \"trace\"\n"));
    let mut program = Program::new("python3", folder.path())
        .arg("-c")
        .arg(ODD)
        .preloaded(&daemon.socket())
        .start();
    program.wait_for_output("ready", LIMIT);
    let programs = why::ask(&daemon.socket(), None).connections;
    assert!(programs.iter().any(|c| c.program == NAME), "{programs:#?}");
    let rdsock = |args: &str| {
        Program::new(place::binary("rdsock"), folder.path())
            .args(args)
            .env("RDSOCK_SOCKET", daemon.socket())
            .run(LIMIT)
    };
    let pid = program.pid();
    let mut said: Vec<String> = ["why", &format!("why {pid}"), "stat"].map(rdsock).into();
    for text in &said {
        assert!(text.contains("ui"), "{text:?}");
    }
    said.push(daemon.log());
    for text in said {
        let is_bad = |letter: char| letter.is_control() && letter != '\n' || letter == '\u{202e}';
        assert!(!text.contains(is_bad), "{text:?}");
        assert!(!text.lines().any(|line| line.starts_with("ui")), "{text:?}");
    }
}
