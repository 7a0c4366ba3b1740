//! What an end needs from outside of shared memory: its anchor, and the process that it lives in.
//!
//! The shim answers with raw system calls, the daemon with the sockets of its streams to other nodes, loom and the unit tests with queues of bytes.

use super::Patience;
use crate::layout::Counter;
use crate::lock::Owner;
use crate::reason::Reason;
use crate::sync::AtomicU32;
use crate::wake::WAKE_BYTE;

/// What a call on the anchor gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Got {
    /// So many bytes, at least 1.
    Bytes(usize),
    /// Nothing is there, or there is no room.
    Nothing,
    /// End of file.
    End,
    /// An error number of the kernel.
    Error(i32),
}

/// What a look for tokens found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// So many tokens, which are gone now.
    Tokens(u32),
    /// So many bytes, which are gone now, and were not all tokens: somebody went past the shim.
    Foreign(u32),
    /// No token is there.
    Nothing,
    /// The other end's process has closed or died.
    End,
    /// As `End`, with an error.
    Error,
}

/// How bytes are taken off the anchor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// They go into the buffer.
    Into,
    /// They stay, and are copied.
    Peek,
    /// They are thrown away.
    Discard,
    /// As `Peek` for what `Discard` would throw away: nothing is copied, nothing goes.
    Count,
}

/// The kernel's connection under a stream. No call waits, but for [`Anchor::wait`].
///
/// `signal`, `drain` and `wait_fd` are about waking, the others about bytes and their number. Today
/// the tokens are counted bytes among the others, which [`WAKE_BYTE`] names; a channel of their own
/// changes the first three and nothing else.
pub trait Anchor {
    /// Sends bytes; how many the kernel took.
    ///
    /// # Safety
    /// `from` is valid for reads of `len` bytes.
    unsafe fn send(&self, from: *const u8, len: usize) -> Got;

    /// Looks whether a byte is there, and leaves it: `Bytes(1)` then.
    fn peek(&self) -> Got;

    /// Takes bytes.
    ///
    /// # Safety
    /// `to` is valid for writes of `len` bytes.
    unsafe fn take(&self, to: *mut u8, len: usize, how: Take) -> Got;

    /// Copies bytes that lie behind `skip` others, and leaves all of them. `Nothing` where they can't be reached.
    ///
    /// # Safety
    /// `to` is valid for writes of `len` bytes.
    unsafe fn peek_behind(&self, skip: u64, to: *mut u8, len: usize) -> Got {
        let _ = (skip, to, len);
        Got::Nothing
    }

    /// Bytes that can be taken now.
    fn unread(&self) -> Option<u64>;

    /// Bytes that were sent and that the other end's kernel has not taken. `None`: it can't be known now.
    fn unsent(&self) -> Option<u64> {
        None
    }

    /// Position of the next byte that this end will send on the anchor. `None`: it can't be known now.
    fn sent(&self) -> Option<u64>;

    /// Position of the next byte to be taken off the anchor. `None`: it can't be known now.
    fn received(&self) -> Option<u64>;

    /// False when the connection is over in either direction, whatever still lies on it.
    fn is_open(&self) -> bool;

    /// True when nothing more comes, since the other end has ended it, this one, or an error. An error stays.
    fn hears_end(&self) -> bool {
        matches!(self.peek(), Got::End | Got::Error(_))
    }

    /// True when urgent data comes next, before which a receive ends that has bytes already.
    fn is_at_mark(&self) -> bool {
        false
    }

    /// Ends a direction, as `shutdown` does.
    fn shut(&self, which: Shut);

    /// The coming close is to break the connection (`SO_LINGER` of 0).
    fn break_at_close(&self);

    /// What a close does (`SO_LINGER`): 1 for on in the upper half, and seconds.
    fn linger(&self) -> u64 {
        0
    }

    /// Sets that.
    fn set_linger(&self, _linger: u64) {}

    /// Breaks the connection now, so that the other end's program sees it, whatever that reads.
    fn break_now(&self) {
        self.break_at_close();
    }

    /// Waits at most so long until a byte is there or there is room; false when neither came.
    fn wait(&self, what: Until, ms: u32) -> bool;

    /// Wakes the other end's sleepers by one token; false when it could not go.
    fn signal(&self) -> bool {
        // SAFETY: one byte.
        unsafe { self.send(&raw const WAKE_BYTE, 1) == Got::Bytes(1) }
    }

