//! Receiving: off the anchor up to the switch, off the ring, and off the anchor again behind it. What is not the way off the ring
//! stands in functions of its own (`inline(never)`): its room on the stack, up to some pages, would be every receive's.

use super::state::{Then, then};
use super::{Ahead, Anchor, Buffers, End, Got, MOST, Process, Receiving, Take};
use crate::layout::{NOT_SWITCHED, anchor, mark, phase};
use crate::reason::Reason;
use crate::ring::Receiver;
use crate::sync::Ordering::*;
use crate::wake;

/// How a program receives.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    /// The bytes stay (`MSG_PEEK`).
    pub peek: bool,
    /// The bytes are thrown away (`MSG_TRUNC`).
    pub discard: bool,
    /// The call wants all that it has room for (`MSG_WAITALL`), and may wait for it.
    pub whole: bool,
}

/// Times that a receive looks again for what the other end says, without a byte in between. It has a few reasons to, each once; and
/// whose words contradict each other could have it do so for ever.
const MOST_LOOKS: u32 = 64;

/// What became of a step of receiving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// The call has what it wants, or all that is there now.
    Bytes,
    /// More is wanted and may come: ask for it, look again, sleep.
    Nothing,
    /// As `Nothing`, for a call that wants bytes beyond this position and takes none.
    Few(u64),
    /// End of file.
    End,
    /// An error number.
    Error(i32),
    /// The rest is to be received on the anchor, by the caller.
    Kernel,
}

/// What one attempt to receive gave.
pub(super) enum Took {
    /// Bytes were added.
    Some,
    /// Nothing is there, and more may come.
    Nothing,
    /// Fewer bytes than the call waits for are there, up to this position.
    Few(u64),
    /// Something changed, by what the other end says: look again.
    Again,
    /// A handler of this thread has received meanwhile: look again.
    Overtaken,
    /// End of file.
    End,
    /// The other end has left the rings.
    Left,
    /// An error number.
    Error(i32),
}

