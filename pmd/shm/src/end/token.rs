//! Tokens on the anchor: sending one to a sleeper, taking them off, and what else a look there finds.

use super::{Anchor, Drained, End, Got, Process, Receiving, Shared};
use crate::bell::{self, Place};
use crate::layout::{Ask, Counter, Producer, anchor, mark, phase, want};
use crate::reason::Reason;
use crate::sync::{AtomicU32, Ordering::*};
use crate::wake;

/// Calls on the anchor that one look makes to take tokens, each for as many as [`Anchor::drain`] has room for.
const MOST_TAKES: u32 = if cfg!(loom) { 2 } else { 64 };

/// The tokens that come to an end: counted by the other end before each is sent, and by this one when it is taken. Only
/// as many are taken as were counted, since behind them may come data.
#[derive(Clone, Copy, Debug)]
struct Tokens<'a> {
    sent: &'a AtomicU32,
    taken: &'a AtomicU32,
}

impl<'a> Tokens<'a> {
    /// Those that this producer's end sends, of which so many were `taken`.
    #[inline]
    fn new(producer: &'a Producer, taken: &'a AtomicU32) -> Self {
        Tokens {
            sent: &producer.wakes,
            taken,
        }
    }

    /// Tokens that the other end has sent (or is sending) and that are still on the anchor.
    #[inline]
    fn outstanding(&self) -> u32 {
        self.sent
            .load(Acquire)
            .wrapping_sub(self.taken.load(Relaxed))
    }

    /// Takes off the anchor what was counted and has arrived. What ended that: `Nothing` where all is well, and `Tokens` where more
    /// may have arrived: how many were counted is the other end's word, who could send them faster than they are taken.
    fn take(&self, anchor: &impl Anchor) -> Drained {
        let mut most = self.outstanding();
        let mut drained = Drained::Nothing;
        for _ in 0..MOST_TAKES {
            if most == 0 || most > i32::MAX as u32 {
                return Drained::Nothing;
            }
            drained = anchor.drain(most);
            match drained {
                Drained::Tokens(count) => {
                    self.taken.fetch_add(count, Relaxed);
                    most = most.saturating_sub(count);
                }
                Drained::Foreign(count) => {
                    self.taken.fetch_add(count, Relaxed);
                    return drained;
                }
                ended => return ended,
            }
        }
        drained
    }
}

/// Takes what the other end asked, after a publication, and rings the bell that it names by `ring`, which says whether somebody
/// sleeps on it (`None`: there is no such bell). The bits that the other end had set, and whether it is to get a token;
/// where it had set BELL or WAKE, [`wake::rung`] comes behind that.
pub fn take_ask(ask: &Ask, ring: impl FnOnce(Place) -> Option<bool>) -> (u32, bool) {
    let taken = wake::take(&ask.want);
    if taken & (want::BELL | want::WAKE) == 0 || taken & wake::NO_TOKEN != 0 {
        return (taken, false);
    }
    let mut token = taken & want::WAKE != 0;
    if taken & want::BELL != 0 {
        // Without a place on the board only a token is left.
        token |= Place::from_word(ask.place.load(Acquire))
            .and_then(ring)
            .unwrap_or(true);
    }
    (taken, token)
}

/// Counts one token, does `between`, and sends it.
pub(super) fn send_token(producer: &Producer, anchor: &impl Anchor, between: impl FnOnce()) {
    producer.wakes.fetch_add(1, AcqRel);
    between();
    if !anchor.signal() {
        // Not sent: the anchor is full of tokens that nobody took, or broken. Either wakes
        // the other end as well.
        producer.wakes.fetch_sub(1, AcqRel);
    }
}

impl Shared {
    /// True when an end of the anchor, with an error or without, breaks the connection: see [`End::note_end`].
    pub fn breaks_by_end(&self, error: bool) -> bool {
        let on_ring = self.tx().phase.load(Acquire) == phase::RING;
        // What a socket has not read when it is shut is no reason for a reset; what is sent to it later is, and the kernel's.
        let is_shut = self.out().bytes.want.load(Relaxed) & want::SHUT != 0;
        let is_own = (self.rx().shut.load(Acquire) != 0 || is_shut) && !error
            // Both directions have ended: nobody is told of a reset.
            || self.tx().shut.load(Relaxed) != 0 && self.marks() & mark::FIN != 0;
        on_ring && self.has_unread() && !is_own || error && !on_ring
    }
}

