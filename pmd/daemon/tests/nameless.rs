//! User namespaces in which not each user has a number: the kernel calls all those without one by the same, that of nobody.

#[macro_use]
mod tenant;

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use nix::sched::{CloneFlags, unshare};
use rdsock_shm::control::{NAMELESS, refusal};
use tenant::actor::{ATTACKER, Actor, Part, is_root, listen, say};
use tenant::{Answer, Daemon, Tenant};

const SMALL: &str = "ring_size = 65536\nhuge_pages = \"never\"\n";

fn play(part: &Part) {
    match part.name.as_str() {
        "nameless" => be_nameless(part),
        "served" => be_served(part),
        "unheard" => be_unheard(part),
        other => panic!("no such part: {other}"),
    }
}

fn be_nameless(part: &Part) {
    let mut tenant = Tenant::at(&part.socket).unwrap();
    tenant.hello();
    say(&format!("refused {}", tenant.refused().code));
    listen();
}

fn be_served(part: &Part) {
    let _tenant = Tenant::attach_at(&part.socket);
    say("attached");
    listen();
}

fn be_unheard(part: &Part) {
    let mut tenant = Tenant::at(&part.socket).unwrap();
    tenant.hello();
    let heard = !matches!(tenant.receive(), Answer::Closed);
    say(&format!("heard {}", u32::from(heard)));
    listen();
}

/// Moves this process to a user namespace in which the users of this map have numbers.
fn become_one_of(map: &str) -> std::io::Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER)?;
    if !map.is_empty() {
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", map)?;
        fs::write("/proc/self/gid_map", map)?;
    }
    Ok(())
}

// Else the daemon would take strangers for one user, who may ring each other's bells.
scene!(
    who_has_no_number_where_the_daemon_runs_does_not_attach,
    |test| {
        let daemon = Daemon::start_with(SMALL, |command| {
            // SAFETY: the child writes to some files before it calls exec.
            unsafe { command.pre_exec(|| become_one_of("0 0 1")) };
        });
        let actor = Actor::start(test, "nameless", &daemon.socket(), ATTACKER);
        assert_eq!(actor.hear_numbers("refused"), [refusal::POLICY as u64]);
        // Who has one does.
        Tenant::attach(&daemon);
    }
);

// Where each user has a number, nobody's is one like others.
scene!(nobody_is_a_user_where_each_has_a_number, |test| {
    let daemon = Daemon::start(SMALL);
    if fs::read_to_string("/proc/self/uid_map")
        .unwrap()
        .trim_end()
        .ends_with(" 4294967295")
    {
        let actor = Actor::start(test, "served", &daemon.socket(), NAMELESS);
        actor.hear("attached");
    } else {
        eprintln!("SKIPPED, NOTHING WAS CHECKED: not each user has a number here");
    }
});

// The daemon calls work of its own by these numbers.
scene!(
    a_user_with_a_number_of_the_daemons_own_is_not_heard,
    |test| {
        let daemon = Daemon::start(SMALL);
        for uid in u32::MAX - 4..u32::MAX {
            let actor = Actor::start(test, "unheard", &daemon.socket(), uid);
            assert_eq!(actor.hear_numbers("heard"), [0], "user {uid}");
        }
        let actor = Actor::start(test, "served", &daemon.socket(), u32::MAX - 5);
        actor.hear("attached");
        assert_eq!(daemon.counter("refused"), 4);
    }
);

#[test]
fn a_daemon_without_a_number_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_rdsockd"));
    command.arg("--socket").arg(dir.path().join("s"));
    // SAFETY: one system call between fork and exec.
    let command = unsafe { command.pre_exec(|| become_one_of("")) };
    let Output { status, stderr, .. } = command.output().unwrap();
    let said = String::from_utf8(stderr).unwrap();
    assert!(
        !status.success() && said.contains("run it as another user"),
        "{said}"
    );
}
