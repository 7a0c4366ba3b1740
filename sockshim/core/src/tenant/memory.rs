//! The memory that the tenant shows to the daemon: the records of its connections, its counters,
//! its queue of requests, and its bells.
//!
//! Its place is taken once. What lies there is the process's own at first, and then what a daemon has made, of each daemon anew
//! ([`show`]). No descriptor of it is kept.

use super::lock::Guard;
use super::requests::waiting;
use crate::hidden::{are_few, close_hidden, hide};
use crate::state::PROCESS;
use crate::{conn, sys};
use libc::c_int;
use rdsock_shm::layout::{BELLS, Bell, BellBoard, ConnRecord, Counter, TenantHeader, TenantMemory};
use std::mem::{offset_of, size_of};
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering::*};

/// Where the tenant's memory is, and what is given out of it.
#[derive(Debug)]
pub struct Memory {
    /// Null before it is first needed.
    at: AtomicPtr<TenantMemory>,
    /// Null before a daemon has sent it.
    board: AtomicPtr<BellBoard>,
    /// The descriptor of the bell board, for the next daemon.
    board_fd: AtomicI32,
    /// 1 when the program's limits, of address space or of descriptors, leave no room for it.
    refused: AtomicU32,
    bells_in_use: AtomicU64,
    /// How many messages of the daemon, of those that the memory counts, were read.
    pub(super) seen: AtomicU64,
}

impl Memory {
    /// There is none.
    pub const fn new() -> Self {
        Memory {
            at: AtomicPtr::new(std::ptr::null_mut()),
            board: AtomicPtr::new(std::ptr::null_mut()),
            board_fd: AtomicI32::new(-1),
            refused: AtomicU32::new(0),
            bells_in_use: AtomicU64::new(0),
            seen: AtomicU64::new(0),
        }
    }

    fn take_bell(&self) -> Option<(usize, &'static Bell)> {
        let board = self.board.load(Acquire);
        if board.is_null() {
            return None;
        }
        loop {
            let used = self.bells_in_use.load(Relaxed);
            let number = used.trailing_ones() as usize;
            if number >= BELLS {
                return None;
            }
            if self
                .bells_in_use
                .compare_exchange(used, used | 1 << number, AcqRel, Relaxed)
                .is_ok()
            {
                // SAFETY: mapped once and never unmapped; a bell is made of atomics; below BELLS.
                return Some((number, unsafe {
                    &*(&raw const (*board).bells).cast::<Bell>().add(number)
                }));
            }
        }
    }

    fn return_bell(&self, number: usize) {
        self.bells_in_use.fetch_and(!(1 << number), AcqRel);
    }

    /// In a child, which has none yet: the parent's memory, its bells, and the descriptor of these, which are of no use any more.
    fn forget_in_child(&self) -> (*mut TenantMemory, *mut BellBoard, c_int) {
        self.bells_in_use.store(0, Relaxed);
        let null = std::ptr::null_mut();
        (
            self.at.swap(null, Relaxed),
            self.board.swap(null.cast(), Relaxed),
            self.board_fd.swap(-1, Relaxed),
        )
    }
}

/// Of this process.
#[inline]
pub(super) fn own() -> &'static Memory {
    &PROCESS.tenant.memory
}

/// True once a place for the memory was taken.
pub(super) fn is_there() -> bool {
    !own().at.load(Relaxed).is_null()
}

/// The descriptor of the bell board, where there is one.
pub(super) fn board_fd() -> Option<c_int> {
    let fd = own().board_fd.load(Relaxed);
    (fd >= 0).then_some(fd)
}

/// The shim's own descriptor `old` is now `new`.
pub(super) fn moved(old: c_int, new: c_int) {
    let _ = own().board_fd.compare_exchange(old, new, AcqRel, Relaxed);
}

/// After fork, in the child. The mappings are the parent's, and the child may be somebody else soon: what it did to the parent's bells would
/// have that sleep on. The parent's peers ring them by mappings of their own, and the child's instances have no bell. In their
/// place comes what nobody sees: a handler that interrupted a count, or a sleep on a bell, has forked, perhaps, and that goes on.
pub(super) fn after_fork_in_child() {
    let (memory, board, fd) = own().forget_in_child();
    conn::show_in(None);
    if fd >= 0 {
        close_hidden(fd);
    }
    let of_parent = [
        (memory.cast(), size_of::<TenantMemory>()),
        (board.cast(), size_of::<BellBoard>()),
    ];
    for (at, len) in of_parent {
        let at: *mut u8 = at;
        if !at.is_null() {
            // SAFETY: the parent's memory, of this size, and all that is written there now is of no use.
            unsafe { sys::map_over(at, -1, len) };
        }
    }
}

#[inline]
pub(super) fn memory() -> Option<&'static TenantMemory> {
    let at = own().at.load(Acquire);
    // SAFETY: there is always something mapped at this place; all that changes in it is atomic.
    (!at.is_null()).then(|| unsafe { &*at })
}

