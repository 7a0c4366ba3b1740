//! The byte rings: one for each direction of a stream, one producer end, one consumer end.
//!
//! Positions are 64-bit and count the bytes of the direction from the connection's birth; position
//! `p` lies at offset `(p - origin) mod size`. The producer moves `origin` to its position when the
//! ring is empty and half a page of it was used, so a request-reply stream stays in a few lines of
//! cache, while a stream that keeps its ring full uses all of it.
//!
//! Each half-type is used under its half's lock ([`crate::lock`]). A signal handler may run the
//! same code on the same half between any two instructions ("nested"), so:
//! - the sender *reserves* with a compare-and-swap before it copies; a nested sender reserves
//!   behind it, and never moves the origin; the outer one publishes for both, when it has copied;
//! - the receiver copies first and then *consumes* with a compare-and-swap; when a nested receiver
//!   took the bytes meanwhile, it copies again from the new position.
//!
//! What the other end writes is read once and checked; [`Violation`] means: break the stream.

use crate::layout::{Direction, NOT_SWITCHED, RxState, TxState};
use crate::sync::{AtomicU64, Ordering};

/// The other end wrote a position that cannot be. Consequence: the stream is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation;

/// Set in [`TxState::head`] while the sender moves its origin.
const REWINDING: u64 = 1 << 63;

/// The position that [`TxState::head`] holds.
#[inline]
pub(crate) const fn position(head: u64) -> u64 {
    head & !REWINDING
}

/// Bytes after which a sender looks whether the ring is empty, to start at offset 0 again.
pub const REWIND_AFTER: u64 = if cfg!(loom) { 4 } else { 2048 };

/// A sender starts again only for a message that is shorter than this fraction of the ring: a
/// stream of long ones gains nothing from few lines.
const REWIND_BELOW: u64 = if cfg!(loom) { 2 } else { 64 };

/// Bytes ahead of those that are written now, of which a sender asks for the line: it was last in
/// the consumer's cache, and the sender's next locked instruction would wait until it has come.
const PREFETCH_AHEAD: u64 = 256;

/// A consumer looks for a waiting producer each time it has crossed this fraction of the ring.
const SPACE_CHECKS_PER_RING: u64 = 8;

/// The memory of one ring.
#[derive(Clone, Copy, Debug)]
pub struct RingMemory {
    #[cfg(not(loom))]
    start: *mut u8,
    #[cfg(loom)]
    start: *const loom::cell::UnsafeCell<u8>,
    mask: u64,
}

// SAFETY: the memory is only touched through raw copies at offsets below the size, by halves whose
// users take turns; sharing the address is harmless.
unsafe impl Send for RingMemory {}
// SAFETY: as above.
unsafe impl Sync for RingMemory {}

impl RingMemory {
    /// # Safety
    /// `start` is valid for reads and writes of `size` bytes for as long as this value or a copy
    /// of it is used, and `size` is a power of two. No reference to the memory exists.
    #[cfg(not(loom))]
    pub const unsafe fn new(start: *mut u8, size: u64) -> Self {
        RingMemory {
            start,
            mask: size - 1,
        }
    }

    /// # Safety
    /// As above; loom's cells stand for the bytes, so that it sees every race on them.
    #[cfg(loom)]
    pub unsafe fn new(start: *const loom::cell::UnsafeCell<u8>, size: u64) -> Self {
        RingMemory {
            start,
            mask: size - 1,
        }
    }

    /// Bytes of the ring.
    pub const fn size(self) -> u64 {
        self.mask + 1
    }

    /// The pieces of `len` bytes at `offset`: each an offset and a length, the second maybe empty.
    #[cfg(not(loom))]
    fn pieces(self, offset: u64, len: usize) -> [(usize, usize); 2] {
        let start = (offset & self.mask) as usize;
        let first = len.min(self.size() as usize - start);
        [(start, first), (0, (len - first).min(self.size() as usize))]
    }

