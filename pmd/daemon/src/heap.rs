//! The allocator, as the control thread needs it: it changes no mappings of the process, which could have to wait for another thread
//! that does (see `starter.rs`). `main.rs` and the relay call this.

use std::hint::black_box;

/// Bytes that a thread can have without asking the kernel for more.
const READY: usize = 16 << 20;
/// What is larger gets a mapping of its own. The most that the allocator knows.
const LARGE: i32 = 32 << 20;
/// Each thread has a heap of its own: more than there are threads.
const HEAPS: i32 = 512;

/// Before there is another thread.
pub fn prepare() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes integers, and no other thread allocates.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        libc::mallopt(libc::M_ARENA_MAX, HEAPS);
    }
}

/// For a thread that is, or will be, the control thread: its heap has grown, and what it gives back it can have again.
pub fn grow() {
    drop(black_box(Vec::<u8>::with_capacity(black_box(READY))));
}
