//! What an instance has to report of its streams.

use super::moves::is_on_rings;
use super::news::{kick, take_mark, take_marks};
use super::register;
use super::*;
use crate::conn::Use;
use crate::end::End;
use crate::registration::{Brought, Snapshot};
use crate::stream::Stream;
use crate::tcp_info::TcpInfo;
use crate::{demote, ready};
use libc::{EPOLLERR, EPOLLHUP, EPOLLONESHOT, EPOLLOUT, EPOLLPRI, EPOLLRDHUP};
use rdsock_shm::layout::{NOT_SWITCHED, anchor, mark, phase};

/// Where a snapshot's state has the number of the program's own shutdowns.
const SHUTS: u32 = 48;

/// What EPOLLET compares, now: what wakes a program on Linux. Where bytes go, and what the anchor says of an end that the ring or
/// the program itself has told of, does not. Without `edges` nobody compares, and the kernel is asked nothing.
pub(super) fn snapshot(held: &Use, stream: &Stream, edges: bool) -> Snapshot {
    let refused = held.conn.refused.load(SeqCst);
    let shuts = u64::from(held.conn.shuts.load(SeqCst)) << SHUTS;
    let marks = stream.marks();
    if stream.is_reset() || marks & mark::RESET != 0 {
        // Whatever a call has found out since: it has been told.
        let state = u64::from(mark::RESET) | shuts;
        return Snapshot {
            head: 0,
            state,
            refused,
        };
    }
    let head = if edges { arrived(held, stream) } else { 0 };
    let shut = stream.rx().shut.load(Acquire);
    // Before the ring is read, the end of the anchor is an edge of it, of which this instance is told (`is_edge`): what a call finds out later
    // is none.
    let is_kernels = stream.rx().phase.load(Acquire) != phase::RING;
    let is_told = marks & mark::FIN != 0 || shut != 0 || is_kernels;
    // Where the kernel sends, it tells of an error itself.
    let is_judged = stream.tx().phase.load(Acquire) == phase::RING;
    let end = if is_told { 0 } else { anchor::EOF } | if is_judged { anchor::BROKEN } else { 0 };
    let state = u64::from(marks & mark::FIN)
        | u64::from(stream.rx().anchor.load(Acquire) & end) << 8
        | u64::from(stream.tx().shut.load(Acquire)) << 32
        | u64::from(shut) << 40
        | shuts;
    Snapshot {
        head,
        state,
        refused,
    }
}

/// The position behind the last byte of the program's that has come in, whichever way: no token counts, and none that only goes
/// from the anchor to the ring.
fn arrived(held: &Use, stream: &Stream) -> u64 {
    let producer = &stream.incoming().producer;
    let goes_on = producer.mark.load(Acquire) & mark::END != 0;
    let at = producer.switch_at.load(Acquire);
    let head = producer.head.load(Acquire);
    let receives = stream.rx().phase.load(Acquire);
    if receives == phase::RING && !goes_on {
        return head;
    }
    let on_anchor = received_on_anchor(held);
    if at == NOT_SWITCHED || on_anchor < at {
        on_anchor
    } else if receives == phase::SWITCHING && !goes_on {
        head
    } else {
        // Behind the ring's end, and among them the tokens.
        let tokens = u64::from(producer.wakes.load(Acquire));
        head + (on_anchor - at).saturating_sub(tokens)
    }
}

/// Bytes that ever came in on the anchor.
fn received_on_anchor(held: &Use) -> u64 {
    TcpInfo::of(held.conn.fd.load(Relaxed)).map_or(0, |info| info.received)
}

/// What an instance that was the kernel's has told of a connection, where it has told all that was on the anchor; of the ring it
/// has told nothing. Whether it has is asked behind this, so that what comes meanwhile is news.
pub(super) fn told_of_anchor(held: &Use, stream: &Stream) -> Snapshot {
    let at = stream.incoming().producer.switch_at.load(Acquire);
    let all = snapshot(held, stream, false);
    Snapshot {
        head: received_on_anchor(held).min(at),
        // Own ends are in the upper half.
        state: all.state & !u64::from(u32::MAX),
        ..all
    }
}

/// How a registration is looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// Every stream is looked at, marked or not.
    few: bool,
    /// Nothing is taken: edges and EPOLLONESHOT stay.
    peek: bool,
    /// Whoever has nothing is asked for a sign, and its mark goes. Else it is looked at again by the next one.
    arm: bool,
}

