//! One attacker who is very many users (a range of subordinate ids): each of them uses little of the daemon, and all of them together
//! always have something for it to do. Who comes now and then is served all the same.

#[macro_use]
mod tenant;

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::prctl::{set_dumpable, set_pdeathsig};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{ForkResult, Gid, Uid, fork, setgroups, setresgid, setresuid};
use rdsock_shm::control::{kind, question, request as what};
use rdsock_shm::sync::{Ordering, fence};
use tenant::actor::{Actor, Part, VICTIM, is_root, listen, say};
use tenant::measure::{Bystander, Honest};
use tenant::{Answer, Daemon, Tenant, request};

const SMALL: &str = "ring_size = 65536\nhuge_pages = \"never\"\n";

/// The first of them, and how many they are.
const FIRST: u32 = 100_000;
const USERS: u32 = 500;
/// So many of them are a crowd.
const CROWD: usize = 400;
/// How often each looks whether there is room in its queue.
const PAUSE: Duration = Duration::from_millis(100);
/// How long others are watched.
const WATCH: Duration = Duration::from_secs(5);
/// Who is one of the crowd waits for each of them, again and again. No promotion of his takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

fn play(part: &Part) {
    match part.name.as_str() {
        "very many" => be_very_many(part),
        "one of many" => be_one_of_many(part),
        other => panic!("no such part: {other}"),
    }
}

/// Becomes a process of each user.
fn be_very_many(part: &Part) {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    for user in FIRST..FIRST + USERS {
        // SAFETY: this process has no thread beside this one and the harness's, which waits for it.
        if let ForkResult::Child = unsafe { fork() }.unwrap() {
            let (gid, uid) = (Gid::from_raw(user), Uid::from_raw(user));
            setgroups(&[]).unwrap();
            setresgid(gid, gid, gid).unwrap();
            setresuid(uid, uid, uid).unwrap();
            set_dumpable(true).unwrap();
            set_pdeathsig(Signal::SIGKILL).unwrap();
            always_ask(attach(&part.socket));
        }
    }
    say("ready");
    listen();
}

/// There are places for some callers at once.
fn attach(socket: &Path) -> Tenant {
    loop {
        if let Some(mut tenant) = Tenant::at(socket) {
            tenant.hello();
            if let Answer::Message(kind::WELCOME, ..) = tenant.receive() {
                return tenant;
            }
        }
        std::thread::sleep(PAUSE);
    }
}

/// Its queue is never empty.
fn always_ask(mut tenant: Tenant) -> ! {
    loop {
        while tenant.memory.put(&request(what::CLOSED, 1, 1)) {}
        fence(Ordering::SeqCst);
        if tenant.memory.sleeps().load(Ordering::Relaxed) == 1 {
            tenant.kick();
        }
        std::thread::sleep(PAUSE);
    }
}

/// Makes one connection after the other.
fn be_one_of_many(part: &Part) {
    let mut honest = Honest::at(&part.socket);
    say("ready");
    while listen().is_some() {
        honest.promotion();
        say("promoted");
    }
}

scene!(very_many_users_starve_nobody, |test| {
    let daemon = Daemon::start(SMALL);
    let bystander = Bystander::new(&daemon);
    let mut honest = Honest::new(&daemon);
    let mut unknown = Actor::start(test, "one of many", &daemon.socket(), VICTIM);
    unknown.hear("ready");
    let mut operator = Tenant::attach(&daemon);
    let crowd = Actor::start(test, "very many", &daemon.socket(), 0);
    crowd.hear("ready");
    let attached = |operator: &mut Tenant| {
        let stat = operator.ask(question::STAT);
        stat["tenants"].as_array().unwrap().len()
    };
    let end = Instant::now() + PATIENCE;
    loop {
        let count = attached(&mut operator);
        if count >= CROWD {
            break;
        }
        assert!(Instant::now() < end, "of the crowd, {count} have attached");
        std::thread::sleep(PAUSE);
    }
    let end = Instant::now() + WATCH;
    while Instant::now() < end {
        let took = honest.promotion();
        assert!(took < bystander.most, "{took:?} for who is known");
        unknown.say("promote");
        let start = Instant::now();
        let promoted = unknown.next_line(PATIENCE);
        let took = start.elapsed();
        println!("{took:?} for who is not");
        assert_eq!(promoted.as_deref(), Some("promoted"), "{took:?}");
    }
});
