//! Control connections: who calls, what is received and sent, how it ends.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{SockFlag, accept4, getsockopt, sockopt};
use rdsock_shm::control::{Message, Refused, kind, refusal};
use tracing::debug;

use super::Daemon;
use crate::accounts::{Charge, Over, Thing};
use crate::agenda::{Due, Token};
use crate::channel::{
    Channel, Flush, Foreign, LUGGAGE_DESCRIPTORS, Outgoing, Receive, Sent, dismiss, has_no_files,
    is_left_empty, receive, sender, take_files, unpack,
};
use crate::connections::{Connection, Inbox, Standing};
use crate::found::Found;
use crate::porters::{IN_PLACE_OF_USERS, LEAVERS, NOBODY, Owner};
use crate::process::Peer;

/// Time for a new connection to say who it is.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Processes that an idle daemon waits for at most.
const WATCHED: usize = 256;
/// How long streams are kept for a process that hung up and lives: it may run another program
/// now (exec) and ask for them again, even when the kernel has dropped the connection.
const EXEC_GRACE: Duration = Duration::from_secs(2);
/// Descriptors of a control connection besides its socket: those of its process.
const PEER_DESCRIPTORS: u64 = 2;
/// Time until a send is tried again when no event will say that it may work.
const RETRY: Duration = Duration::from_millis(20);
/// Time until callers are let in again when there were no descriptors, or too many wait to be closed.
const PAUSE: Duration = Duration::from_millis(20);
/// With so many callers that were turned away and are to be closed, others wait, too.
const TURNED_AWAY: usize = 64;
/// Callers of a turn that are turned away unheard, and closed at once.
const UNHEARD: usize = 16;
/// With so many loads waiting, a user whose limits are reached is not told so: the porters that it has do not come to
/// that.
const LOADS: usize = 64;
/// Nor where so many descriptors are on the account of all who have no room: the sockets of callers who are told so among them.
const TOLD: u64 = 256;
/// In place of a connection: all that a user's callers have left in sockets that are turned away is closed by one porter at a time.
const LEFT_THERE: u64 = 1 << 61;
/// With so many looks at a tenant's sockets under way, its further messages wait.
const LOOKS: usize = 64;

/// Why a control connection ends.
#[derive(Debug)]
pub(super) enum End {
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

impl From<Over> for End {
    fn from(over: Over) -> Self {
        End::Refused {
            code: refusal::LIMIT,
            expected: over.limit.min(u32::MAX.into()) as u32,
            cause: over.cause(),
        }
    }
}

/// A process that has hung up and lives on: it is on its way out (its descriptors are closed
/// before it counts as ended), or runs another program now, or closed the socket.
#[derive(Debug)]
pub(super) struct Watched {
    peer: Arc<Peer>,
    /// What it still has on its user's account.
    charge: Charge,
    /// Streams that nobody else holds: given back at once when it ends.
    pub streams: Vec<u64>,
}

/// Whoever closes what a user's callers have left.
fn left_by(uid: u32) -> Owner {
    Owner {
        uid,
        connection: LEFT_THERE,
    }
}

impl Daemon {
    pub(super) fn on_handshake_due(&mut self, id: u64) -> Result<(), End> {
        // What it said while the daemon had no time for it counts.
        let connection = self.connections.get(id);
        if connection.is_some_and(|connection| connection.channel.has_message()) {
            self.receive(id)?;
        }
        let Some(connection) = self.connections.get(id) else {
            return Ok(());
        };
        let is_read = matches!(connection.inbox, Inbox::Open);
        match connection.standing() {
            Standing::Tenant(_) => Ok(()),
            // It does not use what it was sent. Should it be a program that sleeps, it calls again.
            Standing::Sent(_, since) if is_read && since.elapsed() >= HANDSHAKE => Err(End::HungUp),
            Standing::Caller { answered: true } if is_read => Err(End::HungUp),
            Standing::Caller { answered: false } if is_read => Err(End::Refused {
                code: refusal::MALFORMED,
                expected: kind::HELLO.into(),
                cause: "it did not say who it is",
            }),
            _ => {
                self.agenda.after(HANDSHAKE, Due::Handshake(id));
                Ok(())
            }
        }
    }