impl Look {
    /// A look that takes what it finds, by a thread that is awake, or one that is about to sleep.
    pub(super) fn to_take(epoll: &Epoll, sleeps: bool) -> Self {
        let few = epoll.is_few();
        Look {
            few: few && !sleeps,
            peek: false,
            arm: !few || sleeps,
        }
    }

    /// A look on behalf of somebody who sleeps, or waits through another instance.
    const FOR_OTHERS: Look = Look {
        few: false,
        peek: true,
        arm: true,
    };
}

/// Removes from events that the kernel gave what the instance reports by itself: how many are left,
/// and whether it has to be asked. The inner instance is among them; what came before a registration moved there; and
/// what the kernel had given before one with EPOLLONESHOT moved, if that was reported since (else it has fired now).
pub(super) fn strip(epoll: &Epoll, events: &mut [epoll_event], count: usize) -> (usize, bool) {
    let secret = SECRET.load(Relaxed);
    let moved = epoll.moved.load(SeqCst) != 0;
    let mapped = MAPPED.load(SeqCst);
    let may_have_moved = may_have_moved(epoll);
    let (mut kept, mut twice) = (0, 0);
    for i in 0..count {
        let Some(event) = events.get(i).copied() else {
            break;
        };
        if event.u64 != secret {
            if moved && was_reported(epoll, event.u64) {
                twice += 1;
                continue;
            }
            if may_have_moved && is_of_streams(epoll, event.u64) {
                continue;
            }
            if let Some(place) = events.get_mut(kept) {
                *place = event;
            }
            kept += 1;
        }
    }
    epoll.mapped.store(mapped, Relaxed);
    (kept, kept + twice != count)
}

/// True for the data of a connection that has come to a stream since the kernel was asked. What the kernel
/// has seen may be a wake byte, or be read by the time that the program comes to the event, which would then be a
/// second one. It shows again, if it is true. (Edges do not, and are no promise that there is something to read.)
fn is_of_streams(epoll: &Epoll, data: u64) -> bool {
    let Some(guard) = take(epoll) else {
        return false;
    };
    let state = guard.state();
    let mut found = false;
    for bit in 0..state.slots.high {
        let Some(slot) = state.slot(bit).copied() else {
            continue;
        };
        if slot.data != data || !matches!(slot.place(), Place::Kernel | Place::Inner) {
            continue;
        }
        let Kind::Conn(index) = slot.target else {
            return false;
        };
        if slot.events & (EPOLLET | EPOLLONESHOT) as u32 != 0
            || !conn::by_index(index).is_some_and(|held| is_on_rings(&held))
        {
            return false;
        }
        state.mark(bit);
        found = true;
    }
    found
}

/// True when the inner instance has reported what a thread brings from the program's one.
fn was_reported(epoll: &Epoll, data: u64) -> bool {
    let Some(guard) = take(epoll) else {
        return false;
    };
    let state = guard.state();
    let brought = (0..state.slots.high).find_map(|bit| state.slot(bit)?.bring(data));
    if brought.is_some() {
        epoll.moved.fetch_sub(1, SeqCst);
    }
    brought == Some(Brought::Twice)
}

/// Takes what the inner instance has: those streams' anchors have something to say.
pub(super) fn harvest(epoll: &Epoll) {
    let mut events = [epoll_event { events: 0, u64: 0 }; 64];
    loop {
        let got = take_edges(epoll, &mut events);
        let taken = events.get(..got).unwrap_or(&[]);
        if !taken.is_empty() {
            let Some(guard) = take(epoll) else { return };
            mark_edges(epoll, guard.state(), taken);
        }
        if got < 64 {
            return;
        }
    }
}

/// As [`harvest`], for a thread that has locked the instance.
pub(super) fn harvest_held(epoll: &Epoll, state: &mut State) {
    let mut events = [epoll_event { events: 0, u64: 0 }; 64];
    loop {
        let got = take_edges(epoll, &mut events);
        mark_edges(epoll, state, events.get(..got).unwrap_or(&[]));
        state.has_edges |= got != 0;
        if got < 64 {
            return;
        }
    }
}

/// Edges that the inner instance has; how many.
fn take_edges(epoll: &Epoll, events: &mut [epoll_event; 64]) -> usize {
    let inner = epoll.inner.load(Acquire);
    if inner < 0 {
        return 0;
    }
    sys::epoll_now(inner, events).max(0) as usize
}

