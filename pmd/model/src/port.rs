//! The side of a function that the work of other nodes reaches: what the engine of a source looks at and changes
//! there, with no help of the target.
//!
//! A port is private to a fabric, or lies in memory that the processes of a [wire](crate::wire) share. Then any
//! of them may store anything at any time: words are loaded once, checked, and used from the copy, and no index
//! comes from a port unchecked. That keeps a process alive, not its node's memory safe: whoever has a port mapped
//! has the node's memory mapped too, and stands where the wire stands between devices.
//!
//! The lock of a port is held by whoever executes an item at it, and by its owner while that changes the port. Its
//! word is the holder's token. A holder that died is found by the owner, who is told of every process's end, and
//! who completes what had become visible ([`crate::engine::Core::recover`]). So it has to be, and is, harmless to
//! end at any point of an item: a message counts once word 0 of its entry is stored.

use crate::counters::Tally;
use crate::page::Page;
use crate::protection::Protection;
use crate::queue_set::Ring;
use crate::sheet::{MAX_QUEUE, MIN_QUEUE, PAGE_SIZE};
use std::mem::offset_of;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Most queue sets of a function.
pub(crate) const MAX_SETS: usize = 256;
/// Looks at a lock before a source lets its item wait.
const SPINS: u32 = 200;

/// What sources see of a function, its queue pages apart. Any contents are valid.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Port {
    /// The fabric reaches the node.
    pub(crate) link_up: AtomicU64,
    /// Changes of the memory that the node's device reaches ([`crate::Function::change_reach`]).
    pub(crate) changes: AtomicU64,
    _reserved: [AtomicU64; 14],
    /// Token of the holder, 0 for none.
    lock: AtomicU64,
    _reserved_too: [AtomicU64; 15],
    /// What other nodes' work did here.
    pub(crate) tally: Tally,
    _reserved_three: [AtomicU64; 11],
    pub(crate) protection: Protection,
    pub(crate) sets: [Inbound; MAX_SETS],
}

/// A queue set, as its sources see it.
#[derive(Debug, Default)]
#[repr(C, align(128))]
pub(crate) struct Inbound {
    /// It runs, and its message queue is the one below.
    pub open: AtomicU64,
    /// Why a source found it to have failed; its owner does the rest.
    pub fault: AtomicU64,
    addr: AtomicU64,
    log2: AtomicU64,
    /// A fault that was injected: the queue looks full.
    pub full: AtomicU64,
    _reserved: [AtomicU64; 11],
    /// Free-running index of the next message. From here on the words change with each message.
    pub tail: AtomicU64,
    /// Value of ARM that has fired.
    pub fired: AtomicU64,
}

const _: () = {
    assert!(offset_of!(Port, lock) == 0x80);
    assert!(offset_of!(Port, tally) == 0x100);
    assert!(offset_of!(Port, protection) == 0x200);
    assert!(offset_of!(Port, sets) == 0x10400);
    assert!(offset_of!(Inbound, tail) == 0x80);
    assert!(size_of::<Inbound>() == 0x100);
    assert!(size_of::<Port>() == 0x21000);
};

/// Memory in which a port lies, and behind it the queue pages, which sources look at too.
///
/// The references must stay the same for the life of the object.
pub trait PortMemory: Send + Sync + std::fmt::Debug {
    /// The port.
    fn port(&self) -> &Port;
    /// The queue pages, at least as many as the function has queue sets.
    fn pages(&self) -> &[Page];
}

/// A port that only this process reaches.
#[derive(Debug)]
pub(crate) struct Private {
    port: Box<Port>,
    pages: Box<[Page]>,
}

impl Private {
    pub fn new(queue_sets: usize) -> Self {
        Private {
            port: Box::new(Port::new()),
            pages: (0..queue_sets).map(|_| Page::new()).collect(),
        }
    }
}

impl PortMemory for Private {
    fn port(&self) -> &Port {
        &self.port
    }

    fn pages(&self) -> &[Page] {
        &self.pages
    }
}

impl Port {
    /// Bytes of a port and of as many queue pages as there can be, one after the other.
    pub const BYTES: usize = size_of::<Port>() + MAX_SETS * PAGE_SIZE as usize;

    fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Port {
            link_up: zero(),
            changes: zero(),
            _reserved: std::array::from_fn(|_| zero()),
            lock: zero(),
            _reserved_too: std::array::from_fn(|_| zero()),
            tally: Tally::default(),
            _reserved_three: std::array::from_fn(|_| zero()),
            protection: Protection::new(),
            sets: std::array::from_fn(|_| Inbound::default()),
        }
    }

    /// Takes the lock, unless somebody else keeps it.
    #[inline]
    pub(crate) fn try_lock(&self, token: u64) -> bool {
        for _ in 0..SPINS {
            let free = self.lock.load(Relaxed) == 0;
            if free
                && self
                    .lock
                    .compare_exchange(0, token, Acquire, Relaxed)
                    .is_ok()
            {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    /// Gives it back, unless it was taken away meanwhile.
    #[inline]
    pub(crate) fn unlock(&self, token: u64) {
        if self.lock.load(Relaxed) == token {
            self.lock.store(0, Release);
        }
    }

    /// Who holds the lock.
    pub(crate) fn holder(&self) -> u64 {
        self.lock.load(Relaxed)
    }

    /// Takes the lock from a holder that will not come back.
    pub(crate) fn take_over(&self, from: u64, token: u64) -> bool {
        let taken = self.lock.compare_exchange(from, token, Acquire, Relaxed);
        taken.is_ok()
    }
}

impl Inbound {
    /// The message queue, if it is one.
    #[inline]
    pub fn ring(&self) -> Option<Ring> {
        let (addr, log2) = (self.addr.load(Relaxed), self.log2.load(Relaxed) as u32);
        (MIN_QUEUE..=MAX_QUEUE)
            .contains(&log2)
            .then_some(Ring { addr, log2 })
    }

    /// Lets messages in, from index 0 on.
    pub fn start(&self, ring: Ring) {
        self.addr.store(ring.addr, Relaxed);
        self.log2.store(ring.log2.into(), Relaxed);
        for word in [&self.fault, &self.full, &self.tail, &self.fired] {
            word.store(0, Relaxed);
        }
        self.open.store(1, Relaxed);
    }

    /// Lets no more in.
    pub fn stop(&self) {
        self.open.store(0, Relaxed);
    }

    /// Fails the set for what a source found.
    pub fn fail(&self, fault: u32) {
        self.stop();
        self.fault.store(fault.into(), Relaxed);
    }
}
