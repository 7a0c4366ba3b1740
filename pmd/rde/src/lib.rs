//! Poll-mode driver of the device "rde" (`docs/device.md`).
//!
//! The counterpart is the device. It is not believed: what it writes into queues is read once and
//! checked against what the driver knows, and a device that says what cannot be is reported as
//! failed ([`DeviceFailed`]), with no panic and no further use. The data path reads no register.
//!
//! ```text
//! Space ──► Rde ──┬─► Management   node id, peers, reset: the kernel's side, where there is one
//! (rdsock-vfio)   ├─► Region       memory that other nodes may reach, by key
//!                 └─► QueueSet     one for each core that polls: post, ring, send, poll
//! ```
#![forbid(unsafe_code)]

mod completions;
mod error;
mod inbound;
mod management;
mod outstanding;
mod queue_set;
mod rde;
mod region;
pub mod spec;
mod start;
mod window;
mod work;

pub use completions::Completion;
pub use error::{DeviceFailed, NotPosted, OpenError};
pub use inbound::{Kind, Message};
pub use management::Management;
pub use queue_set::{QueueSet, Stats};
pub use rde::{Capabilities, Rde};
pub use region::{Region, Rights};
pub use start::Sizes;
pub use work::{Data, Notify, Operation, Remote, Work};