    /// # Safety
    /// `from` is valid for reads of `len` bytes; `len` is at most the ring's size.
    #[cfg(not(loom))]
    unsafe fn write(self, offset: u64, from: *const u8, len: usize) {
        let [(a, n), (b, m)] = self.pieces(offset, len);
        // SAFETY: the pieces lie inside the ring, the caller vouches for `from`; a program's
        // buffer does not overlap a ring.
        unsafe {
            std::ptr::copy_nonoverlapping(from, self.start.add(a), n);
            if m != 0 {
                std::ptr::copy_nonoverlapping(from.add(n), self.start.add(b), m);
            }
        }
    }

    /// # Safety
    /// `to` is valid for writes of `len` bytes; `len` is at most the ring's size.
    #[cfg(not(loom))]
    unsafe fn read(self, offset: u64, to: *mut u8, len: usize) {
        let [(a, n), (b, m)] = self.pieces(offset, len);
        // SAFETY: as in `write`.
        unsafe {
            std::ptr::copy_nonoverlapping(self.start.add(a), to, n);
            if m != 0 {
                std::ptr::copy_nonoverlapping(self.start.add(b), to.add(n), m);
            }
        }
    }

    #[cfg(loom)]
    unsafe fn write(self, offset: u64, from: *const u8, len: usize) {
        for i in 0..len {
            // SAFETY: the offset is masked; the caller vouches for `from`; loom sees every race.
            unsafe {
                (*self.start.add(((offset + i as u64) & self.mask) as usize))
                    .with_mut(|byte| *byte = *from.add(i));
            }
        }
    }

    #[cfg(loom)]
    unsafe fn read(self, offset: u64, to: *mut u8, len: usize) {
        for i in 0..len {
            // SAFETY: as above.
            unsafe {
                *to.add(i) = (*self.start.add(((offset + i as u64) & self.mask) as usize))
                    .with(|byte| *byte);
            }
        }
    }

    /// Asks for the line at `offset`, to be written soon.
    #[inline(always)]
    fn prefetch_for_write(self, offset: u64) {
        #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
        // SAFETY: a hint, for a line of the ring.
        unsafe {
            let line = self.start.add((offset & self.mask) as usize);
            std::arch::asm!("prefetchw [{line}]", line = in(reg) line,
                options(nostack, preserves_flags, readonly));
        }
        #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
        let _ = offset;
    }

    /// A contiguous piece at `offset`, for system calls that read or write the ring directly.
    #[cfg(not(loom))]
    fn piece(self, offset: u64, len: u64) -> (*mut u8, usize) {
        let [(start, first), _] = self.pieces(offset, len.min(self.size()) as usize);
        // SAFETY: the piece lies inside the ring.
        (unsafe { self.start.add(start) }, first)
    }
}

/// Compare-and-swap against code that runs nested on this very thread: on x86-64 an instruction
/// without a bus lock does, since other threads are kept away by the half's lock.
#[inline]
pub(crate) fn swap_if(word: &AtomicU64, old: u64, new: u64) -> bool {
    #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
    {
        let equal: u8;
        // SAFETY: `word` is a valid, aligned u64; the instruction reads and writes only it.
        unsafe {
            std::arch::asm!("cmpxchg [{word}], {new}", "sete {equal}",
                word = in(reg) word.as_ptr(), new = in(reg) new, equal = out(reg_byte) equal,
                inout("rax") old => _, options(nostack));
        }
        equal != 0
    }
    #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
    {
        word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }
}

/// The producer's half, used under [`TxState::lock`].
#[derive(Clone, Copy, Debug)]
pub struct Sender<'a> {
    own: &'a TxState,
    wire: &'a Direction,
    ring: RingMemory,
    nested: bool,
}

/// Space that was reserved at a position: fill it, then publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// Position of the first byte.
    pub at: u64,
    /// Bytes, at least 1.
    pub len: u64,
}

