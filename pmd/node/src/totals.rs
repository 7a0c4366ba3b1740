//! What a poll core has counted, as other threads read it. The core counts in numbers of its own, and shows
//! them here ten times a second and before it sleeps.

use crate::stages::{Stage, Stopwatch};
use rdsock_proto::{Count, Node, NodeId};
use rdsock_rde::Stats;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A number that other threads may read.
#[derive(Debug, Default)]
pub struct Total(AtomicU64);

impl Total {
    #[inline]
    fn set(&self, count: u64) {
        self.0.store(count, Ordering::Relaxed);
    }

    /// The number, at most a tenth of a second old.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! totals {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        /// What a core counts itself; the rest is counted by its queue set.
        #[derive(Debug, Default)]
        pub(crate) struct Counts { $(pub $name: u64,)* }

        /// What a poll core has done.
        #[derive(Debug, Default)]
        pub struct Totals {
            $($(#[$doc])* pub $name: Total,)*
            timed_turns: Total,
            stages: [Total; Stage::ALL.len()],
            failed: AtomicBool,
            nodes: Box<[Seen]>,
        }

        impl Totals {
            /// All counts, by the names that `rdsock stat` shows.
            pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name.get()),)*].into_iter()
            }

            fn show_counts(&self, counts: &Counts) {
                $(self.$name.set(counts.$name);)*
            }
        }
    };
}

totals! {
    /// Turns of the loop.
    turns;
    /// Turns that had work.
    busy_turns;
    /// Completions taken.
    completions;
    /// Messages of other nodes taken.
    messages;
    /// Commands of the control thread.
    commands;
    /// Streams looked at because the anchors' thread wanted it.
    looks;
    /// Streams polled.
    polled;
    /// Actions of the protocol carried out.
    actions;
    /// Descriptors posted.
    posted;
    /// Stores to the doorbell.
    doorbells;
    /// Times that a queue or a lane was full.
    full;
    /// Times that another core, or a register access, kept the model busy.
    model_busy;
    /// Times that the core slept.
    sleeps;
}

/// What the protocol knows of a node.
#[derive(Debug)]
struct Seen {
    node: u16,
    up: AtomicBool,
    counts: [Total; Count::ALL.len()],
}

impl Counts {
    /// Adds what the queue set counts.
    pub fn take(&mut self, set: &Stats) {
        self.completions = set.completions;
        self.messages = set.received;
        self.posted = set.posted;
        self.doorbells = set.doorbells;
        self.full = set.full;
    }
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

    /// Shows what was counted and measured.
    pub(crate) fn show(&self, counts: &Counts, watch: &Stopwatch) {
        self.show_counts(counts);
        self.timed_turns.set(watch.kept_turns);
        for (shown, spent) in self.stages.iter().zip(watch.nanoseconds()) {
            shown.set(spent);
        }
    }

    /// Shows what the protocol knows.
    pub(crate) fn show_nodes(&self, protocol: &Node) {
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

    /// Turns with work that were measured.
    pub fn timed_turns(&self) -> u64 {
        self.timed_turns.get()
    }

    /// Nanoseconds that those have spent in a stage.
    pub fn stage(&self, stage: Stage) -> u64 {
        self.stages[stage as usize].get()
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
