//! What the daemon gives up: what the kernel says of its threads, and what a process that has given it up can and can't do.

mod tenant;

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, geteuid};
use rdsock_shm::control::kind;
use rdsockd::confine::{Confine, Confinement, DeviceKind, Filter};
use rdsockd::search::{OtherHolder, Searches};
use tenant::nodes::{Bound, Client, Nodes, Server};
use tenant::{Answer, Daemon, Tenant};

/// Of a user whom nothing else belongs to.
const SOMEBODY: u32 = 64001;

/// Lines of `/proc/PID/task/TID/status`.
struct Status(String);

impl Status {
    fn of(path: &str) -> Self {
        Status(fs::read_to_string(path).unwrap())
    }

    fn line(&self, key: &str) -> &str {
        let line = self
            .0
            .lines()
            .find(|line| line.split(':').next() == Some(key));
        line.unwrap_or_else(|| panic!("no {key}: in\n{}", self.0))
            .split_once(':')
            .unwrap()
            .1
            .trim()
    }

    fn capabilities(&self, key: &str) -> u64 {
        u64::from_str_radix(self.line(key), 16).unwrap()
    }
}

/// Of all threads of a process, with their names.
fn threads(pid: i32) -> Vec<(String, Status)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = |task: fs::DirEntry| Status::of(task.path().join("status").to_str().unwrap());
    tasks
        .map(|task| status(task.unwrap()))
        .map(|status| (status.line("Name").to_owned(), status))
        .collect()
}

const DAC_READ_SEARCH: u64 = 1 << 2;
const SYS_PTRACE: u64 = 1 << 19;
const SYS_ADMIN: u64 = 1 << 21;
const LINUX_IMMUTABLE: u64 = 1 << 9;

/// With links to other nodes, so that there are threads.
fn with_a_model(extra: &str) -> (tempfile::TempDir, Daemon) {
    let fabric = tempfile::tempdir().unwrap();
    let config = format!(
        "{extra}\n[fabric]\nnode = 1\ndevice = \"model:{}\"\n\
         [[fabric.nodes]]\nid = 1\naddresses = [\"127.82.68.1\"]\n\
         [[fabric.nodes]]\nid = 2\naddresses = [\"127.82.68.2\"]\n",
        fabric.path().join("models").display()
    );
    let daemon = Daemon::start(&config);
    (fabric, daemon)
}

/// Inode of the socket that a process holds as `fd`, by its link in `/proc`.
fn socket_inode(pid: i32, fd: i32) -> Option<u64> {
    let link = std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()?;
    let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
    inode.parse().ok()
}

const NEEDED: u64 = DAC_READ_SEARCH | SYS_PTRACE | SYS_ADMIN | LINUX_IMMUTABLE;

/// The capabilities that a daemon which was started from here keeps.
fn kept() -> u64 {
    NEEDED & Status::of("/proc/self/status").capabilities("CapPrm")
}

/// None of them can do more than the daemon needs.
fn are_confined(threads: &[(String, Status)]) {
    let kept = kept();
    for (name, status) in threads {
        assert_eq!(status.line("Seccomp"), "2", "{name}");
        assert_eq!(status.line("NoNewPrivs"), "1", "{name}");
        for set in ["CapEff", "CapPrm"] {
            assert_eq!(status.capabilities(set), kept, "{set} of {name}");
        }
        for set in ["CapInh", "CapAmb"] {
            assert_eq!(status.capabilities(set), 0, "{set} of {name}");
        }
        if geteuid().is_root() {
            let beyond = status.capabilities("CapBnd") & !NEEDED;
            assert_eq!(beyond, 0, "CapBnd of {name}");
        }
    }
}

#[test]
fn every_thread_is_confined() {
    let (_fabric, daemon) = with_a_model("");
    // Answered, so it serves.
    let stat = daemon.stat();
    let threads = threads(daemon.pid());
    let names: Vec<&str> = threads.iter().map(|(name, _)| name.as_str()).collect();
    for name in ["rdsockd", "rde-link", "rdsock-poll"] {
        assert!(names.contains(&name), "{name} is not among {names:?}");
    }
    are_confined(&threads);
    let confinement = &stat["daemon"]["confinement"];
    assert_eq!(confinement["other_calls"], "refused", "{confinement}");
    assert_eq!(confinement["no_new_privs"], true, "{confinement}");
    assert_eq!(confinement["missing"].as_array().unwrap().len(), 0);
    let names = confinement["capabilities"].as_array().unwrap();
    assert_eq!(names.len(), kept().count_ones() as usize, "{confinement}");
}

