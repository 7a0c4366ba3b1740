//! epoll over any mix of fds.
//!
//! The program's epoll instance stays the kernel's, with the program's own data in it, for every
//! fd that is not on rings. Streams are taken out of it and put into an *inner* instance, which
//! stands in the program's one with a secret as its data: so the kernel goes on to wake whoever
//! sleeps, the program's data is never touched, and no registration is ever confused with ours.
//! Which streams have something is told by the instance's bell ([`rdsock_shm::bell`]).

use crate::conn::{self, Conn, Kind, Use};
use crate::poll::Deadline;
use crate::{clock, demote, ready, real, stream, sys, tenant, wait};
use libc::{
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLLERR, EPOLLET, EPOLLEXCLUSIVE, EPOLLHUP,
    EPOLLIN, EPOLLONESHOT, EPOLLRDHUP, c_int, epoll_event, sigset_t, timespec,
};
use rdsock_shm::bell::{self, Place};
use rdsock_shm::layout::{BELL_BITS, Bell, Counter, want};
use rdsock_shm::lock::{self, Owner, Taken};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering::*};

/// Epoll instances that can hold streams.
const INSTANCES: usize = 256;
/// Up to so many streams are simply looked at; with more, their peers ring the bell.
const FEW: usize = 8;
/// Microseconds between two questions to the kernel while the rings are watched.
const ASK_KERNEL_US: u64 = 10;
/// Words of the bitmap of registrations to look at.
const WORDS: usize = BELL_BITS / 64;

/// Data of the inner instance's own registration.
static SECRET: AtomicU64 = AtomicU64::new(0);
static POOL: AtomicPtr<Epoll> = AtomicPtr::new(std::ptr::null_mut());

/// The program's registration of a connection.
#[derive(Clone, Copy, Debug)]
struct Registration {
    /// 0 free, 1 in the program's instance, 2 in the inner one.
    place: u32,
    fd: c_int,
    conn: usize,
    events: u32,
    data: u64,
    /// EPOLLONESHOT has fired.
    disabled: bool,
    /// Something to report was not reported yet, whatever the positions say (added, modified).
    fresh: bool,
    /// The incoming position when it was last reported, for EPOLLET.
    reported: u64,
    /// The marks and the anchor's state when it was last reported, likewise.
    state: u64,
    /// The next registration of the same connection, as in [`Conn::registrations`].
    next: u32,
}

/// One epoll instance of the program.
#[derive(Debug)]
pub struct Epoll {
    lock: AtomicU64,
    /// Entries of the fd table, plus 1 while it is being set up.
    refs: AtomicU32,
    fd: AtomicI32,
    inner: AtomicI32,
    /// An eventfd in the inner instance, to wake whoever sleeps on it from this process.
    kicker: AtomicI32,
    /// Threads of this process that sleep on it.
    sleepers: AtomicU32,
    /// Streams registered.
    streams: AtomicU32,
    score: AtomicU32,
    state: UnsafeCell<State>,
}

/// What the lock protects.
#[derive(Debug)]
struct State {
    slots: *mut Registration,
    /// One more than the highest slot ever used.
    high: usize,
    /// Registrations to look at.
    look: [u64; WORDS],
    cursor: usize,
    bell: Option<(usize, &'static Bell)>,
    asked_at: u64,
}

// SAFETY: `state` is used under `lock`, which nested code on the same thread does not enter.
unsafe impl Sync for Epoll {}

struct Guard<'a>(&'a Epoll);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        lock::release(&self.0.lock, Taken::Outer);
    }
}

impl Guard<'_> {
    #[allow(clippy::mut_from_ref)]
    fn state(&self) -> &mut State {
        // SAFETY: the lock is held and not nested, and callers keep one such reference at a time.
        unsafe { &mut *self.0.state.get() }
    }
}

impl State {
    fn slot(&mut self, bit: usize) -> Option<&mut Registration> {
        // SAFETY: the array has BELL_BITS entries, zeroed when mapped (a free registration).
        (bit < self.high && !self.slots.is_null()).then(|| unsafe { &mut *self.slots.add(bit) })
    }

    fn mark(&mut self, bit: usize) {
        if let Some(word) = self.look.get_mut(bit / 64) {
            *word |= 1 << (bit % 64);
        }
    }

    fn unmark(&mut self, bit: usize) {
        if let Some(word) = self.look.get_mut(bit / 64) {
            *word &= !(1 << (bit % 64));
        }
    }
}

