//! The rdsock daemon: one thread that sleeps in epoll.
//!
//! Programs with the shim attach over the control socket ([`endpoint`], [`channel`]) and say,
//! through a queue in shared memory, which TCP connections they hold. The daemon asks the kernel
//! whether that is true ([`process`], [`diag`], [`namespaces`]), decides what they may have ([`rights`], [`accounts`]),
//! finds the two ends of a connection ([`book`]), makes the stream's memory ([`memory`], [`streams`]) and hands it to
//! both. It never touches a byte of the data, and streams live on without it.
//!
//! Tenants are hostile: whatever one does, it can break its own streams and nothing else. What may have to be waited for
//! is done by [`porters`].

pub mod accounts;
pub mod agenda;
pub mod args;
pub mod book;
pub mod channel;
pub mod config;
pub mod confine;
pub mod connections;
pub mod counters;
pub mod daemon;
pub mod diag;
pub mod endpoint;
mod fabric;
pub mod found;
pub mod heap;
pub mod journal;
pub mod lines;
pub mod log;
pub mod memory;
pub mod namespaces;
pub mod notify;
pub mod own;
pub mod policy;
pub mod porters;
pub mod process;
pub mod queries;
pub mod relay;
mod remains;
pub mod rights;
pub mod search;
pub mod sentry;
pub mod shares;
pub mod starter;
pub mod streams;
mod users;
