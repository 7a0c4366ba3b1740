//! Who listens: the sockets that tenants were found to hold, and say they listen on, by their cookies. That a socket listens is
//! asked when it counts (`daemon/listeners.rs`); nothing here asks anybody.

use std::collections::{HashMap, HashSet};

use crate::book::TenantId;
use crate::rights::Held;

/// Sockets of one tenant.
const OF_TENANT: usize = 1024;
/// Sockets of all tenants of one user.
const OF_USER: usize = 4096;

/// A socket that a tenant was found to hold.
#[derive(Clone, Copy, Debug)]
pub struct Listening {
    /// Whose.
    pub tenant: TenantId,
    /// Of which user.
    pub uid: u32,
    /// Its descriptor.
    pub fd: i32,
    /// What was found.
    pub held: Held,
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Listeners {
    /// By cookie: several processes may hold a socket. The latest is the last.
    holders: HashMap<u64, Vec<Listening>>,
    of_tenant: HashMap<TenantId, HashSet<u64>>,
    of_user: HashMap<u32, usize>,
}

impl Listeners {
    /// Sockets that somebody listens on.
    pub fn len(&self) -> usize {
        self.holders.len()
    }

    /// May a tenant say of one more socket that it listens on that?
    pub fn has_room(&self, tenant: TenantId, uid: u32) -> bool {
        let of_tenant = self.of_tenant.get(&tenant).map_or(0, HashSet::len);
        let of_user = self.of_user.get(&uid).copied().unwrap_or(0);
        of_tenant < OF_TENANT && of_user < OF_USER
    }

    /// A tenant holds a socket.
    pub fn add(&mut self, listening: Listening) {
        let Listening {
            tenant, uid, held, ..
        } = listening;
        self.remove(held.cookie, tenant);
        self.holders.entry(held.cookie).or_default().push(listening);
        let sockets = self.of_tenant.entry(tenant).or_default();
        sockets.insert(held.cookie);
        *self.of_user.entry(uid).or_default() += 1;
    }

    /// Who was found last to hold the socket with this cookie.
    pub fn latest(&self, cookie: u64) -> Option<Listening> {
        self.holders.get(&cookie)?.last().copied()
    }

    /// A tenant holds a socket no more.
    pub fn remove(&mut self, cookie: u64, tenant: TenantId) {
        if let Some(sockets) = self.of_tenant.get_mut(&tenant)
            && sockets.remove(&cookie)
        {
            if sockets.is_empty() {
                self.of_tenant.remove(&tenant);
            }
            self.take_from(cookie, tenant);
        }
    }

    /// A tenant has gone.
    pub fn forget(&mut self, tenant: TenantId) {
        for cookie in self.of_tenant.remove(&tenant).unwrap_or_default() {
            self.take_from(cookie, tenant);
        }
    }

    fn take_from(&mut self, cookie: u64, tenant: TenantId) {
        let Some(holders) = self.holders.get_mut(&cookie) else {
            return;
        };
        let place = holders.iter().position(|holder| holder.tenant == tenant);
        let Some(holder) = place.map(|place| holders.remove(place)) else {
            return;
        };
        if holders.is_empty() {
            self.holders.remove(&cookie);
        }
        if let Some(count) = self.of_user.get_mut(&holder.uid) {
            *count -= 1;
            if *count == 0 {
                self.of_user.remove(&holder.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listening(tenant: TenantId, uid: u32, cookie: u64) -> Listening {
        let held = Held {
            cookie,
            inode: cookie,
            shared: false,
        };
        Listening {
            tenant,
            uid,
            fd: 3,
            held,
        }
    }

    #[test]
    fn the_latest_holder_is_asked_first_and_who_goes_is_forgotten() {
        let mut listeners = Listeners::default();
        for tenant in 1..=3 {
            listeners.add(listening(tenant, 7, 99));
        }
        listeners.add(listening(2, 7, 98));
        let latest = |listeners: &Listeners| listeners.latest(99).map(|latest| latest.tenant);
        assert_eq!((latest(&listeners), listeners.len()), (Some(3), 2));
        // Said again, it is the latest, and counts once.
        listeners.add(listening(1, 7, 99));
        assert_eq!(latest(&listeners), Some(1));
        listeners.remove(99, 1);
        listeners.forget(3);
        assert_eq!(latest(&listeners), Some(2));
        listeners.forget(2);
        assert_eq!((latest(&listeners), listeners.len()), (None, 0));
        assert!(listeners.of_user.is_empty() && listeners.of_tenant.is_empty());
    }

    #[test]
    fn a_user_has_no_more_than_its_share_however_often_it_attaches() {
        let mut listeners = Listeners::default();
        let mut tenant = 0;
        while listeners.has_room(tenant, 7) {
            for cookie in 0.. {
                if !listeners.has_room(tenant, 7) {
                    break;
                }
                listeners.add(listening(tenant, 7, cookie));
            }
            tenant += 1;
        }
        assert_eq!(listeners.of_user[&7], OF_USER);
        assert!(listeners.has_room(tenant, 8));
    }
}
