//! Registrations: `epoll_ctl`, and where each registration goes when its stream comes and goes.

use super::moves::{close_copy, demoted, is_on_rings, lift, promoted};
use super::news::{check, hand_on, reaches};
use super::*;
use crate::conn::{Use, born};
use crate::end::End;
use crate::{demote, ready};
use libc::{
    EPOLL_CTL_MOD, EPOLLERR, EPOLLEXCLUSIVE, EPOLLHUP, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, EPOLLWAKEUP,
};
use rdsock_shm::bell;
use rdsock_shm::end::Shared;
use rdsock_shm::layout::{phase, want};
use rdsock_shm::reason::Reason;

/// `epoll_ctl`. `None`: the call is the kernel's alone.
///
/// # Safety
/// `event` is null or valid.
pub unsafe fn ctl(epfd: c_int, op: c_int, fd: c_int, event: *const epoll_event) -> Option<c_int> {
    let target = conn::kind(fd);
    let held = match target {
        Kind::Conn(_) => Some(conn::of(fd)?),
        Kind::Epoll(_) => None,
        _ => return None,
    };
    let target = held.as_ref().map_or(target, |held| Kind::Conn(held.index));
    // SAFETY: the caller vouches for it.
    let event = (!event.is_null()).then(|| unsafe { event.read_unaligned() });
    let Some((index, epoll)) = (match conn::kind(epfd) {
        Kind::Epoll(index) => at(index).map(|epoll| (index, epoll)),
        _ => None,
    }) else {
        // An instance that the shim has not seen made: what is registered there must stay the
        // kernel's.
        if let Some(held) = &held {
            demote::leave(held, fd, Reason::Call);
        }
        return None;
    };
    if held.is_none() && (epoll.is_inherited() || target == Kind::Epoll(index)) {
        return None;
    }
    let on_rings = held.as_ref().is_some_and(is_on_rings);
    if on_rings
        && op == EPOLL_CTL_MOD
        && let Some(held) = &held
    {
        // The thread that maps the stream may not have come to this yet. Left with the kernel, it
        // would report a wake byte that is still there after its bytes were read.
        promoted(held);
    }
    let guard = take(epoll)?;
    let mut change = Change {
        epoll,
        index,
        op,
        fd,
        target,
        held: held.as_ref(),
        on_rings,
        leave: None,
    };
    let result = change.make(guard.state(), event);
    let leave = change.leave;
    hand_on(epoll, guard.state());
    drop(guard);
    match &held {
        Some(held) => {
            if let Some(reason) = leave {
                demote::leave(held, fd, reason);
            } else if on_rings && epoll.is_inherited() && op == EPOLL_CTL_ADD {
                // Two processes would take each other's edges.
                demote::leave(held, fd, Reason::Call);
            }
            // A stream may have come or gone meanwhile.
            match (on_rings, is_on_rings(held)) {
                (false, true) => promoted(held),
                (true, false) => demoted(held),
                _ => {}
            }
        }
        None => {
            if let Kind::Epoll(inner) = target {
                lift(inner);
            }
        }
    }
    lift(index);
    check(epoll);
    Some(result.map_or_else(|error| -error, |()| 0))
}

/// One call of `epoll_ctl`, under the instance's lock.
struct Change<'a> {
    epoll: &'static Epoll,
    index: usize,
    op: c_int,
    fd: c_int,
    target: Kind,
    held: Option<&'a Use>,
    on_rings: bool,
    /// The stream must leave the rings, for this reason.
    leave: Option<Reason>,
}

