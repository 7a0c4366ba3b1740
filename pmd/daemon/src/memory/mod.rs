//! Memory that the daemon shares: it makes the streams' memory, and maps the head of a tenant's.
//!
//! The only module of the daemon that maps memory. Whatever a tenant can write is reached
//! through atomics, or read through the file, never through plain references.

mod sealed;
mod stream;
mod tenant;
mod whole;

pub use stream::{
    DirectionView, HUGE_PAGE, HugePages, StreamFds, make_stream, make_stream_with, rounded,
};
pub use tenant::{BadMemory, Bells, ConnView, Numbered, Records, TenantMap};
pub use whole::can_be_whole;

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
