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

/// The counters that the driver's own accesses move, outside the fabric's lock.
#[derive(Debug, Default)]
pub(crate) struct Accesses {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub doorbells: AtomicU64,
    pub heads: AtomicU64,
}

impl Accesses {
    pub fn add_to(&self, counters: Counters) -> Counters {
        Counters {
            register_reads: self.reads.load(Relaxed),
            register_writes: self.writes.load(Relaxed),
            doorbells: self.doorbells.load(Relaxed),
            head_updates: self.heads.load(Relaxed),
            ..counters
        }
    }
}
