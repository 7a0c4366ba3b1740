//! The book of who announced what and who holds which stream: matching, holders.
//!
//! A state machine without I/O and clock: the daemon verifies what tenants say before it comes
//! here, and carries out what follows from it.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::time::Instant;

use rdsock_shm::reason::Reason;

use crate::accounts::{Charge, Over};
use crate::diag::Times;

/// The daemon's number of a tenant.
pub type TenantId = u64;

/// A connection record of a tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Conn {
    /// Whose.
    pub tenant: TenantId,
    /// Number of the record.
    pub number: u32,
    /// Its use.
    pub generation: u32,
}

/// A connection as one of its ends sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Inode of the network namespace in which the socket was found.
    pub netns: u64,
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
}

impl Route {
    /// As the other end sees it.
    pub fn reversed(self) -> Self {
        Route {
            netns: self.netns,
            local: self.peer,
            peer: self.local,
        }
    }
}

/// Which end called `connect`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The other one: this came from `accept`.
    Passive,
    /// This one.
    Active,
    /// Not known: inherited over `exec`.
    Unknown,
}

/// A connection that a tenant was found to hold.
#[derive(Clone, Copy, Debug)]
pub struct Announced {
    /// Whose.
    pub conn: Conn,
    /// The tenant's fd.
    pub fd: i32,
    /// The tenant's process.
    pub pid: i32,
    /// The tenant's user.
    pub uid: u32,
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// Inode of the socket.
    pub inode: u64,
    /// When its process was last seen to run the program that attached.
    pub seen: Instant,
    /// Where it leads.
    pub route: Route,
    /// Which end it is.
    pub role: Role,
    /// The socket at the other end, at a moment when this one was there; `None` where that was not asked.
    pub other_end: Option<Socket>,
    /// When it last had something to say, as it was first seen, and when it last heard something, as it was last seen; `None` where
    /// the daemon may not ask.
    pub times: Option<Times>,
}

/// Which socket it is, by the kernel's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// Inode of the socket.
    pub inode: u64,
}

impl Announced {
    /// Its socket.
    pub fn socket(&self) -> Socket {
        Socket {
            cookie: self.cookie,
            inode: self.inode,
        }
    }

    /// It was looked at once more when its socket last heard something.
    pub fn note_heard(&mut self, heard: Option<Instant>) {
        if let (Some(times), Some(heard)) = (&mut self.times, heard) {
            times.heard = heard;
        }
    }
}

/// What becomes of an announcement.
#[derive(Debug)]
pub enum Announcement {
    /// It waits for the other end.
    Waits,
    /// The other end waited, and does so no longer.
    Matches(Announced),
    /// Not for now.
    Refused(Reason),
    /// It has to wait, and its user has too many that do.
    Over(Over),
}

/// An announcement that waits for the other end.
#[derive(Debug)]
struct Waiter {
    announced: Announced,
    /// Its user may close the socket, and say nothing of it.
    _charge: Charge,
}

/// A tenant that holds an end.
#[derive(Debug)]
pub struct Holder {
    /// By which of its connections: the last one for which it was found to hold the socket.
    pub conn: Conn,
    /// It said that it has mapped the stream, since it is found to hold the socket by this one.
    pub mapped: bool,
    /// What that costs its user, if it has inherited the end.
    _charge: Option<Charge>,
}

/// One end of a stream.
#[derive(Debug)]
pub struct End {
    /// The socket's cookie.
    pub cookie: u64,
    /// The socket's inode.
    pub inode: u64,
    /// Process of the tenant that announced it.
    pub pid: i32,
    /// User of that tenant.
    pub uid: u32,
    /// Where the socket leads.
    pub route: Route,
    /// Who holds it: each tenant once.
    pub holders: BTreeMap<TenantId, Holder>,
}

/// A stream and who holds it. `M` is its memory.
#[derive(Debug)]
pub struct Stream<M> {
    /// The two ends; end 0 called `connect`.
    pub ends: [End; 2],
    /// The user on whose account it is: that of the end that called `connect`, since the other
    /// end has no say in who connects to it.
    pub payer: u32,
    /// Bytes of its memory.
    pub bytes: u64,
    /// Its memory.
    pub memory: M,
}

impl<M> Stream<M> {
    /// True when no tenant is known to hold either end.
    pub fn is_abandoned(&self) -> bool {
        self.ends.iter().all(|end| end.holders.is_empty())
    }
}

#[derive(Clone, Copy, Debug)]
enum Seat {
    Waiting(Route),
    Holding { stream: u64, end: usize },
}

/// The book. See the module's text.
#[derive(Debug)]
pub struct Book<M> {
    /// A hash table that grows moves all that is in it, and here may be very many.
    waiting: BTreeMap<Route, Waiter>,
    seats: HashMap<TenantId, HashMap<u32, (u32, Seat)>>,
    streams: BTreeMap<u64, Stream<M>>,
    cookies: HashMap<u64, (u64, usize)>,
}

impl<M> Default for Book<M> {
    fn default() -> Self {
        Book {
            waiting: BTreeMap::new(),
            seats: HashMap::new(),
            streams: BTreeMap::new(),
            cookies: HashMap::new(),
        }
    }
}

