//! The kernel finds a socket by walking a chain of others, and tells of the end of a process by walking the line of those who wait for it: as
//! long as somebody likes it. To ask it for one, or to leave the line meanwhile, may take long. Others are served meanwhile.

#[macro_use]
mod tenant;

use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen as start_listening,
    setsockopt, socket, sockopt,
};
use nix::unistd::{ForkResult, fork};
use rdsock_shm::control::{Hello, Message, Query, Request, kind, question};
use tenant::actor::{ATTACKER, Actor, Part, is_root, listen, say};
use tenant::measure::{Bystander, Honest};
use tenant::nodes::{Bound, Client, Nodes, Server, listens};
use tenant::{Answer, Daemon, Tenant, announcement};

/// The address of node 2.
const THERE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const SMALL: &str = "ring_size = 65536\nhuge_pages = \"never\"\n";
/// Sockets in the chain, at most so many of one process.
const CHAIN: usize = 120_000;
const OF_ONE: usize = 15_000;
/// Places in which somebody waits for a process.
const WAITERS: usize = 1_000_000;
/// Streams that end at once.
const STREAMS: u32 = 64;
/// A turn of the control thread, in microseconds of its processor's time, that is too long.
const TURN: u64 = 10_000;
/// How long an attack is watched.
const WATCH: Duration = Duration::from_secs(5);
/// How often it has to be too long.
const TIMES: usize = 5;
/// One scene at a time: each wants a core for who goes on in place of who walks.
static ALONE: Mutex<()> = Mutex::new(());

fn play(part: &Part) {
    match part.name.as_str() {
        "ending" => be_ending(part),
        "announcing" => be_announcing(part),
        "reached" => be_reached(part),
        "leaving" => be_leaving(part),
        "watching" => be_watching(part),
        "keeping" => be_keeping(part),
        "bringing" => be_bringing(part),
        other => panic!("no such part: {other}"),
    }
}

scene!(streams_that_end_beside_very_many_who_listen, |test| {
    attack(test, "ending");
});

scene!(announcements_beside_very_many_who_listen, |test| {
    attack(test, "announcing");
});

// Each time that another node asks for a connection to a port at which very many listen.
scene!(another_node_comes_where_very_many_listen, |test| {
    once(|| {
        let nodes = Nodes::start(["", ""]);
        let port = Cell::new(0);
        let mut client = Client::at(&nodes.client().socket());
        let start = |words: String| port.set(words.parse().unwrap());
        let turn = long_turn(nodes.server(), test, "reached", "go", start, || {
            let to = SocketAddrV4::new(THERE, port.get());
            client.reach(&Bound::new(0).unwrap(), to);
        });
        assert!(nodes.server().counter("incoming") > 1);
        turn
    });
});

// An anchor comes from a port at which very many listen, and whose it was has gone.
scene!(anchors_from_where_very_many_listen, |test| {
    once(|| {
        let nodes = Nodes::start(["", ""]);
        // To one place there is one stream at a time from one port.
        let servers = [(); 4].map(|()| Server::start(nodes.server()));
        let ports = servers
            .each_ref()
            .map(|server| server.address().port().to_string());
        let to = ports.join(" ");
        let turn = long_turn(nodes.client(), test, "leaving", &to, |_| {}, || {});
        assert!(nodes.client().counter("reached") > 1);
        turn
    });
});

scene!(the_end_of_a_process_that_very_many_wait_for, |test| {
    attack(test, "watching");
});

scene!(
    a_socket_that_is_handed_over_and_watched_very_often,
    |test| {
        attack(test, "keeping");
    }
);

scene!(a_bell_board_that_is_watched_very_often, |test| {
    attack(test, "bringing");
});

/// On a busy machine nobody may be there to go on in place of who walks a chain: so another time is to show it.
fn attack(test: &str, part: &str) {
    once(|| {
        let daemon = Daemon::start(SMALL);
        long_turn(&daemon, test, part, "go", |_| {}, || {})
    });
}

fn once(long_turn: impl Fn() -> Option<u64>) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let turns: Vec<u64> = (0..TIMES).map_while(|_| long_turn()).collect();
    assert!(
        turns.len() < TIMES,
        "turns of {turns:?} us of processor time"
    );
}

