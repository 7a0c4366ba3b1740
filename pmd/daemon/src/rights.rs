//! Rights: the one place that decides what a tenant may have. `docs/threat-model.md` has the rules as a table.
//!
//! Who a tenant is was noted when it attached: its [`Passport`]. At each step that hands something out the process is
//! looked at again, and has to be who it was: somebody else may have the control connection by then (a forked child),
//! while the process itself runs a program with more rights. That a tenant holds a socket is looked up on the socket
//! itself. What takes part in a decision comes from the kernel; a tenant's own words only say where to look.
//!
//! Porters gather the facts that may have to be waited for ([`look`]); the decisions wait for nobody.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, getsockname, getsockopt, socket,
    sockopt,
};
use nix::unistd::geteuid;
use rdsock_shm::control::{NAMELESS, Request};

use crate::book::{Announced, Conn, End, Role, Route, Socket};
use crate::diag::{
    Diag, Found, LOOPBACK, Listener, Sought, Times, cookie_of, device_of, is_tcp, netns_cookie_of,
    times_of,
};
use crate::fabric::Whose;
use crate::namespaces::Namespaces;
use crate::own::all_users_have_numbers;
use crate::policy::Policy;
use crate::porters::{Carrier, NOBODY};
use crate::process::{FileId, Glance, Identity, Peer, Program};
use crate::search::{OtherHolder, Searches};
use crate::shares::Known;

/// Who a tenant was when it attached: this process, with these rights, running the program that has mapped the tenant's
/// memory.
#[derive(Debug)]
pub struct Passport {
    /// The process.
    pub peer: Arc<Peer>,
    /// What it is called.
    pub program: Program,
    /// Inode of the network namespace that it was in when it attached; `None` where that can't be seen.
    pub netns: Option<u64>,
    /// `None` where the daemon may not look.
    seen: Option<Seen>,
}

/// What was seen of a process.
#[derive(Debug)]
struct Seen {
    identity: Identity,
    /// The tenant's memory, and where it is mapped: `exec` takes the mapping away, whatever else shares the memory.
    memory: FileId,
    address: u64,
}

/// A process is not who it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Changed {
    /// It has ended.
    #[error("its process has ended")]
    Ended,
    /// It runs another program.
    #[error("its process runs another program now")]
    Program,
    /// Its user, groups, capabilities or namespace are others, or its files in /proc are kept from its user.
    #[error("its process has other rights now")]
    Rights,
    /// The daemon may not look.
    #[error("the daemon may not look at its process")]
    Hidden,
}

impl Passport {
    /// Looks at the process that was sent this memory, and says that it has mapped it at this address. May wait.
    ///
    /// What it says may have waited for long: so the process has to be who it was when it connected, by the kernel's word,
    /// and to run the program that has mapped the memory.
    pub fn new(peer: Arc<Peer>, memory: &impl AsFd, address: u64) -> Result<Self, Changed> {
        let seen = || -> std::io::Result<Option<Seen>> {
            let memory = FileId::of(memory)?;
            // In this order: what has mapped the memory still is what was seen before.
            let identity = peer.identity()?;
            let address = peer.maps_at(memory, address)?;
            Ok(address.map(|address| Seen {
                identity,
                memory,
                address,
            }))
        };
        let seen = match seen() {
            Ok(Some(seen)) => Some(seen),
            Ok(None) => return Err(Changed::Program),
            Err(_) if !peer.is_alive() => return Err(Changed::Ended),
            Err(error) if is_hidden(&error) => None,
            // There were no descriptors, say: it asks again.
            Err(_) => return Err(Changed::Rights),
        };
        if let Some(Seen { identity, .. }) = &seen {
            let effective = |ids: [u32; 4]| ids[1];
            let connected = (peer.uid, peer.gid);
            if (effective(identity.users), effective(identity.groups)) != connected {
                return Err(Changed::Rights);
            }
        }
        let program = peer.program();
        let netns = peer.netns().ok();
        Ok(Passport {
            peer,
            program,
            netns,
            seen,
        })
    }

