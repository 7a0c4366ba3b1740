//! Streams to other nodes: whose they are, on whose account they come, and that nobody's take what others need there.

#[macro_use]
mod tenant;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use rdsock_shm::control::{Between, Caller, Message, Request, from_bytes, kind, request as what};
use rdsock_shm::reason::Reason;
use tenant::actor::{ATTACKER, Actor, OTHER, Part, is_root, listen, say};
use tenant::nodes::{Bound, Client, Nodes, Server, listens, octets};
use tenant::silent::{SilentFile, be_file_system};
use tenant::{Answer, Tenant, announcement, netns_of, request};

/// Time for a word to come to the other node, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(3);
/// The other node is asked for so long: an answer that comes before was given.
const CONNECT: Duration = Duration::from_secs(10);
/// What root's program says.
const PASSWORD: &str = "root's password";
/// The descriptor that an actor has from the test.
const INHERITED: i32 = 100;

fn play(part: &Part) {
    match part.name.as_str() {
        "heir" => be_heir(part),
        "worker" => be_worker(part),
        "squatter" => be_squatter(part),
        "held up" => be_held_up(part),
        "taker" => be_taker(part),
        "file system" => be_file_system(part),
        other => panic!("no such part: {other}"),
    }
}

/// A process of a user, with this descriptor.
fn start_with_fd(test: &str, part: &str, nodes: &Nodes, of: usize, user: u32, fd: i32) -> Actor {
    let socket = nodes.daemons[of].socket();
    Actor::start_with(test, part, &socket, |command| {
        command.uid(user).gid(user);
        // SAFETY: one system call between fork and exec.
        unsafe { command.pre_exec(move || inherit(fd)) };
    })
}