/// Marks the registrations that edges of the inner instance name.
fn mark_edges(epoll: &Epoll, state: &mut State, events: &[epoll_event]) {
    if events.is_empty() {
        return;
    }
    epoll.news.fetch_add(1, Relaxed);
    for event in events {
        let bit = event.u64 as usize;
        let Some(slot) = state.slot(bit) else {
            continue;
        };
        match (slot.place(), slot.target) {
            (Place::Inner, _) => {}
            (Place::Resting, Kind::Conn(index)) => {
                if let Some(held) = conn::by_index(index) {
                    held.conn.look.store(1, Relaxed);
                }
                register::drop_resting(epoll, state, bit);
                continue;
            }
            _ => continue,
        }
        match slot.target {
            Kind::Conn(index) => {
                let Some(held) = conn::by_index(index) else {
                    continue;
                };
                let Some(stream) = held.conn.stream() else {
                    held.conn.look.store(1, Relaxed);
                    continue;
                };
                let end = stream.at(&held, slot.number);
                // A further token makes an edge whatever lies there, unless the anchor is full.
                let are_many = u64::from(end.outstanding()) >= limits::TOKENS.get();
                if are_many || ready::needs_look(&end, event.events as i16) {
                    held.conn.look.store(1, Relaxed);
                }
                if is_edge(stream, event.events) {
                    slot.note_news();
                }
            }
            _ => slot.note_news(),
        }
        state.mark(bit);
    }
}

/// True for a stream that is on its way to the rings or back. One whose program only receives is not: it may stay so.
fn is_between(stream: &Stream) -> bool {
    let receives = stream.rx().phase.load(Relaxed);
    let sends = stream.tx().phase.load(Relaxed);
    receives != phase::RING || !matches!(sends, phase::RING | phase::ANCHOR)
}

/// An edge of the anchor is the program's while a direction is on it; but where both have ended or are broken, and the ring has told
/// of it, only an error. That bytes have come in is seen by their number ([`arrived`]): a token makes the same edge.
fn is_edge(stream: &Stream, events: u32) -> bool {
    let marks = stream.marks();
    let is_broken = stream.is_reset() || marks & mark::RESET != 0;
    let has_ended = stream.rx().phase.load(Acquire) == phase::RING
        && stream.tx().shut.load(Acquire) != 0
        && marks & mark::FIN != 0;
    let is_on_rings = stream.is_all_on_rings() && marks & mark::END == 0;
    let counts = EPOLLERR | EPOLLHUP | EPOLLRDHUP | EPOLLPRI;
    let is_room = events & EPOLLOUT as u32 != 0 && stream.tx().phase.load(Acquire) != phase::RING;
    !is_on_rings
        && !is_broken
        && (!has_ended || events & EPOLLERR as u32 != 0)
        && (is_room || events & counts as u32 != 0)
}

/// Collects what is ready into `events`, behind the first `kept` of them, which the kernel gave; how
/// many there are then.
pub(super) fn collect(
    epoll: &Epoll,
    guard: &Guard<'_>,
    events: &mut [epoll_event],
    kept: usize,
    look: Look,
) -> usize {
    let state = guard.state();
    // Since the kernel's were looked through, see `is_of_streams`.
    let may_have_moved = kept != 0 && may_have_moved(epoll);
    take_marks(epoll, state);
    let words = state.slots.words();
    let mut found = kept;
    let start = state.cursor;
    for step in 0..=words {
        let word = (start / 64 + step) % words.max(1);
        let mut bits = state.candidates(word, look.few);
        // The first word is gone through in two halves, so that the search goes all the way round.
        let low = (1_u64 << (start % 64)) - 1;
        if step == 0 {
            bits &= !low;
        } else if step == words {
            bits &= low;
        }
        while bits != 0 {
            let bit = word * 64 + bits.trailing_zeros() as usize;
            bits &= bits - 1;
            if may_have_moved && is_among(state, bit, events.get(..kept).unwrap_or(&[])) {
                continue;
            }
            let Some(place) = events.get_mut(found) else {
                state.cursor = bit;
                return found;
            };
            if let Some(event) = report(epoll, state, bit, look) {
                *place = event;
                found += 1;
            }
        }
    }
    found
}

/// True when the kernel has given this connection's event, which shows again if it is true.
fn is_among(state: &mut State, bit: usize, given: &[epoll_event]) -> bool {
    state.slot(bit).is_some_and(|slot| {
        slot.events & (EPOLLET | EPOLLONESHOT) as u32 == 0
            && given.iter().any(|event| event.u64 == slot.data)
    })
}