    /// Takes at most `most` tokens, of which so many were counted.
    fn drain(&self, most: u32) -> Drained {
        let mut bytes = [0_u8; 64];
        let most = (most as usize).min(bytes.len());
        // SAFETY: the buffer has `most` bytes.
        match unsafe { self.take(bytes.as_mut_ptr(), most, Take::Into) } {
            Got::Bytes(got) if bytes.iter().take(got).all(|byte| *byte == WAKE_BYTE) => {
                Drained::Tokens(got as u32)
            }
            Got::Bytes(got) => Drained::Foreign(got as u32),
            Got::Nothing => Drained::Nothing,
            Got::End => Drained::End,
            Got::Error(_) => Drained::Error,
        }
    }

    /// Where this end's sleepers sleep, until a token is there. -1 where there are no descriptors.
    fn wait_fd(&self) -> i32;
}

/// A direction of the anchor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shut {
    /// What this end sends.
    Sending,
    /// What this end receives.
    Receiving,
}

/// What [`Anchor::wait`] waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// A byte to take.
    Bytes,
    /// Room for one to send.
    Room,
}

/// Thresholds of an end. They decide when something is done, never what is right: a test sets them low, since most faults lie
/// on the other side of one.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes taken off the ring before that is published, so that the other end writes while this one reads.
    pub piece: u64,
    /// Bytes put into the ring before they are published, so that the other end reads while this one writes.
    pub chunk: u64,
    /// One less than the receives without a sleep after which a receiver is hot (a power of two): see [`crate::wake`].
    pub hot_mask: u32,
}

impl Limits {
    /// Those that a program has.
    pub const DEFAULT: Limits = Limits {
        piece: 256 * 1024,
        chunk: 16 * 1024,
        hot_mask: 255,
    };
}

/// The process that an end lives in.
pub trait Process {
    /// The rings are written and read in place by something else, an engine, which stores the head word of what it writes:
    /// the daemon's end of a stream to another node. See `in_place.rs`.
    const IN_PLACE: bool = false;

    /// Who locks: this thread.
    fn me(&self) -> Owner;

    /// True when this thread is the only one of its process.
    fn is_alone(&self) -> bool {
        false
    }

    /// True while a thread of this process is in a kernel send that it began before the stream was there.
    fn is_sending(&self) -> bool;

    /// Lets others run, who are awake.
    fn give_way(&self);

    /// Lets others run for a millisecond, asleep or awake.
    fn rest(&self);

    /// A clock that only goes forward.
    fn milliseconds(&self) -> u64;

    /// What this process may wait for the other end in all.
    fn patience(&self) -> Patience<'_>;

    /// Does a step that no signal handler of this thread may come into.
    fn undisturbed(&self, step: impl FnOnce()) {
        step();
    }

    /// True while that process runs.
    fn is_running(&self, pid: u32) -> bool;

    /// False where that process is known not to have the anchor open.
    fn may_have_anchor(&self, pid: u32) -> bool {
        let _ = pid;
        true
    }

    /// Process (upper half) and thread, as they stand in the table of sleepers; never 0.
    fn name(&self) -> u64;

    /// True when the thread of that name runs.
    fn is_awake(&self, name: u64) -> bool;

    /// A barrier on all threads of the other end: see [`crate::wake`].
    fn barrier(&self);

    /// True when the processes of this end take part in such barriers.
    fn has_barriers(&self) -> bool;

    /// A receiver has found so few bytes: it may look away for a moment, and look again with `now`.
    fn gather(&self, found: u64, now: impl FnOnce() -> u64) {
        let _ = (found, now);
    }

    /// Wakes the thread that sleeps on this word (FUTEX_WAKE), if one does. In place nobody does.
    fn wake(&self, word: &AtomicU32) {
        let _ = word;
    }

    /// Adds one to a counter of the tenant.
    fn count(&self, what: Counter);

    /// Something has changed at this end of which the other end tells nobody: a phase, an own shutdown, an end of the
    /// anchor, tokens that were taken off it. Whoever waits for the connection and was not asleep on the anchor must
    /// look. Called with a half held, so it takes no lock in which somebody may wait for a half.
    fn changed(&self) {}

    /// The next question about readiness is to look at the anchor.
    fn look_later(&self);

    /// When some things are done, and how much at a time.
    #[inline]
    fn limits(&self) -> Limits {
        Limits::DEFAULT
    }

    /// The stream was broken just now, for this reason.
    fn broken(&self, reason: Reason);

    /// Both directions are the anchor's for ever, since just now, for this reason.
    fn left(&self, reason: Reason);
}
