//! A daemon of a stranger, who can put a socket where others look for theirs: a directory like `/tmp`. What it is told, and what goes
//! through the memory that it makes, would be the stranger's.

use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use rdsock_tests::{Folder, Program, place};

use crate::counterfeit::Counterfeit;
use crate::{LIMIT, PUMP};

const STRANGER: u32 = 64021;

/// A program that has the shim, whatever `rdsock run` would find, and makes connections.
fn program(counterfeit: &Counterfeit, folder: &Folder) -> (Program, Program) {
    let port = place::free_port();
    let server = Program::new(PUMP, folder.path()).args(&format!("serve {port}"));
    let client = Program::new(PUMP, folder.path())
        .args(&format!("tick {port} recv"))
        .env("LD_PRELOAD", place::binary("librdsock.so"))
        .env("RDSOCK_SOCKET", counterfeit.path());
    (server, client)
}

#[test]
fn a_program_says_nothing_to_a_daemon_of_a_stranger() {
    if !place::is_root() {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: only root can be another user");
    }
    let (counterfeit, folder) = (Counterfeit::of_stranger(STRANGER), Folder::new());
    let (server, client) = program(&counterfeit, &folder);
    let mut server = server.start();
    server.wait_for_output("listening", LIMIT);
    let mut client = client.start();
    client.wait_for_output("tick", LIMIT);
    let heard = counterfeit.accept(Duration::from_secs(3));
    assert!(heard.is_none(), "it has said HELLO");
}

#[test]
fn a_stranger_beside_the_daemon_gets_no_callers() {
    if !place::is_root() {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: only root can be another user");
    }
    let (counterfeit, folder) = (Counterfeit::new(), Folder::new());
    let _stranger = counterfeit.crossed_by(STRANGER, 0);
    let (server, client) = program(&counterfeit, &folder);
    let mut server = server.start();
    server.wait_for_output("listening", LIMIT);
    let _client = client.start();
    let heard = counterfeit.accept(LIMIT);
    assert!(heard.is_some(), "its daemon was passed over");
}

/// Root's may put questions to whomever it names, for a daemon that runs as a user of its own.
#[test]
fn the_tool_runs_no_program_with_a_daemon_of_a_stranger() {
    if !place::is_root() {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: only root can be another user");
    }
    let counterfeit = Counterfeit::of_stranger(STRANGER);
    let passes_over = |command: &str| {
        let output = Command::new(place::binary("rdsock"))
            .args(command.split(' '))
            .env("RDSOCK_SOCKET", counterfeit.path())
            .output();
        let said = String::from_utf8(output.unwrap().stderr).unwrap();
        said.contains("is passed over: user 64021 serves it")
    };
    assert!(passes_over("run --no-daemon -- true"));
    assert!(!passes_over("stat"));
}

/// Root's program that works for a user: it makes connections as that user, and can be root again.
const SERVANT: &str = r#"
import os, socket, sys, time
"".encode("idna") # As that user, Python may not read its own modules.
os.seteuid(int(sys.argv[1]))
listener = socket.create_server(("127.0.0.1", 0))
connector = socket.create_connection(listener.getsockname())
accepted = listener.accept()[0]
print("ready", flush=True)
while True:
    connector.sendall(b"text")
    accepted.recv(4, socket.MSG_WAITALL)
    time.sleep(0.01)
"#;

/// A program that was its user's own, and becomes root's (it has the capability to).
const RISER: &str = r#"
import ctypes, os, signal, socket, sys, time
"".encode("idna")
user, libc = int(sys.argv[1]), ctypes.CDLL(None)
def pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return socket.create_connection(listener.getsockname()), listener.accept()[0]
libc.prctl(8, 1, 0, 0, 0) # PR_SET_KEEPCAPS
os.setresuid(user, user, user)
head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(1 << 7, 1 << 7)
assert libc.capset(head, sets) == 0
pairs = [pair()]
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
print("attaches", flush=True)
signal.sigwait({signal.SIGUSR1})
os.setresuid(0, 0, 0)
print("root", flush=True)
while True:
    pairs = [pair()]
    for _ in range(10):
        pairs[0][0].sendall(b"text")
        pairs[0][1].recv(4, socket.MSG_WAITALL)
    time.sleep(0.01)
"#;

fn python(script: &str, counterfeit: &Counterfeit, folder: &Folder) -> Program {
    Program::new("python3", folder.path())
        .arg("-c")
        .arg(script)
        .arg(STRANGER.to_string())
        .env("LD_PRELOAD", place::binary("librdsock.so"))
        .env("RDSOCK_SOCKET", counterfeit.path())
}

#[test]
fn who_acts_as_a_user_says_nothing_to_that_users_daemon() {
    if !place::is_root() {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: only root can be another user");
    }
    let (counterfeit, folder) = (Counterfeit::of_stranger(STRANGER), Folder::new());
    let mut servant = python(SERVANT, &counterfeit, &folder).start();
    servant.wait_for_output("ready", LIMIT);
    let heard = counterfeit.accept(Duration::from_secs(3));
    assert!(heard.is_none(), "it has said HELLO");
}

#[test]
fn who_becomes_root_takes_no_users_daemon_along() {
    if !place::is_root() {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: only root can be another user");
    }
    let (counterfeit, folder) = (Counterfeit::of_stranger(STRANGER), Folder::new());
    let mut riser = python(RISER, &counterfeit, &folder).start();
    riser.wait_for_output("attaches", LIMIT);
    let attachment = counterfeit.accept(LIMIT).expect("it is its user's daemon");
    riser.signal(Signal::SIGUSR1);
    riser.wait_for_output("root", LIMIT);
    let adopts = attachment.asks_to_adopt(Duration::from_secs(3));
    assert!(!adopts, "it speaks to that daemon as root");
}
