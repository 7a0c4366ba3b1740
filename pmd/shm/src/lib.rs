//! Shared memory of rdsock: what two ends of a stream, a tenant and the daemon say to each other.
//!
//! The counterpart of everything here is a process that is not trusted. The crate is loaded into
//! every program (it is the core of the shim), so it depends on `libc` at most, never allocates,
//! never panics and never blocks.
//!
//! It is built without the standard library, which the shim must not bring into programs: `std` is another name of
//! `core` here.

#![cfg_attr(not(any(test, loom)), no_std)]

#[cfg(not(any(test, loom)))]
extern crate core as std;

pub mod bell;
pub mod control;
pub mod end;
pub mod layout;
pub mod lock;
pub mod queue;
pub mod reason;
pub mod ring;
pub mod routes;
pub mod sync;
pub mod wake;
