//! The memory of a stream to another node, as the daemon reaches it: it stands for the other end.
//!
//! Opts into `unsafe` to reach the mapped header, and to let the kernel read and write the rings: every
//! offset is masked or checked, and what a program can write is reached through atomics only.
//!
//! Behind the two rings lies the *staging* area: what a program has sent on its anchor is put there
//! for the engine to read, since the ring is the program's own from the moment it switches.

use crate::desk::Paid;
use memmap2::{MmapOptions, MmapRaw};
use rdsock_shm::bell::Place as BellPlace;
use rdsock_shm::layout::{Bell, BellBoard, DATA_OFFSET, Direction, Producer, StreamHeader};
use rdsock_vfio::{BusError, Piece, Shared, Window};
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
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
    /// window of its node.
    pub fn new(
        file: &impl AsFd,
        ring_size: u64,
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
        Ok(StreamMemory {
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

    /// A direction's words.
    #[inline]
    pub fn direction(&self, number: usize) -> &Direction {
        let header: *const StreamHeader = self.map.as_ptr().cast();
        // SAFETY: the header is the start of the mapping, which lives as long as `self`, is page-aligned and can't
        // shrink (sealed); a direction is made of atomics only; the index is 0 or 1.
        unsafe {
            &*(&raw const (*header).directions)
                .cast::<Direction>()
                .add(number & 1)
        }
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
        match area {
            Area::Ring(direction) => DATA_OFFSET + (direction as u64 & 1) * self.ring_size,
            Area::Staging => DATA_OFFSET + 2 * self.ring_size,
        }
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

    /// Sends bytes at `at` in an area to a socket, without waiting: as many as lie together and as the
    /// socket takes.
    pub fn send(&self, socket: BorrowedFd<'_>, area: Area, at: u64, len: u64) -> io::Result<u64> {
        let (start, len) = self.place(area, at, len);
        // SAFETY: the bytes lie in the mapping (`place`); the kernel only reads them.
        let sent = unsafe {
            libc::send(
                socket.as_raw_fd(),
                self.map.as_ptr().add(start).cast(),
                len,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        u64::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Receives bytes from a socket to `at` in an area, without waiting: as many as lie together and as there
    /// are. 0 is the end of file.
    pub fn receive(
        &self,
        socket: BorrowedFd<'_>,
        area: Area,
        at: u64,
        len: u64,
    ) -> io::Result<u64> {
        let (start, len) = self.place(area, at, len);
        // SAFETY: the bytes lie in the mapping (`place`); nobody has a reference to them.
        let got = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                self.map.as_mut_ptr().add(start).cast(),
                len,
                libc::MSG_DONTWAIT,
            )
        };
        u64::try_from(got).map_err(|_| io::Error::last_os_error())
    }
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