    /// Does something for a connection, and ends it if that says so.
    pub(super) fn serve(&mut self, id: u64, what: impl FnOnce(&mut Self) -> Result<(), End>) {
        if self.connections.get(id).is_none() {
            return;
        }
        if let Err(end) = what(self) {
            self.end(id, end);
        }
    }

    pub(super) fn accept(&mut self, number: usize) {
        let Some(listener) = self.endpoint.listeners().get(number) else {
            return;
        };
        let (user, door) = (listener.user, listener.socket.as_raw_fd());
        let now = Instant::now();
        let mut unheard = Vec::new();
        // Whoever is left is told of again.
        let mut portion = self.portion();
        while portion.has_room() && unheard.len() < UNHEARD {
            let has_too_much = match user {
                // Its own callers wait, and nobody else's.
                Some(uid) => self.in_vain.are_too_many(uid, now),
                None => self.porters.waiting_of(NOBODY) > TURNED_AWAY,
            };
            // Who is told that there is no room has to be closed as well: each is paid for in advance.
            let mut charge = |uid| self.accounts.charge(uid, &[(Thing::Descriptors, 1)]);
            let advance = charge(user.unwrap_or(NOBODY)).or_else(|_| charge(NOBODY));
            let Some(advance) = advance.ok().filter(|_| !has_too_much) else {
                self.let_callers_wait(number);
                break;
            };
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            match accept4(door, flags) {
                Ok(fd) => {
                    // SAFETY: accept4 has just made this fd, and nothing else owns it.
                    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
                    unheard.extend(self.on_caller(socket, advance, now));
                }
                Err(error @ (Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS)) => {
                    let what = "callers have to wait: more descriptors are needed (LimitNOFILE=)";
                    self.journal.fault(what, 0, &error.into());
                    self.let_callers_wait(number);
                    break;
                }
                Err(_) => break,
            }
        }
        self.close_unheard(unheard);
    }

    /// Somebody has called. The socket is given back if he is not heard.
    fn on_caller(&mut self, socket: OwnedFd, advance: Charge, now: Instant) -> Option<Foreign> {
        let peer = getsockopt(&socket, sockopt::PeerCredentials).ok();
        let (uid, pid) = peer.map_or((NOBODY, 0), |peer| (peer.uid(), peer.pid()));
        let closer = self.porters.closer(left_by(uid));
        let socket = closer.foreign(socket).paid_by(advance);
        if IN_PLACE_OF_USERS.contains(&uid) {
            self.refuse_number(uid, pid);
            return Some(self.left(NOBODY, socket));
        }
        if self.in_vain.are_too_many(uid, now) {
            self.refuse_unheard(uid, pid);
        } else {
            match Peer::of(&socket) {
                Ok(peer) => return self.welcome(socket, peer, false),
                Err(error) => debug!("a caller is gone already: {error}"),
            }
        }
        Some(self.left(uid, socket))
    }

    /// The socket of a caller who is turned away, or gone: it is on that user's account until it is closed, or where that has no room,
    /// on the one of all who have none.
    fn left(&mut self, uid: u32, mut socket: Foreign) -> Foreign {
        socket.give_to(left_by(uid));
        let of_one = [(Thing::Descriptors, 1)];
        if let Ok(charge) = self.accounts.charge(uid, &of_one) {
            socket.charge_to(charge);
        }
        socket
    }

    /// These numbers stand for work that is nobody's in particular.
    fn refuse_number(&mut self, uid: u32, pid: i32) {
        self.journal.counters.refused += 1;
        let cause = "its user has one of the last numbers, which the daemon uses itself: run it as another user";
        self.journal.refusal(cause, uid, pid);
    }

    fn refuse_unheard(&mut self, uid: u32, pid: i32) {
        self.journal.counters.refused += 1;
        self.journal.counters.turned_away += 1;
        let cause = "its user's programs have called over a thousand times in a second, and said nothing: it is not heard before that second is over";
        self.journal.refusal(cause, uid, pid);
    }

