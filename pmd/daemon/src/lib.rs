//! The rdsock daemon: one thread that sleeps in epoll.
//!
//! Programs with the shim attach over the control socket ([`endpoint`], [`channel`]) and say,
//! through a queue in shared memory, which TCP connections they hold. The daemon asks the kernel
//! whether that is true ([`process`], [`diag`], [`namespaces`]), finds the two ends of a
//! connection ([`book`]), makes the stream's memory ([`memory`]) and hands it to both. It never
//! touches a byte of the data, and streams live on without it.
//!
//! Tenants are hostile: whatever one does, it can break its own streams and nothing else.

pub mod answer;
pub mod args;
pub mod book;
pub mod channel;
pub mod config;
pub mod confine;
mod connections;
pub mod counters;
pub mod daemon;
pub mod diag;
pub mod endpoint;
mod fabric;
pub mod log;
mod matching;
pub mod memory;
pub mod namespaces;
pub mod notify;
pub mod policy;
pub mod process;
mod streams;
mod tenants;