    /// Is the process who it was, in all that can be seen? May wait.
    pub fn check(&self) -> Result<(), Changed> {
        let seen = self.seen.as_ref().ok_or(Changed::Hidden)?;
        let hidden = |_| self.gone_or(Changed::Hidden);
        let now = self.peer.identity_since(&seen.identity).map_err(hidden)?;
        same_glance(&seen.identity.glance, &now.glance)?;
        if has_other_rights(&seen.identity, &now) {
            return Err(Changed::Rights);
        }
        let maps = self.peer.still_maps(seen.memory, seen.address);
        if !maps.map_err(hidden)? {
            return Err(self.gone_or(Changed::Program));
        }
        self.is_alive()
    }

    /// Is the process its user's in every respect? One that only acts as that user, for a while, is not that user's to end.
    pub fn is_users_own(&self) -> bool {
        let users = self.seen.as_ref().map(|seen| seen.identity.users);
        users == Some([self.peer.uid; 4])
    }

    /// Does the process run the program that it ran, with the same rights as far as a glance shows? May wait.
    pub fn check_program(&self) -> Result<(), Changed> {
        let seen = self.seen.as_ref().ok_or(Changed::Hidden)?;
        let now = self.peer.glance();
        let now = now.map_err(|_| self.gone_or(Changed::Hidden))?;
        same_glance(&seen.identity.glance, &now)?;
        self.is_alive()
    }

    /// Is the process whose it was? Quick, from Linux 6.13 on.
    pub fn check_quickly(&self) -> Result<(), Changed> {
        let seen = &self.seen.as_ref().ok_or(Changed::Hidden)?.identity;
        let is_same = match self.peer.credentials() {
            Some(now) => {
                let gains = gains(seen.capabilities, now.capabilities);
                let ids = (seen.users, seen.groups) == (now.users, now.groups);
                // Who has entered another user namespace has all capabilities there, of which it had not all before, or gains nothing.
                ids && !gains
            }
            None => {
                self.is_alive()?;
                let now = self.peer.standing();
                seen.glance.standing == now.map_err(|_| self.gone_or(Changed::Hidden))?
            }
        };
        match is_same {
            true => self.is_alive(),
            false => Err(Changed::Rights),
        }
    }

    fn is_alive(&self) -> Result<(), Changed> {
        if self.peer.is_alive() {
            Ok(())
        } else {
            Err(Changed::Ended)
        }
    }

    fn gone_or(&self, otherwise: Changed) -> Changed {
        self.is_alive().err().unwrap_or(otherwise)
    }
}

/// The daemon may not look at a process, or can't see it.
fn is_hidden(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::NotFound
    )
}

/// Has a process more than it had, or other ids? What it gives up, it may.
fn has_other_rights(before: &Identity, now: &Identity) -> bool {
    let groups = &before.further_groups;
    (before.users, before.groups) != (now.users, now.groups)
        || gains(before.capabilities, now.capabilities)
        || now
            .further_groups
            .iter()
            .any(|group| groups.binary_search(group).is_err())
}

/// Is there a capability now that was not there before?
fn gains(before: [u64; 3], now: [u64; 3]) -> bool {
    let mut sets = before.into_iter().zip(now);
    sets.any(|(before, now)| now & !before != 0)
}

fn same_glance(before: &Glance, now: &Glance) -> Result<(), Changed> {
    // A program that is replaced on disk while it runs is the same one.
    let path = |glance: &Glance| -> String {
        let path = glance.executable.to_string_lossy();
        path.strip_suffix(" (deleted)").unwrap_or(&path).to_owned()
    };
    if path(before) != path(now) {
        return Err(Changed::Program);
    }
    if before.standing != now.standing {
        return Err(Changed::Rights);
    }
    Ok(())
}

