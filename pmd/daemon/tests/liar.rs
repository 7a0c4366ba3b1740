//! A tenant that follows the protocol and lies in one thing at a time: in each field of each message and
//! request, by the table of messages, in its descriptors, its length, its order. Each lie gets a clear
//! answer or costs the liar its connection; nobody gets a stream by it, and honest neighbours of another
//! user keep theirs.

mod honest;
mod table;
mod tenant;

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::Command;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use rdsock_shm::control::{
    Attached, Between, Caller, Hello, Lookup, Message, Pod, Promote, Query, Refused, Request,
    Verdict, bytes_of, from_bytes, head, kind, question, refusal, request,
};
use rdsock_shm::layout::{BellBoard, CONN_RECORDS, TenantMemory, VERSION};
use serde_json::Value;

use honest::{Honest, Level};
use table::{Field, HEAD, MESSAGES, REQUEST, REQUESTS, Row, Sender, row, size};
use tenant::{Answer, Daemon, Tenant, announcement, tcp_pair};

const USER: u32 = 64_001;
/// Question that marks the end of the answers to a lie.
const MARK: u64 = 0x6d61_726b;

#[test]
fn one_lie_at_a_time() {
    table::check_against_source();
    let daemon = Daemon::start("ring_size = 65536\nhuge_pages = \"never\"\n");
    honest::let_others_in(&daemon);
    let mut honest = Honest::new(&daemon);
    honest.turn(&daemon);
    let before = Level::settled(&daemon);
    let mut liar = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "lying_process", "--nocapture"])
        .env("RDSOCK_LIAR_DAEMON", daemon.socket())
        .env("RDSOCK_LIAR_VICTIMS", honest.victims())
        .spawn()
        .unwrap();
    let status = loop {
        honest.turn(&daemon);
        if let Some(status) = liar.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
    honest.check_victims();
    let after = before.is_reached_again(&daemon);
    println!("before {before}, after {after}; {honest}");
}

/// Not a test by itself: the test above runs it as a process of another user.
#[test]
fn lying_process() {
    let Some(daemon) = std::env::var_os("RDSOCK_LIAR_DAEMON") else {
        return;
    };
    honest::become_user(USER);
    let victims = honest::victims(&std::env::var("RDSOCK_LIAR_VICTIMS").unwrap());
    let mut liar = Liar::new(daemon.into(), victims);
    for (name, what) in REQUESTS {
        liar.lie_in_request(name, *what);
    }
    for row in MESSAGES {
        match row.sender {
            Sender::Daemon => liar.speak_as_the_daemon(row),
            _ => liar.lie_in_message(row),
        }
    }
    liar.lie_in_order();
    println!("{} lies: {:?}", liar.lies, liar.outcomes);
    assert!(liar.lies > 500, "{}", liar.lies);
}

/// What came of a lie.
#[derive(Debug, Default)]
struct Heard {
    promotes: Vec<Promote>,
    verdicts: Vec<Verdict>,
    /// Answers to REACH, WHOIS, LOOKUP and QUERY.
    answers: usize,
    refused: Option<Refused>,
    closed: bool,
}

struct Liar {
    daemon: PathBuf,
    victims: Vec<Request>,
    /// It, and who holds the other end of its connection. Both are honest but for the lie.
    ends: [Tenant; 2],
    sockets: [TcpStream; 2],
    generation: u32,
    lies: u64,
    outcomes: BTreeMap<&'static str, u64>,
}

fn attach(daemon: &std::path::Path) -> Tenant {
    let mut tenant = Tenant::at(daemon).unwrap();
    tenant.hello();
    match tenant.receive() {
        Answer::Message(kind::WELCOME, ..) => tenant,
        other => panic!("not welcome: {other:?}"),
    }
}

impl Liar {
    fn new(daemon: PathBuf, victims: Vec<Request>) -> Self {
        let (connector, accepted) = tcp_pair();
        Liar {
            ends: [attach(&daemon), attach(&daemon)],
            daemon,
            victims,
            sockets: [connector, accepted],
            generation: 1,
            lies: 0,
            outcomes: BTreeMap::new(),
        }
    }

