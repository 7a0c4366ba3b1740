//! Asks a daemon, and reads its answers.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use rdsock_shm::control::{Message, Query, Refused, from_bytes, kind, parse};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::find::{For, PATIENCE, Silent, listener_of, reach};

/// Longest datagram of an answer.
const PIECE: usize = 65536;
/// Longest answer: some hundred thousand streams. It may be a stranger's daemon that is asked.
const MOST: usize = 64 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Another version of tool and daemon.
    #[error("the daemon is of another version (it expects {0}): restart it, or use its own rdsock")]
    Version(u32),
    /// The daemon refused the question.
    #[error("the daemon refused the question (code {0}): see its log")]
    Refused(u32),
    /// It is stopped, or overloaded.
    #[error(transparent)]
    Silent(#[from] Silent),
    /// It hung up.
    #[error("the daemon at {} hung up: {}; see its log", .0.display(), .1.desc())]
    Gone(PathBuf, Errno),
    /// Its answer is longer than any is.
    #[error("the daemon's answer is longer than {} MB", MOST >> 20)]
    Endless,
    /// It answered with something else.
    #[error("the daemon's answer can't be read: {0}")]
    Unreadable(String),
}

/// A daemon that answers.
#[derive(Debug)]
pub struct Daemon {
    /// Its control socket.
    pub path: PathBuf,
    socket: OwnedFd,
}

impl Daemon {
    /// The daemon that a program would find.
    pub fn find() -> Result<Option<Self>, AskError> {
        let found = reach(For::Questions)?;
        Ok(found.map(|(path, socket)| Daemon { path, socket }))
    }

    fn failed(&self, error: Errno) -> AskError {
        match error {
            Errno::EAGAIN => AskError::Silent(Silent {
                path: self.path.clone(),
                pid: listener_of(&self.socket),
            }),
            error => AskError::Gone(self.path.clone(), error),
        }
    }

    /// Asks one of [`rdsock_shm::control::question`].
    pub fn ask<T: DeserializeOwned>(&self, what: u32) -> Result<T, AskError> {
        let fd = self.socket.as_raw_fd();
        let question = Message::new(kind::QUERY, &Query { what, pid: 0 });
        send(fd, question.as_bytes(), MsgFlags::MSG_NOSIGNAL)
            .map_err(|error| self.failed(error))?;
        let since = Instant::now();
        let mut text = Vec::new();
        let mut datagram = vec![0; PIECE];
        loop {
            let len = match recv(fd, &mut datagram, MsgFlags::empty()) {
                Ok(0) => return Err(self.failed(Errno::ECONNRESET)),
                // Each piece has its time, and so has the whole.
                Ok(_) if since.elapsed() > 4 * PATIENCE => return Err(self.failed(Errno::EAGAIN)),
                Ok(len) => len,
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(self.failed(error)),
            };
            let unreadable = |what: &str| AskError::Unreadable(what.to_owned());
            let (message, body) = parse(datagram.get(..len).unwrap_or(&[]))
                .map_err(|error| unreadable(&format!("{error:?}")))?;
            match message {
                kind::ANSWER if body.is_empty() => break,
                kind::ANSWER if text.len() + body.len() > MOST => return Err(AskError::Endless),
                kind::ANSWER => text.extend_from_slice(body),
                kind::REFUSED => {
                    let refused: Refused = from_bytes(body).ok_or(unreadable("a short refusal"))?;
                    return Err(match refused.code {
                        rdsock_shm::control::refusal::VERSION => {
                            AskError::Version(refused.expected)
                        }
                        code => AskError::Refused(code),
                    });
                }
                other => return Err(unreadable(&format!("a message of kind {other}"))),
            }
        }
        serde_json::from_slice(&text).map_err(|error| AskError::Unreadable(error.to_string()))
    }
}

/// The daemon's answer to WHY.
#[derive(Debug, Deserialize)]
pub struct WhyAnswer {
    /// The daemon itself.
    pub daemon: About,
    /// The tenants that this user may see.
    pub tenants: Vec<Tenant>,
    /// The nodes that the daemon knows.
    #[serde(default)]
    pub nodes: Vec<Node>,
}

/// A node.
#[derive(Clone, Debug, Deserialize)]
pub struct Node {
    /// Its id.
    pub id: u16,
    /// What people call it, if they do.
    pub name: String,
    /// Its networks, as `ADDRESS/PREFIX`.
    pub addresses: Vec<String>,
    /// It is the daemon's.
    pub own: bool,
    /// Connects to it are possible.
    pub up: bool,
}

/// The daemon itself.
#[derive(Debug, Deserialize)]
pub struct About {
    /// Its process.
    pub pid: i32,
}

/// An attached process.
#[derive(Debug, Deserialize)]
pub struct Tenant {
    /// Its process.
    pub pid: i32,
    /// What its program is called.
    pub program: String,
    /// What it says of its connections.
    pub connections: Vec<Record>,
}

/// A tenant's connection record, and what the daemon knows of it.
#[derive(Clone, Debug, Deserialize)]
pub struct Record {
    /// One of the connection's fds.
    pub fd: i32,
    /// Code of a [`rdsock_shm::reason::State`].
    pub state: u32,
    /// Code of a [`rdsock_shm::reason::Reason`].
    pub reason: u32,
    /// The stream, 0 for none that this daemon made.
    pub stream: u64,
    /// The stream that the tenant names.
    pub named_stream: u64,
    /// Addresses, when announced.
    pub local: Option<String>,
    /// Likewise.
    pub peer: Option<String>,
    /// The node of the other end; `None` when that is on this host, or the connection is the kernel's.
    #[serde(default)]
    pub node: Option<u16>,
    /// What it sends, then what it receives.
    pub directions: Option<[Direction; 2]>,
}

/// One direction of a stream.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Direction {
    /// The sender has moved to the ring.
    pub switched: bool,
    /// Position after the last byte published.
    pub head: u64,
    /// Position after the last byte consumed.
    pub tail: u64,
    /// Bits of [`rdsock_shm::layout::mark`].
    pub mark: u32,
}
