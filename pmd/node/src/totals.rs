//! What a poll core has counted, as other threads read it. Only the core counts; it takes no lock for that.

use rdsock_proto::{Count, Node, NodeId};
use std::sync::atomic::{AtomicU64, Ordering};

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
    nodes: Box<[Violations]>,
}

/// What the protocol has counted of a node.
#[derive(Debug)]
struct Violations {
    node: u16,
    counts: [Total; Count::ALL.len()],
}

impl Totals {
    /// With these other nodes.
    pub(crate) fn new(peers: &[u16]) -> Self {
        let nodes = peers.iter().map(|node| Violations {
            node: *node,
            counts: Default::default(),
        });
        Totals {
            sleeps: Total::default(),
            nodes: nodes.collect(),
        }
    }

    /// Shows what the protocol has counted.
    pub(crate) fn show(&self, protocol: &Node) {
        for Violations { node, counts } in &self.nodes {
            if let Some(counters) = protocol.counters(NodeId(*node)) {
                for (shown, count) in counts.iter().zip(Count::ALL) {
                    shown.set(counters.get(*count));
                }
            }
        }
    }

    /// How often something was counted of a node: at most a tenth of a second old.
    pub fn violations(&self, node: u16, count: Count) -> u64 {
        let mut nodes = self.nodes.iter();
        let found = nodes.find(|violations| violations.node == node);
        found.map_or(0, |found| found.counts[count as usize].get())
    }
}
