//! The memory of a stream, mapped as the daemon has sent it. What an end does with it is `rdsock_shm::end`.

use crate::hidden::close_hidden;
use crate::sys;
use libc::c_int;
use rdsock_shm::control::Promote;
use rdsock_shm::end::Shared;
use rdsock_shm::layout::{Bell, BellBoard, DATA_OFFSET, MAX_RING, MIN_RING, StreamHeader};
use rdsock_shm::ring::RingMemory;
use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

pub use crate::identity::{has_barriers, pid};

/// What the daemon offers for a connection: the fds of a stream's memory, of the end page, and of the peer's bell board, which is
/// -1 where the daemon keeps that from this end.
#[derive(Debug)]
pub struct Offer {
    /// What it is.
    pub promote: Promote,
    /// See above.
    pub fds: [c_int; 3],
}

impl Offer {
    /// It is not followed, or it was: its descriptors are of no use any more.
    pub fn close(self) {
        for fd in self.fds.into_iter().filter(|fd| *fd >= 0) {
            close_hidden(fd);
        }
    }
}

/// One end of a stream.
#[derive(Debug)]
pub struct Stream {
    shared: Shared,
    mapped: usize,
    _counted: Counted,
    /// The daemon's number.
    pub id: u64,
}

impl std::ops::Deref for Stream {
    type Target = Shared;

    #[inline]
    fn deref(&self) -> &Shared {
        &self.shared
    }
}

/// Maps a peer's bell board: its bells, null where `fd` is -1. `None` when it cannot be mapped.
fn map_bells(fd: c_int) -> Option<*const Bell> {
    if fd < 0 {
        return Some(std::ptr::null());
    }
    let board = sys::map(fd, size_of::<BellBoard>())?;
    // SAFETY: just mapped, with this size.
    Some(unsafe { board.add(offset_of!(BellBoard, bells)) }.cast())
}

/// The bytes of an end page's mapping.
const END_PAGE: usize = 4096;

/// Streams that this process has mapped.
static MAPPED: AtomicU64 = AtomicU64::new(0);
/// Mappings of each: the stream, the end page, and the peer's bells.
const MAPPINGS: u64 = 3;

/// One that is counted as mapped.
#[derive(Debug)]
struct Counted;

impl Counted {
    /// Counts one in. `None` where so many would leave the program too few of the mappings that it may have: whoever connects makes
    /// some, and a program without any can't allocate.
    fn new() -> Option<Self> {
        let before = MAPPED.fetch_add(1, Relaxed);
        let counted = Counted;
        leaves_mappings(before + 1, sys::most_mappings()).then_some(counted)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        MAPPED.fetch_sub(1, Relaxed);
    }
}

/// Half of the mappings are the program's own.
fn leaves_mappings(streams: u64, most: u64) -> bool {
    MAPPINGS * streams <= most / 2
}

impl Stream {
    /// Maps what the daemon has sent. The last of `fds` is -1 where this end does not get the peer's bells. `None` when it does
    /// not fit together or cannot be mapped.
    pub fn map(
        fds: [c_int; 3],
        ring_size: u64,
        data_offset: u64,
        end: u32,
        id: u64,
    ) -> Option<Self> {
        let sound = ring_size.is_power_of_two()
            && (MIN_RING..=MAX_RING).contains(&ring_size)
            && (DATA_OFFSET..=MAX_RING).contains(&data_offset)
            && data_offset.is_multiple_of(64)
            && end < 2;
        let [memory, page, bells] = fds;
        let has_bells = bells >= 0;
        // Sizes are looked at once, so none may become smaller later: the bells are another tenant's.
        let mut all = fds.into_iter().filter(|fd| has_bells || *fd != bells);
        if !all.all(sys::cannot_shrink) {
            return None;
        }
        let mapped = sys::file_size(memory)?;
        if !sound
            || mapped < data_offset + 2 * ring_size
            || sys::file_size(page)? < END_PAGE as u64
            || has_bells && sys::file_size(bells)? < size_of::<BellBoard>() as u64
        {
            return None;
        }
        let mapped = mapped as usize;
        if !sys::leaves_room(mapped) {
            return None;
        }
        let counted = Counted::new()?;
        let header = sys::map(memory, mapped)?;
        let Some(end_page) = sys::map(page, END_PAGE) else {
            // SAFETY: just mapped, unused.
            unsafe { sys::unmap(header, mapped) };
            return None;
        };
        let Some(peer_bells) = map_bells(bells) else {
            // SAFETY: just mapped, unused.
            unsafe {
                sys::unmap(header, mapped);
                sys::unmap(end_page, END_PAGE);
            }
            return None;
        };
        sys::advise(header, mapped, libc::MADV_HUGEPAGE);
        let ring = |number: u64| {
            // SAFETY: the size was checked above; the mapping lives as long as the stream.
            unsafe {
                RingMemory::new(
                    header.add((data_offset + number * ring_size) as usize),
                    ring_size,
                )
            }
        };
        // SAFETY: inside of what was mapped: the first ring's place leaves room for the header.
        let shared = unsafe {
            Shared::new(
                header.add(offset_of!(StreamHeader, directions)).cast(),
                end_page.cast(),
                peer_bells,
                [ring(0), ring(1)],
                end,
            )
        };
        Some(Stream {
            shared,
            mapped,
            _counted: counted,
            id,
        })
    }

    /// Unmaps everything.
    pub fn unmap(self) {
        let (directions, page, bells) = self.shared.places();
        // SAFETY: the stream is consumed, and its users have gone; each is where `map` has put it.
        unsafe {
            let header = directions.byte_sub(offset_of!(StreamHeader, directions));
            sys::unmap(header.cast_mut().cast(), self.mapped);
            sys::unmap(page.cast_mut().cast(), END_PAGE);
            if !bells.is_null() {
                let board = bells.byte_sub(offset_of!(BellBoard, bells));
                sys::unmap(board.cast_mut().cast(), size_of::<BellBoard>());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_mappings_are_the_programs() {
        assert!(leaves_mappings(10_921, 65_530));
        assert!(!leaves_mappings(10_922, 65_530));
        assert!(!leaves_mappings(1, 5));
        let streams = MAPPED.load(Relaxed);
        let counted = Counted::new().unwrap();
        assert_eq!(MAPPED.load(Relaxed), streams + 1);
        drop(counted);
        assert_eq!(MAPPED.load(Relaxed), streams);
    }
}
