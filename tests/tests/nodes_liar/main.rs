//! A node that lies to a daemon while others are honest: its own streams end, a counter says why, and the streams
//! of the others run on, byte for byte.

mod liar;

use std::time::{Duration, Instant};

use liar::{Liar, Stream, id};
use rdsock_proto::message::{Body, Message};
use rdsock_proto::{Place, StreamId};
use rdsock_rde::spec::{Status, status};
use rdsock_shm::layout::DATA_OFFSET;
use rdsock_tests::{Nodes, Running, place};

const LIMIT: Duration = Duration::from_secs(60);
const PUMP: &str = env!("CARGO_BIN_EXE_rdsock-test-pump");

/// Node 1 has a server, node 2 a client of it, and node 3 lies to node 1.
struct Ground {
    liar: Liar,
    server: Running,
    port: u16,
    /// A transfer between the honest nodes.
    honest: Running,
    nodes: Nodes,
}

impl Ground {
    fn new() -> Self {
        let nodes = Nodes::start(2, 3);
        let port = place::free_port();
        let mut server = nodes.program(1, PUMP, &format!("serve {port}")).start();
        server.wait_for_output("listening", LIMIT);
        let honest = nodes.begin(PUMP, &format!("send {port} 300 60"));
        Ground {
            liar: Liar::join(&nodes.fabric(), 3),
            server,
            port,
            honest,
            nodes,
        }
    }

    /// A stream from the liar to the server, in use.
    fn open(&mut self) -> Stream {
        let place = self.liar.own_place();
        let stream = self.liar.open(self.port, place);
        self.liar.send(stream, b"as if it were honest");
        stream
    }

    fn count(&self, name: &str) -> u64 {
        self.nodes.violations(1, 3, name)
    }

    /// Waits until node 1 has counted something so often.
    fn counted(&mut self, name: &str, times: u64) {
        let nodes = &self.nodes;
        let what = format!("{times} {name}");
        let mut looked = Instant::now();
        self.liar.until(&what, |_| {
            let due = looked.elapsed() > Duration::from_millis(20);
            if due {
                looked = Instant::now();
            }
            due && nodes.violations(1, 3, name) >= times
        });
    }

    /// Waits until the server has seen so many connections broken; or its shim has, before it came to accept them.
    fn broken(&mut self, times: usize) {
        let server = &self.server;
        self.liar.until("a broken connection", |_| {
            let output = server.output();
            let broke = output.lines().filter(|line| line.starts_with("broke"));
            let lines: Vec<&str> = broke.collect();
            assert!(
                lines.iter().all(|line| line.ends_with("ConnectionReset")),
                "{lines:?}"
            );
            let dropped = output.matches("connection from another node was dropped");
            lines.len() + dropped.count() >= times
        });
    }

    /// The honest are unharmed: what flowed goes on to its end, and the liar's victim takes new connections.
    fn honest_go_on(self) {
        let Ground {
            mut liar,
            nodes,
            honest,
            port,
            mut server,
            ..
        } = self;
        let mut nodes = nodes;
        let mut new = nodes
            .program(2, PUMP, &format!("send {port} 20 100"))
            .start();
        liar.until("the end of a new transfer", |_| new.ended().is_some());
        assert!(new.finish(LIMIT).contains("done 20971520"));
        let mut honest = honest;
        liar.until("the end of a transfer", |_| honest.ended().is_some());
        assert!(honest.finish(LIMIT).contains("done 314572800"));
        drop(liar);
        server.kill();
        nodes.daemons[1].wait_until_empty(usize::MAX);
        assert!(nodes.daemon(1).running().ended().is_none());
    }
}

#[test]
fn messages_that_make_no_sense() {
    let mut ground = Ground::new();
    let stream = ground.open();
    let session = ground.liar.session;
    let (to, head) = (stream.theirs, 1);
    let right = Message {
        session,
        body: Body::Data { to, head },
    }
    .encode();
    let with = |at: usize, byte: u8| {
        let mut bytes = right;
        bytes[at] = byte;
        bytes
    };
    for (name, bytes) in [
        ("bad_version", with(0, 2)),
        ("bad_kind", with(1, 99)),
        ("bad_reserved", with(40, 1)),
        ("bad_field", with(1, 4)),
        ("stale_session", with(4, right[4] ^ 1)),
        ("unknown_stream", with(12, right[12] ^ 1)),
    ] {
        let before = ground.count(name);
        for _ in 0..10 {
            ground.liar.say_bytes(&bytes);
        }
        ground.counted(name, before + 10);
    }
    for (name, body) in [
        ("wrong_state", Body::Resumed),
        (
            "no_offer",
            Body::Connect {
                from: id(77),
                source: std::net::Ipv6Addr::LOCALHOST,
                destination: std::net::Ipv6Addr::LOCALHOST,
            },
        ),
    ] {
        let before = ground.count(name);
        ground.liar.say(body);
        ground.counted(name, before + 1);
    }
    // Noise, as much as goes.
    let mut state = 7_u64;
    for _ in 0..20_000 {
        let noise = std::array::from_fn(|_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (state >> 56) as u8
        });
        ground.liar.say_bytes(&noise);
    }
    ground.counted("bad_version", 10_000);
    // None of it has hurt even its own stream.
    ground.liar.say(Body::Credit {
        to: stream.theirs,
        consumed: 1 << 40,
        seen: 0,
        notify: true,
    });
    ground.broken(1);
    ground.honest_go_on();
}

