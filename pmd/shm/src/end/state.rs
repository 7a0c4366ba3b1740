//! What the words of a stream say: read once, checked, one value for each direction. Questions are functions of it, and
//! change nothing.
//!
//! A caller that spins asks `quick.rs`, which reads single words; the tests hold that it never contradicts this.

use super::Shared;
use crate::layout::{NOT_SWITCHED, Producer, anchor, mark, phase};
use crate::sync::Ordering::*;

/// What comes behind the bytes that are in the incoming ring now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// More bytes may come, unless the anchor has told of an end.
    More,
    /// Nothing: end of file.
    End,
    /// The rest comes on the anchor; `ended`: and it is known already that it has an end.
    Anchor {
        /// The other end has said so, or the program wants nothing more.
        ended: bool,
    },
    /// ECONNRESET.
    Reset,
}

/// What the marks of a producer say; `shut`: the program wants nothing more. A break comes before all, and the rest of the
/// bytes before their end.
pub(super) fn then(marks: u32, shut: bool) -> Then {
    let ended = marks & mark::FIN != 0 || shut;
    if marks & mark::RESET != 0 {
        Then::Reset
    } else if marks & mark::END != 0 {
        Then::Anchor { ended }
    } else if ended {
        Then::End
    } else {
        Then::More
    }
}

/// What stands between a receiver's position on the anchor and the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ahead {
    /// Nothing: the ring comes next.
    Ring,
    /// So many bytes of the anchor.
    Anchor(u64),
    /// Bytes of the anchor, without end: the other end has not switched.
    Unswitched,
    /// The other end says that it switched before bytes that it has sent: a violation.
    Impossible,
}

impl Ahead {
    /// Of a receiver that has taken the bytes up to `position` off the anchor.
    #[inline]
    pub(super) fn of(producer: &Producer, position: u64) -> Self {
        match producer.switch_at.load(Acquire) {
            NOT_SWITCHED => Ahead::Unswitched,
            at if at == position => Ahead::Ring,
            at if at < position => Ahead::Impossible,
            at => Ahead::Anchor(at - position),
        }
    }
}

/// Where the next byte comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// From the anchor. With `None` the other end has not switched; else so many bytes of the anchor come first, and so
    /// many wait in the ring behind them.
    Anchor {
        /// Bytes of the anchor before the ring, and in the ring.
        switched: Option<(u64, u64)>,
        /// What comes behind these.
        then: Then,
    },
    /// From the ring, which has so many bytes now.
    Ring {
        /// Bytes in the ring.
        bytes: u64,
        /// What comes behind them.
        then: Then,
    },
    /// From the anchor for ever.
    Kernel,
    /// From nowhere: this end is reset.
    Broken,
    /// The other end wrote positions that cannot be: the next receive resets the stream.
    Impossible,
}

/// What the other end does with bytes that are put into the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// It reads them.
    Reads,
    /// It reads them, and wants the direction to end (LEAVE).
    Leaves,
    /// It has closed, or has shut both directions.
    Closed,
    /// It reads the anchor, and wants the rest of the ring there (DEMOTED).
    Abandoned,
}

/// Where the next byte that is sent goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outgoing {
    /// To the anchor, as since birth.
    Anchor,
    /// To the ring.
    Ring {
        /// Room in the ring.
        space: u64,
        /// What the other end does with it.
        peer: Peer,
    },
    /// To the anchor for ever, but not yet: what the other end has left in the ring goes there before.
    Leaving,
    /// To the anchor for ever.
    Kernel,
    /// Nowhere: the program has ended the direction, on the ring or where the kernel does it (`on_anchor`).
    Ended {
        /// The kernel has the direction.
        on_anchor: bool,
    },
    /// Nowhere: this end is reset.
    Broken,
}

/// What the anchor has told of its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// It is alive.
    Nothing,
    /// It has ended.
    End,
    /// It has ended with an error, which waits for a call (`pending`) or was told. In a broken stream, that of the stream.
    Error {
        /// No call has reported it yet.
        pending: bool,
    },
}

/// Both directions of a stream, as one end sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// What comes.
    pub incoming: Incoming,
    /// What goes.
    pub outgoing: Outgoing,
    /// The anchor's end.
    pub anchor: Told,
}

/// Bits of readiness, which are those of `poll` and `epoll`.
pub mod bit {
    use libc::{POLLIN, POLLOUT, POLLRDNORM, POLLWRNORM};
    /// Bits that the receiving half decides.
    pub const IN: i16 = POLLIN | POLLRDNORM;
    /// Bits that the sending half decides.
    pub const OUT: i16 = POLLOUT | POLLWRNORM;
}
use bit::{IN, OUT};
use libc::{POLLERR, POLLHUP, POLLPRI, POLLRDHUP};

