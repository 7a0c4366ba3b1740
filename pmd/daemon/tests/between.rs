//! Between two nodes: nobody gets what was promised to another, makes the other node wait, or uses up what
//! others need.

#[macro_use]
mod tenant;

use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::socket::{SockType, setsockopt, sockopt};
use nix::sys::stat::fstat;
use nix::unistd::{ForkResult, fork};
use rdsock_shm::control::{Between, Caller, Message, Request, from_bytes, kind, request as what};
use rdsock_shm::reason::Reason;
use tenant::actor::{ATTACKER, Actor, OTHER, Part, is_root, listen, say};
use tenant::measure::Bystander;
use tenant::nodes::{Bound, Client, Nodes, Server, listens, octets};
use tenant::victim::{Program, Rights};
use tenant::{Answer, Tenant, announcement, hello_message, request};

/// Time for a word to come to the other node, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(3);
/// What a victim sends.
const PASSWORD: &str = "the victim's password";
/// A close leaves nothing behind.
const AT_ONCE: libc::linger = libc::linger {
    l_onoff: 1,
    l_linger: 0,
};

fn play(part: &Part) {
    match part.name.as_str() {
        "client" => be_client(part),
        "asker" => be_asker(part),
        "many holders" => be_many_holders(part),
        "owner" => be_owner(part),
        "follower" => be_follower(part),
        other => panic!("no such part: {other}"),
    }
}

/// Lets this process have as many descriptors as it may.
fn raise_limits() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
}

/// A client that does as it is told, whatever is true.
fn be_client(part: &Part) {
    raise_limits();
    let mut client = Client::at(&part.socket);
    let (mut kept, mut bounds) = (Vec::new(), Vec::new());
    let own = Bound::new(0).unwrap();
    say("ready");
    while let Some(line) = listen() {
        let (word, rest) = line.split_once(' ').unwrap();
        let numbers = rest.split_whitespace().map(|n| n.parse::<u16>().unwrap());
        let [port, to, count] = numbers.collect::<Vec<_>>().try_into().unwrap();
        let to = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 2), to);
        match word {
            // From a port that is another's.
            "reach" => {
                client.ask_as(&own, (Ipv4Addr::LOCALHOST, port), to);
                say(&format!("reached {}", client.answer().ticket));
            }
            // The same, often, without a look at the answers.
            "ask" => {
                let name = (Ipv4Addr::LOCALHOST, port);
                (0..count).for_each(|_| client.ask_as(&own, name, to));
                say("asked");
            }
            // So that there are always many under way.
            "rush" => {
                const UNDER_WAY: usize = 250;
                // From many ports: from one, there is one at a time.
                let ports: Vec<Bound> = (0..UNDER_WAY).map(|_| Bound::new(0).unwrap()).collect();
                let mut ports = ports.iter().cycle();
                let mut under_way = 0;
                let end = Instant::now() + Duration::from_secs(count.into());
                while Instant::now() < end {
                    for _ in under_way..UNDER_WAY {
                        client.ask(ports.next().unwrap(), to);
                    }
                    under_way = UNDER_WAY - 1;
                    client.tenant.receive();
                    while client.tenant.receive_within(Duration::ZERO).is_some() {
                        under_way -= 1;
                    }
                }
                say("rushed");
            }
            // From ever new ports.
            "flood" => {
                for _ in 0..count {
                    let from = Bound::new(0).unwrap();
                    client.ask(&from, to);
                    bounds.push(from);
                    while client.tenant.receive_within(Duration::ZERO).is_some() {}
                }
                say("flooded");
            }
            // From a port that another had, to where that one was told to go.
            "take" => match Bound::new(port).and_then(|bound| bound.connect(count.into())) {
                Ok(mut stream) => {
                    let _ = stream.write_all(b"stolen");
                    kept.push(stream);
                    say("took");
                }
                Err(error) => say(&format!("took not: {error}")),
            },
            // As an honest one: bytes to the other node.
            "go" => {
                let bound = Bound::new(0).unwrap();
                let reached = client.reach(&bound, to);
                if reached.ticket == 0 {
                    say(&format!("went not: reason {}", reached.reason));
                    continue;
                }
                let mut stream = client.go(bound, &reached).unwrap();
                stream.write_all(b"honest").unwrap();
                kept.push(stream);
                say("went");
            }
            other => panic!("no such thing to do: {other}"),
        }
    }
}

