//! A queue page: memory-like registers (`docs/device.md`, 5.1) that the driver stores to while
//! the model looks at them.

use crate::sheet::{PAGE_SIZE, page};
use std::sync::atomic::{AtomicU64, Ordering};

const WORDS: usize = PAGE_SIZE as usize / 8;

/// The words of one queue page. Aligned, so that a register's line is the one that the data sheet means. Any
/// contents are valid.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Page {
    words: [AtomicU64; WORDS],
}

const _: () = assert!(size_of::<Page>() == PAGE_SIZE as usize);

impl Page {
    pub(crate) fn new() -> Self {
        Page {
            words: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// Gives every word the value.
    pub(crate) fn fill(&self, value: u64) {
        for word in &self.words {
            word.store(value, Ordering::Release);
        }
    }

    /// The 64-bit word at a multiple of 8 below the page's size.
    #[inline]
    pub(crate) fn load64(&self, offset: u64) -> u64 {
        self.words[offset as usize / 8].load(Ordering::Acquire)
    }

    /// The 32-bit register at a multiple of 4 below the page's size.
    #[inline]
    pub(crate) fn load32(&self, offset: u64) -> u32 {
        (self.load64(offset) >> shift(offset)) as u32
    }

    #[inline]
    pub(crate) fn store64(&self, offset: u64, value: u64) {
        self.words[offset as usize / 8].store(value, Ordering::Release);
    }

    /// The registers that are stored to while data move have a word of their own.
    #[inline]
    pub(crate) fn store32(&self, offset: u64, value: u32) {
        if matches!(
            offset,
            page::WQ_TAIL | page::CQ_HEAD | page::MQ_HEAD | page::ARM
        ) {
            return self.store64(offset, value.into());
        }
        let (mask, value) = (
            !(u64::from(u32::MAX) << shift(offset)),
            u64::from(value) << shift(offset),
        );
        let word = &self.words[offset as usize / 8];
        let mut old = word.load(Ordering::Relaxed);
        while let Err(now) =
            word.compare_exchange_weak(old, old & mask | value, Ordering::AcqRel, Ordering::Relaxed)
        {
            old = now;
        }
    }
}

fn shift(offset: u64) -> u32 {
    (offset as u32 & 4) * 8
}

/// Whether the driver may store to the register at `offset`.
pub(crate) fn writable(offset: u64) -> bool {
    !matches!(offset, page::SET_STATE | page::FAULT | page::DEVICE_STATUS)
}

/// Bytes of the register at `offset`, 0 where there is none.
pub(crate) fn width(offset: u64) -> u32 {
    match offset {
        page::WQ_ADDR | page::CQ_ADDR | page::MQ_ADDR | page::STATUS_ADDR => 8,
        page::WINDOW..PAGE_SIZE if offset.is_multiple_of(8) => 8,
        page::ENABLE
        | page::SET_STATE
        | page::SIZES
        | page::FAULT
        | page::WQ_TAIL
        | page::CQ_HEAD
        | page::MQ_HEAD
        | page::ARM
        | page::DEVICE_STATUS => 4,
        _ => 0,
    }
}