    /// A porter closes who was not heard, all of a turn at once. Who has left messages decides how long that takes, and who has left
    /// descriptors, whether it ever ends: others close these.
    fn close_unheard(&self, sockets: Vec<Foreign>) {
        if !sockets.is_empty() {
            let owner = Owner {
                uid: NOBODY,
                connection: self.connections.next_id(),
            };
            self.porters.give(owner, move || {
                for mut socket in sockets {
                    if is_left_empty(&socket) {
                        socket.give_to(owner);
                    } else if has_no_files(&socket) {
                        // The user's own porters may all be held up.
                        socket.give_to(Owner {
                            uid: LEAVERS,
                            connection: socket.owner().uid.into(),
                        });
                    }
                }
                None
            });
        }
    }

    /// Those that call now wait in the backlog of the socket.
    fn let_callers_wait(&mut self, number: usize) {
        if let Some(listener) = self.endpoint.listeners().get(number) {
            self.agenda.unwatch(&listener.socket);
            self.agenda.after(PAUSE, Due::Callers(number));
        }
    }

    pub(super) fn let_callers_in(&mut self, number: usize) {
        let Some(listener) = self.endpoint.listeners().get(number) else {
            return;
        };
        let token = Token::Listener(number as u64);
        if let Err(error) = self.agenda.watch(&listener.socket, token) {
            self.journal
                .fault("can't watch a control socket", 0, &error.into());
            self.agenda.after(PAUSE, Due::Callers(number));
        }
    }

    /// Takes a new control connection, made by `peer`, accepted or handed over by an ADOPT. The socket is given back where its user has its
    /// share, and is not told so.
    #[must_use]
    pub(super) fn welcome(
        &mut self,
        mut socket: Foreign,
        peer: Peer,
        adopted: bool,
    ) -> Option<Foreign> {
        self.last_use = Instant::now();
        let (uid, pid) = (peer.uid, peer.pid);
        let charge = |accounts: &mut crate::accounts::Accounts| -> Result<_, Over> {
            Ok([
                accounts.charge(uid, &[(Thing::Descriptors, 1)])?,
                accounts.charge(
                    uid,
                    &[(Thing::Descriptors, PEER_DESCRIPTORS), (Thing::Callers, 1)],
                )?,
                accounts.charge(uid, &[])?,
            ])
        };
        let [of_socket, of_caller, unread] = match charge(&mut self.accounts) {
            Ok(charges) => charges,
            Err(over) => {
                self.in_vain.note(uid, self.last_use);
                self.journal.counters.refused += 1;
                self.log_over(over, uid, pid);
                let socket = self.left(uid, socket);
                let is_crowded = self.porters.waiting_of(uid) > LOADS
                    || self.accounts.of(NOBODY, Thing::Descriptors) > TOLD;
                if is_crowded {
                    return Some(socket);
                }
                dismiss(&self.porters, Arc::new(socket), refused(over));
                return None;
            }
        };
        if !adopted {
            // All that he sends is on an account from now on.
            take_files(&socket, true);
        }
        socket.charge_to(of_socket);
        socket.give_to(Owner {
            uid,
            connection: self.connections.next_id(),
        });
        let channel = Channel::new(socket, unread);
        let connection = Connection::new(channel, peer, adopted, of_caller);
        let id = self.connections.insert(connection);
        debug!(id, uid, pid, "connected");
        self.agenda.after(HANDSHAKE, Due::Handshake(id));
        self.serve(id, |daemon| daemon.register(id));
        None
    }

    fn register(&mut self, id: u64) -> Result<(), End> {
        let Some(connection) = self.connections.get(id) else {
            return Ok(());
        };
        if connection.adopted {
            return self.rewatch(id);
        }
        let socket = connection.channel.socket();
        self.agenda
            .watch(socket, Token::Connection(id))
            .map_err(|error| End::Failed(error.into()))
    }

    /// Reads what there is. Who has hung up (`gone`) while a question is answered reads no answer any more. What such a one has
    /// said and can't be read yet waits, and so does its end: epoll would tell of that again and again.
    pub(super) fn receive_or_end(&mut self, id: u64, gone: bool) -> Result<(), End> {
        let connection = self.connections.get(id);
        let answering = connection.is_some_and(|c| matches!(c.inbox, Inbox::Answering(_)));
        if gone && answering {
            return Err(self.closed(id));
        }
        self.receive(id)?;
        let tenant = self.connections.tenant(id);
        if gone && tenant.is_some_and(|tenant| tenant.unread) {
            self.stop_watching(id);
        }
        Ok(())
    }

