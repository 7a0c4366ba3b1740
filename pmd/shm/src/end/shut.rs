//! A direction that nobody takes anything of any more, since the other end has closed (CLOSED) or has shut both directions
//! (SHUT): what is sent there is the kernel's, whose answer is the right one. Linux answers bytes for such a socket with a reset, and
//! what the sender is told then depends on what it has heard before.
//!
//! So both ends see to it that the anchor is as the connection would be without rings: the one that shuts both directions ends its
//! own on the anchor as well, behind the FIN in the ring, and the other one sends nothing more to the ring once it has seen the
//! word. Between nodes the anchor leads to the daemon, which takes its end for the program's: there only the ring is ended.

use super::{Anchor, End, Process, Sending, Shut};
use crate::layout::{mark, phase, want};
use crate::sync::Ordering::*;

/// Words of the other end that say that it takes nothing more.
pub(super) const DEAF: u32 = want::CLOSED | want::SHUT;
/// Words of the other end that say that it takes nothing more off the ring.
pub(super) const GONE: u32 = DEAF | want::DEMOTED;

/// Turns that others get to send the token that they have decided on.
const TURNS: u32 = if cfg!(loom) { 1 } else { 100 };

impl<S: Anchor + Process> End<'_, S> {
    /// The program has ended what it sends, also where the kernel has the direction.
    pub fn note_shut_sending(&self) {
        if self.tx().shut.load(Acquire) == 0 {
            self.set_sending_shut();
        }
    }

    /// The program has ended both directions, each by itself: what comes from now on is to be answered with a reset. What came
    /// before can still be read.
    pub fn shut_both(&self) {
        let half = self.lock_tx();
        let is_on_ring = self.tx().phase.load(Acquire) == phase::RING;
        if is_on_ring && half.is_nested() {
            return;
        }
        let requests = [&self.incoming().bytes.want, &self.out().space.want];
        for request in requests {
            request.fetch_or(want::SHUT, SeqCst);
        }
        // A token that is decided on comes first, as a rule: the kernel answers a later one.
        for _ in 0..TURNS {
            if requests
                .iter()
                .all(|word| word.load(Acquire) & want::RINGING == 0)
            {
                break;
            }
            self.socket.give_way();
        }
        if is_on_ring {
            // Behind the last token: FIN stands in the ring, and who waits for room hears the kernel's.
            self.socket.shut(Shut::Sending);
            self.set_sending(phase::DEMOTED);
        }
    }
}

impl<S: Anchor + Process> Sending<'_, '_, S> {
    /// The other end takes nothing more off the ring, or has broken the connection: the direction is the kernel's, unless the stream is
    /// broken. One that has not moved to the ring is the kernel's already, which does not know of a FIN in the ring before the break.
    #[cold]
    pub(super) fn give_up_ring(&self) {
        let end = self.end;
        let is_broken = || end.shared.marks() & mark::RESET != 0;
        let has_abandoned = end.out().bytes.want.load(Acquire) & want::DEMOTED != 0;
        let is_due = match end.tx().phase.load(Acquire) {
            phase::RING => true,
            phase::ANCHOR => is_broken() && !has_abandoned,
            _ => false,
        };
        // A nested sender leaves it to the outer one, whose bytes come first.
        if !is_due || self.is_nested() {
            return;
        }
        // It left first, and then its own process closed: another one may have the socket, and gets what was not read.
        if has_abandoned {
            return self.begin_rest();
        }
        // Before its kernel says so.
        end.settle_reset();
        if end.shared.is_reset() {
            return;
        }
        // What came before the break can still be received.
        end.set_sending(if is_broken() {
            phase::RESET
        } else {
            phase::DEMOTED
        });
        end.socket.look_later();
    }
}
