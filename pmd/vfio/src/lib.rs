//! How a driver reaches a device: DMA memory, registers, interrupts, over a bus.
//!
//! The counterpart is the kernel and its IOMMU, or a model that stands for them. All `unsafe` that
//! drives hardware lives in this crate, so that a driver on top of it can forbid it. No knowledge of
//! any particular device.
//!
//! A driver takes a [`Device`] from a bus ([`vfio`], [`user`] or [`model`]), makes a [`Space`] of it, allocates memory there that the device
//! can reach, and takes the [`Registers`] of a region. What it holds is
//! - [`Words`]: queues and other structures of 64-bit words that device and driver share;
//! - [`Shared`]: bytes that others may write at any time, only ever copied;
//! - [`Window`]: addresses that other nodes may reach, in which memory comes and goes;
//! - [`Buffer`]: bytes that belong to the CPU, or, lent to the device as [`InFlight`], to nobody else.
//!
//! None of them ever gives a Rust reference to memory that a device can write.

pub mod barrier;
mod capabilities;
mod device;
mod dma;
mod fire;
mod iova;
pub mod link;
mod mapped;
pub mod model;
mod sealed;
pub mod serve;
mod translation;
pub mod user;
pub mod vfio;
mod views;

pub use device::{Access, BusError, Device, RegionInfo, Registers};
pub use dma::{DmaMemory, HUGE_PAGE, Space, Window};
pub use iova::Iovas;
pub use nix::sys::eventfd::{EfdFlags as EventFlags, EventFd};
pub use views::{Buffer, InFlight, Piece, Shared, Words};