/// What a porter is asked about a socket.
#[derive(Clone, Debug)]
pub struct Look {
    /// Who says that it holds the socket.
    pub passport: Arc<Passport>,
    /// As which descriptor.
    pub fd: i32,
    /// `SO_COOKIE` that it says; 0 for whichever the socket has.
    pub cookie: u64,
    /// Other processes may hold it, too: search them, with those of this user.
    pub search: Option<Arc<Searches>>,
    /// Where it has to be bound, as a TCP socket.
    pub bound: Option<Place>,
    /// It has to listen, and where is asked.
    pub listens: Option<Home>,
    /// Where the kernel is asked for it by its addresses.
    pub ask: Option<Ask>,
}

/// The kernel is to be asked who has these addresses. That may be much work: in a look.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The addresses.
    pub route: Route,
    /// What knows the sockets of their network namespace.
    pub diag: Arc<Diag>,
    /// The socket at the other end is asked for as well.
    pub both: bool,
}

impl Ask {
    /// The socket with these addresses and this cookie; with any where that is not known (0).
    pub fn own(&self, carrier: &Carrier, cookie: u64) -> std::io::Result<Option<Found>> {
        let Route { local, peer, .. } = self.route;
        match cookie {
            0 => self.diag.find_any(carrier, local, peer),
            cookie => self.diag.find(carrier, local, peer, cookie),
        }
    }

    /// The same, and the one at its other end where that is asked for, if both were there at one moment.
    pub fn locate(&self, carrier: &Carrier, cookie: u64) -> std::io::Result<Located> {
        let route = self.route;
        if !self.both {
            return Ok(Located {
                route,
                own: self.own(carrier, cookie)?,
                other_end: None,
            });
        }
        let sought = |Route { local, peer, .. }: Route, cookie| Sought {
            local,
            peer,
            cookie,
            device: 0,
        };
        let own = sought(route, (cookie != 0).then_some(cookie));
        let questions = [own, sought(route.reversed(), None), own];
        let [before, other, own] = self.diag.find_each(carrier, questions)?;
        // While this end is there no other connection has its addresses, but for what an earlier one has left there until this one is
        // established, and where addresses are rewritten (see `have_heard`): so one that is being made has no other end.
        let was_there = |own: &Found| {
            own.was_made
                && before.is_some_and(|before| {
                    before.cookie == own.cookie && (before.established || !own.established)
                })
        };
        Ok(Located {
            route,
            own,
            other_end: other.filter(|_| own.as_ref().is_some_and(was_there)),
        })
    }

    /// Is the socket with these addresses, this cookie and this inode there? It may have been bound to a device since. When in doubt, it is.
    pub fn is_there(&self, carrier: &Carrier, cookie: u64, inode: u64) -> bool {
        let Route { local, peer, .. } = self.route;
        let sought = |device| Sought {
            local,
            peer,
            cookie: (cookie != 0).then_some(cookie),
            device,
        };
        let found = self.diag.find_each(carrier, [0, LOOPBACK].map(sought));
        let is_it = |found: Found| found.inode == inode;
        found.map_or(true, |found| found.into_iter().flatten().any(is_it))
    }

    /// The same with another peer.
    pub fn coming_from(mut self, peer: SocketAddr) -> Self {
        self.route.peer = peer;
        self
    }

    /// The socket that would get a connection to `local` from `peer`.
    pub fn listener(&self, carrier: &Carrier) -> std::io::Result<Option<Listener>> {
        let Route { local, peer, .. } = self.route;
        self.diag.listener(carrier, local, peer)
    }

    /// Is a socket there, and does it meet the other one?
    pub fn meet(&self, carrier: &Carrier, own: Socket, other: Socket) -> Meeting {
        let located = self.locate(carrier, own.cookie).ok();
        match located.filter(|located| located.is(own.inode)) {
            None => Meeting::None,
            Some(located) if located.met() == Some(other) => Meeting::Both,
            Some(_) => Meeting::One,
        }
    }
}

