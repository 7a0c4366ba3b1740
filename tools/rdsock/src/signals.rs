//! Rust's start-up ignores SIGPIPE; a program that is run shall find it as this process did, and
//! output that nobody reads any more shall end this one quietly.

use std::sync::atomic::{AtomicUsize, Ordering};

static FOUND: AtomicUsize = AtomicUsize::new(libc::SIG_DFL);

extern "C" fn look() {
    // SAFETY: sigaction with a null action only reads; zeroes are a value of the structure.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGPIPE, std::ptr::null(), &mut now) == 0 {
            FOUND.store(now.sa_sigaction, Ordering::Relaxed);
        }
    }
}

// SAFETY: a function pointer in the list of those that run before `main`, which is where one that
// has to come before Rust's own start-up belongs; it uses nothing of the Rust runtime.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

/// Puts SIGPIPE back.
pub fn restore() {
    // SAFETY: the disposition is one that this process was started with, so ignore or default.
    unsafe { libc::signal(libc::SIGPIPE, FOUND.load(Ordering::Relaxed)) };
}