impl<S: Anchor + Process> End<'_, S> {
    /// Receives to `done` and on, as much as is there. Never waits.
    #[inline]
    pub fn receive(&self, to: &Buffers, how: How, done: &mut usize) -> Received {
        let mut answer = false;
        let received = self.receive_all(to, how, done, &mut answer);
        if self.rx().space_due.load(Relaxed) != 0 {
            self.rx().space_due.store(0, Relaxed);
            answer = true;
        }
        // On the anchor: an answer may have had to wait until this end's own direction can move.
        if answer
            || self.tx().phase.load(Relaxed) == phase::ANCHOR
                && self.incoming().space.want.load(Relaxed) != 0
        {
            self.after_kernel_send();
        }
        received
    }

    /// `answer` is true on return when the producer may wait for space and was not told yet.
    #[inline]
    fn receive_all(&self, to: &Buffers, how: How, done: &mut usize, answer: &mut bool) -> Received {
        let mut looks = 0;
        loop {
            if *answer {
                *answer = false;
                self.answer_space();
            }
            let half = self.lock_rx();
            let took = match self.rx().phase.load(Acquire) {
                phase::RING => half.take(to, how, done, answer),
                phase::SWITCHING => half.take_switching(to, how, done),
                phase::RESET if *done != 0 => Took::Some,
                phase::RESET
                    if self.shared.broken_by() != libc::EPIPE && self.take_reset_error() =>
                {
                    Took::Error(libc::ECONNRESET)
                }
                phase::RESET => Took::End,
                _ if *done == 0 => return Received::Kernel,
                _ => return half.take_rest(to, how, done),
            };
            return match took {
                Took::Some if *done == to.total => Received::Bytes,
                Took::Some if half.goes_on(how) => continue,
                Took::Some | Took::Nothing if *done != 0 && !how.whole => Received::Bytes,
                Took::Some if how.peek => Received::Bytes,
                Took::Some if self.shared.is_reset() => Received::Bytes,
                Took::Again if looks == MOST_LOOKS => {
                    self.reset(Reason::Violation);
                    continue;
                }
                Took::Again => {
                    looks += 1;
                    continue;
                }
                Took::Some => {
                    looks = 0;
                    continue;
                }
                Took::Overtaken => continue,
                Took::Nothing => Received::Nothing,
                Took::Few(position) => Received::Few(position),
                Took::Left => {
                    drop(half);
                    self.follow();
                    continue;
                }
                Took::Error(_) if *done != 0 => {
                    // The next call is told.
                    if !self.shared.is_reset() {
                        self.add_anchor_bits(anchor::EOF | anchor::ERROR | anchor::BROKEN);
                    }
                    Received::Bytes
                }
                Took::End if *done != 0 => Received::Bytes,
                Took::End => Received::End,
                Took::Error(error) => Received::Error(error),
            };
        }
    }

    /// The error that the program asks for (`SO_ERROR`), once: where the kernel has just told `kernel`, and told this end of
    /// others when that looked.
    pub fn take_error(&self, kernel: i32) -> i32 {
        self.settle_reset();
        let marks = self.shared.marks();
        let is_pending = if self.shared.is_reset() {
            self.take_reset_error()
        } else if marks & mark::RESET != 0 {
            self.take_send_error()
        } else {
            let judged = kernel == libc::ECONNRESET && self.shared.judges_end();
            if judged && self.rx().anchor.load(Acquire) == 0 {
                self.note_end(true);
            }
            let pending = self.rx().anchor.fetch_and(!anchor::ERROR, AcqRel) & anchor::ERROR != 0;
            if !pending && !judged {
                return kernel;
            }
            pending
        };
        if is_pending {
            self.shared.broken_by()
        } else {
            0
        }
    }

    /// Bytes that can be received now (`FIONREAD`). `None`: ask the kernel.
    pub fn unread(&self) -> Option<u64> {
        let half = self.lock_rx();
        let position = self.rx().tail.load(Relaxed);
        match self.rx().phase.load(Acquire) {
            phase::RING => {
                let available = half.receiver.available_now().ok()?;
                let in_ring = available.map_or(0, |available| available.len);
                Some(in_ring + half.unread_behind(0)?)
            }
            phase::SWITCHING => {
                let Some(at) = Receiver::switch_at(self.incoming()) else {
                    return self.socket.unread();
                };
                let head = self.incoming().producer.head.load(Acquire);
                let ahead = at.saturating_sub(position);
                let before = self.socket.unread()?.min(ahead);
                // Behind bytes that have not come, it can't be had.
                let has_come = before == ahead;
                let in_ring = head.saturating_sub(at).min(self.shared.ring_size());
                let in_ring = if has_come { in_ring } else { 0 };
                Some(before + in_ring + half.unread_behind(before)?)
            }
            // What the anchor may have are tokens.
            phase::RESET => Some(0),
            _ => None,
        }
    }
}

impl<S: Anchor + Process> Receiving<'_, '_, S> {
    /// Bytes of the program on the anchor behind the ring's end: they lie behind the tokens, and so many `before` the ring.
    fn unread_behind(&self, before: u64) -> Option<u64> {
        if self.end.incoming().producer.mark.load(Acquire) & mark::END == 0 {
            return Some(0);
        }
        let not_behind = before + u64::from(self.outstanding());
        Some(self.end.socket.unread()?.saturating_sub(not_behind))
    }

    #[inline]
    fn take(&self, to: &Buffers, how: How, done: &mut usize, answer: &mut bool) -> Took {
        let (end, receiver) = (self.end, &self.receiver);
        let wanted = (to.total - *done) as u64;
        // The producer's line is read once: each look takes it away from the producer.
        let cached = end
            .rx()
            .seen_head
            .load(Relaxed)
            .wrapping_sub(end.rx().tail.load(Relaxed));
        let mut available = match if cached >= wanted {
            receiver.available()
        } else {
            receiver.available_now()
        } {
            Ok(Some(available)) => available,
            Ok(None) => return self.take_end(),
            Err(_) => {
                end.reset(Reason::Violation);
                return Took::Again;
            }
        };
        if available.len < wanted {
            end.socket.gather(available.len, || {
                if let Ok(Some(now)) = receiver.available_now() {
                    available = now;
                }
                available.len
            });
        }
        if how.peek {
            return self.peek_ring(available, to, how, done);
        }
        let len = wanted.min(available.len).min(end.socket.limits().piece);
        if !how.discard {
            to.each(*done, len as usize, |at, len, skip| {
                // SAFETY: the program's buffer, as long as it says.
                unsafe { receiver.copy(available, skip, at, len) }
            });
        }
        if !receiver.consume(available, len) {
            return Took::Overtaken;
        }
        if receiver.publish() && wake::asked(&end.incoming().space) != 0 {
            *answer = true;
        }
        *done += len as usize;
        Took::Some
    }