impl<S: Anchor + Process> End<'_, S> {
    /// Answers what the other end asked, after a publication: rings its bell, sends its token. The bits that the other
    /// end had set. Called with the sending half held, once that is on the ring.
    #[cold]
    pub fn answer(&self, ask: &Ask) -> u32 {
        let (taken, token) = take_ask(ask, |place| {
            let bell = self.shared.bell(place.bell)?;
            self.socket.count(Counter::Bells);
            Some(bell::ring(bell, place.bit))
        });
        if token {
            self.send_token();
        }
        if taken & want::NAP != 0 {
            self.socket.wake(&ask.want);
        }
        if taken & (want::BELL | want::WAKE) != 0 {
            wake::rung(&ask.want);
        }
        taken
    }

    /// Asks the other end for a sign of bytes; the caller looks once more after this. What the request is then.
    pub fn ask_for_bytes(&self, how: u32) -> u32 {
        let ask = &self.incoming().bytes;
        let asked = wake::ask(&ask.want, how);
        if ask.hot.load(Acquire) != 0 {
            self.rx().quiet_calls.store(0, Relaxed);
            self.socket.barrier();
            // Only now, so that another thread that asks meanwhile runs its own barrier.
            ask.hot.store(0, Release);
        }
        asked
    }

    /// Asks the other end for a sign of space, likewise.
    pub fn ask_for_space(&self, how: u32) {
        wake::ask(&self.out().space.want, how);
    }

    /// After a receive that found bytes: a receiver that has not slept for long spares its senders
    /// their fences.
    #[inline]
    pub fn note_busy(&self) {
        let calls = self.rx().quiet_calls.load(Relaxed).wrapping_add(1);
        self.rx().quiet_calls.store(calls, Relaxed);
        if calls & self.socket.limits().hot_mask == 0
            && self.incoming().producer.barriers.load(Relaxed) != 0
            && self.socket.has_barriers()
        {
            self.incoming().bytes.hot.store(1, Relaxed);
        }
    }

    /// Puts RINGING into the other end's request, so that a last token may be sent. `Err` when
    /// that end reads the anchor as data (DEMOTED), or has closed or shut it (CLOSED, SHUT), so that the kernel
    /// would answer with a reset: what the request holds.
    pub(super) fn begin_ringing(&self, request: &AtomicU32) -> Result<(), u32> {
        request
            .fetch_update(AcqRel, Acquire, |old| {
                (old & wake::NO_TOKEN == 0)
                    .then_some(old & !(want::BELL | want::WAKE) | want::RINGING)
            })
            .map(|_| ())
    }

    /// Sends one token, counted before it goes.
    pub(super) fn send_token(&self) {
        self.socket.count(Counter::Wakes);
        send_token(&self.out().producer, &self.socket, || {});
    }

    /// Breaks the stream: both ends report ECONNRESET.
    #[cold]
    pub fn reset(&self, reason: Reason) {
        if self.rx().phase.swap(phase::RESET, AcqRel) == phase::RESET {
            return;
        }
        // Not reported yet, whatever the anchor has said; but for a send that came before the last bytes were received.
        self.rx().anchor.fetch_and(!anchor::ERROR, AcqRel);
        let has_ended_ring = self.tx().phase.load(Acquire) == phase::DEMOTED;
        self.set_sending(phase::RESET);
        self.page().reason.store(reason as u32, Relaxed);
        self.out().producer.mark.fetch_or(mark::RESET, AcqRel);
        self.end_others_nap();
        self.socket.count(Counter::Reset);
        self.socket.broken(reason);
        // A program that has not mapped the stream would read a token as data, and nobody else has this end's anchor.
        let has_left = self.out().bytes.want.load(Acquire) & want::DEMOTED != 0;
        if S::IN_PLACE || has_ended_ring || has_left {
            // It sees no mark, and would read a token as data.
            return self.socket.break_now();
        }
        // The other end may sleep; whatever it asked for, it gets a token (it reads no data from the
        // anchor any more, once it has seen the mark).
        self.send_token();
    }

    /// The other end has broken the connection, and what it sent before that has been read: so is this
    /// end's, and the error waits to be asked for.
    pub fn settle_reset(&self) {
        let shared = self.shared;
        if shared.marks() & mark::RESET == 0 || shared.is_reset() {
            return;
        }
        let half = self.lock_rx();
        if !half.is_nested() && self.rx().phase.load(Acquire) == phase::RING && !shared.has_bytes()
        {
            self.reset(Reason::PeerReset);
        }
    }

    /// The anchor has ended, with an error or without. The kernel of a peer that dies resets the
    /// connection for unread tokens, which the program must not see, and does not reset it for
    /// bytes in the ring that were never read, which it must: the ring tells. An anchor that this end itself has shut for
    /// receiving ends as well, and says nothing about the peer.
    pub fn note_end(&self, error: bool) {
        if self.shared.is_reset() {
            // There the bits say what was told.
            return;
        }
        let bits = if self.shared.breaks_by_end(error) {
            anchor::EOF | anchor::ERROR | anchor::BROKEN
        } else {
            anchor::EOF
        };
        self.add_anchor_bits(bits);
    }

    #[inline]
    fn tokens(&self) -> Tokens<'_> {
        Tokens::new(&self.incoming().producer, &self.rx().drained)
    }

    /// Tokens that the other end has sent (or is sending) and that are still on the anchor.
    pub fn outstanding(&self) -> u32 {
        self.tokens().outstanding()
    }

    /// Looks what the anchor has to say, where the ring is what comes next: an end or an error is noted, bytes that
    /// nobody counted break the stream.
    pub fn look(&self) {
        let half = self.lock_rx();
        if !half.is_nested() && self.rx().phase.load(Relaxed) == phase::RING {
            half.look();
        }
    }
}

