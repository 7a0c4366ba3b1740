//! What can go wrong, in three families: not now, the device lies, and local faults.

use crate::spec::Status;
use rdsock_vfio::BusError;

/// Why something was not posted or sent. Nothing has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotPosted {
    /// The queue, the window, or the room for completions is full: ring, poll, and try again.
    #[error("the queue is full")]
    Full,
    /// As much as a lane holds is on its way to this target: others can go on.
    #[error("too much is on its way to this target")]
    TargetFull,
    /// It exceeds what the device can do.
    #[error("the device cannot do this: {0}")]
    Invalid(&'static str),
    /// The device has failed.
    #[error(transparent)]
    Failed(#[from] DeviceFailed),
}

/// The device did what cannot be, or has gone. The queue set is not used any more: everything that was on its
/// way counts as lost, and the device needs a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceFailed {
    /// Registers read all ones.
    #[error("the device is gone (its registers read all ones)")]
    Gone,
    /// STATUS says so.
    #[error("the device reports that it has failed")]
    Stopped,
    /// The queue set has failed (5.4).
    #[error("the device stopped queue set {set} (fault {fault})")]
    SetFailed {
        /// The set's number.
        set: u32,
        /// Register FAULT.
        fault: u32,
    },
    /// The device was reset behind our back.
    #[error("the device was reset while in use")]
    Reset,
    /// The system wants it back.
    #[error("the system wants the device back")]
    WantedBack,
    /// Nothing completes any more.
    #[error("the device completes nothing any more")]
    Stuck,
    /// It says that what it was given was wrong. This driver gives it nothing that is.
    #[error("the device finds fault with this node's own memory or descriptors ({0:?})")]
    Denies(Status),
    /// A completion of nothing that was posted.
    #[error("a completion came for nothing that was posted (cookie {cookie:#x}, index {index})")]
    ForNothing {
        /// As in the entry.
        cookie: u32,
        /// As in the entry.
        index: u32,
    },
    /// A completion that contradicts its descriptor, or comes out of order.
    #[error("a completion contradicts what was posted (cookie {cookie:#x})")]
    Contradiction {
        /// As in the entry.
        cookie: u32,
    },
    /// An entry with an old phase before one with a new one.
    #[error("an entry of the {queue} queue has the wrong phase")]
    WrongPhase {
        /// "completion" or "message".
        queue: &'static str,
    },
    /// An inbound message with an index, source or kind that cannot be.
    #[error("an inbound message cannot be (index {index}, expected {expected})")]
    BadMessage {
        /// As in the entry.
        index: u32,
        /// Where it lies.
        expected: u32,
    },
    /// A position in the status block that cannot be.
    #[error("the device's position {position} is beyond ours, {ours}")]
    BadPosition {
        /// As in the status block.
        position: u64,
        /// What was posted or sent.
        ours: u64,
    },
}

/// Why a device or a queue set could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The device.
    #[error(transparent)]
    Failed(#[from] DeviceFailed),
    /// Not a device of this kind.
    #[error("not an rde device: its first register is {0:#x}")]
    NotRde(u64),
    /// Another major version.
    #[error("the device has version {0}, this driver knows version 1")]
    Version(u32),
    /// A limit that the data sheet does not allow.
    #[error("the device reports an impossible {0}")]
    Impossible(&'static str),
    /// No such queue set.
    #[error("the device has no queue set {0}")]
    NoQueueSet(u32),
    /// The queue set is in use.
    #[error("queue set {0} is in use")]
    Busy(u32),
    /// Sizes outside what the device can do.
    #[error("queues must have 2^6 to 2^{0} entries")]
    Sizes(u8),
    /// All entries of the region table are in use.
    #[error("the device has no free entry for a region")]
    NoRegion,
    /// The memory to be registered is not aligned to 8 bytes.
    #[error("a region must start at a multiple of 8")]
    Alignment,
    /// The kernel module keeps the management page (3.4).
    #[error("the kernel module keeps the management page: reset the device through the bus")]
    Kept,
    /// The device did not do in a second what it was asked to.
    #[error("the device did not {0} within a second")]
    Timeout(&'static str),
}
