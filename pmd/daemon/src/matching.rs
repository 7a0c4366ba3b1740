//! From announcements to pairs: asks the kernel whether they are true, and finds the other end.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use rdsock_shm::control::Request;
use rdsock_shm::reason::Reason;
use tracing::debug;

use crate::book::{Announced, Announcement, Conn, Role, Route, TenantId};
use crate::connections::End;
use crate::daemon::Daemon;
use crate::process::{OtherHolder, other_holder, processor_time, socket_inode};

/// Longest search for other holders of one socket, in processor time.
const SEARCH: Duration = Duration::from_millis(20);

/// Processor time that a user may make the daemon spend on searching `/proc`: a tenth of all time.
#[derive(Debug)]
pub(crate) struct SearchBudget {
    next: Instant,
}

impl Default for SearchBudget {
    fn default() -> Self {
        let now = Instant::now();
        SearchBudget {
            next: now.checked_sub(Self::SAVED).unwrap_or(now),
        }
    }
}

impl SearchBudget {
    const SHARE: u32 = 10;
    /// Saved up at most.
    const SAVED: Duration = Duration::from_secs(1);

    fn run<T>(&mut self, search: impl FnOnce() -> T) -> Option<T> {
        let now = Instant::now();
        if self.next > now {
            return None;
        }
        let before = processor_time();
        let result = search();
        let spent = processor_time().saturating_sub(before);
        let earliest = now.checked_sub(Self::SAVED).unwrap_or(now);
        self.next = self.next.max(earliest) + spent * Self::SHARE;
        Some(result)
    }
}

/// What a request says of a connection, with its numbers in range.
struct Claim {
    conn: Conn,
    fd: i32,
    cookie: u64,
    netns_cookie: u64,
    local: SocketAddr,
    peer: SocketAddr,
    role: Role,
    maybe_shared: bool,
}

impl Claim {
    fn parse(conn: Conn, request: &Request) -> Option<Self> {
        let address = |ip: [u8; 16], port: u32| {
            let ip = IpAddr::V6(Ipv6Addr::from(ip)).to_canonical();
            Some(SocketAddr::new(ip, port.try_into().ok()?))
        };
        let role = match request.active {
            0 => Role::Passive,
            1 => Role::Active,
            2 => Role::Unknown,
            _ => return None,
        };
        Some(Claim {
            conn,
            fd: request.fd,
            cookie: request.cookie,
            netns_cookie: request.netns,
            local: address(request.local, request.local_port)?,
            peer: address(request.peer, request.peer_port)?,
            role,
            maybe_shared: request.extra != 0,
        })
    }
}

impl Daemon {
    /// A tenant holds a connection, or says so.
    pub(crate) fn on_announce(&mut self, conn: Conn, request: &Request) -> Result<(), End> {
        self.counters.announced += 1;
        if let Some(stream) = self.book.replace(conn) {
            self.check_stream(stream);
        }
        let ticket = request.stream_id;
        let Some(claim) = Claim::parse(conn, request) else {
            self.counters.bad_requests += 1;
            return self.turn_down(conn, Reason::Unverified);
        };
        if !self
            .config
            .policy
            .allows_ports(claim.local.port(), claim.peer.port())
        {
            return self.turn_down(conn, Reason::Policy);
        }
        let announced = match self.verify(&claim) {
            Ok(announced) => announced,
            Err(reason) => {
                self.counters.unverified += 1;
                debug!(?conn, fd = claim.fd, "not verified: {}", reason.text());
                return self.send(conn.tenant, Self::verdict(conn, reason));
            }
        };
        if claim.maybe_shared && self.is_shared(&announced) {
            return self.turn_down(conn, Reason::Shared);
        }
        if ticket != 0 {
            return self.promote_carried(announced, ticket);
        }
        self.find_other_end(announced)
    }

    pub(crate) fn turn_down(&mut self, conn: Conn, reason: Reason) -> Result<(), End> {
        self.counters.turned_down += 1;
        debug!(?conn, "turned down: {}", reason.text());
        self.send(conn.tenant, Self::verdict(conn, reason))
    }

