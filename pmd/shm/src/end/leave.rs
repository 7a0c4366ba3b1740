//! Leaving the rings: what rings cannot carry goes back to the kernel, at an exact position.
//!
//! Each direction is ended by its sender: it marks END at its head, and everything after that goes
//! over the anchor. The receiver reads the ring up to the mark, takes the counted tokens off
//! the anchor, and reads the anchor from then on. An end that [leaves](End::leave) ends its own direction and
//! asks the other end (LEAVE) to end the other one with its next call.
//!
//! An end that must be the kernel's at once ([`End::abandon`]: exec, passing the fd, stdio) also says
//! where it stopped reading (DEMOTED); the other end sends what lies behind that again, on the
//! anchor, as room comes there (`rest.rs`).
//!
//! No token may come after END, since the receiver could not tell it from data: the sender
//! counts one last one before it marks, and sends it after. An abandoner knows the other end's
//! number of tokens once no RINGING stands in its own requests, because DEMOTED beside them
//! forbids further ones.

use super::patience::Waiting;
use super::token::send_token;
use super::{Anchor, Drained, End, Got, Process, Receiving, Sending, Shut, Take, Until};
use crate::layout::{Counter, NOT_SWITCHED, anchor, mark, phase, want};
use crate::reason::Reason;
use crate::sync::{AtomicU32, Ordering::*, model_fence};
use crate::wake;

impl<'a, S: Anchor + Process> End<'a, S> {
    /// ECONNRESET of a reset stream is reported by a send if no call has reported it yet: true then.
    pub fn take_send_error(&self) -> bool {
        // Before that, as long as bytes stand in front of the break, ERROR says that it waits to be told.
        let told = if self.shared.is_reset() {
            anchor::SEND_ERROR | anchor::ERROR
        } else {
            anchor::SEND_ERROR
        };
        self.rx().anchor.fetch_or(anchor::SEND_ERROR, AcqRel) & told == 0
    }

    /// ECONNRESET of a reset stream is reported by a receive if no call has reported it yet: true then.
    pub(super) fn take_reset_error(&self) -> bool {
        let reported = anchor::ERROR | anchor::EOF;
        let before = self.rx().anchor.fetch_or(reported, AcqRel);
        before & (anchor::SEND_ERROR | anchor::ERROR) == 0
    }

    /// The words in which this end asks the other one for something.
    fn requests(&self) -> [&'a AtomicU32; 2] {
        [&self.incoming().bytes.want, &self.out().space.want]
    }

    /// The other end has left: gives it what it did not read, and ends this direction as well.
    pub fn follow(&self) {
        let half = self.lock_tx();
        if half.is_nested() {
            return;
        }
        match self.tx().phase.load(Acquire) {
            phase::RING if self.out().bytes.want.load(Acquire) & want::DEMOTED != 0 => {
                half.begin_rest();
            }
            phase::RING | phase::ANCHOR => half.end_sending(),
            phase::LEAVING => half.send_rest(),
            _ => {}
        }
        drop(half);
        self.finished(Reason::PeerDemoted);
    }

    /// Takes note when both directions are the anchor's. Called without a lock.
    pub fn finished(&self, reason: Reason) {
        if !self.shared.is_on_rings()
            && !self.shared.is_reset()
            && self.page().reason.swap(reason as u32, AcqRel) == 0
        {
            self.socket.count(Counter::Demoted);
            self.socket.left(reason);
        }
    }

    /// Takes the end of the incoming ring, if that is where the receiver stands.
    pub fn settle_incoming(&self) {
        let half = self.lock_rx();
        let ended = self.incoming().producer.mark.load(Acquire) & mark::END != 0;
        let unswitched = self.incoming().producer.switch_at.load(Acquire) == NOT_SWITCHED;
        let is_there = match self.rx().phase.load(Acquire) {
            phase::RING => matches!(half.receiver.available_now(), Ok(None)),
            phase::SWITCHING => unswitched,
            _ => false,
        };
        if ended && !half.is_nested() && is_there {
            half.incoming_ended();
        }
        drop(half);
        self.finished(Reason::PeerDemoted);
    }

