//! Differential testing: a generator writes programs of socket calls from seeds, a conductor has the same program carried
//! out by processes on plain Linux and by processes under the shim, step by step, and what the calls answered is compared.
//! Plain Linux is the oracle. A program whose answers differ is shrunk to the smallest that still does.
//!
//! `src/main.rs` is the command line, `tests/differential.rs` the bounded run, `src/bin/` the processes that make the
//! calls. Nothing here knows the shim or the daemon but by what a user of them sees.

pub mod actor;
pub mod conductor;
pub mod control;
pub mod generator;
pub mod judge;
pub mod pattern;
pub mod program;
pub mod shrink;
pub mod stage;