    /// A new connection, announced by nobody yet.
    fn renew(&mut self) {
        let (connector, accepted) = tcp_pair();
        self.sockets = [connector, accepted];
        self.generation += 2;
    }

    fn announce(&mut self, end: usize) {
        let active = 1 - end as u32;
        let announced = announcement(end as u32, self.generation, &self.sockets[end], active);
        self.ends[end].ask_for(&announced);
    }

    /// A new connection on rings; returns the liar's end of it.
    fn promoted(&mut self) -> Promote {
        self.renew();
        self.announce(1);
        self.announce(0);
        self.own_promote(1);
        self.own_promote(0)
    }

    /// The next PROMOTE; what was said of earlier generations does not matter any more.
    fn own_promote(&mut self, end: usize) -> Promote {
        loop {
            match self.ends[end].receive() {
                Answer::Message(kind::PROMOTE, body, _) => return from_bytes(&body).unwrap(),
                Answer::Message(kind::VERDICT, body, _) => {
                    let verdict: Verdict = from_bytes(&body).unwrap();
                    let now = self.generation;
                    assert!(verdict.generation < now, "{verdict:?} in generation {now}");
                }
                other => panic!("no PROMOTE: {other:?}"),
            }
        }
    }

    fn counters(&self) -> Value {
        Tenant::at(&self.daemon).unwrap().ask(question::STAT)["counters"].take()
    }

    /// Sends, and hears all that is said until the mark or the end.
    fn say(&mut self, bytes: &[u8], fds: &[RawFd]) -> Heard {
        self.ends[0].send(bytes, fds);
        self.hear()
    }

    fn hear(&mut self) -> Heard {
        // The daemon has looked at whatever it was told of.
        let stat = || {
            let mut tool = Tenant::at(&self.daemon).unwrap();
            tool.ask(question::STAT)
        };
        while stat()["looks_now"] != 0 {}
        let mark = Between {
            question: MARK,
            ..zeroed()
        };
        self.ends[0].send(Message::new(kind::WHOIS, &mark).as_bytes(), &[]);
        let mut heard = Heard::default();
        loop {
            let (kind, body) = match self.ends[0].receive() {
                Answer::Message(kind, body, _) => (kind, body),
                // The mark was not read: that is told first, and what was said before only then.
                Answer::Closed if !heard.closed => {
                    heard.closed = true;
                    continue;
                }
                Answer::Closed => {
                    self.ends[0] = attach(&self.daemon);
                    break;
                }
            };
            match kind {
                kind::PROMOTE => heard.promotes.push(from_bytes(&body).unwrap()),
                kind::VERDICT => heard.verdicts.push(from_bytes(&body).unwrap()),
                kind::REFUSED => heard.refused = from_bytes(&body),
                kind::CALLER if from_bytes::<Caller>(&body).unwrap().question == MARK => break,
                kind::CALLER | kind::REACHED | kind::NOT_FOUND | kind::ANSWER => heard.answers += 1,
                other => panic!("{other}"),
            }
        }
        self.lies += 1;
        let outcome = match &heard {
            Heard { closed: true, .. } => "cut off",
            heard if !heard.promotes.is_empty() => "promoted",
            heard if !heard.verdicts.is_empty() => "turned down",
            heard if heard.answers > 0 => "answered",
            _ => "ignored",
        };
        *self.outcomes.entry(outcome).or_default() += 1;
        heard
    }

