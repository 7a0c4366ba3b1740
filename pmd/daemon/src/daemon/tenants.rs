//! What the messages on a control connection mean, and what a tenant asks through its queue.

use std::time::Duration;

use rdsock_shm::control::{
    Attached, Between, Hello, Lookup, Message, ParseError, Pod, Query, Request, Verdict,
    from_bytes, kind, parse, refusal, request,
};
use rdsock_shm::layout::{CONN_RECORDS, VERSION};
use rdsock_shm::reason::Reason;

use super::{Daemon, End};
use crate::accounts::Thing;
use crate::agenda::Due;
use crate::book::{Conn, TenantId};
use crate::channel::{Luggage, Outgoing, Received, sender};
use crate::connections::{Connection, Tenant};
use crate::diag::ELSEWHERE_DESCRIPTORS;
use crate::found::Found;
use crate::porters::Owner;
use crate::rights::{Changed, Rights};

/// Time between two looks whether tenants are who they were, and the tenants looked at in one.
pub(super) const SWEEP: Duration = Duration::from_secs(2);
const SWEPT: usize = 64;
/// A process that attaches is looked at for no more of its other connections. An honest one has one.
const EARLIER: usize = 16;
/// Requests taken from one tenant before others have their turn.
const REQUESTS: usize = 16;
/// With so many unread messages, a tenant's further requests wait.
const UNREAD: usize = 1024;
/// With so many looks at its sockets under way, a tenant's further requests wait.
const LOOKS: usize = 16;

/// Why there is no room for what a message brings.
const HAS_NO_ROOM: &str = "its user has its share of descriptors (max_descriptors_per_user), or what it sent before is not closed yet";
/// It passes: the tenant asks again.
const NO_ROOM: End = End::Refused {
    code: refusal::LIMIT,
    expected: 0,
    cause: HAS_NO_ROOM,
};

pub(super) fn malformed(cause: &'static str) -> End {
    End::Refused {
        code: refusal::MALFORMED,
        expected: 0,
        cause,
    }
}

fn body<T: Pod>(bytes: &[u8]) -> Result<T, End> {
    from_bytes(bytes).ok_or(malformed("a message has a wrong length"))
}

/// The process is not who it was when it attached: its connection ends. It may attach anew, as who it is now.
impl From<Changed> for End {
    fn from(changed: Changed) -> Self {
        let cause = match changed {
            Changed::Ended => return End::Exited,
            Changed::Program => "its process runs another program than the one that attached",
            Changed::Rights => "its process has other rights than when it attached",
            Changed::Hidden => "the daemon may not look at its process",
        };
        End::Refused {
            code: refusal::IDENTITY,
            expected: 0,
            cause,
        }
    }
}

impl Daemon {
    /// A datagram arrived.
    pub(super) fn on_message(&mut self, id: TenantId, message: Received) -> Result<(), End> {
        let Some(connection) = self.connections.get(id) else {
            return Ok(());
        };
        // A forked child, say, which harms nobody else by what it says.
        let is_strangers = !Rights::may_speak(&connection.peer, message.sender);
        let understood = self.understand(id, message);
        if is_strangers && understood.is_err() {
            self.journal.counters.stray += 1;
            return Ok(());
        }
        understood
    }

    fn understand(&mut self, id: TenantId, message: Received) -> Result<(), End> {
        let (kind, bytes) = match parse(&message.bytes) {
            Ok(parsed) => parsed,
            Err(ParseError::Version(_)) => {
                self.journal.counters.wrong_version += 1;
                return Err(End::Refused {
                    code: refusal::VERSION,
                    expected: VERSION,
                    cause: "another version of shim and daemon: restart the program",
                });
            }
            Err(ParseError::NotAMessage) => {
                self.journal.counters.malformed += 1;
                return Err(malformed("it sent something that is no message"));
            }
        };
        let result = self.on_kind(id, kind, bytes, message.sender, message.luggage);
        if let Err(End::Refused {
            code: refusal::MALFORMED,
            ..
        }) = result
        {
            self.journal.counters.malformed += 1;
        }
        result
    }

