//! Starting and stopping a queue set (`docs/device.md`, 5.1). The only place that waits for the device
//! by reading registers.

use crate::error::{DeviceFailed, OpenError};
use crate::spec::*;
use rdsock_vfio::{DmaMemory, Registers, Space, Words};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a device gets to start or stop a queue set, or to reset.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

/// Entries of the queues of a queue set, as powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// log2 of the slots of the work queue.
    pub work: u8,
    /// log2 of the entries of the completion queue: as many operations can be outstanding.
    pub completions: u8,
    /// log2 of the entries of the message queue.
    pub messages: u8,
}

impl Default for Sizes {
    fn default() -> Self {
        Sizes {
            work: 9,
            completions: 9,
            messages: 10,
        }
    }
}

/// The host memory of a queue set.
#[derive(Debug)]
pub(crate) struct Memory {
    pub work: Words,
    pub completions: Words,
    pub messages: Words,
    pub status: Words,
}

impl Memory {
    pub fn allocate(space: &Space, sizes: Sizes) -> Result<Self, OpenError> {
        let bytes = [
            64 << sizes.work,
            16 << sizes.completions,
            64 << sizes.messages,
            64,
        ];
        let memory: Arc<DmaMemory> = Arc::new(space.allocate(bytes.iter().sum())?);
        let mut at = 0;
        let mut next = |len: usize| {
            let words = Words::new(&memory, at, len / 8);
            at += len;
            words.ok_or(OpenError::Impossible("allocation"))
        };
        Ok(Memory {
            work: next(bytes[0])?,
            completions: next(bytes[1])?,
            messages: next(bytes[2])?,
            status: next(bytes[3])?,
        })
    }
}

/// Starts the queue set with zeroed memory.
pub(crate) fn start(
    pages: &dyn Registers,
    set: u32,
    sizes: Sizes,
    memory: &Memory,
) -> Result<(), OpenError> {
    stop(pages, set)?;
    let at = u64::from(set) * PAGE_SIZE;
    for register in [page::WQ_TAIL, page::CQ_HEAD, page::MQ_HEAD, page::ARM] {
        pages.write32(at + register, 0);
    }
    for slot in 0..WINDOW_SLOTS {
        pages.write64(at + page::WINDOW + slot * 64, 0);
        pages.write64(at + page::WINDOW + slot * 64 + 8, 0);
    }
    let sizes =
        u32::from(sizes.work) | u32::from(sizes.completions) << 8 | u32::from(sizes.messages) << 16;
    pages.write32(at + page::SIZES, sizes);
    pages.write64(at + page::WQ_ADDR, memory.work.iova());
    pages.write64(at + page::CQ_ADDR, memory.completions.iova());
    pages.write64(at + page::MQ_ADDR, memory.messages.iova());
    pages.write64(at + page::STATUS_ADDR, memory.status.iova());
    pages.write32(at + page::ENABLE, 1);
    let what = "start a queue set";
    let state = wait(
        what,
        || pages.read32(at + page::SET_STATE),
        |state| state != SET_STOPPED,
    )?;
    if state != SET_RUNNING {
        let fault = pages.read32(at + page::FAULT);
        return Err(DeviceFailed::SetFailed { set, fault }.into());
    }
    Ok(())
}

/// Stops the queue set: when this has returned, the device does not touch its memory.
pub(crate) fn stop(pages: &dyn Registers, set: u32) -> Result<(), OpenError> {
    let at = u64::from(set) * PAGE_SIZE;
    pages.write32(at + page::ENABLE, 0);
    let read = || pages.read32(at + page::SET_STATE);
    wait("stop a queue set", read, |state| state == SET_STOPPED).map(|_| ())
}

/// Reads a register until it is as wanted.
pub(crate) fn wait(
    what: &'static str,
    read: impl Fn() -> u32,
    wanted: impl Fn(u32) -> bool,
) -> Result<u32, OpenError> {
    let start = Instant::now();
    loop {
        let value = read();
        if value == GONE {
            return Err(DeviceFailed::Gone.into());
        }
        if wanted(value) {
            return Ok(value);
        }
        if start.elapsed() > PATIENCE {
            return Err(OpenError::Timeout(what));
        }
        std::thread::yield_now();
    }
}
