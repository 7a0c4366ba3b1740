//! Who pays for a stream: who connected, as long as that end is there, and then the other one; and nobody has one that is on no account.

#[macro_use]
mod tenant;

use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use rdsock_shm::control::{kind, request as what};
use serde_json::Value;
use tenant::actor::{ATTACKER, Actor, Part, is_root, listen, say};
use tenant::{Answer, Daemon, Tenant, request, tcp_pair};

const SMALL: &str = "ring_size = 65536\nhuge_pages = \"never\"\n";
const STREAMS: u32 = 8;
/// More messages than fit into a socket that nobody reads.
const UNREAD: u32 = 400;
/// By then a stream is its other end's, if it is to be.
const WHILE: Duration = Duration::from_secs(3);

fn play(part: &Part) {
    match part.name.as_str() {
        "keeper" => be_keeper(part),
        "deaf" => be_deaf(part),
        "liar" => be_liar(part),
        other => panic!("no such part: {other}"),
    }
}

/// What a user has of something.
fn has(stat: &Value, uid: u32, thing: &str) -> u64 {
    let users = stat["users"].as_array().unwrap();
    let user = users.iter().find(|user| user["uid"] == uid);
    user.map_or(0, |user| user[thing].as_u64().unwrap())
}

/// Accepts streams, and closes nothing.
fn be_keeper(part: &Part) {
    let mut tenant = Tenant::attach_at(&part.socket);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    say(&format!("port {}", listener.local_addr().unwrap().port()));
    let mut kept = Vec::new();
    for number in 1..=STREAMS {
        let (stream, _) = listener.accept().unwrap();
        tenant.announce(number, 1, &stream, 0);
        tenant.promote();
        kept.push(stream);
    }
    say("has them");
    listen();
}

/// Connects there so often, and is promoted.
fn connect(tenant: &mut Tenant, port: &str, streams: u32) -> Vec<TcpStream> {
    let port = port.parse::<u16>().unwrap();
    let connect = |number| {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        tenant.announce(number, 1, &stream, 1);
        tenant.promote();
        stream
    };
    (1..=streams).map(connect).collect()
}

scene!(
    a_server_that_keeps_what_its_client_has_closed_pays,
    |test| {
        let daemon = Daemon::start(SMALL);
        let keeper = Actor::start(test, "keeper", &daemon.socket(), ATTACKER);
        let port = keeper.hear("port");
        let mut client = Tenant::attach(&daemon);
        let streams = connect(&mut client, &port, STREAMS);
        keeper.hear("has them");
        let stat = daemon.stat();
        let before = (has(&stat, 0, "streams"), has(&stat, ATTACKER, "streams"));
        assert_eq!(before, (STREAMS.into(), 0));
        for number in 1..=STREAMS {
            client.ask_for(&request(what::CLOSED, number, 1));
        }
        // What says that it is closed is not, as long as somebody has the socket.
        std::thread::sleep(WHILE);
        assert_eq!(has(&daemon.stat(), 0, "streams"), u64::from(STREAMS));
        drop(streams);
        daemon.wait_until("its server pays", |stat| {
            has(stat, 0, "streams") == 0 && has(stat, ATTACKER, "streams") == u64::from(STREAMS)
        });
        assert_eq!(daemon.stat()["streams_now"], STREAMS);
        drop(keeper);
        daemon.wait_until("given back", |stat| {
            stat["streams_now"] == 0 && has(stat, ATTACKER, "streams") == 0
        });
    }
);

/// Accepts streams, and reads nothing of what it is told.
fn be_deaf(part: &Part) {
    let mut tenant = Tenant::attach_at(&part.socket);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    say(&format!("port {}", listener.local_addr().unwrap().port()));
    let mut kept = Vec::new();
    for number in 1..=UNREAD {
        let (stream, _) = listener.accept().unwrap();
        tenant.announce(number, 1, &stream, 0);
        kept.push(stream);
    }
    listen();
    drop(kept);
    for number in 1..=UNREAD {
        tenant.ask_for(&request(what::CLOSED, number, 1));
    }
    say("closed");
    listen();
}

scene!(who_does_not_read_pays_for_what_waits, |test| {
    let daemon = Daemon::start(SMALL);
    let mut deaf = Actor::start(test, "deaf", &daemon.socket(), ATTACKER);
    let port = deaf.hear("port");
    let mut client = Tenant::attach(&daemon);
    drop(connect(&mut client, &port, UNREAD));
    for number in 1..=UNREAD {
        client.ask_for(&request(what::CLOSED, number, 1));
    }
    deaf.say("close");
    deaf.hear("closed");
    daemon.wait_until("all are over", |stat| stat["streams_now"] == 0);
    daemon.wait_until("who does not read pays", |stat| {
        has(stat, 0, "streams") == 0 && has(stat, ATTACKER, "streams") > 0
    });
    drop(deaf);
    daemon.wait_until("given back", |stat| has(stat, ATTACKER, "streams") == 0);
});

/// Connects, binds its sockets to a device, so that the kernel does not find them by their addresses, and says that they are closed.
fn be_liar(part: &Part) {
    let mut tenant = Tenant::attach_at(&part.socket);
    let port = listen().unwrap();
    let streams = connect(&mut tenant, &port, STREAMS);
    for (number, stream) in (1..).zip(&streams) {
        setsockopt(stream, sockopt::BindToDevice, &"lo".into()).unwrap();
        tenant.ask_for(&request(what::CLOSED, number, 1));
    }
    say("lied");
    listen();
}

scene!(who_says_that_it_has_closed_and_has_not_pays_on, |test| {
    let daemon = Daemon::start(SMALL);
    let mut liar = Actor::start(test, "liar", &daemon.socket(), ATTACKER);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    liar.say(&listener.local_addr().unwrap().port().to_string());
    let mut server = Tenant::attach(&daemon);
    let mut kept = Vec::new();
    for number in 1..=STREAMS {
        let (stream, _) = listener.accept().unwrap();
        server.announce(number, 1, &stream, 0);
        server.promote();
        kept.push(stream);
    }
    liar.hear("lied");
    std::thread::sleep(WHILE);
    let stat = daemon.stat();
    let now = (has(&stat, 0, "streams"), has(&stat, ATTACKER, "streams"));
    assert_eq!(now, (0, STREAMS.into()));
});

#[test]
fn a_stream_that_both_ends_have_declined_is_on_an_account_as_long_as_their_sockets() {
    let daemon = Daemon::start(SMALL);
    let (mut client, mut server) = (Tenant::attach(&daemon), Tenant::attach(&daemon));
    let (connector, accepted) = tcp_pair();
    client.announce(1, 1, &connector, 1);
    server.announce(1, 1, &accepted, 0);
    client.promote();
    server.promote();
    client.ask_for(&request(what::DECLINED, 1, 1));
    assert!(matches!(
        server.receive(),
        Answer::Message(kind::VERDICT, ..)
    ));
    server.ask_for(&request(what::DECLINED, 1, 1));
    daemon.wait_until("both have said so", |stat| {
        stat["counters"]["declined"] == 2
    });
    std::thread::sleep(Duration::from_millis(300));
    let uid = nix::unistd::geteuid().as_raw();
    let stat = daemon.stat();
    assert_eq!(
        (&stat["streams_now"], has(&stat, uid, "streams")),
        (&1.into(), 1)
    );
    drop((connector, accepted));
    daemon.wait_until("given back", |stat| {
        stat["streams_now"] == 0 && has(stat, uid, "streams") == 0
    });
}