    fn on_kind(
        &mut self,
        id: TenantId,
        kind: u16,
        bytes: &[u8],
        sender: i32,
        luggage: Luggage,
    ) -> Result<(), End> {
        let Some(connection) = self.connections.get(id) else {
            return Ok(());
        };
        let attached = connection.tenant().is_some();
        let greeted = connection.is_on_its_way();
        // A forked child may ask for a connection of its own.
        let own = Rights::may_speak(&connection.peer, sender);
        if !own && kind != kind::ADOPT {
            self.journal.counters.stray += 1;
            return Ok(());
        }
        match (kind, attached, luggage) {
            (kind::HELLO, false, Luggage::Bells(bells)) if !greeted => {
                let hello: Hello = body(bytes)?;
                self.on_hello(id, hello, Some(bells))
            }
            (kind::HELLO, false, Luggage::None) if !greeted => {
                let hello: Hello = body(bytes)?;
                self.on_hello(id, hello, None)
            }
            (kind::ATTACHED, false, Luggage::None) => {
                let attached: Attached = body(bytes)?;
                self.on_mapped_memory(id, attached)
            }
            (kind::KICK, true, Luggage::None) if bytes.is_empty() => self.drain(id),
            (kind::LOOKUP, true, Luggage::None) => {
                let lookup: Lookup = body(bytes)?;
                self.on_lookup(id, lookup)
            }
            (kind::REACH, true, Luggage::None) => {
                let question: Between = body(bytes)?;
                self.on_reach(id, question)
            }
            (kind::WHOIS, true, Luggage::None) => {
                let question: Between = body(bytes)?;
                self.on_whois(id, question)
            }
            (kind::ADOPT, _, Luggage::Channel(socket, maker)) if attached || greeted => {
                // A socket that another process made would give its rights away.
                if maker.pid == sender {
                    // It is closed where there is no place.
                    drop(self.welcome(socket, maker, true));
                } else {
                    self.journal.counters.stray += 1;
                    let cause = "it passed on a socket that another process made";
                    self.journal.refusal(cause, maker.uid, sender);
                }
                Ok(())
            }
            (kind::HELLO, false, Luggage::NoRoom) if !greeted => Err(NO_ROOM),
            // Nor is it the parent's fault that there is no place for a child: it calls itself.
            (kind::ADOPT, _, Luggage::NoRoom) if (attached || greeted) && bytes.is_empty() => {
                self.journal.counters.refused += 1;
                let (uid, pid) = (connection.peer.uid, connection.peer.pid);
                self.journal.refusal(HAS_NO_ROOM, uid, pid);
                Ok(())
            }
            // A child that has ended by the time that its request is read is not its parent's fault.
            (kind::ADOPT, _, Luggage::Left) if attached || greeted => Ok(()),
            (kind::ADOPT, _, _) if (attached || greeted) && bytes.is_empty() => {
                Err(malformed("ADOPT takes one fd, a SOCK_SEQPACKET socket"))
            }
            (kind::QUERY, _, Luggage::None) => {
                let query: Query = body(bytes)?;
                self.journal.counters.questions += 1;
                self.on_query(id, query)
            }
            _ => Err(malformed("it sent a message that makes no sense now")),
        }
    }

    /// A process is in this network namespace. `None` when that is not open, or its user has no
    /// descriptor left for that. Each tenant pays for the socket there, so that whoever stays has paid.
    pub(super) fn enter_netns(&mut self, id: TenantId, netns: u64) -> Option<u64> {
        let connection = self.connections.get_mut(id)?;
        let (pid, uid) = (connection.peer.pid, connection.peer.uid);
        if !self.rights.namespaces.enter(netns) {
            return None;
        }
        if self.rights.namespaces.is_home_inode(netns) {
            return Some(netns);
        }
        match connection
            .charge
            .more(Thing::Descriptors, ELSEWHERE_DESCRIPTORS)
        {
            Ok(()) => Some(netns),
            Err(over) => {
                self.rights.namespaces.leave(netns);
                self.log_over(over, uid, pid);
                None
            }
        }
    }

    /// A tenant is no longer in a network namespace.
    pub(super) fn leave_netns(&mut self, id: TenantId, netns: u64) {
        self.rights.namespaces.leave(netns);
        if !self.rights.namespaces.is_home_inode(netns)
            && let Some(connection) = self.connections.get_mut(id)
        {
            connection
                .charge
                .less(Thing::Descriptors, ELSEWHERE_DESCRIPTORS);
        }
    }

    /// A process says HELLO: whatever it was attached as before it ran another program is over. Of very many such
    /// connections, the rest is left to the sweep.
    pub(super) fn detach_earlier_programs(&mut self, id: TenantId, pid: i32) {
        let tenants = self.connections.of_process(pid).iter().copied();
        let earlier = tenants.filter(|other| *other != id).take(EARLIER);
        let earlier: Vec<TenantId> = earlier.collect();
        for other in earlier {
            self.have_process_looked_at(other);
        }
    }

    fn owner_of(id: TenantId, tenant: &Tenant) -> Owner {
        Owner {
            uid: tenant.passport.peer.uid,
            connection: id,
        }
    }

    /// Has a porter look whether a tenant is who it was.
    fn have_process_looked_at(&mut self, tenant: TenantId) {
        let Some(entry) = self.connections.tenant(tenant) else {
            return;
        };
        let passport = entry.passport.clone();
        let owner = Self::owner_of(tenant, entry);
        self.porters.give(owner, move || {
            Some(Found::Process {
                tenant,
                unchanged: passport.check(),
            })
        });
    }

    /// A porter has looked at a tenant's process.
    pub(super) fn on_process(&mut self, id: TenantId, unchanged: Result<(), Changed>) {
        if let Some(tenant) = self.connections.tenant_mut(id) {
            tenant.swept = false;
        }
        if let Err(changed) = unchanged
            && changed != Changed::Hidden
        {
            self.journal.counters.changed += 1;
            self.serve(id, |_| Err(changed.into()));
        }
    }