/// Which of two sockets are there, that may be the ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// They meet.
    Both,
    /// The one that was asked for, and not the other one.
    One,
    /// Not the one that was asked for, or the kernel does not say.
    None,
}

/// What the kernel has said of a socket by its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Located {
    /// The addresses that it was asked for.
    route: Route,
    /// The socket, if it has these.
    own: Option<Found>,
    /// The one at its other end.
    other_end: Option<Found>,
}

impl Located {
    /// Is it there, with this inode, and established?
    fn is(&self, inode: u64) -> bool {
        let own = self.own;
        own.is_some_and(|own| own.established && own.inode == inode)
    }

    /// The one at its other end, where both are established.
    fn met(&self) -> Option<Socket> {
        let other = self.other_end.filter(|other| other.established);
        let other = other.filter(|_| self.own.is_some_and(|own| own.established));
        other.map(|other| Socket {
            cookie: other.cookie,
            inode: other.inode,
        })
    }
}

/// Where a socket says that it is bound. In a network namespace of one's own anybody has any port and address.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// This port, and this address or, unspecified, none.
    pub address: SocketAddr,
    /// Where it wants to go. Of IPv4 and IPv6, another user may have the port of the other one.
    pub to: IpAddr,
    /// `SO_NETNS_COOKIE`.
    pub netns_cookie: u64,
}

/// The network namespace that the daemon is in, by its `SO_NETNS_COOKIE`; 0 where that is not known.
#[derive(Clone, Copy, Debug)]
pub struct Home(pub u64);

/// Where a socket listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listens {
    /// The address and the port that it has.
    pub address: SocketAddr,
    /// At any address of IPv6, and so at any of IPv4.
    pub of_both: bool,
}

/// A socket that a process was found to hold, while it was who it was when it attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// `SO_COOKIE`, as the socket says; 0 where the daemon may not ask it, and the inode has to do.
    pub cookie: u64,
    /// Inode of the socket.
    pub inode: u64,
    /// Another process may hold it, too.
    pub shared: bool,
    /// Where the kernel knows it, if that was asked.
    pub located: Option<Located>,
    /// Where it listens, if that was asked.
    pub listens: Option<Listens>,
    /// When it last sent and received, if the kernel was asked where it knows it.
    pub times: Option<Times>,
}

/// Why a process was not found to hold a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotHeld {
    /// It does not.
    #[error("its process does not hold this socket")]
    Socket,
    /// The socket is bound elsewhere.
    #[error("its socket is not bound there")]
    Elsewhere,
    /// The daemon may have no duplicates of descriptors, and this is another user's process.
    #[error("pidfd_getfd is refused, and it is not this daemon's user")]
    Unseen,
    /// It is not who it was.
    #[error(transparent)]
    Changed(#[from] Changed),
    /// The kernel does not say by which addresses it knows the socket.
    #[error("the kernel does not tell of sockets (sock_diag): {0}")]
    Silent(Errno),
}

