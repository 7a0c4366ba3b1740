//! The memory of a stream to another node, as the daemon reaches it: it stands for the other end.
//!
//! Opts into `unsafe` to reach the mapped header, and to let the kernel read and write the rings: every
//! offset is masked or checked, and what a program can write is reached through atomics only. The end's own state lies beside it, in
//! memory of the daemon's.
//!
//! Behind the two rings lies the *staging* area: what a program has sent on its anchor is put there
//! for the engine to read, since the ring is the program's own from the moment it switches.

use crate::desk::Paid;
use memmap2::{MmapOptions, MmapRaw};
use rdsock_shm::bell::Place as BellPlace;
use rdsock_shm::end::{Buffers, Shared as EndShared};
use rdsock_shm::layout::{
    Bell, BellBoard, DATA_OFFSET, Direction, EndPage, Producer, StreamHeader,
};
use rdsock_shm::ring::RingMemory;
use rdsock_vfio::{BusError, Piece, Shared, Window};
use std::convert::Infallible;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::null;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of the staging area.
pub const STAGING: u64 = 64 << 10;

/// Bytes of a stream's memory with rings of `ring_size` bytes, in whole pages.
pub const fn stream_bytes(ring_size: u64) -> u64 {
    (rdsock_shm::layout::stream_bytes(ring_size) + STAGING).next_multiple_of(4096)
}

/// Where bytes of a stream lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// The ring of a direction.
    Ring(usize),
    /// The staging area.
    Staging,
}

/// A stream's memory, mapped here and for the device.
#[derive(Debug)]
pub struct StreamMemory {
    /// The daemon's end, which leads to what follows.
    shared: EndShared,
    _page: Box<EndPage>,
    map: MmapRaw,
    dma: Shared,
    ring_size: u64,
    /// Its offset is that in the region of the other node.
    slot: Slot,
}

/// A place in the window of a node, taken by a stream. Dropped last, when nothing is mapped there.
#[derive(Debug)]
pub struct Slot {
    offset: u64,
    free: Arc<Mutex<Vec<u64>>>,
}

