//! The atomics of this crate, in one place, so that loom can stand in for them (`--cfg loom`).

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering, fence};

/// loom takes sequentially consistent loads and stores for acquire and release ones. Where the order of two of them is
/// relied on, this puts the fence there that the processor has in any case. Nothing outside of loom.
#[inline(always)]
pub(crate) fn model_fence() {
    #[cfg(loom)]
    fence(Ordering::SeqCst);
}
