//! Control connections: who calls, what is sent and received, how it ends.

use std::cmp::Reverse;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{SockFlag, accept4};
use rdsock_shm::control::{Message, Refused, kind, refusal};
use tracing::{debug, warn};

use crate::channel::{Channel, Flush, Outgoing, Receive};
use crate::daemon::{Daemon, Due, Token};
use crate::process::Peer;
use crate::tenants::Tenant;

/// Time for a new connection to say who it is.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Connections that are not tenants (yet), beyond the tenants allowed.
const STRANGERS: usize = 256;
/// Processes that an idle daemon waits for at most.
const WATCHED: usize = 256;
/// How long streams are kept for a process that hung up and lives: it may run another program
/// now (exec) and ask for them again, even when the kernel has dropped the connection.
const EXEC_GRACE: Duration = Duration::from_secs(2);
/// Datagrams read from one connection before others have their turn.
const DATAGRAMS: usize = 16;
/// Descriptors kept back for the daemon itself.
const SPARE_DESCRIPTORS: u64 = 64;
/// Descriptors of a tenant: socket, pidfd, memory, bells.
const TENANT_DESCRIPTORS: u64 = 4;
/// Descriptors of a stream: its memory and two end pages.
const STREAM_DESCRIPTORS: u64 = 3;
/// Time until a send is tried again when no event will say that it may work.
const RETRY: Duration = Duration::from_millis(20);

/// Why a control connection ends.
#[derive(Debug)]
pub(crate) enum End {
    /// The other side hung up, while its process lives: it closed the socket, or runs another
    /// program now.
    HungUp,
    /// The process has ended.
    Exited,
    /// Refused: told so before. `code` is one of [`refusal`].
    Refused {
        /// What the tenant is told.
        code: u32,
        /// What was expected, where a number says it.
        expected: u32,
        /// What the log says.
        cause: &'static str,
    },
    /// It does not read.
    CutOff,
    /// The system said no.
    Failed(io::Error),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        End::Failed(error)
    }
}

/// A control connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub channel: Channel,
    pub peer: Peer,
    /// Made over an ADOPT, so that its maker is known already.
    pub adopted: bool,
    /// Its tenant, once it has said HELLO.
    pub tenant: Option<Tenant>,
    wants_write: bool,
    /// A [`Due::Send`] is set.
    retries: bool,
}

/// A process that has hung up and lives on: it is on its way out (its descriptors are closed
/// before it counts as ended), or runs another program now, or closed the socket.
#[derive(Debug)]
pub(crate) struct Watched {
    pid: i32,
    pidfd: OwnedFd,
    /// Streams that nobody else holds: given back at once when it ends.
    pub streams: Vec<u64>,
}

impl Daemon {
    pub(crate) fn on_handshake_due(&mut self, id: u64) -> Result<(), End> {
        match self.connections.get(&id) {
            Some(connection) if connection.tenant.is_none() => Err(End::Refused {
                code: refusal::MALFORMED,
                expected: kind::HELLO.into(),
                cause: "it did not say who it is",
            }),
            _ => Ok(()),
        }
    }

    /// Does something for a connection, and ends it if that says so.
    pub(crate) fn serve(&mut self, id: u64, what: impl FnOnce(&mut Self) -> Result<(), End>) {
        if !self.connections.contains_key(&id) {
            return;
        }
        if let Err(end) = what(self) {
            self.end(id, end);
        }
    }

    pub(crate) fn accept(&mut self) {
        for _ in 0..DATAGRAMS {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            match accept4(self.endpoint.socket().as_raw_fd(), flags) {
                Ok(fd) => {
                    // SAFETY: accept4 has just made this fd, and nothing else owns it.
                    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
                    self.welcome(socket, None);
                }
                Err(Errno::EMFILE | Errno::ENFILE) => {
                    let error = io::Error::from(Errno::EMFILE);
                    self.log_fault("a process is turned away", 0, &error);
                    // A caller that waits would wake the loop again and again.
                    drop(self.spare.take());
                    if let Ok(fd) = accept4(self.endpoint.socket().as_raw_fd(), flags) {
                        let _ = nix::unistd::close(fd);
                    }
                    self.spare = spare_descriptor();
                    return;
                }
                Err(_) => return,
            }
        }
    }