    /// Has the next message received.
    pub(super) fn receive(&mut self, id: u64) -> Result<(), End> {
        let Some(connection) = self.connections.get_mut(id) else {
            return Ok(());
        };
        match connection.inbox {
            Inbox::Open => {}
            Inbox::Receiving => {
                // That takes longer than a turn.
                connection.inbox = Inbox::Unpacked;
                self.stop_watching(id);
                return Ok(());
            }
            Inbox::Unpacked | Inbox::Answering(_) => return Ok(()),
        }
        // Of a socket that was handed over nothing more is told for now, not even that the other side hangs up.
        let is_told_no_more = connection.adopted && !connection.wants_write;
        if let Some(tenant) = connection.tenant_mut()
            && tenant.looks >= LOOKS
        {
            // It is read again when some of these are done.
            tenant.unread = true;
            return match is_told_no_more {
                true => Ok(()),
                false => self.rewatch(id),
            };
        }
        if connection.adopted {
            self.have_unpacked(id);
            return Ok(());
        }
        connection.inbox = Inbox::Receiving;
        let socket = connection.channel.socket().clone();
        self.porters.give_quick(socket.owner(), move || {
            Some(Found::Message {
                connection: id,
                received: receive(&socket),
            })
        });
        Ok(())
    }

    /// The other side has hung up.
    fn closed(&self, id: u64) -> End {
        let connection = self.connections.get(id);
        match connection.is_some_and(|connection| connection.peer.is_alive()) {
            true => End::HungUp,
            false => End::Exited,
        }
    }

    /// A porter takes in the next message of a connection, which is not watched meanwhile.
    fn have_unpacked(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(id) else {
            return;
        };
        connection.inbox = Inbox::Unpacked;
        let socket = connection.channel.socket().clone();
        let room = self.room_for_luggage(id);
        self.stop_watching(id);
        self.porters.give(socket.owner(), move || {
            Some(Found::Message {
                connection: id,
                received: unpack(&socket, room),
            })
        });
    }

    /// Room for what a message brings beside it, on the account of the connection's user until that is closed, or paid for otherwise. One
    /// message of a connection after the other: whoever may speak there, a child that is another user say, makes the daemon hold no more.
    fn room_for_luggage(&mut self, id: u64) -> Option<Arc<Charge>> {
        let connection = self.connections.get_mut(id)?;
        if connection.luggage.strong_count() != 0 {
            return None;
        }
        let wanted = [(Thing::Descriptors, LUGGAGE_DESCRIPTORS)];
        let charge = self.accounts.charge(connection.peer.uid, &wanted).ok()?;
        let charge = Arc::new(charge);
        connection.luggage = Arc::downgrade(&charge);
        Some(charge)
    }

    /// A porter has taken in a message.
    pub(super) fn on_unpacked(&mut self, id: u64, received: io::Result<Receive>) {
        self.serve(id, |daemon| {
            daemon.read_again(id)?;
            // Whatever follows is told of.
            match received? {
                Receive::Message(message) => daemon.on_message(id, message),
                Receive::Descriptors => {
                    daemon.have_unpacked(id);
                    Ok(())
                }
                // Somebody else has taken it.
                Receive::Nothing => Ok(()),
                Receive::Closed => Err(daemon.closed(id)),
            }
        });
    }

    /// What has kept a connection from being read is done.
    pub(super) fn read_again(&mut self, id: u64) -> Result<(), End> {
        let Some(connection) = self.connections.get_mut(id) else {
            return Ok(());
        };
        let before = std::mem::replace(&mut connection.inbox, Inbox::Open);
        match before {
            Inbox::Unpacked => self.rewatch(id),
            _ => Ok(()),
        }
    }

    /// The flags that a connection is watched for.
    fn flags(connection: &Connection) -> EpollFlags {
        let mut flags = EpollFlags::empty();
        let held_up = connection.tenant().is_some_and(|tenant| tenant.unread);
        let read = matches!(connection.inbox, Inbox::Open | Inbox::Receiving) && !held_up;
        flags.set(EpollFlags::EPOLLIN, read);
        flags.set(EpollFlags::EPOLLOUT, connection.wants_write);
        flags
    }