/// An actor does something when it is told this word, once its first words were heard. Others are served meanwhile, and something else is
/// done. The longest turn, where it was too long.
fn long_turn(
    daemon: &Daemon,
    test: &str,
    part: &str,
    word: &str,
    hear: impl FnOnce(String),
    mut also: impl FnMut(),
) -> Option<u64> {
    let mut honest = Honest::new(daemon);
    let bystander = Bystander::new(daemon);
    for _ in 0..20 {
        honest.promotion();
    }
    let mut actor = Actor::start(test, part, &daemon.socket(), ATTACKER);
    let ready = loop {
        let line = actor.next_line(Duration::from_secs(120));
        let line = line.expect("it goes on");
        if let Some(rest) = line.strip_prefix("ready") {
            break rest.trim().to_owned();
        }
    };
    hear(ready);
    actor.say(word);
    let end = Instant::now() + WATCH;
    let (mut longest, mut slowest) = (Duration::ZERO, Duration::ZERO);
    while Instant::now() < end {
        also();
        longest = longest.max(bystander.asks(daemon, part));
        slowest = slowest.max(honest.promotion());
        std::thread::sleep(Duration::from_millis(2));
    }
    let turn = daemon.counter("longest_turn_cpu_us");
    let whole = daemon.counter("longest_turn_us");
    println!(
        "{part}: an answer after {longest:?} at most, a promotion after {slowest:?}, a turn of {whole} us, of {turn} us of its processor"
    );
    assert!(slowest < bystander.most, "{slowest:?} for a promotion");
    (turn >= TURN).then_some(turn)
}

fn raise_descriptors() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

/// Listens where others do. The kernel takes what the last one has said for what all have said: `previous` says later that it
/// shares its port with nobody, and is none of a group any more that the kernel looks at as one.
fn listen_as_well(place: SocketAddrV4, previous: &mut Option<OwnedFd>) -> bool {
    let (family, kind) = (AddressFamily::Inet, SockType::Stream);
    let Ok(next) = socket(family, kind, SockFlag::SOCK_CLOEXEC, None) else {
        return false;
    };
    setsockopt(&next, sockopt::ReusePort, &true).unwrap();
    let address = SockaddrIn::from(place);
    bind(next.as_raw_fd(), &address).unwrap();
    let listens = start_listening(&next, Backlog::new(1).unwrap());
    // The group may be full: the next one begins another.
    alone(std::mem::replace(previous, listens.is_ok().then_some(next)));
    true
}

fn alone(socket: Option<OwnedFd>) {
    if let Some(socket) = socket {
        setsockopt(&socket, sockopt::ReusePort, &false).unwrap();
        // It listens for as long as this process lives.
        let _ = socket.into_raw_fd();
    }
}

/// Children that have very many sockets listen beside a first one, when they are told. They live as long as this process.
struct Crowd(Vec<UnixStream>);

impl Crowd {
    /// To be made before this process has anything that they shall not inherit.
    fn beside(first: &TcpListener) -> Self {
        let place = place_of(first);
        let mut previous = Some(first.as_fd().try_clone_to_owned().unwrap());
        let children = (0..CHAIN / OF_ONE).map(|_| {
            let previous = previous.take();
            let (own, parents) = UnixStream::pair().unwrap();
            // SAFETY: this process has no thread beside this one and the harness's, which waits for it.
            match unsafe { fork() }.unwrap() {
                ForkResult::Child => be_part_of_a_crowd(place, previous, own),
                ForkResult::Parent { .. } => parents,
            }
        });
        Crowd(children.collect())
    }

    fn listens(&mut self) {
        for child in &mut self.0 {
            child.write_all(b"go").unwrap();
            child.read_exact(&mut [0; 2]).unwrap();
        }
    }
}

fn be_part_of_a_crowd(
    place: SocketAddrV4,
    mut previous: Option<OwnedFd>,
    mut told: UnixStream,
) -> ! {
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::SIGKILL);
    let mut go = [0; 2];
    told.read_exact(&mut go).unwrap();
    let count = (0..OF_ONE).take_while(|_| listen_as_well(place, &mut previous));
    let _ = count.count();
    alone(previous);
    told.write_all(&go).unwrap();
    loop {
        nix::unistd::pause();
    }
}