    /// Has the next few tenants looked at: who is not who it was is detached, also when nobody asks for anything in its
    /// name.
    pub(super) fn sweep(&mut self) {
        let mut left = match self.swept.take() {
            Some(left) if !left.is_empty() => left,
            _ => self.connections.attached().map(|(id, ..)| id).collect(),
        };
        if left.is_empty() {
            return;
        }
        for id in left.drain(..left.len().min(SWEPT)) {
            // One look at a time: a user whose porters are held up has no more of them each round.
            let tenant = self.connections.tenant_mut(id);
            if tenant.is_some_and(|tenant| !std::mem::replace(&mut tenant.swept, true)) {
                self.have_process_looked_at(id);
            }
        }
        self.swept = Some(left);
        self.agenda.after(SWEEP, Due::Sweep);
    }

    /// A connection has work left from its last turn.
    pub(super) fn go_on(&mut self, id: TenantId) -> Result<(), End> {
        self.answer(id)?;
        self.drain(id)
    }

    /// Takes what is in a tenant's queue, up to a bound; then sleeps on it.
    pub(super) fn drain(&mut self, id: TenantId) -> Result<(), End> {
        if let Some(tenant) = self.connections.tenant(id) {
            tenant.map.end_sleep();
        }
        for _ in 0..REQUESTS {
            let Some(request) = self.next_request(id) else {
                return Ok(());
            };
            self.on_request(id, &request)?;
        }
        self.goes_on(id);
        Ok(())
    }

    fn next_request(&mut self, id: TenantId) -> Option<Request> {
        let connection = self.connections.get_mut(id)?;
        let is_full = connection.channel.queued() >= UNREAD;
        let tenant = connection.tenant_mut()?;
        if is_full || tenant.looks >= LOOKS {
            tenant.throttled = true;
            return None;
        }
        let map = &mut tenant.map;
        map.take().or_else(|| {
            map.start_sleep();
            let request = map.take()?;
            map.end_sleep();
            Some(request)
        })
    }

    fn on_request(&mut self, id: TenantId, request: &Request) -> Result<(), End> {
        let conn = Conn {
            tenant: id,
            number: request.conn,
            generation: request.generation,
        };
        if request.conn as usize >= CONN_RECORDS {
            self.journal.counters.bad_requests += 1;
            return Ok(());
        }
        match request.what {
            request::ANNOUNCE => self.on_announce(conn, request),
            request::CLOSED => {
                self.give_up(conn);
                Ok(())
            }
            request::LEFT => {
                self.journal.counters.left += 1;
                self.give_up(conn);
                Ok(())
            }
            request::DECLINED => {
                self.journal.counters.declined += 1;
                self.on_declined(conn);
                Ok(())
            }
            request::HOLDS => {
                self.on_holds(conn, request);
                Ok(())
            }
            request::MAPPED => {
                self.on_mapped(conn);
                Ok(())
            }
            request::LISTENS => {
                self.on_listens(id, request);
                Ok(())
            }
            _ => {
                self.journal.counters.bad_requests += 1;
                Ok(())
            }
        }
    }

    /// Messages of a tenant were sent, or a look at one of its sockets is done: its requests are taken again when it has
    /// room for more.
    pub(super) fn unthrottle(&mut self, id: TenantId) {
        if let Some(tenant) = self.connections.tenant_mut(id)
            && tenant.unread
            && tenant.looks < LOOKS
        {
            tenant.unread = false;
            self.serve(id, |daemon| daemon.rewatch(id));
        }
        let connection = self.connections.get_mut(id);
        let has_room = |connection: &&mut Connection| connection.channel.queued() < UNREAD / 2;
        if let Some(connection) = connection.filter(has_room)
            && let Some(tenant) = connection.tenant_mut()
            && tenant.throttled
            && tenant.looks < LOOKS
        {
            tenant.throttled = false;
            self.goes_on(id);
        }
    }

    /// Tells a tenant why a connection stays on the kernel for now.
    pub(super) fn verdict(conn: Conn, reason: Reason) -> Outgoing {
        let verdict = Verdict {
            conn: conn.number,
            generation: conn.generation,
            reason: reason as u32,
            reserved: 0,
        };
        Message::new(kind::VERDICT, &verdict).into()
    }

    /// A tenant has gone. When its process lives (`alive`), the streams that nobody else holds, and those that it has paid for, are
    /// returned, to be looked at later.
    pub(super) fn tenant_gone(&mut self, id: TenantId, tenant: Tenant, alive: bool) -> Vec<u64> {
        self.journal.counters.detached += 1;
        let (owner, map) = (Self::owner_of(id, &tenant), tenant.map);
        // Behind the last that it is told.
        self.porters.give(sender(owner), move || {
            map.count_message();
            None
        });
        if let Some(netns) = tenant.netns {
            self.rights.namespaces.leave(netns);
        }
        self.forget_listener(id);
        self.forget_promises(id);
        self.announcements.forget_all(id);
        let mut streams = self.streams.tenant_gone(id);
        if !alive {
            self.check_streams(&std::mem::take(&mut streams));
        }
        streams.retain(|id| {
            let stream = self.streams.get(*id);
            stream.is_some_and(|stream| stream.is_abandoned())
        });
        streams
    }
}
