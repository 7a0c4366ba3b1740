//! What a poll core has counted, as other threads read it. Only the core counts; it takes no lock for that.

use rdsock_proto::{Count, Node, NodeId};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A count that other threads may read.
#[derive(Debug, Default)]
pub struct Total(AtomicU64);

impl Total {
    /// Counts one more. Only one thread counts.
    #[inline]
    pub(crate) fn add(&self) {
        self.set(self.get() + 1);
    }

    /// What was counted elsewhere.
    #[inline]
    pub(crate) fn set(&self, count: u64) {
        self.0.store(count, Ordering::Relaxed);
    }

    /// The count.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a poll core has done.
#[derive(Debug, Default)]
pub struct Totals {
    /// Times it slept.
    pub sleeps: Total,
    failed: AtomicBool,
    nodes: Box<[Seen]>,
}

/// What the protocol knows of a node.
#[derive(Debug)]
struct Seen {
    node: u16,
    up: AtomicBool,
    counts: [Total; Count::ALL.len()],
}

impl Totals {
    /// With these other nodes.
    pub(crate) fn new(peers: &[u16]) -> Self {
        let nodes = peers.iter().map(|node| Seen {
            node: *node,
            up: AtomicBool::new(false),
            counts: Default::default(),
        });
        Totals {
            nodes: nodes.collect(),
            ..Totals::default()
        }
    }

    /// Shows what the protocol knows.
    pub(crate) fn show(&self, protocol: &Node) {
        for Seen { node, up, counts } in &self.nodes {
            let is_up = protocol.is_up(NodeId(*node)) && !self.has_failed();
            up.store(is_up, Ordering::Relaxed);
            if let Some(counters) = protocol.counters(NodeId(*node)) {
                for (shown, count) in counts.iter().zip(Count::ALL) {
                    shown.set(counters.get(*count));
                }
            }
        }
    }

    /// The core does not use the device any more: no node is up for it.
    pub(crate) fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
        for seen in &self.nodes {
            seen.up.store(false, Ordering::Relaxed);
        }
    }

    /// Whether the core does not use the device any more.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    fn seen(&self, node: u16) -> Option<&Seen> {
        self.nodes.iter().find(|seen| seen.node == node)
    }

    /// Whether connects to a node are possible on this core: as it was at most a tenth of a second ago.
    pub fn is_up(&self, node: u16) -> bool {
        let seen = self.seen(node);
        seen.is_some_and(|seen| seen.up.load(Ordering::Relaxed))
    }

    /// How often something was counted of a node: at most a tenth of a second old.
    pub fn violations(&self, node: u16, count: Count) -> u64 {
        let seen = self.seen(node);
        seen.map_or(0, |seen| seen.counts[count as usize].get())
    }
}
