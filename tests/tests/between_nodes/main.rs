//! Connections between nodes, as programs see them: the addresses that they are told, what happens
//! when the daemon or the other node can't, and that no other connection pays for it. The daemon is a
//! stand-in, so nothing is promoted here.

mod stand_in;

use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use rdsock_shm::control::request;
use rdsock_shm::reason::Reason;
use rdsock_tests::{Folder, Program, Running, place};
use stand_in::{Heard, Manners, Reach, StandIn, bytes};

const LIMIT: Duration = Duration::from_secs(60);

/// A stand-in for the daemon, and Python programs under the shim.
struct Ground {
    stand_in: StandIn,
    folder: Folder,
}

/// What all programs begin with.
const PRELUDE: &str = r#"
import ctypes, errno, os, select, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
FAR, FAR6 = ("10.99.0.7", 4242), ("fd00:99::7", 4242, 0, 0)
def echo(s, text=b"hello"):
    s.sendall(text)
    got = b""
    while len(got) < len(text):
        got += s.recv(100)
    assert got == text, got
"#;

impl Ground {
    fn new(manners: Manners) -> Self {
        Ground {
            stand_in: StandIn::start(manners),
            folder: Folder::new(),
        }
    }

    fn python(&self, script: &str) -> Program {
        Program::new("python3", self.folder.path())
            .arg("-c")
            .arg(format!("{PRELUDE}{script}"))
            .preloaded(&self.stand_in.socket())
    }

    fn run(&self, script: &str) -> String {
        self.python(script).run(LIMIT)
    }

    fn start(&self, script: &str) -> Running {
        self.python(script).start()
    }
}

#[test]
fn a_connect_to_another_node_shows_true_addresses() {
    let ground = Ground::new(Manners::default());
    let output = ground.run(
        r#"
for family, far, own in (
    (socket.AF_INET, FAR, "10.98.0.1"),
    (socket.AF_INET6, FAR6, "fd00:98::1"),
    (socket.AF_INET6, ("::ffff:10.99.0.7", 4242, 0, 0), "::ffff:10.98.0.1"),
):
    s = socket.socket(family)
    s.connect(far)
    assert s.getpeername() == far, s.getpeername()
    assert s.getsockname()[0] == own and s.getsockname()[1] != 0, s.getsockname()
    assert s.getsockname()[2:] == far[2:], s.getsockname()
    echo(s)
    assert s.connect_ex(far) == errno.EISCONN
    print("own", s.getsockname()[1])
    s.close()
"#,
    );
    let ports: Vec<u32> = output
        .lines()
        .filter_map(|line| line.strip_prefix("own "))
        .map(|port| port.parse().unwrap())
        .collect();
    let reaches = ground.stand_in.reaches();
    assert_eq!(reaches.len(), 3);
    for (reach, port) in reaches.iter().zip(&ports) {
        assert_eq!(reach.local, [0; 16]);
        assert_eq!((reach.local_port, reach.peer_port), (*port, 4242));
        assert_ne!(reach.netns, 0);
    }
    assert_eq!(reaches[0].peer, bytes("10.99.0.7".parse().unwrap()));
    assert_eq!(reaches[1].peer, bytes("fd00:99::7".parse().unwrap()));
    assert_eq!(reaches[2].peer, reaches[0].peer);
    let announced = ground.stand_in.requests(request::ANNOUNCE, 3);
    for (announced, reach) in announced.iter().zip(&reaches) {
        assert_eq!(announced.stream_id, stand_in::TICKETS + reach.question);
        assert_eq!((announced.active, announced.extra), (1, 0));
        // As the kernel has it, which the daemon asks.
        assert_eq!(announced.local_port, reach.local_port);
    }
    assert_eq!(announced[0].peer, bytes("127.0.0.1".parse().unwrap()));
    assert_eq!(announced[0].peer_port, u32::from(ground.stand_in.anchor()));
}

