//! How long the daemon takes over others, and what it uses, while a test does something to it.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use rdsock_shm::control::{Message, Query, kind, parse, question};

use super::{Daemon, Tenant, tcp_pair};

/// An attack that is felt makes a question take a multiple of this. A busy machine does not.
const AT_LEAST: Duration = Duration::from_secs(1);
/// Rounds that tell what is usual.
const ROUNDS: usize = 20;

/// A question of somebody who has nothing to do with an attack.
pub struct Bystander {
    /// No answer may take longer.
    pub most: Duration,
}

impl Bystander {
    /// Measures what is usual.
    pub fn new(daemon: &Daemon) -> Self {
        let usual = (0..ROUNDS).map(|_| round(daemon, Duration::from_secs(10)).unwrap());
        Bystander {
            most: AT_LEAST.max(usual.max().unwrap() * 20),
        }
    }

    /// Asks again and again for so long; panics as soon as an answer takes longer than it may.
    pub fn goes_on(&self, daemon: &Daemon, what: &str, time: Duration) -> Duration {
        let mut longest = Duration::ZERO;
        let end = Instant::now() + time;
        while Instant::now() < end {
            longest = longest.max(self.asks(daemon, what));
            std::thread::sleep(Duration::from_millis(2));
        }
        longest
    }

    /// Asks once.
    pub fn asks(&self, daemon: &Daemon, what: &str) -> Duration {
        let most = self.most;
        let took = round(daemon, most);
        took.unwrap_or_else(|| panic!("{what}: no answer to `stat` within {most:?}"))
    }
}

/// The time of one question; `None` when the answer does not come in time.
fn round(daemon: &Daemon, most: Duration) -> Option<Duration> {
    let start = Instant::now();
    let caller = Tenant::stranger(daemon)?;
    let timeout = TimeVal::milliseconds(most.as_millis() as i64);
    setsockopt(&caller.socket, sockopt::ReceiveTimeout, &timeout).unwrap();
    let (what, pid) = (question::STAT, 0);
    caller.send(
        Message::new(kind::QUERY, &Query { what, pid }).as_bytes(),
        &[],
    );
    let mut bytes = vec![0; 70_000];
    loop {
        let len = nix::unistd::read(&caller.socket, &mut bytes).ok()?;
        let (kind, piece) = parse(&bytes[..len]).ok()?;
        assert_eq!(kind, kind::ANSWER);
        if piece.is_empty() {
            let took = start.elapsed();
            return (took <= most).then_some(took);
        }
    }
}

/// Two honest tenants that are there before an attack, and make one connection after the other.
pub struct Honest {
    client: Tenant,
    server: Tenant,
    made: u32,
}

impl Honest {
    pub fn new(daemon: &Daemon) -> Self {
        Self::at(&daemon.socket())
    }

    /// At the daemon with this socket.
    pub fn at(socket: &Path) -> Self {
        Honest {
            client: Tenant::attach_at(socket),
            server: Tenant::attach_at(socket),
            made: 0,
        }
    }

    /// One connection comes on rings. How long that took.
    pub fn promotion(&mut self) -> Duration {
        let (connector, accepted) = tcp_pair();
        self.made += 1;
        let start = Instant::now();
        self.client.announce(1, self.made, &connector, 1);
        self.server.announce(1, self.made, &accepted, 0);
        self.client.promote();
        self.server.promote();
        start.elapsed()
    }
}

impl Daemon {
    /// Megabytes of memory that it had at most.
    pub fn peak_megabytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = line.unwrap().trim().strip_suffix(" kB").unwrap();
        kilobytes.parse::<u64>().unwrap() / 1024
    }
}
