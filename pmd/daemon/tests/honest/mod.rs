//! Honest programs beside hostile ones: they are served all the time, keep what they have, and know how
//! much the daemon used before. And what it takes to run the hostile ones in processes of other users.

#![allow(dead_code, reason = "each test uses a part")]

use std::fmt;
use std::fs::File;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, recv};
use nix::unistd::{Gid, Uid, geteuid, setgid, setuid};
use rdsock_shm::control::{Promote, Request, bytes_of, from_bytes, request as what};

use crate::tenant::{Daemon, Tenant, announcement, request, tcp_pair};

/// What the daemon may have taken for good: what its allocator keeps for the next time.
const KEPT: u64 = 64 << 20;
/// Until what was given up is given back: a process on its way out is looked at again within seconds.
const SETTLE: Duration = Duration::from_secs(60);
/// What the victims' rings hold.
const MARK: &[u8; 16] = b"theirs, and kept";

/// A pair of honest tenants with a connection on rings.
struct Pair {
    ends: [Tenant; 2],
    sockets: [TcpStream; 2],
    promotes: [Promote; 2],
    memories: [File; 2],
}

impl Pair {
    /// Gets a stream, and sees that each end was told of its own connection.
    fn promoted(mut ends: [Tenant; 2], turn: u32) -> Self {
        let (connector, accepted) = tcp_pair();
        let sockets = [connector, accepted];
        let (conn, generation) = (turn % 1000, turn + 1);
        ends[0].announce(conn, generation, &sockets[0], 1);
        ends[1].announce(conn + 1, generation, &sockets[1], 0);
        let mut end_of = |end: usize| {
            let (promote, mut fds) = ends[end].promote();
            assert_eq!(
                (promote.conn, promote.generation, promote.end),
                (conn + end as u32, generation, end as u32)
            );
            assert_eq!(fds.len(), 3);
            (promote, File::from(fds.remove(0)))
        };
        let ((a, first), (b, second)) = (end_of(0), end_of(1));
        assert_eq!(a.stream_id, b.stream_id);
        Pair {
            ends,
            sockets,
            promotes: [a, b],
            memories: [first, second],
        }
    }

    /// A byte goes through each ring.
    fn talk(&self, byte: u8) {
        for (end, promote) in self.promotes.iter().enumerate() {
            let at = promote.data_offset + end as u64 * promote.ring_size;
            let mut seen = [0];
            self.memories[end].write_all_at(&[byte], at).unwrap();
            self.memories[1 - end].read_exact_at(&mut seen, at).unwrap();
            assert_eq!(seen, [byte]);
        }
    }

    /// Gives the stream back.
    fn part(mut self) -> [Tenant; 2] {
        for (end, promote) in self.ends.iter_mut().zip(&self.promotes) {
            end.ask_for(&request(what::MAPPED, promote.conn, promote.generation));
        }
        drop(self.sockets);
        for (end, promote) in self.ends.iter_mut().zip(&self.promotes) {
            end.ask_for(&request(what::CLOSED, promote.conn, promote.generation));
        }
        self.ends
    }
}

/// See the module's text.
pub struct Honest {
    /// Their connection is what the fuzzers would like to have.
    victims: Pair,
    ends: Option<[Tenant; 2]>,
    turns: u32,
    slowest_answer: Duration,
    slowest_promotion: Duration,
}

impl Honest {
    pub fn new(daemon: &Daemon) -> Self {
        let attach = || [Tenant::attach(daemon), Tenant::attach(daemon)];
        let victims = Pair::promoted(attach(), 7);
        let at = victims.promotes[0].data_offset + 1000;
        victims.memories[0].write_all_at(MARK, at).unwrap();
        Honest {
            victims,
            ends: Some(attach()),
            turns: 0,
            slowest_answer: Duration::ZERO,
            slowest_promotion: Duration::ZERO,
        }
    }

    /// What the victims announced, with their stream, as text: see [`victims`].
    pub fn victims(&self) -> String {
        let ends = self.victims.sockets.iter().zip(&self.victims.promotes);
        let texts: Vec<String> = ends
            .map(|(socket, promote)| {
                let Promote {
                    conn, generation, ..
                } = *promote;
                let announced = Request {
                    stream_id: promote.stream_id,
                    ..announcement(conn, generation, socket, 1 - promote.end)
                };
                let bytes = bytes_of(&announced);
                bytes.iter().map(|byte| format!("{byte:02x}")).collect()
            })
            .collect();
        texts.join(",")
    }

    /// The daemon answers a question, and promotes a connection of tenants that are attached and of
    /// ones that attach now. A [`Tenant`] waits ten seconds for a message.
    pub fn turn(&mut self, daemon: &Daemon) {
        let started = Instant::now();
        daemon.stat();
        self.slowest_answer = self.slowest_answer.max(started.elapsed());
        let started = Instant::now();
        self.turns += 1;
        let fresh = || [Tenant::attach(daemon), Tenant::attach(daemon)];
        let ends = match self.turns % 8 {
            0 => fresh(),
            _ => self.ends.take().unwrap_or_else(fresh),
        };
        let pair = Pair::promoted(ends, self.turns);
        self.slowest_promotion = self.slowest_promotion.max(started.elapsed());
        pair.talk(self.turns as u8);
        self.ends = Some(pair.part());
    }