#[test]
fn an_accept_shows_the_true_peer() {
    let caller = "10.97.0.3:999".parse().unwrap();
    let ground = Ground::new(Manners {
        caller: Some(caller),
        ..Manners::default()
    });
    let mut server = ground.start(
        r#"
listener = socket.create_server(("127.0.0.1", 0))
print("port", listener.getsockname()[1], flush=True)
s, peer = listener.accept()
assert peer == ("10.97.0.3", 999), peer
assert s.getpeername() == peer
assert s.getsockname() == listener.getsockname()
echo(s, b"from the server")
"#,
    );
    let port = port_of(&mut server);
    let listens = ground.stand_in.requests(request::LISTENS, 1);
    assert_eq!(listens[0].local_port, u32::from(port));
    assert_eq!(listens[0].local, bytes("127.0.0.1".parse().unwrap()));
    assert!(listens[0].cookie != 0 && listens[0].netns != 0);
    assert_eq!((listens[0].conn, listens[0].generation), (0, 0));
    let client = call(port);
    echo_back(client);
    server.finish(LIMIT);
    let asked = ground.stand_in.questions_who();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].local_port, u32::from(port));
    let announced = ground.stand_in.requests(request::ANNOUNCE, 1);
    assert_eq!(
        announced[0].stream_id,
        stand_in::TICKETS + asked[0].question
    );
    assert_eq!(announced[0].active, 0);
    assert_eq!(ground.stand_in.requests(request::LISTENS, 1).len(), 1);
}

/// Where a server listens, as it says.
fn port_of(server: &mut Running) -> u16 {
    let output = server.wait_for_output("port ", LIMIT);
    let line = output.lines().find(|line| line.starts_with("port "));
    let port = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
    port.unwrap_or_else(|| panic!("no port in {output}"))
}

/// Connects as the daemon does for another node.
fn call(port: u16) -> std::net::TcpStream {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};
    use std::os::fd::AsRawFd;
    let [a, b, c, d] = rdsock_shm::control::FABRIC_SOURCE_V4;
    let source = std::net::SocketAddrV4::new(std::net::Ipv4Addr::new(a, b, c, d), 0);
    let target = std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, port);
    let fd = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    bind(fd.as_raw_fd(), &SockaddrIn::from(source)).unwrap();
    connect(fd.as_raw_fd(), &SockaddrIn::from(target)).unwrap();
    fd.into()
}

/// The same over IPv6.
fn call_over_v6(port: u16) -> std::net::TcpStream {
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn6, connect, setsockopt, socket, sockopt,
    };
    use std::os::fd::AsRawFd;
    let (family, kind) = (AddressFamily::Inet6, SockType::Stream);
    let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let class = rdsock_shm::control::FABRIC_CLASS_V6.into();
    setsockopt(&fd, sockopt::Ipv6TClass, &class).unwrap();
    let target = std::net::SocketAddrV6::new(std::net::Ipv6Addr::LOCALHOST, port, 0, 0);
    connect(fd.as_raw_fd(), &SockaddrIn6::from(target)).unwrap();
    fd.into()
}

/// The other side of `echo`.
fn echo_back(mut stream: std::net::TcpStream) {
    std::io::copy(&mut stream.try_clone().unwrap(), &mut stream).unwrap();
}

#[test]
fn a_connect_elsewhere_asks_nobody() {
    let ground = Ground::new(Manners {
        reach: Reach::Silent,
        ..Manners::default()
    });
    let port = ground.stand_in.anchor();
    ground.run(&format!(
        r#"
for target in (("127.0.0.1", {port}), ("0.0.0.0", {port})):
    s = socket.create_connection(target)
    assert s.getpeername() == ("127.0.0.1", {port}), s.getpeername()
    echo(s)
"#
    ));
    assert!(ground.stand_in.reaches().is_empty());
}

/// Puts the calling thread, and what it starts, into a network of its own, in which the addresses of
/// the other node are reached by the kernel too. `None` where that is not allowed.
fn reachable(manners: Manners) -> Option<Ground> {
    if !place::is_root() {
        eprintln!("SKIPPED, NOTHING WAS CHECKED: a network namespace needs root");
        return None;
    }
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    for args in [
        "link set lo up",
        "address add 10.99.0.7/32 dev lo",
        "address add 10.98.0.1/32 dev lo",
    ] {
        let status = Command::new("ip").args(args.split(' ')).status();
        assert!(status.unwrap().success(), "ip {args}");
    }
    Some(Ground::new(manners))
}

