//! The memory that the tenant shows to the daemon: the records of its connections, its counters,
//! its queue of requests, and its bells.
//!
//! Its place is taken once. What lies there is the process's own at first, and a file anew for each daemon
//! ([`renew`]): a daemon seals what it gets, so that nobody, not even this process, can map it to be written
//! again. No descriptor of it is kept.

use super::hidden::{are_few, close_hidden, hide};
use super::lock::Guard;
use crate::{conn, sys};
use libc::c_int;
use rdsock_shm::layout::{
    BELLS, Bell, BellBoard, ConnRecord, Counter, TENANT_MAGIC, TenantHeader, TenantMemory, VERSION,
};
use std::mem::{offset_of, size_of};
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering::*};

pub(super) static MEMORY: AtomicPtr<TenantMemory> = AtomicPtr::new(std::ptr::null_mut());
pub(super) static BOARD: AtomicPtr<BellBoard> = AtomicPtr::new(std::ptr::null_mut());
/// The descriptors of the tenant's memory, while a daemon is given it, and of the bell board.
pub(super) static MEMFDS: [AtomicI32; 2] = [AtomicI32::new(-1), AtomicI32::new(-1)];
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
    MEMFDS[1].store(hide(fd), Relaxed);
    BOARD.store(board.cast(), Release);
    true
}

/// Puts new memory in the place of the old one, for a daemon that is about to be told of it: what is known of
/// connections and the counters live on, the rest starts afresh. The descriptor to be handed over; the caller has it
/// closed ([`handed_over`]).
///
/// Other threads go on meanwhile. They find the old memory or the new one, never none, since the kernel exchanges them in
/// one step. What they write to the old one after it was copied, and before the exchange, would be lost: so
/// all records are written again behind it, from what this process knows. Of the counters some steps of these microseconds may be
/// missing.
pub(super) fn renew(_guard: &Guard) -> Option<c_int> {
    let memory = memory()?;
    let fd = make_file(c"rdsock-tenant", size_of::<TenantMemory>())?;
    let identity = Identity {
        magic: TENANT_MAGIC,
        version: VERSION,
        size: size_of::<TenantMemory>() as u32,
    };
    let records = conn::high() * size_of::<ConnRecord>();
    let counters = offset_of!(TenantHeader, counters);
    let is_filled = write_all(fd, &raw const identity, size_of::<Identity>(), 0)
        && write_all(
            fd,
            &raw const memory.header.counters,
            size_of_val(&memory.header.counters),
            counters,
        )
        && write_all(
            fd,
            &raw const memory.conns,
            records,
            offset_of!(TenantMemory, conns),
        );
    let place = MEMORY.load(Relaxed).cast();
    // SAFETY: the place is this process's own, and the file is as long.
    if !is_filled || !unsafe { sys::map_over(place, fd, size_of::<TenantMemory>()) } {
        close_hidden(fd);
        return None;
    }
    conn::show_all();
    MEMFDS[0].store(fd, Relaxed);
    Some(fd)
}

/// The memory was sent to a daemon, or could not be.
pub(super) fn handed_over() {
    let fd = MEMFDS[0].swap(-1, Relaxed);
    if fd >= 0 {
        close_hidden(fd);
    }
}

/// The start of a tenant's memory.
#[repr(C)]
struct Identity {
    magic: u64,
    version: u32,
    size: u32,
}

/// Writes to a place in a file. False where not all of it could be written.
fn write_all<T>(fd: c_int, from: *const T, len: usize, offset: usize) -> bool {
    // SAFETY: the callers' structures have this length. What other threads change meanwhile the kernel reads as it is.
    unsafe { sys::pwrite(fd, from.cast(), len, offset) == len as isize }
}

/// The daemon takes nothing that could change its size under it. The other seals are its own to add.
const FIXED: c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

fn make_file(name: &std::ffi::CStr, size: usize) -> Option<c_int> {
    // To grow a file beyond this limit would raise SIGXFSZ.
    if sys::limit_of(libc::RLIMIT_FSIZE) < size as u64 {
        return None;
    }
    let fd = sys::memfd(name, libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) as c_int;
    if fd < 0 {
        return None;
    }
    let fd = hide(fd);
    let is_sealed =
        sys::ftruncate(fd, size) == 0 && sys::fcntl(fd, libc::F_ADD_SEALS, FIXED as usize) == 0;
    if !is_sealed {
        close_hidden(fd);
        return None;
    }
    Some(fd)
}
