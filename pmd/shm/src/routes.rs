//! The networks of other nodes, as the daemon tells them to a tenant. One writer, and readers that
//! read again when they were disturbed; a writer that died in the middle leaves no network at all.

use crate::layout::{ROUTES, RouteEntry, Routes};
use crate::sync::{Ordering::*, fence};

/// How often a reader begins again.
const TRIES: u32 = 16;

/// A network of another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its address; IPv4 as a v4-mapped IPv6 address.
    pub address: [u8; 16],
    /// Leading bits that count, 0 to 128; of an IPv4 network 96 more than usual.
    pub prefix: u32,
    /// The node's id.
    pub node: u32,
}

/// The 16 bytes of an address, in network order, as a number.
fn number(address: &[u8; 16]) -> u128 {
    u128::from_be_bytes(*address)
}

impl RouteEntry {
    fn set(&self, network: &Network) {
        let [high, low] = &self.address;
        high.store((number(&network.address) >> 64) as u64, Relaxed);
        low.store(number(&network.address) as u64, Relaxed);
        self.prefix.store(network.prefix, Relaxed);
        self.node.store(network.node, Relaxed);
    }

    fn covers(&self, address: u128) -> bool {
        let [high, low] = &self.address;
        let own = u128::from(high.load(Relaxed)) << 64 | u128::from(low.load(Relaxed));
        let free = 128 - self.prefix.load(Relaxed).min(128);
        (own ^ address).checked_shr(free).unwrap_or(0) == 0
    }
}

impl Routes {
    /// Replaces the networks; those beyond [`ROUTES`] are left out. There is one writer at a time.
    pub fn set(&self, networks: &[Network]) {
        // Odd while writing, whatever the tenant or a writer that died has left there.
        let writing = self.sequence.load(Relaxed) | 1;
        self.sequence.store(writing, Relaxed);
        fence(Release);
        for (entry, network) in self.entries.iter().zip(networks) {
            entry.set(network);
        }
        self.count.store(networks.len().min(ROUTES) as u32, Relaxed);
        self.sequence.store(writing.wrapping_add(1), Release);
    }

    /// True when no network belongs to another node. One load.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.count.load(Relaxed) == 0
    }

    /// True when an address (IPv4 as a v4-mapped IPv6 address) belongs to another node. False as
    /// well when the writer does not come to an end.
    pub fn lead_to(&self, address: &[u8; 16]) -> bool {
        let address = number(address);
        for _ in 0..TRIES {
            let before = self.sequence.load(Acquire);
            if before & 1 != 0 {
                std::hint::spin_loop();
                continue;
            }
            let count = (self.count.load(Relaxed) as usize).min(ROUTES);
            let found = (self.entries.iter().take(count)).any(|entry| entry.covers(address));
            fence(Acquire);
            if self.sequence.load(Relaxed) == before {
                return found;
            }
        }
        false
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::net::{IpAddr, Ipv6Addr};

    fn empty() -> Box<Routes> {
        // SAFETY: made of integers; zeroes are a value.
        Box::new(unsafe { std::mem::zeroed() })
    }

    fn bytes(text: &str) -> [u8; 16] {
        match text.parse().unwrap() {
            IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            IpAddr::V6(address) => address.octets(),
        }
    }

    fn network(text: &str, prefix: u32) -> Network {
        Network {
            address: bytes(text),
            prefix,
            node: 2,
        }
    }

    #[test]
    fn an_address_is_in_a_network_or_not() {
        let routes = empty();
        assert!(routes.is_empty() && !routes.lead_to(&bytes("10.1.0.1")));
        routes.set(&[
            network("10.1.0.7", 128),
            network("10.2.0.0", 96 + 16),
            network("fd00:1::", 64),
        ]);
        assert!(!routes.is_empty());
        for (address, expected) in [
            ("10.1.0.7", true),
            ("10.1.0.6", false),
            ("10.2.255.255", true),
            ("10.3.0.0", false),
            ("10.1.255.255", false),
            ("127.0.0.1", false),
            ("fd00:1::ffff:1", true),
            ("fd00:1:0:1::1", false),
            ("::ffff:10.2.0.1", true),
            ("::10.2.0.1", false),
        ] {
            assert_eq!(routes.lead_to(&bytes(address)), expected, "{address}");
        }
        routes.set(&[network("10.9.0.0", 96 + 16)]);
        assert!(routes.lead_to(&bytes("10.9.1.1")) && !routes.lead_to(&bytes("10.1.0.7")));
    }

    #[test]
    fn the_shortest_prefix_covers_all() {
        let routes = empty();
        routes.set(&[network("::", 0)]);
        assert!(routes.lead_to(&[0; 16]) && routes.lead_to(&[255; 16]));
    }

    #[test]
    fn a_writer_that_died_in_the_middle_leaves_none_until_the_next() {
        let routes = empty();
        routes.set(&[network("10.1.0.0", 112)]);
        routes.sequence.fetch_add(1, Relaxed);
        assert!(!routes.lead_to(&bytes("10.1.0.7")));
        routes.set(&[network("10.1.0.0", 112)]);
        assert!(routes.lead_to(&bytes("10.1.0.7")));
    }

    #[test]
    fn nonsense_is_harmless() {
        let routes = empty();
        routes.count.store(u32::MAX, Relaxed);
        routes.entries[3].prefix.store(u32::MAX, Relaxed);
        // All entries are of zeroes: everything belongs to another node but nothing is read
        // outside of them.
        assert!(routes.lead_to(&bytes("10.1.0.7")));
    }

    #[test]
    fn more_networks_than_fit_are_left_out() {
        let routes = empty();
        let networks: Vec<Network> = (0..ROUTES as u16 + 5)
            .map(|n| Network {
                address: Ipv6Addr::new(0xfd00, n, 0, 0, 0, 0, 0, 1).octets(),
                prefix: 128,
                node: 2,
            })
            .collect();
        routes.set(&networks);
        assert_eq!(routes.count.load(Relaxed), ROUTES as u32);
        assert!(routes.lead_to(&networks[ROUTES - 1].address));
        assert!(!routes.lead_to(&networks[ROUTES].address));
    }

    /// Two networks are exchanged all the time: a reader sees one of them, never none or a mixture.
    #[test]
    fn readers_are_not_disturbed_by_a_writer() {
        let routes = empty();
        let (one, two) = (network("10.1.0.0", 112), network("10.1.0.0", 113));
        let mixed = bytes("10.1.200.0");
        routes.set(&[one]);
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..if cfg!(miri) { 20 } else { 20_000 } {
                    routes.set(&[two, one]);
                    routes.set(&[one]);
                }
                done.store(true, Release);
            });
            while !done.load(Acquire) {
                let held = routes.sequence.load(Acquire);
                let found = routes.lead_to(&mixed);
                // Given up only where the writer was at work each time, or all the time: it may have
                // lost its core in the middle.
                assert!(found || held % 2 == 1 || routes.sequence.load(Acquire) != held);
            }
        });
    }
}