// The thread for a user's anchors starts with its first stream to another node.
#[test]
fn a_thread_that_starts_late_is_confined() {
    let nodes = Nodes::start(["", ""]);
    let server = Server::start(nodes.server());
    let mut client = Client::at(&nodes.client().socket());
    let bound = Bound::new(0).unwrap();
    let reached = client.reach(&bound, server.address());
    let mut stream = client.go(bound, &reached).unwrap();
    stream.write_all(b"confined").unwrap();
    assert!(server.receives("confined", Duration::from_secs(60)));
    for daemon in &nodes.daemons {
        let threads = threads(daemon.pid());
        let late = threads.iter().any(|(name, _)| name == "rdsock-anchors");
        assert!(late, "no thread has been started");
        are_confined(&threads);
    }
}

#[test]
fn off_leaves_everything_and_log_refuses_nothing() {
    let own = Status::of("/proc/self/status");
    let (_fabric, daemon) = with_a_model("confine = \"off\"");
    assert_eq!(
        daemon.stat()["daemon"]["confinement"]["other_calls"],
        "allowed"
    );
    for (name, status) in threads(daemon.pid()) {
        for key in ["Seccomp", "NoNewPrivs", "CapEff", "CapBnd"] {
            assert_eq!(status.line(key), own.line(key), "{key} of {name}");
        }
    }
    let (_fabric, daemon) = with_a_model("confine = \"log\"");
    assert_eq!(
        daemon.stat()["daemon"]["confinement"]["other_calls"],
        "logged"
    );
    for (name, status) in threads(daemon.pid()) {
        assert_eq!(status.line("Seccomp"), "2", "{name}");
    }
    let result = in_child(|| {
        Filter::logging(DeviceKind::None).unwrap().apply().unwrap();
        call(libc::SYS_socket, [libc::AF_INET as i64, 99, 0, 0])
    });
    assert_ne!(result, Ended::With(libc::ENOSYS));
}

/// How a child of the test ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    /// With this error, 0 for none.
    With(i32),
    /// By the filter.
    Killed,
}

/// Runs something in a child process, which is gone afterwards.
fn in_child(run: impl FnOnce() -> i32) -> Ended {
    // SAFETY: the child runs only what is given here, and then ends. The other threads of the test are not in it; libc's
    // allocator is made to be used in such a child.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let result = run();
            // SAFETY: it ends the process, without handlers of the test's.
            unsafe { libc::_exit(result) }
        }
        ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
            WaitStatus::Exited(_, code) => Ended::With(code),
            WaitStatus::Signaled(_, Signal::SIGSYS, _) => Ended::Killed,
            other => panic!("the child ended with {other:?}"),
        },
    }
}

/// Makes a system call with addresses of nothing in it; its error, 0 for none.
fn call(number: i64, arguments: [i64; 4]) -> i32 {
    let [a, b, c, d] = arguments;
    // SAFETY: the tests give numbers and null pointers, of which the kernel writes through none.
    match unsafe { libc::syscall(number, a, b, c, d) } {
        -1 => std::io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(255),
        _ => 0,
    }
}

fn filtered(device: DeviceKind, number: i64, arguments: [i64; 4]) -> Ended {
    in_child(|| {
        Filter::refusing(device).unwrap().apply().unwrap();
        call(number, arguments)
    })
}

#[test]
fn calls_of_an_intruder_end_it() {
    for (name, number) in [
        ("execve", libc::SYS_execve),
        ("execveat", libc::SYS_execveat),
        ("ptrace", libc::SYS_ptrace),
        ("process_vm_writev", libc::SYS_process_vm_writev),
        ("process_vm_readv", libc::SYS_process_vm_readv),
        ("open_by_handle_at", libc::SYS_open_by_handle_at),
        ("mount", libc::SYS_mount),
        ("umount2", libc::SYS_umount2),
        ("pivot_root", libc::SYS_pivot_root),
        ("init_module", libc::SYS_init_module),
        ("finit_module", libc::SYS_finit_module),
        ("kexec_load", libc::SYS_kexec_load),
        ("bpf", libc::SYS_bpf),
        ("io_uring_setup", libc::SYS_io_uring_setup),
        ("unshare", libc::SYS_unshare),
        ("reboot", libc::SYS_reboot),
        ("swapon", libc::SYS_swapon),
        ("pidfd_send_signal", libc::SYS_pidfd_send_signal),
    ] {
        // Arguments with which it does nothing, if it is let through.
        let result = filtered(DeviceKind::None, number, [-1, 0, 0, 0]);
        assert_eq!(result, Ended::Killed, "{name}");
    }
}

const REFUSED: Ended = Ended::With(libc::ENOSYS);

