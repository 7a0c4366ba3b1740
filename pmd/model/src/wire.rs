//! Nodes whose devices are models in other processes.
//!
//! The models of a fabric can be spread over processes of one machine: each process runs the functions that it
//! has added, and executes what they post at nodes of other processes by itself, in memory that the processes
//! share: the other node's [port](crate::port), and whatever its device reaches. No thread of the target's
//! process has to run for that. Who brings the memory here is a [`Wire`]; the model does no I/O.
//!
//! What a node's device reaches changes while others work on it. Each change has a number, in the port, and is
//! announced over the wire. A source that finds a greater number than it has been told of executes nothing there
//! until it has caught up. So memory that was taken back is not touched any more.

use crate::dma::Dma;
use crate::fabric::Interrupt;
use crate::port::{Port, PortMemory};
use crate::sheet::MAX_NODE;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// What tells a fabric of nodes in other processes. Called with the fabric's lock held.
pub trait Wire: Send + std::fmt::Debug {
    /// Takes in what has come from the other processes, without waiting. A peer that `peers` does not know any
    /// more is to be cut off.
    fn poll(&mut self, peers: &mut Peers);
}

/// A function as its sources see it.
pub(crate) struct End {
    pub memory: Arc<dyn PortMemory>,
    pub dma: Arc<dyn Dma>,
    pub interrupts: Vec<Option<Interrupt>>,
}

impl End {
    pub fn port(&self) -> &Port {
        self.memory.port()
    }

    pub fn has_vector(&self, vector: usize) -> bool {
        matches!(self.interrupts.get(vector), Some(Some(_)))
    }

    /// Fires a vector.
    pub fn fire(&self, vector: usize) {
        if let Some(Some(interrupt)) = self.interrupts.get(vector) {
            interrupt();
        }
    }

    /// Whether a queue set asks for an interrupt that has not fired. It counts as fired then, and who asked
    /// fires it once he has released the port's lock.
    pub fn wants_interrupt(&self, set: usize) -> bool {
        let Some(page) = self.memory.pages().get(set) else {
            return false;
        };
        let arm = page.load32(crate::sheet::page::ARM);
        let fired = &self.port().sets[set].fired;
        let wants = arm != 0 && u64::from(arm) != fired.load(Relaxed);
        if wants {
            fired.store(arm.into(), Relaxed);
            let sent = self.has_vector(1 + set);
            self.port().tally.interrupts.add(sent.into());
        }
        wants
    }
}

/// A node in another process.
pub(crate) struct Peer {
    pub end: End,
    token: u64,
    /// The last change of its memory that has been told; `None` until all that came before was.
    told: Option<u64>,
}

impl Peer {
    /// Whether its memory is as we know it. With the port's lock.
    pub fn is_current(&self) -> bool {
        self.told == Some(self.end.port().changes.load(Relaxed))
    }
}

/// The nodes in other processes that a fabric reaches.
pub struct Peers {
    by_id: Vec<Option<Box<Peer>>>,
    /// Tokens of those that have gone.
    pub(crate) gone: Vec<u64>,
}

impl std::fmt::Debug for Peers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ids = self.by_id.iter().enumerate();
        let ids = ids.filter_map(|(id, peer)| peer.as_ref().map(|_| id));
        f.debug_set().entries(ids).finish()
    }
}

impl Peers {
    pub(crate) fn new() -> Self {
        Peers {
            by_id: (0..=MAX_NODE).map(|_| None).collect(),
            gone: Vec::new(),
        }
    }

    pub(crate) fn get(&self, id: u16) -> Option<&Peer> {
        self.by_id.get(usize::from(id))?.as_deref()
    }

    fn get_mut(&mut self, id: u16) -> Option<&mut Peer> {
        self.by_id.get_mut(usize::from(id))?.as_deref_mut()
    }

    /// Whether a node is there.
    pub fn knows(&self, id: u16) -> bool {
        self.get(id).is_some()
    }

    /// Adds a node. `token` is what it puts into locks that it takes; `dma` reaches the memory that its device
    /// reaches. Nothing is executed there until [`Peers::caught_up`] is first called. False when `id` is not one, or
    /// is taken.
    pub fn attach(
        &mut self,
        id: u16,
        token: u64,
        memory: Arc<dyn PortMemory>,
        dma: Arc<dyn Dma>,
    ) -> bool {
        let place = self.by_id.get_mut(usize::from(id)).filter(|_| id != 0);
        let Some(place @ None) = place else {
            return false;
        };
        let interrupts = Vec::new();
        *place = Some(Box::new(Peer {
            end: End {
                memory,
                dma,
                interrupts,
            },
            token,
            told: None,
        }));
        true
    }

    /// Says that all changes of a node's memory are known, up to a number.
    pub fn caught_up(&mut self, id: u16, change: u64) {
        if let Some(peer) = self.get_mut(id) {
            peer.told = Some(change);
        }
    }

    /// Says how to fire a vector of a node.
    pub fn set_interrupt(&mut self, id: u16, vector: u16, interrupt: Option<Interrupt>) {
        if let Some(peer) = self.get_mut(id) {
            let interrupts = &mut peer.end.interrupts;
            let vector = usize::from(vector);
            if vector >= interrupts.len() {
                interrupts.resize(vector + 1, None);
            }
            interrupts[vector] = interrupt;
        }
    }

    /// Removes a node whose process has gone: nothing is executed there any more, and its port and memory are let go.
    pub fn detach(&mut self, id: u16) {
        let place = self.by_id.get_mut(usize::from(id));
        if let Some(peer) = place.and_then(Option::take) {
            self.gone.push(peer.token);
        }
    }

    /// Removes a node whose process lives: it is at work in this process's port, perhaps, and releases the lock itself.
    pub fn release(&mut self, id: u16) {
        if let Some(place) = self.by_id.get_mut(usize::from(id)) {
            *place = None;
        }
    }

    /// Says that who puts this token into locks is not at work any more: locks that it holds are taken from it.
    pub fn bury(&mut self, token: u64) {
        self.gone.push(token);
    }

    /// Removes the node that has this token.
    pub(crate) fn cut(&mut self, token: u64) {
        for place in &mut self.by_id {
            if place.as_ref().is_some_and(|peer| peer.token == token) {
                *place = None;
            }
        }
    }
}
