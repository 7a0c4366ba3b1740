//! Memory that the daemon shares: it makes the streams' memory and the tenants', and maps the latter.
//!
//! The only module of the daemon that maps memory, and nothing but what the daemon has made itself. Whatever a tenant can write
//! is reached through atomics, or read through the file, never through plain references.

mod kept;
mod made;
mod stream;
mod tenant;
mod whole;

pub use kept::{Kept, pipes_for};
pub use stream::{
    DirectionView, HUGE_PAGE, HugePages, StreamFds, make_stream, make_stream_with, rounded,
};
pub use tenant::{BadBoard, Bells, ConnView, Numbered, Records, TenantMap};
pub use whole::can_be_whole;

use rdsock_shm::layout::VERSION;

/// How shared memory that is no stream begins.
fn identity(magic: u64, size: usize) -> Vec<u8> {
    let mut start = Vec::from(magic.to_ne_bytes());
    start.extend(VERSION.to_ne_bytes());
    start.extend((size as u32).to_ne_bytes());
    start
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|word| word.try_into().ok())
        .map_or(0, u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|word| word.try_into().ok())
        .map_or(0, u64::from_ne_bytes)
}
