//! What the messages on a control connection mean: who attaches, and what it asks.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use nix::sys::socket::{SockType, getsockopt, sockopt};
use rdsock_shm::control::{
    Between, Hello, Lookup, Message, ParseError, Pod, Query, Request, Verdict, Welcome, from_bytes,
    kind, parse, refusal, request,
};
use rdsock_shm::layout::{BellBoard, CONN_RECORDS, TenantMemory, VERSION};
use rdsock_shm::reason::Reason;
use tracing::debug;

use crate::book::{Conn, TenantId};
use crate::channel::{Outgoing, Received};
use crate::connections::End;
use crate::daemon::Daemon;
use crate::memory::{BadMemory, TenantMap, check_bells};
use crate::process::Program;

/// Requests taken from one tenant before others have their turn.
const REQUESTS: usize = 64;
/// With so many unread messages, a tenant's further requests wait.
const UNREAD: usize = 1024;

/// An attached process.
#[derive(Debug)]
pub(crate) struct Tenant {
    /// Its memory.
    pub map: TenantMap,
    /// Its bell board, to be handed to its peers.
    pub bells: Rc<OwnedFd>,
    /// Inode of its network namespace when it attached; `None` when that can't be entered.
    pub netns: Option<u64>,
    /// What it is called.
    pub program: String,
    /// It has to read its messages before more of its requests are taken.
    pub throttled: bool,
}

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

impl Daemon {
    /// A datagram arrived.
    pub(crate) fn on_message(&mut self, id: TenantId, message: Received) -> Result<(), End> {
        let (kind, bytes) = match parse(&message.bytes) {
            Ok(parsed) => parsed,
            Err(ParseError::Version(_)) => {
                self.counters.wrong_version += 1;
                return Err(End::Refused {
                    code: refusal::VERSION,
                    expected: VERSION,
                    cause: "another version of shim and daemon: restart the program",
                });
            }
            Err(ParseError::NotAMessage) => {
                self.counters.malformed += 1;
                return Err(malformed("it sent something that is no message"));
            }
        };
        let result = self.on_kind(id, kind, bytes, message.sender, message.fds);
        if let Err(End::Refused {
            code: refusal::MALFORMED,
            ..
        }) = result
        {
            self.counters.malformed += 1;
        }
        result
    }

    fn on_kind(
        &mut self,
        id: TenantId,
        kind: u16,
        bytes: &[u8],
        sender: i32,
        fds: Vec<OwnedFd>,
    ) -> Result<(), End> {
        let Some(connection) = self.connections.get(&id) else {
            return Ok(());
        };
        let attached = connection.tenant.is_some();
        // A forked child has its parent's socket, too. It may ask for one of its own there, and
        // wake the daemon, but not speak for its parent.
        let own = sender == connection.peer.pid || (connection.adopted && sender == 0);
        if !own && !matches!(kind, kind::ADOPT | kind::KICK) {
            self.counters.stray += 1;
            return Ok(());
        }
        match (kind, attached) {
            (kind::HELLO, false) => self.on_hello(id, body(bytes)?, fds),
            (kind::KICK, true) if bytes.is_empty() && fds.is_empty() => self.drain(id),
            (kind::LOOKUP, true) if fds.is_empty() => {
                let lookup: Lookup = body(bytes)?;
                self.on_lookup(id, lookup)
            }
            (kind::REACH, true) if fds.is_empty() => {
                let question: Between = body(bytes)?;
                self.on_reach(id, question)
            }
            (kind::WHOIS, true) if fds.is_empty() => {
                let question: Between = body(bytes)?;
                self.on_whois(id, question)
            }
            (kind::ADOPT, true) if bytes.is_empty() => self.on_adopt(sender, fds),
            (kind::QUERY, _) if fds.is_empty() => {
                let query: Query = body(bytes)?;
                self.counters.questions += 1;
                self.on_query(id, query)
            }
            _ => Err(malformed("it sent a message that makes no sense now")),
        }
    }