impl Change<'_> {
    /// The program's registration of this very fd.
    fn known(&self, state: &mut State) -> Option<(usize, Place)> {
        let mut known = None;
        each(list_of(self.target)?, |_, index, bit| {
            if index == self.index
                && let Some(slot) = state.slot(bit)
                && slot.place() != Place::Free
                && slot.fd == self.fd
                && slot.target == self.target
            {
                known = Some((bit, slot.place()));
            }
        });
        known
    }

    fn kernel(&self, op: c_int, number: c_int, event: Option<&epoll_event>) -> Result<(), c_int> {
        match sys::epoll_ctl(self.epoll.fd.load(Relaxed), op, number, event) {
            0 => Ok(()),
            error => Err(-error as c_int),
        }
    }

    fn make(&mut self, state: &mut State, event: Option<epoll_event>) -> Result<(), c_int> {
        let mut known = self.known(state);
        if let Some((bit, Place::Resting)) = known {
            if let Some(event) = event
                && self.op == EPOLL_CTL_ADD
                && self.on_rings
                && event.events & EPOLLEXCLUSIVE as u32 == 0
            {
                self.revive(state, bit, event);
                return Ok(());
            }
            drop_resting(self.epoll, state, bit);
            known = None;
        }
        let known = known.map(|(bit, _)| bit);
        match (self.op, known, event) {
            (EPOLL_CTL_ADD | EPOLL_CTL_MOD, _, None) => Err(libc::EFAULT),
            (EPOLL_CTL_ADD, Some(_), _) => Err(libc::EEXIST),
            (EPOLL_CTL_ADD, None, Some(event)) => self.add(state, event),
            (EPOLL_CTL_MOD, Some(bit), Some(event)) => self.modify(state, bit, event),
            (EPOLL_CTL_DEL, Some(bit), _) => self.delete(state, bit),
            (EPOLL_CTL_MOD | EPOLL_CTL_DEL, None, _) if self.on_rings => Err(libc::ENOENT),
            _ => self.kernel(self.op, self.fd, event.as_ref()),
        }
    }

    fn add(&mut self, state: &mut State, event: epoll_event) -> Result<(), c_int> {
        let exclusive =
            (EPOLLEXCLUSIVE | EPOLLIN | EPOLLOUT | EPOLLERR | EPOLLHUP | EPOLLET | EPOLLWAKEUP)
                as u32;
        if event.events & EPOLLEXCLUSIVE as u32 != 0 && event.events & !exclusive != 0 {
            return Err(libc::EINVAL);
        }
        if !self.on_rings {
            self.kernel(EPOLL_CTL_ADD, self.fd, Some(&event))?;
        }
        let new = Slot {
            registration: Registration::new(event.events, event.u64),
            fd: self.fd,
            number: self.fd,
            target: self.target,
            watches_space: false,
        };
        let mut added = state.slots.add(new);
        if added.is_none() {
            (0..state.slots.high).for_each(|bit| drop_resting(self.epoll, state, bit));
            added = state.slots.add(new);
        }
        let Some(bit) = added else {
            // No room: this connection stays with the kernel here.
            self.leave = Some(Reason::TableFull);
            return if self.on_rings {
                self.kernel(EPOLL_CTL_ADD, self.fd, Some(&event))
            } else {
                Ok(())
            };
        };
        link(self.target, reference(self.index, bit));
        if self.on_rings && !to_inner(self.epoll, state, bit, self.held, false) {
            self.leave = Some(Reason::NoMemory);
            return self.kernel(EPOLL_CTL_ADD, self.fd, Some(&event));
        }
        Ok(())
    }

    /// The program makes a registration again that it has deleted.
    fn revive(&mut self, state: &mut State, bit: usize, event: epoll_event) {
        let Some(slot) = state.slot(bit) else { return };
        slot.modify(event.events, event.u64);
        if let Some(held) = self.held {
            held.conn.resting.fetch_sub(1, Relaxed);
        }
        enter_inner(self.epoll, state, bit, self.held, false);
    }

    fn modify(&mut self, state: &mut State, bit: usize, event: epoll_event) -> Result<(), c_int> {
        let slot = state.slot(bit).ok_or(libc::ENOENT)?;
        if slot.place() != Place::Kernel
            && (event.events | slot.events) & EPOLLEXCLUSIVE as u32 != 0
        {
            return Err(libc::EINVAL);
        }
        match slot.place() {
            // Whoever looks at it next has space on the anchor watched, where that counts.
            Place::Inner => {}
            Place::Parked => {
                self.kernel(EPOLL_CTL_ADD, slot.number, Some(&event))?;
            }
            _ => self.kernel(EPOLL_CTL_MOD, slot.number, Some(&event))?,
        }
        slot.modify(event.events, event.u64);
        if slot.place() == Place::Inner {
            state.mark(bit);
        }
        Ok(())
    }

    fn delete(&mut self, state: &mut State, bit: usize) -> Result<(), c_int> {
        let slot = state.slot(bit).ok_or(libc::ENOENT)?;
        match slot.place() {
            Place::Inner => {
                if let Some(held) = self.held
                    && slot.number == self.fd
                    && !self.epoll.is_inherited()
                    && self.on_rings
                {
                    slot.rest();
                    held.conn.resting.fetch_add(1, Relaxed);
                    leave_inner(self.epoll, state, bit);
                    state.unmark(bit);
                    return Ok(());
                }
                let inner = self.epoll.inner.load(Relaxed);
                sys::epoll_ctl(inner, EPOLL_CTL_DEL, slot.number, None);
            }
            Place::Kernel => self.kernel(EPOLL_CTL_DEL, slot.number, None)?,
            _ => {}
        }
        remove(self.epoll, state, bit, self.target);
        Ok(())
    }
}