#[test]
fn positions_that_cannot_be() {
    let mut ground = Ground::new();
    type Lie = fn(StreamId) -> Body;
    let lies: [(&str, Lie); 5] = [
        ("bad_credit", |to| Body::Credit {
            to,
            consumed: 1 << 40,
            seen: 0,
            notify: true,
        }),
        ("bad_credit", |to| Body::Credit {
            to,
            consumed: 0,
            seen: 1 << 40,
            notify: true,
        }),
        ("bad_head", |to| Body::Data { to, head: 1 << 40 }),
        ("bad_end", |to| Body::Shut { to, end: 3 }),
        ("bad_end", |to| Body::Close {
            to,
            end: 1 << 40,
            consumed: 0,
        }),
    ];
    for (at, (name, lie)) in lies.into_iter().enumerate() {
        let stream = ground.open();
        let before = ground.count(name);
        ground.liar.say(lie(stream.theirs));
        ground.counted(name, before + 1);
        ground.broken(at + 1);
    }
    ground.honest_go_on();
}

#[test]
fn memory_that_is_not_its_own() {
    let mut ground = Ground::new();
    let refused = |ground: &Ground| {
        let stat = ground.nodes.fabric_stat(1);
        stat["refused_here"].as_u64().expect("the device's count")
    };
    let before = refused(&ground);
    let stream = ground.open();
    let key = stream.place.key;
    let bytes = [0xff; 64];
    let mut expected = 0;
    // Regions of node 1: one for each other node, with first tags. All keys but one are others' or nobody's.
    for other in (0..8)
        .map(|entry| 1 << 16 | entry)
        .chain([0, !0, key ^ 1 << 16])
    {
        if other != key {
            for offset in [0, 2048, 1 << 20] {
                ground.liar.write(other, offset, &bytes, None, None);
                expected += 1;
            }
        }
    }
    for offset in [1 << 50, u64::MAX - 10, u64::MAX] {
        ground.liar.write(key, offset, &bytes, None, None);
        ground
            .liar
            .write(key, stream.place.ring, &bytes, Some((offset & !7, 9)), None);
        expected += 2;
    }
    ground
        .liar
        .until("all refusals", |liar| liar.statuses.len() >= expected);
    let allowed = [
        status::REFUSED_KEY,
        status::REFUSED_SOURCE,
        status::REFUSED_BOUNDS,
    ];
    let statuses = &ground.liar.statuses;
    assert!(
        statuses.iter().all(|s| allowed.contains(&s.0)),
        "{statuses:?}"
    );
    assert!(statuses.contains(&Status(status::REFUSED_SOURCE)));
    assert_eq!(refused(&ground) - before, expected as u64);

    // Where nothing is mapped in its own window.
    ground.liar.statuses.clear();
    ground.liar.write(key, 1 << 30, &bytes, None, None);
    ground
        .liar
        .until("a refusal", |liar| !liar.statuses.is_empty());
    assert_eq!(ground.liar.statuses, [Status(status::TARGET_ACCESS)]);

    // All over the memory that it shares with the server. That one's stream breaks, or ends, and nothing else.
    let other = ground.open();
    let start = other
        .place
        .ring
        .min(other.place.word & !4095)
        .min(stream.place.ring);
    let header = start.saturating_sub(DATA_OFFSET) & !4095;
    for at in (header..other.place.ring + 4096).step_by(64) {
        ground.liar.write(key, at, &[0x5a; 64], None, None);
    }
    ground.liar.say(Body::Data {
        to: other.theirs,
        head: 64,
    });
    ground.liar.restart();
    ground.counted("peer_restarted", 1);
    ground.honest_go_on();
}

#[test]
fn a_place_where_node_1_may_not_write() {
    let mut ground = Ground::new();
    let own = ground.liar.own_place();
    let key = Place {
        key: own.key ^ 7,
        ..own
    };
    let bounds = Place {
        ring: 1 << 40,
        ..own
    };
    for (at, place) in [key, bounds].into_iter().enumerate() {
        let stream = ground.liar.open(ground.port, place);
        ground.liar.send(stream, b"echo this");
        ground.counted("access_refused", at as u64 + 1);
        ground.broken(at + 1);
    }
    ground.honest_go_on();
}

#[test]
fn a_flood_of_connects() {
    let mut ground = Ground::new();
    let place = ground.liar.own_place();
    let nobody = place::free_port();
    for _ in 0..4000 {
        ground.liar.ask(nobody, place);
    }
    // And more streams than it may have, to somebody who is there.
    for _ in 0..1000 {
        ground.liar.ask(ground.port, place);
    }
    ground.counted("connect_flood", 1);
    assert!(ground.liar.refused < 5000);
    ground.honest_go_on();
}

#[test]
fn a_node_that_takes_no_messages() {
    let mut ground = Ground::new();
    let stream = ground.open();
    ground.liar.reads = false;
    for _ in 0..3000 {
        // Each is answered, or counted.
        ground.liar.ask(1, ground.liar.own_place());
    }
    ground.liar.send(stream, b"more");
    ground.counted("session_lost", 1);
    ground.liar.reads = true;
    ground.honest_go_on();
}

#[test]
fn ever_new_epochs() {
    let mut ground = Ground::new();
    for round in 1..=20 {
        ground.open();
        ground.liar.restart();
        ground.counted("peer_restarted", round);
        ground.broken(round as usize);
    }
    ground.honest_go_on();
}