/// Where a socket listens.
fn place_of(listener: &TcpListener) -> SocketAddrV4 {
    match listener.local_addr().unwrap() {
        SocketAddr::V4(place) => place,
        SocketAddr::V6(_) => unreachable!(),
    }
}

/// A listener whose port others may share.
fn first_listener() -> TcpListener {
    listener_at(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))
}

fn listener_at(place: SocketAddrV4) -> TcpListener {
    let (family, kind) = (AddressFamily::Inet, SockType::Stream);
    let first = socket(family, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
    setsockopt(&first, sockopt::ReusePort, &true).unwrap();
    bind(first.as_raw_fd(), &SockaddrIn::from(place)).unwrap();
    start_listening(&first, Backlog::new(1).unwrap()).unwrap();
    first.into()
}

/// A connection to it, of which nothing is left when it is over.
fn connection_to(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let connector = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    [&connector, &accepted].into_iter().for_each(leave_nothing);
    (connector, accepted)
}

/// Nothing is left of this connection when this end is closed.
fn leave_nothing(socket: &TcpStream) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(socket, sockopt::Linger, &linger).unwrap();
}

/// Has streams to a port at which very many listen, and ends.
fn be_ending(part: &Part) {
    raise_descriptors();
    let listener = first_listener();
    let mut crowd = Crowd::beside(&listener);
    let mut tenant = Tenant::attach_at(&part.socket);
    let mut pairs = Vec::new();
    for number in 0..STREAMS {
        let (connector, accepted) = connection_to(&listener);
        tenant.announce(2 * number, 1, &connector, 1);
        tenant.announce(2 * number + 1, 1, &accepted, 0);
        tenant.promote();
        tenant.promote();
        pairs.push((connector, accepted));
    }
    crowd.listens();
    say("ready");
    listen();
    drop(pairs);
    drop(tenant);
    listen();
}

/// Says of a connection of its own that it is one from a port at which very many listen.
fn be_announcing(part: &Part) {
    raise_descriptors();
    let listener = first_listener();
    let mut crowd = Crowd::beside(&listener);
    let mut tenant = Tenant::attach_at(&part.socket);
    let (connector, _accepted) = connection_to(&listener);
    let port = listener.local_addr().unwrap().port();
    crowd.listens();
    let lie = Request {
        local_port: port.into(),
        peer_port: 1,
        ..announcement(1, 1, &connector, 1)
    };
    say("ready");
    listen();
    loop {
        tenant.ask_for(&lie);
        if !matches!(tenant.receive(), Answer::Message(..)) {
            return say("closed");
        }
    }
}

/// Listens where very many do, and is the one that the kernel finds: the latest.
fn be_reached(part: &Part) {
    raise_descriptors();
    let first = listener_at(SocketAddrV4::new(THERE, 0));
    let mut crowd = Crowd::beside(&first);
    let mut tenant = Tenant::attach_at(&part.socket);
    crowd.listens();
    let own = listener_at(place_of(&first));
    // The kernel walks on behind it.
    setsockopt(&own, sockopt::ReusePort, &false).unwrap();
    tenant.ask_for(&listens(&own));
    std::thread::sleep(Duration::from_secs(1));
    say(&format!("ready {}", place_of(&own).port()));
    listen();
    // Each connection is over at once.
    loop {
        let _ = own.accept();
    }
}

/// Reaches another node from a port at which very many listen, makes its anchor, and has gone before that is looked at.
fn be_leaving(part: &Part) {
    raise_descriptors();
    let first = first_listener();
    let mut crowd = Crowd::beside(&first);
    let mut client = Client::at(&part.socket);
    crowd.listens();
    say("ready");
    let ports = listen().unwrap();
    let ports = ports.split(' ').map(|port| port.parse().unwrap());
    for port in ports.collect::<Vec<u16>>().into_iter().cycle() {
        let to = SocketAddrV4::new(THERE, port);
        let bound = Bound::beside(place_of(&first)).unwrap();
        let reached = client.reach(&bound, to);
        if reached.ticket == 0 {
            say(&format!("not reached: {}", reached.reason));
        } else if let Ok(stream) = bound.connect(reached.anchor_port) {
            leave_nothing(&stream);
        }
    }
}