    /// Asks the kernel whether the tenant holds this very connection.
    fn verify(&mut self, claim: &Claim) -> Result<Announced, Reason> {
        let tenant = claim.conn.tenant;
        self.follow_netns(tenant, claim.netns_cookie);
        let connection = self.connections.get(&tenant).ok_or(Reason::Unverified)?;
        let own = connection.tenant.as_ref().and_then(|tenant| tenant.netns);
        let own = own.ok_or(Reason::OtherNamespace)?;
        let (netns, diag) = self
            .namespaces
            .locate(claim.netns_cookie, own)
            .ok_or(Reason::OtherNamespace)?;
        let inode = socket_inode(connection.peer.pid, claim.fd).ok_or(Reason::Unverified)?;
        let found = match diag.find(claim.local, claim.peer, claim.cookie) {
            Ok(found) => found.ok_or(Reason::Unverified)?,
            Err(error) => {
                let uid = connection.peer.uid;
                self.log_fault(
                    "the kernel does not tell of sockets (sock_diag)",
                    uid,
                    &error,
                );
                return Err(Reason::Unverified);
            }
        };
        // The process is looked at last: while it lives, its id named it all the time.
        if found.inode != inode || !found.established || !connection.peer.is_alive() {
            return Err(Reason::Unverified);
        }
        Ok(Announced {
            conn: claim.conn,
            fd: claim.fd,
            pid: connection.peer.pid,
            uid: connection.peer.uid,
            cookie: claim.cookie,
            inode,
            route: Route {
                netns,
                local: claim.local,
                peer: claim.peer,
            },
            role: claim.role,
        })
    }

    /// When a socket is in no namespace that is known, its process may have moved since it
    /// attached.
    fn follow_netns(&mut self, id: TenantId, cookie: u64) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let (pid, Some(tenant)) = (connection.peer.pid, connection.tenant.as_mut()) else {
            return;
        };
        let known = tenant
            .netns
            .is_some_and(|own| self.namespaces.locate(cookie, own).is_some());
        if known {
            return;
        }
        let now = self.namespaces.enter(pid).ok();
        if let Some(before) = std::mem::replace(&mut tenant.netns, now) {
            self.namespaces.leave(before);
        }
    }

    /// Does an announcement that was true still hold?
    fn still_holds(&self, announced: &Announced) -> bool {
        let Some(connection) = self.connections.get(&announced.conn.tenant) else {
            return false;
        };
        let route = announced.route;
        let found = self.namespaces.diag(route.netns).and_then(|diag| {
            diag.find(route.local, route.peer, announced.cookie)
                .ok()
                .flatten()
        });
        found.is_some_and(|found| found.established && found.inode == announced.inode)
            && socket_inode(connection.peer.pid, announced.fd) == Some(announced.inode)
            && connection.peer.is_alive()
    }

    /// Does another process hold the socket, too? When in doubt, yes: the shim asks again.
    fn is_shared(&mut self, announced: &Announced) -> bool {
        let budget = self.searches.entry(announced.uid).or_default();
        let found = budget.run(|| other_holder(announced.pid, announced.inode, SEARCH));
        found != Some(OtherHolder::Nobody)
    }

    fn find_other_end(&mut self, announced: Announced) -> Result<(), End> {
        let conn = announced.conn;
        loop {
            let other = match self.book.announce(announced) {
                Announcement::Waits => return Ok(()),
                Announcement::Refused(reason) => return self.turn_down(conn, reason),
                Announcement::Matches(other) => other,
            };
            // It may have been closed, and its addresses used again by somebody else, since it
            // was announced.
            if !self.still_holds(&other) {
                self.counters.unverified += 1;
                self.tell(other.conn, conn, Reason::Unverified)?;
                continue;
            }
            return match self.make(announced, other) {
                Ok(()) => self.hand_out(announced, other),
                Err(reason) => {
                    self.counters.turned_down += 2;
                    debug!(?conn, other = ?other.conn, "turned down: {}", reason.text());
                    self.tell(other.conn, conn, reason)?;
                    self.send(conn.tenant, Self::verdict(conn, reason))
                }
            };
        }
    }

    /// Sends a verdict to another connection than the one being served, maybe of the same tenant.
    fn tell(&mut self, whom: Conn, served: Conn, reason: Reason) -> Result<(), End> {
        let verdict = Self::verdict(whom, reason);
        if whom.tenant == served.tenant {
            return self.send(whom.tenant, verdict);
        }
        self.send_to_other(whom.tenant, verdict);
        Ok(())
    }
}