    /// Takes a new control connection, accepted or adopted; an adopted one's `maker` is known.
    pub(crate) fn welcome(&mut self, socket: OwnedFd, maker: Option<i32>) {
        self.last_use = Instant::now();
        let peer = match Peer::of(&socket) {
            Ok(peer) => peer,
            Err(error) => return debug!("a caller is gone already: {error}"),
        };
        if maker.is_some_and(|maker| maker != peer.pid) {
            self.counters.stray += 1;
            return self.log_refusal(
                "it passed on a socket that another process made",
                peer.uid,
                0,
            );
        }
        let (id, uid, pid) = (self.next_connection, peer.uid, peer.pid);
        let most = (self.config.max_tenants as usize).saturating_add(STRANGERS);
        let strangers_of_user = self
            .connections
            .values()
            .filter(|other| other.tenant.is_none() && other.peer.uid == uid)
            .take(STRANGERS / 2)
            .count();
        let full = self.connections.len() >= most
            || strangers_of_user >= STRANGERS / 2
            || !self.has_descriptors(TENANT_DESCRIPTORS);
        let channel = match Channel::new(socket) {
            Ok(channel) => channel,
            Err(error) => return self.log_fault("can't set up a control connection", uid, &error),
        };
        if let Err(error) = self.register(id, &channel, &peer) {
            return self.log_fault("can't watch a control connection", uid, &error.into());
        }
        self.next_connection += 1;
        let connection = Connection {
            channel,
            peer,
            adopted: maker.is_some(),
            tenant: None,
            wants_write: false,
            retries: false,
        };
        self.connections.insert(id, connection);
        debug!(id, uid, pid, "connected");
        if full {
            let refused = End::Refused {
                code: refusal::LIMIT,
                expected: self.config.max_tenants.min(u32::MAX.into()) as u32,
                cause: "too many processes are connected",
            };
            return self.end(id, refused);
        }
        self.due
            .push(Reverse((Instant::now() + HANDSHAKE, Due::Handshake(id))));
    }

    fn register(&self, id: u64, channel: &Channel, peer: &Peer) -> nix::Result<()> {
        let event = |token: Token| EpollEvent::new(EpollFlags::EPOLLIN, token.to_word());
        self.epoll
            .add(channel.socket(), event(Token::Connection(id)))?;
        self.epoll.add(&peer.pidfd, event(Token::Process(id)))
    }

    /// Are there descriptors for `more`?
    pub(crate) fn has_descriptors(&self, more: u64) -> bool {
        let connections = self.connections.len() as u64 * TENANT_DESCRIPTORS;
        let streams = self.book.streams().size_hint().0 as u64 * STREAM_DESCRIPTORS;
        let used = connections + streams + self.watched.len() as u64 + SPARE_DESCRIPTORS;
        used + more <= self.descriptors
    }

    /// Are there descriptors for one more stream?
    pub(crate) fn has_stream_descriptors(&self) -> bool {
        self.has_descriptors(STREAM_DESCRIPTORS)
    }

    pub(crate) fn receive(&mut self, id: u64) -> Result<(), End> {
        for _ in 0..DATAGRAMS {
            let Some(connection) = self.connections.get(&id) else {
                return Ok(());
            };
            match connection.channel.receive()? {
                Receive::Message(message) => self.on_message(id, message)?,
                Receive::Nothing => return Ok(()),
                Receive::Closed => {
                    return Err(if connection.peer.is_alive() {
                        End::HungUp
                    } else {
                        End::Exited
                    });
                }
            }
        }
        Ok(())
    }