impl<'a> Sender<'a> {
    /// `nested` as [`crate::lock::Taken`] says.
    #[inline]
    pub fn new(own: &'a TxState, wire: &'a Direction, ring: RingMemory, nested: bool) -> Self {
        Sender {
            own,
            wire,
            ring,
            nested,
        }
    }

    /// Moves this direction to the ring: the byte at position `at` is the first to travel on it.
    pub fn switch(&self, at: u64) {
        self.own.head.store(at, Ordering::Relaxed);
        self.own.origin.store(at, Ordering::Relaxed);
        self.own.seen_tail.store(at, Ordering::Relaxed);
        self.own.published.store(at, Ordering::Relaxed);
        self.wire.producer.origin.store(at, Ordering::Relaxed);
        self.wire.producer.head.store(at, Ordering::Relaxed);
        self.wire.producer.switch_at.store(at, Ordering::Release);
    }

    /// Moves this direction to a ring that something else fills, which keeps each position at its number modulo the size, and
    /// stores the head word itself: see [`crate::end::Process::IN_PLACE`].
    pub fn switch_in_place(&self, at: u64) {
        self.own.seen_tail.store(at, Ordering::Relaxed);
        self.wire.producer.origin.store(0, Ordering::Relaxed);
        self.wire.producer.switch_at.store(at, Ordering::Release);
    }

    /// After the lock was taken from a dead process: forgets what that had not published. Its
    /// last step may have been to note a publication that it did not make any more.
    pub fn recover(&self) {
        // The origin was moved only if the ring was empty: wherever it is now, it stays.
        let published = self.own.published.load(Ordering::Relaxed);
        self.own.head.store(published, Ordering::Relaxed);
        self.publish();
    }

    /// Looks at the consumer's position.
    fn refresh(&self, head: u64) -> Result<u64, Violation> {
        let seen = self.own.seen_tail.load(Ordering::Relaxed);
        let tail = self.wire.consumer.tail.load(Ordering::Acquire).max(seen);
        if tail > head {
            return Err(Violation);
        }
        self.own.seen_tail.store(tail, Ordering::Relaxed);
        Ok(tail)
    }

    /// Free bytes, looked up afresh.
    pub fn space(&self) -> Result<u64, Violation> {
        let head = position(self.own.head.load(Ordering::Relaxed));
        let tail = self.refresh(head)?;
        Ok(self.ring.size().saturating_sub(head - tail))
    }

    /// True when nothing is in the ring that the consumer has not taken.
    pub fn is_empty(&self) -> Result<bool, Violation> {
        Ok(self.space()? == self.ring.size())
    }

    /// Reserves up to `len` bytes; `None` when the ring is full.
    #[inline]
    pub fn reserve(&self, len: u64) -> Result<Option<Reserved>, Violation> {
        let size = self.ring.size();
        loop {
            let head = self.own.head.load(Ordering::Relaxed);
            if head & REWINDING != 0 {
                // Only a nested sender comes here: it finishes the move for the outer one.
                self.finish_rewind(head);
                continue;
            }
            let mut tail = self.own.seen_tail.load(Ordering::Relaxed);
            let used = head.wrapping_sub(self.own.origin.load(Ordering::Relaxed));
            if used >= REWIND_AFTER
                && used % REWIND_AFTER < len
                && !self.nested
                && len < size / REWIND_BELOW
            {
                tail = self.refresh(head)?;
                if tail == head && swap_if(&self.own.head, head, head | REWINDING) {
                    self.finish_rewind(head | REWINDING);
                    continue;
                }
            }
            let mut space = size.saturating_sub(head.wrapping_sub(tail));
            if space < len {
                tail = self.refresh(head)?;
                space = size.saturating_sub(head.wrapping_sub(tail));
            }
            let len = len.min(space);
            if len == 0 {
                return Ok(None);
            }
            if swap_if(&self.own.head, head, head + len) {
                if space - len > 2 * PREFETCH_AHEAD {
                    self.ring.prefetch_for_write(
                        head.wrapping_add(len + PREFETCH_AHEAD)
                            .wrapping_sub(self.own.origin.load(Ordering::Relaxed)),
                    );
                }
                return Ok(Some(Reserved { at: head, len }));
            }
        }
    }