    fn on_hello(&mut self, id: TenantId, hello: Hello, fds: Vec<OwnedFd>) -> Result<(), End> {
        let Some(connection) = self.connections.get(&id) else {
            return Ok(());
        };
        let (pid, uid) = (connection.peer.pid, connection.peer.uid);
        let program = Program::of(pid);
        if !self.config.policy.allows_user(uid) || !self.config.policy.allows_program(&program) {
            return Err(End::Refused {
                code: refusal::POLICY,
                expected: 0,
                cause: "the policy keeps this user or program on the kernel",
            });
        }
        self.check_tenant_limits(uid)?;
        let sizes = (
            size_of::<TenantMemory>() as u64,
            size_of::<BellBoard>() as u64,
        );
        if (hello.memory_size, hello.bell_size) != sizes {
            self.counters.bad_memory += 1;
            return Err(bad_memory(
                "its memory has another size than this version's",
            ));
        }
        let Ok([memory, bells]) = <[OwnedFd; 2]>::try_from(fds) else {
            self.counters.bad_memory += 1;
            return Err(bad_memory("HELLO takes two fds"));
        };
        let (map, bells) =
            match TenantMap::new(memory).and_then(|map| Ok((map, check_bells(bells)?))) {
                Ok(checked) => checked,
                Err(error) => {
                    self.counters.bad_memory += 1;
                    debug!(pid, uid, "memory of a tenant: {error}");
                    return Err(bad_memory(match error {
                        BadMemory::Kind => "its memory is not a memfd of ordinary pages",
                        BadMemory::Seals => "its memory is not sealed against shrinking",
                        BadMemory::Size { .. } => "its memory has a wrong size",
                        BadMemory::Identity => "its memory has a wrong magic or version",
                        BadMemory::Io(_) => "its memory can't be mapped",
                    }));
                }
            };
        let netns = self.namespaces.enter(pid).ok();
        debug!(tenant = id, pid, uid, program = program.name, "attached");
        let tenant = Tenant {
            map,
            bells: Rc::new(bells),
            netns,
            program: program.name,
            throttled: false,
        };
        tenant.map.start_sleep();
        self.tell_routes(&tenant.map);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.tenant = Some(tenant);
        }
        self.counters.attached += 1;
        let answer = self.config.fabric.as_ref().map(|f| f.connect_timeout);
        let welcome = Welcome {
            tenant: id,
            answer_us: answer.unwrap_or_default().as_micros() as u32,
            reserved: 0,
        };
        self.send(id, Message::new(kind::WELCOME, &welcome).into())?;
        // Whatever it put in before the daemon slept on its queue.
        self.drain(id)
    }

    fn check_tenant_limits(&self, uid: u32) -> Result<(), End> {
        let (mut all, mut of_user) = (0, 0);
        for connection in self
            .connections
            .values()
            .filter(|other| other.tenant.is_some())
        {
            all += 1;
            of_user += u64::from(connection.peer.uid == uid);
        }
        let limit = |most: u64, cause| End::Refused {
            code: refusal::LIMIT,
            expected: most.min(u32::MAX.into()) as u32,
            cause,
        };
        if all >= self.config.max_tenants {
            return Err(limit(self.config.max_tenants, "max_tenants is reached"));
        }
        if of_user >= self.config.max_tenants_per_user {
            let most = self.config.max_tenants_per_user;
            return Err(limit(most, "max_tenants_per_user is reached"));
        }
        Ok(())
    }

    /// A forked child hands over one end of a socket pair of its own making.
    fn on_adopt(&mut self, sender: i32, fds: Vec<OwnedFd>) -> Result<(), End> {
        let Ok([socket]) = <[OwnedFd; 1]>::try_from(fds) else {
            return Err(malformed("ADOPT takes one fd"));
        };
        let kind = getsockopt(&socket, sockopt::SockType);
        let nonblocking = set_nonblocking(&socket);
        if kind != Ok(SockType::SeqPacket) || nonblocking.is_err() {
            return Err(malformed("ADOPT takes a SOCK_SEQPACKET socket"));
        }
        self.welcome(socket, Some(sender));
        Ok(())
    }

    /// Takes what is in a tenant's queue, up to a bound; then sleeps on it.
    pub(crate) fn drain(&mut self, id: TenantId) -> Result<(), End> {
        if let Some(tenant) = self.tenant(id) {
            tenant.map.end_sleep();
        }
        for _ in 0..REQUESTS {
            let Some(request) = self.next_request(id) else {
                return Ok(());
            };
            self.on_request(id, &request)?;
        }
        self.busy.push_back(id);
        Ok(())
    }

    fn next_request(&mut self, id: TenantId) -> Option<Request> {
        let connection = self.connections.get_mut(&id)?;
        let tenant = connection.tenant.as_mut()?;
        if connection.channel.queued() >= UNREAD {
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
            self.counters.bad_requests += 1;
            return Ok(());
        }
        match request.what {
            request::ANNOUNCE => self.on_announce(conn, request),
            request::CLOSED => {
                self.give_up(conn);
                Ok(())
            }
            request::LEFT => {
                self.counters.left += 1;
                self.give_up(conn);
                Ok(())
            }
            request::DECLINED => {
                self.counters.declined += 1;
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
                self.counters.bad_requests += 1;
                Ok(())
            }
        }
    }

    /// Messages of a tenant were sent: its requests are taken again when it has read enough.
    pub(crate) fn unthrottle(&mut self, id: TenantId) {
        if let Some(connection) = self.connections.get_mut(&id)
            && let Some(tenant) = &mut connection.tenant
            && tenant.throttled
            && connection.channel.queued() < UNREAD / 2
        {
            tenant.throttled = false;
            self.busy.push_back(id);
        }
    }

    /// Tells a tenant why a connection stays on the kernel for now.
    pub(crate) fn verdict(conn: Conn, reason: Reason) -> Outgoing {
        let verdict = Verdict {
            conn: conn.number,
            generation: conn.generation,
            reason: reason as u32,
            reserved: 0,
        };
        Message::new(kind::VERDICT, &verdict).into()
    }

    pub(crate) fn tenant(&self, id: TenantId) -> Option<&Tenant> {
        self.connections.get(&id)?.tenant.as_ref()
    }

    /// A tenant has gone. When its process lives (`alive`), the streams that nobody else holds
    /// are returned, to be looked at later.
    pub(crate) fn tenant_gone(&mut self, id: TenantId, tenant: Tenant, alive: bool) -> Vec<u64> {
        self.counters.detached += 1;
        if let Some(netns) = tenant.netns {
            self.namespaces.leave(netns);
        }
        self.forget_listener(id);
        let mut streams = self.book.tenant_gone(id);
        if !alive {
            for stream in streams.drain(..) {
                self.check_stream(stream);
            }
        }
        streams.retain(|id| {
            self.book
                .stream(*id)
                .is_some_and(|stream| stream.is_abandoned())
        });
        streams
    }
}

fn bad_memory(cause: &'static str) -> End {
    End::Refused {
        code: refusal::MEMORY,
        expected: size_of::<TenantMemory>() as u32,
        cause,
    }
}

fn set_nonblocking(socket: &OwnedFd) -> nix::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
