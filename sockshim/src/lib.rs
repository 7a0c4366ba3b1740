//! The preload shim: carries the TCP connections of the program that it is loaded into over rings.
//!
//! `table.rs` lists the functions that programs call in place of libc's, and `exports.rs` exports them; `calls` holds their
//! bodies, thin all, around what `rdsock_core` does; `process.rs` follows fork and exec, `children.rs` and `spawn.rs` other ways to
//! make a process; `host.rs` is the libc that the core lives beside. What it knows of its program is one structure (`program.rs`).
//! The shim leaves every call that it does not understand to libc.
//!
//! It is built without the standard library, and needs nothing of libc that an old or another libc lacks: it must not
//! keep any program from starting. `std` is another name of `core` here.

#![cfg_attr(not(test), no_std)]
// In unit tests nothing is exported, so that they run on libc's own functions.
#![cfg_attr(test, allow(dead_code))]

#[cfg(not(test))]
extern crate core as std;

use rdsock_core::{
    address, brand, clock, conn, deadline, demote, end, epoll, fds, hidden, identity, io, known,
    limits, lost, nap, numbers, poll, rest, signals, stream, sys, tcp_info, tenant, wait,
};

#[macro_use]
mod table;

mod between;
mod calls;
mod children;
mod exports;
mod handing_over;
mod host;
mod locked;
mod options;
#[cfg(not(test))]
mod panic;
mod plugins;
mod process;
mod program;
mod real;
mod spawn;
mod syscalls;