    fn finish_rewind(&self, head: u64) {
        self.own.origin.store(position(head), Ordering::Relaxed);
        swap_if(&self.own.head, head, position(head));
    }

    /// Copies into reserved space, `skip` bytes after its start.
    ///
    /// # Safety
    /// `from` is valid for reads of `len` bytes.
    #[inline]
    pub unsafe fn fill(&self, reserved: Reserved, skip: u64, from: *const u8, len: usize) {
        let origin = self.own.origin.load(Ordering::Relaxed);
        let offset = reserved.at.wrapping_add(skip).wrapping_sub(origin);
        // SAFETY: the caller vouches for `from`; `len` is bounded by the reservation.
        unsafe {
            self.ring.write(
                offset,
                from,
                len.min((reserved.len - skip.min(reserved.len)) as usize),
            )
        }
    }

    /// The first contiguous piece of reserved space, for a system call that fills it.
    #[cfg(not(loom))]
    pub fn piece(&self, reserved: Reserved) -> (*mut u8, usize) {
        self.ring.piece(
            reserved
                .at
                .wrapping_sub(self.own.origin.load(Ordering::Relaxed)),
            reserved.len,
        )
    }

    /// Gives back the end of the latest reservation, of which only `used` bytes were filled.
    /// False when a nested sender has reserved behind it, so that nothing can be given back.
    pub fn give_back(&self, reserved: Reserved, used: u64) -> bool {
        swap_if(
            &self.own.head,
            reserved.at + reserved.len,
            reserved.at + used,
        )
    }

    /// Publishes all that was reserved and filled. A nested sender leaves it to the outer one.
    #[inline]
    pub fn publish(&self) {
        if self.nested {
            return;
        }
        loop {
            let head = self.own.head.load(Ordering::Relaxed);
            let producer = &self.wire.producer;
            producer
                .origin
                .store(self.own.origin.load(Ordering::Relaxed), Ordering::Relaxed);
            // First the own note, for `recover`: all up to here is filled.
            self.own.published.store(head, Ordering::Release);
            producer.head.store(head, Ordering::Release);
            if !self.is_behind() {
                return;
            }
        }
    }

    /// True when a nested sender has left something to publish.
    #[inline]
    pub fn is_behind(&self) -> bool {
        self.own.head.load(Ordering::Relaxed) != self.own.published.load(Ordering::Relaxed)
    }

    /// The position after the last reserved byte.
    pub fn head(&self) -> u64 {
        position(self.own.head.load(Ordering::Relaxed))
    }

    /// Gives `send` a piece of what was published from position `from` on, to send it again elsewhere: contiguous;
    /// nothing at `head`. A violation when `from` is not in the ring.
    pub fn with_published<T>(
        &self,
        from: u64,
        send: impl FnOnce(*const u8, usize) -> T,
    ) -> Result<Option<T>, Violation> {
        let (offset, len) = self.published_at(from)?;
        Ok(self.with_piece(offset, len, send))
    }

    /// As [`Self::with_published`], of a ring that something else fills: what it has told of, up to [`Self::head`]. It may
    /// have filled more.
    pub fn with_filled<T>(
        &self,
        from: u64,
        send: impl FnOnce(*const u8, usize) -> T,
    ) -> Result<Option<T>, Violation> {
        let len = self.head().saturating_sub(from);
        if !self.is_filled(from) || len > self.ring.size() {
            return Err(Violation);
        }
        Ok(self.with_piece(from, len, send))
    }

    /// True when a consumer can have come to this position of a ring that something else fills.
    pub fn is_filled(&self, at: u64) -> bool {
        let head = self.wire.producer.head.load(Ordering::Acquire);
        at >= self.own.seen_tail.load(Ordering::Relaxed) && at <= head.max(self.head())
    }