    /// Values for a field that are not the true one.
    fn lies(&self, field: &Field, truth: &[u8]) -> Vec<Vec<u8>> {
        let size = field.size;
        let word = |bytes: &[u8]| {
            let mut word = [0; 8];
            let len = bytes.len().min(8);
            word[..len].copy_from_slice(&bytes[..len]);
            u64::from_ne_bytes(word)
        };
        let mut lies = vec![vec![0; size], vec![0xff; size]];
        let mut numbers = vec![
            word(truth).wrapping_add(1),
            word(truth).wrapping_sub(1),
            word(truth) ^ 1 << (8 * size.min(8) - 1),
        ];
        let like_victims = REQUEST
            .iter()
            .find(|other| (other.name, other.size) == (field.name, size));
        if let Some(same) = like_victims {
            for victim in &self.victims {
                lies.push(bytes_of(victim)[same.offset..][..size].to_vec());
            }
            // The other end's of its own connection.
            let other = announcement(1, self.generation, &self.sockets[1], 0);
            lies.push(bytes_of(&other)[same.offset..][..size].to_vec());
        }
        match field.name {
            "fd" => numbers.extend([0, 1, self.ends[0].socket.as_raw_fd() as u64]),
            "local_port" | "peer_port" => numbers.extend([65_536, 1]),
            "generation" => numbers.push(u64::from(self.generation - 1)),
            "conn" => numbers.extend([CONN_RECORDS as u64, CONN_RECORDS as u64 - 1]),
            _ => {}
        }
        for number in numbers {
            let mut lie = truth.to_vec();
            let len = size.min(8);
            lie[..len].copy_from_slice(&number.to_ne_bytes()[..len]);
            lies.push(lie);
        }
        lies.sort();
        lies.dedup();
        lies.retain(|lie| lie != truth);
        lies
    }

    fn lie_in_request(&mut self, name: &str, what: u32) {
        for field in REQUEST {
            for number in 0.. {
                let stream = match what {
                    request::ANNOUNCE | request::LISTENS => {
                        self.renew();
                        self.announce(1);
                        0
                    }
                    _ => self.promoted().stream_id,
                };
                let truth = Request {
                    what,
                    stream_id: stream,
                    active: if what == request::HOLDS { 0 } else { 1 },
                    ..announcement(0, self.generation, &self.sockets[0], 1)
                };
                let place = field.offset..field.offset + field.size;
                let lies = self.lies(field, &bytes_of(&truth)[place.clone()]);
                let Some(lie) = lies.get(number) else { break };
                let mut bytes = bytes_of(&truth).to_vec();
                bytes[place].copy_from_slice(lie);
                let told: Request = from_bytes(&bytes).unwrap();
                let before = self.counters();
                self.ends[0].ask_for(&told);
                let heard = self.hear();
                let context = format!("{name}, {} = {lie:02x?}", field.name);
                self.check_request(&told, field.name, &heard, &before, &context);
                self.quiet_accomplice();
            }
        }
    }

    /// What the other end was told in the meantime does not matter.
    fn quiet_accomplice(&mut self) {
        use nix::sys::socket::{MsgFlags, recv};
        let mut buffer = [0; 256];
        let socket = self.ends[1].socket.as_raw_fd();
        while recv(socket, &mut buffer, MsgFlags::MSG_DONTWAIT).is_ok_and(|len| len > 0) {}
    }

    fn check_request(
        &mut self,
        told: &Request,
        field: &str,
        heard: &Heard,
        before: &Value,
        context: &str,
    ) {
        assert!(!heard.closed, "{context}: {heard:?}");
        let named = heard
            .verdicts
            .iter()
            .map(|verdict| (verdict.conn, verdict.generation))
            .chain(
                heard
                    .promotes
                    .iter()
                    .map(|promote| (promote.conn, promote.generation)),
            );
        for name in named {
            let own = [
                (told.conn, told.generation),
                (0, self.generation),
                (0, self.generation - 1),
            ];
            assert!(own.contains(&name), "{context}: {heard:?}");
        }
        // What the daemon does not have to believe: the tenant's own numbers, and what is unused.
        let harmless = ["what", "conn", "generation", "active", "extra", "reserved"];
        // A kernel without SO_NETNS_COOKIE: the tenant's own namespace is meant.
        let own_namespace = field == "netns" && told.netns == 0;
        if told.what == request::ANNOUNCE && !harmless.contains(&field) && !own_namespace {
            assert!(heard.promotes.is_empty(), "{context}: {heard:?}");
            assert!(!heard.verdicts.is_empty(), "{context}: no answer");
            let counted = ["unverified", "turned_down", "bad_requests"];
            self.check_counted(before, &counted, context);
        }
        for promote in &heard.promotes {
            assert!(
                self.victims
                    .iter()
                    .all(|victim| victim.stream_id != promote.stream_id),
                "{context}: {heard:?}"
            );
        }
        if told.what == request::HOLDS
            && ["fd", "stream_id", "active"].contains(&field)
            && told.conn < CONN_RECORDS as u32
        {
            self.check_counted(before, &["unverified"], context);
        }
        let unknown = told.conn >= CONN_RECORDS as u32
            || !REQUESTS.iter().any(|(_, what)| *what == told.what);
        if unknown {
            self.check_counted(before, &["bad_requests"], context);
        }
    }

