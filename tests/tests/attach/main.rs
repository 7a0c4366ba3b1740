//! The shim and its daemon, when that is not as the shim expects: it was killed and started again, it
//! has no place, or it is none at all but a test that answers in its place.

mod children;
mod counterfeit;
mod heirs;
mod strangers;

use std::io::{Read, Write};
use std::mem::offset_of;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use counterfeit::Counterfeit;
use nix::sys::signal::Signal;
use rdsock_shm::control::{Refused, kind, refusal, request};
use rdsock_shm::layout::{CONN_RECORDS, ConnRecord, TenantMemory};
use rdsock_tests::why::{self, Process};
use rdsock_tests::{Daemon, Folder, Program, Running, place};

const LIMIT: Duration = Duration::from_secs(60);
const PUMP: &str = env!("CARGO_BIN_EXE_rdsock-test-pump");

fn pump(folder: &Folder, socket: &std::path::Path, args: &str) -> Program {
    Program::new(PUMP, folder.path())
        .args(args)
        .preloaded(socket)
}

/// What `rdsock why --all` says of a process.
fn told(daemon: &Daemon, running: &Running) -> Option<Process> {
    let all = why::ask(&daemon.socket(), None).processes;
    all.into_iter().find(|process| process.pid == running.pid())
}

/// Waits until the daemon knows a process.
fn wait_until_attached(daemon: &Daemon, running: &Running) {
    let end = Instant::now() + Duration::from_secs(10);
    while !told(daemon, running).is_some_and(|process| process.attached) {
        let late = Instant::now() >= end;
        assert!(!late, "it is not attached: {:?}", told(daemon, running));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Programs that wait in each way, and make no new connection.
#[test]
fn programs_attach_again_after_the_daemon_was_restarted() {
    let mut daemon = Daemon::start("");
    let folder = Folder::new();
    let port = place::free_port();
    let mut server = pump(&folder, &daemon.socket(), &format!("serve {port}")).start();
    server.wait_for_output("listening", LIMIT);
    let tick = |how: &str| pump(&folder, &daemon.socket(), &format!("tick {port} {how}")).start();
    let mut programs: Vec<Running> = ["recv", "poll", "epoll"].map(tick).into();
    for program in &mut programs {
        program.wait_for_output("begun", LIMIT);
        wait_until_attached(&daemon, program);
    }
    wait_until_attached(&daemon, &server);
    daemon.kill();
    daemon.restart();
    for program in programs.iter().chain([&server]) {
        wait_until_attached(&daemon, program);
    }
    for program in &mut programs {
        let ended = program.ended();
        assert!(ended.is_none(), "{ended:?}: {}", program.output());
        let connections = why::ask(&daemon.socket(), Some(program.pid())).connections;
        assert!(connections.iter().any(|end| end.touches(port)));
    }
}

/// One that sleeps and makes no call can't attach: it is told of all the same.
#[test]
fn a_program_that_sleeps_is_told_of_after_the_daemon_was_restarted() {
    let mut daemon = Daemon::start("");
    let folder = Folder::new();
    let port = place::free_port();
    let mut server = pump(&folder, &daemon.socket(), &format!("serve {port}")).start();
    server.wait_for_output("listening", LIMIT);
    wait_until_attached(&daemon, &server);
    daemon.kill();
    daemon.restart();
    let process = told(&daemon, &server).expect("it is told of");
    let reason = process.reason.unwrap_or_default();
    assert!(
        !process.attached && reason.contains("earlier daemon"),
        "{reason}"
    );

    // With its next calls it is there again; it looks once a second at most.
    let end = Instant::now() + LIMIT;
    while !told(&daemon, &server).is_some_and(|process| process.attached) {
        assert!(Instant::now() < end, "it never attaches again");
        let client = format!("send {port} 1 1000");
        pump(&folder, &daemon.socket(), &client).run(LIMIT);
    }
}

/// A program of another daemon is nothing to this one.
#[test]
fn programs_of_another_daemon_are_not_told_of() {
    let (daemon, other) = (Daemon::start(""), Daemon::start(""));
    let folder = Folder::new();
    let port = place::free_port();
    let mut server = pump(&folder, &other.socket(), &format!("serve {port}")).start();
    server.wait_for_output("listening", LIMIT);
    wait_until_attached(&other, &server);
    assert!(told(&daemon, &server).is_none());
}

#[test]
fn a_daemon_at_its_limit_is_asked_again_later_and_told_of_once() {
    let counterfeit = Counterfeit::new();
    let folder = Folder::new();
    let port = place::free_port();
    let mut server = Program::new(PUMP, folder.path())
        .args(&format!("serve {port}"))
        .start();
    server.wait_for_output("listening", LIMIT);
    let socket = counterfeit.path();
    let mut program = pump(&folder, &socket, &format!("tick {port} recv")).start();
    let refused = Refused {
        code: refusal::LIMIT,
        expected: 4096,
    };
    let mut attempts = 0;
    let end = Instant::now() + Duration::from_secs(8);
    while Instant::now() < end {
        if let Some(attachment) = counterfeit.accept(Duration::from_millis(100)) {
            attempts += 1;
            attachment.send(kind::REFUSED, &refused, &[]);
        }
    }
    // After 0, 1, 3 and 7 s, more or less.
    assert!((2..=4).contains(&attempts), "{attempts} attempts");
    let output = program.output();
    assert_eq!(output.matches("rdsock:").count(), 1, "{output}");
    assert!(output.contains("limit of 4096 (max_tenants"), "{output}");
    let before = output.matches("tick").count();
    program.wait_for_output(&format!("tick {}", before + 5), LIMIT);
    assert!(program.ended().is_none());
}

/// Makes a few calls when it is told to by a file.
const PATIENT: &str = r#"
import os, select, socket, sys, time
listener = socket.create_server(("127.0.0.1", 0))
poll = select.poll()
poll.register(listener, select.POLLIN)
print("begun", flush=True)
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
for _ in range(3):
    time.sleep(0.05)
    poll.poll(1)
print("done", flush=True)
while True: time.sleep(60)
"#;

/// A program that finds the daemon's socket crowded is attached with its next calls, once there is room: it makes these sooner
/// than a daemon is looked for that is not there.
#[test]
fn a_daemon_whose_socket_was_crowded_is_reached_with_the_next_calls() {
    let (counterfeit, folder) = (Counterfeit::with_room_for(2), Folder::new());
    let crowd = counterfeit.crowd();
    let go = folder.at("go");
    let python = Program::new("/usr/bin/python3", folder.path());
    let python = python.arg("-c").arg(PATIENT).arg(go.to_str().unwrap());
    let mut program = python.preloaded(&counterfeit.path()).start();
    program.wait_for_output("begun", LIMIT);
    // They are gone, and the daemon finds that out.
    drop(crowd);
    assert!(counterfeit.accept(Duration::ZERO).is_none(), "it was there");
    std::fs::write(&go, "").unwrap();
    program.wait_for_output("done", LIMIT);
    let attachment = counterfeit.accept(Duration::ZERO);
    assert!(attachment.is_some(), "it does not come when there is room");
}

/// Nobody else crowds a user's own socket. Who finds no such one calls where everybody does: all other tests here do.
#[test]
fn a_program_calls_at_the_socket_of_its_user_first() {
    let counterfeit = Counterfeit::for_user(nix::unistd::geteuid().as_raw());
    let folder = Folder::new();
    let server = format!("serve {}", place::free_port());
    let server = pump(&folder, &counterfeit.path(), &server).start();
    let attachment = counterfeit.accept(LIMIT);
    assert!(attachment.is_some(), "it does not come");
    server.signal(Signal::SIGTERM);
}

#[test]
fn a_daemon_that_hangs_up_with_a_refusal_is_understood() {
    let counterfeit = Counterfeit::new();
    let folder = Folder::new();
    let port = place::free_port();
    let mut server = Program::new(PUMP, folder.path())
        .args(&format!("serve {port}"))
        .start();
    server.wait_for_output("listening", LIMIT);
    let mut program = pump(&folder, &counterfeit.path(), &format!("tick {port} poll")).start();
    let refused = Refused {
        code: refusal::LIMIT,
        expected: 7,
    };
    // Before it has said HELLO, perhaps.
    let attachment = counterfeit.accept_silently(LIMIT).expect("it comes");
    attachment.send(kind::REFUSED, &refused, &[]);
    drop(attachment);
    program.wait_for_output("limit of 7", LIMIT);
    program.signal(Signal::SIGTERM);
}

/// Connects from other nodes work again after a restart: the next daemon is told who listens.
#[test]
fn a_server_says_again_what_it_listens_on() {
    let counterfeit = Counterfeit::new();
    let (folder, port) = (Folder::new(), place::free_port());
    let mut server = pump(&folder, &counterfeit.path(), &format!("serve {port}")).start();
    server.wait_for_output("listening", LIMIT);
    let listens = || {
        let end = Instant::now() + LIMIT;
        loop {
            assert!(Instant::now() < end, "it does not attach");
            // Something for it to accept: it can look then.
            let nudge = || drop(TcpStream::connect(("127.0.0.1", port)).unwrap());
            nudge();
            if let Some(mut attachment) = counterfeit.accept(Duration::from_millis(50)) {
                attachment.offer();
                while !attachment.has_mapped(Duration::from_millis(50)) {
                    assert!(Instant::now() < end, "it does not map its memory");
                    nudge();
                }
                return attachment.wait_for(request::LISTENS, LIMIT);
            }
        }
    };
    // The first daemon is gone when it has read this.
    let (first, second) = (listens(), listens());
    assert_eq!(u32::from(port), first.local_port);
    assert_eq!(
        (first.local_port, first.cookie),
        (second.local_port, second.cookie)
    );
}

/// The connection records of a program, as it shows them to its daemon: the descriptors of those in use.
fn shown(running: &Running) -> Vec<i32> {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", running.pid())).unwrap();
    let line = maps
        .lines()
        .find(|line| line.contains("/memfd:rdsock-tenant"));
    let start = line
        .and_then(|line| line.split('-').next())
        .expect("it has memory");
    let start = u64::from_str_radix(start, 16).unwrap();
    let memory = std::fs::File::open(format!("/proc/{}/mem", running.pid())).unwrap();
    let mut bytes = vec![0; size_of::<ConnRecord>() * CONN_RECORDS];
    let conns = start + offset_of!(TenantMemory, conns) as u64;
    memory.read_exact_at(&mut bytes, conns).unwrap();
    let word =
        |record: &[u8], at: usize| i32::from_ne_bytes(record[at..at + 4].try_into().unwrap());
    let records = bytes.chunks(size_of::<ConnRecord>());
    let fds = records
        .filter(|record| word(record, offset_of!(ConnRecord, generation)) != 0)
        .map(|record| word(record, offset_of!(ConnRecord, fd)));
    let mut fds: Vec<i32> = fds.filter(|fd| *fd >= 0).collect();
    fds.sort_unstable();
    fds
}

/// The descriptors of a program that are TCP sockets.
fn sockets(running: &Running) -> Vec<i32> {
    let tcp = std::fs::read_to_string(format!("/proc/{}/net/tcp", running.pid())).unwrap();
    let inodes: Vec<&str> = tcp
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(9))
        .collect();
    let folder = std::fs::read_dir(format!("/proc/{}/fd", running.pid())).unwrap();
    let mut fds: Vec<i32> = folder
        .filter_map(|entry| {
            let entry = entry.unwrap();
            let target = std::fs::read_link(entry.path()).ok()?;
            let target = target
                .to_str()?
                .strip_prefix("socket:[")?
                .strip_suffix(']')?;
            let fd = entry.file_name().to_str()?.parse().ok()?;
            inodes.contains(&target).then_some(fd)
        })
        .collect();
    fds.sort_unstable();
    fds
}

/// Each daemon gets new memory, that takes the place of the old one while other threads open and close connections:
/// what is shown in the end is what there is.
#[test]
fn nothing_is_lost_while_memory_is_exchanged() {
    const EXCHANGES: usize = 5;
    let counterfeit = Counterfeit::new();
    let (folder, port) = (Folder::new(), place::free_port());
    let mut server = Program::new(PUMP, folder.path())
        .args(&format!("serve {port}"))
        .start();
    server.wait_for_output("listening", LIMIT);
    let churn = format!("churn {port} 4 8");
    let mut program = pump(&folder, &counterfeit.path(), &churn).start();
    let mut exchanges = 0;
    while !program.output().contains("settled") {
        // Each daemon dies as soon as its memory is in its place.
        if let Some(attachment) = counterfeit.accept(Duration::from_millis(100)) {
            attachment.welcome();
            exchanges += 1;
        }
        let ended = program.ended();
        assert!(ended.is_none(), "{ended:?}: {}", program.output());
    }
    assert!(exchanges >= EXCHANGES, "{exchanges} exchanges");
    assert!(sockets(&program).len() >= 16, "{}", program.output());
    assert_eq!(shown(&program), sockets(&program));
}

/// Calls that sleep: the argument says which.
const SLEEPER: &str = r#"
import ctypes, select, signal, socket, struct, sys
how = sys.argv[1]
signal.signal(signal.SIGUSR1, lambda *_: None)
listener = socket.create_server(("127.0.0.1", 0))
poll, epoll = select.poll(), select.epoll()
poll.register(listener, select.POLLIN)
epoll.register(listener, select.EPOLLIN)
print("port", listener.getsockname()[1], flush=True)
print("sleeps", flush=True)
def by_turns():
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 10_000))
    while True:
        try: return listener.accept()
        except BlockingIOError: pass
{
    "accept": listener.accept,
    "accept with a time limit": by_turns,
    "poll": poll.poll,
    "select": lambda: select.select([listener], [], []),
    "epoll": epoll.poll,
    "pause": signal.pause,
    "sigsuspend": lambda: ctypes.CDLL(None).sigsuspend(ctypes.create_string_buffer(128)),
}[how]()
print("woken", flush=True)
"#;