    /// Gives `send` a contiguous piece of these bytes, if there are any.
    fn with_piece<T>(
        &self,
        offset: u64,
        len: u64,
        send: impl FnOnce(*const u8, usize) -> T,
    ) -> Option<T> {
        if len == 0 {
            return None;
        }
        #[cfg(not(loom))]
        {
            let (start, len) = self.ring.piece(offset, len);
            Some(send(start, len))
        }
        #[cfg(loom)]
        {
            let mut bytes = vec![0; len as usize];
            // SAFETY: the buffer has `len` bytes.
            unsafe { self.ring.read(offset, bytes.as_mut_ptr(), bytes.len()) };
            Some(send(bytes.as_ptr(), bytes.len()))
        }
    }

    /// Offset and length of what was published from position `from` on.
    fn published_at(&self, from: u64) -> Result<(u64, u64), Violation> {
        let head = self.head();
        let tail = self.own.seen_tail.load(Ordering::Relaxed);
        if from < tail || from > head {
            return Err(Violation);
        }
        let offset = from.wrapping_sub(self.own.origin.load(Ordering::Relaxed));
        Ok((offset, head - from))
    }
}

/// The consumer's half, used under [`RxState::lock`].
#[derive(Clone, Copy, Debug)]
pub struct Receiver<'a> {
    own: &'a RxState,
    wire: &'a Direction,
    ring: RingMemory,
    nested: bool,
}

/// Published bytes at a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Available {
    /// Position of the first byte.
    pub at: u64,
    /// Bytes, at least 1.
    pub len: u64,
    offset: u64,
}

impl<'a> Receiver<'a> {
    /// `nested` as [`crate::lock::Taken`] says.
    #[inline]
    pub fn new(own: &'a RxState, wire: &'a Direction, ring: RingMemory, nested: bool) -> Self {
        Receiver {
            own,
            wire,
            ring,
            nested,
        }
    }

    /// The producer's switch position, if it has switched.
    pub fn switch_at(wire: &Direction) -> Option<u64> {
        let at = wire.producer.switch_at.load(Ordering::Acquire);
        (at != NOT_SWITCHED).then_some(at)
    }

    /// Begins to read the ring at the switch position.
    pub fn switch(&self, at: u64) {
        self.own.tail.store(at, Ordering::Relaxed);
        self.own.seen_head.store(at, Ordering::Relaxed);
        self.own.published.store(at, Ordering::Relaxed);
        self.wire.consumer.tail.store(at, Ordering::Release);
    }

    /// What can be read now.
    #[inline]
    pub fn available(&self) -> Result<Option<Available>, Violation> {
        let tail = self.own.tail.load(Ordering::Relaxed);
        let mut head = self.own.seen_head.load(Ordering::Relaxed);
        if head == tail {
            head = self.refresh(tail)?;
            if head == tail {
                return Ok(None);
            }
        }
        let origin = self.wire.producer.origin.load(Ordering::Relaxed);
        Ok(Some(Available {
            at: tail,
            len: head.wrapping_sub(tail),
            offset: tail.wrapping_sub(origin),
        }))
    }

    /// Looks at the producer's position.
    fn refresh(&self, tail: u64) -> Result<u64, Violation> {
        let head = self.wire.producer.head.load(Ordering::Acquire);
        if head.wrapping_sub(tail) > self.ring.size() {
            return Err(Violation);
        }
        self.own.seen_head.store(head, Ordering::Relaxed);
        Ok(head)
    }

    /// Everything that is in the ring, looked up afresh.
    pub fn available_now(&self) -> Result<Option<Available>, Violation> {
        self.refresh(self.own.tail.load(Ordering::Relaxed))?;
        self.available()
    }