fn inherit(fd: i32) -> std::io::Result<()> {
    // SAFETY: numbers alone.
    match unsafe { libc::dup2(fd, INHERITED) } {
        0.. => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Announces a connection with a stream's number, and says what comes of that.
fn announce(tenant: &mut Tenant, number: u32, stream: &TcpStream, ticket: u64, end: u32) -> String {
    tenant.ask_for(&Request {
        stream_id: ticket,
        ..announcement(number, 1, stream, 1 - end)
    });
    match tenant.receive() {
        Answer::Message(kind::PROMOTE, ..) => "promoted".into(),
        Answer::Message(kind::VERDICT, body, _) => {
            let verdict: rdsock_shm::control::Verdict = from_bytes(&body).unwrap();
            format!("{:?}", Reason::from_code(verdict.reason).unwrap())
        }
        other => format!("{other:?}"),
    }
}

/// The number of the stream of a connection, as WHOIS tells.
fn ticket_of(tenant: &mut Tenant, stream: &TcpStream) -> u64 {
    let name = |address: SocketAddr| match address {
        SocketAddr::V4(address) => (octets(*address.ip()), u32::from(address.port())),
        SocketAddr::V6(_) => unreachable!(),
    };
    let (local, local_port) = name(stream.local_addr().unwrap());
    let (peer, peer_port) = name(stream.peer_addr().unwrap());
    let question = Between {
        question: 1,
        netns: netns_of(stream),
        local,
        peer,
        local_port,
        peer_port,
        fd: stream.as_raw_fd(),
        reserved: 0,
    };
    tenant.send(Message::new(kind::WHOIS, &question).as_bytes(), &[]);
    match tenant.receive() {
        Answer::Message(kind::CALLER, body, _) => from_bytes::<Caller>(&body).unwrap().ticket,
        other => panic!("not told whose it is: {other:?}"),
    }
}

/// Has been run with a connection, and announces it.
fn be_heir(part: &Part) {
    let mut tenant = Tenant::attach_at(&part.socket);
    // SAFETY: nobody else in this process owns it.
    let stream = unsafe { TcpStream::from_raw_fd(INHERITED) };
    say("ready");
    while let Some(line) = listen() {
        let (ticket, end) = line.split_once(' ').unwrap();
        let ticket = match ticket.parse().unwrap() {
            0 => ticket_of(&mut tenant, &stream),
            ticket => ticket,
        };
        assert_ne!(ticket, 0);
        let outcome = announce(&mut tenant, 1, &stream, ticket, end.parse().unwrap());
        say(&format!("outcome {outcome}"));
    }
}

scene!(a_stream_on_which_root_has_spoken_is_not_its_heirs, |test| {
    let nodes = Nodes::start(["", ""]);
    let server = Server::start(nodes.server());
    let mut client = Client::at(&nodes.client().socket());
    let (bound, reached) = client.reach_at_last(server.address());
    let mut stream = bound.connect(reached.anchor_port).unwrap();
    stream.write_all(PASSWORD.as_bytes()).unwrap();
    // The program that comes next has not asked for it.
    let mut heir = start_with_fd(test, "heir", &nodes, 0, ATTACKER, stream.as_raw_fd());
    heir.hear("ready");
    assert!(server.receives(PASSWORD, PATIENCE));
    heir.say(&format!("{} 0", reached.ticket));
    assert_eq!(heir.hear("outcome"), "Foreign");
    let outcome = announce(&mut client.tenant, 1, &stream, reached.ticket, 0);
    assert_eq!(outcome, "promoted");
});

/// A connection that has come to this server, on which a client at the other node has spoken.
fn accept_from_other_node(server: &Server, client: &mut Client) -> (TcpStream, TcpStream) {
    let (bound, reached) = client.reach_at_last(server.address());
    let mut stream = client.go(bound, &reached).unwrap();
    stream.write_all(PASSWORD.as_bytes()).unwrap();
    let (accepted, _) = server.listener.accept().unwrap();
    (stream, accepted)
}

scene!(a_stream_that_root_has_accepted_is_not_its_heirs, |test| {
    let nodes = Nodes::start(["", ""]);
    let mut server = Server::deaf(nodes.server(), 16);
    let mut client = Client::at(&nodes.client().socket());
    // Also where the one who has accepted it has not asked whose it is.
    for (number, asks) in [(1, true), (2, false)] {
        let (_stream, mut accepted) = accept_from_other_node(&server, &mut client);
        if asks {
            assert_ne!(ticket_of(&mut server.tenant, &accepted), 0);
        }
        let mut bytes = [0; PASSWORD.len()];
        accepted.read_exact(&mut bytes).unwrap();
        let mut heir = start_with_fd(test, "heir", &nodes, 1, ATTACKER, accepted.as_raw_fd());
        heir.hear("ready");
        heir.say("0 1");
        assert_eq!(heir.hear("outcome"), "Foreign", "asks: {asks}");
        let ticket = ticket_of(&mut server.tenant, &accepted);
        let outcome = announce(&mut server.tenant, number, &accepted, ticket, 1);
        assert_eq!(outcome, "promoted", "asks: {asks}");
    }
});

/// Accepts at a socket that another user's process has made, as workers of a server do.
fn be_worker(part: &Part) {
    let mut tenant = Tenant::attach_at(&part.socket);
    // SAFETY: nobody else in this process owns it.
    let listener = unsafe { TcpListener::from_raw_fd(INHERITED) };
    let mut kept = Vec::new();
    say("ready");
    for number in 1.. {
        let Some(line) = listen() else { return };
        let (mut stream, _) = listener.accept().unwrap();
        if line == "say so" {
            // As a shim does at its first accept.
            tenant.ask_for(&listens(&listener));
        }
        let ticket = ticket_of(&mut tenant, &stream);
        assert_ne!(ticket, 0);
        let mut bytes = [0; PASSWORD.len()];
        stream.read_exact(&mut bytes).unwrap();
        let outcome = announce(&mut tenant, number, &stream, ticket, 1);
        say(&format!("outcome {outcome}"));
        kept.push(stream);
    }
}

scene!(
    a_worker_of_another_user_has_the_streams_that_it_accepts,
    |test| {
        let nodes = Nodes::start(["", ""]);
        let mut server = Server::deaf(nodes.server(), 16);
        let fd = server.listener.as_raw_fd();
        let mut workers = [OTHER, ATTACKER].map(|user| {
            let worker = start_with_fd(test, "worker", &nodes, 1, user, fd);
            worker.hear("ready");
            worker
        });
        let mut client = Client::at(&nodes.client().socket());
        let mut kept = Vec::new();
        for word in ["say so", "go on"] {
            for worker in &mut workers {
                let (bound, reached) = client.reach_at_last(server.address());
                let mut stream = client.go(bound, &reached).unwrap();
                stream.write_all(PASSWORD.as_bytes()).unwrap();
                worker.say(word);
                assert_eq!(worker.hear("outcome"), "promoted", "{word}");
                kept.push(stream);
                // Who has made the socket is the one that is asked first again.
                server.tenant.ask_for(&listens(&server.listener));
            }
        }
    }
);

/// Listens for a moment, and uses up its account.
fn be_squatter(part: &Part) {
    let mut tenant = Tenant::attach_at(&part.socket);
    let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 0, 2), 0)).unwrap();
    tenant.ask_for(&listens(&listener));
    say(&format!("port {}", listener.local_addr().unwrap().port()));
    listen();
    drop(listener);
    let mut more = Vec::new();
    loop {
        let mut tenant = Tenant::at(&part.socket).unwrap();
        tenant.hello();
        match tenant.receive() {
            Answer::Message(kind::WELCOME, ..) => more.push(tenant),
            _ => break,
        }
    }
    say("full");
    listen();
}