    /// Sends a message to a connection, now or when it can be taken.
    pub(crate) fn send(&mut self, id: u64, message: Outgoing) -> Result<(), End> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        connection.channel.queue(message).map_err(|_| End::CutOff)?;
        self.flush(id)
    }

    /// Sends a message that needs no fds to a tenant other than the one being served: a failure
    /// is the other's, and ends it.
    pub(crate) fn send_to_other(&mut self, id: u64, message: Outgoing) {
        self.serve(id, |daemon| daemon.send(id, message));
    }

    pub(crate) fn retry(&mut self, id: u64) -> Result<(), End> {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.retries = false;
        }
        self.flush(id)
    }

    pub(crate) fn flush(&mut self, id: u64) -> Result<(), End> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        let tenant = connection.tenant.as_ref();
        let flushed = connection.channel.flush(|| {
            if let Some(tenant) = tenant {
                tenant.map.count_message();
            }
        });
        let wants_write = match flushed {
            Ok(Flush::Done) => false,
            Ok(Flush::Full) => true,
            Ok(Flush::Later) => {
                self.due
                    .push(Reverse((Instant::now() + RETRY, Due::Send(id))));
                false
            }
            Err(error) if is_hangup(&error) => return Err(End::HungUp),
            Err(error) => return Err(error.into()),
        };
        if wants_write != connection.wants_write {
            connection.wants_write = wants_write;
            let mut flags = EpollFlags::EPOLLIN;
            flags.set(EpollFlags::EPOLLOUT, wants_write);
            let mut event = EpollEvent::new(flags, Token::Connection(id).to_word());
            let modified = self.epoll.modify(connection.channel.socket(), &mut event);
            modified.map_err(io::Error::from)?;
        }
        self.unthrottle(id);
        Ok(())
    }

    /// Ends a connection, and whatever its tenant had.
    pub(crate) fn end(&mut self, id: u64, end: End) {
        let (uid, pid) = match self.connections.get(&id) {
            Some(connection) => (connection.peer.uid, connection.peer.pid),
            None => return,
        };
        match &end {
            End::Refused {
                code,
                expected,
                cause,
            } => {
                self.counters.refused += 1;
                self.log_refusal(cause, uid, pid);
                self.say_refused(id, *code, *expected);
            }
            End::CutOff => {
                self.counters.cut_off += 1;
                self.log_refusal("it does not read its messages", uid, pid);
            }
            End::Failed(error) => self.log_fault("control connection", uid, error),
            End::HungUp | End::Exited => {}
        }
        let Some(connection) = self.connections.remove(&id) else {
            return;
        };
        self.last_use = Instant::now();
        let _ = self.epoll.delete(connection.channel.socket());
        let alive = !matches!(end, End::Exited) && connection.peer.is_alive();
        let mut streams = Vec::new();
        if let Some(tenant) = connection.tenant {
            streams = self.tenant_gone(id, tenant, alive);
            debug!(id, uid, pid, alive, "detached");
        }
        let Peer { pidfd, .. } = connection.peer;
        if alive && (!streams.is_empty() || self.waits_for(pid)) {
            let watched = Watched {
                pid,
                pidfd,
                streams,
            };
            self.watched.insert(id, watched);
            self.due
                .push(Reverse((Instant::now() + EXEC_GRACE, Due::Watch(id))));
        } else {
            let _ = self.epoll.delete(&pidfd);
        }
    }

    /// Does a daemon that ends when unused wait for this process, which may attach (again)?
    fn waits_for(&self, pid: i32) -> bool {
        let waits = self.config.idle_exit_seconds != 0 && self.watched.len() < WATCHED;
        waits && !self.watched.values().any(|watched| watched.pid == pid)
    }

    pub(crate) fn unwatch(&mut self, id: u64) -> Option<Watched> {
        let watched = self.watched.remove(&id)?;
        let _ = self.epoll.delete(&watched.pidfd);
        self.last_use = Instant::now();
        Some(watched)
    }

    pub(crate) fn on_watch_due(&mut self, id: u64) {
        let Some(watched) = self.unwatch(id) else {
            return;
        };
        for stream in &watched.streams {
            self.check_stream(*stream);
        }
        if self.waits_for(watched.pid) {
            let token = Token::Process(id).to_word();
            let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
            if self.epoll.add(&watched.pidfd, event).is_ok() {
                let streams = Vec::new();
                self.watched.insert(id, Watched { streams, ..watched });
            }
        }
    }

    fn say_refused(&mut self, id: u64, code: u32, expected: u32) {
        let message = Message::new(kind::REFUSED, &Refused { code, expected });
        if let Some(connection) = self.connections.get_mut(&id) {
            let _ = connection.channel.queue(message.into());
            let tenant = connection.tenant.as_ref();
            let _ = connection.channel.flush(|| {
                if let Some(tenant) = tenant {
                    tenant.map.count_message();
                }
            });
        }
    }

    /// Logs a refusal, each cause once in a while.
    pub(crate) fn log_refusal(&mut self, cause: &'static str, uid: u32, pid: i32) {
        if let Some(unsaid) = self.throttle.pass(cause, uid, Instant::now()) {
            warn!(uid, pid, unsaid, "refused: {cause}");
        }
    }

    /// Logs that something did not work, each kind once in a while.
    pub(crate) fn log_fault(&mut self, what: &'static str, uid: u32, error: &io::Error) {
        if let Some(unsaid) = self.throttle.pass(what, uid, Instant::now()) {
            warn!(uid, unsaid, "{what}: {error}");
        }
    }

    /// Attached tenants.
    pub(crate) fn tenants(&self) -> usize {
        self.connections
            .values()
            .filter(|connection| connection.tenant.is_some())
            .count()
    }
}

fn is_hangup(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

pub(crate) fn spare_descriptor() -> Option<OwnedFd> {
    std::fs::File::open("/dev/null").ok().map(OwnedFd::from)
}
