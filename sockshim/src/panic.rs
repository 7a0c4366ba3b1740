//! The end of the process that a fault of the shim's own would bring: it never panics, but the compiler wants to know. With
//! assertions (a debug build) it does, and says which.

use crate::sys;
use core::fmt::{self, Write};

/// The standard error output.
struct Stderr;

impl Write for Stderr {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        sys::print_error(text);
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    if cfg!(debug_assertions) {
        let _ = writeln!(Stderr, "rdsock: {info}");
    }
    loop {
        sys::raise(libc::SIGABRT);
    }
}