    /// What lies in the ring from position `at` on, before this half begins to read there.
    pub fn available_from(&self, at: u64) -> Result<Option<Available>, Violation> {
        let producer = &self.wire.producer;
        let len = producer.head.load(Ordering::Acquire).wrapping_sub(at);
        if len > self.ring.size() {
            return Err(Violation);
        }
        let offset = at.wrapping_sub(producer.origin.load(Ordering::Relaxed));
        Ok((len != 0).then_some(Available { at, len, offset }))
    }

    /// Copies out of available bytes, `skip` bytes after their start.
    ///
    /// # Safety
    /// `to` is valid for writes of `len` bytes.
    #[inline]
    pub unsafe fn copy(&self, from: Available, skip: u64, to: *mut u8, len: usize) {
        // SAFETY: the caller vouches for `to`; `len` is bounded by what is available, which is at
        // most the ring's size.
        unsafe {
            self.ring.read(
                from.offset.wrapping_add(skip),
                to,
                len.min((from.len - skip.min(from.len)) as usize),
            );
        }
    }

    /// The first contiguous piece of available bytes, for a system call that reads it.
    #[cfg(not(loom))]
    pub fn piece(&self, from: Available) -> (*const u8, usize) {
        let (start, len) = self.ring.piece(from.offset, from.len);
        (start, len)
    }

    /// Takes the first `len` bytes off the ring. False when a nested receiver was here since:
    /// then what was copied belongs to that one, and the caller starts again.
    #[inline]
    pub fn consume(&self, from: Available, len: u64) -> bool {
        swap_if(&self.own.tail, from.at, from.at + len.min(from.len))
    }

    /// Publishes what was consumed. True when the producer may be waiting for space, so that the
    /// caller must look at its request.
    #[inline]
    pub fn publish(&self) -> bool {
        if self.nested {
            return false;
        }
        let before = self.own.published.load(Ordering::Relaxed);
        loop {
            let tail = self.own.tail.load(Ordering::Relaxed);
            self.own.published.store(tail, Ordering::Relaxed);
            self.wire.consumer.tail.store(tail, Ordering::Release);
            if !self.is_behind() {
                let part = self.ring.size() / SPACE_CHECKS_PER_RING;
                return before / part != tail / part;
            }
        }
    }

