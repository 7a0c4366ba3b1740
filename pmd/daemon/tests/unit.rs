//! The unit for systemd: no key that systemd does not know, and no less hardened than the documents say.

mod tenant;

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use caps::{CapSet, Capability};
use nix::unistd::geteuid;
use tenant::{Daemon, own_socket};

const UNIT: &str = include_str!("../systemd/rdsockd.service.in");
const DEPLOYMENT: &str = include_str!("../../../docs/deployment.md");

/// As installed, with a program that is there.
fn unit(dir: &tempfile::TempDir) -> PathBuf {
    let path = dir.path().join("rdsockd.service");
    let start = "@PREFIX@/bin/rdsockd";
    assert!(UNIT.contains(start));
    let text = UNIT
        .replace(start, env!("CARGO_BIN_EXE_rdsockd"))
        .replace("@PREFIX@", "/usr")
        .replace("@SYSCONFDIR@", "/etc");
    std::fs::write(&path, text).unwrap();
    path
}

/// What it prints on both ways out; `None` where there is no such program.
fn analyze(arguments: &[&str], unit: &std::path::Path) -> Option<String> {
    let ran = Command::new("systemd-analyze")
        .args(arguments)
        .arg(unit)
        .output();
    match ran {
        Ok(output) => {
            let both = [output.stdout, output.stderr].concat();
            Some(String::from_utf8_lossy(&both).into_owned())
        }
        Err(error) => {
            eprintln!("SKIPPED, NOTHING WAS CHECKED: systemd-analyze: {error}");
            None
        }
    }
}

#[test]
fn systemd_knows_every_key() {
    let dir = tempfile::tempdir().unwrap();
    let unit = unit(&dir);
    let Some(said) = analyze(&["verify", "--man=no"], &unit) else {
        return;
    };
    // It also speaks of units that this one needs, which a machine without systemd has not.
    let ours: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("rdsockd"))
        .collect();
    assert!(ours.is_empty(), "{said}");
    // It does see what is wrong.
    let text = std::fs::read_to_string(&unit).unwrap();
    std::fs::write(&unit, text.replace("UMask=", "Umasks=")).unwrap();
    let said = analyze(&["verify", "--man=no"], &unit).unwrap();
    assert!(said.contains("Umasks"), "{said}");
}

#[test]
fn the_score_is_that_of_the_documents() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = ["security", "--offline=true", "--no-pager"];
    let Some(said) = analyze(&arguments, &unit(&dir)) else {
        return;
    };
    let number_after = |text: &str, what: &str| -> f64 {
        let rest = text
            .split(what)
            .nth(1)
            .unwrap_or_else(|| panic!("no {what:?} in {text}"));
        let rest = rest.trim_start();
        rest.split([' ', '*']).next().unwrap().parse().unwrap()
    };
    let measured = number_after(&said, "exposure level for rdsockd.service:");
    let promised = number_after(DEPLOYMENT, "exposure of **");
    // Versions of systemd differ in what they look at.
    assert!(
        measured <= promised + 0.2,
        "{measured}, not {promised}:\n{said}"
    );
}

/// What follows a key, of each line with that.
fn values(key: &str) -> impl Iterator<Item = &'static str> {
    UNIT.lines().filter_map(move |line| line.strip_prefix(key))
}

/// What it may have is enough for a daemon that serves all users.
#[test]
fn each_user_gets_a_socket() {
    const USER: u32 = 64_001;
    // The sets without it hold the call.
    let calls = values("SystemCallFilter=");
    let added = calls
        .filter(|value| !value.starts_with('~'))
        .last()
        .unwrap();
    assert!(added.split(' ').any(|call| call == "fchownat"), "{added}");
    if !geteuid().is_root() {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: only root's daemon serves other users");
    }
    let bounds = values("CapabilityBoundingSet=").flat_map(|list| list.split(' '));
    let bounds: Vec<Capability> = bounds.map(|name| name.parse().unwrap()).collect();
    let beyond = caps::all().into_iter().filter(|one| !bounds.contains(one));
    let beyond: Vec<Capability> = beyond.collect();
    let bound = move || {
        for one in &beyond {
            caps::drop(None, CapSet::Bounding, *one).map_err(std::io::Error::other)?;
        }
        Ok(())
    };
    let daemon = Daemon::start_with(&format!("sockets_for_users = [{USER}]"), |command| {
        // SAFETY: between fork and exec only system calls.
        unsafe { command.pre_exec(bound) };
    });
    assert!(own_socket(&daemon.socket(), USER).exists());
}
