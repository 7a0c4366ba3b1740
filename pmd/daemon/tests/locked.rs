//! A folder in `/proc` that nobody gets through: a process lists it into a page that does not answer, which keeps it from changing,
//! and removes a name there, which waits for that. Who looks up another new name waits behind both, and no signal ends that.
//! Any process can do so to what `/proc` shows of it, and to `/proc` itself. Nobody but its own user may wait for that.

#[macro_use]
mod tenant;

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use memmap2::MmapRaw;
use rdsock_shm::control::{Message, Request, kind};
use tenant::actor::{ATTACKER, Actor, OTHER, Part, is_root, listen, say};
use tenant::measure::{Bystander, Honest};
use tenant::silent::{SilentFile, be_file_system, page_of};
use tenant::{Answer, Daemon, Tenant, announcement, tcp_pair};

const SMALL: &str = "ring_size = 65536\nhuge_pages = \"never\"\n";

/// How long others are served beside a folder that is locked.
const WATCH: Duration = Duration::from_secs(3);
/// Time for all that a test does.
const PATIENCE: Duration = Duration::from_secs(60);
/// The file with the page that does not answer, in who locks a folder.
const INHERITED: i32 = 100;
/// The privilege to mount (`linux/capability.h`).
const CAP_SYS_ADMIN: i32 = 21;
/// Programs of one user that ask for searches: more than it has porters.
const SEARCHING: u32 = 9;

fn play(part: &Part) {
    match part.name.as_str() {
        "file system" => be_file_system(part),
        "in a namespace" => be_in_a_namespace(),
        "locks fd" => announce_and_lock(part),
        "locks ns" => attach_and_lock(part, "/proc/self/ns"),
        "locks self" => attach_and_lock(part, "/proc/self"),
        "locks proc" => lock_all(part),
        "locks fd only" => {
            let page = page();
            when_told(|| lock("/proc/self/fd", &page));
        }
        "searching" => be_searching(part),
        other => panic!("no such part: {other}"),
    }
}

/// The scene of a test, which plays in namespaces of its own: where `/proc` is locked, no process of the machine gets past.
const SCENE: &str = "TENANT_SCENE";

fn in_a_namespace(test: &str, scene: &str) {
    let mut command = Command::new("unshare");
    command
        .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("TENANT_PART", "in a namespace")
        .env("TENANT_SOCKET", test)
        .env(SCENE, scene);
    let said = Actor::run(command).next_line(PATIENCE);
    assert_eq!(said.as_deref(), Some("done"), "{scene}");
}

fn be_in_a_namespace() {
    // Not for the actors of this one.
    let test = std::env::var("TENANT_SOCKET").unwrap();
    match std::env::var(SCENE).unwrap().as_str() {
        "searches" => search_beside_a_lock(&test),
        part => serve_beside_a_lock(&test, part),
    }
    say("done");
    // All others of these namespaces end with this process. Most of them would not end alone.
    std::process::exit(0);
}

/// An attacker who has the page, and has said that it is ready for what it does. The file is dropped first: who waits
/// for it does not end before.
fn attacker(test: &str, part: &str, daemon: &Daemon) -> Option<(Actor, SilentFile)> {
    let start = |fd| {
        let actor = Actor::start_with(test, part, &daemon.socket(), |command| {
            command.uid(ATTACKER).gid(ATTACKER);
            // SAFETY: one system call between fork and exec.
            unsafe {
                command.pre_exec(move || match libc::dup2(fd, INHERITED) {
                    INHERITED => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                })
            };
        });
        actor.hear("ready");
        actor
    };
    let (file, actor) = SilentFile::open_for(test, start)?;
    Some((actor, file))
}

/// A daemon that may not mount, and so has no `/proc` of its own, where nobody locks a folder.
fn without_own_proc(config: &str) -> Daemon {
    Daemon::start_with(config, |command| {
        // SAFETY: one system call between fork and exec.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_CAPBSET_DROP, CAP_SYS_ADMIN) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            })
        };
    })
}

fn serve_beside_a_lock(test: &str, part: &str) {
    serve(test, part, Daemon::start(SMALL));
    serve(test, part, without_own_proc(SMALL));
}

fn serve(test: &str, part: &str, daemon: Daemon) {
    let mut honest = Honest::new(&daemon);
    let bystander = Bystander::new(&daemon);
    for _ in 0..20 {
        honest.promotion();
    }
    let Some((mut actor, _file)) = attacker(test, part, &daemon) else {
        return;
    };
    actor.say("go");
    actor.hear("locked");
    let end = Instant::now() + WATCH;
    let mut slowest = Duration::ZERO;
    while Instant::now() < end {
        bystander.asks(&daemon, part);
        slowest = slowest.max(honest.promotion());
        std::thread::sleep(Duration::from_millis(2));
    }
    let turn = Duration::from_micros(daemon.counter("longest_turn_us"));
    eprintln!("{part}: a promotion after {slowest:?} at most, a turn of {turn:?}");
    assert!(slowest < bystander.most && turn < bystander.most);
}

/// The page that does not answer. It is mapped before the file system is silent.
fn page() -> MmapRaw {
    page_of(INHERITED)
}

fn when_told(what: impl FnOnce()) {
    say("ready");
    listen();
    what();
    say("locked");
    listen();
}

