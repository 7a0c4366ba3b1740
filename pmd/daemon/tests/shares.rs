//! Nobody uses up what others need: memory, time, descriptors. Who is over a limit is told so.

#[macro_use]
mod tenant;

use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rdsock_shm::control::{
    Between, Message, Query, Refused, Request, from_bytes, kind, question, refusal, request as what,
};
use rdsock_shm::layout::CONN_RECORDS;
use serde_json::{Value, json};
use tenant::actor::{ATTACKER, Actor, OTHER, Part, is_root, listen, say};
use tenant::measure::{Bystander, Honest};
use tenant::nodes::{Client, Nodes, Server};
use tenant::{Answer, Daemon, Tenant, announcement, request, tcp_pair};

const SMALL: &str = "ring_size = 65536\nhuge_pages = \"never\"\n";

/// Megabytes that an attack may make the daemon need.
const MEGABYTES: u64 = 64;
/// How long an attack is watched.
const WATCH: Duration = Duration::from_secs(8);
/// Descriptors that the daemon may have.
const DESCRIPTORS: u64 = 1024;

fn play(part: &Part) {
    match part.name.as_str() {
        "crowd" => be_crowd(part),
        "deaf" => be_deaf(part),
        "deaf crowd" => be_deaf_crowd(part),
        "hermit" => be_hermit(part),
        "hog" => be_hog(part),
        "modest" => be_modest(part),
        other => panic!("no such part: {other}"),
    }
}

/// The daemon has room for what a HELLO brings, and not for what it makes beside that: no fault of the tenant's, and it passes.
#[test]
fn a_hello_that_finds_no_descriptors_may_come_again() {
    let daemon = Daemon::start(SMALL);
    let mut tenant = Tenant::stranger(&daemon).unwrap();
    // It has been taken in.
    tenant.ask(question::STAT);
    let open = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
    let open = open.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let open: Vec<u64> = open.map(|number| number.parse().unwrap()).collect();
    let free = (0..).filter(|number| !open.contains(number));
    let last = free.take(2).last().unwrap();
    let limit = |soft| {
        let limit = libc::rlimit {
            rlim_cur: soft,
            rlim_max: DESCRIPTORS,
        };
        let what = libc::RLIMIT_NOFILE;
        // SAFETY: the call reads one limit, and writes none.
        let set =
            unsafe { libc::prlimit(daemon.pid(), what, &raw const limit, std::ptr::null_mut()) };
        assert_eq!(set, 0);
    };
    limit(last + 1);
    tenant.hello();
    assert_eq!(tenant.refused().code, refusal::LIMIT);
    limit(DESCRIPTORS);
    Tenant::attach(&daemon);
}