/// True when a connection may have come to a stream since [`strip`].
fn may_have_moved(epoll: &Epoll) -> bool {
    MAPPING.load(SeqCst) != 0 || MAPPED.load(SeqCst) != epoll.mapped.load(Relaxed)
}

/// True when there is something for somebody to do: a registration that is marked has an event now, which is not taken, or must
/// move. Those that have none are asked for a sign.
pub(super) fn has_some(epoll: &Epoll, state: &mut State) -> bool {
    state.any(false, |state, bit| {
        let before = std::mem::take(&mut state.has_leaver);
        let found = has_report(epoll, state, bit) || state.has_leaver;
        state.has_leaver |= before;
        found
    })
}

/// True when this registration has an event now. That it must move, or one of the instance behind it, is noted, and is none.
fn has_report(epoll: &Epoll, state: &mut State, bit: usize) -> bool {
    let found = report(epoll, state, bit, Look::FOR_OTHERS).is_some();
    state.has_leaver |= !found && must_move(state, bit);
    found
}

/// True when the stream behind a registration is one whose other end has left.
pub(super) fn must_move(state: &mut State, bit: usize) -> bool {
    match state.slot(bit).map(|slot| slot.target) {
        Some(Kind::Conn(index)) => {
            conn::by_index(index).is_some_and(|held| held.conn.stream().is_some_and(has_left))
        }
        _ => false,
    }
}

/// Has the descriptor of an instance an event? For a caller that has locked nothing: what has left, of which the instance can't
/// tell, moves first. `None` where that may not be done now (`may_follow`).
pub fn has_event_after_leavers(epoll: &Epoll, fd: c_int, may_follow: bool) -> Option<bool> {
    let found = has_event(epoll, fd);
    if found || !take_leaver(epoll) {
        return Some(found);
    }
    may_follow.then(|| {
        follow_leavers(epoll);
        has_event(epoll, fd)
    })
}

/// True when a look has come to one that must move, since this was last asked.
fn take_leaver(epoll: &Epoll) -> bool {
    take(epoll).is_some_and(|guard| std::mem::take(&mut guard.state().has_leaver))
}

/// True when the instance (under `fd`) would report something, its kernel's fds included.
fn has_event(epoll: &Epoll, fd: c_int) -> bool {
    harvest(epoll);
    let found = has_marked(epoll)
        || sys::poll_one(fd, libc::POLLIN, 0) > 0 && {
            // A wake byte that came meanwhile is no event.
            harvest(epoll);
            sys::poll_one(fd, libc::POLLIN, 0) > 0 || has_marked(epoll)
        };
    if found {
        // An edge was taken, and what it told of is left to others.
        kick(epoll);
    }
    found
}

fn has_marked(epoll: &Epoll) -> bool {
    take(epoll).is_some_and(|guard| {
        take_marks(epoll, guard.state());
        let state = guard.state();
        state.any(false, |state, bit| has_report(epoll, state, bit))
    })
}

/// The event of one registration, if it has one now.
fn report(epoll: &Epoll, state: &mut State, bit: usize, look: Look) -> Option<epoll_event> {
    let slot = *state.slot(bit)?;
    if !slot.is_armed() {
        send_rest(epoll, state, bit);
        state.unmark(bit);
        return None;
    }
    let bits = match slot.target {
        Kind::Conn(index) => of_stream(epoll, state, bit, &conn::by_index(index)?, look)?,
        Kind::Epoll(index) => of_instance(state, bit, at(index)?, look)?,
        _ => return None,
    };
    Some(epoll_event {
        events: bits,
        u64: slot.data,
    })
}

/// The event of an instance in this one.
fn of_instance(state: &mut State, bit: usize, inner: &Epoll, look: Look) -> Option<u32> {
    // What nobody sleeps for rings a bell, and makes no edge.
    harvest(inner);
    if let Some(guard) = take(inner) {
        take_marks(inner, guard.state());
    }
    let now = Snapshot {
        head: inner.news.load(Relaxed),
        ..Snapshot::default()
    };
    let slot = state.slot(bit)?;
    let seen = slot.event(ready::IN, &now);
    let number = slot.number;
    if look.arm {
        sleep::ask_all(inner);
    }
    if seen == 0 || !has_event(inner, number) {
        if take_leaver(inner) {
            // Done without the lock, as for a stream of this instance.
            state.has_leaver = true;
            state.mark(bit);
        }
        return None;
    }
    if !look.peek {
        state.slot(bit)?.report(seen, now);
    }
    Some(seen)
}