    fn check_counted(&self, before: &Value, names: &[&str], context: &str) {
        let now = self.counters();
        let rose = |name: &&str| now[*name].as_u64() > before[*name].as_u64();
        assert!(names.iter().any(rose), "{context}: none of {names:?} rose");
    }

    /// A message that says the truth, with its descriptors.
    fn truth(&mut self, kind: u16) -> (Vec<u8>, Vec<OwnedFd>) {
        let own = announcement(0, self.generation, &self.sockets[0], 1);
        let between = Between {
            question: 5,
            netns: own.netns,
            local: own.local,
            peer: own.peer,
            local_port: own.local_port,
            peer_port: own.peer_port,
            fd: own.fd,
            reserved: 0,
        };
        let message = match kind {
            kind::HELLO => Message::new(
                kind,
                &Hello {
                    memory_size: size_of::<TenantMemory>() as u64,
                    bell_size: size_of::<BellBoard>() as u64,
                },
            ),
            kind::ATTACHED => Message::new(
                kind,
                &Attached {
                    address: self.ends[0].memory.map.as_ptr() as u64,
                },
            ),
            kind::LOOKUP => {
                let Request {
                    conn,
                    generation,
                    cookie,
                    fd,
                    ..
                } = own;
                Message::new(
                    kind,
                    &Lookup {
                        conn,
                        generation,
                        cookie,
                        fd,
                        reserved: 0,
                    },
                )
            }
            kind::REACH | kind::WHOIS => Message::new(kind, &between),
            kind::QUERY => Message::new(
                kind,
                &Query {
                    what: question::WHY,
                    pid: 0,
                },
            ),
            _ => Message::empty(kind),
        };
        let fds = match kind {
            kind::HELLO => vec![tenant::Memory::new().bells.into()],
            kind::ADOPT => vec![seqpacket().0],
            _ => Vec::new(),
        };
        (message.as_bytes().to_vec(), fds)
    }

    /// Each field of the body, then head, length and descriptors.
    fn lie_in_message(&mut self, row: &'static Row) {
        let head: Vec<Field> = HEAD.to_vec();
        let behind = size(HEAD);
        let body = row.body.iter().map(|field| Field {
            offset: field.offset + behind,
            ..*field
        });
        for field in head.into_iter().chain(body) {
            for number in 0.. {
                self.ready_for(row);
                let (truth, fds) = self.truth(row.kind);
                let place = field.offset..field.offset + field.size;
                let lies = self.lies(&field, &truth[place.clone()]);
                let Some(lie) = lies.get(number) else { break };
                let mut told = truth.clone();
                told[place].copy_from_slice(lie);
                let heard = self.say(&told, &raw(&fds));
                let context = format!("{}, {} = {lie:02x?}", row.name, field.name);
                self.check_message(row, &field, &told, &heard, &context);
            }
        }
        self.lie_in_length(row);
        self.lie_in_descriptors(row);
    }

    /// A stranger for HELLO, one that was sent its memory for ATTACHED, else a tenant with a connection on rings.
    fn ready_for(&mut self, row: &Row) {
        match row.kind {
            kind::HELLO => self.ends[0] = Tenant::at(&self.daemon).unwrap(),
            kind::ATTACHED => self.ends[0] = self.greeted(),
            _ => {
                self.promoted();
            }
        }
    }

    /// A caller that has mapped its memory, and did not say so.
    fn greeted(&self) -> Tenant {
        let mut caller = Tenant::at(&self.daemon).unwrap();
        caller.hello();
        match caller.receive_only() {
            Answer::Message(kind::WELCOME, _, mut fds) => {
                caller.memory.take(fds.remove(0));
            }
            other => panic!("not welcome: {other:?}"),
        }
        caller
    }