/// Watches the daemon while it is attacked: it answers others in time, promotes their connections, and needs
/// little memory.
fn watch(daemon: &Daemon, bystander: &Bystander, honest: &mut Honest, before: u64) {
    let end = Instant::now() + WATCH;
    while Instant::now() < end {
        let grown = daemon.peak_megabytes() - before;
        assert!(grown < MEGABYTES, "the daemon has grown by {grown} MB");
        bystander.asks(daemon, "an attack on its memory");
        let took = honest.promotion();
        assert!(took < bystander.most, "{took:?} for a promotion");
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("grown by {} MB", daemon.peak_megabytes() - before);
}

/// An actor that does something to the memory of the daemon when told.
fn attack_on_memory(test: &str, part: &str) {
    let daemon = Daemon::start(SMALL);
    let mut honest = Honest::new(&daemon);
    let bystander = Bystander::new(&daemon);
    honest.promotion();
    let mut actor = Actor::start(test, part, &daemon.socket(), ATTACKER);
    actor.hear("ready");
    let before = daemon.peak_megabytes();
    actor.say("go");
    watch(&daemon, &bystander, &mut honest, before);
}

scene!(
    a_question_about_one_memory_attached_a_hundred_times,
    |test| {
        attack_on_memory(test, "crowd");
    }
);

scene!(answers_that_nobody_reads, |test| {
    attack_on_memory(test, "deaf");
});

scene!(small_answers_that_nobody_reads, |test| {
    attack_on_memory(test, "deaf crowd");
});

scene!(an_operator_may_ask_about_a_crowd, |test| {
    let daemon = Daemon::start(SMALL);
    let mut honest = Honest::new(&daemon);
    let bystander = Bystander::new(&daemon);
    let actor = Actor::start(test, "crowd", &daemon.socket(), ATTACKER);
    actor.hear("ready");
    let before = daemon.peak_megabytes();
    let mut operator = Tenant::stranger(&daemon).unwrap();
    ask_why(&operator);
    // Reads what comes, until the daemon has said all or hangs up, or ends.
    std::thread::spawn(move || {
        while let Answer::Message(_, piece, _) = operator.receive() {
            if piece.is_empty() {
                return;
            }
        }
    });
    watch(&daemon, &bystander, &mut honest, before);
});

fn ask_why(tenant: &Tenant) {
    let (what, pid) = (question::WHY, 0);
    let query = Message::new(kind::QUERY, &Query { what, pid });
    tenant.send(query.as_bytes(), &[]);
}

/// A tenant with all records of connections in use.
fn fill_records(tenant: &Tenant) {
    for number in 0..CONN_RECORDS {
        tenant.memory.set_conn(number, number as i32, 1, 1);
    }
}

/// Attached, or refused; it does not matter here.
fn try_attach(part: &Part) -> Option<Tenant> {
    let mut tenant = Tenant::at(&part.socket)?;
    tenant.hello();
    matches!(tenant.receive(), Answer::Message(kind::WELCOME, ..)).then_some(tenant)
}

/// A hundred connections, each with its own memory: none is taken twice.
fn be_crowd(part: &Part) {
    raise_descriptors();
    let first = Tenant::attach_at(&part.socket);
    fill_records(&first);
    let mut crowd = Vec::new();
    for _ in 1..100 {
        let mut more = Tenant::at(&part.socket).unwrap();
        fill_records(&more);
        more.hello();
        more.receive();
        crowd.push(more);
    }
    say("ready");
    if listen().is_some() {
        ask_why(&first);
        listen();
    }
}

/// Asks for much, and reads nothing.
fn be_deaf(part: &Part) {
    let tenant = Tenant::attach_at(&part.socket);
    fill_records(&tenant);
    let caller = Tenant::at(&part.socket).unwrap();
    say("ready");
    listen();
    for _ in 0..800 {
        ask_why(&caller);
    }
    listen();
}

/// Several that ask for little, very often, and read nothing.
fn be_deaf_crowd(part: &Part) {
    const MESSAGES: usize = 40_000;
    let crowd: Vec<_> = (0..30).filter_map(|_| try_attach(part)).collect();
    say("ready");
    listen();
    let address = std::net::Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets();
    let question = Between {
        question: 1,
        netns: 0,
        local: address,
        peer: address,
        local_port: 1,
        peer_port: 1,
        fd: -1,
        reserved: 0,
    };
    let message = Message::new(kind::WHOIS, &question);
    for _ in 0..MESSAGES {
        for tenant in &crowd {
            tenant.send(message.as_bytes(), &[]);
        }
    }
    listen();
}

fn raise_descriptors() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

/// Takes what it can get: attaches first, or makes streams first, or only connects.
fn be_hog(part: &Part) {
    raise_descriptors();
    let mut told = Told::default();
    let mut held = Vec::new();
    let mut streams = Vec::new();
    let order = listen().unwrap();
    for word in order.split_whitespace() {
        match word {
            "attach" => told.attach(part, &mut held),
            "streams" => {
                if held.is_empty() {
                    held.extend(try_attach(part));
                }
                if let Some(tenant) = held.first_mut() {
                    make_streams(tenant, &mut streams);
                }
            }
            "connect" => {
                let callers = (0..DESCRIPTORS).map_while(|_| Tenant::at(&part.socket));
                held.extend(callers);
            }
            other => panic!("no such thing to take: {other}"),
        }
    }
    let Told {
        welcome,
        refused,
        bare,
    } = told;
    say(&format!("has {welcome} {refused} {bare} {}", streams.len()));
    listen();
}

/// What those who attached were told.
#[derive(Default)]
struct Told {
    welcome: usize,
    /// That a limit is reached.
    refused: usize,
    /// Nothing, but that the connection has ended.
    bare: usize,
}

impl Told {
    /// Attaches until it is not let in any more.
    fn attach(&mut self, part: &Part, held: &mut Vec<Tenant>) {
        while self.refused + self.bare < 20 && self.welcome < DESCRIPTORS as usize {
            let Some(mut tenant) = Tenant::at(&part.socket) else {
                self.bare += 1;
                continue;
            };
            tenant.hello();
            match tenant.receive() {
                Answer::Message(kind::WELCOME, ..) => {
                    self.welcome += 1;
                    held.push(tenant);
                }
                Answer::Message(kind::REFUSED, body, _) => {
                    let refused: Refused = from_bytes(&body).unwrap();
                    assert_eq!(refused.code, refusal::LIMIT);
                    self.refused += 1;
                }
                Answer::Closed => self.bare += 1,
                other => panic!("{other:?}"),
            }
        }
    }
}

type Pair = (std::net::TcpStream, std::net::TcpStream);

/// Streams until there are no more; keeps what is needed to hold them.
fn make_streams(tenant: &mut Tenant, pairs: &mut Vec<Pair>) {
    for number in (1..).step_by(2).take(DESCRIPTORS as usize) {
        let (connector, accepted) = tcp_pair();
        tenant.announce(number, 1, &connector, 1);
        tenant.announce(number + 1, 1, &accepted, 0);
        for _ in 0..2 {
            match tenant.receive() {
                Answer::Message(kind::PROMOTE, ..) => {}
                Answer::Message(kind::VERDICT, ..) => return,
                other => panic!("{other:?}"),
            }
        }
        pairs.push((connector, accepted));
    }
}

/// Attaches once, and has two connections.
fn be_modest(part: &Part) {
    let Some(mut tenant) = try_attach(part) else {
        return say("is turned away");
    };
    let mut streams = Vec::new();
    for number in [1, 3] {
        let (connector, accepted) = tcp_pair();
        tenant.announce(number, 1, &connector, 1);
        tenant.announce(number + 1, 1, &accepted, 0);
        for _ in 0..2 {
            match tenant.receive() {
                Answer::Message(kind::PROMOTE, ..) => {}
                other => return say(&format!("has no stream: {other:?}")),
            }
        }
        streams.push((connector, accepted));
    }
    say("is served");
}

/// These users take, in this order, what they can get; another one is served all the same.
fn hogs(test: &str, users: &[u32], order: &str) {
    let daemon = Daemon::start_with(SMALL, |command| {
        // SAFETY: one system call between fork and exec.
        unsafe {
            command.pre_exec(|| {
                let limit = Resource::RLIMIT_NOFILE;
                Ok(setrlimit(limit, DESCRIPTORS, DESCRIPTORS)?)
            })
        };
    });
    let mut bare = 0;
    let mut hogs = Vec::new();
    for user in users {
        let mut hog = Actor::start(test, "hog", &daemon.socket(), *user);
        hog.say(order);
        let has = hog.hear_numbers("has");
        println!(
            "user {user}: {} attached, {} refused, {} told nothing, {} streams",
            has[0], has[1], has[2], has[3]
        );
        bare += has[2];
        hogs.push(hog);
    }
    let modest = Actor::start(test, "modest", &daemon.socket(), OTHER);
    assert_eq!(modest.hear(""), "is served", "{users:?} {order}");
    assert_eq!(bare, 0, "calls that ended without a word");
    if order.contains("attach") {
        is_named(&daemon, users[0]);
    }
}

/// `stat` says of a user that it was refused something, or is over a limit. The words are the daemon's.
fn is_named(daemon: &Daemon, user: u32) {
    let stat = daemon.stat();
    let users = stat["users"].as_array().unwrap();
    let entry = users.iter().find(|entry| entry["uid"] == user);
    let text = entry.map(|entry| entry.to_string()).unwrap_or_default();
    let says = |word| text.contains(word);
    assert!(
        says("refused") || says("limit") || says("over"),
        "`stat` does not say what user {user} is over: {text:?}"
    );
}

scene!(one_user_that_attaches_leaves_the_others_room, |test| {
    hogs(test, &[ATTACKER], "attach streams");
});

scene!(one_user_that_makes_streams_leaves_the_others_room, |test| {
    hogs(test, &[ATTACKER], "streams attach");
});

scene!(one_user_that_only_connects_leaves_the_others_room, |test| {
    hogs(test, &[ATTACKER], "connect");
});

scene!(three_users_leave_a_fourth_one_room, |test| {
    let users = [ATTACKER, ATTACKER + 10, ATTACKER + 11];
    hogs(test, &users, "attach streams connect");
});

scene!(three_users_of_streams_leave_a_fourth_one_room, |test| {
    let users = [ATTACKER, ATTACKER + 10, ATTACKER + 11];
    hogs(test, &users, "streams attach connect");
});

/// Descriptors on all accounts, and those that the daemon has open for tenants.
fn charged_and_open(daemon: &Daemon, own: usize) -> (u64, usize) {
    let asks = Tenant::stranger(daemon).unwrap();
    let stat = daemon.stat();
    let sum = |user: &serde_json::Value| user["descriptors"].as_u64().unwrap_or(0);
    let charged = stat["users"].as_array().unwrap().iter().map(sum).sum();
    let open = daemon.descriptors() - own;
    drop(asks);
    (charged, open)
}

/// Waits until what is open is on an account.
fn all_is_charged(daemon: &Daemon, own: usize, at_least: u64) {
    // Who asks is charged while it asks, and is closed behind that.
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let (charged, open) = charged_and_open(daemon, own);
        if charged >= open as u64 && charged >= at_least {
            return;
        }
        assert!(
            Instant::now() < end,
            "{open} are open, and {charged} of them are on an account"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_a_tenant_leaves_behind_stays_on_its_account() {
    let daemon = Daemon::start(SMALL);
    drop(Tenant::attach(&daemon));
    daemon.wait_until("all have gone", |stat| stat["tenants"] == json!([]));
    // What it needs for itself, once it has worked.
    std::thread::sleep(Duration::from_millis(100));
    let own = daemon.descriptors();
    let streams: Vec<_> = (0..20)
        .map(|_| {
            let (mut client, mut server) = (Tenant::attach(&daemon), Tenant::attach(&daemon));
            let (connector, accepted) = tcp_pair();
            client.announce(1, 1, &connector, 1);
            server.announce(1, 1, &accepted, 0);
            // The process lives and has the sockets, so the streams stay, with the bells of both.
            client.promote();
            server.promote();
            (connector, accepted)
        })
        .collect();
    daemon.wait_until("all have gone", |stat| stat["tenants"] == json!([]));
    assert_eq!(daemon.stat()["streams_now"], 20);
    all_is_charged(&daemon, own, 20 * 5);
    drop(streams);
    daemon.wait_until("closed", |stat| stat["streams_now"] == 0);
    daemon.wait_until("given back", |stat| {
        let users = stat["users"].as_array().unwrap();
        // Who asks has something.
        users
            .iter()
            .all(|user| user["descriptors"].as_u64().unwrap_or(0) < 6)
    });
}

/// The daemon is not told when its socket is closed.
#[test]
fn what_waits_for_its_other_end_is_on_an_account() {
    let daemon = Daemon::start(SMALL);
    let waiting = |stat: &Value| -> u64 {
        let users = stat["users"].as_array().unwrap().iter();
        users.filter_map(|user| user["waiting"].as_u64()).sum()
    };
    let (mut client, mut server) = (Tenant::attach(&daemon), Tenant::attach(&daemon));
    let pairs: Vec<_> = (1..4).map(|number| (number, tcp_pair())).collect();
    for (number, (connector, _)) in &pairs {
        client.announce(*number, 1, connector, 1);
    }
    let (connector, accepted) = tcp_pair();
    client.announce(4, 1, &connector, 1);
    daemon.wait_until("they wait", |stat| waiting(stat) == 4);
    drop(pairs);
    server.announce(1, 1, &accepted, 0);
    server.promote();
    client.promote();
    client.ask_for(&request(what::CLOSED, 1, 1));
    daemon.wait_until("two are left", |stat| waiting(stat) == 2);
    drop(client);
    daemon.wait_until("none is left", |stat| waiting(stat) == 0);
}

#[test]
fn a_message_that_nobody_reads_keeps_its_stream_on_an_account() {
    let daemon = Daemon::start(SMALL);
    drop(Tenant::attach(&daemon));
    daemon.wait_until("all have gone", |stat| stat["tenants"] == json!([]));
    std::thread::sleep(Duration::from_millis(100));
    let own = daemon.descriptors();
    let (mut client, deaf) = (Tenant::attach(&daemon), &mut Tenant::attach(&daemon));
    let mut promoted = 0;
    for number in 1..CONN_RECORDS as u32 {
        let (connector, accepted) = tcp_pair();
        deaf.announce(number, 1, &accepted, 0);
        client.announce(number, 1, &connector, 1);
        match client.receive() {
            Answer::Message(kind::PROMOTE, ..) => promoted += 1,
            _ => break,
        }
        // The stream is over, and the offer of its other end is still to be read.
        client.ask_for(&request(what::DECLINED, number, 1));
        deaf.ask_for(&request(what::CLOSED, number, 1));
        if promoted == 400 {
            break;
        }
    }
    daemon.wait_until("closed", |stat| stat["streams_now"] == 0);
    assert!(promoted > 300, "{promoted}");
    all_is_charged(&daemon, own, 0);
}

#[test]
fn what_streams_to_other_nodes_leave_behind_is_on_an_account() {
    const STREAMS: usize = 20;
    let nodes = Nodes::start([SMALL; 2]);
    let (daemon, server) = (nodes.client(), Server::start(nodes.server()));
    drop(Tenant::attach(daemon));
    daemon.wait_until("all have gone", |stat| stat["tenants"] == json!([]));
    std::thread::sleep(Duration::from_millis(100));
    let own = daemon.descriptors();
    let mut deaf = Client::at(&daemon.socket());
    let reached: Vec<_> = (0..STREAMS)
        .map(|_| deaf.reach_at_last(server.address()))
        .collect();
    // What it is told from now on waits for it.
    for number in 0..400 {
        deaf.tenant.ask_for(&request(what::ANNOUNCE, number, 1));
    }
    daemon.wait_until("its answers wait", |stat| {
        stat["tenants"][0]["unread_messages"] != 0 && stat["counters"]["announced"] == 400
    });
    let mut anchors = Vec::new();
    for (number, (bound, reached)) in (1000..).zip(reached) {
        let anchor = bound.connect(reached.anchor_port).unwrap();
        deaf.tenant.ask_for(&Request {
            stream_id: reached.ticket,
            ..announcement(number, 1, &anchor, 1)
        });
        anchors.push(anchor);
    }
    daemon.wait_until("promoted", |stat| {
        stat["counters"]["streams_opened"] == STREAMS
    });
    all_is_charged(daemon, own, 4 * STREAMS as u64);
    drop(anchors);
    daemon.wait_until("over", |stat| stat["fabric"]["streams"] == 0);
    all_is_charged(daemon, own, 2 * STREAMS as u64);
    drop(deaf);
    daemon.wait_until("given back", |stat| {
        let users = stat["users"].as_array().unwrap();
        users
            .iter()
            .all(|user| user["carried"].as_u64().unwrap_or(0) == 0)
    });
}

scene!(
    a_network_namespace_is_on_the_account_of_its_tenants,
    |test| {
        let daemon = Daemon::start(SMALL);
        drop(Tenant::attach(&daemon));
        daemon.wait_until("all have gone", |stat| stat["tenants"] == json!([]));
        std::thread::sleep(Duration::from_millis(100));
        let own = daemon.descriptors();
        let actors: Vec<Actor> = (0..5)
            .map(|_| {
                let actor = Actor::start_with(test, "hermit", &daemon.socket(), |command| {
                    // SAFETY: system calls between fork and exec.
                    unsafe {
                        command.pre_exec(|| {
                            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
                            Ok(nix::unistd::setresuid(
                                ATTACKER.into(),
                                ATTACKER.into(),
                                ATTACKER.into(),
                            )?)
                        })
                    };
                });
                actor.hear("ready");
                actor
            })
            .collect();
        all_is_charged(&daemon, own, 5 * 6);
        drop(actors);
    }
);

/// Attaches, from a network namespace of its own.
fn be_hermit(part: &Part) {
    let _tenant = Tenant::attach_at(&part.socket);
    say("ready");
    listen();
}
