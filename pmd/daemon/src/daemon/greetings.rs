//! How a caller becomes a tenant: HELLO, WELCOME, ATTACHED (`docs/shared-memory.md`, "To attach"). Until it is one, nothing is
//! looked for or handed out in its name, and its memory is not touched.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use nix::sys::epoll::EpollFlags;
use rdsock_shm::control::{Attached, Hello, Message, Welcome, kind, refusal};
use rdsock_shm::layout::{BellBoard, TenantMemory};
use tracing::debug;

use super::tenants::{SWEEP, malformed};
use super::{Daemon, End};
use crate::accounts::Thing;
use crate::agenda::Due;
use crate::book::{Conn, TenantId};
use crate::channel::{Foreign, Outgoing};
use crate::connections::{Belongings, Connection, Inbox, Standing, Tenant};
use crate::found::Found;
use crate::memory::{BadBoard, Bells, TenantMap};
use crate::namespaces::{self, Opened};
use crate::porters::Owner;
use crate::process::Program;
use crate::rights::{Changed, Passport};

/// Descriptors of a tenant's memory,
const MEMORY_DESCRIPTORS: u64 = 1;
/// and of that which keeps its pages and those of its bells where they are.
const KEPT_DESCRIPTORS: u64 = 1;
/// Its bells, which its streams keep when it has gone.
const BELLS_DESCRIPTORS: u64 = 1;

impl Daemon {
    /// May a user's program attach?
    fn may_attach(&self, uid: u32, program: &Program) -> Result<(), End> {
        let allowed = self.rights.may_attach(&self.config.policy, uid, program);
        allowed.map_err(|cause| End::Refused {
            code: refusal::POLICY,
            expected: 0,
            cause,
        })
    }

    /// Somebody wants to be a tenant: what it needs is made, by a porter, and charged from then on.
    pub(super) fn on_hello(
        &mut self,
        id: TenantId,
        hello: Hello,
        bells: Option<Result<Bells, BadBoard>>,
    ) -> Result<(), End> {
        let Some(connection) = self.connections.get(id) else {
            return Ok(());
        };
        let (pid, uid) = (connection.peer.pid, connection.peer.uid);
        let bells = sizes_of(&hello).and_then(|()| bells.transpose());
        let bells = bells.map_err(|error| {
            self.journal.counters.bad_memory += 1;
            debug!(pid, uid, "bell board of a tenant: {error}");
            bad_board(error)
        })?;
        let mut charge = |amount| self.accounts.charge(uid, &[(Thing::Descriptors, amount)]);
        let (of_memory, of_pages) = (charge(MEMORY_DESCRIPTORS)?, charge(KEPT_DESCRIPTORS)?);
        let Some(connection) = self.connections.get_mut(id) else {
            return Ok(());
        };
        // Bells that nobody pays for any more may be kept by streams: they have an account of their own.
        connection.charge.more(Thing::Tenants, 1)?;
        connection.charge.less(Thing::Callers, 1);
        connection.begin_making();
        let owner = connection.channel.socket().owner();
        let peer = connection.peer.clone();
        let closer = self.porters.closer(owner);
        self.porters.give(owner, move || {
            let program = peer.program();
            let make = || {
                let bells = bells.map_or_else(|| Bells::make(&closer), Ok)?;
                let map = TenantMap::make(&bells, of_memory, of_pages)?;
                Ok((map, bells))
            };
            Some(Found::Made {
                owner,
                program,
                made: make(),
            })
        });
        Ok(())
    }

    /// A caller's memory is made. It is sent it, with the networks of other nodes written there: nobody else has it yet.
    pub(super) fn on_made(
        &mut self,
        owner: Owner,
        program: &Program,
        made: io::Result<(Foreign<TenantMap>, Bells)>,
    ) {
        let id = owner.connection;
        let connection = self.connections.get(id);
        let standing = connection.map(Connection::standing);
        let is_awaited = matches!(standing, Some(Standing::Making));
        match made {
            Ok((map, bells)) if is_awaited => {
                self.serve(id, |daemon| {
                    daemon.may_attach(owner.uid, program)?;
                    daemon.greet(owner, map, bells)
                });
            }
            Err(error) if is_awaited => self.serve(id, |daemon| {
                debug!(id, "memory for a tenant: {error}");
                daemon.journal.counters.bad_memory += 1;
                Err(NO_MEMORY)
            }),
            // Whoever it was for has gone.
            Ok(_) | Err(_) => {}
        }
    }

