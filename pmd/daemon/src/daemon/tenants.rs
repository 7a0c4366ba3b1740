//! What the messages on a control connection mean: who attaches, and what it asks.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdsock_shm::control::{
    Attached, Between, Hello, Lookup, Message, ParseError, Pod, Query, Request, Verdict, Welcome,
    from_bytes, kind, parse, refusal, request,
};
use rdsock_shm::layout::{BellBoard, CONN_RECORDS, TenantMemory, VERSION};
use rdsock_shm::reason::Reason;
use tracing::debug;

use super::{Daemon, End};
use crate::accounts::{Paid, Thing};
use crate::agenda::Due;
use crate::book::{Conn, TenantId};
use crate::channel::{Luggage, Outgoing, Received, sender};
use crate::connections::{Belongings, Connection, Greeted, Inbox, Tenant};
use crate::found::Found;
use crate::memory::{BadBoard, Bells, TenantMap};
use crate::namespaces::{self, Opened};
use crate::porters::Owner;
use crate::process::netns_inode;
use crate::rights::{Changed, Held, Passport, Rights};

/// Time between two looks whether tenants are who they were, and the tenants looked at in one.
const SWEEP: Duration = Duration::from_secs(2);
const SWEPT: usize = 64;
/// A process that attaches is looked at for no more of its other connections. An honest one has one.
const EARLIER: usize = 16;
/// Requests taken from one tenant before others have their turn.
const REQUESTS: usize = 16;
/// With so many unread messages, a tenant's further requests wait.
const UNREAD: usize = 1024;
/// With so many looks at its sockets under way, a tenant's further requests wait.
const LOOKS: usize = 16;
/// Descriptors of a tenant besides those of its connection: its memory, and the pipe that keeps its pages where they are.
const TENANT_DESCRIPTORS: u64 = 2;
/// Its bells, which its streams keep when it has gone.
const BELLS_DESCRIPTORS: u64 = 1;