impl<S: Anchor + Process> Receiving<'_, '_, S> {
    /// See [`End::outstanding`].
    pub(super) fn outstanding(&self) -> u32 {
        self.end.outstanding()
    }

    /// Takes tokens off the anchor, as many as were counted and have arrived; but none while
    /// somebody sleeps there, who would sleep on, and none before the ring is read, since the
    /// program's own bytes may come first.
    pub(super) fn drain(&self) {
        let rx = self.end.rx();
        if rx.phase.load(Relaxed) == phase::RING && rx.waiters.load(SeqCst) == 0 {
            self.drain_all();
        }
    }

    /// Takes tokens off the anchor, whoever sleeps. What ended that.
    pub(super) fn drain_all(&self) -> Drained {
        let end = self.end;
        let before = end.rx().drained.load(Relaxed);
        let drained = end.tokens().take(&end.socket);
        if end.rx().drained.load(Relaxed) != before {
            // An edge of the anchor that nobody has seen yet went with them.
            end.socket.changed();
        }
        match drained {
            Drained::Nothing | Drained::Tokens(_) => {}
            Drained::Foreign(_) => end.reset(Reason::Bypass),
            Drained::End => end.note_end(false),
            Drained::Error => end.note_end(true),
        }
        drained
    }

    /// See [`End::look`].
    pub(super) fn look(&self) {
        let end = self.end;
        self.drain();
        if end.incoming().producer.mark.load(Acquire) & mark::END != 0 {
            // What the anchor has is behind the ring's end, and so is its own one: the other end may have shut what it sends.
            return;
        }
        if self.outstanding() != 0 && !end.socket.is_open() {
            // Tokens stay for a sleeper that may never come back: the end shows all the same.
            end.note_end(false);
        }
        if self.outstanding() != 0 || end.rx().anchor.load(Relaxed) != 0 {
            return;
        }
        let is_kernels = !S::IN_PLACE && end.tx().phase.load(Acquire) != phase::RING;
        if is_kernels && end.socket.hears_end() {
            // An error is the program's, from the kernel: a look must not take it.
            return end.note_end(false);
        }
        match end.socket.peek() {
            // A byte here was sent before its count was read, or the rest of the stream comes on the
            // anchor, or somebody slipped past.
            Got::Bytes(_) => {
                let ended = end.incoming().producer.mark.load(Acquire) & mark::END != 0;
                if self.outstanding() == 0 && !ended && end.rx().phase.load(Relaxed) == phase::RING
                {
                    end.reset(Reason::Bypass);
                }
            }
            Got::Nothing => {}
            Got::End => end.note_end(false),
            Got::Error(_) => end.note_end(true),
        }
    }
}
