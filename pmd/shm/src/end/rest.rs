//! The rest: what the other end has left in the ring goes out again on the anchor, before anything else does (phase
//! LEAVING). Whoever sends, follows, closes or asks for readiness sends as much of it as the anchor takes now. None of it
//! waits but [`Sending::push_rest`], for a connection that must be the kernel's at once, or is about to be closed.
//!
//! The position stands in the end page, so any process or thread that holds the end goes on where another one has stopped:
//! under the half's lock, and with signals held back, so that no handler finds a send half done. Before each send the
//! position is marked ([`AGAIN`]), and stored without the mark behind it. Who finds the mark is the successor of a process
//! that has ended in between, or of a thread that `exec` has ended: then nobody knows how much was sent, and the stream is
//! reset. No byte is sent twice or left out. And as long as there is a rest, the kernel breaks the connection when all who
//! hold it have ended, however they end.

use super::patience::Waiting;
use super::{Anchor, End, Got, Process, Sending, Shared, Until};
use crate::layout::{AGAIN, phase};
use crate::reason::Reason;
use crate::sync::Ordering::*;

/// `SO_LINGER` with no time: a close breaks the connection.
const BREAKS: u64 = 1 << 32;

impl Shared {
    /// True while what the other end has left in the ring is still to go out on the anchor.
    #[inline]
    pub fn has_rest(&self) -> bool {
        self.tx().phase.load(Acquire) == phase::LEAVING
    }

    /// Bytes of that which the anchor has not taken yet.
    pub fn rest(&self) -> u64 {
        if !self.has_rest() {
            return 0;
        }
        let from = self.tx().again.load(Relaxed) & !AGAIN;
        crate::ring::position(self.tx().head.load(Relaxed)).saturating_sub(from)
    }
}

impl<S: Anchor + Process> End<'_, S> {
    /// Sends as much of the rest as the anchor takes now, where there is one. Takes no lock but the half's, and tells nobody
    /// but those who wait ([`Process::changed`]) that the direction is the anchor's: [`End::finished`] does.
    pub fn send_rest(&self) {
        if self.shared.has_rest() {
            self.lock_tx().send_rest();
        }
    }
}

impl<S: Anchor + Process> End<'_, S> {
    /// What the program has said of a close, where the kernel was told otherwise.
    pub fn said_linger(&self) -> Option<u64> {
        let _half = self.shared.has_rest().then(|| self.lock_tx())?;
        (self.shared.has_rest()).then(|| self.tx().linger.load(Relaxed))
    }

    /// The program says something of a close. False when it is the kernel's to be told.
    pub fn say_linger(&self, linger: u64) -> bool {
        if !self.shared.has_rest() {
            return false;
        }
        let _half = self.lock_tx();
        let keeps = self.shared.has_rest();
        if keeps {
            self.tx().linger.store(linger, Relaxed);
        }
        keeps
    }
}

impl<S: Anchor + Process> Sending<'_, '_, S> {
    /// The other end has left (DEMOTED), and has said where: what stands in the ring from there on is to go out again.
    #[cold]
    pub(super) fn begin_rest(&self) {
        let end = self.end;
        let stop = end.out().consumer.stop.load(Acquire);
        let from = stop.max(end.out().producer.switch_at.load(Relaxed));
        let is_there = if S::IN_PLACE {
            self.sender.is_filled(from)
        } else {
            self.sender.with_published(from, |_, _| ()).is_ok()
        };
        if !is_there {
            return end.reset(Reason::Violation);
        }
        // The phase says that the position counts: who dies before it has sent nothing.
        end.tx().again.store(from, Release);
        end.tx().linger.store(end.socket.linger(), Relaxed);
        // Who ends now would leave the other one with a part of the bytes, and an end that looks like one.
        end.socket.set_linger(BREAKS);
        end.set_sending(phase::LEAVING);
        if !S::IN_PLACE {
            self.send_rest();
        }
    }

    /// Sends as much of the rest as the anchor takes now. The direction is the anchor's once all of it is out.
    #[cold]
    pub(super) fn send_rest(&self) {
        self.end.socket.undisturbed(|| {
            while self.end.tx().phase.load(Acquire) == phase::LEAVING && self.send_piece() {}
        });
    }

    /// Sends one piece of the rest. False when the anchor takes no more now.
    pub(super) fn send_piece(&self) -> bool {
        let (end, tx) = (self.end, self.end.tx());
        let from = tx.again.load(Acquire);
        if from & AGAIN != 0 {
            end.reset(Reason::Lost);
            return false;
        }
        let send = |at, len| {
            tx.again.store(from | AGAIN, SeqCst);
            // SAFETY: the ring's memory is mapped as long as the stream.
            (unsafe { end.socket.send(at, len) }, len)
        };
        let sent = if S::IN_PLACE {
            self.sender.with_filled(from, send)
        } else {
            self.sender.with_published(from, send)
        };
        match sent {
            Err(_) => end.reset(Reason::Violation),
            Ok(Some((Got::Bytes(sent), len))) => {
                tx.again.store(from + sent.min(len) as u64, SeqCst);
                return true;
            }
            Ok(Some((Got::Nothing, _))) => tx.again.store(from, SeqCst),
            // More may come, until the direction has ended. An error is judged as one that a look finds.
            Ok(None) if S::IN_PLACE && tx.shut.load(Relaxed) == 0 => {}
            Ok(Some((Got::End | Got::Error(_), _))) if S::IN_PLACE => {
                tx.again.store(from, SeqCst);
                end.note_end(true);
            }
            // All is out, or it has nowhere to go, which the next call on the anchor reports.
            Ok(None | Some((Got::End | Got::Error(_), _))) => {
                end.socket.set_linger(tx.linger.load(Relaxed));
                self.hand_over();
            }
        }
        false
    }

    /// Sends all of the rest, waiting for room as long as this process's patience lasts. False when it is not out then.
    pub(super) fn push_rest(&self, waiting: &mut Waiting<'_>) -> bool {
        loop {
            self.send_rest();
            if !self.end.shared.has_rest() {
                return !self.end.shared.is_reset();
            }
            if !waiting.on_anchor(&self.end.socket, Until::Room) {
                return false;
            }
        }
    }
}
