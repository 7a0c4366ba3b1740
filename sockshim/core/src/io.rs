//! Sending and receiving on a mapped stream: the calls of a program, made of the steps of `rdsock_shm::end`. What cannot go
//! over the ring is handed back as [`Outcome::Kernel`], and the caller makes the same call on the anchor.

mod files;
mod receive;
mod send;

pub use files::{send_file, splice_in, splice_out};
pub use receive::{look_is_due, recv, take_error, unread};
pub use send::{after_kernel_send, send, unsent};

use crate::stream::Stream;
use crate::sys;
use libc::{c_int, iovec};
use rdsock_shm::end::Shared;
pub use rdsock_shm::end::{Buffers, Counted as InKernel};
use std::sync::atomic::Ordering::*;

/// What became of a call.
#[derive(Debug)]
pub enum Outcome<'a> {
    /// The result: bytes, or a negated error number.
    Done(isize),
    /// To be made on the anchor, while this counts the caller in.
    Kernel(Option<InKernel<'a>>),
}

/// Checks an array of buffers: `Err` holds a negated error number.
///
/// # Safety
/// `parts` is null or points to `count` readable entries; what they describe stays valid.
#[inline]
pub unsafe fn buffers(parts: *const iovec, count: usize, flags: c_int) -> Result<Buffers, isize> {
    let discards = flags & libc::MSG_TRUNC;
    let check = |part: &iovec| {
        if part.iov_len > isize::MAX as usize {
            return Err(-(libc::EINVAL as isize));
        }
        if part.iov_len != 0 && discards == 0 && sys::is_bad_pointer(part.iov_base) {
            return Err(-(libc::EFAULT as isize));
        }
        Ok(())
    };
    // SAFETY: the caller vouches for the entries.
    unsafe { Buffers::new(parts, count, check) }
}

const AGAIN: isize = -(libc::EAGAIN as isize);
const PIPE: isize = -(libc::EPIPE as isize);
const BROKEN: isize = -(libc::ECONNRESET as isize);

fn is_nonblocking(stream: &Shared, flags: c_int) -> bool {
    flags & libc::MSG_DONTWAIT != 0 || stream.page().nonblock.load(Relaxed) != 0
}

/// EPIPE, with the signal unless the call forbids it.
fn broken_pipe(flags: c_int) -> isize {
    if flags & libc::MSG_NOSIGNAL == 0 {
        sys::raise(libc::SIGPIPE);
    }
    PIPE
}