/// Looks whether a process holds a socket, and is who it was. May wait: for a porter.
pub fn look(carrier: &Carrier, look: &Look) -> Result<Held, NotHeld> {
    let peer = &look.passport.peer;
    let (mut listens, mut times) = (None, None);
    let (cookie, inode) = match peer.duplicate(look.fd) {
        Ok(duplicate) => {
            // Nothing else is asked of what turns out to be no socket. Whether it is a TCP socket, and in which network namespace,
            // those are asked who look for its cookie, but for one that is not connected yet.
            let cookie = cookie_of(duplicate.as_fd()).ok_or(NotHeld::Socket)?;
            if look.bound.is_some_and(|bound| !is_bound(&duplicate, bound)) {
                return Err(NotHeld::Elsewhere);
            }
            if let Some(home) = look.listens {
                let found = listens_at(&duplicate, home).ok_or(NotHeld::Elsewhere)?;
                listens = Some(found);
            }
            if look.ask.is_some() {
                times = times_of(duplicate.as_fd());
            }
            let inode = nix::sys::stat::fstat(&duplicate).map(|stat| stat.st_ino);
            (cookie, inode.map_err(|_| NotHeld::Socket)?)
        }
        // The daemon may have no duplicates of descriptors. The inode names the socket as well as can be, which will do
        // for its own user, whose processes are in each other's hands.
        Err(error) if is_refused(&error) => {
            if peer.uid != geteuid().as_raw() {
                return Err(NotHeld::Unseen);
            }
            let inode = peer.socket_inode(look.fd);
            (look.cookie, inode.ok_or(NotHeld::Socket)?)
        }
        Err(_) => return Err(NotHeld::Socket),
    };
    if look.cookie != 0 && look.cookie != cookie {
        return Err(NotHeld::Socket);
    }
    // Behind the look at the socket: so it was this process, as it was, that held it.
    look.passport.check()?;
    let searched = (look.search.as_ref()).map(|searches| searches.other_holder(peer.pid, inode));
    // When in doubt, it is shared: the shim asks again.
    let shared = searched.is_some_and(|found| found != OtherHolder::Nobody);
    let located = look.ask.as_ref().map(|ask| ask.locate(carrier, cookie));
    let located = located.transpose().map_err(|error| {
        NotHeld::Silent(Errno::from_raw(error.raw_os_error().unwrap_or_default()))
    })?;
    Ok(Held {
        cookie,
        inode,
        shared,
        located,
        listens,
        times,
    })
}

/// Where a TCP socket listens, in the daemon's network namespace and at all devices: nobody but one user does at one place. The socket's lock is
/// waited for.
fn listens_at(socket: &OwnedFd, home: Home) -> Option<Listens> {
    let is_there = is_tcp(socket.as_fd())
        && getsockopt(socket, sockopt::AcceptConn) == Ok(true)
        && netns_cookie_of(socket.as_fd()).is_none_or(|netns| netns == home.0)
        && device_of(socket.as_fd()).is_none_or(|device| device == 0);
    let name = getsockname(socket.as_raw_fd()).ok();
    let own = name.as_ref().and_then(socket_address);
    let own = own.filter(|_| is_there)?;
    let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    Some(Listens {
        address: SocketAddr::new(own.ip().to_canonical(), own.port()),
        of_both: own.is_ipv6() && own.ip().is_unspecified() && has_family(socket, own.ip(), any),
    })
}

/// Is this a TCP socket that is bound there, and can go from there where it wants to? The socket's lock is waited for.
fn is_bound(socket: &OwnedFd, place: Place) -> bool {
    let said = place.address;
    let name = getsockname(socket.as_raw_fd()).ok();
    let own = name.as_ref().and_then(socket_address);
    let same = |own: IpAddr, ip: IpAddr| own == ip || own.is_unspecified() && ip.is_unspecified();
    is_tcp(socket.as_fd())
        // Some kernels have none.
        && netns_cookie_of(socket.as_fd()).is_none_or(|netns| netns == place.netns_cookie)
        // At the other devices the port may be another's.
        && device_of(socket.as_fd()).is_none_or(|device| device == 0)
        && own.is_some_and(|own| {
            // One that is not bound has port 0.
            own.port() != 0
                && own.port() == said.port()
                && same(own.ip().to_canonical(), said.ip())
                && has_family(socket, own.ip(), place.to)
                && is_of_this_host(said.ip())
        })
}

/// Does this host have an address? A socket may be bound to any (`IP_FREEBIND`): the kernel then connects it to nobody.
fn is_of_this_host(ip: IpAddr) -> bool {
    let family = match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC;
    let at = SockaddrStorage::from(SocketAddr::new(ip, 0));
    ip.is_unspecified()
        || socket(family, SockType::Stream, flags, None)
            .is_ok_and(|socket| bind(socket.as_raw_fd(), &at).is_ok())
}