impl Slot {
    /// Takes one of the free places, whose offsets are given.
    pub fn take(free: &Arc<Mutex<Vec<u64>>>) -> Option<Self> {
        let mut offsets = free.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = offsets.pop()?;
        Some(Slot {
            offset,
            free: free.clone(),
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut offsets = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        offsets.push(self.offset);
    }
}

impl StreamMemory {
    /// Maps a stream's memfd (sealed against shrinking, of [`stream_bytes`] bytes, in which nobody makes holes) at a place in the
    /// window of its node. The program is end `end`, the daemon the other one.
    pub fn new(
        file: &impl AsFd,
        ring_size: u64,
        end: usize,
        window: &Window,
        slot: Slot,
    ) -> Result<Self, BusError> {
        let len = stream_bytes(ring_size) as usize;
        let dma = Arc::new(window.map_file(slot.offset, file, len)?);
        let map = MmapOptions::new()
            .len(len)
            .map_raw(file.as_fd().as_raw_fd())
            .map_err(|source| BusError::Io {
                what: "mapping a stream",
                source,
            })?;
        let dma = Shared::new(&dma, 0, len).ok_or(BusError::BadLength(len))?;
        // SAFETY: made of integers; zeroes are a value.
        let page: Box<EndPage> = Box::new(unsafe { std::mem::zeroed() });
        let header: *const StreamHeader = map.as_ptr().cast();
        let start = map.as_mut_ptr();
        let rings = [0, 1].map(|ring| start.wrapping_add(place_of(Area::Ring(ring), ring_size)));
        // SAFETY: header and rings lie in the mapping, whose size that is, and the page in its box: both are kept as long as what
        // is made here. The mapping is page-aligned and can't shrink (sealed), its words are atomic, nobody has references to the
        // rings.
        let shared = unsafe {
            let rings = rings.map(|start| RingMemory::new(start, ring_size));
            let directions = (&raw const (*header).directions).cast::<Direction>();
            EndShared::new(
                directions,
                &raw const *page,
                null(),
                rings,
                1 - (end & 1) as u32,
            )
        };
        Ok(StreamMemory {
            shared,
            _page: page,
            map,
            dma,
            ring_size,
            slot,
        })
    }

    /// Bytes of each ring.
    pub fn ring_size(&self) -> u64 {
        self.ring_size
    }

    /// The daemon's end.
    #[inline]
    pub fn shared(&self) -> &EndShared {
        &self.shared
    }

    /// Offset of a direction's ring in the region of the other node.
    pub fn ring_in_region(&self, direction: usize) -> u64 {
        self.slot.offset + self.start(Area::Ring(direction))
    }

    /// Offset of a direction's head word in the region of the other node.
    pub fn head_in_region(&self, direction: usize) -> u64 {
        let directions = offset_of!(StreamHeader, directions);
        let at = directions + (direction & 1) * size_of::<Direction>();
        let head = offset_of!(Direction, producer) + offset_of!(Producer, head);
        self.slot.offset + (at + head) as u64
    }

    fn start(&self, area: Area) -> u64 {
        place_of(area, self.ring_size) as u64
    }

    fn size(&self, area: Area) -> u64 {
        match area {
            Area::Ring(_) => self.ring_size,
            Area::Staging => STAGING,
        }
    }

    /// Offset in the mapping and length of the bytes at `at` (modulo the area's size), up to the area's end.
    fn place(&self, area: Area, at: u64, len: u64) -> (usize, usize) {
        let size = self.size(area);
        let at = at & (size - 1);
        (
            (self.start(area) + at) as usize,
            len.min(size - at) as usize,
        )
    }

    /// Bytes at `at` in an area, for the engine: as many as lie together.
    pub fn piece(&self, area: Area, at: u64, len: u32) -> Option<Piece> {
        let (start, len) = self.place(area, at, len.into());
        self.dma.piece(start, len as u32)
    }

    /// Room for at most `len` bytes at `at` in the staging area, as much as lies together, for the kernel to write to.
    pub fn with_staging<T>(&self, at: u64, len: u64, with: impl FnOnce(&Buffers) -> T) -> T {
        let (start, len) = self.place(Area::Staging, at, len);
        let part = libc::iovec {
            iov_base: self.map.as_mut_ptr().wrapping_add(start).cast(),
            iov_len: len,
        };
        // SAFETY: the bytes lie in the mapping (`place`), as long as this call; nobody has a reference to them.
        let buffers = unsafe { Buffers::new(&raw const part, 1, |_| Ok::<_, Infallible>(())) };
        let Ok(buffers) = buffers;
        with(&buffers)
    }
}

/// Where an area starts.
fn place_of(area: Area, ring_size: u64) -> usize {
    let offset = match area {
        Area::Ring(direction) => DATA_OFFSET + (direction as u64 & 1) * ring_size,
        Area::Staging => DATA_OFFSET + 2 * ring_size,
    };
    offset as usize
}

/// A tenant's bell board, whose bits the daemon sets for its streams to other nodes.
#[derive(Debug)]
pub struct Board {
    map: MmapRaw,
    // Goes behind the mapping.
    _paid: Paid,
}

impl Board {
    /// Maps a board that was found to be one (a memfd of its size, sealed against shrinking), in which nobody makes holes: a
    /// poll core that touched one would wait. What is paid for it, and keeps it as it is, is held for as long.
    pub fn new(file: &impl AsFd, paid: Paid) -> io::Result<Self> {
        let map = MmapOptions::new()
            .len(size_of::<BellBoard>())
            .map_raw(file.as_fd().as_raw_fd())?;
        Ok(Board { map, _paid: paid })
    }

    /// Sets a bit; true when a thread sleeps on that bell and wants a wake byte.
    pub fn ring(&self, place: BellPlace) -> bool {
        let board: *const BellBoard = self.map.as_ptr().cast();
        // SAFETY: the board is the whole mapping, which lives as long as `self` and can't shrink; the
        // number of a bell was checked when the place was made (`Place::from_word`); a bell is made of
        // atomics.
        let bell = unsafe { &*(&raw const (*board).bells).cast::<Bell>().add(place.bell) };
        rdsock_shm::bell::ring(bell, place.bit)
    }
}