scene!(who_has_listened_and_cannot_pay_is_in_nobodys_way, |test| {
    let nodes = Nodes::start(["", "max_descriptors_per_user = 80\n"]);
    let daemon = nodes.server();
    let mut squatter = Actor::start(test, "squatter", &daemon.socket(), ATTACKER);
    let port: u16 = squatter.hear("port").parse().unwrap();
    daemon.wait_until("it listens", |stat| stat["fabric"]["listeners"] == 1);
    squatter.say("go");
    squatter.hear("full");
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
    let mut server = Tenant::attach(daemon);
    server.ask_for(&listens(&listener));
    daemon.wait_until("both listen", |stat| stat["fabric"]["listeners"] == 2);
    let mut client = Client::at(&nodes.client().socket());
    let bound = Bound::new(0).unwrap();
    let to = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 2), port);
    let reached = client.reach(&bound, to);
    let reason = Reason::from_code(reached.reason);
    assert_ne!(reached.ticket, 0, "{reason:?}");
});

/// Listens, and has all its porters wait for files.
fn be_held_up(part: &Part) {
    let mut tenant = Tenant::attach_at(&part.socket);
    let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 0, 2), 0)).unwrap();
    tenant.ask_for(&listens(&listener));
    say(&format!("port {}", listener.local_addr().unwrap().port()));
    listen();
    let mut held = Vec::new();
    for _ in 0..16 {
        let caller = Tenant::at(&part.socket).unwrap();
        caller.send(Message::empty(77).as_bytes(), &[INHERITED]);
        held.push(caller);
    }
    say("held");
    listen();
    std::process::abort();
}

scene!(a_node_has_its_answer_whoever_is_held_up, |test| {
    let nodes = Nodes::start(["", ""]);
    let daemon = nodes.server();
    let start = |fd| start_with_fd(test, "held up", &nodes, 1, ATTACKER, fd);
    let Some((file, actor)) = SilentFile::open_for(test, start) else {
        return;
    };
    // The file is dropped first: who holds it does not end before.
    let (mut actor, _file) = (actor, file);
    let port: u16 = actor.hear("port").parse().unwrap();
    daemon.wait_until("it listens", |stat| stat["fabric"]["listeners"] == 1);
    actor.say("go");
    actor.hear("held");
    std::thread::sleep(Duration::from_millis(500));
    let mut client = Client::at(&nodes.client().socket());
    let bound = Bound::new(0).unwrap();
    let start = Instant::now();
    let to = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 2), port);
    let reached = client.reach(&bound, to);
    let (took, reason) = (start.elapsed(), Reason::from_code(reached.reason));
    println!("answered after {took:?}");
    assert!(took < CONNECT * 3 / 4, "after {took:?}: {reason:?}");
    assert_eq!((reached.ticket, reason), (0, Some(Reason::NodeRefused)));
});

/// Connects as often as it may.
fn be_taker(part: &Part) {
    let port = listen().unwrap().parse().unwrap();
    let to = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 2), port);
    let mut client = Client::at(&part.socket);
    let mut kept = Vec::new();
    for _ in 0..24 {
        let bound = Bound::new(0).unwrap();
        let reached = client.reach(&bound, to);
        if reached.ticket != 0 {
            kept.push(bound.connect(reached.anchor_port).unwrap());
        }
    }
    say(&format!("took {}", kept.len()));
    listen();
}

scene!(one_user_leaves_others_places_at_each_node, |test| {
    // Of the places at a node, this one has a third: 8.
    let nodes = Nodes::start_among(2, "max_streams = 24\n");
    let server = Server::start(nodes.server());
    let mut taker = Actor::start(test, "taker", &nodes.client().socket(), ATTACKER);
    taker.say(&server.address().port().to_string());
    let took: usize = taker.hear("took").parse().unwrap();
    assert!((2..=4).contains(&took), "{took}");
    let mut client = Client::at(&nodes.client().socket());
    let bound = Bound::new(0).unwrap();
    let reached = client.reach(&bound, server.address());
    let reason = Reason::from_code(reached.reason);
    assert_ne!(reached.ticket, 0, "{reason:?}");
});

scene!(a_poll_core_is_told_once_that_a_stream_is_mapped, |_| {
    const TIMES: u64 = 2000;
    let nodes = Nodes::start(["", ""]);
    let server = Server::start(nodes.server());
    let mut client = Client::at(&nodes.client().socket());
    let (bound, reached) = client.reach_at_last(server.address());
    let stream = bound.connect(reached.anchor_port).unwrap();
    let outcome = announce(&mut client.tenant, 1, &stream, reached.ticket, 0);
    assert_eq!(outcome, "promoted");
    let commands = || {
        let stat = nodes.client().stat();
        let commands = &stat["fabric"]["cores"][0]["counts"]["commands"];
        commands.as_u64().unwrap()
    };
    let before = commands();
    for _ in 0..TIMES {
        client.tenant.ask_for(&request(what::MAPPED, 1, 1));
    }
    // Behind all of these.
    client.tenant.ask_for(&request(what::LEFT, 1, 1));
    let left = |stat: &serde_json::Value| stat["counters"]["left"] == 1;
    nodes.client().wait_until("it has left", left);
    let told = commands() - before;
    assert!((1..TIMES / 10).contains(&told), "{told}");
});
