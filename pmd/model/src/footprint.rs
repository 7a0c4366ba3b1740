//! What a device holds at a moment, counted, so that it can be shown what its state grows with.

use crate::engine::Node;
use crate::queue_set::State;

/// State of one function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Queue sets that run.
    pub queue_sets: usize,
    /// Lanes that were ever used, of work queues and of windows.
    pub lanes: usize,
    /// Items that wait in them.
    pub items: usize,
    /// Valid entries of the region table.
    pub regions: usize,
}

impl Footprint {
    pub(crate) fn of(node: &Node) -> Self {
        let running = |set: &&crate::queue_set::QueueSet| set.state == State::Running;
        let sets: Vec<_> = node.sets.iter().filter(running).collect();
        let lanes = |set: &&crate::queue_set::QueueSet| {
            set.descriptors.by_node.len() + set.window.by_node.len()
        };
        Footprint {
            queue_sets: sets.len(),
            lanes: sets.iter().map(lanes).sum(),
            items: (sets
                .iter()
                .map(|set| set.descriptors.held + set.window.held))
            .sum(),
            regions: node.port().protection.valid_regions(),
        }
    }
}
