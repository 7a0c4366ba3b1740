//! What a node wants done: posts to the device, and events for the daemon.

use crate::id::{NodeId, StreamId};
use crate::message::{Bytes, Refusal};
use crate::node::Addresses;

/// One thing to do. Actions are carried out in the order given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Action {
    /// Send a mailbox message, behind everything posted to that node before.
    Send {
        /// To whom.
        node: NodeId,
        /// Number of this post, counted for each node.
        seq: u64,
        /// The message.
        message: Bytes,
    },
    /// Post a write, behind everything posted to that node before.
    Write {
        /// To whom.
        node: NodeId,
        /// Number of this post, counted for each node.
        seq: u64,
        /// What to write.
        write: Write,
    },
    /// Start the queue to this node again: it stopped at a failed post, and all have completed.
    Restart {
        /// The node.
        node: NodeId,
    },
    /// Tell the daemon.
    Event(Event),
}

/// A write from a local ring into the same positions of the ring at the other end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Write {
    /// The local stream, whose ring holds the bytes.
    pub stream: StreamId,
    /// Position of the first byte. The bytes do not wrap, neither here nor there.
    pub position: u64,
    /// Number of bytes, at least 1.
    pub len: u32,
    /// Key of the remote region.
    pub key: u32,
    /// Offset of the first byte in the remote region.
    pub offset: u64,
    /// Offset of the remote head word, stored after the bytes are visible.
    pub word: u64,
    /// The value stored there: `position + len`.
    pub head: u64,
    /// A message for the remote mailbox, delivered after the head word is visible.
    pub notify: Option<Bytes>,
}

/// Something that the daemon has to know about a stream or a node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event {
    /// A node asks for a stream. Answer with `accept` or `refuse`.
    Incoming {
        /// Our id.
        stream: StreamId,
        /// Who asks.
        node: NodeId,
        /// From where to where.
        addresses: Addresses,
    },
    /// The connect was accepted.
    Established {
        /// The stream.
        stream: StreamId,
    },
    /// The connect was not accepted; the id is only good for `Released` any more.
    Refused {
        /// The stream.
        stream: StreamId,
        /// Why.
        refusal: Refusal,
    },
    /// Bytes have arrived in the local ring: wake its reader.
    PeerHead {
        /// The stream.
        stream: StreamId,
        /// Position after the last of them.
        head: u64,
    },
    /// Bytes of the local ring are at the other end: its writer may reuse their space.
    Credit {
        /// The stream.
        stream: StreamId,
        /// Position after the last of them.
        to: u64,
    },
    /// The other end's direction ends, after all its bytes.
    PeerShut {
        /// The stream.
        stream: StreamId,
        /// Position after its last byte.
        end: u64,
    },
    /// The stream is broken. Its program sees ECONNRESET (bytes that have arrived stay readable).
    /// The daemon has to `close` it.
    Ended {
        /// The stream.
        stream: StreamId,
        /// Why.
        reason: EndReason,
    },
    /// The session is being resumed: answer with `resume` and the stream's head word.
    Resume {
        /// The stream.
        stream: StreamId,
    },
    /// The stream is over: nothing is in flight from or to its rings, the id means nothing any
    /// more. The last event of every stream.
    Released {
        /// The stream.
        stream: StreamId,
    },
    /// Connects to this node are possible from now on.
    NodeUp {
        /// The node.
        node: NodeId,
    },
    /// The node has restarted, or was given up. Withdraw the keys that it was given before
    /// memory of its streams is used again: their `Ended` and `Released` follow.
    NodeGone {
        /// The node.
        node: NodeId,
    },
}

/// Why a stream ended otherwise than by both programs closing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// The other end broke it, or left while bytes for it were on the way.
    PeerReset,
    /// The other node broke a rule.
    Violation,
    /// The other node's protection refused a write.
    AccessRefused,
    /// The other node does not know the stream any more.
    PeerForgot,
    /// The other node has restarted, or could not be reached for too long.
    NodeGone,
}

/// A bounded list of actions, filled by `Node::poll`.
#[derive(Debug)]
pub struct Actions {
    list: Vec<Action>,
    bound: usize,
}

impl Actions {
    /// An empty list that takes up to `bound` actions, at least 4.
    pub fn new(bound: usize) -> Self {
        let bound = bound.max(4);
        Actions {
            list: Vec::with_capacity(bound),
            bound,
        }
    }

    /// How many more fit.
    pub fn room(&self) -> usize {
        self.bound - self.list.len()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Takes all actions out, in order.
    pub fn drain(&mut self) -> impl Iterator<Item = Action> + '_ {
        self.list.drain(..)
    }

    pub(crate) fn push(&mut self, action: Action) {
        debug_assert!(self.room() > 0, "the caller looks for room first");
        self.list.push(action);
    }
}