/// What the kernel says of the anchor, for [`State::readiness`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Bits of `poll`, of those that [`State::asks_kernel`] names.
    pub bits: i16,
    /// Bytes that the program wants at least before it is told of any (`SO_RCVLOWAT`).
    pub least: u64,
    /// Bytes of the program on the anchor, behind the ring's end.
    pub behind: u64,
}

impl State {
    /// Reads the words.
    ///
    /// The anchor's end is read first: what was published before it is seen then.
    pub fn of(shared: &Shared) -> Self {
        let seen = shared.rx().anchor.load(Acquire);
        let incoming = Incoming::of(shared);
        let broken = incoming == Incoming::Broken;
        State {
            incoming,
            outgoing: Outgoing::of(shared),
            anchor: if broken {
                Told::Error {
                    pending: seen & (anchor::ERROR | anchor::SEND_ERROR) == 0,
                }
            } else if incoming.is_breaking() {
                Told::Error {
                    pending: seen & anchor::SEND_ERROR == 0,
                }
            } else if seen & (anchor::ERROR | anchor::BROKEN) != 0 {
                Told::Error {
                    pending: seen & anchor::ERROR != 0,
                }
            } else if seen != 0 {
                Told::End
            } else {
                Told::Nothing
            },
        }
    }

    /// The bits of `poll` that the kernel has to be asked for, of a program's `events`; 0 for those that it tells
    /// unasked (errors and hang-ups). `None`: it need not be asked.
    pub fn asks_kernel(&self, events: i16, look: bool) -> Option<i16> {
        let mut ask = events & POLLPRI;
        let on_ring = matches!(self.incoming, Incoming::Ring { .. } | Incoming::Impossible);
        // The rest comes on the anchor, and with it the end.
        let goes_on = matches!(
            self.incoming,
            Incoming::Ring {
                then: Then::Anchor { .. },
                ..
            }
        );
        if goes_on {
            ask |= events & POLLRDHUP;
        } else if !on_ring {
            ask |= events & (IN | POLLRDHUP);
        }
        if goes_on || !on_ring {
            // With the end of the other direction, which the kernel does not know, it is a POLLHUP.
            if ask != 0 || matches!(self.outgoing, Outgoing::Ended { .. }) {
                ask |= POLLRDHUP;
            }
        }
        let sends_on_ring = matches!(
            self.outgoing,
            Outgoing::Ring { .. } | Outgoing::Leaving | Outgoing::Ended { on_anchor: false }
        );
        if !sends_on_ring {
            ask |= events & OUT;
        }
        // What goes by itself: errors of a direction that the kernel has again, or has still where nothing more comes in: while
        // something may come, whoever waits for that looks (a program that only receives stays so, and pays for no question).
        let nothing_comes = self.anchor != Told::Nothing
            || !matches!(
                self.incoming,
                Incoming::Ring {
                    then: Then::More,
                    ..
                }
            );
        let left = self.incoming == Incoming::Kernel
            || matches!(
                self.outgoing,
                Outgoing::Leaving | Outgoing::Kernel | Outgoing::Ended { on_anchor: true }
            )
            || self.outgoing == Outgoing::Anchor && nothing_comes;
        let end = look && !(on_ring && sends_on_ring) || events & (IN | OUT | POLLRDHUP) == 0;
        (ask != 0 || left || end).then_some(ask)
    }

    /// True when what a program sees as readable may be on the anchor behind the ring: then the kernel is asked for that.
    pub fn asks_behind_ring(&self) -> bool {
        matches!(
            self.incoming,
            Incoming::Ring {
                bytes: 0,
                then: Then::Anchor { .. }
            }
        )
    }

    /// What `poll` says, of a program's `events`.
    pub fn readiness(&self, kernel: &Kernel, ring_size: u64, events: i16) -> i16 {
        let mut ready = kernel.bits & (POLLPRI | POLLERR | POLLHUP);
        if self.is_broken() {
            let pending = matches!(self.anchor, Told::Error { pending: true });
            ready = IN | OUT | POLLHUP | POLLRDHUP | if pending { POLLERR } else { 0 };
            return ready & (events | POLLERR | POLLHUP);
        }
        ready |= self.incoming_bits(kernel);
        ready |= self.outgoing_bits(kernel, ring_size);
        let shut = matches!(self.outgoing, Outgoing::Ended { .. });
        match self.anchor {
            Told::Error { pending } => {
                ready |= POLLHUP | OUT | if pending { POLLERR } else { 0 };
            }
            _ if ready & POLLRDHUP != 0 && shut => ready |= POLLHUP,
            _ => {}
        }
        ready & (events | POLLERR | POLLHUP)
    }

    /// True when both ends report ECONNRESET, or will once they have read what came before.
    fn is_broken(&self) -> bool {
        self.incoming == Incoming::Broken || self.incoming.is_breaking()
    }