/// Connects `n` times to a listener of its own at the other node's address, over the kernel.
const OVER_THE_KERNEL: &str = r#"
listener = socket.create_server(FAR)
def over_the_kernel(blocking=True):
    s = socket.socket()
    s.setblocking(blocking)
    result = s.connect_ex(FAR)
    assert result in (0, errno.EINPROGRESS), errno.errorcode[result]
    served, peer = listener.accept()
    s.setblocking(True)
    assert s.getpeername() == FAR and s.getsockname() == peer, (s.getsockname(), peer)
    assert served.getsockname() == FAR and served.getpeername() == peer
    s.sendall(b"over the kernel")
    assert served.recv(100) == b"over the kernel"
"#;

#[test]
fn a_declined_connect_is_the_kernels() {
    let Some(ground) = reachable(Manners::default()) else {
        return;
    };
    let reasons = [
        Reason::NodeAbsent,
        Reason::NoListener,
        Reason::NodeRefused,
        Reason::NoDevice,
    ];
    for (at, reason) in reasons.into_iter().enumerate() {
        ground.stand_in.manners().reach = Reach::Decline(reason);
        ground.run(&format!(
            "{OVER_THE_KERNEL}\nfor blocking in (True, False): over_the_kernel(blocking)"
        ));
        // A process's first connect asks; the next one does not if the machine was too busy to answer
        // the first in time.
        assert!(ground.stand_in.reaches().len() > at);
    }
    // Nobody at the anchor: the daemon has just ended, say.
    ground.stand_in.manners().reach = Reach::Nobody;
    ground.run(&format!(
        "{OVER_THE_KERNEL}\nfor blocking in (True, False): over_the_kernel(blocking)"
    ));
}

#[test]
fn a_silent_daemon_holds_up_one_connect_only() {
    let Some(ground) = reachable(Manners {
        reach: Reach::Silent,
        ..Manners::default()
    }) else {
        return;
    };
    ground.run(&format!(
        "{OVER_THE_KERNEL}\nfor _ in range(5): over_the_kernel()"
    ));
    assert_eq!(ground.stand_in.reaches().len(), 1);
}

#[test]
fn a_peer_is_asked_for_while_the_daemon_is_silent_about_a_connect() {
    let Some(ground) = reachable(Manners {
        reach: Reach::Silent,
        caller: Some("10.97.0.3:999".parse().unwrap()),
        ..Manners::default()
    }) else {
        return;
    };
    let mut server = ground.start(&format!(
        r#"{OVER_THE_KERNEL}
over_the_kernel()
far = socket.create_server(("127.0.0.1", 0))
print("port", far.getsockname()[1], flush=True)
s, peer = far.accept()
assert peer == ("10.97.0.3", 999), peer
echo(s)
"#
    ));
    echo_back(call(port_of(&mut server)));
    server.finish(LIMIT);
}

#[test]
fn a_late_answer_is_no_other_questions_answer() {
    let Some(ground) = reachable(Manners {
        delay: Duration::from_millis(100),
        ..Manners::default()
    }) else {
        return;
    };
    let mut program = ground.start(&format!(
        r#"{OVER_THE_KERNEL}
over_the_kernel()
print("first", flush=True)
far = None
end = time.monotonic() + 30
while far != "10.98.0.1":
    assert time.monotonic() < end, "never carried"
    time.sleep(0.1)
    s = socket.create_connection(FAR)
    far = s.getsockname()[0]
echo(s)
assert s.getpeername() == FAR, s.getpeername()
"#
    ));
    program.wait_for_output("first", LIMIT);
    ground.stand_in.manners().delay = Duration::ZERO;
    program.finish(LIMIT);
}

/// Shown as it is, it would be taken for a program of this host.
#[test]
fn a_connection_of_which_the_daemon_does_not_say_whose_it_is_is_dropped() {
    for knows_callers in [false, true] {
        let ground = Ground::new(Manners {
            caller: None,
            knows_callers,
            ..Manners::default()
        });
        let mut server = ground.start(
            r#"
listener = socket.create_server(("127.0.0.1", 0))
print("port", listener.getsockname()[1], flush=True)
s, peer = listener.accept()
assert peer[0] == "127.0.0.1" and s.getpeername() == peer, peer
echo(s)
"#,
        );
        let port = port_of(&mut server);
        let mut dropped = call(port);
        let end = std::io::Read::read(&mut dropped, &mut [0]);
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
        echo_back(std::net::TcpStream::connect(("127.0.0.1", port)).unwrap());
        assert_says_both(&server.finish(LIMIT));
        assert_eq!(ground.stand_in.questions_who().len(), 1);
    }
}