    /// True when something comes behind what was just taken that a receive goes on with: the rest of the ring, the
    /// ring behind the anchor, or the anchor behind the ring.
    #[inline]
    fn goes_on(&self, how: How) -> bool {
        let (rx, producer) = (self.end.rx(), &self.end.incoming().producer);
        if how.peek {
            return false;
        }
        match rx.phase.load(Relaxed) {
            phase::RING => {
                rx.seen_head.load(Relaxed) != rx.tail.load(Relaxed)
                    || producer.mark.load(Acquire) & mark::END != 0
            }
            phase::SWITCHING => producer.switch_at.load(Acquire) == rx.tail.load(Relaxed),
            _ => false,
        }
    }

    /// Copies what the ring has, and what stands behind its end on the anchor.
    #[inline(never)]
    fn peek_ring(
        &self,
        available: crate::ring::Available,
        to: &Buffers,
        how: How,
        done: &mut usize,
    ) -> Took {
        let shared = self.end.shared;
        let wanted = (to.total - *done) as u64;
        if how.whole && available.len < wanted.min(shared.ring_size()) && !shared.has_ended() {
            return Took::Few(available.at + available.len);
        }
        self.copy_from_ring(available, to, how, done);
        let ended = self.end.incoming().producer.mark.load(Acquire) & mark::END != 0;
        if ended && *done != to.total && !shared.has_bytes_after(available.at + available.len) {
            self.drain();
            let socket = &self.end.socket;
            // An error, which a look would take, stays for the next call.
            let is_there = socket.unread() != Some(0) && !socket.is_at_mark();
            if self.outstanding() == 0 && is_there {
                self.take_anchor(to, *done, to.total - *done, how, done);
            }
        }
        Took::Some
    }

    fn copy_from_ring(
        &self,
        available: crate::ring::Available,
        to: &Buffers,
        how: How,
        done: &mut usize,
    ) {
        let len = ((to.total - *done) as u64).min(available.len);
        if !how.discard {
            to.each(*done, len as usize, |at, len, skip| {
                // SAFETY: the program's buffer, as long as it says.
                unsafe { self.receiver.copy(available, skip, at, len) }
            });
        }
        *done += len as usize;
    }

    /// The ring is empty: has the direction ended?
    #[inline(never)]
    fn take_end(&self) -> Took {
        let end = self.end;
        // The anchor's end comes after the marks, so it is looked at first.
        let seen = end.rx().anchor.load(Acquire);
        let marks = end.shared.marks();
        let shut = end.rx().shut.load(Relaxed) != 0;
        if marks == 0 && seen == 0 && !shut {
            return Took::Nothing;
        }
        // Marks, and the anchor's end, come after the last byte: look for that once more.
        match self.receiver.available_now() {
            Ok(Some(_)) => return Took::Again,
            Ok(None) => {}
            Err(_) => {
                end.reset(Reason::Violation);
                return Took::Again;
            }
        }
        match then(marks, shut) {
            Then::Reset => {
                end.reset(Reason::PeerReset);
                Took::Again
            }
            Then::Anchor { .. } => {
                self.incoming_ended();
                Took::Left
            }
            Then::End if marks == 0 => self.kernels_end(),
            Then::End => Took::End,
            Then::More => self.anchor_end(),
        }
    }

