//! The preload shim: carries the TCP connections of the program that it is loaded into over rings.
//!
//! `table.rs` lists the functions that programs call in place of libc's, and `exports.rs` exports them; `calls` holds their
//! bodies, thin all; `io`, `poll.rs` and `epoll` do what they do on a stream, with the steps of `rdsock_shm::end`, which
//! `end.rs` ties to the kernel; `wait.rs` sleeps and wakes, `signals.rs` lets signals end a sleep as they end the kernel's;
//! `demote.rs` goes back to the kernel, `rest.rs` waits while what the other end left goes there before; `tenant` talks to the daemon; `process.rs` follows fork and exec, `children.rs` and
//! `spawn.rs` other ways to make a process; `limits.rs` has the thresholds. What it knows of its process is one structure (`state.rs`). The shim never panics, never allocates from the
//! heap, never takes a lock that it would hold while it sleeps, and leaves every call that it does
//! not understand to libc.
//!
//! It is built without the standard library, and needs nothing of libc that an old or another libc lacks: it must not
//! keep any program from starting. `std` is another name of `core` here.

#![cfg_attr(not(test), no_std)]
// In unit tests nothing is exported, so that they run on libc's own functions.
#![cfg_attr(test, allow(dead_code))]

#[cfg(not(test))]
extern crate core as std;

#[macro_use]
mod table;

mod address;
mod between;
mod calls;
mod children;
mod clock;
mod conn;
mod demote;
mod end;
mod epoll;
mod exports;
mod fds;
mod handing_over;
mod hidden;
mod host;
mod identity;
mod io;
mod known;
mod limits;
mod locked;
mod names;
mod numbers;
mod options;
#[cfg(not(test))]
mod panic;
mod plugins;
mod poll;
mod process;
mod program;
mod ready;
mod real;
mod rest;
mod signals;
mod spawn;
mod state;
mod stream;
mod sys;
mod syscalls;
mod tenant;
mod wait;