/// The event of a stream, in the way in which it is registered.
fn of_stream(epoll: &Epoll, state: &mut State, bit: usize, held: &Use, look: Look) -> Option<u32> {
    let fd = held.conn.fd.load(Relaxed);
    let stream = held.conn.stream()?;
    let interest = (state.slot(bit)?.events as i16)
        & (ready::IN | ready::OUT | libc::POLLRDHUP | libc::POLLPRI);
    let end = stream.at(held, fd);
    if ready::as_usual(held, stream, interest).is_none()
        && !settle(epoll, state, bit, held, &end, interest, look)
    {
        return None;
    }
    take_mark(epoll, bit);
    let slot = *state.slot(bit)?;
    let edges = slot.events & EPOLLET as u32 != 0;
    // Another process that has the connection takes tokens off the anchor, and tells nobody: then it is looked at each time.
    let alone = stream.page().holders.load(Relaxed) <= 1;
    let question = || {
        let (now, seen) = seen(held, stream, interest, edges);
        (slot.event(seen, &now), seen, now)
    };
    let (mut event, mut seen, mut now) = question();
    if event == 0 {
        if !look.arm {
            state.mark(bit);
            return None;
        }
        // Whoever publishes from now on gives a sign; look once more after that is said.
        state.mark_if(bit, !alone);
        register::ask(epoll, state, bit, &end, slot.events);
        (event, seen, now) = question();
        if event == 0 {
            // The last of the rest has just gone out.
            if has_left(stream) {
                state.mark(bit);
            }
            return None;
        }
        state.mark(bit);
    }
    if look.peek {
        return Some(event);
    }
    state.slot(bit)?.report(event, now);
    if look.arm && slot.events & EPOLLET as u32 != 0 {
        state.mark_if(bit, !alone);
        register::ask(epoll, state, bit, &end, slot.events);
        // What came since the snapshot was taken must be found now: only what comes later gives a sign.
        if question() != (event, seen, now) {
            state.mark(bit);
        }
    }
    Some(event)
}

/// Does what is due at a stream before it is asked, which marks it: what that finds out is a part of the snapshot, and no edge of its
/// own. False where the stream, or its other end, has left: its registrations must move.
fn settle(
    epoll: &Epoll,
    state: &mut State,
    bit: usize,
    held: &Use,
    end: &End<'_>,
    interest: i16,
    look: Look,
) -> bool {
    let stream = held.conn.stream();
    // Which may be the last that kept it on rings.
    end.send_rest();
    let Some(stream) = stream.filter(|stream| !has_left(stream)) else {
        // Following it changes this very registration: done without the lock, see `follow_leavers`.
        held.conn.look.store(1, Relaxed);
        state.has_leaver = true;
        state.mark(bit);
        return false;
    };
    register::watch_space(epoll, state, bit, stream);
    let has_edges = |slot: &mut Slot| slot.events & EPOLLET as u32 != 0;
    if !look.peek && state.slot(bit).is_some_and(has_edges) && is_between(stream) {
        // What the anchor has told is a part of what is reported now, and no edge of its own later.
        harvest_held(epoll, state);
    }
    if held.conn.look.load(Relaxed) != 0 {
        // With the question to the kernel that a look brings.
        ready::of(held, stream, held.conn.fd.load(Relaxed), interest, false);
    } else {
        ready::settle(end, held, false);
    }
    true
}

/// What a stream is ready for, and as of when. First the snapshot: what comes behind it is news.
#[inline]
fn seen(held: &Use, stream: &Stream, interest: i16, edges: bool) -> (Snapshot, i16) {
    let usual = Snapshot {
        head: if edges {
            stream.incoming().producer.head.load(Acquire)
        } else {
            0
        },
        state: u64::from(held.conn.shuts.load(SeqCst)) << SHUTS,
        refused: held.conn.refused.load(SeqCst),
    };
    if let Some(seen) = ready::as_usual(held, stream, interest) {
        return (usual, seen);
    }
    let now = snapshot(held, stream, edges);
    let fd = held.conn.fd.load(Relaxed);
    let seen = ready::of(held, stream, fd, interest, false).unwrap_or(0);
    (now, seen)
}

