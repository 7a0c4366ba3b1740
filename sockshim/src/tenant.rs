//! This process as a tenant of the daemon: its control connection, its memory, what it announces
//! and what it is offered. Nothing here waits for the daemon (but [`look_up`], for a connection
//! inherited over exec).
//!
//! The way of a connection: it is announced (`announce.rs`), through the queue (`requests.rs`); the
//! daemon answers with a message (`messages.rs`), which may offer a stream (`offer.rs`).

mod announce;
mod attach;
mod hidden;
mod inherit;
mod lock;
mod memory;
mod messages;
mod offer;
mod requests;

pub use announce::after_call;
pub use attach::{disable, ensure, is_known, start};
pub use hidden::{close_hidden, hide, move_hidden};
pub use inherit::{after_fork_in_child, after_fork_in_parent, before_exec, before_fork, look_up};
pub use memory::{count, record, return_bell, take_bell};
pub use messages::look;
pub use offer::Offer;
pub use requests::{stream_closed, stream_left, withdraw};