/// Locks a folder for as long as the page does not answer.
fn lock(folder: &'static str, page: &MmapRaw) {
    let (at, len) = (page.as_mut_ptr() as usize, page.len());
    let list = move || {
        let folder = std::fs::File::open(folder).unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&folder);
        // SAFETY: the mapping lives as long as this process waits, and nobody refers to it.
        unsafe { libc::syscall(libc::SYS_getdents64, fd, at, len) };
    };
    let change = move || std::fs::remove_file(format!("{folder}/nothing"));
    std::thread::spawn(list);
    std::thread::sleep(Duration::from_millis(300));
    let waits = std::thread::spawn(change);
    std::thread::sleep(Duration::from_millis(300));
    assert!(!waits.is_finished());
}

scene!(a_process_whose_descriptors_are_locked, |test| {
    in_a_namespace(test, "locks fd");
});

/// The daemon looks at the first end when the other one comes.
fn announce_and_lock(part: &Part) {
    let page = page();
    let mut tenant = Tenant::attach_at(&part.socket);
    let (connector, accepted) = tcp_pair();
    when_told(|| {
        tenant.announce(1, 1, &connector, 1);
        std::thread::sleep(Duration::from_millis(300));
        lock("/proc/self/fd", &page);
        tenant.announce(2, 1, &accepted, 0);
    });
}

scene!(a_process_whose_namespaces_are_locked_attaches, |test| {
    in_a_namespace(test, "locks ns");
});

scene!(a_process_that_is_locked_attaches, |test| {
    in_a_namespace(test, "locks self");
});

fn attach_and_lock(part: &Part, folder: &'static str) {
    let page = page();
    let mut tenant = Tenant::at(&part.socket).unwrap();
    when_told(|| {
        tenant.hello();
        let welcome = tenant.receive_only();
        let Answer::Message(kind::WELCOME, _, mut fds) = welcome else {
            panic!("not welcome: {welcome:?}");
        };
        let attached = tenant.memory.take(fds.remove(0));
        // What was looked up before is found without the lock.
        let _ = std::fs::read_link("/proc/self/ns/user");
        lock(folder, &page);
        tenant.send(attached.as_bytes(), &[]);
        // Who is attached by then may go on.
        let (connector, accepted) = tcp_pair();
        for (number, end) in [(1, &connector), (2, &accepted)] {
            tenant.memory.put(&announcement(number, 1, end, number % 2));
        }
        tenant.send(Message::empty(kind::KICK).as_bytes(), &[]);
    });
}

scene!(a_new_process_calls_while_all_are_locked, |test| {
    in_a_namespace(test, "locks proc");
});

fn lock_all(part: &Part) {
    let page = page();
    when_told(|| {
        lock("/proc", &page);
        // SAFETY: the child connects and sends, and rests on no other thread.
        if unsafe { libc::fork() } == 0 {
            let mut caller = Tenant::at(&part.socket).unwrap();
            caller.hello();
            loop {
                // SAFETY: has no conditions.
                unsafe { libc::pause() };
            }
        }
    });
}

scene!(
    searches_pass_by_a_process_whose_descriptors_are_locked,
    |test| {
        in_a_namespace(test, "searches");
    }
);

fn search_beside_a_lock(test: &str) {
    let daemon = without_own_proc(&format!("{SMALL}sockets_for_users = [{OTHER}]\n"));
    let mut searching = Actor::start(test, "searching", &daemon.socket(), OTHER);
    searching.hear("ready");
    let Some((mut attacker, _file)) = attacker(test, "locks fd only", &daemon) else {
        return;
    };
    attacker.say("go");
    attacker.hear("locked");
    searching.say("go");
    searching.hear("attached");
    searching.hear("promoted");
}

/// Attaches, and has others searched for who hold its sockets. Others of its user are served meanwhile, and in the end it is
/// found that nobody does.
fn be_searching(part: &Part) {
    let mut tenants: Vec<_> = (0..SEARCHING)
        .map(|_| Tenant::attach_at(&part.socket))
        .collect();
    let pairs: Vec<_> = tenants.iter().map(|_| tcp_pair()).collect();
    say("ready");
    listen();
    for (tenant, (connector, accepted)) in tenants.iter_mut().zip(&pairs) {
        tenant.announce(2, 1, accepted, 0);
        tenant.ask_for(&Request {
            extra: 1,
            ..announcement(1, 1, connector, 1)
        });
    }
    std::thread::sleep(Duration::from_secs(1));
    drop(Tenant::attach_at(&part.socket));
    say("attached");
    // One waits for the process that is locked. All others ask again.
    let end = Instant::now() + Duration::from_secs(15);
    let mut to_go = vec![true; tenants.len()];
    for generation in 2.. {
        for ((tenant, to_go), (connector, _)) in tenants.iter_mut().zip(&mut to_go).zip(&pairs) {
            match tenant.receive_within(Duration::ZERO) {
                Some(Answer::Message(kind::PROMOTE, ..)) => *to_go = false,
                Some(Answer::Message(kind::VERDICT, ..)) => tenant.ask_for(&Request {
                    extra: 1,
                    ..announcement(1, generation, connector, 1)
                }),
                None => {}
                other => panic!("{other:?}"),
            }
        }
        if to_go.iter().filter(|to_go| **to_go).count() <= 1 {
            break;
        }
        assert!(Instant::now() < end, "not promoted: {to_go:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    say("promoted");
    listen();
}