/// Says from very many connections that it listens on a socket, and hands it to a child.
fn be_many_holders(part: &Part) {
    const HOLDERS: usize = 900;
    raise_limits();
    let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 0, 2), 0)).unwrap();
    let mut holders = Vec::new();
    for _ in 0..HOLDERS {
        let mut holder = Tenant::attach_at(&part.socket);
        holder.ask_for(&listens(&listener));
        holders.push(holder);
    }
    // SAFETY: the child makes two system calls.
    if unsafe { libc::fork() } == 0 {
        loop {
            // SAFETY: as above.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::pause();
            }
        }
    }
    std::thread::sleep(Duration::from_secs(2));
    say(&format!("port {}", listener.local_addr().unwrap().port()));
    drop(listener);
    listen();
    std::process::abort();
}

/// Asks whose connections are.
fn be_asker(part: &Part) {
    let mut tenant = Tenant::attach_at(&part.socket);
    say("ready");
    while let Some(line) = listen() {
        let numbers = line.split_whitespace().map(|n| n.parse().unwrap());
        let [local_port, peer_port, netns] = numbers.collect::<Vec<u64>>().try_into().unwrap();
        let question = Between {
            question: 1,
            netns,
            local: octets(Ipv4Addr::new(127, 0, 0, 2)),
            peer: octets(rdsock_shm::control::FABRIC_SOURCE_V4.into()),
            local_port: local_port as u32,
            peer_port: peer_port as u32,
            fd: -1,
            reserved: 0,
        };
        let message = Message::new(kind::WHOIS, &question);
        tenant.send(message.as_bytes(), &[]);
        match tenant.receive() {
            Answer::Message(kind::CALLER, body, _) => {
                let caller: Caller = from_bytes(&body).unwrap();
                say(&format!("ticket {}", caller.ticket));
            }
            other => say(&format!("ticket 0 {other:?}")),
        }
    }
}

/// Attaches, forks, and runs a program; the child says in its parent's queue that this one listens.
fn be_owner(part: &Part) {
    let program = listen().unwrap();
    let mut tenant = Tenant::attach_at(&part.socket);
    // SAFETY: this process has no thread beside this one and the harness's, which waits for it.
    if let ForkResult::Parent { .. } = unsafe { fork() }.unwrap() {
        let error = Command::new(&program).args(["listen", "127.0.0.2"]).exec();
        panic!("{program}: {error}");
    }
    while let Some(line) = listen() {
        let numbers = line.split_whitespace().map(|n| n.parse().unwrap());
        let [fd, cookie, netns, port] = numbers.collect::<Vec<u64>>().try_into().unwrap();
        assert!(tenant.memory.put(&Request {
            fd: fd as i32,
            cookie,
            netns,
            local: octets(Ipv4Addr::new(127, 0, 0, 2)),
            local_port: port as u32,
            ..request(what::LISTENS, 0, 0)
        }));
        tenant.kick();
        say("said");
    }
    std::process::abort();
}

/// Comes to the anchors' port from where another one's anchor came, which is closed, and announces that with its ticket.
fn be_follower(part: &Part) {
    let mut tenant = Tenant::attach_at(&part.socket);
    say("ready");
    let numbers = listen().unwrap();
    let numbers = numbers.split(' ').map(|n| n.parse().unwrap());
    let [ticket, port, anchor] = numbers.collect::<Vec<u64>>().try_into().unwrap();
    // What nobody has asked for is closed soon.
    for generation in 1..300 {
        let Ok(stream) = Bound::new(port as u16).and_then(|from| from.connect(anchor as u32))
        else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        setsockopt(&stream, sockopt::Linger, &AT_ONCE).unwrap();
        // It may be closed already.
        if stream.peer_addr().is_err() {
            continue;
        }
        tenant.ask_for(&Request {
            stream_id: ticket,
            ..announcement(1, generation, &stream, 1)
        });
        if let Answer::Message(kind::PROMOTE, _, fds) = tenant.receive() {
            let mut memory = vec![0; fstat(&fds[0]).unwrap().st_size as usize];
            File::from(fds.into_iter().next().unwrap())
                .read_exact_at(&mut memory, 0)
                .unwrap();
            let password = memory
                .windows(PASSWORD.len())
                .any(|bytes| bytes == PASSWORD.as_bytes());
            return say(&format!("got the stream, and the password: {password}"));
        }
    }
    say("got nothing");
    listen();
}