/// Orders two ends so that the first is the one that called `connect`. `None` when they disagree,
/// or neither knows.
pub fn order(a: Announced, b: Announced) -> Option<[Announced; 2]> {
    match (a.role, b.role) {
        (Role::Active, Role::Passive | Role::Unknown) | (Role::Unknown, Role::Passive) => {
            Some([a, b])
        }
        (Role::Passive, Role::Active | Role::Unknown) | (Role::Unknown, Role::Active) => {
            Some([b, a])
        }
        _ => None,
    }
}

impl<M> Book<M> {
    /// A tenant announces a connection that it was found to hold. The caller has released the
    /// connection record's earlier use ([`Book::release`]). Where it has to wait for the other end, `pay` pays for that.
    pub fn announce(
        &mut self,
        announced: Announced,
        pay: impl FnOnce() -> Result<Charge, Over>,
    ) -> Announcement {
        let conn = announced.conn;
        if let Some((stream, end)) = self.cookies.get(&announced.cookie).copied()
            && let Some(stream) = self.streams.get(&stream)
            && stream
                .ends
                .get(end)
                .is_some_and(|end| !end.holders.is_empty())
        {
            // Somebody has the stream of this very socket: two streams would split its bytes.
            return Announcement::Refused(Reason::Shared);
        }
        if let Some(earlier) = self.waiting_at(&announced.route) {
            if earlier.cookie == announced.cookie && earlier.conn.tenant != conn.tenant {
                return Announcement::Refused(Reason::Shared);
            }
            self.remove_waiting(&announced.route);
        }
        if self.opposite(&announced).is_some()
            && let Some(other) = self.remove_waiting(&announced.route.reversed())
        {
            return Announcement::Matches(other);
        }
        let waiter = match pay() {
            Ok(charge) => Waiter {
                announced,
                _charge: charge,
            },
            Err(over) => return Announcement::Over(over),
        };
        self.waiting.insert(announced.route, waiter);
        self.sit(conn, Seat::Waiting(announced.route));
        Announcement::Waits
    }

    fn waiting_at(&self, route: &Route) -> Option<Announced> {
        self.waiting.get(route).map(|waiter| waiter.announced)
    }

    /// The announcement that waits for this one.
    pub fn opposite(&self, announced: &Announced) -> Option<Announced> {
        self.opposite_to(announced.route, announced.cookie)
    }

    /// The announcement that waits for one with this route, of the socket with this cookie.
    pub fn opposite_to(&self, route: Route, cookie: u64) -> Option<Announced> {
        let other = self.waiting_at(&route.reversed());
        other.filter(|other| other.cookie != cookie)
    }

    /// The process of an announcement that waits was seen again to run its program, and maybe what its socket has heard.
    pub fn note_seen(&mut self, conn: Conn, now: Instant, heard: Option<Instant>) {
        if let Some((generation, Seat::Waiting(route))) = self
            .seats
            .get(&conn.tenant)
            .and_then(|seats| seats.get(&conn.number))
            && *generation == conn.generation
            && let Some(waiting) = self.waiting.get_mut(route)
        {
            waiting.announced.seen = now;
            waiting.announced.note_heard(heard);
        }
    }

    fn sit(&mut self, conn: Conn, seat: Seat) {
        let seats = self.seats.entry(conn.tenant).or_default();
        seats.insert(conn.number, (conn.generation, seat));
    }

    fn remove_waiting(&mut self, route: &Route) -> Option<Announced> {
        let Waiter { announced, .. } = self.waiting.remove(route)?;
        self.stand(announced.conn);
        Some(announced)
    }

    fn stand(&mut self, conn: Conn) -> Option<(u32, Seat)> {
        let seats = self.seats.get_mut(&conn.tenant)?;
        let seat = seats.remove(&conn.number);
        if seats.is_empty() {
            self.seats.remove(&conn.tenant);
        }
        seat
    }

    /// Enters a stream for two ends, the first being the one that called `connect`.
    pub fn open(&mut self, id: u64, ends: [Announced; 2], bytes: u64, memory: M) {
        let payer = ends[0].uid;
        for (index, end) in ends.iter().enumerate() {
            let seat = Seat::Holding {
                stream: id,
                end: index,
            };
            self.sit(end.conn, seat);
            self.cookies.insert(end.cookie, (id, index));
        }
        let ends = ends.map(|end| End {
            cookie: end.cookie,
            inode: end.inode,
            pid: end.pid,
            uid: end.uid,
            route: end.route,
            holders: BTreeMap::from([(
                end.conn.tenant,
                Holder {
                    conn: end.conn,
                    mapped: false,
                    _charge: None,
                },
            )]),
        });
        let stream = Stream {
            ends,
            payer,
            bytes,
            memory,
        };
        self.streams.insert(id, stream);
    }

    /// Does a tenant hold an end?
    pub fn holds(&self, tenant: TenantId, id: u64, end: usize) -> bool {
        let end = self.streams.get(&id).and_then(|s| s.ends.get(end));
        end.is_some_and(|end| end.holders.contains_key(&tenant))
    }

