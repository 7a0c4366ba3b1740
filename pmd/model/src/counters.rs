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

/// What one side of a function counts: the side that executes its own work, and the one that the work of other
/// nodes counts in, which lies in its [port](crate::port). Fields as in [`Counters`].
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Tally {
    pub descriptors: Count,
    pub descriptor_reads: Count,
    pub payload_reads: Count,
    pub payload_writes: Count,
    pub bytes_read: Count,
    pub bytes_written: Count,
    pub words: Count,
    pub completions: Count,
    pub status_writes: Count,
    pub window_messages: Count,
    pub messages_out: Count,
    pub messages_in: Count,
    pub notifications_in: Count,
    pub refused_here: Count,
    pub refused_there: Count,
    pub dma_faults: Count,
    pub held: Count,
    pub lanes_failed: Count,
    pub sets_failed: Count,
    pub interrupts: Count,
    pub resets: Count,
}

/// What the driver's own accesses count, outside the fabric's lock. One for BAR0 and one for each queue page.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Accesses {
    pub reads: Count,
    pub writes: Count,
    pub doorbells: Count,
    pub heads: Count,
}

/// A number that one thread at a time counts up, so a plain load and store will do, where an atomic addition
/// would cost more than what is counted. (If two do, some counts are lost.)
#[derive(Debug, Default)]
#[repr(transparent)]
pub(crate) struct Count(AtomicU64);

impl Count {
    #[inline]
    pub fn add(&self, by: u64) {
        self.0.store(self.get().wrapping_add(by), Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl Accesses {
    pub fn add_to(&self, counters: &mut Counters) {
        counters.register_reads += self.reads.get();
        counters.register_writes += self.writes.get();
        counters.doorbells += self.doorbells.get();
        counters.head_updates += self.heads.get();
    }
}

impl Tally {
    /// Adds both sides of a function to what its accesses were.
    pub fn sum(&self, other: &Tally) -> Counters {
        let sum = |a: &Count, b: &Count| a.get().wrapping_add(b.get());
        Counters {
            descriptors: sum(&self.descriptors, &other.descriptors),
            descriptor_reads: sum(&self.descriptor_reads, &other.descriptor_reads),
            payload_reads: sum(&self.payload_reads, &other.payload_reads),
            payload_writes: sum(&self.payload_writes, &other.payload_writes),
            bytes_read: sum(&self.bytes_read, &other.bytes_read),
            bytes_written: sum(&self.bytes_written, &other.bytes_written),
            words: sum(&self.words, &other.words),
            completions: sum(&self.completions, &other.completions),
            status_writes: sum(&self.status_writes, &other.status_writes),
            window_messages: sum(&self.window_messages, &other.window_messages),
            messages_out: sum(&self.messages_out, &other.messages_out),
            messages_in: sum(&self.messages_in, &other.messages_in),
            notifications_in: sum(&self.notifications_in, &other.notifications_in),
            refused_here: sum(&self.refused_here, &other.refused_here),
            refused_there: sum(&self.refused_there, &other.refused_there),
            dma_faults: sum(&self.dma_faults, &other.dma_faults),
            held: sum(&self.held, &other.held),
            lanes_failed: sum(&self.lanes_failed, &other.lanes_failed),
            sets_failed: sum(&self.sets_failed, &other.sets_failed),
            interrupts: sum(&self.interrupts, &other.interrupts),
            resets: sum(&self.resets, &other.resets),
            ..Counters::default()
        }
    }
}
