//! The memory that the tenant shows to the daemon: the records of its connections, its counters,
//! its queue of requests, and its bells.

use super::hidden::{are_few, close_hidden, hide};
use crate::sys;
use libc::c_int;
use rdsock_shm::layout::{
    BELL_MAGIC, BELLS, Bell, BellBoard, ConnRecord, Counter, TENANT_MAGIC, TenantMemory, VERSION,
};
use std::mem::size_of;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering::*};

pub(super) static MEMORY: AtomicPtr<TenantMemory> = AtomicPtr::new(std::ptr::null_mut());
pub(super) static BOARD: AtomicPtr<BellBoard> = AtomicPtr::new(std::ptr::null_mut());
pub(super) static MEMFDS: [AtomicI32; 2] = [AtomicI32::new(-1), AtomicI32::new(-1)];
/// 1 when the program's limits, of address space or of descriptors, leave no room for it.
static REFUSED: AtomicU32 = AtomicU32::new(0);
pub(super) static BELLS_IN_USE: AtomicU64 = AtomicU64::new(0);

pub(super) fn memory() -> Option<&'static TenantMemory> {
    let at = MEMORY.load(Acquire);
    // SAFETY: mapped once and never unmapped; all that changes in it is atomic.
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
    let Some((board, board_fd)) = make_one(c"rdsock-bells", size_of::<BellBoard>()) else {
        return;
    };
    let Some((memory, memory_fd)) = make_one(c"rdsock-tenant", size_of::<TenantMemory>()) else {
        close_hidden(board_fd);
        return;
    };
    let (board, memory) = (board.cast::<BellBoard>(), memory.cast::<TenantMemory>());
    // SAFETY: fresh mappings of these sizes, that nobody else knows yet.
    unsafe {
        (*board).magic = BELL_MAGIC;
        (*board).version = VERSION;
        (*board).size = size_of::<BellBoard>() as u32;
        (*memory).header.magic = TENANT_MAGIC;
        (*memory).header.version = VERSION;
        (*memory).header.size = size_of::<TenantMemory>() as u32;
    }
    for (place, fd) in MEMFDS.iter().zip([memory_fd, board_fd]) {
        place.store(fd, Relaxed);
    }
    BOARD.store(board, Release);
    MEMORY.store(memory, Release);
}

fn make_one(name: &std::ffi::CStr, size: usize) -> Option<(*mut u8, c_int)> {
    // To grow a file beyond this limit would raise SIGXFSZ.
    if sys::limit_of(libc::RLIMIT_FSIZE) < size as u64 {
        return None;
    }
    let fd = sys::memfd(name, libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) as c_int;
    if fd < 0 {
        return None;
    }
    let fd = hide(fd);
    // The daemon takes nothing that could change its size under it, and needs nothing to grow.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    let is_sealed =
        sys::ftruncate(fd, size) == 0 && sys::fcntl(fd, libc::F_ADD_SEALS, seals as usize) == 0;
    match sys::map(fd, size).filter(|_| is_sealed) {
        Some(at) => Some((at, fd)),
        None => {
            close_hidden(fd);
            None
        }
    }
}
