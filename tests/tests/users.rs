//! A program that changes its user after it has attached: it is another one for the daemon, attaches anew by itself, and
//! keeps what it has on rings.

use std::time::{Duration, Instant};

use rdsock_tests::{Daemon, Folder, Program, why};

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