/// Frees a slot, if it still is this target's.
pub(super) fn remove(epoll: &Epoll, state: &mut State, bit: usize, target: Kind) {
    let Some(slot) = state.slot(bit) else { return };
    if slot.place() == Place::Free || slot.target != target {
        return;
    }
    epoll.arrived(slot);
    let number = std::mem::replace(&mut slot.number, -1);
    if number != slot.fd {
        close_copy(number);
    }
    match slot.free() {
        Place::Inner => leave_inner(epoll, state, bit),
        Place::Resting => {
            if let Kind::Conn(index) = target
                && let Some(conn) = conn::at(index)
            {
                conn.resting.fetch_sub(1, Relaxed);
            }
        }
        _ => {}
    }
    state.unmark(bit);
    state.slots.freed(bit);
    unlink(target, reference(epoll.number.load(Relaxed) as usize, bit));
}

/// Frees a slot whose registration the program has deleted, if it is one.
pub(super) fn drop_resting(epoll: &Epoll, state: &mut State, bit: usize) {
    let Some(slot) = state.slot(bit).copied() else {
        return;
    };
    if slot.place() == Place::Resting {
        // In a forked child it is the parent's to take out.
        if !epoll.is_inherited() {
            let inner = epoll.inner.load(Relaxed);
            sys::epoll_ctl(inner, EPOLL_CTL_DEL, slot.number, None);
        }
        remove(epoll, state, bit, slot.target);
    }
}

pub(super) fn leave_inner(epoll: &Epoll, state: &mut State, bit: usize) {
    state.slots.set_inner(bit, false);
    epoll.streams.fetch_sub(1, Relaxed);
}

/// Makes the inner instance.
fn make_inner(epoll: &Epoll, state: &mut State) -> bool {
    if epoll.inner.load(Relaxed) >= 0 {
        return true;
    }
    let inner = sys::epoll_create() as c_int;
    if inner < 0 {
        return false;
    }
    let inner = tenant::hide(inner);
    let event = inner_in_program();
    if sys::epoll_ctl(epoll.fd.load(Relaxed), EPOLL_CTL_ADD, inner, Some(&event)) != 0 {
        tenant::close_hidden(inner);
        return false;
    }
    epoll.inner.store(inner, Release);
    if !epoll.is_inherited() {
        state.bell = tenant::take_bell();
    }
    let kicker = sys::eventfd() as c_int;
    if kicker >= 0 {
        let kicker = tenant::hide(kicker);
        sys::epoll_ctl(inner, EPOLL_CTL_ADD, kicker, Some(&kicker_in_inner()));
        epoll.kicker.store(kicker, Release);
    }
    true
}

/// Puts a registration into the inner instance. It is in neither when this is called, and stays so
/// when this is false. `fired`: with EPOLLONESHOT, where it was.
pub(super) fn to_inner(
    epoll: &Epoll,
    state: &mut State,
    bit: usize,
    held: Option<&Use>,
    fired: bool,
) -> bool {
    let is_watched = watch(epoll, state, bit);
    if is_watched {
        enter_inner(epoll, state, bit, held, fired);
    }
    is_watched
}

