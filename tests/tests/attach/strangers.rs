//! A daemon of a stranger, who can put a socket where others look for theirs: a directory like `/tmp`. What it is told, and what goes
//! through the memory that it makes, would be the stranger's.

use std::process::Command;
use std::time::Duration;

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