/// Is a socket that is bound to this address one of the family of another one? Of IPv6, it is one of IPv4 as well, unless it was told not to be.
fn has_family(socket: &OwnedFd, own: IpAddr, other: IpAddr) -> bool {
    match (own, other) {
        (IpAddr::V4(_), other) => other.is_ipv4(),
        (IpAddr::V6(_), IpAddr::V6(_)) => true,
        (IpAddr::V6(_), IpAddr::V4(_)) => getsockopt(socket, sockopt::Ipv6V6Only) == Ok(false),
    }
}

/// An IPv4 or IPv6 address as the kernel says it.
pub fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in();
    let v4 = v4.map(|address| SocketAddrV4::from(*address).into());
    let v6 = || Some(SocketAddrV6::from(*address.as_sockaddr_in6()?).into());
    v4.or_else(v6)
}

/// By Yama or another security module; by a filter of system calls; by a kernel that does not have the call yet.
fn is_refused(error: &std::io::Error) -> bool {
    let refusals = [Errno::EPERM, Errno::EACCES, Errno::ENOSYS];
    let errno = error.raw_os_error().map(Errno::from_raw);
    errno.is_some_and(|errno| refusals.contains(&errno))
}

/// What an announcement says, with its numbers in range.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Whose, and which of its connections.
    pub conn: Conn,
    /// Its descriptor.
    pub fd: i32,
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// `SO_NETNS_COOKIE`.
    pub netns_cookie: u64,
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
    /// Who connected.
    pub role: Role,
    /// Other processes may hold it, too.
    pub maybe_shared: bool,
}