    /// Leaves the rings: what is sent from now on goes over the anchor, and what comes
    /// does so once the other end has followed.
    pub fn leave(&self) {
        let half = self.lock_tx();
        if !half.is_nested() {
            half.end_sending();
        }
    }

    /// Leaves the rings so that the kernel has every byte from now on, whoever reads. What was in the
    /// ring and not read comes with the next calls of the other end. `Err` when that can't be: then the
    /// stream is to be [broken](End::give_up), for this reason. The caller blocks signals.
    pub fn abandon(&self) -> Result<(), Reason> {
        let sending = self.lock_tx();
        let receiving = self.lock_rx();
        let mut waiting = Waiting::new(self.socket.patience());
        if self.out().bytes.want.load(Acquire) & want::DEMOTED != 0
            && self.tx().phase.load(Acquire) == phase::RING
        {
            sending.begin_rest();
        }
        let position = self.rx().tail.load(Relaxed);
        self.incoming().consumer.stop.store(position, Release);
        for request in self.requests() {
            request.fetch_or(want::DEMOTED, SeqCst);
        }
        if !self.wait_for_ringing(&mut waiting) {
            return Err(Reason::Late);
        }
        sending.end_sending();
        // Nobody will send the rest once this end is the kernel's.
        if !sending.push_rest(&mut waiting) {
            return Err(Reason::Late);
        }
        if self.rx().phase.load(Acquire) == phase::DEMOTED {
            return Ok(());
        }
        let switched = self.incoming().producer.switch_at.load(Acquire);
        let quiet = receiving.outstanding() == 0
            || switched == position
            || self.rx().phase.load(Relaxed) == phase::RING;
        // The end is marked by a sender that has not seen DEMOTED, and will not send again.
        let ended = self.incoming().producer.mark.load(Acquire) & mark::END != 0;
        let unread =
            switched != NOT_SWITCHED && self.shared.has_bytes_after(position.max(switched));
        if !quiet || ended && unread {
            return Err(Reason::NotQuiet);
        }
        if !receiving.take_last_tokens(&mut waiting) {
            return Err(Reason::Late);
        }
        self.set_receiving(phase::DEMOTED);
        Ok(())
    }

    /// Breaks a stream that can't be left as it should: the kernel's connection, too, which somebody else may read.
    pub fn give_up(&self, reason: Reason) {
        self.reset(reason);
        self.socket.break_now();
    }

    /// Waits until the other end has sent the tokens that it has decided on. False when it takes too long.
    fn wait_for_ringing(&self, waiting: &mut Waiting<'_>) -> bool {
        for request in self.requests() {
            while request.load(Acquire) & want::RINGING != 0 {
                // No token comes behind the anchor's end.
                if self.is_at_end() {
                    return true;
                }
                if !waiting.turn(&self.socket) {
                    return false;
                }
            }
        }
        true
    }

    /// True when nothing more will come on the anchor: the other end has closed or died, and all of it was taken.
    fn is_at_end(&self) -> bool {
        // An own end looks the same, and says nothing about the other one.
        if self.rx().shut.load(Relaxed) != 0 || self.socket.is_open() {
            return false;
        }
        if self.rx().phase.load(Acquire) == phase::RING {
            self.lock_rx().drain_all();
        }
        matches!(self.socket.peek(), Got::End | Got::Error(_))
    }

    /// The program ends its direction (`SHUT_WR`). False when it is the kernel's from now on, since it
    /// was not on the ring: then the end has left.
    pub fn shut_sending(&self) -> bool {
        let half = self.lock_tx();
        if self.tx().phase.load(Acquire) == phase::ANCHOR {
            half.try_switch();
        }
        if self.tx().phase.load(Acquire) == phase::RING
            && self.out().bytes.want.load(Acquire) & want::DEMOTED != 0
        {
            half.begin_rest();
        }
        match self.tx().phase.load(Acquire) {
            phase::RING if self.out().bytes.want.load(Acquire) & want::CLOSED != 0 => {
                // Nobody reads the ring any more. A token to a socket that is closed would be answered with a reset.
                self.settle_reset();
                if !self.shared.is_reset() {
                    self.set_sending_shut();
                    half.hand_over();
                }
                true
            }
            phase::RING => {
                self.set_sending_shut();
                half.sender.publish();
                self.out().producer.mark.fetch_or(mark::FIN, SeqCst);
                if wake::asked(&self.out().bytes) != 0 {
                    half.after_answer(self.answer(&self.out().bytes));
                }
                true
            }
            phase::DEMOTED => {
                self.socket.shut(Shut::Sending);
                true
            }
            phase::LEAVING => {
                // The kernel's end goes behind the rest.
                self.set_sending_shut();
                half.send_rest();
                true
            }
            _ => {
                // Not switched: the FIN goes behind the bytes on the anchor. No token can
                // follow it, so the other end must not depend on one.
                self.set_sending_shut();
                half.end_sending();
                false
            }
        }
    }