/// When the attacker asks for the victim's port.
#[derive(Clone, Copy, Debug)]
enum When {
    Before,
    Between,
    /// At once, and often.
    Meanwhile,
}

scene!(a_port_of_another_user_brings_nothing, |test| {
    let nodes = Nodes::start(["", ""]);
    let (right, wrong) = (Server::start(nodes.server()), Server::start(nodes.server()));
    let mut attacker = Actor::start(test, "client", &nodes.client().socket(), ATTACKER);
    attacker.hear("ready");
    let mut victim = Client::at(&nodes.client().socket());
    let mut lost = Vec::new();
    let whens = [When::Between, When::Before, When::Meanwhile];
    for (round, when) in whens.iter().cycle().take(30).enumerate() {
        let bound = Bound::new(0).unwrap();
        let (port, to) = (bound.port, wrong.address().port());
        let reached = match when {
            When::Before => {
                attacker.say(&format!("reach {port} {to} 0"));
                attacker.hear("reached");
                victim.reach(&bound, right.address())
            }
            When::Between => {
                let reached = victim.reach(&bound, right.address());
                attacker.say(&format!("reach {port} {to} 0"));
                attacker.hear("reached");
                reached
            }
            When::Meanwhile => {
                attacker.say(&format!("ask {port} {to} 5"));
                let reached = victim.reach(&bound, right.address());
                attacker.hear("asked");
                reached
            }
        };
        assert_ne!(reached.ticket, 0, "{when:?}: reason {}", reached.reason);
        let password = format!("password {round}");
        let sent = victim
            .go(bound, &reached)
            .map(|mut stream| stream.write_all(password.as_bytes()).map(|()| stream));
        if !right.receives(&password, PATIENCE) {
            lost.push((round, *when, sent.map(|sent| sent.is_ok())));
        }
        let stolen = wrong.received();
        assert!(
            stolen.is_empty(),
            "round {round}, {when:?}: the attacker got {stolen:?}"
        );
    }
    // Nor is it stopped.
    assert!(lost.is_empty(), "did not come: {lost:?}");
});

// The other node's program is told from where its connection comes: a port says who may be there, an address too.
scene!(
    nobody_asks_from_a_port_or_an_address_that_is_not_theirs,
    |_| {
        let nodes = Nodes::start(["", ""]);
        let server = Server::start(nodes.server());
        let mut client = Client::at(&nodes.client().socket());
        let (own, taken) = (Bound::new(0).unwrap(), Bound::new(0).unwrap());
        let elsewhere = Ipv4Addr::new(127, 0, 0, 3);
        for name in [
            (Ipv4Addr::LOCALHOST, 22),
            (Ipv4Addr::LOCALHOST, 0),
            (Ipv4Addr::LOCALHOST, taken.port),
            (Ipv4Addr::UNSPECIFIED, own.port),
            (elsewhere, own.port),
        ] {
            client.ask_as(&own, name, server.address());
            let reached = client.answer();
            let refused = (reached.ticket, Reason::from_code(reached.reason));
            assert_eq!(refused, (0, Some(Reason::Unverified)), "{name:?}");
        }
        // Another user may have the port of IPv4, or at the other devices.
        for of_less in [Bound::of_six_only(), Bound::at_device("lo")] {
            let of_less = of_less.unwrap();
            client.ask_as(
                &of_less,
                (Ipv4Addr::UNSPECIFIED, of_less.port),
                server.address(),
            );
            assert_eq!(client.answer().reason, Reason::Unverified as u32);
        }
        // Of an address that no device of this host has, the kernel connects nobody.
        let nowhere = Ipv4Addr::new(192, 0, 2, 7);
        let of_nowhere = Bound::anywhere(nowhere).unwrap();
        client.ask_as(&of_nowhere, (nowhere, of_nowhere.port), server.address());
        assert_eq!(client.answer().reason, Reason::Unverified as u32);
        // Nor is one bound that has no port yet.
        let unbound = Bound::not_yet().unwrap();
        client.ask_as(&unbound, (Ipv4Addr::UNSPECIFIED, 0), server.address());
        assert_eq!(client.answer().reason, Reason::Unverified as u32);
        // A port of TCP is nobody's who has it of another protocol.
        let port = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = port.local_addr().unwrap().port();
        let datagrams = Bound::over(SockType::Datagram, Ipv4Addr::LOCALHOST, port).unwrap();
        client.ask(&datagrams, server.address());
        assert_eq!(client.answer().reason, Reason::Unverified as u32);
        assert_eq!(
            nodes.server().counter("incoming"),
            0,
            "the other node was asked"
        );
        assert_ne!(client.reach(&own, server.address()).ticket, 0);
    }
);

