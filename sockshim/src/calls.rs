//! The functions that stand in front of libc's. Each looks up its fd and, when that is not a
//! connection of ours, calls libc's function with what it was given.
//!
//! Each has a row in the table (`table.rs`), which exports it. `fcntl`, `ioctl` and
//! the options are in `options.rs`; fork and exec are in `process.rs`.

pub mod aio;
pub mod checked;
pub mod descriptors;
pub mod epoll;
pub mod files;
pub mod names;
pub mod poll;
pub mod read_write;
pub mod send_recv;
pub mod sockets;
pub mod stdio;
mod transfer;

pub use descriptors::{close, copied};
pub use names::peer_name;
pub use poll::{poll, ppoll};
pub use read_write::read;
pub use send_recv::{recv, recvfrom};
pub use sockets::mark_is_behind_ring;