    /// Watches a connection for what it is to be watched for by now.
    pub(super) fn rewatch(&mut self, id: u64) -> Result<(), End> {
        if let Some(connection) = self.connections.get_mut(id)
            && !matches!(connection.inbox, Inbox::Unpacked)
        {
            let before = std::mem::replace(&mut connection.watched, true);
            let (flags, token) = (Self::flags(connection), Token::Connection(id));
            if connection.adopted {
                let (uid, socket) = (connection.peer.uid, connection.channel.socket().clone());
                self.handed_over.watch(uid, id, socket, flags)?;
                return Ok(());
            }
            let socket = connection.channel.socket();
            let watched = match before {
                true => self.agenda.rewatch(socket, flags, token),
                false => self.agenda.watch_for(socket, flags, token),
            };
            watched.map_err(io::Error::from)?;
        }
        Ok(())
    }

    /// Nothing that happens to a connection is told, until it is watched again. Of one whose socket was handed over, one thing is told
    /// at a time.
    fn stop_watching(&mut self, id: u64) {
        if let Some(connection) = self.connections.get_mut(id)
            && !connection.adopted
            && std::mem::replace(&mut connection.watched, false)
        {
            self.agenda.unwatch(connection.channel.socket());
        }
    }

    /// Sends a message to a connection, now or when it can be taken.
    pub(super) fn send(&mut self, id: u64, message: Outgoing) -> Result<(), End> {
        let Some(connection) = self.connections.get_mut(id) else {
            return Ok(());
        };
        connection.channel.queue(message).map_err(|_| End::CutOff)?;
        self.flush(id)
    }

    /// Sends a message to a tenant other than the one being served: a failure is the other's, and ends it.
    pub(super) fn send_to_other(&mut self, id: u64, message: Outgoing) {
        self.serve(id, |daemon| daemon.send(id, message));
    }

    /// No event says that a connection's messages may be sent now: it is tried.
    pub(super) fn retry(&mut self, id: u64) -> Result<(), End> {
        if let Some(connection) = self.connections.get_mut(id) {
            connection.retries = false;
        }
        self.flush(id)
    }

    /// Has sent what waits, unless something is being sent.
    pub(super) fn flush(&mut self, id: u64) -> Result<(), End> {
        let Some(connection) = self.connections.get_mut(id) else {
            return Ok(());
        };
        // Room is no news until what is sent now has found none again, which may take long.
        if std::mem::replace(&mut connection.wants_write, false) {
            self.rewatch(id)?;
        }
        let Some(connection) = self.connections.get_mut(id) else {
            return Ok(());
        };
        let Some(batch) = connection.channel.batch() else {
            if connection.channel.queued() == 0 {
                self.go_on_answering(id);
            }
            return Ok(());
        };
        let owner = connection.channel.socket().owner();
        self.porters.give_quick(sender(owner), move || {
            Some(Found::Sent {
                owner,
                sent: batch.send(),
            })
        });
        Ok(())
    }

    /// Messages were sent, or not.
    pub(super) fn on_sent(&mut self, owner: Owner, sent: Sent) {
        let id = owner.connection;
        if self.connections.get(id).is_some() {
            return self.serve(id, |daemon| daemon.after_sending(id, sent));
        }
        // These may be the last to hold a stream's memory.
        self.porters.give(owner, move || {
            drop(sent);
            None
        });
    }

    fn after_sending(&mut self, id: u64, sent: Sent) -> Result<(), End> {
        let Some(connection) = self.connections.get_mut(id) else {
            return Ok(());
        };
        // Not before: a tenant that saw the count and found nothing yet would not look again.
        if let Some(tenant) = connection.tenant() {
            for _ in 0..sent.count {
                tenant.map.count_message();
            }
        }
        let flushed = connection.channel.sent(sent);
        let wants_write = match flushed {
            Ok(Flush::Done) => false,
            Ok(Flush::Full) => true,
            Ok(Flush::Later) => {
                if !std::mem::replace(&mut connection.retries, true) {
                    self.agenda.after(RETRY, Due::Send(id));
                }
                false
            }
            Err(error) if is_hangup(&error) => return Err(End::HungUp),
            Err(error) => return Err(error.into()),
        };
        if wants_write != std::mem::replace(&mut connection.wants_write, wants_write) {
            self.rewatch(id)?;
        }
        if flushed.is_ok_and(|flushed| flushed == Flush::Done) {
            self.flush(id)?;
        }
        self.unthrottle(id);
        Ok(())
    }

