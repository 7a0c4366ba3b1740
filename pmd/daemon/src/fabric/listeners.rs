//! Who listens: the sockets that tenants were found to hold, and say they listen on, by their cookies. That a socket listens is
//! asked when it counts, and each is charged to its user (`daemon/listeners.rs`); nothing here asks anybody.

use std::collections::{HashMap, HashSet};

use crate::book::TenantId;
use crate::rights::Held;

/// Sockets of one tenant.
const OF_TENANT: usize = 1024;

/// A socket that a tenant was found to hold.
#[derive(Clone, Copy, Debug)]
pub struct Listening {
    /// Whose.
    pub tenant: TenantId,
    /// What was found.
    pub held: Held,
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Listeners {
    /// By cookie: several processes may hold a socket. The latest is the last.
    holders: HashMap<u64, Vec<Listening>>,
    of_tenant: HashMap<TenantId, HashSet<u64>>,
}

impl Listeners {
    /// Sockets that somebody listens on.
    pub fn len(&self) -> usize {
        self.holders.len()
    }

    /// May a tenant say of one more socket that it listens on that?
    pub fn has_room(&self, tenant: TenantId) -> bool {
        let sockets = self.of_tenant.get(&tenant);
        sockets.map_or(0, HashSet::len) < OF_TENANT
    }

    /// Is it known that a tenant holds the socket with this cookie?
    pub fn has(&self, tenant: TenantId, cookie: u64) -> bool {
        let sockets = self.of_tenant.get(&tenant);
        sockets.is_some_and(|sockets| sockets.contains(&cookie))
    }

    /// A tenant holds a socket, and is its latest holder.
    pub fn add(&mut self, listening: Listening) {
        let Listening { tenant, held, .. } = listening;
        self.remove(held.cookie, tenant);
        self.holders.entry(held.cookie).or_default().push(listening);
        let sockets = self.of_tenant.entry(tenant).or_default();
        sockets.insert(held.cookie);
    }

    /// Who was found last to hold the socket with this cookie.
    pub fn latest(&self, cookie: u64) -> Option<Listening> {
        self.holders.get(&cookie)?.last().copied()
    }

    /// A tenant holds a socket no more. False when it was not known to.
    pub fn remove(&mut self, cookie: u64, tenant: TenantId) -> bool {
        let Some(sockets) = self.of_tenant.get_mut(&tenant) else {
            return false;
        };
        let held = sockets.remove(&cookie);
        if sockets.is_empty() {
            self.of_tenant.remove(&tenant);
        }
        if held {
            self.take_from(cookie, tenant);
        }
        held
    }

    /// A tenant has gone.
    pub fn forget(&mut self, tenant: TenantId) {
        for cookie in self.of_tenant.remove(&tenant).unwrap_or_default() {
            self.take_from(cookie, tenant);
        }
    }

    fn take_from(&mut self, cookie: u64, tenant: TenantId) {
        if let Some(holders) = self.holders.get_mut(&cookie) {
            holders.retain(|holder| holder.tenant != tenant);
            if holders.is_empty() {
                self.holders.remove(&cookie);
            }
        }
    }

    /// The tenants that hold sockets, and how many each.
    pub fn tenants(&self) -> impl Iterator<Item = (TenantId, usize)> {
        let counted = |(tenant, sockets): (&TenantId, &HashSet<u64>)| (*tenant, sockets.len());
        self.of_tenant.iter().map(counted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listening(tenant: TenantId, cookie: u64) -> Listening {
        let held = Held {
            cookie,
            inode: cookie,
            shared: false,
            located: None,
        };
        Listening { tenant, held }
    }

    #[test]
    fn the_latest_holder_is_asked_first_and_who_goes_is_forgotten() {
        let mut listeners = Listeners::default();
        for tenant in 1..=3 {
            listeners.add(listening(tenant, 99));
        }
        listeners.add(listening(2, 98));
        let latest = |listeners: &Listeners| listeners.latest(99).map(|latest| latest.tenant);
        assert_eq!((latest(&listeners), listeners.len()), (Some(3), 2));
        // Said again, it is the latest, and counts once.
        listeners.add(listening(1, 99));
        assert_eq!(latest(&listeners), Some(1));
        listeners.remove(99, 1);
        listeners.forget(3);
        assert_eq!(latest(&listeners), Some(2));
        listeners.forget(2);
        assert_eq!((latest(&listeners), listeners.len()), (None, 0));
        assert!(listeners.of_tenant.is_empty());
    }

    #[test]
    fn a_tenant_has_no_more_than_its_share_and_takes_nothing_else_with_it() {
        let mut listeners = Listeners::default();
        for cookie in 0..OF_TENANT as u64 {
            assert!(listeners.has_room(1));
            listeners.add(listening(1, cookie));
        }
        assert!(!listeners.has_room(1) && listeners.has_room(2));
        listeners.add(listening(2, 5));
        assert!(listeners.remove(4, 1) && !listeners.remove(4, 1));
        assert!(listeners.has(1, 5) && !listeners.has(1, 4));
        listeners.forget(1);
        assert_eq!(listeners.tenants().collect::<Vec<_>>(), [(2, 1)]);
        assert_eq!(listeners.latest(5).map(|latest| latest.tenant), Some(2));
    }
}
