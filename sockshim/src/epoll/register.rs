//! Registrations: `epoll_ctl`, and where each registration goes when its stream comes and goes.

use super::report::Snapshot;
use super::*;
use crate::conn::{Conn, Use, born};
use crate::{demote, ready};
use libc::{
    EPOLL_CTL_MOD, EPOLLERR, EPOLLEXCLUSIVE, EPOLLHUP, EPOLLONESHOT, EPOLLOUT, EPOLLPRI,
    EPOLLRDHUP, EPOLLWAKEUP,
};
use rdsock_shm::bell;
use rdsock_shm::layout::want;
use rdsock_shm::reason::Reason;

fn is_on_rings(held: &Use) -> bool {
    held.conn.stream().is_some_and(demote::is_on_rings)
}

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
                (true, false) => demoted(held, fd),
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
    Some(match result {
        Ok(()) => 0,
        Err(error) => {
            sys::set_errno(error);
            -1
        }
    })
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
    fn known(&self, state: &mut State) -> Option<usize> {
        let mut known = None;
        each(list_of(self.target)?, |_, index, bit| {
            if index == self.index
                && let Some(slot) = state.slot(bit)
                && slot.place != Place::Free
                && slot.fd == self.fd
                && slot.target == self.target
            {
                known = Some(bit);
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
        match (self.op, self.known(state), event) {
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
        let added = state.add(Registration {
            place: Place::Kernel,
            fd: self.fd,
            number: self.fd,
            target: self.target,
            events: event.events,
            data: event.u64,
            disabled: false,
            fresh: true,
            reported: Snapshot::default(),
        });
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
        if self.on_rings && !to_inner(self.epoll, state, bit, self.held) {
            self.leave = Some(Reason::NoMemory);
            return self.kernel(EPOLL_CTL_ADD, self.fd, Some(&event));
        }
        Ok(())
    }

    fn modify(&mut self, state: &mut State, bit: usize, event: epoll_event) -> Result<(), c_int> {
        let slot = state.slot(bit).ok_or(libc::ENOENT)?;
        if slot.place != Place::Kernel && (event.events | slot.events) & EPOLLEXCLUSIVE as u32 != 0
        {
            return Err(libc::EINVAL);
        }
        match slot.place {
            Place::Inner => {
                if event.events & !slot.events & EPOLLOUT as u32 != 0 {
                    let event = inner_event(event.events, bit);
                    let inner = self.epoll.inner.load(Relaxed);
                    sys::epoll_ctl(inner, EPOLL_CTL_MOD, slot.number, Some(&event));
                }
            }
            Place::Parked => {
                self.kernel(EPOLL_CTL_ADD, slot.number, Some(&event))?;
                slot.place = Place::Kernel;
            }
            _ => self.kernel(EPOLL_CTL_MOD, slot.number, Some(&event))?,
        }
        slot.events = event.events;
        slot.data = event.u64;
        slot.disabled = false;
        slot.fresh = true;
        if slot.place == Place::Inner {
            state.mark(bit);
            kick(self.epoll);
        }
        Ok(())
    }

    fn delete(&mut self, state: &mut State, bit: usize) -> Result<(), c_int> {
        let slot = state.slot(bit).ok_or(libc::ENOENT)?;
        match slot.place {
            Place::Inner => {
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
    if slot.place == Place::Free || slot.target != target {
        return;
    }
    let was = std::mem::replace(&mut slot.place, Place::Free);
    if was == Place::Inner {
        leave_inner(epoll, state, bit);
    }
    state.unmark(bit);
    state.free = state.free.min(bit);
    unlink(target, reference(epoll.index(), bit));
}

fn leave_inner(epoll: &Epoll, state: &mut State, bit: usize) {
    set_bit(&mut state.inner, bit, false);
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
/// when this is false.
fn to_inner(epoll: &Epoll, state: &mut State, bit: usize, held: Option<&Use>) -> bool {
    if !make_inner(epoll, state) {
        return false;
    }
    let Some(slot) = state.slot(bit) else {
        return false;
    };
    let inner = epoll.inner.load(Relaxed);
    let event = inner_event(slot.events, bit);
    let got = sys::epoll_ctl(inner, EPOLL_CTL_ADD, slot.number, Some(&event));
    if got != 0 && got != -(libc::EEXIST as isize) {
        return false;
    }
    slot.place = Place::Inner;
    slot.fresh = true;
    set_bit(&mut state.inner, bit, true);
    epoll.streams.fetch_add(1, SeqCst);
    state.mark(bit);
    if let Some(held) = held {
        set_place(epoll, state, bit, held);
    }
    // Whoever sleeps has not asked this stream, nor been counted at a bell that was taken just now.
    kick(epoll);
    true
}

/// Says on the stream where its readiness is told: on the bell, if there is only one to tell. The
/// peer maps the board of the process that the stream was first mapped in.
fn set_place(epoll: &Epoll, state: &State, bit: usize, held: &Use) {
    let Some(stream) = held.conn.stream() else {
        return;
    };
    let mut registrations = 0;
    each(&held.conn.registrations, |_, _, _| registrations += 1);
    let own = held.conn.shared.load(Acquire) == 0
        && held.conn.born.load(Relaxed) != born::UNKNOWN
        && !epoll.is_inherited();
    let place = match state.bell {
        Some((number, _)) if own && registrations == 1 => {
            bell::Place { bell: number, bit }.to_word()
        }
        _ => 0,
    };
    let bytes = stream.incoming().bytes.place.swap(place, AcqRel);
    let space = stream.out().space.place.swap(place, AcqRel);
    if place == 0 && (bytes != 0 || space != 0) {
        // Whoever waits for the bell there was, or sleeps, is told by a byte from now on.
        ready::ask(stream, ready::IN | ready::OUT, want::WAKE);
    }
}

/// How a stream is to tell that it has something: by bell, where it has a place on this one.
pub(super) fn how(state: &State, bit: usize, stream: &crate::stream::Stream) -> u32 {
    let place = stream.incoming().bytes.place.load(Relaxed);
    match state.bell {
        Some((number, _)) if place == (bell::Place { bell: number, bit }).to_word() => want::BELL,
        _ => want::WAKE,
    }
}

/// What the inner instance is asked about an anchor: edges, each of which is looked into. Space on
/// the anchor counts while a direction has not switched.
fn inner_event(events: u32, bit: usize) -> epoll_event {
    let out = events & EPOLLOUT as u32;
    epoll_event {
        events: (EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET) as u32 | out,
        u64: bit as u64,
    }
}

/// A wake byte of a connection was taken off its anchor outside of epoll: whoever sleeps on an
/// instance that has it must look.
pub fn kick_all(conn: &Conn) {
    each(&conn.registrations, |epoll, _, bit| {
        if epoll.sleepers.load(SeqCst) != 0 || epoll.registrations.load(SeqCst) != 0 {
            if let Some(guard) = take(epoll) {
                guard.state().mark(bit);
            }
            kick(epoll);
        }
    });
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

/// A stream was mapped: its registrations move to the inner instances.
pub fn promoted(held: &Use) {
    let mut failed = None;
    each(&held.conn.registrations, |epoll, index, bit| {
        let Some(guard) = take(epoll) else { return };
        let state = guard.state();
        if let Some(slot) = state.slot(bit)
            && slot.target == Kind::Conn(held.index)
            && is_on_rings(held)
        {
            move_in(epoll, state, bit, Some(held)).unwrap_or_else(|fd| failed = Some(fd));
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
    match slot.place {
        Place::Kernel => {
            slot.disabled = slot.events & EPOLLONESHOT as u32 != 0 && has_fired(epfd, slot.number);
            sys::epoll_ctl(epfd, EPOLL_CTL_DEL, slot.number, None);
        }
        Place::Parked => {}
        _ => return Ok(()),
    }
    if to_inner(epoll, state, bit, held) {
        return Ok(());
    }
    let slot = state.slot(bit).ok_or(-1)?;
    slot.place = Place::Inner;
    set_bit(&mut state.inner, bit, true);
    epoll.streams.fetch_add(1, Relaxed);
    let number = move_out(epoll, state, bit);
    Err(number)
}

/// Moves a registration back to the program's instance; the number of its fd.
fn move_out(epoll: &Epoll, state: &mut State, bit: usize) -> c_int {
    leave_inner(epoll, state, bit);
    state.unmark(bit);
    let Some(slot) = state.slot(bit) else {
        return -1;
    };
    sys::epoll_ctl(epoll.inner.load(Relaxed), EPOLL_CTL_DEL, slot.number, None);
    if slot.disabled {
        slot.place = Place::Parked;
    } else {
        slot.place = Place::Kernel;
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
pub fn demoted(held: &Use, _fd: c_int) {
    each(&held.conn.registrations, |epoll, _, bit| {
        let Some(guard) = take(epoll) else { return };
        let state = guard.state();
        if let Some(slot) = state.slot(bit)
            && slot.place == Place::Inner
            && slot.target == Kind::Conn(held.index)
        {
            move_out(epoll, state, bit);
        }
    });
}

/// An instance that holds streams is asked through the inner instances of those it is in.
fn lift(index: usize) {
    let Some(epoll) = at(index) else { return };
    if epoll.registrations.load(Acquire) == 0 || epoll.streams.load(SeqCst) == 0 {
        return;
    }
    each(&epoll.registrations, |outer, number, bit| {
        let Some(guard) = take(outer) else { return };
        let state = guard.state();
        if let Some(slot) = state.slot(bit)
            && slot.place == Place::Kernel
            && slot.target == Kind::Epoll(index)
        {
            let _ = move_in(outer, state, bit, None);
            drop(guard);
            lift(number);
        }
    });
}

/// The last fd of a connection is closed: the kernel forgets its registrations, and so do we.
pub fn forget(conn: &Conn) {
    each(&conn.registrations, |epoll, _, bit| {
        let Some(guard) = take(epoll) else { return };
        let state = guard.state();
        if let Some(slot) = state.slot(bit)
            && let target @ Kind::Conn(index) = slot.target
            && conn::at(index).is_some_and(|other| std::ptr::eq(other, conn))
        {
            if slot.place == Place::Inner && conn.shared.load(Acquire) == 0 {
                let inner = epoll.inner.load(Relaxed);
                sys::epoll_ctl(inner, EPOLL_CTL_DEL, slot.number, None);
            }
            // Otherwise the file lives on in another process, and so does what is registered.
            remove(epoll, state, bit, target);
        }
    });
}

/// Frees a slot of an instance that goes away.
pub(super) fn forget_slot(epoll: &Epoll, state: &mut State, bit: usize, target: Kind) {
    remove(epoll, state, bit, target);
}

/// One of several fds of a connection is about to be closed: what is registered under its number
/// goes over to another one, since the kernel would keep it where no number leads to.
pub fn renumber(held: &Use, fd: c_int) {
    if held.conn.registrations.load(Acquire) == 0 {
        return;
    }
    let other = conn::fd_of(Kind::Conn(held.index), fd).unwrap_or(-1);
    each(&held.conn.registrations, |epoll, _, bit| {
        let Some(guard) = take(epoll) else { return };
        let epfd = epoll.fd.load(Relaxed);
        let Some(slot) = guard.state().slot(bit) else {
            return;
        };
        if slot.number != fd || slot.target != Kind::Conn(held.index) {
            return;
        }
        let (set, event) = match slot.place {
            Place::Inner => (epoll.inner.load(Relaxed), inner_event(slot.events, bit)),
            Place::Kernel if slot.events & EPOLLONESHOT as u32 != 0 && has_fired(epfd, fd) => {
                sys::epoll_ctl(epfd, EPOLL_CTL_DEL, fd, None);
                slot.place = Place::Parked;
                slot.disabled = true;
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

/// True when the kernel has disabled a registration with EPOLLONESHOT: only its private bits are
/// left of what it was asked for.
fn has_fired(epfd: c_int, fd: c_int) -> bool {
    let mut path = [0_u8; 48];
    if std::io::Write::write_fmt(
        &mut &mut path[..47],
        format_args!("/proc/self/fdinfo/{epfd}"),
    )
    .is_err()
    {
        return false;
    }
    let file = sys::open_read(path.as_ptr().cast()) as c_int;
    if file < 0 {
        return false;
    }
    let mut fired = false;
    let mut line = [0_u8; 64];
    let mut len = 0;
    let mut part = [0_u8; 2048];
    'file: loop {
        // SAFETY: the buffer is valid for its length.
        let got = unsafe { sys::pread(file, part.as_mut_ptr(), part.len(), None) };
        if got <= 0 {
            break;
        }
        for byte in part.iter().take(got as usize) {
            if *byte == b'\n' {
                if let Some(events) = line.get(..len).and_then(|line| events_of(line, fd)) {
                    let asked = EPOLLIN | EPOLLOUT | EPOLLPRI | EPOLLRDHUP | EPOLLERR | EPOLLHUP;
                    fired = events & (asked as u32 | 0x7c0) == 0;
                    break 'file;
                }
                len = 0;
            } else if let Some(place) = line.get_mut(len) {
                *place = *byte;
                len += 1;
            }
        }
    }
    sys::close(file);
    fired
}

/// The events of a line `tfd: N events: X data: …`, if it is that of `fd`.
fn events_of(line: &[u8], fd: c_int) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    if words.next()? != "tfd:" || words.next()?.parse() != Ok(fd) {
        return None;
    }
    words.next()?;
    u32::from_str_radix(words.next()?, 16).ok()
}

/// Asks for a sign when what a registration names comes.
pub(super) fn ask(state: &State, bit: usize, stream: &crate::stream::Stream, events: u32) {
    ready::ask(stream, events as i16, how(state, bit, stream));
}
