//! The flags, as they are given.

use clap::{Parser, ValueEnum};

/// Latency of the RDMA engine and the mailbox between two nodes whose devices are models.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Flags {
    /// What to measure; all when none is named
    #[arg(value_enum)]
    pub tests: Vec<Test>,
    /// Bytes that each operation moves (a mailbox message always has 48)
    #[arg(long, default_value_t = 64)]
    pub size: u32,
    /// Operations that are measured
    #[arg(long, default_value_t = 100_000)]
    pub count: u64,
    /// Measure for so many seconds instead of --count operations
    #[arg(long)]
    pub seconds: Option<f64>,
    /// Operations before that, which are not
    #[arg(long, default_value_t = 1_000)]
    pub warmup: u64,
    /// Who runs the devices
    #[arg(long, value_enum, default_value_t = Devices::Thread)]
    pub devices: Devices,
    /// Core of the driver's thread
    #[arg(long)]
    pub core: Option<usize>,
    /// Core of the devices' thread, or of the other process
    #[arg(long)]
    pub device_core: Option<usize>,
    /// Be the far end of the process that measures, which gives the directory where both meet
    #[arg(long, hide = true)]
    pub far: Option<std::path::PathBuf>,
    /// Print one JSON object for each test
    #[arg(long)]
    pub json: bool,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Test {
    /// A write, until its completion
    Write,
    /// A write with notification to the other node and one back, halved
    WriteNotify,
    /// A mailbox message to the other node and one back, halved
    Mailbox,
    /// Writes one after the other, some always under way: an operation is what one of them took
    WriteBw,
}

/// Where the devices run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Devices {
    /// A thread of their own, that spins
    Thread,
    /// The driver's thread, in turns with it: no core talks to another
    Inline,
    /// Each its own node's thread, in turns with it, in two processes
    Linked,
}
