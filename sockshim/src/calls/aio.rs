//! Asynchronous I/O: threads of libc's, or the kernel itself, read, write or watch the descriptor behind the shim's back.
//! So a connection that is named there is the kernel's before it starts. `io_uring` names descriptors in memory that the
//! shim does not see: there all are.

use crate::conn::{self, Kind};
use crate::{demote, real, sys, tenant};
use libc::{aiocb, c_int, c_long, c_uint, c_void, sigevent};
use rdsock_shm::reason::Reason;

fn give_up(fd: c_int) {
    if matches!(conn::kind(fd), Kind::Conn(_))
        && let Some(held) = conn::of(fd)
    {
        demote::abandon(&held, fd, Reason::Aio);
    }
}

/// # Safety
/// `block` is null or a valid control block.
unsafe fn begins(block: *const aiocb) {
    if !sys::is_bad_pointer(block.cast()) {
        // SAFETY: as the caller says.
        give_up(unsafe { (*block).aio_fildes });
    }
}

/// # Safety
/// `list` is null or points to `count` control blocks, of which any may be null.
unsafe fn all_begin(list: *const *mut aiocb, count: c_int) {
    if !sys::is_bad_pointer(list.cast()) {
        for i in 0..count.max(0) as usize {
            // SAFETY: as the caller says.
            unsafe { begins(*list.add(i)) };
        }
    }
}

macro_rules! posix {
    ($($name:ident)*) => {
        $(
            /// # Safety
            /// As `aio_read(3)`.
            pub unsafe fn $name(block: *mut aiocb) -> c_int {
                // SAFETY: arguments pass through.
                unsafe {
                    begins(block);
                    real::$name(block)
                }
            }
        )*
    };
}

posix! { aio_read aio_read64 aio_write aio_write64 }

/// # Safety
/// As `lio_listio(3)`.
pub unsafe fn lio_listio(
    mode: c_int,
    list: *const *mut aiocb,
    count: c_int,
    event: *mut sigevent,
) -> c_int {
    // SAFETY: arguments pass through.
    unsafe {
        all_begin(list, count);
        real::lio_listio(mode, list, count, event)
    }
}

/// # Safety
/// As `lio_listio(3)`.
pub unsafe fn lio_listio64(
    mode: c_int,
    list: *const *mut aiocb,
    count: c_int,
    event: *mut sigevent,
) -> c_int {
    // SAFETY: arguments pass through.
    unsafe {
        all_begin(list, count);
        real::lio_listio64(mode, list, count, event)
    }
}

/// Before blocks are handed to Linux's AIO, which also watches descriptors (`IOCB_CMD_POLL`).
///
/// # Safety
/// As `io_submit(2)`.
pub unsafe fn submitting(count: c_long, blocks: *const *const c_void) {
    /// Where an `iocb` has its descriptor.
    const FD_AT: usize = 20;
    if sys::is_bad_pointer(blocks.cast()) {
        return;
    }
    for i in 0..count.max(0) as usize {
        // SAFETY: as the caller says.
        unsafe {
            let block = *blocks.add(i);
            if !sys::is_bad_pointer(block) {
                give_up(
                    block
                        .cast::<u8>()
                        .add(FD_AT)
                        .cast::<c_int>()
                        .read_unaligned(),
                );
            }
        }
    }
}

/// libaio's, which makes the system call without libc.
///
/// # Safety
/// As `io_submit(3)`.
pub unsafe fn io_submit(
    context: *mut c_void,
    count: c_long,
    blocks: *const *const c_void,
) -> c_int {
    // SAFETY: arguments pass through.
    unsafe {
        submitting(count, blocks);
        real::io_submit(context, count, blocks)
    }
}

/// Before a ring of the kernel's is made: what it does to a connection, the shim does not see.
pub fn making_uring() {
    demote::abandon_all(Reason::IoUring);
    tenant::disable(Reason::IoUring);
}

/// liburing's, which makes its system calls without libc.
///
/// # Safety
/// As `io_uring_queue_init(3)`.
pub unsafe fn io_uring_queue_init(entries: c_uint, ring: *mut c_void, flags: c_uint) -> c_int {
    making_uring();
    // SAFETY: arguments pass through.
    unsafe { real::io_uring_queue_init(entries, ring, flags) }
}

/// # Safety
/// As `io_uring_queue_init_params(3)`.
pub unsafe fn io_uring_queue_init_params(
    entries: c_uint,
    ring: *mut c_void,
    params: *mut c_void,
) -> c_int {
    making_uring();
    // SAFETY: arguments pass through.
    unsafe { real::io_uring_queue_init_params(entries, ring, params) }
}

/// # Safety
/// As `io_uring_queue_init_mem(3)`.
pub unsafe fn io_uring_queue_init_mem(
    entries: c_uint,
    ring: *mut c_void,
    params: *mut c_void,
    memory: *mut c_void,
    size: usize,
) -> c_int {
    making_uring();
    // SAFETY: arguments pass through.
    unsafe { real::io_uring_queue_init_mem(entries, ring, params, memory, size) }
}

/// # Safety
/// As `io_uring_setup(2)`.
pub unsafe fn io_uring_setup(entries: c_uint, params: *mut c_void) -> c_int {
    making_uring();
    // SAFETY: arguments pass through.
    unsafe { real::io_uring_setup(entries, params) }
}
