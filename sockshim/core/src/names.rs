//! What the program is told of the ends of a connection to another node. The kernel's own addresses
//! are those of a connection over loopback, to the daemon.

use crate::address::Address;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*};

/// Nothing: the kernel's addresses are true.
const NONE: u32 = 0;
/// A `connect` is under way that will say.
const CLAIMED: u32 = 1;
/// The addresses below.
const TOLD: u32 = 2;

/// The true addresses of a connection, and the ticket that names its stream to the daemon.
#[derive(Debug)]
pub struct Names {
    state: AtomicU32,
    ticket: AtomicU64,
    local: Place,
    peer: Place,
}

#[derive(Debug)]
struct Place {
    ip: [AtomicU64; 2],
    port: AtomicU32,
}

impl Place {
    fn set(&self, address: Address) {
        let ip = u128::from_ne_bytes(address.ip);
        let [low, high] = &self.ip;
        low.store(ip as u64, Relaxed);
        high.store((ip >> 64) as u64, Relaxed);
        self.port.store(address.port.into(), Relaxed);
    }

    fn get(&self) -> Address {
        let [low, high] = &self.ip;
        let ip = u128::from(high.load(Relaxed)) << 64 | u128::from(low.load(Relaxed));
        Address {
            ip: ip.to_ne_bytes(),
            port: self.port.load(Relaxed) as u16,
        }
    }
}

impl Names {
    /// The kernel's addresses are true (again).
    pub fn forget(&self) {
        self.state.store(NONE, Release);
    }

    /// For one call at a time, on a socket that is not connected or that nobody knows yet: what was
    /// told of an earlier attempt to connect it is void. False while another one has claimed it.
    pub fn claim(&self) -> bool {
        self.state.swap(CLAIMED, AcqRel) != CLAIMED
    }

    /// The program is told these addresses from now on: said by who has claimed it.
    pub fn tell(&self, local: Address, peer: Address, ticket: u64) {
        self.local.set(local);
        self.peer.set(peer);
        self.ticket.store(ticket, Relaxed);
        self.state.store(TOLD, Release);
    }

    /// True where the addresses are not the kernel's.
    #[inline]
    pub fn are_told(&self) -> bool {
        self.state.load(Acquire) == TOLD
    }

    /// The program's own address, where it is not the kernel's.
    pub fn local(&self) -> Option<Address> {
        self.are_told().then(|| self.local.get())
    }

    /// The peer's address, likewise.
    pub fn peer(&self) -> Option<Address> {
        self.are_told().then(|| self.peer.get())
    }

    /// The ticket; 0 where the addresses are the kernel's.
    pub fn ticket(&self) -> u64 {
        if self.are_told() {
            self.ticket.load(Relaxed)
        } else {
            0
        }
    }
}
