//! Control connections and their tenants, as they are now. Who may be one is decided in [`crate::rights`]; what they
//! say and are told is the daemon's.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use crate::accounts::{Charge, Paid};
use crate::book::TenantId;
use crate::channel::Channel;
use crate::memory::TenantMap;
use crate::process::Peer;
use crate::queries::Answering;
use crate::rights::Passport;

/// What a caller is that has said HELLO, and is no tenant yet.
#[derive(Debug)]
pub enum Greeted {
    /// Its memory is being made.
    Making,
    /// It was sent its memory, and has not said yet that it has mapped it.
    Sent(Box<Belongings>, Instant),
    /// It has said so, and is looked at.
    LookedAt {
        /// Its bell board.
        bells: Arc<Paid>,
        /// As in [`Tenant`].
        may_be_rung: bool,
    },
    /// It may be a tenant, once its network namespace is open.
    Entering(Box<(Passport, Belongings)>),
}

/// What a tenant is given.
#[derive(Debug)]
pub struct Belongings {
    /// Its memory.
    pub map: TenantMap,
    /// Its bell board.
    pub bells: Arc<Paid>,
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
    /// It has asked a question, and was answered.
    pub answered: bool,
    /// Its socket is watched.
    pub watched: bool,
    /// It is watched until it can be written.
    pub wants_write: bool,
    /// A [`Due::Send`](crate::agenda::Due::Send) is set.
    pub retries: bool,
    /// It has said HELLO, and is no tenant yet.
    pub greeted: Option<Greeted>,
    /// Its tenant, once it was found to have mapped its memory.
    pub tenant: Option<Tenant>,
    /// What it has on its user's account.
    pub charge: Charge,
}

/// An attached process.
#[derive(Debug)]
pub struct Tenant {
    /// Its memory.
    pub map: TenantMap,
    /// Its bell board, to be handed to its peers.
    pub bells: Arc<Paid>,
    /// Poll cores may ring them: see [`Bells`](crate::memory::Bells).
    pub may_be_rung: bool,
    /// Who it was when it attached.
    pub passport: Arc<Passport>,
    /// Inode of its network namespace when it attached; `None` when that can't be entered.
    pub netns: Option<u64>,
    /// What it is called.
    pub program: String,
    /// Looks of porters at its sockets that are under way.
    pub looks: usize,
    /// Some of these have to end, or some messages have to be read, before more of its requests are taken.
    pub throttled: bool,
    /// Some of them have to end before more of its messages are read.
    pub unread: bool,
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
            && connection.tenant.replace(tenant).is_none()
        {
            self.tenants.insert(connection.peer.pid, id);
        }
    }

    /// It is over.
    pub fn remove(&mut self, id: u64) -> Option<Connection> {
        let connection = self.open.remove(&id)?;
        if connection.tenant.is_some() {
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
        self.open.get(&id)?.tenant.as_ref()
    }

    /// The tenant of one of them.
    pub fn tenant_mut(&mut self, id: TenantId) -> Option<&mut Tenant> {
        self.open.get_mut(&id)?.tenant.as_mut()
    }

    /// Those that have a tenant.
    pub fn attached(&self) -> impl Iterator<Item = (TenantId, &Connection, &Tenant)> {
        let attached = |(id, connection): (&TenantId, _)| {
            let connection: &Connection = connection;
            Some((*id, connection, connection.tenant.as_ref()?))
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