/// Any user of this host can make such connections without end, and an event loop has others to serve.
#[test]
fn a_call_that_does_not_wait_drops_so_many_and_ends() {
    let ground = Ground::new(Manners {
        caller: None,
        knows_callers: true,
        ..Manners::default()
    });
    let there = ground.folder.at("there");
    let mut server = ground.start(&format!(
        r#"
listener = socket.create_server(("127.0.0.1", 0), backlog=200)
listener.setblocking(False)
print("port", listener.getsockname()[1], flush=True)
while not os.path.exists("{}"):
    time.sleep(0.01)
try:
    listener.accept()
    assert False, "accepted"
except ConnectionAbortedError:
    pass
while True:
    try:
        s, peer = listener.accept()
        break
    except ConnectionAbortedError:
        pass
assert peer[0] == "127.0.0.1", peer
s.setblocking(True)
echo(s)
"#,
        there.display()
    ));
    let port = port_of(&mut server);
    let dropped: Vec<_> = (0..100).map(|_| call(port)).collect();
    let last = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    std::fs::write(&there, "").unwrap();
    echo_back(last);
    let output = server.finish(LIMIT);
    assert_says_both(&output);
    assert_eq!(output.matches("was dropped").count(), 1, "{output}");
    drop(dropped);
}

/// It reaches nobody to ask, and may be the one to whom the daemon's connections come.
#[test]
fn a_worker_without_a_daemon_takes_nobody_on_another_node_for_one_of_this_host() {
    let ground = Ground::new(Manners {
        caller: Some("10.97.0.3:999".parse().unwrap()),
        room: 1,
        ..Manners::default()
    });
    let mut server = ground.start(
        r#"
listener = socket.create_server(("127.0.0.1", 0))
print("port", listener.getsockname()[1], flush=True)
worker = os.fork()
if worker == 0:
    s, peer = listener.accept()
    assert peer[0] == "127.0.0.1" and s.getpeername() == peer, peer
    echo(s)
    s.close()
    # Who is not told when it is accepted is not told later.
    s = socket.socket(fileno=libc.accept(listener.fileno(), None, None))
    try:
        assert False, s.getpeername()
    except OSError as error:
        assert error.errno == errno.ENOTCONN, error
    echo(s)
    os._exit(0)
assert os.waitpid(worker, 0)[1] == 0
"#,
    );
    let port = port_of(&mut server);
    for _ in 0..3 {
        let end = std::io::Read::read(&mut call(port), &mut [0]);
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    }
    echo_back(std::net::TcpStream::connect(("127.0.0.1", port)).unwrap());
    echo_back(call(port));
    server.finish(LIMIT);
}

/// Of IPv6 others come from the same address.
#[test]
fn over_ipv6_the_daemons_connections_are_told_by_their_mark() {
    let ground = Ground::new(Manners {
        knows_callers: false,
        ..Manners::default()
    });
    let mut server = ground.start(
        r#"
listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
print("port", listener.getsockname()[1], flush=True)
for _ in range(2):
    s, peer = listener.accept()
    assert peer[0] == "::1" and s.getpeername() == peer, peer
    echo(s)
    s.close()
"#,
    );
    let port = port_of(&mut server);
    let connect = || std::net::TcpStream::connect(("::1", port)).unwrap();
    echo_back(connect());
    let end = std::io::Read::read(&mut call_over_v6(port), &mut [0]);
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    echo_back(connect());
    server.finish(LIMIT);
    assert_eq!(ground.stand_in.questions_who().len(), 1);
}

/// Listens where the daemon is told that, does something, and then nothing of it is for other nodes any more.
fn listens_no_more(act: &str) {
    let ground = Ground::new(Manners::default());
    let go = ground.folder.at("go");
    let mut server = ground.start(&format!(
        r#"
def act(s):
    {act}
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen()
print("port", listener.getsockname()[1], flush=True)
while not os.path.exists("{}"):
    select.select([listener], [], [], 0.01)
act(listener)
time.sleep(1.1)
s, peer = listener.accept()
echo(s)
"#,
        go.display()
    ));
    let port = port_of(&mut server);
    assert_eq!(ground.stand_in.requests(request::LISTENS, 1).len(), 1);
    let hung_up = || {
        let heard = ground.stand_in.heard();
        let hung_up = heard.iter().filter(|heard| matches!(heard, Heard::HungUp));
        hung_up.count()
    };
    let before = hung_up();
    std::fs::write(&go, "").unwrap();
    let end = Instant::now() + LIMIT;
    while hung_up() == before {
        assert!(Instant::now() < end, "{:?}", ground.stand_in.heard());
        std::thread::sleep(Duration::from_millis(5));
    }
    echo_back(std::net::TcpStream::connect(("127.0.0.1", port)).unwrap());
    server.finish(LIMIT);
    assert_eq!(ground.stand_in.requests(request::LISTENS, 1).len(), 1);
}

