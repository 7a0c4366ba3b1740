//! The memory that the tenant shows to the daemon: the records of its connections, its counters,
//! its queue of requests, and its bells.
//!
//! Its place is taken once. What lies there is the process's own at first, and then what a daemon has made, of each daemon anew
//! ([`show`]). No descriptor of it is kept.

use super::lock::Guard;
use super::messages::SEEN;
use super::requests::waiting;
use crate::hidden::{are_few, hide};
use crate::{conn, sys};
use libc::c_int;
use rdsock_shm::layout::{BELLS, Bell, BellBoard, ConnRecord, Counter, TenantHeader, TenantMemory};
use std::mem::{offset_of, size_of};
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering::*};

pub(super) static MEMORY: AtomicPtr<TenantMemory> = AtomicPtr::new(std::ptr::null_mut());
pub(super) static BOARD: AtomicPtr<BellBoard> = AtomicPtr::new(std::ptr::null_mut());
/// The descriptor of the bell board, for the next daemon.
pub(super) static BOARD_FD: AtomicI32 = AtomicI32::new(-1);
/// 1 when the program's limits, of address space or of descriptors, leave no room for it.
static REFUSED: AtomicU32 = AtomicU32::new(0);
pub(super) static BELLS_IN_USE: AtomicU64 = AtomicU64::new(0);

pub(super) fn memory() -> Option<&'static TenantMemory> {
    let at = MEMORY.load(Acquire);
    // SAFETY: there is always something mapped at this place; all that changes in it is atomic.
    (!at.is_null()).then(|| unsafe { &*at })
}

/// The record of a connection, where this tenant has memory.
pub fn record(index: usize) -> Option<&'static ConnRecord> {
    memory()?.conns.get(index)
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
    let board = BOARD.load(Acquire);
    if board.is_null() {
        return None;
    }
    loop {
        let used = BELLS_IN_USE.load(Relaxed);
        let number = used.trailing_ones() as usize;
        if number >= BELLS {
            return None;
        }
        if BELLS_IN_USE
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

/// Takes a bell back.
pub fn return_bell(number: usize) {
    BELLS_IN_USE.fetch_and(!(1 << number), AcqRel);
}

pub(super) fn make_memory() {
    if !MEMORY.load(Relaxed).is_null() || REFUSED.load(Relaxed) != 0 {
        return;
    }
    if are_few() || !sys::leaves_room(size_of::<BellBoard>() + size_of::<TenantMemory>()) {
        REFUSED.store(1, Relaxed);
        return;
    }
    if let Some(memory) = sys::map(-1, size_of::<TenantMemory>()) {
        MEMORY.store(memory.cast(), Release);
    }
}

/// The first daemon has sent a bell board. It stays for as long as the process runs: peers of any time ring it, and
/// each further daemon is given it. False when there is one already, or it is none: the descriptor is the caller's then.
pub(super) fn take_board(_guard: &Guard, fd: c_int) -> bool {
    const SIZE: usize = size_of::<BellBoard>();
    if !BOARD.load(Relaxed).is_null()
        || !sys::cannot_shrink(fd)
        || sys::file_size(fd) != Some(SIZE as u64)
    {
        return false;
    }
    let Some(board) = sys::map(fd, SIZE) else {
        return false;
    };
    BOARD_FD.store(hide(fd), Relaxed);
    BOARD.store(board.cast(), Release);
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
    let place: *mut TenantMemory = MEMORY.load(Relaxed);
    // SAFETY: the place is this process's own, and the file is as long.
    if !is_filled || !unsafe { sys::map_over(place.cast(), fd, SIZE) } {
        return None;
    }
    SEEN.store(0, Relaxed);
    conn::show_all();
    Some(place as u64)
}

/// Writes to a place in a file. False where not all of it could be written.
fn write_all<T>(fd: c_int, from: *const T, len: usize, offset: usize) -> bool {
    // SAFETY: the callers' structures have this length. What other threads change meanwhile the kernel reads as it is.
    unsafe { sys::pwrite(fd, from.cast(), len, offset) == len as isize }
}