fn reference(instance: usize, bit: usize) -> u32 {
    ((instance as u32) << 16 | bit as u32) + 1
}

fn of_reference(reference: u32) -> Option<(&'static Epoll, usize)> {
    let value = reference.checked_sub(1)?;
    Some((at((value >> 16) as usize)?, (value & 0xffff) as usize))
}

/// Reserves the instances and makes the secret.
pub fn start() {
    if let Some(pool) = sys::map(-1, INSTANCES * std::mem::size_of::<Epoll>()) {
        POOL.store(pool.cast(), Release);
    }
    // Not an address, not a small number: nothing that a program has as its data.
    let noise = clock::ticks() ^ (u64::from(stream::pid()) << 32) ^ pool_address().rotate_left(17);
    SECRET.store(
        noise.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 0x8080_0000_0000_0001,
        Relaxed,
    );
}

fn pool_address() -> u64 {
    POOL.load(Relaxed) as u64
}

fn at(index: usize) -> Option<&'static Epoll> {
    let pool = POOL.load(Relaxed);
    // SAFETY: the pool has INSTANCES zeroed entries (a valid state: `bell` is set before it is
    // first read, see `track`) and is never unmapped.
    (index < INSTANCES && !pool.is_null()).then(|| unsafe { &*pool.add(index) })
}

/// The program has made an epoll instance.
pub fn track(fd: c_int) {
    for index in 0..INSTANCES {
        let Some(epoll) = at(index) else { return };
        if epoll.refs.compare_exchange(0, 1, AcqRel, Relaxed).is_err() {
            continue;
        }
        epoll.lock.store(0, Relaxed);
        epoll.fd.store(fd, Relaxed);
        epoll.inner.store(-1, Relaxed);
        epoll.kicker.store(-1, Relaxed);
        epoll.sleepers.store(0, Relaxed);
        epoll.streams.store(0, Relaxed);
        epoll.score.store(wait::FULL_SCORE, Relaxed);
        let slots = {
            // SAFETY: the instance is new, nobody else uses its state.
            let old = unsafe { (*epoll.state.get()).slots };
            if old.is_null() {
                sys::map(-1, BELL_BITS * std::mem::size_of::<Registration>())
                    .map_or(std::ptr::null_mut(), |at| at.cast())
            } else {
                old
            }
        };
        // SAFETY: as above.
        unsafe {
            epoll.state.get().write(State {
                slots,
                high: 0,
                look: [0; WORDS],
                cursor: 0,
                bell: None,
                asked_at: 0,
            });
        }
        conn::replace(fd, Kind::Epoll(index));
        return;
    }
    conn::replace(fd, Kind::Other);
}

/// Another fd for the same instance.
pub fn add_ref(fd: c_int, index: usize) {
    if let Some(epoll) = at(index) {
        epoll.refs.fetch_add(1, AcqRel);
        conn::replace(fd, Kind::Epoll(index));
    }
}

/// An fd of an instance is closed.
pub fn closed(index: usize) {
    let Some(epoll) = at(index) else { return };
    if epoll.refs.load(Acquire) > 1 {
        epoll.refs.fetch_sub(1, AcqRel);
        return;
    }
    if let Some(guard) = take(epoll) {
        let state = guard.state();
        for bit in 0..state.high {
            if let Some(slot) = state.slot(bit)
                && slot.place != 0
            {
                let conn = slot.conn;
                slot.place = 0;
                unlink(conn, reference(index, bit));
            }
        }
        if let Some((number, _)) = state.bell.take() {
            tenant::return_bell(number);
        }
        state.high = 0;
        for place in [&epoll.inner, &epoll.kicker] {
            let fd = place.swap(-1, AcqRel);
            if fd >= 0 {
                tenant::close_hidden(fd);
            }
        }
        epoll.streams.store(0, Relaxed);
    }
    epoll.refs.fetch_sub(1, AcqRel);
}

/// The inner instance `old` is now `new`.
pub fn moved_inner(old: c_int, new: c_int) {
    for index in 0..INSTANCES {
        if let Some(epoll) = at(index)
            && epoll.refs.load(Relaxed) != 0
            && epoll
                .inner
                .compare_exchange(old, new, AcqRel, Relaxed)
                .is_ok()
        {
            // The kernel has it under its number: register the new one before the old goes.
            let event = epoll_event {
                events: EPOLLIN as u32,
                u64: SECRET.load(Relaxed),
            };
            sys::epoll_ctl(epoll.fd.load(Relaxed), EPOLL_CTL_ADD, new, Some(&event));
        }
    }
}

