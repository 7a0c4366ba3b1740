//! What porters bring to the control thread.

use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use rdsock_shm::control::Between;

use crate::book::{Conn, Socket, TenantId};
use crate::channel::{Foreign, Receive, Sent};
use crate::diag::Listener;
use crate::fabric::Early;
use crate::fabric::incoming::{Answer, Incoming};
use crate::memory::{Bells, TenantMap};
use crate::namespaces::Opened;
use crate::porters::Owner;
use crate::process::Program;
use crate::queries::Fetched;
use crate::rights::{Changed, Held, Meeting, NotHeld, Passport};

/// What a load has found.
#[derive(Debug)]
pub enum Found {
    /// A message that a porter has taken in.
    Message {
        /// By which connection.
        connection: u64,
        /// It, or why there is none.
        received: io::Result<Receive>,
    },
    /// Datagrams were sent, or not.
    Sent {
        /// To which connection, and whose.
        owner: Owner,
        /// What became of them.
        sent: Sent,
    },
    /// What a caller needs that has said HELLO.
    Made {
        /// Which connection, and whose.
        owner: Owner,
        /// What it runs.
        program: Program,
        /// Its memory and its bells, or why there is none.
        made: io::Result<(Foreign<TenantMap>, Bells)>,
    },
    /// A look at a caller that says it has mapped its memory.
    Attached {
        /// Which connection, and whose.
        owner: Owner,
        /// Who it is.
        passport: Result<Passport, Changed>,
        /// The memory. Nobody makes the daemon wait for it, unless this says so.
        map: (Foreign<TenantMap>, io::Result<()>),
    },
    /// The network namespace that a tenant is in.
    Namespace {
        /// Whose.
        owner: Owner,
        /// It, or why it is not open.
        opened: io::Result<Opened>,
        /// The announcement that waits for that; `None` for a caller that attaches.
        announced: Option<Conn>,
    },
    /// Something was read for the next part of an answer.
    Fetched {
        /// Whose.
        asker: TenantId,
        /// What.
        fetched: Fetched,
    },
    /// Who would get a connection that another node asks for, and a port to make it from.
    Listener(Box<Incoming>, Result<Answer, Errno>),
    /// Who listens where the kernel has made a connection to.
    MadeTo {
        /// The stream that the connection is for.
        ticket: u64,
        /// What the kernel says.
        listener: io::Result<Option<Listener>>,
    },
    /// A look whether an anchor that has come in is that of a stream.
    Anchor {
        /// The stream.
        ticket: u64,
        /// Cookie of the daemon's socket.
        cookie: u64,
        /// It is.
        is_its: bool,
        /// The announcement that waits for that.
        early: Option<Early>,
    },
    /// The kernel was told to connect to a program that listens.
    Called {
        /// The stream that the connection is for.
        ticket: u64,
        /// The daemon's end.
        socket: Foreign,
        /// What the kernel said.
        called: Result<(), Errno>,
    },
    /// A look at a tenant's process.
    Process {
        /// Whose.
        tenant: TenantId,
        /// Is it who it was when it attached?
        unchanged: Result<(), Changed>,
    },
    /// A look at two ends that find each other, and at the process of one of them, before both are given their stream.
    Pair {
        /// The end that was announced last.
        conn: Conn,
        /// The end whose process was looked at: that one, or the one that has waited for it.
        whose: Conn,
        /// The socket of the one that has waited.
        other: Socket,
        /// Does that process run the program that it ran? If so, do the two sockets meet?
        meeting: Result<Meeting, Changed>,
        /// When its socket last heard something, if that was asked.
        heard: Option<Instant>,
    },
    /// The process of a connection has ended.
    Ended(u64),
    /// Something has happened to a connection whose socket was handed over.
    Event(u64, EpollFlags),
    /// Looks whether streams that nobody is known to hold are held by somebody.
    Kept(Vec<Kept>),
    /// A look at a socket that a tenant says it holds.
    Socket {
        /// Whose.
        tenant: TenantId,
        /// What it was looked at for.
        errand: Errand,
        /// What was found.
        held: Result<Held, NotHeld>,
    },
}

/// Does somebody hold a stream?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The stream.
    pub stream: u64,
    /// For the so-manieth time.
    pub times: u32,
    /// Somebody has one of its sockets.
    pub kept: bool,
}

/// What a socket is looked at for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// A connection record: what it is wanted for was noted with its generation.
    Conn(Conn),
    /// A socket that the tenant says it listens on, with this descriptor and cookie, and where.
    Listener(i32, u64, Option<SocketAddr>),
    /// The socket that the tenant wants to reach another node with.
    Reach(Between),
    /// A connection that the tenant asks about.
    Whois(Between),
}