    /// The program wants nothing more (`SHUT_RD`).
    pub fn shut_receiving(&self) {
        self.set_receiving_shut();
        // The kernel's own mark wakes whoever sleeps on the anchor, in any process.
        self.socket.shut(Shut::Receiving);
    }

    /// The last descriptor is about to be closed, or with `breaks` the connection is to be broken by that.
    pub fn close(&self, breaks: bool) {
        if self.shared.peer_has_left() {
            self.follow();
        }
        let mut waiting = Waiting::new(self.socket.patience());
        let is_out = breaks
            || !self.shared.has_rest()
            || self.lock_tx().push_rest(&mut waiting)
            || self.shared.is_reset();
        let producer = &self.out().producer;
        // Where both directions have ended, TCP has no connection any more that a close could break.
        let is_over = self.tx().shut.load(Relaxed) != 0 && self.shared.marks() & mark::FIN != 0;
        let breaks = !is_over && (breaks || self.shared.has_unread_ring());
        if breaks {
            // TCP answers a close with unread bytes with a reset.
            self.socket.break_at_close();
            producer.mark.fetch_or(mark::RESET, AcqRel);
        } else if self.tx().phase.load(Acquire) == phase::RING {
            producer.mark.fetch_or(mark::FIN, AcqRel);
        }
        for request in self.requests() {
            request.fetch_or(want::CLOSED, SeqCst);
        }
        // Who sleeps on the anchor hears of it from the kernel.
        self.end_others_nap();
        // The kernel would answer a close with unread tokens with a reset as well, and one that
        // comes later; and would drop what it has not sent yet.
        self.settle_switch();
        // Without any of that, a token that comes later only makes the other end's kernel say ECONNRESET, and that end goes by
        // what stands in the ring.
        let keeps_all = breaks
            || self.takes_last_tokens(&mut waiting)
            || self.is_at_end()
            || self.socket.unsent() == Some(0);
        if !(is_out && keeps_all) {
            self.reset(Reason::Late);
            self.socket.break_at_close();
        } else if is_over {
            // Also where the program has asked for a break.
            self.socket.set_linger(0);
            self.discard_anchor();
        }
    }

    /// Takes off the anchor what nobody will read, so that the kernel does not answer a close with a reset. Nothing more comes.
    #[cold]
    #[inline(never)]
    fn discard_anchor(&self) {
        let mut bytes = [0_u8; 4096];
        let (start, most) = (bytes.as_mut_ptr(), bytes.len());
        for _ in 0..self.socket.unread().unwrap_or(0).div_ceil(most as u64) {
            // SAFETY: the buffer has so many bytes.
            let got = unsafe { self.socket.take(start, most, Take::Discard) };
            if !matches!(got, Got::Bytes(_)) {
                return;
            }
        }
    }

    /// Takes the tokens that are on their way to an end which is about to close. False when one takes too long.
    fn takes_last_tokens(&self, waiting: &mut Waiting<'_>) -> bool {
        self.wait_for_ringing(waiting)
            && (self.rx().phase.load(Acquire) != phase::RING
                || self.lock_rx().take_last_tokens(waiting))
    }
}

