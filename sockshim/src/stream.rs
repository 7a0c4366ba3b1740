//! A mapped stream, as one end sees it: its halves, their locks, and how the other end is woken.

use crate::{conn, sys};
use libc::c_int;
use rdsock_shm::bell::{self, Place};
use rdsock_shm::layout::{
    Ask, Bell, BellBoard, Counter, DATA_OFFSET, Direction, EndPage, MAX_RING, MIN_RING, RxState,
    StreamHeader, TxState, anchor, mark, phase, want,
};
use rdsock_shm::lock::{self, Owner, Taken};
use rdsock_shm::reason::Reason;
use rdsock_shm::ring::{Receiver, RingMemory, Sender};
use rdsock_shm::wake;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*};

/// The byte that wakes the other end. Any other byte on the anchor of a promoted direction was
/// sent behind the shim's back.
pub const WAKE_BYTE: u8 = 0xA5;

/// This process, for locks. Set by the constructor and in forked children.
static PID: AtomicU32 = AtomicU32::new(0);

/// Receives without a sleep after which a receiver is hot: see [`rdsock_shm::wake`].
const HOT_AFTER: u32 = 256;
/// 1 when this process takes part in membarriers.
static HAS_BARRIERS: AtomicU32 = AtomicU32::new(0);

/// Notes which process this is.
pub fn note_pid() {
    PID.store(sys::getpid(), Relaxed);
}

/// Takes part in membarriers, where the kernel has them.
pub fn start_barriers() {
    HAS_BARRIERS.store(u32::from(sys::register_membarrier()), Relaxed);
}

/// Whether this process takes part in membarriers: 1 or 0.
pub fn has_barriers() -> u32 {
    HAS_BARRIERS.load(Relaxed)
}

/// The process that owns the shim's private state. A `vfork` child sees its parent's.
pub fn pid() -> u32 {
    PID.load(Relaxed)
}

#[inline]
fn me() -> Owner {
    Owner::new(PID.load(Relaxed), sys::thread_pointer())
}

/// One end of a stream.
#[derive(Debug)]
pub struct Stream {
    header: *mut StreamHeader,
    mapped: usize,
    end: *mut EndPage,
    peer_bells: *mut BellBoard,
    rings: [RingMemory; 2],
    me: usize,
    /// The daemon's number.
    pub id: u64,
}

/// The bytes of an end page's mapping.
const END_PAGE: usize = 4096;

impl Stream {
    /// Maps what the daemon has sent. `None` when it does not fit together or cannot be mapped.
    pub fn map(
        fds: [c_int; 3],
        ring_size: u64,
        data_offset: u64,
        end: u32,
        id: u64,
    ) -> Option<Self> {
        let sound = ring_size.is_power_of_two()
            && (MIN_RING..=MAX_RING).contains(&ring_size)
            && (DATA_OFFSET..=MAX_RING).contains(&data_offset)
            && data_offset.is_multiple_of(64)
            && end < 2;
        let [memory, page, bells] = fds;
        // Sizes are looked at once, so none may become smaller later: the bells are another tenant's.
        if !fds.into_iter().all(sys::cannot_shrink) {
            return None;
        }
        let mapped = sys::file_size(memory)?;
        if !sound
            || mapped < data_offset + 2 * ring_size
            || sys::file_size(page)? < END_PAGE as u64
            || sys::file_size(bells)? < std::mem::size_of::<BellBoard>() as u64
        {
            return None;
        }
        let mapped = mapped as usize;
        if !sys::leaves_room(mapped) {
            return None;
        }
        let header = sys::map(memory, mapped)?;
        let Some(end_page) = sys::map(page, END_PAGE) else {
            // SAFETY: just mapped, unused.
            unsafe { sys::unmap(header, mapped) };
            return None;
        };
        let Some(peer_bells) = sys::map(bells, std::mem::size_of::<BellBoard>()) else {
            // SAFETY: just mapped, unused.
            unsafe {
                sys::unmap(header, mapped);
                sys::unmap(end_page, END_PAGE);
            }
            return None;
        };
        sys::advise(header, mapped, libc::MADV_HUGEPAGE);
        let ring = |number: u64| {
            // SAFETY: the size was checked above; the mapping lives as long as the stream.
            unsafe {
                RingMemory::new(
                    header.add((data_offset + number * ring_size) as usize),
                    ring_size,
                )
            }
        };
        Some(Stream {
            header: header.cast(),
            mapped,
            end: end_page.cast(),
            peer_bells: peer_bells.cast(),
            rings: [ring(0), ring(1)],
            me: end as usize,
            id,
        })
    }