    /// True when a nested receiver has left something to publish.
    #[inline]
    pub fn is_behind(&self) -> bool {
        self.own.tail.load(Ordering::Relaxed) != self.own.published.load(Ordering::Relaxed)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    struct Bench {
        tx: Box<TxState>,
        rx: Box<RxState>,
        wire: Box<Direction>,
        memory: Box<[u8]>,
    }

    impl Bench {
        fn new(size: usize) -> Self {
            // SAFETY: the structures are made of integers; zeroes are a value.
            unsafe {
                Bench {
                    tx: Box::new(std::mem::zeroed()),
                    rx: Box::new(std::mem::zeroed()),
                    wire: Box::new(std::mem::zeroed()),
                    memory: vec![0; size].into(),
                }
            }
        }

        fn ends(&mut self) -> (Sender<'_>, Receiver<'_>) {
            // SAFETY: the memory outlives both and is not otherwise touched.
            let ring =
                unsafe { RingMemory::new(self.memory.as_mut_ptr(), self.memory.len() as u64) };
            (
                Sender::new(&self.tx, &self.wire, ring, false),
                Receiver::new(&self.rx, &self.wire, ring, false),
            )
        }
    }

    fn send(sender: &Sender, bytes: &[u8]) -> usize {
        let Some(reserved) = sender.reserve(bytes.len() as u64).unwrap() else {
            return 0;
        };
        // SAFETY: the slice is valid and at least as long as the reservation.
        unsafe { sender.fill(reserved, 0, bytes.as_ptr(), reserved.len as usize) };
        sender.publish();
        reserved.len as usize
    }

    fn receive(receiver: &Receiver, most: usize) -> Vec<u8> {
        let Some(available) = receiver.available().unwrap() else {
            return Vec::new();
        };
        let len = most.min(available.len as usize);
        let mut bytes = vec![0; len];
        // SAFETY: the buffer has `len` bytes.
        unsafe { receiver.copy(available, 0, bytes.as_mut_ptr(), len) };
        assert!(receiver.consume(available, len as u64));
        receiver.publish();
        bytes
    }

    #[test]
    fn bytes_come_out_as_they_went_in() {
        let (size, rounds) = if cfg!(miri) {
            (1 << 12, 40)
        } else {
            (1 << 16, 20_000)
        };
        let mut bench = Bench::new(size);
        let (sender, receiver) = bench.ends();
        sender.switch(12_345);
        receiver.switch(Receiver::switch_at(sender.wire).unwrap());
        let mut model = VecDeque::new();
        let mut next = 0_u32;
        let mut random = 1_u64;
        for _ in 0..rounds {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let len = (random >> 33) as usize % if random & 1 == 0 { 100 } else { size / 3 };
            if random & 2 == 0 {
                let bytes: Vec<u8> = (0..len)
                    .map(|_| {
                        next += 1;
                        next as u8
                    })
                    .collect();
                let sent = send(&sender, &bytes);
                assert_eq!(sent, len.min(size - model.len()));
                next -= (len - sent) as u32;
                model.extend(&bytes[..sent]);
            } else {
                let bytes = receive(&receiver, len);
                let expected: Vec<u8> = model.drain(..bytes.len()).collect();
                assert_eq!(bytes, expected);
            }
        }
    }

    #[test]
    fn a_stream_that_runs_empty_stays_in_few_lines() {
        let mut bench = Bench::new(1 << 14);
        let (sender, receiver) = bench.ends();
        let rounds = if cfg!(miri) { 200 } else { 10_000 };
        for _ in 0..rounds {
            send(&sender, &[7; 64]);
            assert_eq!(receive(&receiver, 64).len(), 64);
        }
        let touched = bench.memory.iter().filter(|byte| **byte != 0).count() as u64;
        assert!(touched <= REWIND_AFTER + 64, "{touched} bytes touched");
    }

    #[test]
    fn impossible_positions_are_violations() {
        let mut bench = Bench::new(4096);
        let (sender, receiver) = bench.ends();
        send(&sender, &[1; 100]);
        for tail in [101, u64::MAX, 1 << 63] {
            sender.wire.consumer.tail.store(tail, Ordering::Relaxed);
            assert_eq!(sender.space(), Err(Violation));
        }
        for head in [4097, u64::MAX, 1 << 63] {
            receiver.wire.producer.head.store(head, Ordering::Relaxed);
            assert_eq!(receiver.available(), Err(Violation));
        }
        // Any origin is only an offset.
        receiver.wire.producer.head.store(4096, Ordering::Relaxed);
        receiver
            .wire
            .producer
            .origin
            .store(u64::MAX - 77, Ordering::Relaxed);
        assert_eq!(receive(&receiver, 10_000).len(), 4096);
    }

    #[test]
    fn nested_halves_lose_nothing() {
        let mut bench = Bench::new(4096);
        let (sender, receiver) = bench.ends();
        let nested = Sender {
            nested: true,
            ..sender
        };
        let outer = sender.reserve(4).unwrap().unwrap();
        assert_eq!(send(&nested, b"nest"), 4);
        assert_eq!(receive(&receiver, 100), b"");
        // SAFETY: four valid bytes.
        unsafe { sender.fill(outer, 0, b"outr".as_ptr(), 4) };
        assert!(!sender.give_back(outer, 0));
        sender.publish();
        let seen = receiver.available().unwrap().unwrap();
        let inner = Receiver {
            nested: true,
            ..receiver
        };
        assert_eq!(receive(&inner, 4), b"outr");
        assert!(!receiver.consume(seen, 8));
        assert_eq!(receive(&receiver, 100), b"nest");
    }
}