/// A registration that reports nothing any more keeps what the other end has left in the ring from nowhere: that goes out as
/// room comes.
fn send_rest(epoll: &Epoll, state: &mut State, bit: usize) {
    if let Some(Kind::Conn(index)) = state.slot(bit).map(|slot| slot.target)
        && let Some(held) = conn::by_index(index)
        && let Some(stream) = held.conn.stream()
        && stream.has_rest()
    {
        stream.at(&held, held.conn.fd.load(Relaxed)).send_rest();
        register::watch_space(epoll, state, bit, stream);
    }
}

/// True when a stream's other end has left, or the stream has, so that its registrations must move.
pub fn has_left(stream: &Stream) -> bool {
    if demote::peer_has_left(stream) || !demote::is_on_rings(stream) {
        return true;
    }
    let producer = &stream.incoming().producer;
    producer.mark.load(Acquire) & mark::END != 0
        && match stream.rx().phase.load(Acquire) {
            phase::RING => !stream.has_bytes(),
            phase::SWITCHING => producer.switch_at.load(Acquire) == NOT_SWITCHED,
            _ => false,
        }
}

/// Follows the peers that have left, which [`report`] may not do under the lock. True where that made one the kernel's, which may
/// have something to tell of it.
pub(super) fn follow_leavers(epoll: &Epoll) -> bool {
    let mut has_come = false;
    for _ in 0..slots::MOST {
        let mut leaver = None;
        let mut nested = [None; 8];
        if let Some(guard) = take(epoll) {
            let state = guard.state();
            take_marks(epoll, state);
            let mut count = 0;
            state.any(epoll.is_few(), |state, bit| {
                match state.slot(bit).map(|slot| slot.target) {
                    Some(Kind::Conn(index)) => {
                        leaver = conn::by_index(index)
                            .filter(|held| held.conn.stream().is_some_and(has_left));
                    }
                    Some(Kind::Epoll(index)) => {
                        if let Some(place) = nested.get_mut(count) {
                            *place = Some(index);
                            count += 1;
                        }
                    }
                    _ => {}
                }
                leaver.is_some()
            });
        }
        let Some(held) = leaver else {
            for inner in nested.into_iter().flatten().filter_map(at) {
                has_come |= follow_leavers(inner);
            }
            return has_come;
        };
        if !follow(&held) {
            return has_come;
        }
        has_come |= !is_on_rings(&held);
    }
    has_come
}

/// Follows one; false when that must be tried again later.
fn follow(held: &Use) -> bool {
    let fd = held.conn.fd.load(Relaxed);
    let Some(stream) = held.conn.stream() else {
        return false;
    };
    if demote::peer_has_left(stream) {
        demote::follow(held, stream, fd);
    }
    demote::settle_incoming(held, stream, fd);
    if !demote::is_on_rings(stream) {
        demoted(held);
    }
    !has_left(stream) || !demote::is_on_rings(stream)
}

/// Asks the kernel, without waiting, where there is room: how many events of its own there are, and whether what it has told of anchors
/// has marked something, which is then to be collected.
pub(super) fn ask_kernel(epoll: &Epoll, epfd: c_int, events: &mut [epoll_event]) -> (usize, bool) {
    if events.is_empty() {
        return (0, false);
    }
    let got = sys::epoll_now(epfd, events);
    if got <= 0 {
        return (0, false);
    }
    let (kept, ours) = strip(epoll, events, got as usize);
    if ours {
        harvest(epoll);
    }
    (kept, ours)
}

/// Asks the kernel once more, behind the first `found` events: how many there are then, and as above.
pub(super) fn ask_again(
    epoll: &Epoll,
    epfd: c_int,
    events: &mut [epoll_event],
    found: usize,
) -> (usize, bool) {
    let (got, ours) = ask_kernel(epoll, epfd, events.get_mut(found..).unwrap_or(&mut []));
    (merge(events, found, found + got), ours)
}

/// How many events there are when those behind the first `given`, up to `all`, are made one with those that have the same data: what
/// is level-triggered is given each time that it is asked for.
pub(super) fn merge(events: &mut [epoll_event], given: usize, all: usize) -> usize {
    let (given, more) = events.split_at_mut(given.min(events.len()));
    let mut kept = 0;
    for i in 0..all.saturating_sub(given.len()) {
        let Some(event) = more.get(i).copied() else {
            break;
        };
        if let Some(same) = given.iter_mut().find(|given| given.u64 == event.u64) {
            same.events |= event.events;
        } else if let Some(place) = more.get_mut(kept) {
            *place = event;
            kept += 1;
        }
    }
    given.len() + kept
}
