//! What the model has done, counted, so that the cost of a message is counted and not timed.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Actions of one function since it was made. Resets do not clear them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Loads of any register by the driver.
    pub register_reads: u64,
    /// Stores to any register by the driver; a window message counts 8.
    pub register_writes: u64,
    /// Stores to WQ_TAIL.
    pub doorbells: u64,
    /// Stores to CQ_HEAD and MQ_HEAD.
    pub head_updates: u64,
    /// Work descriptors taken.
    pub descriptors: u64,
    /// DMA reads of the work queue.
    pub descriptor_reads: u64,
    /// DMA reads of payload: one for each local piece, or remote region of a READ.
    pub payload_reads: u64,
    /// DMA writes of payload: one for each write into this node's memory.
    pub payload_writes: u64,
    /// Payload bytes read from this node's memory.
    pub bytes_read: u64,
    /// Payload bytes written into this node's memory.
    pub bytes_written: u64,
    /// Words stored after the data of a write.
    pub words: u64,
    /// Completions written.
    pub completions: u64,
    /// Words written into status blocks.
    pub status_writes: u64,
    /// Messages taken from send windows.
    pub window_messages: u64,
    /// Messages and notifications that this node's device has delivered elsewhere.
    pub messages_out: u64,
    /// Messages from send windows put into this node's queues.
    pub messages_in: u64,
    /// Notifications put into this node's queues.
    pub notifications_in: u64,
    /// Operations of other nodes that this node refused.
    pub refused_here: u64,
    /// Operations of this node that others refused.
    pub refused_there: u64,
    /// Accesses to host memory that failed.
    pub dma_faults: u64,
    /// Times that a lane began to wait for a full message queue.
    pub held: u64,
    /// Lanes that failed.
    pub lanes_failed: u64,
    /// Queue sets that failed.
    pub sets_failed: u64,
    /// Interrupts sent.
    pub interrupts: u64,
    /// Resets.
    pub resets: u64,
}

/// What the driver's own accesses count, outside the fabric's lock. One for BAR0 and one for each queue page:
/// a page has one user, so a plain load and store will do, where an atomic addition would cost more than the
/// access itself.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Accesses {
    pub reads: Count,
    pub writes: Count,
    pub doorbells: Count,
    pub heads: Count,
}

/// A number that one thread at a time counts up. (If two do, some counts are lost.)
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    #[inline]
    pub fn add(&self) {
        self.0.store(self.0.load(Relaxed) + 1, Relaxed);
    }
}

impl Accesses {
    pub fn add_to(&self, counters: &mut Counters) {
        counters.register_reads += self.reads.0.load(Relaxed);
        counters.register_writes += self.writes.0.load(Relaxed);
        counters.doorbells += self.doorbells.0.load(Relaxed);
        counters.head_updates += self.heads.0.load(Relaxed);
    }
}