/// Counts an event.
#[inline]
pub fn count(counter: Counter) {
    if let Some(memory) = memory()
        && let Some(word) = memory.header.counters.get(counter as usize)
    {
        word.fetch_add(1, Relaxed);
    }
}

/// Gives out one of the tenant's bells.
pub fn take_bell() -> Option<(usize, &'static Bell)> {
    own().take_bell()
}

/// Takes a bell back.
pub fn return_bell(number: usize) {
    own().return_bell(number);
}

pub(super) fn make_memory() {
    if is_there() || own().refused.load(Relaxed) != 0 {
        return;
    }
    if are_few() || !sys::leaves_room(size_of::<BellBoard>() + size_of::<TenantMemory>()) {
        own().refused.store(1, Relaxed);
        return;
    }
    if let Some(memory) = sys::map(-1, size_of::<TenantMemory>()) {
        own().at.store(memory.cast(), Release);
        conn::show_in(self::memory().map(|memory| &memory.conns));
    }
}

/// The first daemon has sent a bell board. It stays for as long as the process runs: peers of any time ring it, and
/// each further daemon is given it. False when there is one already, or it is none: the descriptor is the caller's then.
pub(super) fn take_board(_guard: &Guard, fd: c_int) -> bool {
    const SIZE: usize = size_of::<BellBoard>();
    if !own().board.load(Relaxed).is_null()
        || !sys::cannot_shrink(fd)
        || sys::file_size(fd) != Some(SIZE as u64)
    {
        return false;
    }
    let Some(board) = sys::map(fd, SIZE) else {
        return false;
    };
    own().board_fd.store(hide(fd), Relaxed);
    own().board.store(board.cast(), Release);
    true
}

/// Whether this process may write into memory that a daemon sends: to write a file beyond this limit would raise SIGXFSZ.
pub(super) fn may_write() -> bool {
    sys::limit_of(libc::RLIMIT_FSIZE) >= size_of::<TenantMemory>() as u64
}

/// Puts memory that a daemon has sent in the place of the old one: what is known of connections, the counters and the requests that
/// wait for this daemon are in it, the rest is the daemon's. Its address; `None` where it is no such memory, or can't be mapped. The
/// descriptor is the caller's.
///
/// Other threads go on meanwhile. They find the old memory or the new one, never none, since the kernel exchanges them in
/// one step. What they write to the old one after it was copied, and before the exchange, would be lost: so
/// all records are written again behind it, from what this process knows. Of the counters some steps of these microseconds may be
/// missing.
pub(super) fn show(guard: &Guard, fd: c_int) -> Option<u64> {
    const SIZE: usize = size_of::<TenantMemory>();
    let memory = memory()?;
    if !sys::cannot_shrink(fd) || sys::file_size(fd) != Some(SIZE as u64) || !may_write() {
        return None;
    }
    let records = conn::high() * size_of::<ConnRecord>();
    let counters = offset_of!(TenantHeader, counters);
    let is_filled = write_all(
        fd,
        &raw const memory.header.counters,
        size_of_val(&memory.header.counters),
        counters,
    ) && write_all(
        fd,
        &raw const memory.conns,
        records,
        offset_of!(TenantMemory, conns),
    ) && waiting(guard).is_none_or(|queue| {
        let at = offset_of!(TenantMemory, queue);
        write_all(fd, queue, size_of_val(queue), at)
    });
    let place: *mut TenantMemory = own().at.load(Relaxed);
    // SAFETY: the place is this process's own, and the file is as long.
    if !is_filled || !unsafe { sys::map_over(place.cast(), fd, SIZE) } {
        return None;
    }
    own().seen.store(0, Relaxed);
    conn::show_all();
    Some(place as u64)
}

/// Writes to a place in a file. False where not all of it could be written.
fn write_all<T>(fd: c_int, from: *const T, len: usize, offset: usize) -> bool {
    // SAFETY: the callers' structures have this length. What other threads change meanwhile the kernel reads as it is.
    unsafe { sys::pwrite(fd, from.cast(), len, offset) == len as isize }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bell_is_given_out_once_at_a_time() {
        let memory = Memory::new();
        assert!(memory.take_bell().is_none(), "there is no board");
        let board = sys::map(-1, size_of::<BellBoard>()).unwrap();
        memory.board.store(board.cast(), Relaxed);
        let take = || memory.take_bell().map(|(number, _)| number);
        for number in 0..BELLS {
            assert_eq!(take(), Some(number));
        }
        assert_eq!(take(), None);
        memory.return_bell(3);
        assert_eq!((take(), take()), (Some(3), None));
        // The child has none, whatever its parent has.
        let _ = memory.forget_in_child();
        assert!(memory.board.load(Relaxed).is_null());
        memory.board.store(board.cast(), Relaxed);
        assert_eq!(take(), Some(0));
    }
}