scene!(a_promise_is_not_for_who_takes_the_port, |test| {
    let nodes = Nodes::start(["", ""]);
    let server = Server::start(nodes.server());
    let mut attacker = Actor::start(test, "client", &nodes.client().socket(), ATTACKER);
    attacker.hear("ready");
    let mut victim = Client::at(&nodes.client().socket());
    for _ in 0..5 {
        let bound = Bound::new(0).unwrap();
        let (port, to) = (bound.port, server.address().port());
        let reached = victim.reach(&bound, server.address());
        assert_ne!(reached.ticket, 0);
        drop(bound);
        attacker.say(&format!("take {port} {to} {}", reached.anchor_port));
        attacker.hear("took");
        assert!(
            !server.receives("stolen", Duration::from_millis(500)),
            "bytes of another user go over a stream that was promised to the victim"
        );
    }
});

// The stream is there until the other node has taken its last word, and what has gone over the anchor lies in its rings.
scene!(who_takes_the_place_of_an_anchor_gets_no_stream, |test| {
    let nodes = Nodes::start(["", ""]);
    let server = Server::start(nodes.server());
    let path = nodes.client().socket();
    let mut attacker = Actor::start(test, "follower", &path, ATTACKER);
    attacker.hear("ready");
    let mut victim = Client::at(&path);
    let (bound, reached) = victim.reach_at_last(server.address());
    let (ticket, port, anchor) = (reached.ticket, bound.port, reached.anchor_port);
    // Its program has not announced it yet.
    let mut stream = bound.connect(anchor).unwrap();
    stream.write_all(PASSWORD.as_bytes()).unwrap();
    assert!(server.receives(PASSWORD, PATIENCE));
    nodes.server().signal(Signal::SIGSTOP);
    setsockopt(&stream, sockopt::Linger, &AT_ONCE).unwrap();
    drop(stream);
    attacker.say(&format!("{ticket} {port} {anchor}"));
    assert_eq!(attacker.hear("got"), "nothing");
    nodes.server().signal(Signal::SIGCONT);
});

// Of a socket that is bound to no address, the kernel takes the port at one address alone when it is connected.
scene!(nobody_is_two_connections_at_the_other_node, |_| {
    let nodes = Nodes::start(["", ""]);
    let server = Server::start(nodes.server());
    let mut client = Client::at(&nodes.client().socket());
    let first = Bound::new(0).unwrap();
    let place = SocketAddrV4::new(Ipv4Addr::LOCALHOST, first.port);
    drop(first);
    let [first, second] = [(); 2].map(|()| Bound::beside(place).unwrap());
    let reached = client.reach(&first, server.address());
    assert_ne!(reached.ticket, 0, "reason {}", reached.reason);
    let stream = client.go(first, &reached).unwrap();
    client.tenant.promote();
    let again = client.reach(&second, server.address());
    assert_eq!((again.ticket, again.reason), (0, Reason::Taken as u32));
    // To another place it is another connection.
    let other = Server::start(nodes.server());
    let reached = client.reach(&second, other.address());
    assert_ne!(reached.ticket, 0, "reason {}", reached.reason);
    // And to this one when the first one is over.
    drop(stream);
    let over = |stat: &serde_json::Value| stat["fabric"]["streams"].as_u64() <= Some(1);
    client.tenant.ask_for(&request(what::CLOSED, 1, 1));
    nodes.client().wait_until("it is over", over);
    let third = Bound::beside(place).unwrap();
    assert_ne!(client.reach(&third, server.address()).ticket, 0);
});