/// A server that sleeps already when the daemon's greeting comes answers it, in whichever call it sleeps, and sleeps on.
#[test]
fn a_late_greeting_reaches_a_program_that_sleeps() {
    for how in [
        "accept",
        "accept with a time limit",
        "poll",
        "select",
        "epoll",
        "pause",
        "sigsuspend",
    ] {
        let (counterfeit, folder) = (Counterfeit::new(), Folder::new());
        let python = Program::new("/usr/bin/python3", folder.path());
        let python = python.arg("-c").arg(SLEEPER).arg(how);
        let mut program = python.preloaded(&counterfeit.path()).start();
        let mut attachment = counterfeit.accept(LIMIT).expect("it attaches");
        program.wait_for_output("sleeps", LIMIT);
        wait_until_asleep(&program);
        attachment.offer();
        assert!(attachment.has_mapped(LIMIT), "{how}");
        attachment.wait_for(request::LISTENS, LIMIT);
        assert!(!program.output().contains("woken"), "{how}");

        let caller = wake(&program, how);
        program.wait_for_output("woken", LIMIT);
        drop(caller);
    }
}

/// A daemon dies before it has greeted: who sleeps sleeps on, costs nothing, and is woken by what it waits for.
#[test]
fn a_daemon_that_dies_before_it_greets_wakes_nobody() {
    for how in ["accept", "poll", "select", "epoll", "pause", "sigsuspend"] {
        let (counterfeit, folder) = (Counterfeit::new(), Folder::new());
        let python = Program::new("/usr/bin/python3", folder.path());
        let python = python.arg("-c").arg(SLEEPER).arg(how);
        let mut program = python.preloaded(&counterfeit.path()).start();
        let attachment = counterfeit.accept(LIMIT).expect("it attaches");
        program.wait_for_output("sleeps", LIMIT);
        wait_until_asleep(&program);
        drop((attachment, counterfeit));
        wait_until_asleep(&program);
        let (before, start) = (program.cpu_seconds(), Instant::now());
        std::thread::sleep(Duration::from_millis(200));
        let used = program.cpu_seconds() - before;
        assert!(
            used < 0.5 * start.elapsed().as_secs_f64(),
            "{how}: {used} s"
        );
        assert!(!program.output().contains("woken"), "{how}");
        let caller = wake(&program, how);
        program.wait_for_output("woken", LIMIT);
        drop(caller);
    }
}