    fn incoming_bits(&self, kernel: &Kernel) -> i16 {
        let mut ready = 0;
        match self.incoming {
            Incoming::Ring { bytes, then } => {
                let ended = matches!(then, Then::End | Then::Anchor { ended: true })
                    || matches!(then, Then::Anchor { .. }) && kernel.bits & POLLRDHUP != 0
                    || self.anchor != Told::Nothing;
                let behind = match then {
                    Then::Anchor { .. } => kernel.behind,
                    _ => 0,
                };
                if bytes >= kernel.least.max(1)
                    || bytes != 0 && bytes + behind >= kernel.least
                    || ended
                {
                    ready |= IN;
                }
                if ended {
                    ready |= POLLRDHUP;
                }
                if self.asks_behind_ring() {
                    ready |= kernel.bits & IN;
                }
            }
            Incoming::Anchor { switched, then } => {
                ready |= kernel.bits & (IN | POLLRDHUP);
                // The end stands in the ring, behind what is unread on the anchor; before the other end has switched there is none.
                if let Some((before, _)) = switched
                    && matches!(then, Then::End | Then::Anchor { ended: true })
                {
                    ready |= if before == 0 {
                        IN | POLLRDHUP
                    } else {
                        POLLRDHUP
                    };
                }
                match switched {
                    Some((0, bytes)) if bytes != 0 => ready |= IN,
                    // The byte that the kernel sees may be a token; then the ring tells.
                    Some((0, _)) if then == Then::More && kernel.bits & POLLRDHUP == 0 => {
                        ready &= !IN;
                    }
                    _ => {}
                }
            }
            Incoming::Impossible => ready |= IN,
            Incoming::Kernel | Incoming::Broken => ready |= kernel.bits & (IN | POLLRDHUP),
        }
        ready
    }

    fn outgoing_bits(&self, kernel: &Kernel, ring_size: u64) -> i16 {
        match self.outgoing {
            // As Linux: a third of the buffer is free.
            Outgoing::Ring { space, peer } => {
                let there =
                    space >= ring_size / 3 || peer != Peer::Reads || self.anchor != Told::Nothing;
                if there { OUT } else { 0 }
            }
            Outgoing::Ended { .. } => OUT,
            // Room on the anchor is for what comes before.
            Outgoing::Leaving => 0,
            Outgoing::Anchor | Outgoing::Kernel | Outgoing::Broken => kernel.bits & OUT,
        }
    }
}

impl Incoming {
    /// The other end has broken the connection, behind bytes that can still be received.
    fn is_breaking(&self) -> bool {
        matches!(
            self,
            Incoming::Ring {
                then: Then::Reset,
                ..
            } | Incoming::Anchor {
                then: Then::Reset,
                ..
            }
        )
    }

    fn of(shared: &Shared) -> Self {
        let (rx, producer) = (shared.rx(), &shared.incoming().producer);
        let phase = rx.phase.load(Acquire);
        // Marks come after the last byte, so they are read before it.
        let marks = shared.marks();
        let then = then(marks, rx.shut.load(Relaxed) != 0);
        let tail = rx.tail.load(Relaxed);
        let in_ring = |from: u64| {
            let bytes = producer.head.load(Acquire).wrapping_sub(from);
            (bytes <= shared.ring_size()).then_some(bytes)
        };
        match phase {
            phase::RING => match in_ring(tail) {
                Some(bytes) => Incoming::Ring { bytes, then },
                None => Incoming::Impossible,
            },
            phase::DEMOTED => Incoming::Kernel,
            phase::ANCHOR | phase::SWITCHING => {
                let before = match Ahead::of(producer, tail) {
                    Ahead::Ring => 0,
                    Ahead::Unswitched => {
                        return Incoming::Anchor {
                            switched: None,
                            then,
                        };
                    }
                    Ahead::Anchor(bytes) => bytes,
                    Ahead::Impossible => return Incoming::Impossible,
                };
                in_ring(tail + before).map_or(Incoming::Impossible, |bytes| Incoming::Anchor {
                    switched: Some((before, bytes)),
                    then,
                })
            }
            _ => Incoming::Broken,
        }
    }
}

impl Outgoing {
    fn of(shared: &Shared) -> Self {
        let tx = shared.tx();
        let phase = tx.phase.load(Acquire);
        if phase != phase::RESET && tx.shut.load(Relaxed) != 0 {
            return Outgoing::Ended {
                on_anchor: phase == phase::DEMOTED,
            };
        }
        match phase {
            phase::ANCHOR => Outgoing::Anchor,
            phase::RING => Outgoing::Ring {
                space: shared.space(),
                peer: shared.peer(),
            },
            phase::LEAVING => Outgoing::Leaving,
            phase::DEMOTED => Outgoing::Kernel,
            _ => Outgoing::Broken,
        }
    }
}