// A poll core carries the streams of all users, and waits where a hole is being made in one.
scene!(nobody_makes_holes_where_a_poll_core_looks, |_| {
    let nodes = Nodes::start(["", ""]);
    let server = Server::start(nodes.server());
    let mut client = Client::at(&nodes.client().socket());
    let bound = Bound::new(0).unwrap();
    let reached = client.reach(&bound, server.address());
    let _anchor = client.go(bound, &reached).unwrap();
    let (promote, fds) = client.tenant.promote();
    assert_eq!((promote.node, fds.len()), (2, 2));
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for fd in &fds {
        assert_eq!(fallocate(fd, how, 0, 4096), Err(Errno::EPERM));
        let map = memmap2::MmapOptions::new().map_raw(fd).unwrap();
        // SAFETY: the mapping has a page, and nothing in it is referred to.
        let removed = unsafe { libc::madvise(map.as_mut_ptr().cast(), 4096, libc::MADV_REMOVE) };
        assert_eq!((removed, Errno::last()), (-1, Errno::EPERM));
    }
});

// A poll core waits, too, while the pages of a stream, or of the bells that it rings, are collapsed into a huge one.
scene!(nobody_collapses_what_a_poll_core_touches, |_| {
    let nodes = Nodes::start(["", ""]);
    let server = Server::start(nodes.server());
    // Its bells are the daemon's: poll cores ring them.
    let mut tenant = Tenant::stranger(nodes.client()).unwrap();
    tenant.send(hello_message().as_bytes(), &[]);
    let bells = match tenant.receive() {
        Answer::Message(kind::WELCOME, _, mut fds) => fds.remove(0),
        other => panic!("not welcome: {other:?}"),
    };
    let mut client = Client::over(tenant);
    let (bound, reached) = client.reach_at_last(server.address());
    let anchor = client.go(bound, &reached).unwrap();
    let (promote, fds) = client.tenant.promote();
    assert_eq!((promote.node, fds.len()), (2, 2));
    // The end page is the program's own: no poll core touches it.
    let end = collapse(&fds[1]);
    if end.is_err() {
        let why = format!("no memory is collapsed here: {end:?}");
        let _ = writeln!(std::io::stderr(), "SKIPPED, NOTHING WAS CHECKED: {why}");
        return;
    }
    assert_eq!(collapse(&fds[0]), Err(Errno::EAGAIN), "a stream");
    // Its process has the socket, so the stream goes on, and its bells are rung.
    drop(client);
    let has_gone = |stat: &serde_json::Value| stat["tenants"].as_array().unwrap().is_empty();
    nodes.client().wait_until("it has gone", has_gone);
    assert_eq!(collapse(&bells), Err(Errno::EAGAIN), "bells");
    drop(anchor);
});

/// Collapses the first two megabytes of a file. What was just written may not be on the kernel's lists yet.
fn collapse(file: &impl AsRawFd) -> nix::Result<()> {
    const HUGE: usize = 2 << 20;
    const MADV_COLLAPSE: i32 = 25;
    let room = memmap2::MmapOptions::new()
        .len(2 * HUGE)
        .map_anon()
        .unwrap();
    let place = (room.as_ptr() as usize).next_multiple_of(HUGE) as *mut libc::c_void;
    let (protect, flags) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_FIXED);
    // SAFETY: within room of this function's own, that nobody refers to; nothing in it is touched.
    let collapse = || unsafe {
        let mapped = libc::mmap(place, HUGE, protect, flags, file.as_raw_fd(), 0);
        assert_eq!(mapped, place);
        Errno::result(libc::madvise(place, HUGE, MADV_COLLAPSE)).map(drop)
    };
    let mut tries = (0..100).map(|_| collapse());
    let over = tries.find(|result| *result != Err(Errno::EAGAIN));
    over.unwrap_or(Err(Errno::EAGAIN))
}

scene!(only_who_has_a_connection_is_told_whose_it_is, |test| {
    let nodes = Nodes::start(["", ""]);
    let server = Server::deaf(nodes.server(), 16);
    let mut asker = Actor::start(test, "asker", &nodes.server().socket(), ATTACKER);
    asker.hear("ready");
    let mut client = Client::at(&nodes.client().socket());
    let bound = Bound::new(0).unwrap();
    let reached = client.reach(&bound, server.address());
    let _stream = client.go(bound, &reached).unwrap();
    let (accepted, peer) = server.listener.accept().unwrap();
    let (port, netns) = (server.address().port(), tenant::netns_of(&accepted));
    asker.say(&format!("{port} {} {netns}", peer.port()));
    assert_eq!(asker.hear("ticket"), "0", "a stranger is told");
});