    /// Unmaps everything.
    pub fn unmap(self) {
        // SAFETY: the stream is consumed, and its users have gone.
        unsafe {
            sys::unmap(self.header.cast(), self.mapped);
            sys::unmap(self.end.cast(), END_PAGE);
            sys::unmap(self.peer_bells.cast(), std::mem::size_of::<BellBoard>());
        }
    }

    /// State of this end, shared by the processes that hold it.
    #[inline]
    pub fn end(&self) -> &EndPage {
        // SAFETY: mapped as long as the stream; all that changes in it is atomic.
        unsafe { &*self.end }
    }

    #[inline]
    fn direction(&self, number: usize) -> &Direction {
        // SAFETY: mapped as long as the stream; every field of a Direction is atomic.
        unsafe {
            &*(&raw const (*self.header).directions)
                .cast::<Direction>()
                .add(number & 1)
        }
    }

    /// The direction that this end produces.
    #[inline]
    pub fn out(&self) -> &Direction {
        self.direction(self.me)
    }

    /// The direction that this end consumes.
    #[inline]
    pub fn incoming(&self) -> &Direction {
        self.direction(1 - self.me)
    }

    /// The sending half's state.
    #[inline]
    pub fn tx(&self) -> &TxState {
        &self.end().tx
    }

    /// The receiving half's state.
    #[inline]
    pub fn rx(&self) -> &RxState {
        &self.end().rx
    }

    /// Bytes of each ring.
    pub fn ring_size(&self) -> u64 {
        self.rings[0].size()
    }

    /// Which end this is.
    pub fn end_number(&self) -> u32 {
        self.me as u32
    }

