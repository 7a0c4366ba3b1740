//! Where registrations go when their streams come and go, and when fds are closed.

use super::fdinfo::has_fired;
use super::news::hand_on;
use super::register::{drop_resting, inner_event, leave_inner, remove, to_inner, watch};
use super::report::{harvest_held, told_of_anchor};
use super::*;
use crate::conn::{Conn, Use};
use crate::demote;
use crate::registration::Snapshot;
use libc::{EPOLLET, EPOLLONESHOT, EPOLLOUT};
use rdsock_shm::reason::Reason;
use std::sync::atomic::fence;

/// True when a connection is on rings, or may yet go there.
pub(super) fn is_on_rings(held: &Use) -> bool {
    held.conn.stream().is_some_and(demote::is_on_rings)
}

/// True when a connection must not get a stream: it is registered in an instance that this process
/// shares by fork, where two processes would take each other's edges.
pub fn declines(conn: &Conn) -> bool {
    let mut declines = false;
    each(&conn.registrations, |epoll, _, _| {
        declines |= epoll.is_inherited();
    });
    declines
}

/// A stream was mapped, see [`begin_mapping`].
pub fn mapped(held: &Use) {
    promoted(held);
    MAPPED.fetch_add(1, SeqCst);
    MAPPING.fetch_sub(1, SeqCst);
}

/// The registrations of a connection that is on rings move to the inner instances.
pub(super) fn promoted(held: &Use) {
    let mut failed = None;
    each(&held.conn.registrations, |epoll, index, bit| {
        let Some(guard) = take(epoll) else { return };
        let state = guard.state();
        if let Some(slot) = state.slot(bit)
            && slot.target == Kind::Conn(held.index)
            && is_on_rings(held)
        {
            move_in(epoll, state, bit, Some(held)).unwrap_or_else(|fd| failed = Some(fd));
            hand_on(epoll, state);
        }
        drop(guard);
        lift(index);
    });
    if let Some(fd) = failed {
        demote::leave(held, fd, Reason::NoMemory);
    }
}

/// Moves a registration from the program's instance to the inner one. `Err`: it stays.
fn move_in(epoll: &Epoll, state: &mut State, bit: usize, held: Option<&Use>) -> Result<(), c_int> {
    let Some(slot) = state.slot(bit) else {
        return Ok(());
    };
    let epfd = epoll.fd.load(Relaxed);
    let (mut fired, mut told) = (false, None);
    match slot.place() {
        Place::Kernel => {
            if slot.begin_to_move() {
                // Said first: it may fire until it is deleted.
                epoll.moved.fetch_add(1, SeqCst);
            }
            let number = slot.number;
            fired = slot.events & EPOLLONESHOT as u32 != 0 && has_fired(epfd, number);
            told = told_by_kernel(epoll, state, bit, held);
            sys::epoll_ctl(epfd, EPOLL_CTL_DEL, number, None);
            if fired && let Some(slot) = state.slot(bit) {
                epoll.arrived(slot);
            }
        }
        Place::Parked => {}
        _ => return Ok(()),
    }
    if to_inner(epoll, state, bit, held, fired) {
        if let Some(all) = told
            && let Some(slot) = state.slot(bit)
        {
            slot.was_told(all);
        }
        return Ok(());
    }
    state.slot(bit).ok_or(-1)?.enter(fired);
    state.slots.set_inner(bit, true);
    epoll.streams.fetch_add(1, Relaxed);
    let number = move_out(epoll, state, bit);
    Err(number)
}

/// What the program has been told of a connection with EPOLLET that is about to move, where the kernel has told all. `None`: it
/// may have something yet, and the connection is news.
///
/// The anchor is watched by the inner instance first, whose first edge is no news: what comes later is seen here or there.
fn told_by_kernel(
    epoll: &Epoll,
    state: &mut State,
    bit: usize,
    held: Option<&Use>,
) -> Option<Snapshot> {
    let slot = *state.slot(bit)?;
    let held = held?;
    let stream = held.conn.stream()?;
    let all = told_of_anchor(held, stream);
    if slot.events & (EPOLLET | EPOLLONESHOT) as u32 != EPOLLET as u32 || !watch(epoll, state, bit)
    {
        return None;
    }
    harvest_held(epoll, state);
    let has_edge = sys::poll_one(epoll.fd.load(Relaxed), libc::POLLIN, 0) != 0;
    let has_room = sys::poll_one(slot.number, libc::POLLOUT, 0) > 0;
    (!has_edge).then(|| all.with_room(has_room))
}

