//! Who has to look: marks, kicks, and what a thread owes to others when it leaves an instance.
//!
//! **The rule.** *A registration that is not marked has asked for everything that it names, or a sign of it is on its way.*
//! Each thing that can make a registration ready comes with such a sign:
//!
//! | what changes | the sign |
//! | --- | --- |
//! | what the peer does with the rings (bytes, space, marks) | the peer takes what was asked, and rings the bell, or sends a token |
//! | what the kernel does with the anchor (bytes before a switch, its end, tokens) | an edge in the inner instance |
//! | what this process does with its end (a phase, an own shutdown, an end that was noted, tokens taken off) | [`changed`], in every instance |
//! | the registration itself (added, modified, moved) | it is marked |
//! | bits of `own`, the bell, edges of the inner instance | whoever takes them marks what they name |
//!
//! A mark is taken by whoever looks, and only behind an ask: *unmark, ask, look*. What comes before the look is seen by it, what
//! comes behind the ask brings a sign.
//!
//! **Several threads.** A thread that sleeps on the instance (in the kernel, on the program's descriptor) is woken by an edge
//! in the inner instance: of an anchor, or of the kicker. Edges are for one: any thread that looks may take one that was meant
//! to wake another, and the sleeper goes on to sleep inside the kernel. So nobody leaves the instance before [`hand_on`]:
//! where somebody sleeps there, each registration that is marked is asked for and looked at, on behalf of the sleepers, and if
//! one of them has an event that the caller does not take along, the kicker makes a new edge. Whoever takes that one in turn
//! owes the same. So when the last of those that are awake has left, either nothing is there and everything is asked for, or
//! an edge is there that nobody has taken, and the kernel wakes a sleeper for it.
//!
//! *Between counting and sleeping nothing is lost.* A sleeper counts itself in (`sleepers`), then takes the marks and asks, and looks;
//! who marks does so first and then reads `sleepers`. Both with sequentially consistent fences in between: either the sleeper
//! sees the mark, or the other one sees the sleeper, and makes an edge. Who takes an edge marks what it names under
//! the lock, and reads `sleepers` when it leaves, behind that: a sleeper that was not seen there counts itself in later, and
//! finds the mark.
//!
//! *A sign must reach every sleeper.* The peer sends a token with a bell only if the bell counts a sleeper. Threads that sleep in
//! `poll`, on an outer instance, or that went to sleep before the instance had a bell are not counted there. So as long as
//! somebody sleeps who is not, everything is asked for by token ([`reaches`]).

use super::report::{harvest, has_left, has_some, snapshot};
use super::*;
use crate::conn::Conn;
use crate::ready;
use rdsock_shm::bell;
use rdsock_shm::end::{self, Kernel};
use rdsock_shm::layout::want;
use std::sync::atomic::fence;

/// Something has changed at this end of a connection, of which the other end tells nobody: every registration of it must be looked
/// at, whoever sleeps. It takes no lock but that of the lists, since halves of the stream may be held.
pub fn changed(conn: &Conn) {
    // Either this sees a registration that is just being made, or that one sees what has changed.
    fence(SeqCst);
    each(&conn.registrations, |epoll, _, bit| {
        epoll.table.ring(bit);
        // Who has the lock looks, and hands on when it leaves.
        if epoll.lock.load(Relaxed) != me().word() {
            kick(epoll);
        }
    });
}

/// Takes all marks that others have made: those of this process, and the bell.
pub(super) fn take_marks(epoll: &Epoll, state: &mut State) {
    let slots = &mut state.slots;
    let mut mark = |word: usize, bits: u64| {
        epoll.news.fetch_add(1, Relaxed);
        slots.look_at(word, bits);
    };
    epoll.table.take(&mut mark);
    if let Some((_, bell)) = state.bell {
        bell::take(bell, &mut mark);
    }
}

/// Takes the mark of one registration that is about to be looked at.
pub(super) fn take_mark(epoll: &Epoll, bit: usize) {
    epoll.table.unring(bit);
}

/// True when somebody has marked something that was not taken yet.
pub(super) fn is_marked(epoll: &Epoll, bell: Option<&Bell>) -> bool {
    epoll.table.is_rung() || bell.is_some_and(bell::is_rung)
}

/// True when a thread of this process sleeps on the instance, or on one that it is registered in.
pub(super) fn has_sleepers(epoll: &Epoll) -> bool {
    epoll.sleepers.load(SeqCst) != 0 || has_outer_sleepers(epoll)
}

