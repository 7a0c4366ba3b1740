//! The numbers of `docs/device.md`, by section. A test of the driver compares them with the document.

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

/// Contents of MAGIC.
pub const MAGIC: u64 = u64::from_le_bytes(*b"rdsockRD");
/// Contents of VERSION.
pub const VERSION: u32 = 1 << 16;
/// Features of the model: all.
pub const FEATURES: u64 = 0b111;
/// Offset of the region table in BAR0.
pub const REGION_TABLE: u64 = 0x10000;
/// Bytes of an entry of the region table.
pub const REGION_SIZE: u64 = 64;
/// Bytes of BAR0.
pub const BAR0_SIZE: u64 = 0x20000;
/// Bytes of a queue page.
pub const PAGE_SIZE: u64 = 4096;
/// Slots of the send window.
pub const WINDOW_SLOTS: u64 = 32;
/// log2 of the fewest entries of a queue.
pub const MIN_QUEUE: u32 = 6;
/// log2 of the most entries of a queue of the model.
pub const MAX_QUEUE: u32 = 16;
/// Greatest node id of the model.
pub const MAX_NODE: u32 = 1023;
/// Entries of the region table of the model.
pub const REGIONS: u32 = 1024;
/// Most bytes that a descriptor of the model moves.
pub const MAX_TRANSFER: u32 = 1 << 20;
/// Most items that wait in a lane of the model.
pub const LANE_DEPTH: u32 = 1024;
/// Most local pieces of one descriptor.
pub const MAX_PIECES: u32 = 8;
/// Most inline bytes of one descriptor.
pub const MAX_INLINE: u32 = 128;
/// Most slots of one descriptor.
pub const MAX_SLOTS: usize = 4;
/// Reset value of STALL_TIMEOUT, microseconds.
pub const STALL_TIMEOUT: u32 = 1_000_000;
