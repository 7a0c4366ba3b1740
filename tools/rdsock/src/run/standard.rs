//! The standard descriptors as this program was started with them. Rust's runtime opens `/dev/null` for each that is
//! closed; the program that `rdsock run` becomes gets it closed, as it would plain.

use std::sync::atomic::{AtomicU32, Ordering};

/// A bit for each of 0, 1 and 2 that was closed.
static CLOSED: AtomicU32 = AtomicU32::new(0);

#[used]
#[unsafe(link_section = ".init_array")]
static NOTE: extern "C" fn() = note;

/// Called by the loader, before Rust's runtime.
extern "C" fn note() {
    for fd in 0..3 {
        // SAFETY: asks for the flags of a number.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            CLOSED.fetch_or(1 << fd, Ordering::Relaxed);
        }
    }
}

/// What was closed is closed again when this process becomes another program.
pub fn close_again_at_exec() {
    let closed = CLOSED.load(Ordering::Relaxed);
    for fd in (0..3).filter(|fd| closed & 1 << fd != 0) {
        // SAFETY: sets a flag of a number; what is open there is the runtime's /dev/null.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
}