/// Has what is registered watched by the inner instance, where it is not watched yet. False when it can't be.
pub(super) fn watch(epoll: &Epoll, state: &mut State, bit: usize) -> bool {
    if !make_inner(epoll, state) {
        return false;
    }
    let Some(slot) = state.slot(bit) else {
        return false;
    };
    let inner = epoll.inner.load(Relaxed);
    let event = inner_event(slot.events, bit);
    match sys::epoll_ctl(inner, EPOLL_CTL_ADD, slot.number, Some(&event)) {
        0 => slot.watches_space = slot.events & EPOLLOUT as u32 != 0,
        error if error == -(libc::EEXIST as isize) => {}
        _ => return false,
    }
    true
}

/// A registration that is in the inner instance counts from now on. Whoever sleeps has not asked this stream: the caller hands
/// on.
fn enter_inner(epoll: &Epoll, state: &mut State, bit: usize, held: Option<&Use>, fired: bool) {
    let Some(slot) = state.slot(bit) else { return };
    if !slot.enter(fired) {
        return;
    }
    state.slots.set_inner(bit, true);
    epoll.streams.fetch_add(1, SeqCst);
    state.mark(bit);
    if let Some(held) = held {
        set_place(epoll, state, bit, held);
    }
}

/// Says on the stream where its readiness is told: on the bell, if there is only one to tell. The
/// peer maps the board of the process that the stream was first mapped in.
fn set_place(epoll: &Epoll, state: &State, bit: usize, held: &Use) {
    let Some(stream) = held.conn.stream() else {
        return;
    };
    let mut registrations = 0;
    each(&held.conn.registrations, |_, _, _| registrations += 1);
    let registrations = registrations - held.conn.resting.load(Relaxed).min(registrations);
    let own = held.conn.shared.load(Acquire) == 0
        && held.conn.born.load(Relaxed) != born::UNKNOWN
        && !epoll.is_inherited();
    let place = match state.bell {
        Some((number, _)) if own && registrations == 1 && bit < limits::BELLED.get() as usize => {
            bell::Place { bell: number, bit }.to_word()
        }
        _ => 0,
    };
    let bytes = stream.incoming().bytes.place.swap(place, AcqRel);
    let space = stream.out().space.place.swap(place, AcqRel);
    if place == 0 && (bytes != 0 || space != 0) {
        // Whoever waits for the bell there was, or sleeps, is told by a byte from now on.
        let end = stream.at(held, held.conn.fd.load(Relaxed));
        ready::ask(&end, ready::IN | ready::OUT, want::WAKE);
    }
}

/// How a stream is to tell that it has something: by bell, where it has a place on this one that wakes whoever sleeps.
fn how(epoll: &Epoll, state: &State, bit: usize, stream: &Shared) -> u32 {
    let place = stream.incoming().bytes.place.load(Relaxed);
    match state.bell {
        Some((number, bell))
            if place == (bell::Place { bell: number, bit }).to_word() && reaches(epoll, bell) =>
        {
            want::BELL
        }
        _ => want::WAKE,
    }
}

/// What the inner instance is asked about an anchor: edges, each of which is looked into. Space on
/// the anchor counts while a direction has not switched.
pub(super) fn inner_event(events: u32, bit: usize) -> epoll_event {
    let out = events & EPOLLOUT as u32;
    epoll_event {
        events: (EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET) as u32 | out,
        u64: bit as u64,
    }
}

/// Has space on the anchor watched, where a registration waits for it, and the direction is there; or where it is for what the
/// other end has left in the ring, which somebody has to send who waits for something of this connection.
pub(super) fn watch_space(epoll: &Epoll, state: &mut State, bit: usize, stream: &Shared) {
    let Some(slot) = state.slot(bit) else { return };
    let phase = stream.tx().phase.load(Acquire);
    let waits = match phase {
        phase::RING => false,
        phase::LEAVING => true,
        _ => slot.events & EPOLLOUT as u32 != 0,
    };
    if waits && !slot.watches_space {
        let event = inner_event(slot.events | EPOLLOUT as u32, bit);
        let inner = epoll.inner.load(Relaxed);
        slot.watches_space = sys::epoll_ctl(inner, EPOLL_CTL_MOD, slot.number, Some(&event)) == 0;
    }
}

/// Asks for a sign when what a registration names comes.
pub(super) fn ask(epoll: &Epoll, state: &State, bit: usize, end: &End<'_>, events: u32) {
    ready::ask(end, events as i16, how(epoll, state, bit, end.shared));
}
