//! A fuzzer of the daemon's control socket. Several processes, of several users where the test runs as
//! root, send whatever their dice say, from right to rubbish: datagrams with descriptors of all sorts,
//! requests in the queue, words of shared memory, in any order, on connections that they drop, copy and
//! pass on. Meanwhile honest programs are served, and afterwards nothing is left behind.
//!
//! RDSOCK_FUZZ_SEED=N      tries one seed again
//! RDSOCK_FUZZ_MESSAGES=N  sends N messages with each seed
//!
//! `.ci/fuzz` runs it for long.

#[path = "../honest/mod.rs"]
mod honest;
#[path = "../table/mod.rs"]
mod table;
#[path = "../tenant/mod.rs"]
mod tenant;

mod dice;
mod party;
mod sockets;
mod speech;
mod stock;
mod worker;

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use honest::{Honest, Level, become_user, number};
use tenant::Daemon;

/// Fuzzing processes. Two and two are partners.
const FUZZERS: u64 = 4;
/// Users that they are, where the test is root: a partner may be of another user.
const FIRST_USER: u32 = 64_001;
/// Messages sent with one seed.
const MESSAGES: u64 = 100_000;

/// So long the daemon serves the fuzzers alone.
const BETWEEN_TURNS: Duration = Duration::from_millis(20);

/// Two tests at once would only take each other's processors.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const ALONE: &str = "ring_size = 65536\nhuge_pages = \"never\"\n";

/// A daemon that knows another node, which is not there; the model of its device lies in `directory`.
fn with_nodes(directory: &Path) -> String {
    let own_alone = std::fs::Permissions::from_mode(0o700);
    std::fs::set_permissions(directory, own_alone).unwrap();
    format!(
        "{ALONE}[fabric]\nnode = 1\ndevice = \"model:{}\"\n\
         [[fabric.nodes]]\nid = 1\naddresses = [\"127.50.0.1\"]\n\
         [[fabric.nodes]]\nid = 2\naddresses = [\"127.60.0.0/16\"]\n",
        directory.display()
    )
}

#[test]
fn any_messages_of_a_fixed_seed() {
    let seed = number("RDSOCK_FUZZ_SEED").unwrap_or(1);
    fuzz(seed, ALONE);
}

#[test]
fn any_messages_of_a_fresh_seed_with_other_nodes() {
    let seed = number("RDSOCK_FUZZ_SEED").unwrap_or_else(|| fastrand::u64(..1 << 32));
    let model = tempfile::tempdir().unwrap();
    fuzz(seed, &with_nodes(model.path()));
}

/// Not a test by itself: the tests above run it in processes of its own.
#[test]
fn fuzzing_process() {
    let Some(daemon) = std::env::var_os("RDSOCK_FUZZ_DAEMON") else {
        return;
    };
    let word = |name: &str| number(name).unwrap();
    let (seed, messages) = (word("RDSOCK_FUZZ_OWN_SEED"), word("RDSOCK_FUZZ_SHARE"));
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let step = worker::STEP.load(Ordering::Relaxed);
        eprintln!("fuzzing process of seed {seed}, step {step}:");
        hook(panic);
    }));
    become_user(word("RDSOCK_FUZZ_USER") as u32);
    let partner = number("RDSOCK_FUZZ_PARTNER").map(|fd| worker::inherited(fd as i32));
    let mut worker = worker::Worker::new(seed, daemon.into(), partner);
    let victims = std::env::var("RDSOCK_FUZZ_VICTIMS").unwrap();
    worker.covet(honest::victims(&victims));
    let tally = worker.run(messages);
    println!(
        "fuzzed: {} datagrams, {} requests, {} connections; read {}: {} promotions, {} verdicts, {} refusals",
        tally.datagrams,
        tally.requests,
        tally.links,
        tally.read,
        tally.promoted,
        tally.verdicts,
        tally.refused
    );
}

/// Runs all processes over one daemon, and says what did not hold, with the seed.
fn fuzz(seed: u64, config: &str) {
    let _turn = ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    table::check_against_source();
    let messages = number("RDSOCK_FUZZ_MESSAGES").unwrap_or(MESSAGES);
    println!("RDSOCK_FUZZ_SEED={seed} RDSOCK_FUZZ_MESSAGES={messages}");
    let daemon = Daemon::start(config);
    honest::let_others_in(&daemon);
    let mut honest = Honest::new(&daemon);
    // The first turn makes what stays.
    honest.turn(&daemon);
    let before = Level::settled(&daemon);
    let started = Instant::now();
    let mut fuzzers = start_all(&daemon, seed, messages, &honest);
    while fuzzers.iter_mut().any(is_running) {
        honest.turn(&daemon);
        std::thread::sleep(BETWEEN_TURNS);
    }
    for mut fuzzer in fuzzers {
        let status = fuzzer.wait().unwrap();
        assert!(status.success(), "RDSOCK_FUZZ_SEED={seed}: {status}");
    }
    let elapsed = started.elapsed();
    honest.turn(&daemon);
    honest.check_victims();
    let after = before.is_reached_again(&daemon);
    println!(
        "{messages} messages in {:.1} s, seed {seed}: before {before}, after {after}; {honest}",
        elapsed.as_secs_f64()
    );
    check_reach(&daemon, messages);
}

/// The fuzzers got somewhere: each thing of importance happened.
fn check_reach(daemon: &Daemon, messages: u64) {
    let stat = daemon.stat();
    println!("{}", stat["counters"]);
    let counted = |name: &str| stat["counters"][name].as_u64().unwrap();
    let expected = [
        "attached",
        "malformed",
        "wrong_version",
        "bad_memory",
        "bad_requests",
        "stray",
        "unverified",
        "streams_opened",
        "reaches",
    ];
    if messages >= MESSAGES {
        for name in expected {
            assert!(counted(name) >= 10, "{name}: {}", stat["counters"]);
        }
    }
}

fn is_running(child: &mut Child) -> bool {
    child.try_wait().unwrap().is_none()
}

fn start_all(daemon: &Daemon, seed: u64, messages: u64, honest: &Honest) -> Vec<Child> {
    let mut partners: Vec<OwnedFd> = Vec::new();
    for _ in 0..FUZZERS / 2 {
        let kind = SockType::SeqPacket;
        let flags = SockFlag::SOCK_CLOEXEC;
        let (a, b) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
        partners.extend([a, b]);
    }
    let start = |(number, partner): (u64, &OwnedFd)| {
        let fd = partner.as_raw_fd();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "fuzzing_process", "--nocapture"])
            .env("RDSOCK_FUZZ_DAEMON", daemon.socket())
            .env(
                "RDSOCK_FUZZ_OWN_SEED",
                seed.wrapping_mul(FUZZERS).wrapping_add(number).to_string(),
            )
            .env("RDSOCK_FUZZ_SHARE", (messages / FUZZERS).to_string())
            .env(
                "RDSOCK_FUZZ_USER",
                (FIRST_USER + number as u32 % 3).to_string(),
            )
            .env("RDSOCK_FUZZ_PARTNER", fd.to_string())
            .env("RDSOCK_FUZZ_VICTIMS", honest.victims());
        // SAFETY: one system call between fork and exec.
        unsafe {
            command.pre_exec(move || {
                libc::fcntl(fd, libc::F_SETFD, 0);
                Ok(())
            })
        };
        command.spawn().unwrap()
    };
    (0..).zip(&partners).map(start).collect()
}