    /// Takes the sending half.
    #[inline]
    pub fn lock_tx(&self, fd: c_int) -> TxGuard<'_> {
        let (taken, recovered) = self.take(&self.tx().lock);
        let sender = Sender::new(
            self.tx(),
            self.out(),
            self.rings[self.me],
            taken == Taken::Nested,
        );
        if recovered {
            sender.recover();
        }
        TxGuard {
            stream: self,
            sender,
            taken,
            fd,
        }
    }

    /// Takes the receiving half.
    #[inline]
    pub fn lock_rx(&self) -> RxGuard<'_> {
        let (taken, _) = self.take(&self.rx().lock);
        let receiver = Receiver::new(
            self.rx(),
            self.incoming(),
            self.rings[1 - self.me],
            taken == Taken::Nested,
        );
        RxGuard {
            stream: self,
            receiver,
            taken,
        }
    }

    /// Takes a half's lock, whoever has it. True when it was taken from a dead process.
    #[inline]
    fn take(&self, word: &AtomicU64) -> (Taken, bool) {
        let me = me();
        // A fork counts the child among the holders before there is one.
        let alone = conn::is_single_threaded() && self.end().holders.load(Relaxed) == 1;
        let tried = if alone {
            lock::try_take_alone(word, me)
        } else {
            lock::try_take(word, me)
        };
        match tried {
            Ok(taken) => (taken, false),
            Err(_) => take_slowly(word, me),
        }
    }

    /// After exec: locks of threads of the program that this one was.
    pub fn free_own_locks(&self) {
        for word in [&self.tx().lock, &self.rx().lock] {
            let owner = word.load(Relaxed);
            if owner != 0 && Owner::pid_of(owner) == pid() {
                let _ = word.compare_exchange(owner, 0, AcqRel, Relaxed);
            }
        }
    }

    /// A look at the incoming ring without its lock, for readiness: bytes, or a violation.
    #[inline]
    pub fn has_bytes(&self) -> bool {
        self.incoming().producer.head.load(Acquire) != self.rx().tail.load(Relaxed)
    }

    /// True while bytes of the ring stand before whatever comes on the anchor.
    pub fn has_unread_ring(&self) -> bool {
        self.rx().phase.load(Relaxed) == phase::RING && self.has_bytes()
    }

    /// True when neither direction is on the anchor.
    pub fn is_all_on_rings(&self) -> bool {
        self.rx().phase.load(Relaxed) == phase::RING && self.tx().phase.load(Relaxed) == phase::RING
    }

    /// Answers what the other end asked, after a publication: rings its bell, sends its wake byte.
    /// The bits that the other end had set.
    #[cold]
    pub fn answer(&self, fd: c_int, ask: &Ask) -> u32 {
        let taken = wake::take(&ask.want);
        if taken & (want::BELL | want::WAKE) != 0 && taken & (want::DEMOTED | want::CLOSED) == 0 {
            let mut wake = taken & want::WAKE != 0;
            if taken & want::BELL != 0 {
                // Without a place on the board only a wake byte is left.
                wake |= Place::from_word(ask.place.load(Acquire)).is_none_or(|place| {
                    crate::tenant::count(Counter::Bells);
                    // SAFETY: mapped as long as the stream, and the place was checked.
                    let bell = unsafe {
                        &*(&raw const (*self.peer_bells).bells)
                            .cast::<Bell>()
                            .add(place.bell)
                    };
                    bell::ring(bell, place.bit)
                });
            }
            if wake {
                self.send_wake(fd);
            }
            wake::rung(&ask.want);
        }
        taken
    }

    /// Asks the other end for a sign of bytes; the caller looks once more after this.
    pub fn ask_for_bytes(&self, how: u32) {
        let ask = &self.incoming().bytes;
        wake::ask(&ask.want, how);
        if ask.hot.load(Acquire) != 0 {
            self.rx().quiet_calls.store(0, Relaxed);
            if !sys::membarrier() {
                // Forbidden since (a sandbox): no store buffer holds a store for so long.
                sys::poll_one(-1, 0, 1);
            }
            // Only now, so that another thread that asks meanwhile runs its own barrier.
            ask.hot.store(0, Release);
        }
    }

    /// After a receive that found bytes: a receiver that has not slept for long spares its senders
    /// their fences.
    #[inline]
    pub fn note_busy(&self) {
        let calls = self.rx().quiet_calls.load(Relaxed).wrapping_add(1);
        self.rx().quiet_calls.store(calls, Relaxed);
        if calls.is_multiple_of(HOT_AFTER)
            && self.incoming().producer.barriers.load(Relaxed) != 0
            && HAS_BARRIERS.load(Relaxed) != 0
        {
            self.incoming().bytes.hot.store(1, Relaxed);
        }
    }

    /// Puts RINGING into the other end's request, so that a last wake byte may be sent. `Err` when
    /// that end reads the anchor as data (DEMOTED), or has closed it (CLOSED), so that the kernel
    /// would answer with a reset: what the request holds.
    pub fn begin_ringing(&self, request: &AtomicU32) -> Result<(), u32> {
        request
            .fetch_update(AcqRel, Acquire, |old| {
                (old & (want::DEMOTED | want::CLOSED) == 0)
                    .then_some(old & !(want::BELL | want::WAKE) | want::RINGING)
            })
            .map(|_| ())
    }

    /// Sends one byte on the anchor.
    pub fn send_wake(&self, fd: c_int) {
        crate::tenant::count(Counter::Wakes);
        let wakes = &self.out().producer.wakes;
        wakes.fetch_add(1, AcqRel);
        if sys::send_now(fd, &[WAKE_BYTE]) != 1 {
            // Not sent: the anchor is full of wake bytes that nobody took, or broken. Either wakes
            // the other end as well.
            wakes.fetch_sub(1, AcqRel);
        }
    }

    /// Breaks the stream: both ends report ECONNRESET.
    #[cold]
    pub fn reset(&self, fd: c_int, reason: Reason) {
        if self.rx().phase.swap(phase::RESET, AcqRel) == phase::RESET {
            return;
        }
        self.tx().phase.store(phase::RESET, Release);
        // Not reported yet, whatever the anchor has said.
        self.rx()
            .anchor
            .fetch_and(!(anchor::ERROR | anchor::SEND_ERROR), AcqRel);
        self.end().reason.store(reason as u32, Relaxed);
        self.out().producer.mark.fetch_or(mark::RESET, AcqRel);
        crate::tenant::count(Counter::Reset);
        crate::tenant::stream_left(fd, self, rdsock_shm::reason::State::Reset, reason);
        // The other end may sleep; whatever it asked for, it gets a byte (it reads no data from the
        // anchor any more, once it has seen the mark).
        self.send_wake(fd);
    }

    /// The anchor has ended, with an error or without. The kernel of a peer that dies resets the
    /// connection for unread wake bytes, which the program must not see, and does not reset it for
    /// bytes in the ring that were never read, which it must: the ring tells.
    pub fn note_end(&self, error: bool) {
        let on_ring = self.tx().phase.load(Acquire) == phase::RING;
        let unread = self.out().consumer.tail.load(Acquire) != self.tx().head.load(Relaxed);
        let bits = if on_ring && unread || error && !on_ring {
            anchor::EOF | anchor::ERROR | anchor::BROKEN
        } else {
            anchor::EOF
        };
        self.rx().anchor.fetch_or(bits, AcqRel);
    }

    /// True while an end of the anchor is [`note_end`](Self::note_end)'s to judge: what the kernel says of it may come from
    /// wake bytes.
    pub fn judges_end(&self) -> bool {
        self.tx().phase.load(Acquire) == phase::RING
            && matches!(
                self.rx().phase.load(Acquire),
                phase::RING | phase::SWITCHING
            )
    }

    /// True once the stream was reset.
    pub fn is_reset(&self) -> bool {
        self.rx().phase.load(Acquire) == phase::RESET
    }
}