/// Frees every lock in a forked child, which has one thread only.
pub fn after_fork_in_child() {
    for index in 0..INSTANCES {
        if let Some(epoll) = at(index)
            && epoll.refs.load(Relaxed) != 0
        {
            epoll.lock.store(0, Relaxed);
        }
    }
}

fn take(epoll: &Epoll) -> Option<Guard<'_>> {
    let me = Owner::new(stream::pid(), sys::thread_pointer());
    let mut turns = 0_u32;
    loop {
        match lock::try_take(&epoll.lock, me) {
            Ok(Taken::Outer) => return Some(Guard(epoll)),
            Ok(Taken::Nested) => return None,
            Err(_) => {
                turns = turns.wrapping_add(1);
                if turns % 64 == 0 {
                    sys::sched_yield();
                }
                std::hint::spin_loop();
            }
        }
    }
}

/// Calls `found` with each registration of a connection.
fn each_of(conn: &Conn, mut found: impl FnMut(&'static Epoll, usize, usize)) {
    let mut next = conn.registrations.load(Acquire);
    for _ in 0..64 {
        let Some((epoll, bit)) = of_reference(next) else {
            return;
        };
        let this = next;
        next = match take(epoll) {
            Some(guard) => guard.state().slot(bit).map_or(0, |slot| slot.next),
            None => return,
        };
        found(epoll, ((this - 1) >> 16) as usize, bit);
    }
}

fn link(conn: usize, reference: u32, slot: &mut Registration) {
    if let Some(conn) = conn::at(conn) {
        slot.next = conn.registrations.swap(reference, AcqRel);
    }
}

fn unlink(conn: usize, gone: u32) {
    let Some(conn) = conn::at(conn) else { return };
    let Some((epoll, bit)) = of_reference(gone) else {
        return;
    };
    // SAFETY: the caller holds the lock of this instance.
    let after = unsafe {
        (*epoll.state.get())
            .slots
            .as_ref()
            .map(|first| (*std::ptr::from_ref(first).add(bit)).next)
    }
    .unwrap_or(0);
    if conn
        .registrations
        .compare_exchange(gone, after, AcqRel, Acquire)
        .is_ok()
    {
        return;
    }
    let mut next = conn.registrations.load(Acquire);
    for _ in 0..64 {
        let Some((other, bit)) = of_reference(next) else {
            return;
        };
        // SAFETY: registrations of one connection in several instances are changed by the
        // program's own epoll_ctl calls, one fd at a time; the array is never unmapped.
        let slot = unsafe { &mut *(*other.state.get()).slots.add(bit) };
        if slot.next == gone {
            slot.next = after;
            return;
        }
        next = slot.next;
    }
}

/// `epoll_ctl`. `None`: the call is the kernel's alone.
///
/// # Safety
/// `event` is null or valid.
pub unsafe fn ctl(epfd: c_int, op: c_int, fd: c_int, event: *const epoll_event) -> Option<c_int> {
    let held = conn::of(fd)?;
    // SAFETY: the caller vouches for it.
    let event = if event.is_null() {
        None
    } else {
        Some(unsafe { event.read_unaligned() })
    };
    let Kind::Epoll(index) = conn::kind(epfd) else {
        // An instance that the shim has not seen made: what is registered there must stay the
        // kernel's.
        demote::leave(&held, fd, rdsock_shm::reason::Reason::Call);
        return None;
    };
    let epoll = at(index)?;
    let on_rings = held.conn.stream().is_some_and(demote::is_on_rings);
    let guard = take(epoll)?;
    let result = change(epoll, index, &guard, op, fd, event, &held, on_rings);
    drop(guard);
    // A stream may have been mapped meanwhile by another thread.
    if !on_rings && held.conn.stream().is_some_and(demote::is_on_rings) {
        promoted(&held);
    }
    Some(match result {
        Ok(()) => 0,
        Err(error) => {
            sys::set_errno(error);
            -1
        }
    })
}

#[allow(clippy::too_many_arguments)]
fn change(
    epoll: &Epoll,
    index: usize,
    guard: &Guard<'_>,
    op: c_int,
    fd: c_int,
    event: Option<epoll_event>,
    held: &Use,
    on_rings: bool,
) -> Result<(), c_int> {
    let state = guard.state();
    let known = (0..state.high).find(|bit| {
        state
            .slot(*bit)
            .is_some_and(|slot| slot.place != 0 && slot.fd == fd && slot.conn == held.index)
    });
    let epfd = epoll.fd.load(Relaxed);
    let kernel = |event: Option<&epoll_event>| match sys::epoll_ctl(epfd, op, fd, event) {
        0 => Ok(()),
        error => Err(-error as c_int),
    };
    match (op, known) {
        (EPOLL_CTL_ADD, Some(_)) => Err(libc::EEXIST),
        (EPOLL_CTL_MOD | EPOLL_CTL_DEL, None) if on_rings => Err(libc::ENOENT),
        (EPOLL_CTL_ADD | EPOLL_CTL_MOD, _) if event.is_none() => Err(libc::EFAULT),
        (EPOLL_CTL_ADD, None) => {
            let event = event.ok_or(libc::EFAULT)?;
            let exclusive = (EPOLLEXCLUSIVE
                | EPOLLIN
                | libc::EPOLLOUT
                | EPOLLERR
                | EPOLLHUP
                | EPOLLET
                | libc::EPOLLWAKEUP) as u32;
            if event.events & EPOLLEXCLUSIVE as u32 != 0 && event.events & !exclusive != 0 {
                return Err(libc::EINVAL);
            }
            let free =
                (0..state.high).find(|bit| state.slot(*bit).is_some_and(|slot| slot.place == 0));
            let bit = free.unwrap_or(state.high);
            if bit >= BELL_BITS || state.slots.is_null() || index >= 0x7fff {
                // No room: this connection stays with the kernel here.
                demote::leave(held, fd, rdsock_shm::reason::Reason::TableFull);
                return kernel(Some(&event));
            }
            if !on_rings {
                kernel(Some(&event))?;
            }
            state.high = state.high.max(bit + 1);
            let slot = state.slot(bit).ok_or(libc::ENOMEM)?;
            *slot = Registration {
                place: 1,
                fd,
                conn: held.index,
                events: event.events,
                data: event.u64,
                disabled: false,
                fresh: true,
                reported: 0,
                state: 0,
                next: 0,
            };
            link(held.index, reference(index, bit), slot);
            if on_rings {
                to_inner(epoll, state, bit, held);
            }
            Ok(())
        }
        (EPOLL_CTL_MOD, Some(bit)) => {
            let event = event.ok_or(libc::EFAULT)?;
            let slot = state.slot(bit).ok_or(libc::ENOENT)?;
            if slot.place == 2 {
                if (event.events | slot.events) & EPOLLEXCLUSIVE as u32 != 0 {
                    return Err(libc::EINVAL);
                }
            } else {
                kernel(Some(&event))?;
            }
            if slot.place == 2 && event.events & !slot.events & libc::EPOLLOUT as u32 != 0 {
                sys::epoll_ctl(
                    epoll.inner.load(Relaxed),
                    EPOLL_CTL_MOD,
                    fd,
                    Some(&inner_event(event.events, bit)),
                );
            }
            slot.events = event.events;
            slot.data = event.u64;
            slot.disabled = false;
            slot.fresh = true;
            state.mark(bit);
            kick(epoll);
            Ok(())
        }
        (EPOLL_CTL_DEL, Some(bit)) => {
            let slot = state.slot(bit).ok_or(libc::ENOENT)?;
            if slot.place == 2 {
                sys::epoll_ctl(epoll.inner.load(Relaxed), EPOLL_CTL_DEL, fd, None);
                epoll.streams.fetch_sub(1, Relaxed);
            } else {
                kernel(None)?;
            }
            slot.place = 0;
            unlink(held.index, reference(index, bit));
            state.unmark(bit);
            Ok(())
        }
        _ => kernel(event.as_ref()),
    }
}

/// Puts a registration into the inner instance. It is in neither when this is called.
fn to_inner(epoll: &Epoll, state: &mut State, bit: usize, held: &Use) {
    let Some(stream) = held.conn.stream() else {
        return;
    };
    if epoll.inner.load(Relaxed) < 0 {
        let inner = sys::epoll_create() as c_int;
        if inner < 0 {
            return;
        }
        let inner = tenant::hide(inner);
        epoll.inner.store(inner, Release);
        let event = epoll_event {
            events: EPOLLIN as u32,
            u64: SECRET.load(Relaxed),
        };
        sys::epoll_ctl(epoll.fd.load(Relaxed), EPOLL_CTL_ADD, inner, Some(&event));
        state.bell = tenant::take_bell();
        let kicker = sys::eventfd() as c_int;
        if kicker >= 0 {
            let kicker = tenant::hide(kicker);
            epoll.kicker.store(kicker, Release);
            let event = epoll_event {
                events: (EPOLLIN | EPOLLET) as u32,
                u64: u64::MAX,
            };
            sys::epoll_ctl(inner, EPOLL_CTL_ADD, kicker, Some(&event));
        }
    }
    let Some(slot) = state.slot(bit) else { return };
    slot.place = 2;
    slot.fresh = true;
    let event = epoll_event {
        events: (EPOLLIN | EPOLLRDHUP | EPOLLET) as u32,
        u64: bit as u64,
    };
    sys::epoll_ctl(
        epoll.inner.load(Relaxed),
        EPOLL_CTL_ADD,
        slot.fd,
        Some(&event),
    );
    epoll.streams.fetch_add(1, Relaxed);
    // Only one instance can be told by bell.
    let alone =
        held.conn.registrations.load(Relaxed) == slot_reference(epoll, bit) && slot.next == 0;
    let place = match (state.bell, alone) {
        (Some((number, _)), true) => Place { bell: number, bit }.to_word(),
        _ => 0,
    };
    stream.incoming().bytes.place.store(place, Release);
    stream.out().space.place.store(place, Release);
    state.mark(bit);
}

/// What the inner instance is asked about an anchor: edges, each of which is looked into. Space on
/// the anchor counts while a direction has not switched.
fn inner_event(events: u32, bit: usize) -> epoll_event {
    let out = events & libc::EPOLLOUT as u32;
    epoll_event {
        events: (EPOLLIN | EPOLLRDHUP | libc::EPOLLPRI | EPOLLET) as u32 | out,
        u64: bit as u64,
    }
}

/// Wakes the threads of this process that sleep on an instance, so that they look again.
fn kick(epoll: &Epoll) {
    if epoll.sleepers.load(SeqCst) != 0 {
        sys::eventfd_add(epoll.kicker.load(Acquire));
    }
}

/// A wake byte of a connection was taken off its anchor outside of epoll: whoever sleeps on an
/// instance that has it must look.
pub fn kick_all(conn: &Conn) {
    if conn.registrations.load(Acquire) != 0 {
        each_of(conn, |epoll, _, bit| {
            if epoll.sleepers.load(SeqCst) != 0 {
                if let Some(guard) = take(epoll) {
                    guard.state().mark(bit);
                }
                kick(epoll);
            }
        });
    }
}

fn slot_reference(epoll: &Epoll, bit: usize) -> u32 {
    let offset = epoll as *const Epoll as usize - POOL.load(Relaxed) as usize;
    reference(offset / std::mem::size_of::<Epoll>(), bit)
}

/// A stream was mapped: its registrations move to the inner instances.
pub fn promoted(held: &Use) {
    each_of(held.conn, |epoll, _, bit| {
        let Some(guard) = take(epoll) else { return };
        let state = guard.state();
        if let Some(slot) = state.slot(bit)
            && slot.place == 1
        {
            sys::epoll_ctl(epoll.fd.load(Relaxed), EPOLL_CTL_DEL, slot.fd, None);
            to_inner(epoll, state, bit, held);
        }
    });
}

/// A stream was left: its registrations move back to the program's own instances.
pub fn demoted(held: &Use, _fd: c_int) {
    each_of(held.conn, |epoll, _, bit| {
        let Some(guard) = take(epoll) else { return };
        let state = guard.state();
        if let Some(slot) = state.slot(bit)
            && slot.place == 2
        {
            slot.place = 1;
            sys::epoll_ctl(epoll.inner.load(Relaxed), EPOLL_CTL_DEL, slot.fd, None);
            let event = epoll_event {
                events: slot.events,
                u64: slot.data,
            };
            sys::epoll_ctl(epoll.fd.load(Relaxed), EPOLL_CTL_ADD, slot.fd, Some(&event));
            if slot.disabled {
                let event = epoll_event {
                    events: EPOLLONESHOT as u32,
                    u64: slot.data,
                };
                sys::epoll_ctl(epoll.fd.load(Relaxed), EPOLL_CTL_MOD, slot.fd, Some(&event));
            }
            epoll.streams.fetch_sub(1, Relaxed);
            state.unmark(bit);
        }
    });
}

/// The last fd of a connection is closed: the kernel forgets its registrations, and so do we.
pub fn forget(conn: &Conn) {
    if conn.registrations.load(Acquire) == 0 {
        return;
    }
    each_of(conn, |epoll, index, bit| {
        let Some(guard) = take(epoll) else { return };
        let state = guard.state();
        if let Some(slot) = state.slot(bit)
            && slot.place != 0
        {
            if slot.place == 2 {
                sys::epoll_ctl(epoll.inner.load(Relaxed), EPOLL_CTL_DEL, slot.fd, None);
                epoll.streams.fetch_sub(1, Relaxed);
            }
            let conn = slot.conn;
            slot.place = 0;
            unlink(conn, reference(index, bit));
            state.unmark(bit);
        }
    });
}

/// The instance behind an fd, if it holds streams.
pub fn with_streams(epfd: c_int) -> Option<&'static Epoll> {
    let Kind::Epoll(index) = conn::kind(epfd) else {
        return None;
    };
    tenant::look();
    at(index).filter(|epoll| epoll.streams.load(Relaxed) != 0)
}

