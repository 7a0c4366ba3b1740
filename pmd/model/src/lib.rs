//! Model of the device "rde" (`docs/device.md`), for any number of nodes wired to each other.
//!
//! The counterpart of this crate is a driver: whatever it writes into registers and queues is
//! checked as the data sheet says, and never makes the model panic. The model does no I/O and has no
//! clock: host memory is reached through [`Dma`], interrupts leave through a callback, and time comes
//! in with [`Fabric::step`]. So the same code is stepped by a test, one deterministic step after the
//! other, and run in real time by a thread ([`Running`]).
//!
//! The models of a fabric can be spread over processes ([`Wire`]): each runs its own, and works on the others' memory
//! directly.
//!
//! It is written from the data sheet and shares no code with the driver, so that one of them finds
//! the other's mistakes.
#![forbid(unsafe_code)]

mod counters;
mod descriptor;
mod dma;
mod engine;
mod execute;
mod fabric;
mod faults;
mod footprint;
mod host;
mod management;
mod page;
mod port;
mod protection;
mod queue_set;
mod running;
pub mod sheet;
mod wire;

pub use counters::Counters;
pub use dma::{Dma, DmaFault};
pub use fabric::{Bar, Fabric, Function, Interrupt};
pub use faults::{Chaos, Corruption, Fault};
pub use footprint::Footprint;
pub use page::Page;
pub use port::{Port, PortMemory};
pub use running::Running;
pub use wire::{Peers, Wire};
