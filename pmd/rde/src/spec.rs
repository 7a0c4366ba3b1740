//! The numbers of `docs/device.md`, by section, and the types of what the device writes.
//!
//! Values that the device writes are open newtypes: one that is not in the data sheet is data, not undefined
//! behaviour. `tests/data_sheet.rs` compares the tables with the document.

use std::fmt;

/// A module of constants of one type, and the table of them for the comparison with the document.
macro_rules! section {
    ($(#[$doc:meta])* $module:ident: $type:ty, $section:literal; $($name:ident = $value:expr,)*) => {
        $(#[$doc])*
        #[allow(missing_docs)]
        pub mod $module {
            $(pub const $name: $type = $value;)*
            /// Section, names and values.
            pub const TABLE: (&str, &[(&str, u64)]) =
                ($section, &[$((stringify!($name), $name as u64)),*]);
        }
    };
}

section! {
    /// Registers of the management page, offsets in BAR0.
    management: u64, "3";
    MAGIC = 0x000, VERSION = 0x008, FEATURES = 0x010, QUEUE_SETS = 0x018, MAX_NODE = 0x01c,
    REGIONS = 0x020, MAX_QUEUE = 0x024, MAX_TRANSFER = 0x028, LANE_DEPTH = 0x02c,
    MAX_PIECES = 0x030, MAX_INLINE = 0x034, KEPT = 0x038, NODE_ID = 0x040, STATUS = 0x044,
    CONTROL = 0x048, STALL_TIMEOUT = 0x04c, GENERATION = 0x050, PEERS = 0x100, COUNTERS = 0x200,
}
section! {
    /// Bits of FEATURES.
    feature: u32, "3.1";
    READ = 0, INLINE = 1, STORE_WORD = 2,
}
section! {
    /// Bits of STATUS and CONTROL.
    state: u32, "3.2";
    READY = 0, LINK_UP = 1, FAILED = 2, RESET = 0, FABRIC = 1,
}
section! {
    /// Words of COUNTERS.
    counter: usize, "3.3";
    DESCRIPTORS = 0, MESSAGES_OUT = 1, MESSAGES_IN = 2, BYTES_OUT = 3, BYTES_IN = 4,
    REFUSED_HERE = 5, REFUSED_THERE = 6, DMA_FAULTS = 7, HELD = 8, LANES_FAILED = 9,
}
section! {
    /// Fields of an entry of the region table.
    region: u64, "4";
    REGION_CONTROL = 0x00, REGION_TAG = 0x04, REGION_ADDR = 0x08, REGION_LENGTH = 0x10,
    REGION_SOURCE = 0x18,
}
section! {
    /// Registers of a queue page.
    page: u64, "5.1";
    ENABLE = 0x000, SET_STATE = 0x004, SIZES = 0x008, FAULT = 0x00c, WQ_ADDR = 0x010,
    CQ_ADDR = 0x018, MQ_ADDR = 0x020, STATUS_ADDR = 0x028, WQ_TAIL = 0x080, CQ_HEAD = 0x0c0,
    MQ_HEAD = 0x100, ARM = 0x140, DEVICE_STATUS = 0x180, WINDOW = 0x800,
}
section! {
    /// Fields, opcodes and flags of a work descriptor.
    work: u8, "5.2";
    OPCODE = 0, FLAGS = 1, TARGET = 2, SLOTS = 4, PIECES = 5, NOTIFY_UNITS = 6, INLINE_BYTES = 7,
    KEY = 8, LENGTH = 12, OFFSET = 16, TARGET_SET = 24, COOKIE = 28,
    WRITE = 1, WRITE_NOTIFY = 2, READ = 3, FLUSH = 4, RESUME = 5,
    COMPLETE = 0, INLINE = 1, STORE_WORD = 2,
}
section! {
    /// Statuses of a completion.
    status: u8, "5.3";
    OK = 0, BAD_DESCRIPTOR = 1, LOCAL_ACCESS = 2, BAD_TARGET = 3, REFUSED_KEY = 4,
    REFUSED_RIGHTS = 5, REFUSED_SOURCE = 6, REFUSED_BOUNDS = 7, TARGET_ACCESS = 8, NO_QUEUE = 9,
    UNREACHABLE = 10, STALLED = 11, FLUSHED = 12,
}
section! {
    /// Why a queue set failed.
    fault: u32, "5.4";
    BAD_SETUP = 1, BAD_DOORBELL = 2, BAD_HEAD = 3, BAD_FRAMING = 4, DMA_FAULT = 5,
}
section! {
    /// Offsets in the status block.
    block: u64, "5.7";
    STATE = 0x00, WQ_FETCHED = 0x08, WINDOW_TAKEN = 0x10,
}

/// All tables.
pub const TABLES: &[(&str, &[(&str, u64)])] = &[
    management::TABLE,
    feature::TABLE,
    state::TABLE,
    counter::TABLE,
    region::TABLE,
    page::TABLE,
    work::TABLE,
    status::TABLE,
    fault::TABLE,
    block::TABLE,
];

/// Contents of MAGIC (3).
pub const MAGIC: u64 = u64::from_le_bytes(*b"rdsockRD");
/// Major version that the driver knows (3).
pub const MAJOR: u32 = 1;
/// Offset of the region table in BAR0 (4).
pub const REGION_TABLE: u64 = 0x10000;
/// Bytes of an entry of the region table (4).
pub const REGION_SIZE: u64 = 64;
/// Bits of REGION_CONTROL (4).
pub const REGION_VALID: u32 = 1;
/// Bytes of a queue page (5.1).
pub const PAGE_SIZE: u64 = 4096;
/// Slots of the send window (5.5).
pub const WINDOW_SLOTS: u64 = 32;
/// log2 of the fewest entries of a queue (5.1).
pub const MIN_QUEUE: u8 = 6;
/// Bytes of a message's payload (5.5, 5.6).
pub const PAYLOAD: usize = 48;
/// Most slots of one descriptor (5.2).
pub const MAX_SLOTS: usize = 4;
/// Words of a work queue slot (5.2) and of a message (5.6).
pub const SLOT_WORDS: usize = 8;
/// Values of SET_STATE (5.1).
pub const SET_STOPPED: u32 = 0;
/// See [`SET_STOPPED`].
pub const SET_RUNNING: u32 = 1;
/// What a device that is gone reads (9).
pub const GONE: u32 = u32::MAX;

/// Names remote memory (4): number of the entry in bits 15:0, tag in 31:16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key(pub u32);

/// Register STATUS (3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceStatus(pub u32);

impl DeviceStatus {
    /// The device does not answer.
    pub fn is_gone(self) -> bool {
        self.0 == GONE
    }

    /// The device has stopped.
    pub fn has_failed(self) -> bool {
        self.0 & 1 << state::FAILED != 0
    }

    /// The fabric reaches this node.
    pub fn link_up(self) -> bool {
        !self.is_gone() && self.0 & 1 << state::LINK_UP != 0
    }
}

/// Status of a completion (5.3).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(pub u8);

impl Status {
    /// It is done.
    pub const OK: Status = Status(status::OK);

    /// Whether it is done.
    pub fn is_ok(self) -> bool {
        self == Status::OK
    }

    /// Whether the lane has failed, and needs a RESUME (7.3).
    pub fn lane_failed(self) -> bool {
        matches!(
            self.0,
            status::NO_QUEUE | status::UNREACHABLE | status::STALLED | status::FLUSHED
        )
    }

    /// Whether the data sheet has it.
    pub fn is_known(self) -> bool {
        self.name().is_some()
    }

    fn name(self) -> Option<&'static str> {
        let known = status::TABLE
            .1
            .iter()
            .find(|row| row.1 == u64::from(self.0))?;
        Some(known.0)
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "Status({})", self.0),
        }
    }
}