/// Removes the inner instance from events that the kernel gave; true when it was among them.
pub fn strip(events: &mut [epoll_event], count: usize) -> (usize, bool) {
    let secret = SECRET.load(Relaxed);
    let mut kept = 0;
    for i in 0..count {
        let Some(event) = events.get(i).copied() else {
            break;
        };
        if event.u64 != secret {
            if let Some(place) = events.get_mut(kept) {
                *place = event;
            }
            kept += 1;
        }
    }
    (kept, kept != count)
}

/// Takes what the inner instance has: those streams' anchors have something to say.
fn harvest(epoll: &Epoll) {
    let inner = epoll.inner.load(Acquire);
    if inner < 0 {
        return;
    }
    let mut events = [epoll_event { events: 0, u64: 0 }; 64];
    loop {
        let got = sys::epoll_now(inner, &mut events);
        if got <= 0 {
            return;
        }
        let Some(guard) = take(epoll) else { return };
        let state = guard.state();
        for event in events.iter().take(got as usize) {
            let bit = event.u64 as usize;
            if event.u64 == u64::MAX {
                continue;
            }
            if let Some(slot) = state.slot(bit)
                && slot.place == 2
                && let Some(held) = conn::by_index(slot.conn)
            {
                held.conn.look.store(1, Relaxed);
                // An edge of the anchor is the program's while a direction is on it.
                slot.fresh |= held
                    .conn
                    .stream()
                    .is_some_and(|stream| !stream.is_all_on_rings());
                state.mark(bit);
            }
        }
        if got < 64 {
            return;
        }
    }
}