    /// A further tenant holds an end, by inheritance, at this cost. If it holds that end already, by another connection, it
    /// does so by this one from now on.
    pub fn hold(&mut self, id: u64, end: usize, conn: Conn, charge: Option<Charge>) {
        let Some(place) = self
            .streams
            .get_mut(&id)
            .and_then(|stream| stream.ends.get_mut(end))
        else {
            return;
        };
        let before = place.holders.remove(&conn.tenant);
        let earlier = before.as_ref().map(|before| before.conn);
        let charge = before.map_or(charge, |before| before._charge);
        let holder = Holder {
            conn,
            mapped: false,
            _charge: charge,
        };
        place.holders.insert(conn.tenant, holder);
        if let Some(earlier) = earlier {
            self.stand(earlier);
        }
        self.sit(conn, Seat::Holding { stream: id, end });
    }

    /// A tenant says that it has mapped the stream of a connection. True when that was news.
    pub fn mapped(&mut self, conn: Conn) -> bool {
        let Some((id, end)) = self.seat_of(conn) else {
            return false;
        };
        self.streams
            .get_mut(&id)
            .and_then(|stream| stream.ends.get_mut(end))
            .and_then(|end| end.holders.get_mut(&conn.tenant))
            .is_some_and(|holder| !std::mem::replace(&mut holder.mapped, true))
    }

    /// A connection is used for something new: whatever it was before is given up. Returns the
    /// stream that it held.
    pub fn replace(&mut self, conn: Conn) -> Option<u64> {
        self.vacate(conn)
    }

    /// The stream and end that a connection holds.
    pub fn seat_of(&self, conn: Conn) -> Option<(u64, usize)> {
        match self.seats.get(&conn.tenant)?.get(&conn.number)? {
            (generation, Seat::Holding { stream, end }) if *generation == conn.generation => {
                Some((*stream, *end))
            }
            _ => None,
        }
    }

    /// A connection is given up, whatever it was; nothing happens when the generation that the
    /// book has is later than the one given. Returns the stream that it held.
    pub fn release(&mut self, conn: Conn) -> Option<u64> {
        let (generation, _) = self.seats.get(&conn.tenant)?.get(&conn.number)?;
        // Generations wrap.
        if (conn.generation.wrapping_sub(*generation) as i32) < 0 {
            return None;
        }
        self.vacate(conn)
    }

    fn vacate(&mut self, conn: Conn) -> Option<u64> {
        let (generation, seat) = self.stand(conn)?;
        let conn = Conn { generation, ..conn };
        match seat {
            Seat::Waiting(route) => {
                self.waiting.remove(&route);
                None
            }
            Seat::Holding { stream, end } => {
                let holders = &mut self.streams.get_mut(&stream)?.ends.get_mut(end)?.holders;
                holders.remove(&conn.tenant);
                Some(stream)
            }
        }
    }

    /// A tenant has gone. Returns the streams that it held.
    pub fn tenant_gone(&mut self, tenant: TenantId) -> Vec<u64> {
        let numbers: Vec<u32> = match self.seats.get(&tenant) {
            Some(seats) => seats.keys().copied().collect(),
            None => return Vec::new(),
        };
        let conn = |number| Conn {
            tenant,
            number,
            generation: 0,
        };
        let mut streams: Vec<u64> = numbers
            .into_iter()
            .filter_map(|number| self.vacate(conn(number)))
            .collect();
        streams.sort_unstable();
        streams.dedup();
        streams
    }

    /// Removes a stream. Its holders keep nothing.
    pub fn close(&mut self, id: u64) -> Option<Stream<M>> {
        let stream = self.streams.remove(&id)?;
        for end in &stream.ends {
            if self
                .cookies
                .get(&end.cookie)
                .is_some_and(|(owner, _)| *owner == id)
            {
                self.cookies.remove(&end.cookie);
            }
            for holder in end.holders.values() {
                self.stand(holder.conn);
            }
        }
        Some(stream)
    }

    /// The stream and end of the socket with this cookie.
    pub fn by_cookie(&self, cookie: u64) -> Option<(u64, usize)> {
        self.cookies.get(&cookie).copied()
    }

    /// A stream.
    pub fn stream(&self, id: u64) -> Option<&Stream<M>> {
        self.streams.get(&id)
    }

    /// How many streams there are.
    pub fn streams(&self) -> usize {
        self.streams.len()
    }

    /// Streams from this number on, in order.
    pub fn streams_from(&self, id: u64) -> impl Iterator<Item = u64> {
        self.streams.range(id..).map(|(id, _)| *id)
    }

    /// Announcements that wait for their other end.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Where a connection leads, and the stream and end that it holds, if the tenant announced
    /// it.
    pub fn look(&self, conn: Conn) -> Option<(Route, Option<(u64, usize)>)> {
        match self.seats.get(&conn.tenant)?.get(&conn.number)? {
            (generation, _) if *generation != conn.generation => None,
            (_, Seat::Waiting(route)) => Some((*route, None)),
            (_, Seat::Holding { stream, end }) => {
                let route = self.streams.get(stream)?.ends.get(*end)?.route;
                Some((route, Some((*stream, *end))))
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
