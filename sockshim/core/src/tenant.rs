//! This process as a tenant of the daemon: its control connection, its memory, what it announces
//! and what it is offered. Nothing here waits for the daemon, but what asks it: [`look_up`], for a
//! connection inherited over exec, and [`reach`] and [`who_is`], for one between nodes.
//!
//! The way of a connection: it is announced (`announce.rs`), through the queue (`requests.rs`); the
//! daemon answers with a message (`messages.rs`), which may offer a stream (`offer.rs`).

mod announce;
mod ask;
mod attach;
mod inherit;
mod link;
mod listeners;
mod lock;
mod memory;
mod messages;
mod offer;
mod pauses;
mod requests;
mod routes;

pub use crate::hidden::{close_hidden, hidden_copy, hide};
pub use announce::{after_call, announce_now};
pub use ask::{Answerer, end_of_wait, reach, who_is};
pub use attach::{
    disable, ensure, greeting, is_known, leads_to_daemon, moved, start, stay_attached,
    take_greeting,
};
pub use inherit::{
    after_fork_in_child, after_fork_in_parent, before_exec, before_fork, fork_failed, look_up, lost,
};
pub use listeners::{is_for_kernel, listens, listens_for_kernel};
pub use memory::{count, return_bell, take_bell};
pub use messages::look;
pub use requests::{closed, keep_on_kernel, stream_left};
pub use routes::{lead_to, may_be_reached, may_lead_away};

use std::sync::atomic::AtomicU64;

/// What this process has and knows as a tenant.
#[derive(Debug)]
pub struct Tenant {
    /// Taken as `lock.rs` says.
    lock: AtomicU64,
    link: link::Link,
    memory: memory::Memory,
    requests: requests::Requests,
    questions: ask::Questions,
}

impl Tenant {
    /// Of a process that has not asked for a daemon yet.
    pub const fn new() -> Self {
        Tenant {
            lock: AtomicU64::new(0),
            link: link::Link::new(),
            memory: memory::Memory::new(),
            requests: requests::Requests::new(),
            questions: ask::Questions::new(),
        }
    }
}