    fn check_message(
        &mut self,
        row: &Row,
        field: &Field,
        told: &[u8],
        heard: &Heard,
        context: &str,
    ) {
        let refused = heard.refused.map(|refused| refused.code);
        match (row.kind, field.name) {
            (_, "magic") => assert_eq!(refused, Some(refusal::MALFORMED), "{context}"),
            (_, "version") => {
                let told = heard.refused.map(|refused| refused.expected);
                assert_eq!(refused, Some(refusal::VERSION), "{context}");
                assert_eq!(told, Some(VERSION), "{context}");
            }
            // What it then is decides.
            (_, "kind") => {}
            (kind::HELLO, _) => assert_eq!(refused, Some(refusal::MEMORY), "{context}"),
            // Some other address within the mapping is as good.
            (kind::ATTACHED, _) => {
                let attached: Attached = from_bytes(&told[size(HEAD)..]).unwrap();
                let map = &self.ends[0].memory.map;
                let place = attached.address.wrapping_sub(map.as_ptr() as u64);
                let is_there = place < map.len() as u64;
                let expected = (!is_there).then_some(refusal::IDENTITY);
                assert_eq!(refused, expected, "{context}");
            }
            (kind::LOOKUP, "cookie" | "fd") => {
                assert!(heard.promotes.is_empty(), "{context}: {heard:?}");
                assert_eq!(heard.answers, 1, "{context}: {heard:?}");
            }
            (kind::LOOKUP, _) => {
                let lookup: Lookup = from_bytes(&told[size(HEAD)..]).unwrap();
                let named: Vec<_> = heard
                    .promotes
                    .iter()
                    .map(|promote| (promote.conn, promote.generation))
                    .collect();
                let asked = (lookup.conn, lookup.generation);
                assert!(named.iter().all(|name| *name == asked), "{context}");
                assert_eq!(named.len() + heard.answers, 1, "{context}: {heard:?}");
            }
            (kind::QUERY, "what") => {
                let what = u32::from_ne_bytes(told[8..12].try_into().unwrap());
                let known = [question::WHY, question::STAT].contains(&what);
                assert_eq!(refused.is_some(), !known, "{context}");
            }
            _ => assert!(!heard.closed && heard.answers > 0, "{context}: {heard:?}"),
        }
    }

    fn lie_in_length(&mut self, row: &'static Row) {
        for change in [-8, -1, 1, 8, 100, 1000] {
            self.ready_for(row);
            let (mut bytes, fds) = self.truth(row.kind);
            let length = (bytes.len() as i64 + change) as usize;
            bytes.resize(length, 0);
            let heard = self.say(&bytes, &raw(&fds));
            let refused = heard.refused.map(|refused| refused.code);
            let context = format!("{} of {length} bytes: {heard:?}", row.name);
            assert_eq!(refused, Some(refusal::MALFORMED), "{context}");
        }
    }

    /// One less, one more, twice the same, and the wrong sort.
    fn lie_in_descriptors(&mut self, row: &'static Row) {
        let expected = match row.kind {
            kind::HELLO => refusal::MEMORY,
            _ => refusal::MALFORMED,
        };
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let tcp = OwnedFd::from(tcp_pair().0);
        let stream = stream_pair().0;
        let others = [null.as_raw_fd(), tcp.as_raw_fd(), stream.as_raw_fd()];
        let mut lies: Vec<Vec<RawFd>> = Vec::new();
        let (_, fds) = self.truth(row.kind);
        let right = raw(&fds);
        lies.extend(others.map(|other| [&right[..], &[other]].concat()));
        for at in 0..right.len() {
            let mut fewer = right.clone();
            fewer.remove(at);
            // Who has no bell board yet brings none.
            if row.kind != kind::HELLO {
                lies.push(fewer);
            }
            for other in others.iter().chain(&right) {
                let mut wrong = right.clone();
                wrong[at] = *other;
                lies.push(wrong);
            }
        }
        lies.retain(|lie| *lie != right);
        for lie in lies {
            self.ready_for(row);
            let (bytes, _) = self.truth(row.kind);
            let heard = self.say(&bytes, &lie);
            let refused = heard.refused.map(|refused| refused.code);
            let context = format!("{} with {lie:?} for {right:?}", row.name);
            assert_eq!(refused, Some(expected), "{context}: {heard:?}");
        }
    }