/// What is accepted there is not seen.
#[test]
fn who_uses_a_ring_of_the_kernels_listens_for_no_other_node() {
    // io_uring_setup
    listens_no_more("libc.syscall(425, 1, ctypes.create_string_buffer(120))");
}

/// The kernel asks it of who comes from the other node, and would ask it of the daemon.
#[test]
fn a_socket_that_the_kernel_guards_listens_for_no_other_node() {
    // TCP_MD5SIG, of no key: the kernel says no.
    listens_no_more("libc.setsockopt(s.fileno(), socket.IPPROTO_TCP, 14, None, 0)");
}

/// Whoever has the port for anchors then is not the daemon, and is sent nothing.
#[test]
fn nobody_is_taken_for_a_daemon_that_has_just_ended() {
    let Some(ground) = reachable(Manners {
        reach: Reach::CarryAndEnd,
        ..Manners::default()
    }) else {
        return;
    };
    for blocking in ["True", "False"] {
        ground.run(&format!("{OVER_THE_KERNEL}\nover_the_kernel({blocking})"));
    }
    assert_eq!(ground.stand_in.reaches().len(), 2);
}

/// The daemon has forgotten whose it was, and the warning does not blame it.
#[test]
fn a_connection_that_ended_before_it_was_accepted_is_dropped() {
    let ground = Ground::new(Manners::default());
    let mut server = ground.start(
        r#"
listener = socket.create_server(("127.0.0.1", 0))
print("port", listener.getsockname()[1], flush=True)
assert select.select([listener], [], [], 60)[0]
time.sleep(0.2)
s, peer = listener.accept()
assert peer[0] == "127.0.0.1" and s.getpeername() == peer, peer
echo(s)
"#,
    );
    let port = port_of(&mut server);
    drop(call(port));
    echo_back(std::net::TcpStream::connect(("127.0.0.1", port)).unwrap());
    assert_says_both(&server.finish(LIMIT));
}

fn assert_says_both(output: &str) {
    let warning = output
        .lines()
        .find(|line| line.contains("connection from another node was dropped"));
    let says = |cause| warning.is_some_and(|line| line.contains(cause));
    assert!(
        says("ended before it was accepted") && says("the daemon does not say whose"),
        "{output}"
    );
}

/// The first of two inherited connections is answered when the program has given up and asks about the second one.
#[test]
fn a_late_answer_about_one_inherited_connection_is_none_about_the_next() {
    let late = Duration::from_millis(500);
    let ground = Ground::new(Manners {
        late: Some(late),
        ..Manners::default()
    });
    let started = ground.folder.at("started");
    let mut running = ground.start(&format!(
        r#"
server = socket.create_server(("127.0.0.1", 0))
# Who is not accepted is connected as long as somebody listens.
server.set_inheritable(True)
for _ in range(2):
    s = socket.create_connection(server.getsockname())
    os.set_inheritable(s.fileno(), True)
    globals()[f"kept{{s.fileno()}}"] = s
os.execvp("sh", ["sh", "-c", "echo > {}"])
"#,
        started.display()
    ));
    let heard =
        |what: fn(&Heard) -> bool| ground.stand_in.heard().iter().filter(|h| what(h)).count();
    let end = Instant::now() + LIMIT;
    while heard(|heard| matches!(heard, Heard::LookUp)) < 2 {
        assert!(Instant::now() < end, "{:?}", ground.stand_in.heard());
        std::thread::sleep(Duration::from_millis(5));
    }
    // The answer to the first one is there by then, and the one to the second one is not.
    std::thread::sleep(late / 2);
    if heard(|heard| matches!(heard, Heard::Answered)) == 0 {
        assert!(!started.exists(), "an answer to another question was taken");
    } else {
        eprintln!("SKIPPED, NOTHING WAS CHECKED: this machine was too slow");
    }
    running.wait(LIMIT);
    assert!(started.exists());
}
