//! The functions that stand in front of libc's. Each looks up its fd and, when that is not a
//! connection of ours, calls libc's function with what it was given.
//!
//! A function is exported by its C name, wherever it stands. Those named below are called from Rust
//! too: `syscall(2)` (`syscalls.rs`) and the checked names come down to them. `fcntl`, `ioctl` and
//! the options are in `options.rs`; fork and exec are in `process.rs`.

mod aio;
mod checked;
mod descriptors;
mod epoll;
mod files;
mod names;
mod poll;
mod read_write;
mod send_recv;
mod sockets;
mod stdio;
mod transfer;

pub use aio::{making_uring, submitting};
// Older calls, which only this architecture has as system calls.
#[cfg(target_arch = "x86_64")]
pub use descriptors::dup2;
pub use descriptors::{close, close_range, copied, dup, dup3};
#[cfg(target_arch = "x86_64")]
pub use epoll::{epoll_create, epoll_wait};
pub use epoll::{epoll_create1, epoll_ctl, epoll_pwait, epoll_pwait2};
pub use files::{sendfile, splice};
pub use names::{getpeername, getsockname, peer_name};
#[cfg(target_arch = "x86_64")]
pub use poll::select;
pub use poll::{poll, ppoll, pselect};
pub use read_write::{preadv2, pwritev2, read, readv, write, writev};
pub use send_recv::{recv, recvfrom, recvmmsg, recvmsg, sendmmsg, sendmsg, sendto};
pub use sockets::{accept, accept4, connect, listen, mark_is_behind_ring, shutdown, socket};
