//! One fuzzing process: does what its dice say until it has sent its share of messages, and checks each
//! message that comes back. All that it makes is in tables of fixed length.

use std::fs::File;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use rdsock_shm::control::{
    Caller, Hello, Message, NotFound, Promote, Reached, Verdict, from_bytes, kind, parse,
};
use rdsock_shm::layout::{BellBoard, TenantMemory};

use crate::dice::Dice;
use crate::party::{Link, Party, receive, send};
use crate::sockets::{Socket, Sockets};
use crate::speech::Knowledge;
use crate::stock::{Stock, linger, lingering};
use crate::table::row;

const LINKS: usize = 20;
const PARTIES: usize = 8;
/// Descriptors that the process allows itself. It needs about two hundred.
const DESCRIPTORS: u64 = 600;
/// Copies of control sockets that live on behind the link.
const COPIES: usize = 4;
/// Requests put in a row.
const BURST: usize = 32;
/// Datagrams sent in a row.
const WORDS: usize = 32;
/// Most descriptors beside one message.
const MOST_BESIDE: usize = 253;

/// For whoever looks for a failing step.
pub static STEP: AtomicU64 = AtomicU64::new(0);

/// What it did. Messages count that the daemon took.
#[derive(Default)]
pub struct Tally {
    pub datagrams: u64,
    pub requests: u64,
    pub links: u64,
    pub read: u64,
    pub promoted: u64,
    pub verdicts: u64,
    pub refused: u64,
}

/// See the module's text.
pub struct Worker {
    dice: Dice,
    daemon: PathBuf,
    stock: Stock,
    sockets: Sockets,
    parties: Vec<Party>,
    links: Vec<Link>,
    copies: Vec<OwnedFd>,
    lingering: Option<(u64, TcpStream)>,
    /// To the fuzzer beside this one: they give each other what they hold.
    partner: Option<OwnedFd>,
    known: Knowledge,
    victims: Vec<rdsock_shm::control::Request>,
    tally: Tally,
}

