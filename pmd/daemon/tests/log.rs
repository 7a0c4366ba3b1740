//! A log that nobody reads keeps the daemon from nothing.

mod tenant;

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use nix::unistd::pipe2;
use tenant::measure::Honest;
use tenant::{Daemon, Tenant};

/// A pipe in which there is no room, as the kernel gives it to who writes and waits.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
    while nix::unistd::write(&write, b"full") != Err(Errno::EAGAIN) {}
    fcntl(&write, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    (read, write)
}

fn start(log: OwnedFd) -> Daemon {
    let config = "ring_size = 65536\nhuge_pages = \"never\"\n";
    Daemon::start_with(config, |command| {
        command.stderr(log).args(["--log-level", "debug"]);
    })
}

#[test]
fn nobody_waits_for_who_reads_the_log() {
    let (_read, write) = full_pipe();
    let mut daemon = start(write);
    let mut honest = Honest::new(&daemon);
    for _ in 0..20 {
        honest.promotion();
    }
    daemon.signal(Signal::SIGHUP);
    honest.promotion();
    // It ends as well.
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
}

#[test]
fn what_is_logged_last_is_written_before_the_end() {
    let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let mut daemon = start(write);
    assert!(Tenant::stranger(&daemon).is_some());
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), Some(0));
    let mut text = String::new();
    File::from(read).read_to_string(&mut text).unwrap();
    assert!(text.contains("ready") && text.contains("ending"), "{text}");
}
