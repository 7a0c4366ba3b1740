//! The protocol between nodes, as a state machine without I/O or clock.
//!
//! The daemon owns one [`Node`] and is its only caller. It tells the node what has happened
//! (a message came, a descriptor completed, a program wrote or read, time has passed) and then asks
//! with [`Node::poll`] what is to be done: an ordered, bounded list of [`Action`]s for the device
//! and of [`Event`]s for itself. `docs/protocol.md` is the specification; the order and meaning
//! of messages are explained there.
//!
//! This crate never reads a clock, touches the device or the memory of a stream, or allocates
//! after [`Node::new`]. The other node is not trusted: whatever it sends, memory stays bounded and
//! only its own streams suffer.

#![forbid(unsafe_code)]

mod action;
mod config;
mod counters;
mod id;
mod list;
pub mod message;
mod node;
mod session;
mod stream;
mod table;

pub use action::{Action, Actions, EndReason, Event, Write};
pub use config::Config;
pub use counters::{Count, Counters};
pub use id::{NodeId, Place, StreamId};
pub use message::{Cause, Refusal};
pub use node::{Addresses, LocalError, Node, Positions, Record, Status};