/// Moves a registration back to the program's instance; the number of its fd.
fn move_out(epoll: &Epoll, state: &mut State, bit: usize) -> c_int {
    leave_inner(epoll, state, bit);
    state.unmark(bit);
    let Some(slot) = state.slot(bit) else {
        return -1;
    };
    sys::epoll_ctl(epoll.inner.load(Relaxed), EPOLL_CTL_DEL, slot.number, None);
    slot.watches_space = false;
    if slot.leave() {
        let event = epoll_event {
            events: slot.events,
            u64: slot.data,
        };
        sys::epoll_ctl(
            epoll.fd.load(Relaxed),
            EPOLL_CTL_ADD,
            slot.number,
            Some(&event),
        );
    }
    slot.number
}

/// A stream was left: its registrations move back to the program's own instances. Both processes
/// that share an instance by fork do this: the second one finds it done.
pub fn demoted(held: &Use) {
    each(&held.conn.registrations, |epoll, _, bit| {
        let Some(guard) = take(epoll) else { return };
        let state = guard.state();
        if let Some(slot) = state.slot(bit)
            && slot.target == Kind::Conn(held.index)
        {
            match slot.place() {
                Place::Inner => {
                    move_out(epoll, state, bit);
                }
                Place::Resting => drop_resting(epoll, state, bit),
                _ => {}
            }
        }
    });
}

/// An instance that has an inner one is asked through the inner instances of those it is in.
pub(super) fn lift(index: usize) {
    let Some(epoll) = at(index) else { return };
    // Who registers it elsewhere comes here as well, behind that: one of both sees what the other one has done.
    fence(SeqCst);
    if epoll.registrations.load(Acquire) == 0 || !epoll.has_inner() {
        return;
    }
    each(&epoll.registrations, |outer, number, bit| {
        let Some(guard) = take(outer) else { return };
        let state = guard.state();
        if let Some(slot) = state.slot(bit)
            && slot.place() == Place::Kernel
            && slot.target == Kind::Epoll(index)
        {
            let _ = move_in(outer, state, bit, None);
            hand_on(outer, state);
            drop(guard);
            lift(number);
        }
    });
}

/// The last fd of a connection is closed: the kernel forgets its registrations, and so do we.
///
/// The kernel forgets them when the *file* is closed, and the daemon may just now hold a duplicate of one
/// that was announced to it: until it closes that, the kernel would report events of a descriptor that
/// the program has closed. So those are taken out first, with one call for each instance that has one.
///
/// Not where another process has the connection as well (`shared`: after fork, exec or SCM_RIGHTS), or
/// the instance: there Linux goes on to report events, and a program may count on it. Nothing is done
/// for an instance that the shim does not follow; what is registered there is never announced.
pub fn forget(conn: &Conn) {
    each(&conn.registrations, |epoll, _, bit| {
        let Some(guard) = take(epoll) else { return };
        let state = guard.state();
        if let Some(slot) = state.slot(bit)
            && let target @ Kind::Conn(index) = slot.target
            && conn::at(index).is_some_and(|other| std::ptr::eq(other, conn))
        {
            let is_own = conn.shared.load(Acquire) == 0;
            let set = match slot.place() {
                Place::Inner | Place::Resting if is_own => epoll.inner.load(Relaxed),
                Place::Kernel if is_own && conn.may_be_looked_at() && !epoll.is_inherited() => {
                    epoll.fd.load(Relaxed)
                }
                // Not registered, gone with the file, or it lives on in another process.
                _ => -1,
            };
            if set >= 0 && slot.number >= 0 {
                sys::epoll_ctl(set, EPOLL_CTL_DEL, slot.number, None);
            }
            remove(epoll, state, bit, target);
        }
    });
}