impl<S: Anchor + Process> Sending<'_, '_, S> {
    /// What a sender does after it has answered: the other end may have left, or closed.
    #[cold]
    pub fn after_answer(&self, taken: u32) {
        let end = self.end;
        // A nested sender leaves it to the outer one, whose bytes come first.
        if end.tx().phase.load(Acquire) != phase::RING || self.is_nested() {
            return;
        }
        if taken & want::DEMOTED != 0 {
            self.begin_rest();
        } else if taken & want::CLOSED != 0 {
            // Before its kernel says so.
            end.settle_reset();
            if end.shared.is_reset() {
                return;
            }
            // Nobody will read the ring. What the kernel says of a send to a closed connection is
            // provoked with one byte, and is right from the next call on.
            end.socket.signal();
            end.set_sending(phase::DEMOTED);
            end.socket.look_later();
        } else if taken & want::LEAVE != 0 {
            self.end_sending();
        }
    }

    /// Ends this end's own direction: the ring at its head, the rest on the anchor. A direction that
    /// has not moved to its ring does so first, where it can: a token may follow then, for an end
    /// that sleeps for space and has to hear of this. While a thread is inside a kernel send, it is
    /// left to that one, when it comes back.
    pub(super) fn end_sending(&self) {
        let end = self.end;
        let (tx, producer) = (end.tx(), &end.out().producer);
        let before = tx.phase.load(Acquire);
        if before != phase::RING && before != phase::ANCHOR {
            return;
        }
        for request in end.requests() {
            request.fetch_or(want::LEAVE, SeqCst);
        }
        model_fence();
        let shut = tx.shut.load(Relaxed) != 0;
        if before == phase::ANCHOR && !shut && tx.in_kernel.load(SeqCst) != 0 {
            return;
        }
        let peer = &end.out().bytes.want;
        let closed = peer.load(Acquire) & want::CLOSED != 0;
        if before == phase::RING || !closed && self.try_switch() {
            self.sender.publish();
            // The last token, unless the other end has gone to the kernel and would read it: then
            // it gets what it has not read, and needs no mark.
            match end.begin_ringing(peer) {
                Ok(()) => {
                    send_token(producer, &end.socket, || {
                        producer.mark.fetch_or(mark::END, SeqCst);
                    });
                    wake::rung(peer);
                }
                Err(wants) if wants & want::DEMOTED != 0 => return self.begin_rest(),
                // It has closed, and what it sent before is still to be read here.
                Err(_) => {
                    producer.mark.fetch_or(mark::END, SeqCst);
                }
            }
        } else {
            // The other end is not ready, and sees LEAVE when it is; or it is the kernel's.
            producer.mark.fetch_or(mark::END, SeqCst);
        }
        end.end_others_nap();
        self.hand_over();
    }

    /// The direction is the anchor's for ever.
    pub(super) fn hand_over(&self) {
        let tx = self.end.tx();
        self.end.set_sending(phase::DEMOTED);
        if tx.shut.load(Relaxed) != 0 {
            self.end.socket.shut(Shut::Sending);
        }
    }
}

impl<S: Anchor + Process> Receiving<'_, '_, S> {
    /// The ring has been read to its end: takes the last tokens off the anchor. They end the sleep
    /// of others, who may look first, which they do without the lock.
    pub(super) fn incoming_ended(&self) {
        let (end, rx) = (self.end, self.end.rx());
        let mut waiting = Waiting::new(end.socket.patience());
        while self.outstanding() != 0 && rx.waiters.load(SeqCst) != 0 && waiting.turn(&end.socket) {
        }
        if self.take_last_tokens(&mut waiting) {
            end.set_receiving(phase::DEMOTED);
        } else {
            let broken = rx.anchor.load(Acquire) & anchor::BROKEN != 0;
            end.reset(if broken {
                Reason::PeerReset
            } else {
                Reason::Late
            });
        }
    }

    /// Takes all counted tokens, also those on their way. False when one does not come.
    fn take_last_tokens(&self, waiting: &mut Waiting<'_>) -> bool {
        for _ in 0..64 {
            let drained = self.drain_all();
            if self.outstanding() == 0 {
                return true;
            }
            match drained {
                // Nothing comes behind that, see `is_at_end`.
                Drained::End if self.end.rx().shut.load(Relaxed) == 0 => return true,
                Drained::Error | Drained::Foreign(_) => return false,
                _ => {}
            }
            if !waiting.on_anchor(&self.end.socket, Until::Bytes) {
                return self.outstanding() == 0;
            }
        }
        false
    }
}