    fn greet(&mut self, owner: Owner, map: Foreign<TenantMap>, bells: Bells) -> Result<(), End> {
        let id = owner.connection;
        let of_bells = [(Thing::Descriptors, BELLS_DESCRIPTORS)];
        let of_bells = self.accounts.charge(owner.uid, &of_bells)?;
        let kept = map.kept().clone();
        let board = Arc::new(bells.board.paid_by(of_bells).with(kept));
        let file = map.file().clone();
        let belongings = Belongings {
            map,
            bells: board.clone(),
            may_be_rung: bells.may_be_rung,
        };
        self.tell_routes(&belongings.map);
        if let Some(connection) = self.connections.get_mut(id) {
            connection.begin_sending(belongings, Instant::now());
        }
        let answer = self.config.fabric.as_ref().map(|f| f.connect_timeout);
        let welcome = Welcome {
            tenant: id,
            answer_us: answer.unwrap_or_default().as_micros() as u32,
            judges: self.config.policy.judges_programs().into(),
        };
        let mut welcome = Outgoing::from(Message::new(kind::WELCOME, &welcome));
        welcome.fds.push(file);
        welcome.fds.extend(bells.is_new.then_some(board));
        self.send(id, welcome)
    }

    /// A caller says that it has mapped the memory that it was sent. Nothing else that it says is read before that was looked at.
    pub(super) fn on_mapped_memory(&mut self, id: TenantId, attached: Attached) -> Result<(), End> {
        let Some(connection) = self.connections.get_mut(id) else {
            return Ok(());
        };
        let map = connection.begin_looking().ok_or(malformed(
            "it says that it has mapped memory which it was not sent",
        ))?;
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
        (map, kept): (Foreign<TenantMap>, io::Result<()>),
    ) {
        let id = owner.connection;
        let connection = self.connections.get_mut(id);
        let Some(Ok(belongings)) = connection.map(|connection| connection.end_looking(map)) else {
            // It has gone.
            return;
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
        let peer = &passport.peer;
        let pid = peer.pid;
        let netns = passport.netns;
        let is_new = netns.is_some_and(|inode| !self.rights.namespaces.is_open(inode));
        if !is_new {
            return self.become_tenant(owner, passport, belongings, netns);
        }
        let Some(connection) = self.connections.get_mut(owner.connection) else {
            return Ok(());
        };
        connection.begin_entering(passport, belongings);
        connection.inbox = Inbox::Receiving;
        self.have_namespace_opened(owner, pid, None, None);
        Ok(())
    }

    /// Has a porter open the network namespace that a process is in, unless that is the `known` one: for a caller that attaches, or for
    /// an announcement.
    pub(super) fn have_namespace_opened(
        &self,
        owner: Owner,
        pid: i32,
        known: Option<u64>,
        announced: Option<Conn>,
    ) {
        self.porters.give(owner, move || {
            Some(Found::Namespace {
                owner,
                opened: namespaces::open(pid, known),
                announced,
            })
        });
    }

    /// A porter has opened a network namespace, or could not.
    pub(super) fn on_namespace(
        &mut self,
        owner: Owner,
        opened: io::Result<Opened>,
        announced: Option<Conn>,
    ) {
        let inode = opened.as_ref().map(|opened| opened.inode).ok();
        if let Ok(opened) = opened {
            self.rights.namespaces.add(opened);
        }
        // It stays open meanwhile.
        let is_open = inode.is_some_and(|inode| self.rights.namespaces.enter(inode));
        let id = owner.connection;
        if let Some(conn) = announced {
            self.on_followed(conn, inode);
        } else if let Some(connection) = self.connections.get_mut(id)
            && let Some((passport, belongings)) = connection.end_entering()
        {
            self.serve(id, |daemon| {
                daemon.read_again(id)?;
                daemon.become_tenant(owner, passport, belongings, inode)
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
        netns: Option<u64>,
    ) -> Result<(), End> {
        let Belongings {
            map,
            bells,
            may_be_rung,
        } = belongings;
        let id = owner.connection;
        let (pid, uid) = (passport.peer.pid, passport.peer.uid);
        // It may run another program than when it said HELLO.
        if self.connections.get(id).is_none() {
            return Err(End::HungUp);
        }
        self.may_attach(uid, &passport.program)?;
        self.detach_earlier_programs(id, pid);
        let netns = netns.and_then(|netns| self.enter_netns(id, netns));
        debug!(
            tenant = id,
            pid,
            uid,
            program = passport.program.name,
            "attached"
        );
        let tenant = Tenant {
            map,
            bells,
            may_be_rung,
            passport: Arc::new(passport),
            netns,
            looks: 0,
            throttled: false,
            unread: false,
            swept: false,
        };
        tenant.map.start_sleep();
        // They may be others by now.
        self.tell_routes(&tenant.map);
        let peer = tenant.passport.peer.clone();
        self.ends.watch(id, peer, EpollFlags::EPOLLIN);
        self.connections.attach(id, tenant);
        if self.swept.is_none() {
            self.swept = Some(VecDeque::new());
            self.agenda.after(SWEEP, Due::Sweep);
        }
        self.journal.counters.attached += 1;
        // Whatever it put in before the daemon slept on its queue.
        self.drain(id)
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