/// One of several fds of a connection is about to be closed: what is registered under its number
/// goes over to a copy that is the shim's own, since the kernel would keep it where no number leads
/// to. Not to one of the program's, which may be registered as well.
pub fn renumber(held: &Use, fd: c_int) {
    if held.conn.registrations.load(Acquire) == 0 {
        return;
    }
    each(&held.conn.registrations, |epoll, _, bit| {
        let Some(guard) = take(epoll) else { return };
        let epfd = epoll.fd.load(Relaxed);
        let Some(slot) = guard.state().slot(bit) else {
            return;
        };
        if slot.number != fd || slot.target != Kind::Conn(held.index) {
            return;
        }
        let copy = (slot.place() != Place::Resting).then(|| tenant::hidden_copy(fd));
        let other = copy
            .flatten()
            .or_else(|| conn::fd_of(Kind::Conn(held.index), fd))
            .unwrap_or(-1);
        if slot.place() == Place::Resting {
            drop_resting(epoll, guard.state(), bit);
            return;
        }
        let (set, event) = match slot.place() {
            Place::Inner => (epoll.inner.load(Relaxed), inner_event(watched(slot), bit)),
            Place::Kernel if slot.events & EPOLLONESHOT as u32 != 0 && has_fired(epfd, fd) => {
                sys::epoll_ctl(epfd, EPOLL_CTL_DEL, fd, None);
                slot.park();
                slot.number = other;
                return;
            }
            Place::Kernel => {
                let event = epoll_event {
                    events: slot.events,
                    u64: slot.data,
                };
                (epfd, event)
            }
            _ => {
                slot.number = other;
                return;
            }
        };
        // A process that shares the instance by fork still has the number.
        if epoll.is_inherited() {
            slot.number = other;
        } else if sys::epoll_ctl(set, EPOLL_CTL_ADD, other, Some(&event)) == 0 {
            sys::epoll_ctl(set, EPOLL_CTL_DEL, fd, None);
            slot.number = other;
        } else {
            slot.number = -1;
        }
    });
}

/// What the anchor is watched for on behalf of a registration.
fn watched(slot: &Slot) -> u32 {
    let room = if slot.watches_space {
        EPOLLOUT as u32
    } else {
        0
    };
    slot.events | room
}

/// The shim's own descriptor `old` is now `new`, both are open: what is registered by it goes along.
pub(super) fn moved_copy(epoll: &Epoll, old: c_int, new: c_int) {
    let Some(guard) = take(epoll) else { return };
    let state = guard.state();
    for bit in 0..state.slots.high {
        let Some(slot) = state.slot(bit).filter(|slot| slot.number == old) else {
            continue;
        };
        let (set, event) = match slot.place() {
            Place::Inner => (epoll.inner.load(Relaxed), inner_event(watched(slot), bit)),
            Place::Kernel => {
                let event = epoll_event {
                    events: slot.events,
                    u64: slot.data,
                };
                (epoll.fd.load(Relaxed), event)
            }
            Place::Parked => {
                slot.number = new;
                continue;
            }
            _ => continue,
        };
        slot.number = new;
        if sys::epoll_ctl(set, EPOLL_CTL_ADD, new, Some(&event)) == 0 {
            sys::epoll_ctl(set, EPOLL_CTL_DEL, old, None);
        }
    }
}

/// No connection is looked after any more: the copies that stand for closed numbers go, so that the last of the program's
/// descriptors closes its connection. What is registered stays, as the kernel has it.
pub fn close_copies() {
    for (_, epoll) in all() {
        if epoll.refs.load(Relaxed) == 0 {
            continue;
        }
        let Some(guard) = take(epoll) else { continue };
        let state = guard.state();
        for bit in 0..state.slots.high {
            if let Some(slot) = state.slot(bit).filter(|slot| slot.place() != Place::Free) {
                let number = std::mem::replace(&mut slot.number, -1);
                if number != slot.fd {
                    close_copy(number);
                }
            }
        }
    }
}

/// Closes a copy of the shim's own that a registration had.
pub(super) fn close_copy(number: c_int) {
    if number >= 0 && conn::kind(number) == Kind::Internal {
        tenant::close_hidden(number);
    }
}