impl Claim {
    /// `None` when a number is out of range.
    pub fn parse(conn: Conn, request: &Request) -> Option<Self> {
        let address = |ip: [u8; 16], port: u32| {
            let ip = IpAddr::V6(ip.into()).to_canonical();
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

/// The decisions. See the module's text.
#[derive(Debug)]
pub struct Rights {
    /// The kernel's word on sockets.
    pub namespaces: Namespaces,
    /// Each user has a number of its own in the daemon's user namespace.
    all_have_numbers: bool,
    known: Known,
    /// Of each user who is known, and of all others together: each has time for them, and memory.
    searches: HashMap<u32, Arc<Searches>>,
}

impl Rights {
    /// Decides by what the kernel says in these namespaces.
    pub fn new(namespaces: Namespaces, known: Known) -> Self {
        Rights {
            namespaces,
            all_have_numbers: all_users_have_numbers(),
            known,
            searches: HashMap::new(),
        }
    }

    /// May this program attach? Not one of a user without a number: the daemon would take several for one.
    pub fn may_attach(
        &self,
        policy: &Policy,
        uid: u32,
        program: &Program,
    ) -> Result<(), &'static str> {
        if uid == NAMELESS && !self.all_have_numbers {
            return Err(
                "its user has no number of its own in the daemon's user namespace: run it as a user that has",
            );
        }
        match policy.allows_user(uid) && policy.allows_program(program) {
            true => Ok(()),
            false => Err("the policy keeps this user or program on the kernel"),
        }
    }

    /// May a process speak on this control connection, which `owner` has made? A forked child has its parent's, too. Who
    /// hands a socket over (ADOPT) has it say who sends before anything is sent.
    pub fn may_speak(owner: &Peer, sender: i32) -> bool {
        sender == owner.pid
    }

    /// May a user's program ring another program's bells? It could also take off the board what others have rung, and say that
    /// nobody sleeps: so nobody may but a program of the same user, who could end the other one as well ([`Passport::is_users_own`]). Not even
    /// root's: it may give up being root, and keeps the board.
    pub fn may_ring(uid: u32, owner: u32) -> bool {
        uid == owner
    }

    /// May a user's program make holes in memory that another program uses? Of huge pages anybody who has them can, and who finds none
    /// left to fill such a hole ends by SIGBUS. So nobody may but a program of the same user, as for the bells.
    pub fn may_make_holes(uid: u32, owner: u32) -> bool {
        uid == owner
    }

    /// May a user's program have what was promised to a program of `promised`: an anchor, or a call to a port that several
    /// sockets share? The kernel lets sockets of one user alone share one.
    pub fn may_have_promised(uid: u32, promised: u32) -> bool {
        uid == promised
    }

    /// May a user's program have a stream to another node, since its process holds the program's end? What goes over the anchor lies in the
    /// stream's memory as well, also what was said before this program had it. So it is for the programs of one user: of the one who asked for it, or of
    /// the first one that says it has it, who listens where it came in, or `listens` there: a server's processes may be of several users, and whose accepts is not
    /// known before.
    pub fn may_have_carried(uid: u32, whose: Whose, listens: bool) -> bool {
        match whose {
            Whose::User(user) => uid == user,
            Whose::Listeners { uid: listener, .. } => uid == listener || listens,
        }
    }

    /// May a user be told of another one's programs and streams?
    pub fn may_see(asker: u32, other: u32) -> bool {
        Self::sees_all(asker) || asker == other
    }

    /// May a user be told of all programs and streams?
    pub fn sees_all(asker: u32) -> bool {
        asker == 0 || asker == geteuid().as_raw()
    }

    /// The searches of a user. Those who are not known may be one attacker, and share theirs.
    pub fn searches_of(&mut self, uid: u32) -> Arc<Searches> {
        let whose = if self.known.has(uid) { uid } else { NOBODY };
        self.searches.entry(whose).or_default().clone()
    }

    /// Where to ask for a socket of a tenant whose network namespace is `own`, which says that it is in the one with this cookie, with these
    /// addresses; `None` when that is not known.
    pub fn ask_at(
        &self,
        own: Option<u64>,
        netns_cookie: u64,
        (local, peer): (SocketAddr, SocketAddr),
    ) -> Option<Ask> {
        let (netns, diag) = self.namespaces.locate(netns_cookie, own?)?;
        let route = Route { netns, local, peer };
        Some(Ask {
            route,
            diag: diag.clone(),
            both: false,
        })
    }

    /// Where to ask for a socket in the daemon's own network namespace.
    pub fn ask_at_home(&self, local: SocketAddr, peer: SocketAddr) -> Ask {
        let (netns, diag) = self.namespaces.home();
        Ask {
            route: Route { netns, local, peer },
            diag: diag.clone(),
            both: true,
        }
    }

    /// Where to ask for a socket again.
    pub fn ask_for(&self, route: Route) -> Option<Ask> {
        Some(Ask {
            route,
            diag: self.namespaces.diag(route.netns)?.clone(),
            both: false,
        })
    }

    /// May this connection be matched for this tenant? Its process was found to hold the socket ([`look`]); the kernel
    /// has to know that socket by the addresses, established.
    pub fn announced(
        claim: &Claim,
        held: Held,
        located: Located,
        passport: &Passport,
    ) -> Option<Announced> {
        // What was found may be of an earlier use of the record: who announces it twice at once has both looked at.
        let asked = (located.route.local, located.route.peer);
        let is_claimed = claim.cookie != 0 && claim.cookie == held.cookie;
        if !is_claimed || asked != (claim.local, claim.peer) {
            return None;
        }
        located.is(held.inode).then(|| Announced {
            conn: claim.conn,
            fd: claim.fd,
            pid: passport.peer.pid,
            uid: passport.peer.uid,
            cookie: claim.cookie,
            inode: held.inode,
            seen: Instant::now(),
            route: located.route,
            role: claim.role,
            other_end: located.met(),
            times: held.times,
        })
    }

    /// May a socket that was found by its addresses be the other end of an anchor with these addresses? Anchors are in the daemon's own
    /// network namespace. In another one, anybody can have a connection with any addresses.
    pub fn may_be_anchored(&self, route: Route) -> bool {
        self.namespaces.is_home_inode(route.netns)
    }

    /// Does what was announced lead to the daemon's socket with this cookie? When a program has closed its anchor, anybody may
    /// come from where it came from, and the stream may not be over yet. (A socket that the daemon has not accepted yet has no inode.)
    pub fn leads_to(announced: &Announced, cookie: u64) -> bool {
        announced
            .other_end
            .is_some_and(|other| other.cookie == cookie)
    }

    /// Does what was found of an announcement still hold, so that its tenant may be given an end? Its socket is the one that was at the
    /// other end of `later`, when that was there, and the process is whose it was. That
    /// it runs the same program was seen lately ([`Announced::seen`]).
    /// (Who has handed the socket on and closed it has had it all the same, and could have kept it.)
    pub fn still_holds(
        announced: &Announced,
        later: &Announced,
        passport: &Passport,
    ) -> Result<bool, Changed> {
        passport.check_quickly()?;
        Ok(Self::meet(announced, later))
    }

    /// Is the one socket at the other end of the other one? It has its addresses, and has heard what it said.
    fn meet(announced: &Announced, later: &Announced) -> bool {
        later.other_end == Some(announced.socket()) && Self::have_heard(announced, later)
    }

    /// Has each of these sockets heard what the other one has said last, or been connected as late? Where the kernel rewrites addresses
    /// (NAT), or an address has moved to another host, two sockets may have each other's and be connected to others. Such a one was
    /// there before the other one could be connected, and hears nothing any more: whenever it is asked, it says no. Two ends of one
    /// connection say yes where each was asked for what it has heard behind the other one for what it has said.
    pub fn have_heard(one: &Announced, other: &Announced) -> bool {
        /// The kernel counts in ticks of 10 ms at most.
        const TICKS: Duration = Duration::from_millis(30);
        match (one.times, other.times) {
            (None, None) => true,
            (Some(one), Some(other)) => {
                one.heard + TICKS >= other.said && other.heard + TICKS >= one.said
            }
            _ => false,
        }
    }

    /// When the socket that a tenant has announced last heard something. May wait.
    pub fn heard(announced: &Announced, passport: &Passport) -> Option<Instant> {
        let socket = passport.peer.duplicate(announced.fd).ok()?;
        let is_same = cookie_of(socket.as_fd()) == Some(announced.cookie);
        Some(times_of(socket.as_fd()).filter(|_| is_same)?.heard)
    }

    /// May a tenant be given this end, since its process holds the end's socket? It is of the user that the end was given to. A process that
    /// has become another user's is not: it may run another program by now, and what was said before stands in the rings.
    pub fn may_inherit(held: Held, passport: &Passport, end: &End) -> bool {
        passport.peer.uid == end.uid && Self::may_hold(held, passport, end)
    }

    /// May a tenant that has this end mapped be counted among its holders? Its process is the one that the end was
    /// given to, or one of the same user that has inherited the socket.
    pub fn may_hold(held: Held, passport: &Passport, end: &End) -> bool {
        let peer = &passport.peer;
        let found = held.located.and_then(|located| located.own);
        (peer.uid == end.uid || peer.pid == end.pid)
            && held.cookie == end.cookie
            && held.inode == end.inode
            && found.is_none_or(|found| found.inode == end.inode)
            && peer.is_alive()
    }

    /// Does a tenant, which was found to hold this listening socket, still listen there, so that connections from
    /// other nodes may be given to it?
    pub fn still_listens(held: Held, passport: &Passport, socket: &Listener) -> bool {
        held.cookie == socket.cookie
            && held.inode == socket.inode
            && passport.check_quickly().is_ok()
    }

    /// Was a socket that a process was found to hold at the other end of the daemon's socket with this cookie? Then the process may be told
    /// for whom the daemon has opened the connection; and bytes may flow between that anchor and the stream that was promised to this
    /// process. What was so at one moment stays so: the daemon's end is never connected to another one.
    pub fn is_between(held: Held, located: Located, cookie: u64) -> bool {
        located.own.is_some_and(|own| own.inode == held.inode)
            && located
                .other_end
                .is_some_and(|other| other.cookie == cookie)
    }
}

#[cfg(test)]
mod tests;