fn malformed(cause: &'static str) -> End {
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
        let attached = connection.tenant.is_some();
        let greeted = connection.greeted.is_some();
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
                    self.welcome(socket, maker, true);
                } else {
                    self.journal.counters.stray += 1;
                    let cause = "it passed on a socket that another process made";
                    self.journal.refusal(cause, maker.uid, sender);
                }
                Ok(())
            }
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

    /// May this caller attach, as what it runs now?
    fn may_attach(&self, connection: &Connection) -> Result<String, End> {
        let program = connection.peer.program();
        match Rights::may_attach(&self.config.policy, connection.peer.uid, &program) {
            true => Ok(program.name),
            false => Err(End::Refused {
                code: refusal::POLICY,
                expected: 0,
                cause: "the policy keeps this user or program on the kernel",
            }),
        }
    }

    /// Somebody wants to be a tenant: what it needs is made, by a porter, and charged from then on.
    fn on_hello(
        &mut self,
        id: TenantId,
        hello: Hello,
        bells: Option<Result<Bells, BadBoard>>,
    ) -> Result<(), End> {
        let Some(connection) = self.connections.get(id) else {
            return Ok(());
        };
        let (pid, uid) = (connection.peer.pid, connection.peer.uid);
        self.may_attach(connection)?;
        let bells = sizes_of(&hello).and_then(|()| bells.transpose());
        let bells = bells.map_err(|error| {
            self.journal.counters.bad_memory += 1;
            debug!(pid, uid, "bell board of a tenant: {error}");
            bad_board(error)
        })?;
        let of_memory = [(Thing::Descriptors, TENANT_DESCRIPTORS)];
        let of_memory = self.accounts.charge(uid, &of_memory)?;
        let Some(connection) = self.connections.get_mut(id) else {
            return Ok(());
        };
        // Bells that nobody pays for any more may be kept by streams: they have an account of their own.
        connection.charge.more(Thing::Tenants, 1)?;
        connection.charge.less(Thing::Callers, 1);
        connection.greeted = Some(Greeted::Making);
        let owner = connection.channel.socket().owner();
        self.porters.give(owner, move || {
            let make = || {
                let bells = bells.map_or_else(Bells::make, Ok)?;
                Ok((TenantMap::make(of_memory)?, bells))
            };
            Some(Found::Made {
                owner,
                made: make(),
            })
        });
        Ok(())
    }

    /// A caller's memory is made. It is sent it, with the networks of other nodes written there: nobody else has it yet.
    pub(super) fn on_made(&mut self, owner: Owner, made: io::Result<(TenantMap, Bells)>) {
        let id = owner.connection;
        let connection = self.connections.get_mut(id);
        let greeted = connection.and_then(|connection| connection.greeted.take());
        match (greeted, made) {
            (Some(Greeted::Making), Ok((map, bells))) => {
                self.serve(id, |daemon| daemon.greet(owner, map, bells));
            }
            (Some(Greeted::Making), Err(error)) => self.serve(id, |daemon| {
                debug!(id, "memory for a tenant: {error}");
                daemon.journal.counters.bad_memory += 1;
                Err(NO_MEMORY)
            }),
            // Whoever it was for has gone.
            (_, Ok((map, _))) => self.unmap(owner, map),
            (_, Err(_)) => {}
        }
    }

    fn greet(&mut self, owner: Owner, map: TenantMap, bells: Bells) -> Result<(), End> {
        let id = owner.connection;
        let of_bells = [(Thing::Descriptors, BELLS_DESCRIPTORS)];
        let of_bells = match self.accounts.charge(owner.uid, &of_bells) {
            Ok(charge) => Arc::new(charge),
            Err(over) => {
                self.unmap(owner, map);
                return Err(over.into());
            }
        };
        let board = Arc::new(Paid::new(bells.board, of_bells));
        let file = map.file().clone();
        let belongings = Belongings {
            map,
            bells: board.clone(),
            may_be_rung: bells.may_be_rung,
        };
        self.tell_routes(&belongings.map);
        if let Some(connection) = self.connections.get_mut(id) {
            connection.greeted = Some(Greeted::Sent(Box::new(belongings), Instant::now()));
        }
        let answer = self.config.fabric.as_ref().map(|f| f.connect_timeout);
        let welcome = Welcome {
            tenant: id,
            answer_us: answer.unwrap_or_default().as_micros() as u32,
            reserved: 0,
        };
        let mut welcome = Outgoing::from(Message::new(kind::WELCOME, &welcome));
        welcome.fds.push(file);
        welcome.fds.extend(bells.is_new.then_some(board));
        self.send(id, welcome)
    }

    /// A caller says that it has mapped the memory that it was sent. Nothing else that it says is read before that was looked at.
    fn on_mapped_memory(&mut self, id: TenantId, attached: Attached) -> Result<(), End> {
        let Some(connection) = self.connections.get_mut(id) else {
            return Ok(());
        };
        let Some(Greeted::Sent(belongings, _)) = connection
            .greeted
            .take_if(|greeted| matches!(greeted, Greeted::Sent(..)))
        else {
            return Err(malformed(
                "it says that it has mapped memory which it was not sent",
            ));
        };
        let Belongings {
            map,
            bells,
            may_be_rung,
        } = *belongings;
        connection.greeted = Some(Greeted::LookedAt { bells, may_be_rung });
        connection.inbox = Inbox::Receiving;
        let peer = connection.peer.clone();
        let owner = connection.channel.socket().owner();
        // All of its groups are read, of which there may be very many: that is no quick look.
        self.porters.give(owner, move || {
            let passport = Passport::new(peer, map.file(), attached.address);
            let kept = map.keep_whole();
            Some(Found::Attached {
                owner,
                passport,
                map: (map, kept),
            })
        });
        Ok(())
    }

    /// A caller was looked at that says it has mapped its memory.
    pub(super) fn on_looked_at(
        &mut self,
        owner: Owner,
        passport: Result<Passport, Changed>,
        (map, kept): (TenantMap, io::Result<()>),
    ) {
        let id = owner.connection;
        let connection = self.connections.get_mut(id);
        let greeted = connection.and_then(|connection| connection.greeted.take());
        let Some(Greeted::LookedAt { bells, may_be_rung }) = greeted else {
            // It has gone.
            return self.unmap(owner, map);
        };
        let belongings = Belongings {
            map,
            bells,
            may_be_rung,
        };
        self.serve(id, |daemon| {
            daemon.read_again(id)?;
            let refused = match passport {
                Ok(passport) if kept.is_ok() => return daemon.attach(owner, passport, belongings),
                Ok(_) => {
                    daemon.journal.counters.bad_memory += 1;
                    SEALED
                }
                Err(changed) => {
                    daemon.journal.counters.changed += 1;
                    changed.into()
                }
            };
            daemon.unmap(owner, belongings.map);
            Err(refused)
        });
    }

    /// A caller is to be a tenant. A network namespace that is not known yet is opened first.
    fn attach(
        &mut self,
        owner: Owner,
        passport: Passport,
        belongings: Belongings,
    ) -> Result<(), End> {
        let pid = passport.peer.pid;
        let is_new = netns_inode(pid).is_ok_and(|inode| !self.rights.namespaces.is_open(inode));
        let Some(connection) = self.connections.get_mut(owner.connection) else {
            self.unmap(owner, belongings.map);
            return Ok(());
        };
        if !is_new {
            return self.become_tenant(owner, passport, belongings);
        }
        let entering = Greeted::Entering(Box::new((passport, belongings)));
        connection.greeted = Some(entering);
        connection.inbox = Inbox::Receiving;
        self.have_namespace_opened(owner, pid, None);
        Ok(())
    }

    /// Has a porter open the network namespace that a process is in, for a caller that attaches, or for an announcement.
    pub(super) fn have_namespace_opened(&self, owner: Owner, pid: i32, held: Option<(Conn, Held)>) {
        self.porters.give(owner, move || {
            Some(Found::Namespace {
                owner,
                opened: namespaces::open(pid),
                held,
            })
        });
    }

    /// A porter has opened a network namespace, or could not.
    pub(super) fn on_namespace(
        &mut self,
        owner: Owner,
        opened: io::Result<Opened>,
        held: Option<(Conn, Held)>,
    ) {
        let inode = opened.as_ref().map(|opened| opened.inode).ok();
        if let Ok(opened) = opened {
            self.rights.namespaces.add(opened);
        }
        // It stays open meanwhile.
        let is_open = inode.is_some_and(|inode| self.rights.namespaces.enter(inode));
        let id = owner.connection;
        if let Some((conn, held)) = held {
            self.on_followed(conn, held);
        } else if let Some(connection) = self.connections.get_mut(id)
            && let Some(Greeted::Entering(entering)) = connection.greeted.take()
        {
            let (passport, belongings) = *entering;
            self.serve(id, |daemon| {
                daemon.read_again(id)?;
                daemon.become_tenant(owner, passport, belongings)
            });
        }
        // Whoever it was opened for is there by now, or has gone.
        if let Some(inode) = inode.filter(|_| is_open) {
            self.rights.namespaces.leave(inode);
        }
    }

    /// A caller is a tenant from now on.
    fn become_tenant(
        &mut self,
        owner: Owner,
        passport: Passport,
        belongings: Belongings,
    ) -> Result<(), End> {
        let Belongings {
            map,
            bells,
            may_be_rung,
        } = belongings;
        let id = owner.connection;
        // It may run another program than when it said HELLO.
        let allowed = match self.connections.get(id) {
            Some(connection) => self.may_attach(connection),
            // It has gone.
            None => Err(End::HungUp),
        };
        let program = match allowed {
            Ok(program) => program,
            Err(end) => {
                self.unmap(owner, map);
                return Err(end);
            }
        };
        let (pid, uid) = (passport.peer.pid, passport.peer.uid);
        self.detach_earlier_programs(id, pid);
        let netns = self.enter_netns(id);
        debug!(tenant = id, pid, uid, program, "attached");
        let tenant = Tenant {
            map,
            bells,
            may_be_rung,
            passport: Arc::new(passport),
            netns,
            program,
            looks: 0,
            throttled: false,
            unread: false,
        };
        tenant.map.start_sleep();
        // They may be others by now.
        self.tell_routes(&tenant.map);
        self.connections.attach(id, tenant);
        if self.swept.is_none() {
            self.swept = Some(VecDeque::new());
            self.agenda.after(SWEEP, Due::Sweep);
        }
        self.journal.counters.attached += 1;
        // Whatever it put in before the daemon slept on its queue.
        self.drain(id)
    }

    /// A connection ends: what was made for it is given back.
    pub(super) fn forget_greeted(&self, owner: Owner, greeted: Option<Greeted>) {
        match greeted {
            Some(Greeted::Sent(belongings, _)) => self.unmap(owner, belongings.map),
            Some(Greeted::Entering(entering)) => self.unmap(owner, entering.1.map),
            Some(Greeted::Making | Greeted::LookedAt { .. }) | None => {}
        }
    }

    /// Has a tenant's memory unmapped, which may have to wait for all who map it.
    fn unmap(&self, owner: Owner, map: TenantMap) {
        self.porters.give(owner, move || {
            drop(map);
            None
        });
    }

    /// Looks into the network namespace that a process is in. `None` when that is not open, or its user has no
    /// descriptor left for that. Each tenant pays for the socket there, so that whoever stays has paid.
    pub(super) fn enter_netns(&mut self, id: TenantId) -> Option<u64> {
        let connection = self.connections.get_mut(id)?;
        let (pid, uid) = (connection.peer.pid, connection.peer.uid);
        let netns = netns_inode(pid).ok()?;
        if !self.rights.namespaces.enter(netns) {
            return None;
        }
        if self.rights.namespaces.is_home_inode(netns) {
            return Some(netns);
        }
        match connection.charge.more(Thing::Descriptors, 1) {
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
            connection.charge.less(Thing::Descriptors, 1);
        }
    }

    /// A process says HELLO: whatever it was attached as before it ran another program is over. Of very many such
    /// connections, the rest is left to the sweep.
    fn detach_earlier_programs(&mut self, id: TenantId, pid: i32) {
        let earlier = self.connections.attached();
        let earlier =
            earlier.filter(|(other, connection, _)| *other != id && connection.peer.pid == pid);
        let earlier: Vec<TenantId> = earlier.take(EARLIER).map(|(other, ..)| other).collect();
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
            self.have_process_looked_at(id);
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
        let tenant = connection.tenant.as_mut()?;
        if connection.channel.queued() >= UNREAD || tenant.looks >= LOOKS {
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
        if let Some(Connection {
            channel,
            tenant: Some(tenant),
            ..
        }) = self.connections.get_mut(id)
            && tenant.throttled
            && channel.queued() < UNREAD / 2
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

    /// A tenant has gone. When its process lives (`alive`), the streams that nobody else holds
    /// are returned, to be looked at later.
    pub(super) fn tenant_gone(&mut self, id: TenantId, tenant: Tenant, alive: bool) -> Vec<u64> {
        self.journal.counters.detached += 1;
        let (owner, map) = (Self::owner_of(id, &tenant), tenant.map);
        // Behind the last that it is told.
        self.porters.give(sender(owner), move || {
            map.count_message();
            drop(map);
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
            self.streams
                .get(*id)
                .is_some_and(|stream| stream.is_abandoned())
        });
        streams
    }
}

/// Not the tenant's fault, and it passes: the tenant asks again.
const NO_MEMORY: End = End::Refused {
    code: refusal::LIMIT,
    expected: 0,
    cause: "the daemon has no descriptors or memory left to make its memory: raise LimitNOFILE or free memory",
};

/// Only where the daemon can't make memory that nobody makes holes in.
const SEALED: End = End::Refused {
    code: refusal::MEMORY,
    expected: 0,
    cause: "it has sealed its memory, so that the daemon can't seal it against holes",
};

/// Does a tenant take its memory and its board for as long as they are?
fn sizes_of(hello: &Hello) -> Result<(), BadBoard> {
    for (found, expected) in [
        (hello.memory_size, size_of::<TenantMemory>() as u64),
        (hello.bell_size, size_of::<BellBoard>() as u64),
    ] {
        if found != expected {
            return Err(BadBoard::Size { found, expected });
        }
    }
    Ok(())
}

fn bad_board(error: BadBoard) -> End {
    let cause = match error {
        BadBoard::Io(_) => return NO_MEMORY,
        BadBoard::Kind => "its bell board is not a memfd of ordinary pages",
        BadBoard::Seals => {
            "its bell board is not sealed against shrinking and growing, or against being written"
        }
        BadBoard::Size { .. } => "its memory or its bell board has a wrong size",
        BadBoard::Number => "HELLO takes one fd at most",
        BadBoard::Identity => "its bell board has a wrong magic or version",
    };
    End::Refused {
        code: refusal::MEMORY,
        expected: size_of::<TenantMemory>() as u32,
        cause,
    }
}
