//! Who pays for a stream: who connected, and nobody has one that is on no account.

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
/// By then a stream that nobody has is given back.
const WHILE: Duration = Duration::from_secs(3);

fn play(part: &Part) {
    assert_eq!(part.name, "liar");
    be_liar(part);
}

/// What a user has of something.
fn has(stat: &Value, uid: u32, thing: &str) -> u64 {
    let users = stat["users"].as_array().unwrap();
    let user = users.iter().find(|user| user["uid"] == uid);
    user.map_or(0, |user| user[thing].as_u64().unwrap())
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
