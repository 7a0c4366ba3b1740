//! Control connections and their tenants, as they are now. Who may be one is decided in [`crate::rights`]; what they
//! say and are told is the daemon's.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Instant;

use crate::accounts::Charge;
use crate::book::TenantId;
use crate::channel::{Channel, Foreign};
use crate::memory::TenantMap;
use crate::process::Peer;
use crate::queries::Answering;
use crate::rights::Passport;

/// What who has connected is by now. Each follows on the one above it (`docs/shared-memory.md`, "To attach").
#[derive(Debug)]
pub enum Standing {
    /// It has not said HELLO.
    Caller {
        /// It has asked a question, and was answered.
        answered: bool,
    },
    /// It has said HELLO. Its memory is being made.
    Making,
    /// It was sent its memory, and has not said yet that it has mapped it.
    Sent(Box<Belongings>, Instant),
    /// It has said so, and is looked at.
    LookedAt {
        /// Its bell board.
        bells: Arc<Foreign>,
        /// As in [`Tenant`].
        may_be_rung: bool,
    },
    /// It may be a tenant, once its network namespace is open.
    Entering(Box<(Passport, Belongings)>),
    /// It was found to have mapped its memory.
    Tenant(Box<Tenant>),
    /// What it had was taken from it: it gets that back in another standing before this thread does something else, or ends.
    Deciding,
}

/// What a tenant is given.
#[derive(Debug)]
pub struct Belongings {
    /// Its memory.
    pub map: Foreign<TenantMap>,
    /// Its bell board.
    pub bells: Arc<Foreign>,
    /// As in [`Tenant`].
    pub may_be_rung: bool,
}

/// What becomes of the messages that come in on a connection.
#[derive(Debug)]
pub enum Inbox {
    /// They are read as they come.
    Open,
    /// One is being received, or what it says is being looked at.
    Receiving,
    /// A porter takes one in, or the thread that receives it is held up: the socket is not watched meanwhile.
    Unpacked,
    /// They wait until this question is answered.
    Answering(Box<Answering>),
}

/// A control connection.
#[derive(Debug)]
pub struct Connection {
    /// Its socket.
    pub channel: Channel,
    /// Who made it.
    pub peer: Arc<Peer>,
    /// Made over an ADOPT, so that its maker is known already.
    pub adopted: bool,
    /// Whether it is read.
    pub inbox: Inbox,
    /// Its socket is watched.
    pub watched: bool,
    /// It is watched until it can be written.
    pub wants_write: bool,
    /// A [`Due::Send`](crate::agenda::Due::Send) is set.
    pub retries: bool,
    /// What it has on its user's account.
    pub charge: Charge,
    /// What the last message has brought beside it is on that account, too, until it is closed or something else.
    pub luggage: Weak<Charge>,
    standing: Standing,
}

impl Connection {
    /// Of a caller, whose socket is watched.
    pub fn new(channel: Channel, peer: Peer, adopted: bool, charge: Charge) -> Self {
        Connection {
            channel,
            peer: Arc::new(peer),
            adopted,
            inbox: Inbox::Open,
            watched: true,
            wants_write: false,
            retries: false,
            charge,
            luggage: Weak::new(),
            standing: Standing::Caller { answered: false },
        }
    }

    /// What it is by now.
    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Its tenant, if it is one.
    pub fn tenant(&self) -> Option<&Tenant> {
        match &self.standing {
            Standing::Tenant(tenant) => Some(tenant),
            _ => None,
        }
    }

    /// As [`tenant`](Self::tenant).
    pub fn tenant_mut(&mut self) -> Option<&mut Tenant> {
        match &mut self.standing {
            Standing::Tenant(tenant) => Some(tenant),
            _ => None,
        }
    }

    /// Has it said HELLO, and is no tenant yet?
    pub fn is_on_its_way(&self) -> bool {
        !matches!(self.standing, Standing::Caller { .. } | Standing::Tenant(_))
    }

    /// A question of a caller was answered.
    pub fn note_answered(&mut self) {
        if let Standing::Caller { answered } = &mut self.standing {
            *answered = true;
        }
    }

    /// A caller has said HELLO: its memory is being made.
    pub fn begin_making(&mut self) {
        self.follow(Standing::Making, |before| {
            matches!(before, Standing::Caller { .. })
        });
    }

    /// It is sent its memory.
    pub fn begin_sending(&mut self, belongings: Belongings, now: Instant) {
        let sent = Standing::Sent(Box::new(belongings), now);
        self.follow(sent, |before| matches!(before, Standing::Making));
    }