scene!(a_full_backlog_does_not_keep_the_other_node, |test| {
    let nodes = Nodes::start(["", ""]);
    let server = Server::deaf(nodes.server(), 0);
    let bystanders = nodes.daemons.each_ref().map(Bystander::new);
    let mut attacker = Actor::start(test, "client", &nodes.client().socket(), ATTACKER);
    attacker.hear("ready");
    let port = server.address().port();
    attacker.say(&format!("flood 20000 {port} 1000"));
    let end = Instant::now() + Duration::from_secs(6);
    while Instant::now() < end {
        for (bystander, daemon) in bystanders.iter().zip(&nodes.daemons) {
            bystander.asks(daemon, "a listener with a full backlog");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    // Others are served meanwhile.
    honest(test, &nodes);
});

// They are on the account of who listens, and take long, since its backlog is full.
scene!(
    connects_from_another_node_leave_the_user_some_of_its_own,
    |test| {
        let nodes = Nodes::start(["", "max_connects_per_user = 8\n"]);
        let server = Server::deaf(nodes.server(), 0);
        let mut attacker = Actor::start(test, "client", &nodes.client().socket(), ATTACKER);
        attacker.hear("ready");
        attacker.say(&format!("rush 20000 {} 5", server.address().port()));
        nodes.server().wait_until("they come", |stat| {
            stat["counters"]["incoming"].as_u64() > Some(20)
        });
        // To a port of node 1 where nobody listens.
        let own = Ipv4Addr::new(127, 0, 0, 2);
        let mut client = Client::at(&nodes.server().socket());
        for round in 0..50 {
            let from = Bound::at(own, 0).unwrap();
            client.ask_as(
                &from,
                (own, from.port),
                SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9),
            );
            let reason = Reason::from_code(client.answer().reason);
            assert_ne!(reason, Some(Reason::Limit), "round {round}");
        }
        attacker.hear("rushed");
    }
);

// Who is refused asks again at once, and each time very many have to be looked at who do not listen any more.
scene!(very_many_who_listened_keep_nobody, |test| {
    let nodes = Nodes::start(["", ""]);
    let bystander = Bystander::new(nodes.server());
    let holders = Actor::start(test, "many holders", &nodes.server().socket(), ATTACKER);
    let port = holders.hear("port");
    let mut attacker = Actor::start(test, "client", &nodes.client().socket(), ATTACKER);
    attacker.hear("ready");
    let before = nodes.server().counter("longest_turn_cpu_us");
    attacker.say(&format!("rush 20000 {port} 5"));
    bystander.goes_on(
        nodes.server(),
        "very many who listened",
        Duration::from_secs(5),
    );
    attacker.hear("rushed");
    let turn = nodes.server().counter("longest_turn_cpu_us");
    println!("a turn of {turn} us of processor time, {before} us before");
    assert!(turn < before.max(50_000), "a turn of {turn} us");
    honest(test, &nodes);
});

/// Another user of node 1 comes to a server of node 2.
fn honest(test: &str, nodes: &Nodes) {
    let server = Server::start(nodes.server());
    let mut other = Actor::start(test, "client", &nodes.client().socket(), OTHER);
    other.hear("ready");
    other.say(&format!("go 0 {} 0", server.address().port()));
    assert_eq!(other.hear(""), "went", "an honest user");
    assert!(server.receives("honest", PATIENCE));
}

scene!(streams_that_nobody_comes_for_count_for_their_user, |test| {
    // Of these, a user may have so many, each with a handful of descriptors on either node.
    const MOST: usize = 100;
    const DESCRIPTORS: usize = 8 * MOST + 200;
    let limit = format!("max_streams_per_user = {MOST}\n");
    let nodes = Nodes::start([&limit, ""]);
    let server = Server::start(nodes.server());
    let before = nodes.daemons.each_ref().map(|daemon| daemon.descriptors());
    let mut attacker = Actor::start(test, "client", &nodes.client().socket(), ATTACKER);
    attacker.hear("ready");
    let port = server.address().port();
    attacker.say(&format!("flood 20000 {port} 4000"));
    let mut flooded = false;
    let mut most = [0, 0];
    let end = Instant::now() + Duration::from_secs(15);
    while !flooded && Instant::now() < end {
        flooded = attacker.next_line(Duration::from_millis(20)).is_some();
        for (at, daemon) in nodes.daemons.iter().enumerate() {
            let more = daemon.descriptors().saturating_sub(before[at]);
            most[at] = most[at].max(more);
        }
        assert!(
            most.iter().all(|most| *most < DESCRIPTORS),
            "{most:?} more descriptors on the two nodes for {MOST} streams that a user may have"
        );
    }
    println!("flooded: {flooded}; at most {most:?} more descriptors");
    nodes.wait_until_met();
    honest(test, &nodes);
});

/// A program that was told to go to the port for anchors finds nobody else there, or that its daemon has gone: the kernel has the port go last.
#[test]
fn who_is_killed_hangs_up_before_its_port_is_free() {
    let nodes = Nodes::start(["", ""]);
    let server = Server::start(nodes.server());
    let mut client = Client::at(&nodes.client().socket());
    let (_, reached) = client.reach_at_last(server.address());
    let port = reached.anchor_port as u16;
    let callers = [(); 200].map(|()| Tenant::stranger(nodes.client()).unwrap());
    nodes.client().signal(Signal::SIGKILL);
    let end = Instant::now() + Duration::from_secs(60);
    while TcpListener::bind(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < end, "the port is not free");
    }
    let is_connected = |tenant: &&Tenant| {
        let mut fds = [PollFd::new(tenant.socket.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).unwrap();
        fds[0].revents() == Some(PollFlags::empty())
    };
    let all = callers.iter().chain([&client.tenant]);
    assert_eq!(all.filter(is_connected).count(), 0);
}

scene!(nobody_listens_in_the_name_of_another_program, |test| {
    let program = Program::with(Rights::SetUserId);
    let nodes = Nodes::start(["", ""]);
    let mut owner = Actor::start(test, "owner", &nodes.server().socket(), ATTACKER);
    owner.say(&program.path().display().to_string());
    let listener = owner.hear("listening");
    owner.say(&listener);
    owner.hear("said");
    std::thread::sleep(Duration::from_millis(300));
    let port = listener.split(' ').next_back().unwrap().parse().unwrap();
    let to = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 2), port);
    let mut client = Client::at(&nodes.client().socket());
    let reached = client.reach(&Bound::new(0).unwrap(), to);
    assert_eq!(
        reached.ticket, 0,
        "a program that is no tenant is given a connection, and another one could announce it"
    );
});