/// Collects what is ready into `events`; how many.
fn collect(epoll: &Epoll, guard: &Guard<'_>, events: &mut [epoll_event]) -> usize {
    let state = guard.state();
    let few = epoll.streams.load(Relaxed) as usize <= FEW;
    if let Some((_, bell)) = state.bell {
        let look = &mut state.look;
        bell::take(bell, |word, bits| {
            if let Some(place) = look.get_mut(word) {
                *place |= bits;
            }
        });
    }
    let words = state.high.div_ceil(64);
    let mut found = 0;
    let start = state.cursor;
    for step in 0..=words {
        let word = (start / 64 + step) % words.max(1);
        let mut bits = state.look.get(word).copied().unwrap_or(0);
        if few {
            bits = u64::MAX;
        }
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
            if bit >= state.high {
                break;
            }
            let Some(place) = events.get_mut(found) else {
                state.cursor = bit;
                return found;
            };
            if let Some(event) = report(state, bit, few) {
                *place = event;
                found += 1;
            }
        }
    }
    found
}

/// The event of one registration, if it has one now.
fn report(state: &mut State, bit: usize, few: bool) -> Option<epoll_event> {
    let slot = state.slot(bit)?;
    if slot.place != 2 || slot.disabled {
        state.unmark(bit);
        return None;
    }
    let events = slot.events;
    let held = conn::by_index(slot.conn)?;
    let fd = held.conn.fd.load(Relaxed);
    let stream = held.conn.stream()?;
    if demote::peer_has_left(stream) {
        // Following it changes this very registration: done without the lock, see `wait`.
        held.conn.look.store(1, Relaxed);
        return None;
    }
    let interest = (events as i16) & (ready::IN | ready::OUT | libc::POLLRDHUP | libc::POLLPRI);
    let mut seen = ready::of(&held, stream, fd, interest, false).unwrap_or(0);
    if seen == 0 && !few {
        // Whoever publishes from now on rings; look once more after that is said.
        state.unmark(bit);
        ready::ask(stream, interest, want::BELL);
        seen = ready::of(&held, stream, fd, interest, false).unwrap_or(0);
        if seen != 0 {
            state.mark(bit);
        }
    }
    let slot = state.slot(bit)?;
    if seen == 0 {
        return None;
    }
    if events & EPOLLET as u32 != 0 {
        let position = stream.incoming().producer.head.load(Acquire);
        let now = u64::from(stream.incoming().producer.mark.load(Relaxed))
            | u64::from(stream.rx().anchor.load(Relaxed)) << 8
            | u64::from(stream.rx().phase.load(Relaxed)) << 16
            | u64::from(stream.tx().phase.load(Relaxed)) << 24;
        let space = seen & ready::OUT != 0 && held.conn.wants_space.swap(0, AcqRel) != 0;
        let new_bytes = seen & ready::IN != 0 && position != slot.reported;
        let edge = slot.fresh || space || new_bytes || now != slot.state;
        slot.fresh = false;
        slot.reported = position;
        slot.state = now;
        if !few {
            state.unmark(bit);
            ready::ask(stream, interest, want::BELL);
            // What came since the position was read must ring, or be found now.
            if stream.incoming().producer.head.load(Acquire) != position {
                state.mark(bit);
            }
        }
        if !edge {
            return None;
        }
    }
    let slot = state.slot(bit)?;
    if events & EPOLLONESHOT as u32 != 0 {
        slot.disabled = true;
    }
    let data = slot.data;
    let bits = seen as u32 & (events | (EPOLLERR | EPOLLHUP) as u32);
    (bits != 0).then_some(epoll_event {
        events: bits & !(EPOLLET as u32),
        u64: data,
    })
}