    /// What only the daemon says.
    fn speak_as_the_daemon(&mut self, row: &Row) {
        for stranger in [true, false] {
            match stranger {
                true => self.ends[0] = Tenant::at(&self.daemon).unwrap(),
                false => {
                    self.promoted();
                }
            }
            let bytes = [bytes_of(&head(row.kind)), &vec![0; size(row.body)]].concat();
            let heard = self.say(&bytes, &[]);
            let refused = heard.refused.map(|refused| refused.code);
            let context = format!("{}: {heard:?}", row.name);
            assert_eq!(refused, Some(refusal::MALFORMED), "{context}");
        }
    }

    /// Before HELLO, and HELLO twice; requests before their time, after it, and twice.
    fn lie_in_order(&mut self) {
        let early = [
            kind::KICK,
            kind::LOOKUP,
            kind::ADOPT,
            kind::REACH,
            kind::WHOIS,
            kind::ATTACHED,
        ];
        for kind in early {
            self.ready_for(row(kind::HELLO).unwrap());
            let (bytes, fds) = self.truth(kind);
            let heard = self.say(&bytes, &raw(&fds));
            let refused = heard.refused.map(|refused| refused.code);
            assert_eq!(refused, Some(refusal::MALFORMED), "{kind}: {heard:?}");
            // One that was sent its memory may ask for another connection (ADOPT), and for nothing else.
            if [kind::ADOPT, kind::ATTACHED].contains(&kind) {
                continue;
            }
            self.ends[0] = self.greeted();
            let (bytes, fds) = self.truth(kind);
            let heard = self.say(&bytes, &raw(&fds));
            let refused = heard.refused.map(|refused| refused.code);
            assert_eq!(
                refused,
                Some(refusal::MALFORMED),
                "{kind}, greeted: {heard:?}"
            );
        }
        self.promoted();
        let (bytes, fds) = self.truth(kind::ATTACHED);
        let heard = self.say(&bytes, &raw(&fds));
        assert!(heard.closed, "ATTACHED twice: {heard:?}");
        self.promoted();
        let (bytes, fds) = self.truth(kind::HELLO);
        let heard = self.say(&bytes, &raw(&fds));
        assert!(heard.closed, "HELLO twice: {heard:?}");
        for (name, what) in REQUESTS {
            for twice in [false, true] {
                self.renew();
                let told = Request {
                    what: *what,
                    ..announcement(0, self.generation, &self.sockets[0], 1)
                };
                for _ in 0..1 + i32::from(twice) {
                    self.ends[0].ask_for(&told);
                }
                let heard = self.hear();
                assert!(heard.promotes.is_empty(), "{name} alone: {heard:?}");
                assert!(!heard.closed, "{name} alone: {heard:?}");
            }
        }
        self.announce_after_the_end();
    }

    /// A generation that is over, a socket that is on rings already, one that is closed.
    fn announce_after_the_end(&mut self) {
        let promote = self.promoted();
        let again = announcement(3, self.generation, &self.sockets[0], 1);
        self.ends[0].ask_for(&again);
        let heard = self.hear();
        assert!(heard.promotes.is_empty(), "on rings already: {heard:?}");
        assert_eq!(heard.verdicts.len(), 1, "on rings already: {heard:?}");
        let closed = Request {
            what: request::CLOSED,
            ..announcement(promote.conn, self.generation - 1, &self.sockets[0], 1)
        };
        self.ends[0].ask_for(&closed);
        self.hear();
        self.renew();
        self.ends[0].ask_for(&again);
        let heard = self.hear();
        assert!(heard.promotes.is_empty(), "closed: {heard:?}");
        assert_eq!(heard.verdicts.len(), 1, "closed: {heard:?}");
    }
}

fn zeroed<T: Pod>() -> T {
    from_bytes(&vec![0; size_of::<T>()]).unwrap()
}

fn raw(fds: &[OwnedFd]) -> Vec<RawFd> {
    fds.iter().map(AsRawFd::as_raw_fd).collect()
}

fn pair_of(kind: SockType) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

fn seqpacket() -> (OwnedFd, OwnedFd) {
    pair_of(SockType::SeqPacket)
}

fn stream_pair() -> (OwnedFd, OwnedFd) {
    pair_of(SockType::Stream)
}
