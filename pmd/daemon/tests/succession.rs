//! A daemon that was killed, and whose threads can't be ended, does not keep another one from its place, nor the programs that
//! were attached to it from that one.

mod tenant;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, socket};
use rdsock_shm::control::{Message, kind};
use tenant::actor::{ATTACKER, Actor, Part, is_root, listen, say};
use tenant::measure::Honest;
use tenant::silent::{FileSystem, be_file_system, with_file};
use tenant::{Answer, Daemon, Tenant};

/// Waits until a thread of the daemon is where no signal ends it.
fn wait_for_held_thread(daemon: &Daemon) {
    let end = Instant::now() + Duration::from_secs(60);
    let tasks = format!("/proc/{}/task", daemon.pid());
    let held = || {
        std::fs::read_dir(&tasks).unwrap().any(|task| {
            let status = std::fs::read_to_string(task.unwrap().path().join("status"));
            status.is_ok_and(|status| status.contains("State:\tD"))
        })
    };
    while !held() {
        assert!(Instant::now() < end, "no thread is held up");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A socket that listens, at which a shutdown ends nothing: who accepts there waits for ever. `None` where the kernel has no such.
fn endless_listener() -> Option<OwnedFd> {
    let (kind, flags) = (SockType::Stream, SockFlag::SOCK_CLOEXEC);
    let socket = socket(AddressFamily::Vsock, kind, flags, None).ok()?;
    let anywhere = VsockAddr::new(libc::VMADDR_CID_ANY, libc::VMADDR_PORT_ANY);
    bind(socket.as_raw_fd(), &anywhere).ok()?;
    nix::sys::socket::listen(&socket, Backlog::new(1).unwrap()).ok()?;
    Some(socket)
}

/// Opens a file of a file system, whose server's process is in the path, such that it is shown by the name of the daemon's lock.
fn named_as_lock(path: &Path, part: &Part) -> File {
    let mut lock = part.socket.clone().into_os_string();
    lock.push(".lock");
    let mut above = path.ancestors();
    let root = above.find(|above| above.ends_with("root")).unwrap();
    let own_path = Path::new("/").join(path.strip_prefix(root).unwrap());
    let namespaces = root.with_file_name("ns").join("mnt");
    unshare(CloneFlags::CLONE_FS).unwrap();
    setns(File::open(&namespaces).unwrap(), CloneFlags::CLONE_NEWNS).unwrap();
    const NONE: Option<&str> = None;
    let lock = Path::new(&lock);
    mount(Some(&own_path), lock, NONE, MsFlags::MS_BIND, NONE).unwrap();
    File::open(lock).unwrap()
}

/// The part of who holds the daemon up: no process that has the file can be ended or can start another one.
fn be_sender(part: &Part) {
    let path = PathBuf::from(listen().unwrap());
    let file = File::open(&path).unwrap();
    let named = named_as_lock(&path, part);
    let listener = endless_listener();
    say("opened");
    assert_eq!(listen().as_deref(), Some("send"));
    let tenant = Tenant::attach_at(&part.socket);
    let listener = listener.iter().map(|listener| listener.as_raw_fd());
    // While the first one is closed the daemon has the others.
    let files = [file.as_raw_fd(), named.as_raw_fd()];
    let fds: Vec<RawFd> = files.into_iter().chain(listener).collect();
    tenant.send(Message::empty(kind::KICK).as_bytes(), &fds);
    std::mem::forget((file, named, tenant));
    say("sent");
    let _ = listen();
}

/// Files, and locks of parts of each, of somebody who wants the kernel to have very many.
const LOCKED: usize = 200;
const LOCKS: i64 = 500;
/// No successor takes longer than this, however many there are.
const PATIENCE: Duration = Duration::from_secs(10);

/// The part of who has these.
fn be_locker() {
    let files: Vec<File> = (0..LOCKED)
        .map(|_| tenant::memfd(0, nix::fcntl::SealFlag::empty()))
        .collect();
    for (file, at) in files
        .iter()
        .flat_map(|file| (0..LOCKS).map(move |at| (file, at)))
    {
        let lock = libc::flock {
            l_type: libc::F_WRLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 2 * at,
            l_len: 1,
            l_pid: 0,
        };
        nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_SETLK(&lock)).unwrap();
    }
    say("locked");
    let _ = listen();
}

#[test]
fn a_killed_daemon_that_can_not_end_is_succeeded() {
    let test = "a_killed_daemon_that_can_not_end_is_succeeded";
    if let Some(part) = Part::of_this() {
        return match part.name.as_str() {
            "sender" => be_sender(&part),
            "locker" => be_locker(),
            _ => be_file_system(&part),
        };
    }
    if !is_root() {
        return;
    }
    let locker = Actor::start(test, "locker", Path::new("/"), ATTACKER);
    locker.hear("locked");
    let mut daemon = Daemon::start("ring_size = 65536\nhuge_pages = \"never\"\n");
    let mut attached = Tenant::attach(&daemon);
    let mut sender = Actor::start_with(test, "sender", &daemon.socket(), |_| {});
    // Ended first, whatever happens: else nobody gets rid of the file.
    let Some(mut system) = FileSystem::start(test, None) else {
        return;
    };
    sender.say(system.path().to_str().unwrap());
    sender.hear("opened");
    system.silence();
    sender.say("send");
    sender.hear("sent");
    // What ends a look after some milliseconds does not end this.
    wait_for_held_thread(&daemon);
    daemon.signal(Signal::SIGKILL);
    let start = Instant::now();
    let mut lingers = daemon.succeed();
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    assert_eq!(lingers.try_wait().unwrap(), None);
    // As if the process had ended.
    assert!(matches!(attached.receive(), Answer::Closed));
    Honest::new(&daemon).promotion();
    drop(system);
    lingers.wait().unwrap();
}

/// Callers who have a file with them whose last close waits.
const CALLERS: usize = 4;

/// The part of these callers: one calls when it is told so, and then the others. The daemon is stopped when they send; it has taken the first
/// call. Of the others the kernel may take no files.
fn be_callers(part: &Part) {
    let path = PathBuf::from(listen().unwrap());
    let mut with_files: Vec<OwnedFd> = (0..CALLERS).map(|_| with_file(&path)).collect();
    let mut writer = File::options().read(true).write(true).open(path).unwrap();
    writer.write_all(&[7; 4096]).unwrap();
    say("opened");
    let send = |caller: Tenant, with_file: OwnedFd| {
        match caller.try_send_now(b"rubbish", &[with_file.as_raw_fd()]) {
            // The daemon, which has not heard of it yet, is the last to close it.
            Ok(_) => drop(with_file),
            Err(_) => std::mem::forget(with_file),
        }
        std::mem::forget(caller);
    };
    let call = || Tenant::at_this(&part.socket).unwrap();
    listen();
    let caller = call();
    say("calls");
    listen();
    send(caller, with_files.pop().unwrap());
    say("called");
    listen();
    for with_file in with_files {
        send(call(), with_file);
    }
    say("called");
    let _ = listen();
}

/// What callers have left whom the one before has not heard.
#[test]
fn files_of_callers_that_nobody_has_heard_do_not_hold_up_the_successor() {
    let test = "files_of_callers_that_nobody_has_heard_do_not_hold_up_the_successor";
    if let Some(part) = Part::of_this() {
        return match part.name.as_str() {
            "callers" => be_callers(&part),
            _ => be_file_system(&part),
        };
    }
    if !is_root() {
        return;
    }
    let mut daemon = Daemon::start("ring_size = 65536\nhuge_pages = \"never\"\n");
    let mut callers = Actor::start_with(test, "callers", &daemon.socket(), |_| {});
    // Ended first, whatever happens: else nobody gets rid of the files.
    let Some(mut system) = FileSystem::start_with(test, None, true) else {
        return;
    };
    callers.say(system.path().to_str().unwrap());
    callers.hear("opened");
    system.silence();
    callers.say("one");
    callers.hear("calls");
    std::thread::sleep(Duration::from_millis(200));
    daemon.signal(Signal::SIGSTOP);
    callers.say("send");
    callers.hear("called");
    daemon.signal(Signal::SIGCONT);
    wait_for_held_thread(&daemon);
    daemon.signal(Signal::SIGSTOP);
    callers.say("others");
    callers.hear("called");
    daemon.signal(Signal::SIGKILL);
    let mut lingers = daemon.succeed();
    Honest::new(&daemon).promotion();
    drop(system);
    lingers.wait().unwrap();
}

#[test]
fn one_that_lives_is_not_succeeded() {
    let daemon = Daemon::start("");
    daemon.signal(Signal::SIGSTOP);
    let error = rdsockd::endpoint::Endpoint::new(&daemon.socket(), &[]).unwrap_err();
    assert!(
        error.to_string().contains("another rdsockd serves"),
        "{error}"
    );
    daemon.signal(Signal::SIGCONT);
    let _ = Tenant::attach(&daemon);
}
