//! The words of a plan: what is measured, how both ends wait, what carries the bytes.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What is measured.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Round trips of one message
    Rtt = 0,
    /// Small messages one way, one send call each, counted at the receiver
    Rate = 1,
    /// Bulk one way, counted at the receiver
    Bw = 2,
    /// Connections: connect, accept, close
    Cps = 3,
}

/// How both ends wait.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Wait {
    /// Blocking calls
    Block = 0,
    /// Non-blocking calls in a loop
    Spin = 1,
}

/// What carries the bytes in a comparison.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    /// Two threads bouncing a cache line
    FloorCacheline,
    /// A bare shared-memory ring between two processes
    FloorRing,
    /// Bare writes of the RDMA engine between two nodes, without sockets (needs rdsock-engine-perf)
    FloorEngine,
    /// Kernel TCP over 127.0.0.1
    TcpLoopback,
    /// Kernel TCP between two network namespaces (needs root)
    TcpVeth,
    /// UNIX stream sockets
    Unix,
    /// The same programs under rdsock; no spinning inside it where wait is block
    RdsockLocal,
    /// Blocking calls under rdsock with its default, adaptive spinning
    RdsockAdaptive,
    /// As rdsock-local, but server and client on two nodes: each has its own rdsockd with a model of the device
    RdsockNodes,
}

/// Writes the name that the flags use.
macro_rules! display_as_flag {
    ($($kind:ty),*) => {$(
        impl fmt::Display for $kind {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.pad(self.to_possible_value().expect("no value is skipped").get_name())
            }
        }
    )*};
}
display_as_flag!(Mode, Wait, Path);
