//! Who listens: the sockets that tenants were found to hold and to listen on, by their cookies, and where. That one listens still is
//! asked when it counts, and each is charged to its user (`daemon/listeners.rs`); nothing here asks anybody.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::book::TenantId;
use crate::rights::{Held, Listens};

/// Sockets of one tenant.
const OF_TENANT: usize = 1024;

/// A socket that a tenant was found to hold.
#[derive(Clone, Copy, Debug)]
pub struct Listening {
    /// Whose.
    pub tenant: TenantId,
    /// Its descriptor.
    pub fd: i32,
    /// What was found.
    pub held: Held,
    /// Where it listened then.
    pub listens: Listens,
}

/// A socket that is listened on.
#[derive(Debug)]
struct Socket {
    listens: Listens,
    /// The so-manieth socket that became known.
    number: u64,
    /// Several processes may hold it. The latest is the last.
    holders: Vec<Listening>,
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Listeners {
    /// By cookie.
    sockets: HashMap<u64, Socket>,
    /// Cookies of those at each place, by their numbers.
    places: HashMap<SocketAddr, BTreeMap<u64, u64>>,
    of_tenant: HashMap<TenantId, HashSet<u64>>,
    known: u64,
}

/// The places at which a socket is found.
fn places(listens: Listens) -> impl Iterator<Item = SocketAddr> {
    let address = listens.address;
    let any = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port());
    [address].into_iter().chain(listens.of_both.then_some(any))
}

impl Listeners {
    /// Sockets that somebody listens on.
    pub fn len(&self) -> usize {
        self.sockets.len()
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
        let socket = self.sockets.entry(held.cookie).or_insert_with(|| {
            self.known += 1;
            for place in places(listening.listens) {
                let there = self.places.entry(place).or_default();
                there.insert(self.known, held.cookie);
            }
            Socket {
                listens: listening.listens,
                number: self.known,
                holders: Vec::new(),
            }
        });
        socket.holders.push(listening);
        let sockets = self.of_tenant.entry(tenant).or_default();
        sockets.insert(held.cookie);
    }

    /// Who was found last to hold the socket with this cookie.
    pub fn latest(&self, cookie: u64) -> Option<Listening> {
        self.sockets.get(&cookie)?.holders.last().copied()
    }

    /// Who was found last to listen where a connection to this address goes. All who listen at one place are of one user, but for those who
    /// do not any more.
    pub fn latest_at(&self, destination: SocketAddr) -> Option<Listening> {
        let any: IpAddr = match destination.ip() {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let places = [destination.ip(), any].map(|ip| SocketAddr::new(ip, destination.port()));
        let there = places.iter().find_map(|place| self.places.get(place))?;
        let (_, cookie) = there.last_key_value()?;
        self.latest(*cookie)
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
        let Some(socket) = self.sockets.get_mut(&cookie) else {
            return;
        };
        socket.holders.retain(|holder| holder.tenant != tenant);
        if !socket.holders.is_empty() {
            return;
        }
        let (listens, number) = (socket.listens, socket.number);
        self.sockets.remove(&cookie);
        for place in places(listens) {
            if let Some(there) = self.places.get_mut(&place) {
                there.remove(&number);
                if there.is_empty() {
                    self.places.remove(&place);
                }
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

    fn listening_at(tenant: TenantId, cookie: u64, address: &str, of_both: bool) -> Listening {
        let listens = Listens {
            address: address.parse().unwrap(),
            of_both,
        };
        let held = Held {
            cookie,
            inode: cookie,
            shared: false,
            located: None,
            listens: Some(listens),
            times: None,
        };
        Listening {
            tenant,
            fd: 3,
            held,
            listens,
        }
    }

    fn listening(tenant: TenantId, cookie: u64) -> Listening {
        listening_at(tenant, cookie, "127.0.0.2:80", false)
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
        assert!(listeners.of_tenant.is_empty() && listeners.places.is_empty());
    }

    #[test]
    fn a_connection_is_for_who_listens_at_its_address_before_any() {
        let mut listeners = Listeners::default();
        let at = |listeners: &Listeners, address: &str| {
            let latest = listeners.latest_at(address.parse().unwrap());
            latest.map(|latest| latest.held.cookie)
        };
        listeners.add(listening_at(1, 10, "127.0.0.2:80", false));
        listeners.add(listening_at(2, 20, "0.0.0.0:80", false));
        listeners.add(listening_at(3, 30, "[::]:81", true));
        listeners.add(listening_at(4, 40, "[::]:82", false));
        assert_eq!(at(&listeners, "127.0.0.2:80"), Some(10));
        assert_eq!(at(&listeners, "127.0.0.3:80"), Some(20));
        assert_eq!(at(&listeners, "[::1]:80"), None);
        assert_eq!(at(&listeners, "127.0.0.2:81"), Some(30));
        assert_eq!(at(&listeners, "[::1]:81"), Some(30));
        assert_eq!(at(&listeners, "127.0.0.2:82"), None);
        // Of several that share a port, the latest that is left.
        listeners.add(listening_at(5, 50, "127.0.0.2:80", false));
        assert_eq!(at(&listeners, "127.0.0.2:80"), Some(50));
        listeners.forget(5);
        assert_eq!(at(&listeners, "127.0.0.2:80"), Some(10));
        listeners.forget(1);
        assert_eq!(at(&listeners, "127.0.0.2:80"), Some(20));
        (2..=4).for_each(|tenant| listeners.forget(tenant));
        assert!(listeners.places.is_empty() && listeners.sockets.is_empty());
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
