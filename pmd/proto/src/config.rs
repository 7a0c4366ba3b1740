//! Limits and times of a node. All memory is taken from these once, in `Node::new`.

/// Nanoseconds of a millisecond.
const MS: u64 = 1_000_000;

/// Limits and times. Times are in nanoseconds, sizes in bytes.
#[derive(Clone, Debug)]
pub struct Config {
    /// Nodes of the fabric; ids are below this.
    pub nodes: u16,
    /// Streams in the table, of all nodes.
    pub streams: u32,
    /// Streams that one node may have opened here.
    pub streams_from_node: u32,
    /// Connects of one node that may stand unanswered.
    pub pending: u32,
    /// Descriptors and messages to one node that may be in flight. At least 4.
    pub window: u32,
    /// Most bytes of a stream that are posted before the next stream's turn, and of a descriptor.
    pub quantum: u64,
    /// Bytes from which a descriptor is posted whatever else is in flight.
    pub bulk: u64,
    /// Writes of a stream in flight at which fewer bytes than `bulk` wait for a completion.
    pub small_writes: u32,
    /// Without an answer to a connect in this time, the connection stays on kernel TCP.
    pub connect_timeout: u64,
    /// Between two HELLOs while the session is not up.
    pub hello_interval: u64,
    /// An idle session sends ALIVE after this time.
    pub keep_alive: u64,
    /// A session that has heard nothing for this long is lost.
    pub silence: u64,
    /// Streams of a lost session that is not back in this time end.
    pub resume_timeout: u64,
}

impl Config {
    /// The defaults, for a fabric of `nodes` nodes.
    pub fn new(nodes: u16) -> Self {
        Config {
            nodes,
            streams: 16384,
            streams_from_node: 4096,
            pending: 1024,
            window: 128,
            quantum: 64 << 10,
            bulk: 16 << 10,
            small_writes: 2,
            connect_timeout: MS,
            hello_interval: 10 * MS,
            keep_alive: 100 * MS,
            silence: 500 * MS,
            resume_timeout: 30_000 * MS,
        }
    }
}