/// Of one call, what the daemon does is let through (with an error of the kernel's own, since the arguments are of no use),
/// and the rest is refused.
#[test]
fn other_calls_are_refused_by_their_arguments() {
    let path = c"/proc/self/mem".as_ptr() as i64;
    let here = libc::AT_FDCWD as i64;
    let shared = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as i64;
    let (write, execute) = (libc::PROT_WRITE as i64, libc::PROT_EXEC as i64);
    let with = |device, number, arguments| filtered(device, number, arguments);
    let none = |number, arguments| with(DeviceKind::None, number, arguments);
    // Never listed.
    for number in [
        libc::SYS_clone3,
        libc::SYS_setuid,
        libc::SYS_capset,
        libc::SYS_mknodat,
        libc::SYS_personality,
        libc::SYS_seccomp,
        libc::SYS_fchownat,
        libc::SYS_openat2,
        100_000,
    ] {
        assert_eq!(none(number, [0; 4]), REFUSED, "{number}");
    }
    // Families of sockets.
    let (stream, raw) = (libc::SOCK_STREAM as i64, libc::SOCK_RAW as i64);
    for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6] {
        let made = none(libc::SYS_socket, [family as i64, stream, 0, 0]);
        assert_ne!(made, REFUSED, "{family}");
    }
    for family in [libc::AF_PACKET, libc::AF_VSOCK, libc::AF_ALG] {
        let refused = none(libc::SYS_socket, [family as i64, raw, 0, 0]);
        assert_eq!(refused, REFUSED, "{family}");
    }
    let netlink = |protocol: i32| {
        let arguments = [libc::AF_NETLINK as i64, raw, protocol as i64, 0];
        none(libc::SYS_socket, arguments)
    };
    assert_eq!(netlink(libc::NETLINK_SOCK_DIAG), Ended::With(0));
    assert_eq!(netlink(libc::NETLINK_ROUTE), REFUSED);
    // Files are opened to be read; a model's links have some of their own.
    let open = |device, flags: i32| with(device, libc::SYS_openat, [here, path, flags as i64, 0]);
    assert_eq!(
        open(DeviceKind::None, libc::O_RDONLY | libc::O_CLOEXEC),
        Ended::With(0)
    );
    for flags in [libc::O_RDWR, libc::O_WRONLY, libc::O_CREAT, libc::O_TRUNC] {
        for device in [DeviceKind::None, DeviceKind::VfioUser, DeviceKind::Vfio] {
            assert_eq!(open(device, flags), REFUSED, "{flags:o} with {device:?}");
        }
    }
    assert_eq!(open(DeviceKind::Model, libc::O_RDWR), Ended::With(0));
    // Pages are either written or executed.
    let map = |protection| none(libc::SYS_mmap, [0, 4096, protection, shared]);
    assert_ne!(map(execute), REFUSED);
    assert_ne!(map(write), REFUSED);
    assert_eq!(map(write | execute), REFUSED);
    assert_eq!(none(libc::SYS_mprotect, [0, 4096, execute, 0]), REFUSED);
    // Threads, but no processes and no namespaces. (Of no use: a thread has to share its handlers.)
    let clone = |flags: i32| none(libc::SYS_clone, [flags as i64, 0, 0, 0]);
    assert_eq!(clone(libc::CLONE_THREAD), Ended::With(libc::EINVAL));
    assert_eq!(clone(libc::SIGCHLD), REFUSED);
    assert_eq!(clone(libc::CLONE_THREAD | libc::CLONE_NEWUSER), REFUSED);
    let enter = |kind: i32| none(libc::SYS_setns, [-1, kind as i64, 0, 0]);
    assert_eq!(enter(libc::CLONE_NEWNET), Ended::With(libc::EBADF));
    assert_eq!(enter(libc::CLONE_NEWNS), REFUSED);
    assert_eq!(enter(0), REFUSED);
    // Signals to itself alone, and limits of itself alone.
    assert_eq!(none(libc::SYS_kill, [1, 0, 0, 0]), REFUSED);
    assert_eq!(none(libc::SYS_tgkill, [1, 1, 0, 0]), REFUSED);
    assert_eq!(none(libc::SYS_prlimit64, [1, 0, 0, 0]), REFUSED);
    assert_eq!(none(libc::SYS_prlimit64, [0, 0, 0, 0]), Ended::With(0));
    // What is asked of open files, and of the process.
    let ask = |device, request: u64| with(device, libc::SYS_ioctl, [-1, request as i64, 0, 0]);
    let unknown_file = Ended::With(libc::EBADF);
    assert_eq!(ask(DeviceKind::None, libc::FIONREAD), unknown_file);
    assert_eq!(ask(DeviceKind::None, libc::TIOCSTI), REFUSED);
    let vfio = u64::from(b';') << 8 | 100;
    assert_eq!(ask(DeviceKind::Vfio, vfio), unknown_file);
    assert_eq!(ask(DeviceKind::None, vfio), REFUSED);
    let option = |option: i32| none(libc::SYS_prctl, [option as i64, 0, 0, 0]);
    assert_eq!(option(libc::PR_SET_DUMPABLE), REFUSED);
    assert_ne!(option(libc::PR_SET_NAME), REFUSED);
}

