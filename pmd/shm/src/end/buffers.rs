//! The buffers of a call: where bytes come from or go to.

use libc::iovec;

/// The most that one call moves, as in Linux (`MAX_RW_COUNT`).
pub const MOST: usize = 0x7fff_f000;

/// A program's buffers.
#[derive(Clone, Copy, Debug)]
pub struct Buffers {
    parts: *const iovec,
    count: usize,
    /// Bytes in all, at most [`MOST`].
    pub total: usize,
}

impl Buffers {
    /// The buffers that these entries describe. `check` may refuse one of them.
    ///
    /// # Safety
    /// `parts` points to `count` readable entries; they, and what they describe, stay valid as long as this is used.
    #[inline]
    pub unsafe fn new<E>(
        parts: *const iovec,
        count: usize,
        check: impl Fn(&iovec) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut total = 0_usize;
        for i in 0..count {
            // SAFETY: the caller vouches for `count` entries.
            let part = unsafe { &*parts.add(i) };
            check(part)?;
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
    pub fn each(&self, from: usize, len: usize, mut piece: impl FnMut(*mut u8, usize, u64)) {
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