#[cold]
fn take_slowly(word: &AtomicU64, me: Owner) -> (Taken, bool) {
    let mut tries = 0_u32;
    loop {
        match lock::try_take(word, me) {
            Ok(taken) => return (taken, false),
            Err(owner) => {
                tries = tries.wrapping_add(1);
                if !tries.is_multiple_of(64) {
                    std::hint::spin_loop();
                } else {
                    sys::sched_yield();
                    if tries.is_multiple_of(4096)
                        && !sys::is_alive(Owner::pid_of(owner))
                        && lock::take_from_dead(word, owner, me)
                    {
                        return (Taken::Outer, true);
                    }
                }
            }
        }
    }
}

/// The sending half, held.
#[derive(Debug)]
pub struct TxGuard<'a> {
    stream: &'a Stream,
    /// The ring's producer.
    pub sender: Sender<'a>,
    taken: Taken,
    fd: c_int,
}

impl TxGuard<'_> {
    /// True when further up this thread's stack the half is held already.
    pub fn is_nested(&self) -> bool {
        self.taken == Taken::Nested
    }
}

impl TxGuard<'_> {
    /// What a nested sender left behind since the last publication.
    #[inline]
    fn left_behind(&self) -> bool {
        self.sender.is_behind() && self.stream.tx().phase.load(Relaxed) == phase::RING
    }
}

impl Drop for TxGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.taken == Taken::Nested {
            return;
        }
        loop {
            if self.left_behind() {
                self.sender.publish();
                if wake::asked(&self.stream.out().bytes) != 0 {
                    self.stream.answer(self.fd, &self.stream.out().bytes);
                }
            }
            lock::release(&self.stream.tx().lock, self.taken);
            // Once more, since one may have come before the release. Whoever has the lock by now
            // comes here as well.
            if !self.left_behind()
                || !matches!(
                    lock::try_take(&self.stream.tx().lock, me()),
                    Ok(Taken::Outer)
                )
            {
                return;
            }
        }
    }
}

/// The receiving half, held.
#[derive(Debug)]
pub struct RxGuard<'a> {
    stream: &'a Stream,
    /// The ring's consumer.
    pub receiver: Receiver<'a>,
    taken: Taken,
}