    /// Nothing more comes on the ring, and the other end has said nothing of an end. Where the kernel has the other direction, it
    /// knows how that one stands, and of an error.
    fn kernels_end(&self) -> Took {
        let end = self.end;
        if end.tx().phase.load(Acquire) == phase::RING {
            return Took::End;
        }
        // Tokens stand before it.
        self.drain();
        let seen = end.rx().anchor.fetch_and(!anchor::ERROR, AcqRel);
        match end.socket.peek() {
            _ if seen & anchor::ERROR != 0 => Took::Error(libc::ECONNRESET),
            Got::Error(error) => Took::Error(error),
            _ => Took::End,
        }
    }

    /// The anchor has ended while it was read, unless the other end has switched meanwhile: then the
    /// rest is on the ring.
    fn anchor_end_unless_switched(&self, before: u64) -> Took {
        if self.end.incoming().producer.switch_at.load(Acquire) != before {
            return Took::Again;
        }
        self.anchor_end()
    }

    /// The anchor has ended: with the error that a look at it has taken, if there was one.
    fn anchor_end(&self) -> Took {
        let seen = self.end.rx().anchor.fetch_and(!anchor::ERROR, AcqRel);
        if seen & anchor::ERROR != 0 {
            return Took::Error(libc::ECONNRESET);
        }
        self.kernels_end()
    }

    /// The kernel reports an error of the anchor. It resets a connection for tokens that its end has
    /// not read, which the program must not see; unless the other end has broken it, and has said so before.
    fn anchor_error(&self, before: u64, error: i32) -> Took {
        if error != libc::ECONNRESET {
            return Took::Error(error);
        }
        if self.end.shared.marks() & mark::RESET != 0 {
            return Took::Again;
        }
        self.end.note_end(true);
        self.anchor_end_unless_switched(before)
    }

    /// Receives on the anchor what was sent there before the other end switched.
    #[inline(never)]
    pub(super) fn take_switching(&self, to: &Buffers, how: How, done: &mut usize) -> Took {
        let (end, rx) = (self.end, self.end.rx());
        let producer = &end.incoming().producer;
        let position = rx.tail.load(Relaxed);
        let mut limit = to.total - *done;
        let before = producer.switch_at.load(Acquire);
        let ready = if before == NOT_SWITCHED {
            // What is on the anchor now is the program's, unless the other end switches meanwhile.
            end.socket.unread().unwrap_or(0)
        } else {
            u64::MAX
        };
        let marks = end.shared.marks();
        let ended = before == NOT_SWITCHED && marks & mark::END != 0;
        // The other end may tell of a break by a token, also where it has not switched.
        let broken = marks & mark::RESET != 0;
        let tokens = if broken { self.outstanding() } else { 0 };
        let ready = ready.saturating_sub(u64::from(tokens));
        let ahead = Ahead::of(producer, position);
        match ahead {
            Ahead::Ring => {
                self.receiver.switch(position);
                end.set_receiving(phase::RING);
                return Took::Again;
            }
            Ahead::Impossible => {
                end.reset(Reason::Violation);
                return Took::Again;
            }
            // What is in the ring lies behind that.
            Ahead::Anchor(bytes) if self.receiver.available_from(position + bytes).is_err() => {
                end.reset(Reason::Violation);
                return Took::Again;
            }
            Ahead::Unswitched if ended => {
                self.incoming_ended();
                return Took::Left;
            }
            Ahead::Unswitched => limit = limit.min(ready.min(MOST as u64) as usize),
            Ahead::Anchor(bytes) => limit = limit.min(bytes.min(MOST as u64) as usize),
        }
        if limit == 0 && broken {
            end.reset(Reason::PeerReset);
            return Took::Again;
        }
        if limit == 0 {
            // A look, that takes nothing, tells the end and errors.
            return match end.socket.peek() {
                Got::End => self.anchor_end_unless_switched(before),
                Got::Nothing => Took::Nothing,
                Got::Error(error) => self.anchor_error(before, error),
                Got::Bytes(_) if to.total == *done => Took::Some,
                Got::Bytes(_) => self.take_uncounted(position, to, how, done),
            };
        }
        let start = *done;
        let stop = self.take_anchor(to, start, limit, how, done);
        let total = (*done - start) as u64;
        if total != 0 {
            if !how.peek {
                rx.tail.store(position + total, Relaxed);
            } else if ahead == Ahead::Anchor(total)
                && let Ok(available) = self.receiver.available_from(position + total)
            {
                let mut end_of_ring = position + total;
                if let Some(available) = available {
                    self.copy_from_ring(available, to, how, done);
                    end_of_ring = available.at + available.len;
                }
                self.peek_past_tokens(total, end_of_ring, to, how, done);
            }
            return Took::Some;
        }
        match stop {
            // What came before the break has been read.
            _ if broken => {
                end.reset(Reason::PeerReset);
                Took::Again
            }
            Some(Got::End) => self.anchor_end_unless_switched(before),
            Some(Got::Error(error)) => self.anchor_error(before, error),
            _ => Took::Nothing,
        }
    }

