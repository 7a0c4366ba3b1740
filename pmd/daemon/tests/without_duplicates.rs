//! A daemon that `pidfd_getfd` is refused: by Yama, the filter of a container, or a kernel that does not know it. It serves
//! its own user by what is left, tells others why it does not serve them, and gives strangers nothing.

#[macro_use]
mod tenant;

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;

use rdsock_shm::control::{Lookup, Message, kind};
use rdsock_shm::reason::Reason;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use tenant::actor::{ATTACKER, Actor, Part, is_root, listen, say};
use tenant::{Answer, Daemon, Tenant, announcement, cookie, tcp_pair};

const SMALL: &str = "ring_size = 65536\nhuge_pages = \"never\"\n";

/// What the daemon is told when it asks for a duplicate.
const REFUSALS: [i32; 2] = [libc::EPERM, libc::ENOSYS];

fn daemon_refused(errno: i32) -> Daemon {
    let rules = BTreeMap::from([(libc::SYS_pidfd_getfd, Vec::new())]);
    let arch: TargetArch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(errno as u32),
        arch,
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    Daemon::start_with(SMALL, |command| {
        // SAFETY: two system calls between fork and exec.
        unsafe {
            command.pre_exec(move || {
                seccompiler::apply_filter(&program).map_err(|_| std::io::ErrorKind::Other.into())
            })
        };
    })
}

fn play(part: &Part) {
    match part.name.as_str() {
        "other" => be_other(part),
        other => panic!("no such part: {other}"),
    }
}

/// Another user's program: says what it is told of its connection.
fn be_other(part: &Part) {
    let mut tenant = Tenant::attach_at(&part.socket);
    let (connector, accepted) = tcp_pair();
    tenant.announce(1, 1, &connector, 1);
    let first = tenant.verdict().reason;
    tenant.announce(2, 1, &accepted, 0);
    say(&format!("told {first} {}", tenant.verdict().reason));
    listen();
}

#[test]
fn the_daemons_own_user_is_served() {
    for errno in REFUSALS {
        let daemon = daemon_refused(errno);
        let (mut client, mut server) = (Tenant::attach(&daemon), Tenant::attach(&daemon));
        let (connector, accepted) = tcp_pair();
        client.announce(1, 1, &connector, 1);
        server.announce(1, 1, &accepted, 0);
        let (first, _) = server.promote();
        client.promote();
        // As after exec.
        drop(server);
        daemon.wait_until("one left", |stat| {
            stat["tenants"].as_array().unwrap().len() == 1
        });
        let mut server = Tenant::attach(&daemon);
        let lookup = Lookup {
            conn: 5,
            generation: 8,
            cookie: cookie(&accepted),
            fd: accepted.as_raw_fd(),
            reserved: 0,
        };
        server.send(Message::new(kind::LOOKUP, &lookup).as_bytes(), &[]);
        assert_eq!(server.promote().0.stream_id, first.stream_id, "{errno}");
    }
}

#[test]
fn what_its_user_does_not_hold_is_not_given() {
    for errno in REFUSALS {
        let daemon = daemon_refused(errno);
        let mut liar = Tenant::attach(&daemon);
        let (connector, accepted) = tcp_pair();
        let (other, _its_end) = tcp_pair();
        let lies = [
            // No socket, another one, another cookie.
            rdsock_shm::control::Request {
                fd: 0,
                ..announcement(1, 1, &connector, 1)
            },
            rdsock_shm::control::Request {
                fd: other.as_raw_fd(),
                ..announcement(2, 1, &connector, 1)
            },
            rdsock_shm::control::Request {
                cookie: cookie(&other),
                ..announcement(3, 1, &connector, 1)
            },
        ];
        for lie in lies {
            liar.ask_for(&lie);
            assert_eq!(liar.verdict().reason, Reason::Unverified as u32, "{lie:?}");
        }
        drop(accepted);
    }
}

scene!(others_are_told_why_they_are_not_served, |test| {
    for errno in REFUSALS {
        let daemon = daemon_refused(errno);
        let actor = Actor::start(test, "other", &daemon.socket(), ATTACKER);
        let unseen = Reason::Unseen as u64;
        assert_eq!(actor.hear_numbers("told"), [unseen, unseen], "{errno}");
        assert_eq!(daemon.stat()["streams_now"], 0);
        // Those of the daemon's user are served beside it.
        let mut own = Tenant::attach(&daemon);
        let (connector, accepted) = tcp_pair();
        own.announce(1, 1, &connector, 1);
        own.announce(2, 1, &accepted, 0);
        let answers = [own.receive(), own.receive()];
        let promoted = |answer: &Answer| matches!(answer, Answer::Message(kind::PROMOTE, ..));
        assert!(answers.iter().all(promoted), "{answers:?}");
    }
});