/// Waits in very many places for the end of a process that then attaches, and ends it. The kernel wakes all who wait, the latest first.
fn be_watching(part: &Part) {
    raise_descriptors();
    let (mut own, mut its) = UnixStream::pair().unwrap();
    // SAFETY: this process has no thread beside this one and the harness's, which waits for it.
    let child = match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            its.read_exact(&mut [0]).unwrap();
            let _tenant = Tenant::attach_at(&part.socket);
            // Its child has the socket, too, which so tells nothing of the end.
            // SAFETY: as above.
            if unsafe { fork() }.unwrap().is_child() {
                nix::unistd::alarm::set(20);
                nix::unistd::pause();
            }
            its.write_all(b"a").unwrap();
            loop {
                nix::unistd::pause();
            }
        }
        ForkResult::Parent { child } => child,
    };
    // SAFETY: takes two integers, returns a new descriptor or -1.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.as_raw(), 0) } as i32;
    // SAFETY: just made, and nothing else owns it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let _waits = wait_often_for(&pidfd);
    own.write_all(b"a").unwrap();
    own.read_exact(&mut [0]).unwrap();
    say("ready");
    listen();
    nix::sys::signal::kill(child, nix::sys::signal::SIGKILL).unwrap();
    nix::sys::wait::waitpid(child, None).unwrap();
    listen();
}

/// Waits for it in very many places.
fn wait_often_for(file: &OwnedFd) -> (Vec<OwnedFd>, Vec<Epoll>) {
    let all: Vec<OwnedFd> = (0..1000).map(|_| file.try_clone().unwrap()).collect();
    let mut instances = Vec::new();
    'full: for _ in 0..WAITERS / all.len() {
        let instance = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        for file in &all {
            if instance
                .add(file, EpollEvent::new(EpollFlags::EPOLLIN, 0))
                .is_err()
            {
                // It may wait in no more places.
                break 'full;
            }
        }
        instances.push(instance);
    }
    (all, instances)
}

/// Has very many wait for the end of a bell board, and brings it along again and again, so that the daemon is the last to have it.
fn be_bringing(part: &Part) {
    raise_descriptors();
    let caller = Tenant::at(&part.socket).unwrap();
    let path = format!("/proc/self/fd/{}", caller.memory.bells.as_raw_fd());
    let name = std::ffi::CString::new(path.clone()).unwrap();
    // SAFETY: the calls read a name that ends.
    let events = unsafe {
        let events = libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK);
        assert!(libc::inotify_add_watch(events, name.as_ptr(), libc::IN_CLOSE_WRITE) >= 0);
        OwnedFd::from_raw_fd(events)
    };
    let _waits = wait_often_for(&events);
    say("ready");
    listen();
    let hello = Hello {
        memory_size: 1,
        bell_size: 1,
    };
    loop {
        // Each that is opened anew tells of its end.
        let board = std::fs::File::options().read(true).write(true).open(&path);
        let caller = Tenant::at(&part.socket).unwrap();
        let message = Message::new(kind::HELLO, &hello);
        caller.send(message.as_bytes(), &[board.unwrap().as_raw_fd()]);
        while caller.try_send(b"rubbish", &[]).is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Hands a socket over, keeps it, and has very many wait for it; then sends there without end.
fn be_keeping(part: &Part) {
    raise_descriptors();
    let tenant = Tenant::attach_at(&part.socket);
    let (adopted, theirs) = Tenant::adopted(&tenant);
    let _waits = wait_often_for(&theirs);
    say("ready");
    listen();
    let query = Query {
        what: question::WHY,
        pid: 1,
    };
    let message = Message::new(kind::QUERY, &query);
    // The answers are not read: they come to a process that has nothing.
    while adopted.try_send(message.as_bytes(), &[]).is_ok() {}
    say("over");
    listen();
}