/// Follows the peers that have left, which `report` may not do under the lock.
fn follow_leavers(epoll: &Epoll) {
    loop {
        let mut leaver = None;
        if let Some(guard) = take(epoll) {
            let state = guard.state();
            for bit in 0..state.high {
                if let Some(slot) = state.slot(bit)
                    && slot.place == 2
                    && let Some(held) = conn::by_index(slot.conn)
                    && held.conn.stream().is_some_and(demote::peer_has_left)
                {
                    leaver = Some((held, slot.fd));
                    break;
                }
            }
        }
        let Some((held, fd)) = leaver else { return };
        if let Some(stream) = held.conn.stream() {
            let guard = stream.lock_rx();
            if stream.rx().phase.load(Relaxed) == rdsock_shm::layout::phase::RING
                && !stream.has_bytes()
            {
                demote::incoming_ended(stream, &guard, fd);
            } else if stream.rx().phase.load(Relaxed) == rdsock_shm::layout::phase::SWITCHING {
                stream
                    .rx()
                    .phase
                    .store(rdsock_shm::layout::phase::DEMOTED, Release);
            }
            drop(guard);
            demote::follow(&held, stream, fd);
            if demote::peer_has_left(stream) {
                return;
            }
        }
    }
}

/// Asks the kernel, without waiting; how many events of its own.
fn ask_kernel(epoll: &Epoll, epfd: c_int, events: &mut [epoll_event]) -> usize {
    let got = sys::epoll_now(epfd, events);
    if got <= 0 {
        return 0;
    }
    let (kept, ours) = strip(events, got as usize);
    if ours {
        harvest(epoll);
    }
    kept
}