impl Worker {
    pub fn new(seed: u64, daemon: PathBuf, partner: Option<OwnedFd>) -> Self {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS);
        Worker {
            dice: Dice::new(seed),
            daemon,
            stock: Stock::new(),
            sockets: Sockets::new(),
            parties: (0..PARTIES).map(|_| Party::new()).collect(),
            links: Vec::new(),
            copies: Vec::new(),
            lingering: None,
            partner,
            known: Knowledge::default(),
            victims: Vec::new(),
            tally: Tally::default(),
        }
    }

    /// Announcements of others, whose connections it may not get.
    pub fn covet(&mut self, victims: Vec<rdsock_shm::control::Request>) {
        for victim in &victims {
            self.known.learn(victim.cookie);
            self.known.learn(victim.stream_id);
        }
        self.victims = victims;
    }

    /// Sends so many messages.
    pub fn run(mut self, messages: u64) -> Tally {
        while self.tally.datagrams + self.tally.requests < messages {
            let step = STEP.fetch_add(1, Ordering::Relaxed);
            self.step();
            if step.is_multiple_of(4096) {
                self.check_itself();
            }
        }
        self.tally
    }

    fn step(&mut self) {
        match self.dice.below(128) {
            0..=29 => self.ask(),
            30..=89 => self.say(),
            90..=97 => self.listen(),
            98..=109 => self.open(),
            110..=113 => self.close(),
            114 => self.scribble(),
            115..=119 => self.sockets.make(&mut self.dice),
            120..=121 => self.sockets.replace_one(&mut self.dice),
            122 => self.sockets.close_one(&mut self.dice),
            123..=124 => self.give(),
            125..=126 => self.take(),
            _ => self.copy(),
        }
        if let Some((since, _)) = &self.lingering
            && STEP.load(Ordering::Relaxed) > since + 20_000
        {
            self.lingering = None;
        }
    }

    /// The process is within its own bounds.
    fn check_itself(&self) {
        let open = std::fs::read_dir("/proc/self/fd").unwrap().count();
        assert!((open as u64) < DESCRIPTORS / 2, "{open} descriptors");
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
        assert!(pages * 4096 < 1 << 30, "{pages} pages of memory");
    }

    fn open(&mut self) {
        if self.links.len() >= LINKS {
            self.close();
        }
        let Some(link) = Link::open(&self.daemon, &mut self.dice) else {
            return std::thread::yield_now();
        };
        self.tally.links += 1;
        self.links.push(link);
        if !self.dice.once_in(8) {
            self.greet(self.links.len() - 1);
        }
    }

    /// Sends a HELLO, mostly a right one.
    fn greet(&mut self, link: usize) {
        let number = self.dice.below(PARTIES);
        let used = self.links.iter().any(|link| link.party == Some(number));
        if used && !self.dice.once_in(8) {
            return;
        }
        let party = &self.parties[number];
        if !used && (party.is_worn() || party.is_attached) {
            self.parties[number] = Party::new();
        }
        let hello = Hello {
            memory_size: size_of::<TenantMemory>() as u64,
            bell_size: size_of::<BellBoard>() as u64,
        };
        let mut bytes = Message::new(kind::HELLO, &hello).as_bytes().to_vec();
        let memory = &self.parties[number].memory;
        let mut fds = vec![memory.bells.as_raw_fd()];
        if self.dice.once_in(16) {
            let field = self.dice.one_of(row(kind::HELLO).unwrap().body).unwrap();
            let place = &mut bytes[8 + field.offset..][..field.size];
            self.dice.lie(place, &self.known.words);
        }
        match self.dice.below(32) {
            0 | 1 => fds[0] = self.stock.any(&mut self.dice),
            2 => fds.clear(),
            3 => fds.push(self.stock.any(&mut self.dice)),
            _ => {}
        }
        if self.send_on(link, &bytes, &fds) && self.links[link].party.is_none() {
            self.links[link].party = Some(number);
        }
        self.settle(link);
        // Mostly it says at once that it has mapped its memory. Else it does when it listens next.
        if !self.dice.once_in(8) {
            self.await_welcome(link);
        }
    }

    /// Gives way until there is something to hear.
    fn await_welcome(&mut self, link: usize) {
        let Some(link_there) = self.links.get(link) else {
            return;
        };
        if link_there.foreign || !link_there.has_message_soon() {
            return;
        }
        self.hear_out(link);
    }

    /// Sends on a link; forgets the link when the daemon has hung up.
    fn send_on(&mut self, link: usize, bytes: &[u8], fds: &[RawFd]) -> bool {
        match self.links[link].send(bytes, fds) {
            Ok(_) => {
                self.links[link].sent += 1;
                return true;
            }
            Err(nix::errno::Errno::EPIPE | nix::errno::Errno::ECONNRESET) => {
                self.hear_out(link);
                self.links.swap_remove(link);
            }
            Err(nix::errno::Errno::EAGAIN) => std::thread::yield_now(),
            // Too much is under way, or what is passed can't be.
            Err(_) => {}
        }
        false
    }

    fn some_link(&mut self) -> Option<usize> {
        (!self.links.is_empty()).then(|| self.dice.below(self.links.len()))
    }

    fn aim(&mut self) {
        self.known.truth = match self.dice.below(16) {
            0 => self.dice.one_of(&self.victims).copied(),
            _ => self.sockets.any(&mut self.dice).map(|socket| socket.truth),
        };
        if let Some(truth) = &self.known.truth
            && self.dice.once_in(4)
        {
            self.known.learn(truth.cookie);
        }
    }

    /// Puts requests into a queue.
    fn ask(&mut self) {
        let Some(link) = self.some_link() else { return };
        let Some(party) = self.links[link].party else {
            return;
        };
        for _ in 0..1 + self.dice.below(BURST) {
            self.aim();
            let request = self.known.request(&mut self.dice);
            if !self.parties[party].put(&request) {
                break;
            }
        }
        // Sometimes nobody is told, so that the queue is found full, or by the next KICK.
        if !self.dice.once_in(8) {
            self.send_on(link, Message::empty(kind::KICK).as_bytes(), &[]);
        }
        self.settle(link);
        self.tally.requests += self.parties[party].newly_taken();
    }

    /// Mostly, the daemon takes what was said before it goes on.
    fn settle(&mut self, link: usize) {
        if !self.dice.once_in(8)
            && let Some(link) = self.links.get_mut(link)
        {
            self.tally.datagrams += link.settle();
        }
    }

    /// Sends datagrams.
    fn say(&mut self) {
        let Some(mut link) = self.some_link() else {
            return;
        };
        if self.links[link].party.is_none() {
            // A stranger has little to say: mostly somebody else speaks.
            link = self.some_link().unwrap_or(link);
        }
        for _ in 0..1 + self.dice.below(WORDS) {
            if link >= self.links.len() {
                return;
            }
            self.aim();
            let (row, bytes) = self.known.datagram(&mut self.dice);
            if self.dice.once_in(10_000) && self.lingering.is_none() {
                self.send_lingering(link, &bytes);
                continue;
            }
            let fds = match row.kind {
                kind::HELLO => {
                    self.greet_with(link, &bytes);
                    continue;
                }
                kind::ADOPT if !self.dice.once_in(8) => {
                    self.adopt(link, &bytes);
                    continue;
                }
                _ if self.dice.once_in(64) => self.beside(),
                _ => Vec::new(),
            };
            let party = self.links[link].party;
            if let Some(party) = party.filter(|_| !self.links[link].foreign) {
                self.parties[party].note(&bytes);
            }
            self.send_on(link, &bytes, &fds);
        }
        self.settle(link);
    }

    /// Sends a HELLO of these bytes, at any time.
    fn greet_with(&mut self, link: usize, bytes: &[u8]) {
        let number = self.dice.below(PARTIES);
        let memory = &self.parties[number].memory;
        let fds = [memory.bells.as_raw_fd()];
        if self.send_on(link, bytes, &fds) && self.links[link].party.is_none() {
            self.links[link].party = Some(number);
        }
    }

    /// Descriptors of all sorts.
    fn beside(&mut self) -> Vec<RawFd> {
        let count = match self.dice.below(16) {
            0 => MOST_BESIDE,
            1 => self.dice.below(MOST_BESIDE),
            _ => 1 + self.dice.below(4),
        };
        (0..count)
            .map(|_| match self.dice.below(8) {
                0 => {
                    let party = self.dice.below(PARTIES);
                    self.parties[party].memory.tenant.as_raw_fd()
                }
                1 => match self.sockets.any(&mut self.dice) {
                    Some(socket) => socket.stream.as_raw_fd(),
                    None => self.stock.any(&mut self.dice),
                },
                // A control connection, maybe inside itself.
                2 => match self.dice.one_of(&self.links) {
                    Some(link) => link.socket.as_raw_fd(),
                    None => self.stock.any(&mut self.dice),
                },
                _ => self.stock.any(&mut self.dice),
            })
            .collect()
    }

    /// A socket that its last owner has to wait for: the daemon, if it is careless.
    fn send_lingering(&mut self, link: usize, bytes: &[u8]) {
        let (connector, accepted) = lingering();
        if !self.send_on(link, bytes, &[connector.as_raw_fd()]) {
            linger(&connector, 0);
        }
        self.lingering = Some((STEP.load(Ordering::Relaxed), accepted));
    }

    fn adopt(&mut self, link: usize, bytes: &[u8]) {
        let flags = SockFlag::SOCK_CLOEXEC;
        let kind = SockType::SeqPacket;
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
        if !self.dice.once_in(8) {
            setsockopt(&theirs, sockopt::PassCred, &true).unwrap();
        }
        if self.send_on(link, bytes, &[theirs.as_raw_fd()]) && self.links.len() < LINKS {
            self.links.push(Link::over(ours, &mut self.dice));
            self.greet(self.links.len() - 1);
        }
    }

    fn close(&mut self) {
        let Some(link) = self.some_link() else { return };
        if self.dice.once_in(2) {
            self.hear_out(link);
        }
        self.links.swap_remove(link);
    }

    fn scribble(&mut self) {
        if self.dice.once_in(4) {
            let party = self.dice.below(PARTIES);
            self.parties[party].scribble(&mut self.dice);
        }
    }

    /// A copy of a control socket keeps its connection alive when the link is dropped.
    fn copy(&mut self) {
        let Some(link) = self.some_link() else { return };
        if self.copies.len() >= COPIES {
            self.copies.swap_remove(self.dice.below(COPIES));
        }
        if let Ok(copy) = self.links[link].socket.try_clone() {
            self.copies.push(copy);
        }
    }

    /// Gives the fuzzer beside this one a TCP socket or a control connection; keeps it or not.
    fn give(&mut self) {
        let Some(partner) = self.partner.as_ref().map(AsRawFd::as_raw_fd) else {
            return;
        };
        if self.dice.once_in(2) {
            let Some(link) = self.some_link() else { return };
            let _ = send(partner, &[0; 16], &[self.links[link].socket.as_raw_fd()]);
            return;
        }
        let Some(socket) = self.sockets.take(&mut self.dice) else {
            return;
        };
        let Socket { pair, active, .. } = socket;
        let text = [pair.to_ne_bytes(), u64::from(active + 1).to_ne_bytes()].concat();
        let _ = send(partner, &text, &[socket.stream.as_raw_fd()]);
        if self.dice.once_in(2) {
            self.sockets
                .hold(socket.stream, pair, active, &mut self.dice);
        }
    }

    fn take(&mut self) {
        let Some(partner) = self.partner.as_ref().map(AsRawFd::as_raw_fd) else {
            return;
        };
        let mut text = [0; 16];
        for _ in 0..4 {
            let Ok((16, mut fds)) = receive(partner, &mut text) else {
                return;
            };
            let Some(fd) = fds.pop() else { return };
            let word = |at: usize| u64::from_ne_bytes(text[at..at + 8].try_into().unwrap());
            match word(8) {
                0 if self.links.len() < LINKS => {
                    let foreign = true;
                    let link = Link::over(fd, &mut self.dice);
                    self.links.push(Link { foreign, ..link });
                }
                0 => {}
                active => {
                    let stream = TcpStream::from(fd);
                    self.sockets
                        .hold(stream, word(0), (active - 1) as u32, &mut self.dice);
                }
            }
        }
    }

    /// Reads what has come on some link.
    fn listen(&mut self) {
        if let Some(link) = self.some_link()
            && !self.links[link].deaf
        {
            self.hear_out(link);
        }
    }

    fn hear_out(&mut self, link: usize) {
        if self.links[link].foreign {
            return;
        }
        let mut buffer = vec![0; 70_000];
        let socket = self.links[link].socket.as_raw_fd();
        let party = self.links[link].party;
        while let Ok((len, mut fds)) = receive(socket, &mut buffer) {
            if len == 0 {
                return;
            }
            self.tally.read += 1;
            let welcome = matches!(parse(&buffer[..len]), Ok((kind::WELCOME, _)));
            if let (true, Some(number)) = (welcome, party)
                && !fds.is_empty()
            {
                self.take_memory(link, number, fds.remove(0));
            }
            self.check(party, &buffer[..len], fds);
        }
    }

    /// Maps the memory that came with a WELCOME, and mostly says so, and mostly the truth. It counts as the party's, whoever else
    /// uses that.
    fn take_memory(&mut self, link: usize, number: usize, file: OwnedFd) {
        let attached = self.parties[number].take(file);
        let mut bytes = attached.as_bytes().to_vec();
        if self.dice.once_in(32) {
            self.dice.lie(&mut bytes[8..], &self.known.words);
        }
        if !self.dice.once_in(32) {
            let _ = self.links[link].send(&bytes, &[]);
        }
    }

    /// A message names only what was asked for.
    fn check(&mut self, party: Option<usize>, bytes: &[u8], fds: Vec<OwnedFd>) {
        let (kind, body) = parse(bytes).expect("the daemon sends messages only");
        let most = match kind {
            kind::PROMOTE => 3,
            // And the memory, which was taken.
            kind::WELCOME => 1,
            _ => 0,
        };
        assert!(fds.len() <= most, "{} fds beside {kind}", fds.len());
        let party = party.map(|party| &self.parties[party]);
        let known = |party: &Party, conn, generation| {
            party.scribbled || party.claims(conn, generation).is_some()
        };
        match kind {
            kind::PROMOTE => {
                let promote: Promote = from_bytes(body).expect("a PROMOTE's length");
                self.check_promote(party.expect("a PROMOTE to a stranger"), promote, fds);
                self.known.learn(promote.stream_id);
                self.tally.promoted += 1;
            }
            kind::VERDICT => {
                let verdict: Verdict = from_bytes(body).expect("a VERDICT's length");
                let party = party.expect("a VERDICT for a stranger");
                assert!(
                    known(party, verdict.conn, verdict.generation),
                    "never asked for: {verdict:?}"
                );
                self.tally.verdicts += 1;
            }
            kind::REACHED | kind::CALLER => {
                let reached = from_bytes::<Reached>(body).map(|reached| reached.question);
                let caller = from_bytes::<Caller>(body).map(|caller| caller.question);
                let question = reached.or(caller).expect("the length of an answer");
                let party = party.expect("an answer to a stranger");
                assert!(party.asked(question), "never asked: {question}");
            }
            kind::REFUSED => self.tally.refused += 1,
            kind::WELCOME => assert!(party.is_some(), "a WELCOME without a HELLO"),
            kind::NOT_FOUND => {
                let not_found: NotFound = from_bytes(body).expect("the length of NOT_FOUND");
                assert!(party.is_some(), "an answer to a stranger: {not_found:?}");
            }
            kind::ANSWER => {}
            _ => panic!("the daemon sends a message of kind {kind}"),
        }
    }

    /// The stream is of a socket that this process holds, or held, and its other end of the same
    /// connection: both ends write down which.
    fn check_promote(&self, party: &Party, promote: Promote, fds: Vec<OwnedFd>) {
        assert!((2..=3).contains(&fds.len()), "{promote:?}");
        assert!(promote.end < 2, "{promote:?}");
        if party.scribbled {
            return;
        }
        let claims = party
            .claims(promote.conn, promote.generation)
            .unwrap_or_else(|| panic!("never asked for: {promote:?}"));
        let mut pairs: Vec<u64> = claims
            .iter()
            .filter_map(|(fd, cookie)| self.sockets.pair_of(*fd, *cookie))
            .collect();
        pairs.dedup();
        assert!(
            !pairs.is_empty(),
            "a stream of a socket that it never held: {promote:?}, announced as {claims:?}"
        );
        if promote.node != 0 {
            return;
        }
        let memory = File::from(fds.into_iter().next().unwrap());
        let at = |end: u32| promote.data_offset + 64 * u64::from(end);
        if let [pair] = pairs[..] {
            memory
                .write_all_at(&pair.to_ne_bytes(), at(promote.end))
                .unwrap();
        }
        let mut other = [0; 8];
        memory
            .read_exact_at(&mut other, at(1 - promote.end))
            .unwrap();
        let other = u64::from_ne_bytes(other);
        assert!(
            other == 0 || pairs.contains(&other),
            "the other end is of connection {other}, this one of {pairs:?}: {promote:?}"
        );
    }
}

/// The partner's socket, by the number that the parent has left it at.
pub fn inherited(number: RawFd) -> OwnedFd {
    // SAFETY: the parent has opened it for this process alone, which uses it nowhere else.
    unsafe { OwnedFd::from_raw_fd(number) }
}

const _: () = assert!(size_of::<rdsock_shm::control::Head>() == 8);