    /// It says that it has mapped its memory: it is looked at, with that. `None` where it was sent none, or has said so before.
    pub fn begin_looking(&mut self) -> Option<Foreign<TenantMap>> {
        match std::mem::replace(&mut self.standing, Standing::Deciding) {
            Standing::Sent(belongings, _) => {
                let Belongings {
                    map,
                    bells,
                    may_be_rung,
                } = *belongings;
                self.standing = Standing::LookedAt { bells, may_be_rung };
                Some(map)
            }
            other => {
                self.standing = other;
                None
            }
        }
    }

    /// It was looked at, with this memory: what it has until something is decided. The memory where nobody waits for that.
    pub fn end_looking(
        &mut self,
        map: Foreign<TenantMap>,
    ) -> Result<Belongings, Foreign<TenantMap>> {
        match std::mem::replace(&mut self.standing, Standing::Deciding) {
            Standing::LookedAt { bells, may_be_rung } => Ok(Belongings {
                map,
                bells,
                may_be_rung,
            }),
            other => {
                self.standing = other;
                Err(map)
            }
        }
    }

    /// It waits for its network namespace.
    pub fn begin_entering(&mut self, passport: Passport, belongings: Belongings) {
        let entering = Standing::Entering(Box::new((passport, belongings)));
        self.follow(entering, |before| matches!(before, Standing::Deciding));
    }

    /// Its network namespace is open: what it has until something is decided. `None` where it does not wait for that.
    pub fn end_entering(&mut self) -> Option<(Passport, Belongings)> {
        match std::mem::replace(&mut self.standing, Standing::Deciding) {
            Standing::Entering(entering) => Some(*entering),
            other => {
                self.standing = other;
                None
            }
        }
    }

    /// It is a tenant.
    fn begin_tenancy(&mut self, tenant: Tenant) {
        let tenant = Standing::Tenant(Box::new(tenant));
        self.follow(tenant, |before| matches!(before, Standing::Deciding));
    }

    /// It ends: what it was.
    pub fn end(&mut self) -> Standing {
        std::mem::replace(&mut self.standing, Standing::Deciding)
    }

    fn follow(&mut self, next: Standing, may_follow: impl Fn(&Standing) -> bool) {
        debug_assert!(
            may_follow(&self.standing),
            "{next:?} follows on {:?}",
            self.standing
        );
        self.standing = next;
    }
}

/// An attached process.
#[derive(Debug)]
pub struct Tenant {
    /// Its memory.
    pub map: Foreign<TenantMap>,
    /// Its bell board, to be handed to its peers.
    pub bells: Arc<Foreign>,
    /// Poll cores may ring them: see [`Bells`](crate::memory::Bells).
    pub may_be_rung: bool,
    /// Who it was when it attached.
    pub passport: Arc<Passport>,
    /// Inode of its network namespace when it attached; `None` when that can't be entered.
    pub netns: Option<u64>,
    /// Looks of porters at its sockets that are under way.
    pub looks: usize,
    /// Some of these have to end, or some messages have to be read, before more of its requests are taken.
    pub throttled: bool,
    /// Some of them have to end before more of its messages are read.
    pub unread: bool,
    /// A look of the sweep at its process is under way.
    pub swept: bool,
}

/// All control connections.
#[derive(Debug)]
pub struct Connections {
    open: HashMap<u64, Connection>,
    next: u64,
    tenants: OfProcesses,
}

/// Tenants by their processes' ids, the earlier ones first. An honest process has one.
#[derive(Debug, Default)]
struct OfProcesses {
    of: HashMap<i32, Vec<TenantId>>,
    len: usize,
}

impl OfProcesses {
    fn insert(&mut self, pid: i32, id: TenantId) {
        self.of.entry(pid).or_default().push(id);
        self.len += 1;
    }

    fn remove(&mut self, pid: i32, id: TenantId) {
        if let Some(tenants) = self.of.get_mut(&pid) {
            let before = tenants.len();
            tenants.retain(|other| *other != id);
            self.len -= before - tenants.len();
            if tenants.is_empty() {
                self.of.remove(&pid);
            }
        }
    }

    fn of(&self, pid: i32) -> &[TenantId] {
        self.of.get(&pid).map_or(&[], Vec::as_slice)
    }
}

impl Default for Connections {
    fn default() -> Self {
        Connections {
            open: HashMap::new(),
            // 0 is nobody.
            next: 1,
            tenants: OfProcesses::default(),
        }
    }
}

impl Connections {
    /// The number that [`Connections::insert`] gives next.
    pub fn next_id(&self) -> u64 {
        self.next
    }

    /// A new one, with its number.
    pub fn insert(&mut self, connection: Connection) -> u64 {
        let id = self.next;
        self.next += 1;
        self.open.insert(id, connection);
        id
    }

    /// It has mapped its memory.
    pub fn attach(&mut self, id: TenantId, tenant: Tenant) {
        if let Some(connection) = self.open.get_mut(&id)
            && connection.tenant().is_none()
        {
            connection.begin_tenancy(tenant);
            self.tenants.insert(connection.peer.pid, id);
        }
    }