scene!(few_descriptors_are_shared_by_users_of_two_nodes, |test| {
    const DESCRIPTORS: u64 = 1024;
    let nodes = Nodes::start_with(["", ""], |command| {
        // SAFETY: one system call between fork and exec.
        unsafe {
            command.pre_exec(|| {
                let limit = Resource::RLIMIT_NOFILE;
                Ok(setrlimit(limit, DESCRIPTORS, DESCRIPTORS)?)
            })
        };
    });
    let server = Server::start(nodes.server());
    let mut attacker = Actor::start(test, "client", &nodes.client().socket(), ATTACKER);
    attacker.hear("ready");
    attacker.say(&format!("flood 20000 {} 2000", server.address().port()));
    attacker.hear("flooded");
    // Before the streams that nobody came for are given up.
    honest(test, &nodes);
    nodes.wait_until_met();
});

scene!(users_of_two_nodes_are_served, |test| {
    let nodes = Nodes::start(["", ""]);
    honest(test, &nodes);
    // Several of one user, from one port after the other, as in the scenes of attack.
    let server = Server::start(nodes.server());
    let mut client = Client::at(&nodes.client().socket());
    for round in 0..5 {
        let bound = Bound::new(0).unwrap();
        let reached = client.reach(&bound, server.address());
        assert_ne!(reached.ticket, 0);
        let text = format!("round {round}");
        let mut stream = client.go(bound, &reached).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        assert!(server.receives(&text, PATIENCE));
    }
});