/// Word 0 of a completion (5.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompletionHead(pub u64);

impl CompletionHead {
    /// Bytes moved.
    pub fn length(self) -> u32 {
        self.0 as u32
    }
    /// Node id.
    pub fn target(self) -> u16 {
        (self.0 >> 32) as u16
    }
    /// Status.
    pub fn status(self) -> Status {
        Status((self.0 >> 48) as u8)
    }
    /// The descriptor's opcode, 0 for a window message.
    pub fn opcode(self) -> u8 {
        (self.0 >> 56) as u8 & 0x7f
    }
    /// Phase bit.
    pub fn phase(self) -> bool {
        self.0 >> 63 != 0
    }
}

/// Word 1 of a completion (5.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompletionTail(pub u64);

impl CompletionTail {
    /// The descriptor's cookie.
    pub fn cookie(self) -> u32 {
        self.0 as u32
    }
    /// Free-running index of the descriptor's first slot; of a window message, its sequence.
    pub fn index(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// Word 0 of an inbound message (5.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageHead(pub u64);

impl MessageHead {
    /// Node id of the source.
    pub fn source(self) -> u16 {
        self.0 as u16
    }
    /// Queue set of the source.
    pub fn source_set(self) -> u16 {
        (self.0 >> 16) as u16
    }
    /// 1: from a send window, 2: notification.
    pub fn kind(self) -> u8 {
        (self.0 >> 32) as u8
    }
    /// Phase bit.
    pub fn phase(self) -> bool {
        self.0 >> 63 != 0
    }
}

/// Word 1 of an inbound message (5.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageTail(pub u64);

impl MessageTail {
    /// Bytes that the notification's write moved.
    pub fn length(self) -> u32 {
        self.0 as u32
    }
    /// Free-running index of the entry.
    pub fn index(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// Word STATE of a status block (5.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetStatus(pub u64);

impl SetStatus {
    /// The fabric reaches this node.
    pub fn link_up(self) -> bool {
        self.0 & 1 != 0
    }
    /// The queue set has failed.
    pub fn has_failed(self) -> bool {
        self.0 & 2 != 0
    }
    /// Low half of GENERATION.
    pub fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}
