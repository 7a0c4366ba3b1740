//! `floor-ring`: a bare ring between two processes, one producer and one consumer, nothing else.
//!
//! The producer copies a message in and publishes the tail; the consumer copies out what there is and publishes the
//! head. Tail and head have lines of their own and each side remembers the other's. Both processes are ours, so
//! nothing read from the shared memory is checked: this is the floor, not an example.

use super::memory::{Fork, Shared};
use crate::clock::Clock;
use crate::core_pin;
use crate::error::Result;
use crate::latency::Latencies;
use crate::outcome::Outcome;
use crate::plan::{FloorPlan, Mode, Wait};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Bytes before the ring itself: tail, head and results, each on a pair of lines.
const HEADER: usize = 512;
const TAIL: usize = 0;
const HEAD: usize = 128;
const BYTES: usize = 256;
const TICKS: usize = 384;

/// Ring sizes for one-way modes, from which the best counts.
const ONE_WAY_SIZES: [usize; 8] = [
    64 << 10,
    128 << 10,
    256 << 10,
    512 << 10,
    1 << 20,
    2 << 20,
    4 << 20,
    8 << 20,
];
/// Ring sizes for round trips: request and reply want few lines.
const ROUND_TRIP_SIZES: [usize; 2] = [1 << 10, 16 << 10];
/// Least bytes that the consumer copies out at once, where there are so many; as the sockets' server does.
const PIECE: usize = 64 << 10;

/// Measures each suitable ring size for a share of the time; the best is the result.
pub fn run(plan: &FloorPlan, clock: &Clock) -> Result<Outcome> {
    let sizes = if plan.mode == Mode::Rtt {
        &ROUND_TRIP_SIZES[..]
    } else {
        &ONE_WAY_SIZES[..]
    };
    let mut sizes: Vec<usize> = sizes
        .iter()
        .copied()
        .filter(|&size| size >= plan.size)
        .collect();
    if sizes.is_empty() {
        sizes.push(plan.size.next_power_of_two());
    }
    let time = plan
        .seconds
        .div_f64(sizes.len() as f64)
        .max(Duration::from_millis(50));
    let mut best: Option<Outcome> = None;
    for bytes in sizes {
        let mut outcome = match plan.mode {
            Mode::Rtt => round_trip(plan, bytes, time, clock)?,
            _ => one_way(plan, bytes, time, clock)?,
        };
        outcome.ring_bytes = Some(bytes as u64);
        if best.as_ref().is_none_or(|best| is_better(&outcome, best)) {
            best = Some(outcome);
        }
    }
    Ok(best.expect("there is at least one size"))
}

/// A lower median where there is one, else more each second.
fn is_better(new: &Outcome, old: &Outcome) -> bool {
    match (new.p50_ns, old.p50_ns) {
        (Some(new), Some(old)) => new < old,
        _ => new.per_s > old.per_s,
    }
}

/// Ping-pong over two rings.
fn round_trip(plan: &FloorPlan, bytes: usize, time: Duration, clock: &Clock) -> Result<Outcome> {
    let rings = [Ring::new(bytes)?, Ring::new(bytes)?];
    let _echo = Fork::start(|| {
        let _ = core_pin::pin(Some(plan.cores.server));
        let (mut from, mut to) = (rings[0].consumer(), rings[1].producer());
        let mut message = vec![0; plan.size];
        loop {
            from.pop_exact(&mut message);
            to.push(&message);
        }
    })?;
    core_pin::pin(Some(plan.cores.client))?;
    let (mut to, mut from) = (rings[0].producer(), rings[1].consumer());
    let mut samples = Latencies::preallocated();
    let (message, mut answer) = (vec![1; plan.size], vec![0; plan.size]);
    let mut trip = || {
        to.push(&message);
        from.pop_exact(&mut answer);
    };
    let warm = clock.now() + clock.ticks(time / 10);
    while clock.now() < warm {
        trip();
    }
    let start = clock.now();
    let end = start + clock.ticks(time);
    let mut now = start;
    while now < end {
        let before = clock.now();
        trip();
        now = clock.now();
        samples.record(clock.ns(now - before));
    }
    let seconds = clock.ns(now - start) as f64 / 1e9;
    Ok(Outcome::of_latencies(
        Mode::Rtt,
        Wait::Spin,
        plan.size as u64,
        &samples,
        seconds,
        clock,
    ))
}

/// One producer that pushes messages, one consumer that takes what there is and counts.
fn one_way(plan: &FloorPlan, bytes: usize, time: Duration, clock: &Clock) -> Result<Outcome> {
    let ring = Ring::new(bytes)?;
    let (warmup, time) = (clock.ticks(time / 10), clock.ticks(time));
    let consumer = Fork::start(|| {
        let _ = core_pin::pin(Some(plan.cores.server));
        let mut from = ring.consumer();
        let mut piece = vec![0; PIECE.max(plan.size)];
        let first = clock.now();
        while clock.now() - first < warmup {
            from.pop_some(&mut piece);
        }
        let (start, mut now, mut counted) = (clock.now(), first, 0);
        while now < start + time {
            counted += from.pop_some(&mut piece) as u64;
            now = clock.now();
        }
        ring.word(BYTES).store(counted, Ordering::Relaxed);
        ring.word(TICKS).store(now - start, Ordering::Release);
    })?;
    core_pin::pin(Some(plan.cores.client))?;
    let mut to = ring.producer();
    let message = vec![1; plan.size];
    while to.push_unless_done(&message) {}
    drop(consumer);
    let bytes = ring.word(BYTES).load(Ordering::Relaxed);
    let ns = clock.ns(ring.word(TICKS).load(Ordering::Relaxed));
    Ok(Outcome::of_bytes(
        plan.mode,
        Wait::Spin,
        plan.size as u64,
        bytes,
        ns,
        clock,
    ))
}