fn has_outer_sleepers(epoll: &Epoll) -> bool {
    let mut found = false;
    if epoll.registrations.load(SeqCst) != 0 {
        each(&epoll.registrations, |outer, _, _| {
            found |= has_sleepers(outer);
        });
    }
    found
}

/// True when the bell wakes everybody who sleeps on the instance.
pub(super) fn reaches(epoll: &Epoll, bell: &Bell) -> bool {
    epoll.sleepers.load(SeqCst) <= bell.sleepers.load(SeqCst) && !has_outer_sleepers(epoll)
}

/// Wakes the threads of this process that sleep on an instance, so that they look again.
pub(super) fn kick(epoll: &Epoll) {
    let kicker = epoll.kicker.load(Acquire);
    if kicker >= 0 && has_sleepers(epoll) {
        sys::eventfd_add(kicker);
    }
}

/// What a thread owes to those that sleep on the instance, when it leaves it: see above.
pub(super) fn hand_on(epoll: &Epoll, state: &mut State) {
    if epoll.has_inner() && has_sleepers(epoll) {
        take_marks(epoll, state);
        if has_some(epoll, state) {
            kick(epoll);
        }
    }
}

/// As [`hand_on`], for a thread that has not locked the instance.
pub(super) fn leave(epoll: &Epoll) {
    check(epoll);
    if epoll.has_inner()
        && has_sleepers(epoll)
        && let Some(guard) = take(epoll)
    {
        hand_on(epoll, guard.state());
    }
}

/// In builds with assertions: the rule holds. A sign may just be on its way, so it gets some time.
pub(super) fn check(epoll: &Epoll) {
    if !cfg!(debug_assertions) || !epoll.has_inner() {
        return;
    }
    const MILLISECONDS: u32 = 2000;
    for _ in 0..MILLISECONDS {
        if find_deaf(epoll).is_none() {
            return;
        }
        // The sign may be an edge of an anchor. Whoever takes it hands on.
        harvest(epoll);
        kick(epoll);
        sys::poll_one(-1, 0, 1);
    }
    debug_assert!(
        false,
        "registration {:?} is not marked, and nobody is about to tell of what it names",
        find_deaf(epoll)
    );
}

/// A registration that breaks the rule, as it seems.
fn find_deaf(epoll: &Epoll) -> Option<usize> {
    let guard = take(epoll)?;
    let state = guard.state();
    for bit in 0..state.slots.high {
        if is_deaf(state, bit) {
            take_marks(epoll, state);
            let marked = state.slots.word(bit / 64).1 >> (bit % 64) & 1 != 0;
            if !marked && is_deaf(state, bit) {
                return Some(bit);
            }
        }
    }
    None
}

/// True when nothing was asked of the stream behind a registration that is armed, and no token of it is on the anchor; or when it
/// has something to report.
fn is_deaf(state: &mut State, bit: usize) -> bool {
    let Some(slot) = state.slot(bit).copied().filter(|slot| slot.is_armed()) else {
        return false;
    };
    let Kind::Conn(index) = slot.target else {
        return false;
    };
    let Some(held) = conn::by_index(index) else {
        return false;
    };
    let Some(stream) = held.conn.stream() else {
        return false;
    };
    if has_left(stream) || stream.is_reset() {
        return false;
    }
    let asked = want::BELL | want::WAKE | want::RINGING;
    let needs = ready::needs(stream, slot.events as i16);
    let quiet = |word: &AtomicU32| word.load(SeqCst) & asked == 0;
    let deaf = needs.bytes && quiet(&stream.incoming().bytes.want)
        || needs.space && quiet(&stream.out().space.want);
    if deaf {
        return stream.at(&held, slot.number).outstanding() == 0;
    }
    // An end that comes in is an edge for room as well, on Linux, where there was room before. Who waits for room alone is not told.
    if !needs.bytes && slot.events & EPOLLET as u32 != 0 {
        return false;
    }
    // A question that acts could take away what is to be found.
    let kernel = Kernel {
        bits: 0,
        least: 1,
        behind: 0,
    };
    let seen = stream.is_all_on_rings().then(|| {
        let state = end::State::of(stream);
        state.readiness(&kernel, stream.ring_size(), slot.events as i16)
    });
    seen.is_some_and(|seen| slot.event(seen, &snapshot(&held, stream, true)) != 0)
}
