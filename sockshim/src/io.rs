//! Sending and receiving on a mapped stream. What cannot go over the ring is handed back as
//! [`Outcome::Kernel`], and the caller makes the same call on the anchor.

mod files;
mod receive;
mod send;
mod switch;

pub use files::{send_file, splice_in, splice_out};
pub use receive::{look_is_due, recv, take_error, unread};
pub use send::{after_kernel_send, answer_space, send, unsent};
pub use switch::{TcpInfo, anchor_is_dead, settle_switch, try_switch};

use crate::stream::Stream;
use crate::sys;
use libc::{c_int, iovec};
use std::sync::atomic::{AtomicU32, Ordering::*};

/// Bytes copied before they are published, so that the other end reads while this one writes.
const CHUNK: u64 = 16 * 1024;
/// The most that one call moves, as in Linux (`MAX_RW_COUNT`).
const MOST: usize = 0x7fff_f000;

/// A counter that is one higher while somebody is inside a kernel call.
#[derive(Debug)]
pub struct InKernel<'a>(&'a AtomicU32);

impl<'a> InKernel<'a> {
    /// Counts one in.
    pub fn enter(counter: &'a AtomicU32) -> Self {
        counter.fetch_add(1, SeqCst);
        InKernel(counter)
    }
}

impl Drop for InKernel<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

/// What became of a call.
#[derive(Debug)]
pub enum Outcome<'a> {
    /// The result: bytes, or a negated error number.
    Done(isize),
    /// To be made on the anchor, while this counts the caller in.
    Kernel(Option<InKernel<'a>>),
}

/// The program's buffers.
#[derive(Clone, Copy, Debug)]
pub struct Buffers {
    parts: *const iovec,
    count: usize,
    /// Bytes in all.
    pub total: usize,
}

impl Buffers {
    /// Checks an array of buffers: `Err` holds a negated error number.
    ///
    /// # Safety
    /// `parts` is null or points to `count` readable entries; what they describe stays valid.
    pub unsafe fn new(parts: *const iovec, count: usize, flags: c_int) -> Result<Self, isize> {
        let discards = flags & libc::MSG_TRUNC;
        let mut total = 0_usize;
        for i in 0..count {
            // SAFETY: the caller vouches for `count` entries.
            let part = unsafe { &*parts.add(i) };
            if part.iov_len > isize::MAX as usize {
                return Err(-(libc::EINVAL as isize));
            }
            if part.iov_len != 0 && discards == 0 && sys::is_bad_pointer(part.iov_base) {
                return Err(-(libc::EFAULT as isize));
            }
            total = total.saturating_add(part.iov_len);
        }
        Ok(Buffers {
            parts,
            count,
            total: total.min(MOST),
        })
    }

    /// Calls `piece(address, length, bytes before it)` for the bytes `from..from + len`.
    #[inline]
    fn each(&self, from: usize, len: usize, mut piece: impl FnMut(*mut u8, usize, u64)) {
        let (mut start, end) = (0_usize, from + len);
        for i in 0..self.count {
            // SAFETY: `new` was promised `count` entries.
            let part = unsafe { &*self.parts.add(i) };
            let (low, high) = (from.max(start), end.min(start + part.iov_len));
            if low < high {
                piece(
                    part.iov_base.cast::<u8>().wrapping_add(low - start),
                    high - low,
                    (low - from) as u64,
                );
            }
            start += part.iov_len;
            if start >= end {
                return;
            }
        }
    }
}

const AGAIN: isize = -(libc::EAGAIN as isize);
const PIPE: isize = -(libc::EPIPE as isize);
const BROKEN: isize = -(libc::ECONNRESET as isize);

fn is_nonblocking(stream: &Stream, flags: c_int) -> bool {
    flags & libc::MSG_DONTWAIT != 0 || stream.end().nonblock.load(Relaxed) != 0
}

/// EPIPE, with the signal unless the call forbids it.
fn broken_pipe(flags: c_int) -> isize {
    if flags & libc::MSG_NOSIGNAL == 0 {
        sys::raise(libc::SIGPIPE);
    }
    PIPE
}
