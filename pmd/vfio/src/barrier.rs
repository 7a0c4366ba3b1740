//! Memory barriers between driver and device, named by what they are for.
//!
//! Registers are mapped uncached, or belong to a model that takes a store as a release; host memory
//! is cached and coherent with DMA. So on x86-64 none of these is more than an order for the
//! compiler, but [`before_sleep`].

use std::sync::atomic::{Ordering, fence};

/// Between filling queue entries (and the memory that they name) and the store to a doorbell.
#[inline]
pub fn before_doorbell() {
    fence(Ordering::Release);
}

/// Between finding an entry's phase right and reading the rest of it, or the data that it tells of.
#[inline]
pub fn after_phase() {
    fence(Ordering::Acquire);
}

/// Between the last read of an entry and the store that gives it back to the device.
#[inline]
pub fn before_return() {
    fence(Ordering::Release);
}

/// Between the body of a message in a send window and the word that makes it valid.
#[inline]
pub fn before_message_header() {
    fence(Ordering::Release);
}

/// Between a request for an interrupt and the last look before sleeping.
#[inline]
pub fn before_sleep() {
    fence(Ordering::SeqCst);
}