/// The memory of one ring: header, then a power of two of bytes.
struct Ring {
    memory: Shared,
    capacity: usize,
}

impl Ring {
    fn new(capacity: usize) -> Result<Self> {
        assert!(capacity.is_power_of_two());
        Ok(Self {
            memory: Shared::new(HEADER + capacity)?,
            capacity,
        })
    }

    /// A word of the header.
    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: the offset lies in the header, is a multiple of 128, and only atomics ever touch these words.
        unsafe { &*self.memory.at(offset, 8).cast::<AtomicU64>() }
    }

    fn producer(&self) -> Producer<'_> {
        Producer { end: self.end() }
    }

    fn consumer(&self) -> Consumer<'_> {
        Consumer { end: self.end() }
    }

    fn end(&self) -> End<'_> {
        let data = self.memory.at(HEADER, self.capacity);
        End {
            ring: self,
            data,
            tail: self.word(TAIL),
            head: self.word(HEAD),
            ours: 0,
            theirs: 0,
        }
    }
}

/// What both sides keep: the shared words, and copies of both positions.
struct End<'a> {
    ring: &'a Ring,
    data: *mut u8,
    tail: &'a AtomicU64,
    head: &'a AtomicU64,
    ours: u64,
    theirs: u64,
}

impl End<'_> {
    /// Calls `copy` with the one or two pieces of the ring that hold `bytes` from `position` on: (address in the ring,
    /// offset in the message, length).
    #[inline(always)]
    fn pieces(&self, position: u64, bytes: usize, mut copy: impl FnMut(*mut u8, usize, usize)) {
        let start = position as usize & (self.ring.capacity - 1);
        let first = bytes.min(self.ring.capacity - start);
        // SAFETY: `start` is below the capacity.
        copy(unsafe { self.data.add(start) }, 0, first);
        if first < bytes {
            copy(self.data, first, bytes - first);
        }
    }
}

struct Producer<'a> {
    end: End<'a>,
}

impl Producer<'_> {
    /// Waits for room, then publishes one message.
    #[inline]
    fn push(&mut self, message: &[u8]) {
        while !self.has_room(message.len()) {
            self.end.theirs = self.end.head.load(Ordering::Acquire);
        }
        self.publish(message);
    }

    /// As `push`, but false once the consumer has reported and so takes no more.
    #[inline]
    fn push_unless_done(&mut self, message: &[u8]) -> bool {
        while !self.has_room(message.len()) {
            self.end.theirs = self.end.head.load(Ordering::Acquire);
            if self.end.ring.word(TICKS).load(Ordering::Acquire) != 0 {
                return false;
            }
        }
        self.publish(message);
        true
    }

    #[inline(always)]
    fn has_room(&self, bytes: usize) -> bool {
        self.end.ours + bytes as u64 - self.end.theirs <= self.end.ring.capacity as u64
    }

    #[inline(always)]
    fn publish(&mut self, message: &[u8]) {
        self.end
            .pieces(self.end.ours, message.len(), |at, offset, bytes| {
                // SAFETY: the piece lies in the ring and the consumer will not look at it before the tail is published.
                unsafe { std::ptr::copy_nonoverlapping(message[offset..].as_ptr(), at, bytes) }
            });
        self.end.ours += message.len() as u64;
        self.end.tail.store(self.end.ours, Ordering::Release);
    }
}

struct Consumer<'a> {
    end: End<'a>,
}

impl Consumer<'_> {
    /// Takes what there is, perhaps nothing, at most the length of `buffer`.
    #[inline]
    fn pop_some(&mut self, buffer: &mut [u8]) -> usize {
        if self.end.theirs == self.end.ours {
            self.end.theirs = self.end.tail.load(Ordering::Acquire);
        }
        let bytes = buffer.len().min((self.end.theirs - self.end.ours) as usize);
        if bytes > 0 {
            self.take(&mut buffer[..bytes]);
        }
        bytes
    }

    /// Waits for a whole message.
    #[inline]
    fn pop_exact(&mut self, message: &mut [u8]) {
        while self.end.theirs - self.end.ours < message.len() as u64 {
            self.end.theirs = self.end.tail.load(Ordering::Acquire);
        }
        self.take(message);
    }

    #[inline(always)]
    fn take(&mut self, buffer: &mut [u8]) {
        self.end
            .pieces(self.end.ours, buffer.len(), |at, offset, bytes| {
                // SAFETY: the piece lies in the ring, before the published tail, and the producer leaves it alone until
                // the head is published.
                unsafe { std::ptr::copy_nonoverlapping(at, buffer[offset..].as_mut_ptr(), bytes) }
            });
        // Nobody reads what was copied out; without this the compiler may leave the copying out as well.
        std::hint::black_box(&*buffer);
        self.end.ours += buffer.len() as u64;
        self.end.head.store(self.end.ours, Ordering::Release);
    }
}