impl RxGuard<'_> {
    /// True when further up this thread's stack the half is held already.
    pub fn is_nested(&self) -> bool {
        self.taken == Taken::Nested
    }

    /// Wake bytes that the other end has sent (or is sending) and that are still on the anchor.
    pub fn outstanding(&self) -> u32 {
        let sent = self.stream.incoming().producer.wakes.load(Acquire);
        sent.wrapping_sub(self.stream.rx().drained.load(Relaxed))
    }

    /// Takes wake bytes off the anchor, as many as were counted and have arrived; but none while
    /// somebody sleeps there, who would sleep on, and none before the ring is read, since the
    /// program's own bytes may come first.
    pub fn drain(&self, fd: c_int) {
        let rx = self.stream.rx();
        if rx.phase.load(Relaxed) == phase::RING && rx.waiters.load(SeqCst) == 0 {
            self.drain_all(fd);
        }
    }

    /// Takes wake bytes off the anchor, whoever sleeps.
    pub fn drain_all(&self, fd: c_int) {
        self.take_wakes(fd, self.outstanding());
    }

    fn take_wakes(&self, fd: c_int, mut most: u32) {
        loop {
            if most == 0 || most > i32::MAX as u32 {
                return;
            }
            let mut bytes = [0; 64];
            let Some(part) = bytes.get_mut(..(most as usize).min(64)) else {
                return;
            };
            let got = sys::recv_now(fd, part, 0);
            if got <= 0 {
                self.note(got);
                return;
            }
            let got = got as usize;
            most -= got as u32;
            self.stream.rx().drained.fetch_add(got as u32, Relaxed);
            if part.iter().take(got).any(|byte| *byte != WAKE_BYTE) {
                self.stream.reset(fd, Reason::Bypass);
                return;
            }
        }
    }

    /// Looks what the anchor has to say: end of file or an error is noted, bytes that nobody
    /// counted break the stream.
    pub fn look(&self, fd: c_int) {
        self.drain(fd);
        if self.outstanding() != 0 && crate::io::anchor_is_dead(fd) {
            // Wake bytes stay for a sleeper that may never come back: the end shows all the same.
            self.stream.note_end(false);
        }
        if self.outstanding() != 0 || self.stream.rx().anchor.load(Relaxed) != 0 {
            return;
        }
        let got = sys::recv_now(fd, &mut [0], libc::MSG_PEEK);
        // A byte here was sent before its count was read, or the rest of the stream comes on the
        // anchor, or somebody slipped past.
        if got > 0 {
            let ended = self.stream.incoming().producer.mark.load(Acquire) & mark::END != 0;
            if self.outstanding() == 0
                && !ended
                && self.stream.rx().phase.load(Relaxed) == phase::RING
            {
                self.stream.reset(fd, Reason::Bypass);
            }
        } else {
            self.note(got);
        }
    }

    fn note(&self, got: isize) {
        const AGAIN: isize = -(libc::EAGAIN as isize);
        const INTERRUPTED: isize = -(libc::EINTR as isize);
        if matches!(got, AGAIN | INTERRUPTED) {
            return;
        }
        self.stream.note_end(got < 0);
    }
}

impl RxGuard<'_> {
    /// What a nested receiver left behind since the last publication.
    #[inline]
    fn left_behind(&self) -> bool {
        self.receiver.is_behind() && self.stream.rx().phase.load(Relaxed) == phase::RING
    }
}

impl Drop for RxGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.taken == Taken::Nested {
            return;
        }
        loop {
            if self.left_behind() && self.receiver.publish() {
                self.stream.rx().space_due.store(1, Relaxed);
            }
            lock::release(&self.stream.rx().lock, self.taken);
            // As for the sending half.
            if !self.left_behind()
                || !matches!(
                    lock::try_take(&self.stream.rx().lock, me()),
                    Ok(Taken::Outer)
                )
            {
                return;
            }
        }
    }
}

impl Stream {
    /// True when the producer has published bytes behind `position`.
    pub fn has_bytes_after(&self, position: u64) -> bool {
        self.incoming().producer.head.load(Acquire) > position
    }
}
