//! One end of a stream: all that it does with shared memory and with its anchor, written once.
//!
//! The shim drives it with raw system calls, the daemon with its sockets for streams to other nodes (see
//! `in_place.rs`), the loom tests with a queue of bytes, the unit tests with both ends in one thread. It never waits for the other end: where a caller has to sleep, a step says
//! so, and the caller sleeps and comes back. (What can't be done later, at a close or where the kernel must have the connection at
//! once, waits a little: see [`Patience`].)
//!
//! - [`Shared`] is what the end has mapped: the words of both directions, its own page, the rings.
//! - [`Anchor`] is the kernel's connection under it, [`Process`] the process that it lives in. Waking
//!   (`signal`, `drain`, `wait_fd`) stands apart from bytes (`send`, `peek`, `take`), so that something
//!   else may carry tokens later.
//! - [`State`] is what the words say, read once and checked: one value for each direction. Questions
//!   (readiness, what comes next) are functions of it and change nothing.
//! - Acting is a step of its own, in the order of a stream's life: [`End::promote`]; `try_switch` and
//!   [`End::settle_switch`]; [`End::send`], [`End::receive`]; [`Sleeper`], [`End::answer`];
//!   [`End::leave`], [`End::follow`], [`End::send_rest`], [`End::abandon`]; [`End::shut_sending`], [`End::close`];
//!   [`End::reset`] at any time. What a step may change is said beside it.
//!
//! *A short receive or send means that nothing more is there, or no room* (epoll(7) lets a program
//! believe it). So no step ends at a boundary of ours: a receive goes on from the anchor to the ring,
//! from one piece of the ring to the next, and to what the anchor has behind the ring.
//!
//! Nothing here allocates or panics, and signal handlers may run the same code in between (see
//! [`crate::ring`]).

mod anchor;
mod buffers;
mod change;
mod half;
mod holders;
mod in_place;
mod leave;
mod nap;
mod patience;
mod quick;
mod receive;
mod rest;
mod send;
mod shut;
mod sleep;
mod state;
mod switch;
mod token;

pub use anchor::{Anchor, Drained, Got, Limits, Process, Shut, Take, Until};
pub use buffers::{Buffers, MOST};
pub use half::{Receiving, Sending};
pub use nap::Nap;
pub use patience::Patience;
pub use receive::{How, Received};
pub use send::{Counted, Sent, Way};
pub use sleep::{PATIENCE_MS, Sleeper};
use state::Ahead;
pub use state::{Incoming, Kernel, Outgoing, Peer, State, Then, Told, bit};
pub use token::take_ask;

use crate::layout::{BELLS, Bell, Direction, EndPage, RxState, TxState};
use crate::ring::RingMemory;

/// What an end has mapped.
#[derive(Debug)]
pub struct Shared {
    out: *const Direction,
    incoming: *const Direction,
    page: *const EndPage,
    /// [`BELLS`] of them, the other end's; null where there is no board.
    bells: *const Bell,
    ring_out: RingMemory,
    ring_in: RingMemory,
}

// SAFETY: all that is behind the pointers is atomic, or a ring, which is used under its half's lock.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// # Safety
    /// The pointers are valid as long as this is used; `directions` leads to two, `bells` to [`BELLS`] or is null.
    pub unsafe fn new(
        directions: *const Direction,
        page: *const EndPage,
        bells: *const Bell,
        rings: [RingMemory; 2],
        end: u32,
    ) -> Self {
        let second = directions.wrapping_add(1);
        let [ring, second_ring] = rings;
        let (out, incoming, ring_out, ring_in) = if end & 1 == 0 {
            (directions, second, ring, second_ring)
        } else {
            (second, directions, second_ring, ring)
        };
        Shared {
            out,
            incoming,
            page,
            bells,
            ring_out,
            ring_in,
        }
    }

    /// Where all of it lies, as `new` was told: directions, page, bells.
    pub fn places(&self) -> (*const Direction, *const EndPage, *const Bell) {
        (self.out.min(self.incoming), self.page, self.bells)
    }

    /// State of this end, shared by the processes that hold it.
    #[inline]
    pub fn page(&self) -> &EndPage {
        // SAFETY: valid, see `new`; all that changes in it is atomic.
        unsafe { &*self.page }
    }

    /// The direction that this end produces.
    #[inline]
    pub fn out(&self) -> &Direction {
        // SAFETY: valid, see `new`; every field of a Direction is atomic.
        unsafe { &*self.out }
    }

    /// The direction that this end consumes.
    #[inline]
    pub fn incoming(&self) -> &Direction {
        // SAFETY: as above.
        unsafe { &*self.incoming }
    }

    /// The sending half's state.
    #[inline]
    pub fn tx(&self) -> &TxState {
        &self.page().tx
    }

    /// The receiving half's state.
    #[inline]
    pub fn rx(&self) -> &RxState {
        &self.page().rx
    }

    /// Bytes of each ring.
    #[inline]
    pub fn ring_size(&self) -> u64 {
        self.ring_out.size()
    }

    /// Which end this is.
    pub fn end_number(&self) -> u32 {
        u32::from(self.out > self.incoming)
    }

    /// One of the other end's bells.
    fn bell(&self, number: usize) -> Option<&Bell> {
        let there = !self.bells.is_null() && number < BELLS;
        // SAFETY: valid, see `new`; a bell is made of atomics.
        there.then(|| unsafe { &*self.bells.add(number) })
    }
}

/// One end of a stream, for the length of a call.
#[derive(Clone, Copy, Debug)]
pub struct End<'a, S> {
    /// What it has mapped.
    pub shared: &'a Shared,
    /// Its anchor and its process.
    pub socket: S,
}

impl<'a, S> End<'a, S> {
    #[inline]
    fn page(&self) -> &'a EndPage {
        self.shared.page()
    }

    #[inline]
    fn out(&self) -> &'a Direction {
        self.shared.out()
    }

    #[inline]
    fn incoming(&self) -> &'a Direction {
        self.shared.incoming()
    }

    #[inline]
    fn tx(&self) -> &'a TxState {
        self.shared.tx()
    }

    #[inline]
    fn rx(&self) -> &'a RxState {
        self.shared.rx()
    }
}
