//! The core of the shim: what a socket call does on a stream, from the numbers of descriptors down to the system. It is built without
//! the standard library, and needs no libc: what it takes from one where there is one comes by a table ([`sys::Host`]). `std` is
//! another name of `core` here.
//!
//! `numbers.rs` follows the program's numbers; `io`, `poll.rs` and `epoll` do what calls do on a stream, with the steps of
//! `rdsock_shm::end`, which `end.rs` ties to the kernel; `wait.rs` sleeps and wakes, `signals.rs` lets signals end a sleep as
//! they end the kernel's; `demote.rs` goes back to the kernel, `rest.rs` waits while what the other end left goes there before;
//! `tenant` talks to the daemon; `limits.rs` has the thresholds. What it knows of its process is one structure (`state.rs`).
//!
//! It never panics, never allocates from the heap, and never takes a lock that it would hold while it sleeps. Its functions return a
//! negated error number where they fail, and touch no `errno`.

#![cfg_attr(not(test), no_std)]
// What stands in a static is made by a constant function, which a default is not.
#![allow(clippy::new_without_default)]

#[cfg(not(test))]
extern crate core as std;

pub mod address;
pub mod brand;
pub mod clock;
pub mod conn;
pub mod deadline;
pub mod demote;
pub mod end;
pub mod epoll;
pub mod fds;
pub mod gather;
pub mod hidden;
pub mod identity;
pub mod io;
pub mod known;
pub mod limits;
pub mod lost;
pub mod names;
pub mod nap;
pub mod numbers;
pub mod poll;
pub mod ready;
pub mod registration;
pub mod rest;
pub mod signals;
pub mod state;
pub mod stream;
pub mod sys;
pub mod tcp_info;
pub mod tenant;
pub mod wait;