    /// Ends a connection, and whatever its tenant had.
    pub(super) fn end(&mut self, id: u64, end: End) {
        let (uid, pid) = match self.connections.get(id) {
            Some(connection) => (connection.peer.uid, connection.peer.pid),
            None => return,
        };
        match &end {
            End::Refused {
                code,
                expected,
                cause,
            } => {
                self.journal.counters.refused += 1;
                self.journal.refusal(cause, uid, pid);
                self.say_refused(id, *code, *expected);
            }
            End::CutOff => {
                self.journal.counters.cut_off += 1;
                self.journal
                    .refusal("it does not read its messages", uid, pid);
            }
            End::Failed(error) => self.journal.fault("control connection", uid, error),
            End::HungUp | End::Exited => {}
        }
        let Some(mut connection) = self.connections.remove(id) else {
            return;
        };
        self.last_use = Instant::now();
        match connection.adopted {
            // Its socket is paid for as long as it is there.
            true => self.handed_over.leave(uid, id),
            false => self.agenda.unwatch(connection.channel.socket()),
        }
        let standing = connection.end();
        connection.channel.dismiss(&self.porters);
        let alive = !matches!(end, End::Exited) && connection.peer.is_alive();
        let mut streams = Vec::new();
        // Its end is waited for since then.
        let was_tenant = matches!(standing, Standing::Tenant(_));
        if !matches!(
            standing,
            Standing::Tenant(_) | Standing::Caller { answered: true }
        ) {
            self.in_vain.note(uid, self.last_use);
        }
        if let Standing::Tenant(tenant) = standing {
            streams = self.tenant_gone(id, *tenant, alive);
            debug!(id, uid, pid, alive, "detached");
        }
        let (peer, mut charge) = (connection.peer, connection.charge);
        charge.keep_only(Thing::Descriptors, PEER_DESCRIPTORS);
        if alive && (!streams.is_empty() || self.waits_for(pid)) {
            if !was_tenant {
                self.ends.watch(id, peer.clone(), EpollFlags::EPOLLIN);
            }
            let watched = Watched {
                peer,
                charge,
                streams,
            };
            self.watched.insert(id, watched);
            self.agenda.after(EXEC_GRACE, Due::Watch(id));
        } else if was_tenant {
            self.ends.leave(id, charge);
        }
    }

    /// Does a daemon that ends when unused wait for this process, which may attach (again)?
    fn waits_for(&self, pid: i32) -> bool {
        let waits = self.config.idle_exit_seconds != 0 && self.watched.len() < WATCHED;
        waits && !self.watched.values().any(|watched| watched.peer.pid == pid)
    }

    /// A process that has hung up is waited for no longer. The streams that were kept for it.
    pub(super) fn unwatch(&mut self, id: u64) -> Option<Vec<u64>> {
        let watched = self.watched.remove(&id)?;
        self.ends.leave(id, watched.charge);
        self.last_use = Instant::now();
        Some(watched.streams)
    }

    pub(super) fn on_watch_due(&mut self, id: u64) {
        let Some(mut watched) = self.watched.remove(&id) else {
            return;
        };
        let streams = std::mem::take(&mut watched.streams);
        self.last_use = Instant::now();
        if self.waits_for(watched.peer.pid) {
            self.watched.insert(id, watched);
        } else {
            self.ends.leave(id, watched.charge);
        }
        self.check_streams(&streams);
    }

    /// Sent before the connection is closed.
    fn say_refused(&mut self, id: u64, code: u32, expected: u32) {
        let message = Message::new(kind::REFUSED, &Refused { code, expected });
        if let Some(connection) = self.connections.get_mut(id) {
            let _ = connection.channel.queue(message.into());
        }
    }
}

/// What a caller is told when a limit is in the way.
fn refused(over: Over) -> Outgoing {
    let refused = Refused {
        code: refusal::LIMIT,
        expected: over.limit.min(u32::MAX.into()) as u32,
    };
    Message::new(kind::REFUSED, &refused).into()
}

fn is_hangup(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}