/// `epoll_pwait2` on an instance that holds streams.
pub fn wait(
    epoll: &'static Epoll,
    epfd: c_int,
    events: &mut [epoll_event],
    ns: Option<u64>,
    mask: *const sigset_t,
) -> c_int {
    let deadline = Deadline::after(ns);
    loop {
        let mut found = gather(epoll, epfd, events);
        if found == 0 && !deadline.is_now() {
            let count = std::cell::Cell::new(0);
            let cell = std::cell::RefCell::new(&mut *events);
            wait::spin(&epoll.score, || {
                let Ok(mut events) = cell.try_borrow_mut() else {
                    return true;
                };
                count.set(gather(epoll, epfd, &mut events));
                count.get() != 0
            });
            found = count.get();
        }
        if found == 0 && (deadline.is_now() || deadline.left() == Some(0)) {
            found = ask_kernel(epoll, epfd, events);
            if found == 0 {
                found = now(epoll, events);
            }
            return found as c_int;
        }
        if found != 0 {
            return found as c_int;
        }
        if let Some(result) = sleep(epoll, epfd, events, deadline, mask) {
            return result;
        }
    }
}

/// What the rings have, and now and then what the kernel has.
fn gather(epoll: &Epoll, epfd: c_int, events: &mut [epoll_event]) -> usize {
    let Some(guard) = take(epoll) else { return 0 };
    let mut found = collect(epoll, &guard, events);
    let now = clock::ticks();
    let due = now.wrapping_sub(guard.state().asked_at) > clock::ticks_of(ASK_KERNEL_US);
    if due {
        guard.state().asked_at = now;
    }
    drop(guard);
    if due {
        if let Some(rest) = events.get_mut(found..)
            && !rest.is_empty()
        {
            found += ask_kernel(epoll, epfd, rest);
        }
        follow_leavers(epoll);
        if found == 0
            && let Some(guard) = take(epoll)
        {
            found = collect(epoll, &guard, events);
        }
    }
    found
}

