//! The daemon as the tool sees it: where it is, how to ask it, how to start one.

mod client;
mod find;
mod start;

pub use client::{AskError, Daemon, Direction, Node, Record, Tenant, WhyAnswer};
pub use find::find;
pub use start::{find_program, start};