    /// It is over.
    pub fn remove(&mut self, id: u64) -> Option<Connection> {
        let connection = self.open.remove(&id)?;
        if connection.tenant().is_some() {
            self.tenants.remove(connection.peer.pid, id);
        }
        Some(connection)
    }

    /// One of them.
    pub fn get(&self, id: u64) -> Option<&Connection> {
        self.open.get(&id)
    }

    /// One of them.
    pub fn get_mut(&mut self, id: u64) -> Option<&mut Connection> {
        self.open.get_mut(&id)
    }

    /// The tenant of one of them.
    pub fn tenant(&self, id: TenantId) -> Option<&Tenant> {
        self.open.get(&id)?.tenant()
    }

    /// The tenant of one of them.
    pub fn tenant_mut(&mut self, id: TenantId) -> Option<&mut Tenant> {
        self.open.get_mut(&id)?.tenant_mut()
    }

    /// Those that have a tenant.
    pub fn attached(&self) -> impl Iterator<Item = (TenantId, &Connection, &Tenant)> {
        let attached = |(id, connection): (&TenantId, _)| {
            let connection: &Connection = connection;
            Some((*id, connection, connection.tenant()?))
        };
        self.open.iter().filter_map(attached)
    }

    /// The tenants whose process has this id, the earlier ones first.
    pub fn of_process(&self, pid: i32) -> &[TenantId] {
        self.tenants.of(pid)
    }

    /// How many have a tenant.
    pub fn tenants(&self) -> usize {
        self.tenants.len
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Bells;
    use crate::porters::{Owner, Porters};
    use crate::shares::Known;
    use crate::starter::Starter;

    /// Of this process, and what a tenant is given.
    fn caller() -> (Connection, Belongings) {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
        let pay = Charge::of_nothing;
        let (kind, flags) = (SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
        let (own, _) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
        let peer = Peer::of(&own).unwrap();
        let porters = Porters::new(Starter::new().unwrap(), Known::default()).unwrap();
        let owner = Owner {
            uid: 0,
            connection: 1,
        };
        let closer = porters.closer(owner);
        let channel = Channel::new(closer.foreign(own), pay());
        let bells = Bells::make(&closer).unwrap();
        let belongings = Belongings {
            map: TenantMap::make(&bells, pay(), pay()).unwrap(),
            bells: Arc::new(bells.board),
            may_be_rung: true,
        };
        (Connection::new(channel, peer, false, pay()), belongings)
    }

    #[test]
    fn a_caller_becomes_a_tenant_step_by_step() {
        let (mut caller, belongings) = caller();
        // Nothing comes before its turn, and what comes too early changes nothing.
        assert!(caller.begin_looking().is_none() && caller.end_entering().is_none());
        assert!(!caller.is_on_its_way());
        caller.begin_making();
        assert!(caller.is_on_its_way() && caller.begin_looking().is_none());
        caller.begin_sending(belongings, Instant::now());
        assert!(caller.tenant().is_none() && caller.end_entering().is_none());
        let map = caller.begin_looking().expect("it was sent its memory");
        assert!(caller.begin_looking().is_none(), "it says so once");
        let belongings = caller.end_looking(map).expect("it is looked at");
        assert!(matches!(caller.standing(), Standing::Deciding));
        let passport = Passport::new(caller.peer.clone(), belongings.map.file(), 0);
        // It has not mapped that memory.
        assert!(passport.is_err());
        let belongings = caller.end_looking(belongings.map);
        assert!(belongings.is_err(), "nobody waits for that");
        assert!(matches!(caller.end(), Standing::Deciding));
    }

    #[test]
    fn a_question_is_one_of_a_caller() {
        let (mut caller, _) = caller();
        caller.note_answered();
        assert!(matches!(
            caller.standing(),
            Standing::Caller { answered: true }
        ));
        caller.begin_making();
        caller.note_answered();
        assert!(matches!(caller.standing(), Standing::Making));
    }

    #[test]
    fn the_tenants_of_a_process_are_found_by_it() {
        let mut tenants = OfProcesses::default();
        for (pid, id) in [(7, 1), (8, 2), (7, 3)] {
            tenants.insert(pid, id);
        }
        assert_eq!((tenants.of(7), tenants.len), (&[1, 3][..], 3));
        tenants.remove(7, 1);
        tenants.remove(7, 2);
        assert_eq!((tenants.of(7), tenants.of(8)), (&[3][..], &[2][..]));
        tenants.remove(7, 3);
        assert_eq!((tenants.of(7), tenants.len), (&[][..], 1));
        assert_eq!(tenants.of.len(), 1);
    }
}