    /// A byte is there that did not count as unread: it has just come, or urgent data comes next. The kernel counts nothing behind that,
    /// and passes over it.
    #[cold]
    #[inline(never)]
    fn take_uncounted(&self, position: u64, to: &Buffers, how: How, done: &mut usize) -> Took {
        let end = self.end;
        // A byte that came before the other end has switched is the program's.
        let is_next = end.socket.unread() == Some(0);
        if !is_next || Receiver::switch_at(end.incoming()).is_some() {
            return Took::Again;
        }
        if S::IN_PLACE {
            // What it is not given has a position, too.
            end.reset(Reason::Urgent);
            return Took::Again;
        }
        let start = *done;
        self.take_anchor(to, start, 1, how, done);
        if *done == start {
            return Took::Nothing;
        }
        if !how.peek {
            end.rx().tail.store(position + 2, Relaxed);
        }
        Took::Some
    }

    /// Copies what the anchor has behind the ring's end, where so many `unread` bytes and the tokens lie before it.
    fn peek_past_tokens(
        &self,
        unread: u64,
        end_of_ring: u64,
        to: &Buffers,
        how: How,
        done: &mut usize,
    ) {
        let ended = self.end.incoming().producer.mark.load(Acquire) & mark::END != 0;
        if !ended || how.discard || self.end.shared.has_bytes_after(end_of_ring) {
            return;
        }
        let mut skip = unread + u64::from(self.outstanding());
        let mut is_more = true;
        to.each(*done, to.total - *done, |at, len, _| {
            // SAFETY: the program's buffer, as long as it says.
            let got = is_more.then(|| unsafe { self.end.socket.peek_behind(skip, at, len) });
            is_more = got == Some(Got::Bytes(len));
            if let Some(Got::Bytes(got)) = got {
                *done += got;
                skip += got as u64;
            }
        });
    }

    /// Takes up to `limit` bytes off the anchor, to the place behind `from` bytes. What stopped it.
    pub(super) fn take_anchor(
        &self,
        to: &Buffers,
        from: usize,
        limit: usize,
        how: How,
        done: &mut usize,
    ) -> Option<Got> {
        let take = match (how.peek, how.discard) {
            (false, false) => Take::Into,
            (true, false) => Take::Peek,
            (false, true) => Take::Discard,
            (true, true) => Take::Count,
        };
        let mut stop = None;
        to.each(from, limit, |at, len, _| {
            if stop.is_some() {
                return;
            }
            // SAFETY: the program's buffer, as long as it says.
            let got = unsafe { self.end.socket.take(at, len, take) };
            if let Got::Bytes(got) = got {
                *done += got;
            }
            // A second look would find the same bytes again.
            if got != Got::Bytes(len) || how.peek {
                stop = Some(got);
            }
        });
        stop
    }

    /// The ring was read to its end, and what stands behind it on the anchor belongs to the same call.
    #[cold]
    #[inline(never)]
    fn take_rest(&self, to: &Buffers, how: How, done: &mut usize) -> Received {
        // A look has seen what is there, and a receive ends before urgent data.
        // An error stays for the next call.
        let socket = &self.end.socket;
        let is_empty = !how.whole && socket.unread() == Some(0);
        if how.peek || is_empty || socket.is_at_mark() {
            return Received::Bytes;
        }
        self.take_anchor(to, *done, to.total - *done, how, done);
        if how.whole && *done != to.total {
            return Received::Kernel;
        }
        Received::Bytes
    }
}