    /// Nobody took or touched the victims' stream, and nothing was said to them.
    pub fn check_victims(&mut self) {
        for (memory, promote) in self.victims.memories.iter().zip(&self.victims.promotes) {
            let mut found = [0; MARK.len()];
            let at = promote.data_offset;
            memory.read_exact_at(&mut found, at + 1000).unwrap();
            assert_eq!(&found, MARK, "somebody wrote to the victims' stream");
            memory.read_exact_at(&mut found, at).unwrap();
            assert_eq!(found, [0; 16], "somebody wrote to the victims' stream");
        }
        self.victims.talk(200);
        for end in &self.victims.ends {
            let mut buffer = [0; 256];
            let socket = end.socket.as_raw_fd();
            let more = recv(socket, &mut buffer, MsgFlags::MSG_DONTWAIT);
            assert!(more.is_err(), "the victims were told something: {buffer:?}");
        }
    }
}

impl fmt::Display for Honest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (answer, promotion) = (self.slowest_answer, self.slowest_promotion);
        let turns = self.turns;
        write!(
            f,
            "{turns} honest turns, slowest answer {answer:.1?}, slowest promotion {promotion:.1?}"
        )
    }
}

/// What the daemon uses.
pub struct Level {
    descriptors: usize,
    threads: u64,
    resident: u64,
    streams: u64,
    waiting: u64,
    tenants: u64,
}

impl Level {
    fn of(daemon: &Daemon) -> Self {
        let stat = daemon.stat();
        let now = |name: &str| stat[name].as_u64().unwrap();
        let path = format!("/proc/{}/status", daemon.pid());
        let status = std::fs::read_to_string(path).unwrap();
        let line = |name: &str| -> u64 {
            let rest = status.lines().find_map(|line| line.strip_prefix(name));
            let word = rest.unwrap().split_whitespace().next();
            word.unwrap().parse().unwrap()
        };
        Level {
            descriptors: daemon.descriptors(),
            threads: line("Threads:"),
            resident: line("VmRSS:") * 1024,
            streams: now("streams_now"),
            waiting: now("waiting_now"),
            tenants: now("tenants_now"),
        }
    }

    /// When the streams of the turns so far are given back.
    pub fn settled(daemon: &Daemon) -> Self {
        daemon.wait_until("only the victims have a stream", |stat| {
            stat["streams_now"] == 1
        });
        // What was closed just before is given back by and by.
        let mut level = Self::of(daemon);
        let mut same = 0;
        while same < 3 {
            std::thread::sleep(Duration::from_millis(20));
            let now = Self::of(daemon);
            let unchanged = now.descriptors == level.descriptors;
            same = if unchanged { same + 1 } else { 0 };
            level = now;
        }
        level
    }

    /// Waits until the daemon uses no more than before; returns what it uses then. The one caller that
    /// asks is there in both.
    pub fn is_reached_again(&self, daemon: &Daemon) -> Self {
        self.is_reached_again_but(daemon, 0)
    }

    /// Likewise, and so many tenants are gone that were there before.
    pub fn is_reached_again_but(&self, daemon: &Daemon, gone: u64) -> Self {
        let end = Instant::now() + SETTLE;
        loop {
            let now = Self::of(daemon);
            let reached = now.descriptors <= self.descriptors
                && now.threads <= self.threads
                && now.resident <= self.resident + KEPT
                && (now.streams, now.waiting, now.tenants)
                    == (self.streams, self.waiting, self.tenants - gone);
            if reached {
                return now;
            }
            assert!(Instant::now() < end, "before {self}, and now {now}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "({} descriptors, {} threads, {} KiB, {} streams, {} waiting, {} tenants)",
            self.descriptors,
            self.threads,
            self.resident >> 10,
            self.streams,
            self.waiting,
            self.tenants
        )
    }
}

/// The announcements in a text of [`Honest::victims`]. Their `stream_id` is the victims' stream.
pub fn victims(text: &str) -> Vec<Request> {
    let byte = |text: &str| u8::from_str_radix(text, 16).ok();
    let request = |text: &str| {
        let digits = (0..text.len() / 2).map(|at| &text[2 * at..][..2]);
        from_bytes(&digits.map(byte).collect::<Option<Vec<u8>>>()?)
    };
    text.split(',').filter_map(request).collect()
}

/// Lets processes of other users reach the daemon's socket. Says loudly when there are none.
pub fn let_others_in(daemon: &Daemon) {
    if !geteuid().is_root() {
        println!("SKIPPED, NOTHING WAS CHECKED: tenants of other users, since this is not root");
    }
    let directory = daemon.socket().parent().unwrap().to_owned();
    let all_may_enter = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(directory, all_may_enter).unwrap();
}

/// As a program that this user has started.
pub fn become_user(user: u32) {
    if !geteuid().is_root() || user == 0 {
        return;
    }
    setgid(Gid::from_raw(user)).unwrap();
    setuid(Uid::from_raw(user)).unwrap();
    // SAFETY: takes integers only.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) };
}

/// A number in the environment.
pub fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}
