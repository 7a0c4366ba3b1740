//! What a driver does with DMA memory. No type here ever makes a Rust reference to the bytes: they are
//! copied, or reached word by word through atomics.
//!
//! Opts into `unsafe` for those copies and atomics; every offset is checked against the memory that
//! a view keeps alive.

use crate::dma::DmaMemory;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A piece of DMA memory, as a descriptor names it. Only views of memory make one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    iova: u64,
    len: u32,
}

impl Piece {
    /// I/O virtual address of the first byte.
    pub fn iova(self) -> u64 {
        self.iova
    }

    /// Bytes.
    pub fn len(self) -> u32 {
        self.len
    }

    /// True when it has no bytes.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }
}

/// 64-bit words that driver and device share: a queue, a status block.
#[derive(Clone, Debug)]
pub struct Words {
    start: NonNull<u64>,
    count: usize,
    iova: u64,
    _memory: Arc<DmaMemory>,
}

// SAFETY: the words are only reached through atomics, and the memory is kept alive.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// `count` words at `offset`, a multiple of 8. `None` when they do not lie in the memory.
    pub fn new(memory: &Arc<DmaMemory>, offset: usize, count: usize) -> Option<Self> {
        let start = memory.at(offset, count.checked_mul(8)?)?.cast::<u64>();
        start.is_aligned().then(|| Words {
            start,
            count,
            iova: memory.iova() + offset as u64,
            _memory: memory.clone(),
        })
    }

    /// I/O virtual address of word 0.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    #[inline]
    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.count, "a word outside of its memory");
        // SAFETY: inside the memory, aligned, and only ever accessed atomically by this process; the
        // memory lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(index)) }
    }

    /// Loads a word. Panics when there is none: an index is the driver's own, never the device's.
    #[inline]
    pub fn load(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Relaxed)
    }

    /// Stores a word. Panics as [`Words::load`] does.
    #[inline]
    pub fn store(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Relaxed);
    }
}

/// Bytes that the device or another process may write at any time.
#[derive(Clone, Debug)]
pub struct Shared {
    memory: Arc<DmaMemory>,
    offset: usize,
    len: usize,
}

// SAFETY: the bytes are only copied, and the memory is kept alive.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// `len` bytes at `offset`. `None` when they do not lie in the memory.
    pub fn new(memory: &Arc<DmaMemory>, offset: usize, len: usize) -> Option<Self> {
        memory.at(offset, len).map(|_| Shared {
            memory: memory.clone(),
            offset,
            len,
        })
    }

    /// I/O virtual address of the first byte.
    pub fn iova(&self) -> u64 {
        self.memory.iova() + self.offset as u64
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The piece of `len` bytes at `at`. `None` when it does not lie inside.
    pub fn piece(&self, at: usize, len: u32) -> Option<Piece> {
        self.place(at, len as usize)?;
        let iova = self.iova() + at as u64;
        Some(Piece { iova, len })
    }

    fn place(&self, at: usize, len: usize) -> Option<NonNull<u8>> {
        if at.checked_add(len)? > self.len {
            return None;
        }
        self.memory.at(self.offset + at, len)
    }

    /// Copies bytes in. False, and nothing happens, when they would not lie inside.
    #[must_use]
    pub fn copy_in(&self, at: usize, from: &[u8]) -> bool {
        let Some(place) = self.place(at, from.len()) else {
            return false;
        };
        // SAFETY: inside the memory; `from` is a reference, and none exists into DMA memory.
        unsafe { place.copy_from_nonoverlapping(NonNull::from(from).cast(), from.len()) };
        true
    }

    /// Copies bytes out. False, and nothing happens, when they do not lie inside.
    #[must_use]
    pub fn copy_out(&self, at: usize, to: &mut [u8]) -> bool {
        let Some(place) = self.place(at, to.len()) else {
            return false;
        };
        let len = to.len();
        // SAFETY: as in `copy_in`. Bytes that somebody writes meanwhile are old or new, and the
        // protocol above says which it believes.
        unsafe { place.copy_to_nonoverlapping(NonNull::from(to).cast(), len) };
        true
    }

    /// Loads a word that somebody else stores, at a multiple of 8. What was stored before it is visible.
    pub fn load_word(&self, at: usize) -> Option<u64> {
        let place = self.place(at, 8)?.cast::<u64>();
        // SAFETY: inside the memory and aligned; stored to atomically by its writer.
        let word = place
            .is_aligned()
            .then(|| unsafe { AtomicU64::from_ptr(place.as_ptr()) })?;
        Some(word.load(Ordering::Acquire))
    }
}

/// Bytes that belong to the CPU: the device has been told of none of them.
#[derive(Debug)]
pub struct Buffer(Shared);

/// A buffer that the device may read or write. It cannot be looked at until it comes back.
#[derive(Debug)]
pub struct InFlight(Shared);

impl Buffer {
    /// Divides memory into buffers of `size` bytes.
    pub fn divide(memory: DmaMemory, size: usize) -> Vec<Buffer> {
        let memory = Arc::new(memory);
        let count = memory.len().checked_div(size).unwrap_or(0);
        (0..count)
            .filter_map(|i| Shared::new(&memory, i * size, size).map(Buffer))
            .collect()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True when it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Copies bytes in; false when they would not fit.
    #[must_use]
    pub fn copy_in(&mut self, at: usize, from: &[u8]) -> bool {
        self.0.copy_in(at, from)
    }

    /// Copies bytes out; false when they do not lie inside.
    #[must_use]
    pub fn copy_out(&self, at: usize, to: &mut [u8]) -> bool {
        self.0.copy_out(at, to)
    }

    /// Gives the buffer to the device.
    pub fn lend(self) -> InFlight {
        InFlight(self.0)
    }
}

impl InFlight {
    /// The piece of `len` bytes at `at`, for a descriptor.
    pub fn piece(&self, at: usize, len: u32) -> Option<Piece> {
        self.0.piece(at, len)
    }

    /// Takes the buffer back. The driver calls it when the device has said that it is done, or
    /// was reset.
    pub fn reclaim(self) -> Buffer {
        Buffer(self.0)
    }
}