/// Sleeps in the kernel. `None`: look again.
fn sleep(
    epoll: &Epoll,
    epfd: c_int,
    events: &mut [epoll_event],
    deadline: Deadline,
    mask: *const sigset_t,
) -> Option<c_int> {
    epoll.sleepers.fetch_add(1, SeqCst);
    let result = sleep_counted(epoll, epfd, events, deadline, mask);
    epoll.sleepers.fetch_sub(1, SeqCst);
    result
}

fn sleep_counted(
    epoll: &Epoll,
    epfd: c_int,
    events: &mut [epoll_event],
    deadline: Deadline,
    mask: *const sigset_t,
) -> Option<c_int> {
    let guard = take(epoll)?;
    let state = guard.state();
    let bell = state.bell;
    if let Some((_, bell)) = bell {
        bell::start_sleep(&bell.sleepers);
    }
    let few = epoll.streams.load(Relaxed) as usize <= FEW;
    for bit in 0..state.high {
        let marked = state
            .look
            .get(bit / 64)
            .is_some_and(|word| word >> (bit % 64) & 1 == 1);
        if !few && !marked {
            continue;
        }
        let Some(slot) = state.slot(bit) else {
            continue;
        };
        if slot.place == 2
            && !slot.disabled
            && let Some(held) = conn::by_index(slot.conn)
            && let Some(stream) = held.conn.stream()
        {
            let by_bell = bell.is_some() && stream.incoming().bytes.place.load(Relaxed) != 0;
            let how = if by_bell { want::BELL } else { want::WAKE };
            ready::ask(stream, slot.events as i16, how);
        }
    }
    let found = collect(epoll, &guard, events);
    drop(guard);
    let result = if found != 0 {
        Some(found as c_int)
    } else if bell.is_some_and(|(_, bell)| bell::is_rung(bell)) {
        None
    } else {
        tenant::count(Counter::Sleeps);
        let got = kernel_wait(epfd, events, deadline, mask);
        if got < 0 {
            Some(got)
        } else {
            let (kept, ours) = strip(events, got as usize);
            if ours {
                harvest(epoll);
                follow_leavers(epoll);
            }
            let mut found = kept;
            if let Some(guard) = take(epoll)
                && let Some(rest) = events.get_mut(kept..)
                && !rest.is_empty()
            {
                found += collect(epoll, &guard, rest);
            }
            (found != 0 || (got == 0 && deadline.left() == Some(0))).then_some(found as c_int)
        }
    };
    if let Some((_, bell)) = bell {
        bell::end_sleep(&bell.sleepers);
    }
    result
}

/// The kernel's own wait: a cancellation point, ended by signals as ever.
fn kernel_wait(
    epfd: c_int,
    events: &mut [epoll_event],
    deadline: Deadline,
    mask: *const sigset_t,
) -> c_int {
    let most = events.len().min(c_int::MAX as usize) as c_int;
    let left: Option<timespec> = deadline.left_timespec();
    let limit = left
        .as_ref()
        .map_or(std::ptr::null(), |left| left as *const timespec);
    // SAFETY: the events are valid for `most` entries; the caller vouches for the mask.
    let got = unsafe { real::epoll_pwait2(epfd, events.as_mut_ptr(), most, limit, mask) };
    if got >= 0 || sys::errno() != libc::ENOSYS {
        return got;
    }
    // Before Linux 5.11: whole milliseconds, rounded up.
    let ms = deadline.left().map_or(-1, |ns| {
        ns.div_ceil(1_000_000).min(c_int::MAX as u64) as c_int
    });
    // SAFETY: as above.
    unsafe { real::epoll_pwait(epfd, events.as_mut_ptr(), most, ms, mask) }
}

/// What the instance has after its inner one has spoken, without waiting.
pub fn now(epoll: &Epoll, events: &mut [epoll_event]) -> usize {
    harvest(epoll);
    follow_leavers(epoll);
    take(epoll).map_or(0, |guard| collect(epoll, &guard, events))
}