/// Brings what such a program waits for: a signal, or a connection, which stays open.
fn wake(program: &Running, how: &str) -> Option<TcpStream> {
    if matches!(how, "pause" | "sigsuspend") {
        program.signal(Signal::SIGUSR1);
        return None;
    }
    let output = program.output();
    let port = output.split_whitespace().nth(1).unwrap_or_default();
    Some(TcpStream::connect(format!("127.0.0.1:{port}")).unwrap())
}

/// Waits until a process sleeps in the kernel, as far as can be seen.
fn wait_until_asleep(program: &Running) {
    let end = Instant::now() + LIMIT;
    let mut seen = 0;
    while seen < 5 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", program.pid())).unwrap();
        let state = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.split_whitespace().next());
        seen = if state == Some("S") { seen + 1 } else { 0 };
        assert!(Instant::now() < end, "{stat}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Calls as they are with a daemon that never greets.
const UNGREETED: &str = r#"
import select, signal, socket, sys, threading
class Rang(Exception): pass
def ring(*_): raise Rang
signal.signal(signal.SIGALRM, ring)
listener = socket.create_server(("127.0.0.1", 0))
other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
other.bind(("127.0.0.1", 0))
poll, epoll, both = select.poll(), select.epoll(), select.poll()
for waits in [poll, epoll, both]: waits.register(listener, select.POLLIN)
both.register(other, select.POLLIN)
def rings(call):
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try: call()
    except Rang: return
    sys.exit("no signal ends " + repr(call))
listener.setblocking(False)
try: sys.exit(listener.accept())
except BlockingIOError: pass
listener.setblocking(True)
for ms in [0, 30]:
    assert poll.poll(ms) == epoll.poll(ms / 1000) == [] and select.select([listener], [], [], ms / 1000)[0] == []
for call in [listener.accept, poll.poll, epoll.poll, signal.pause, lambda: select.select([listener], [], [])]:
    rings(call)
other.sendto(b"x", other.getsockname())
assert [fd for fd, _ in both.poll()] == [other.fileno()]
assert select.select([listener, other], [], [])[0] == [other]
for call in [poll.poll, epoll.poll, lambda: select.select([listener], [], []), listener.accept]:
    late = threading.Timer(0.05, lambda: socket.create_connection(listener.getsockname()))
    late.start()
    call()
    late.join()
    if call != listener.accept: listener.accept()
print("done", flush=True)
"#;

/// A daemon that says nothing holds nothing up: each call ends with its time, with a signal and with what it waits for.
#[test]
fn a_daemon_that_does_not_greet_holds_no_call_up() {
    let (counterfeit, folder) = (Counterfeit::new(), Folder::new());
    let python = Program::new("/usr/bin/python3", folder.path());
    let python = python.arg("-c").arg(UNGREETED);
    let mut program = python.preloaded(&counterfeit.path()).start();
    let _silent = counterfeit.accept(LIMIT).expect("it attaches");
    program.wait_for_output("done", LIMIT);
}

/// Memory that could shrink under the program is not mapped, and the program goes on.
#[test]
fn tenant_memory_that_could_shrink_is_not_taken() {
    let counterfeit = Counterfeit::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (folder, port) = (Folder::new(), listener.local_addr().unwrap().port());
    let mut program = pump(&folder, &counterfeit.path(), &format!("tick {port} recv")).start();
    let (peer, _) = listener.accept().unwrap();
    std::thread::spawn(move || echo(peer));
    let attachment = counterfeit.accept(LIMIT).expect("it attaches");
    attachment.send_memory();
    assert!(attachment.hangs_up(LIMIT));
    let before = program.output().matches("tick").count();
    program.wait_for_output(&format!("tick {}", before + 3), LIMIT);
    // It asks again, and takes memory that can't.
    counterfeit.accept(LIMIT).expect("it attaches").welcome();
}

/// A stream with memory that could shrink under the program is declined, and the connection goes on.
#[test]
fn memory_that_could_shrink_is_declined() {
    for unsealed in 0..3 {
        let counterfeit = Counterfeit::new();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (folder, port) = (Folder::new(), listener.local_addr().unwrap().port());
        let mut program = pump(&folder, &counterfeit.path(), &format!("tick {port} recv")).start();
        let (peer, _) = listener.accept().unwrap();
        std::thread::spawn(move || echo(peer));
        let mut attachment = counterfeit.accept(LIMIT).expect("it attaches");
        attachment.welcome();
        let announced = attachment.wait_for(request::ANNOUNCE, LIMIT);
        attachment.promote(&announced, Some(unsealed));
        let declined = attachment.wait_for(request::DECLINED, LIMIT);
        assert_eq!(declined.conn, announced.conn);
        let before = program.output().matches("tick").count();
        program.wait_for_output(&format!("tick {}", before + 3), LIMIT);
    }
}

/// The same with sealed memory is taken: so it was the seal that it was declined for.
#[test]
fn memory_that_can_not_shrink_is_taken() {
    let counterfeit = Counterfeit::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (folder, port) = (Folder::new(), listener.local_addr().unwrap().port());
    let _program = pump(&folder, &counterfeit.path(), &format!("tick {port} recv")).start();
    let (peer, _) = listener.accept().unwrap();
    std::thread::spawn(move || echo(peer));
    let mut attachment = counterfeit.accept(LIMIT).expect("it attaches");
    attachment.welcome();
    let announced = attachment.wait_for(request::ANNOUNCE, LIMIT);
    attachment.promote(&announced, None);
    attachment.wait_for(request::MAPPED, LIMIT);
}

fn echo(mut peer: TcpStream) {
    let mut byte = [0; 8];
    while peer.read_exact(&mut byte).is_ok() && peer.write_all(&byte).is_ok() {}
}

/// A child that shares its parent's state (`vfork`), or has a copy of it (`clone`), uses its parent's connections: nothing
/// of that comes to the daemon, but for a copy's wish to be a tenant of its own, and the parent is served as ever.
#[test]
fn a_foreign_child_says_nothing_in_its_parents_name() {
    for how in ["vfork", "clone"] {
        let counterfeit = Counterfeit::new();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (folder, port) = (Folder::new(), listener.local_addr().unwrap().port());
        let mut program =
            pump(&folder, &counterfeit.path(), &format!("child {port} {how}")).start();
        let (first, _) = listener.accept().unwrap();
        std::thread::spawn(move || echo(first));
        let mut attachment = counterfeit.accept(LIMIT).expect("it attaches");
        attachment.offer();
        program.wait_for_output("child ended", LIMIT);
        assert_eq!(attachment.take(), None, "{how}: a child's request");
        // That the memory is mapped its parent may say, now or later.
        let said = attachment.senders();
        let by_others = said.iter().any(|sender| *sender != program.pid());
        assert!(!by_others, "{how}: a child's message");
        program.signal(Signal::SIGUSR1);
        let announced = attachment.wait_for(request::ANNOUNCE, LIMIT);
        assert_eq!(attachment.senders(), [program.pid()], "{how}");
        assert!(announced.fd >= 0);
    }
}