/// A process of somebody else with a socket as its standard input. Ended when dropped.
struct Stranger(Child);

impl Stranger {
    fn start() -> (Self, u64) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let inode = socket_inode(std::process::id() as i32, listener.as_raw_fd()).unwrap();
        let mut command = Command::new("sleep");
        command
            .arg("60")
            .stdin(Stdio::from(OwnedFd::from(listener)));
        if geteuid().is_root() {
            command.uid(SOMEBODY).gid(SOMEBODY);
        }
        (Stranger(command.spawn().unwrap()), inode)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Numbers of what the child has not seen, as bits.
fn unseen(stranger: i32, inode: u64) -> i32 {
    let mut unseen = 0;
    let mut note = |bit: i32, seen: bool| unseen |= i32::from(!seen) << bit;
    note(0, socket_inode(stranger, 0) == Some(inode));
    let own = std::process::id() as i32;
    let searches = Searches::default();
    let mut asked = (0..100).map(|_| searches.other_holder(own, inode));
    let holder = asked.find(|found| *found != OtherHolder::NotYet);
    note(1, holder == Some(OtherHolder::Process(stranger)));
    note(2, fs::metadata(format!("/proc/{stranger}/ns/net")).is_ok());
    note(3, fs::read_link(format!("/proc/{stranger}/exe")).is_ok());
    // SAFETY: both calls take numbers and return one, of a file that is open until this process ends.
    let taken = unsafe {
        let pidfd = libc::syscall(libc::SYS_pidfd_open, stranger, 0);
        libc::syscall(libc::SYS_pidfd_getfd, pidfd, 0, 0)
    };
    note(4, taken >= 0);
    unseen
}

/// A daemon that runs as root verifies programs of all users; another user's those of that user.
#[test]
fn a_confined_process_still_sees_who_holds_which_socket() {
    let (stranger, inode) = Stranger::start();
    let result = in_child(|| {
        let mut confinement = Confinement::begin(Confine::On, DeviceKind::None);
        confinement.filter();
        unseen(stranger.pid(), inode)
    });
    assert_eq!(result, Ended::With(0), "see the bits of `unseen`");
}

/// Why there is no Landlock: a domain that restricts next to nothing hides the sockets of all other processes. Once a
/// kernel does not do that, this test fails, and Landlock is worth a look.
#[test]
fn landlock_hides_the_sockets_of_other_processes() {
    const VERSION: i64 = 1;
    if call(libc::SYS_landlock_create_ruleset, [0, 0, VERSION, 0]) != 0 {
        return eprintln!("SKIPPED, NOTHING WAS CHECKED: this kernel has no Landlock");
    }
    let (stranger, inode) = Stranger::start();
    let result = in_child(|| {
        // LANDLOCK_ACCESS_FS_EXECUTE alone.
        let restricts: u64 = 1;
        nix::sys::prctl::set_no_new_privs().unwrap();
        // SAFETY: the kernel reads eight bytes from there; it returns a file, which is open until this process ends.
        unsafe {
            let made = libc::SYS_landlock_create_ruleset;
            let rules = libc::syscall(made, &raw const restricts, 8usize, 0);
            assert!(rules >= 0);
            assert_eq!(libc::syscall(libc::SYS_landlock_restrict_self, rules, 0), 0);
        }
        unseen(stranger.pid(), inode)
    });
    // The search says in addition that a relative may have the socket, where that is known for one, or nothing yet.
    assert!(
        matches!(result, Ended::With(0b11101 | 0b11111)),
        "{result:?}"
    );
}

/// A name in the configuration has libc look for a user: files, sockets of a name service, perhaps a library.
#[test]
fn names_of_users_are_found_after_the_filter() {
    let user = nix::unistd::User::from_uid(geteuid()).unwrap();
    let Some(user) = user else {
        return eprintln!(
            "SKIPPED, NOTHING WAS CHECKED: user {} has no name",
            geteuid()
        );
    };
    let daemon = Daemon::start("");
    drop(Tenant::attach(&daemon));
    let file = daemon.socket().with_file_name("rdsockd.toml");
    fs::write(
        file,
        format!("[policy]\ndeny_users = [\"{}\"]\n", user.name),
    )
    .unwrap();
    daemon.signal(Signal::SIGHUP);
    let end = Instant::now() + Duration::from_secs(20);
    let refused = || {
        let mut tenant = Tenant::stranger(&daemon).unwrap();
        tenant.hello();
        matches!(tenant.receive(), Answer::Message(kind::REFUSED, ..))
    };
    while !refused() {
        assert!(Instant::now() < end, "the new configuration does not count");
        std::thread::sleep(Duration::from_millis(20));
    }
}
