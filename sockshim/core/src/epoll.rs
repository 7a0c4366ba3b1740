//! epoll over any mix of fds.
//!
//! The program's epoll instance stays the kernel's, with the program's own data in it, for every
//! fd that is not on rings. Streams are taken out of it and put into an *inner* instance, which
//! stands in the program's one with a secret as its data: so the kernel goes on to wake whoever
//! sleeps, the program's data is never touched, and no registration is ever confused with ours.
//! Which streams have something is told by the instance's bell ([`rdsock_shm::bell`]).
//!
//! An instance that is registered in another one moves to that one's inner instance as soon as it
//! has an inner one of its own, and is asked there as a stream is.
//!
//! Locks: the tenant's, then an instance's, then that of an instance nested in it, then a stream's
//! half, or the links of the registrations.

mod fdinfo;
mod links;
mod moves;
mod news;
mod register;
mod report;
mod sleep;
mod slots;

pub use moves::{close_copies, declines, demoted, forget, mapped, renumber};
pub use news::changed;
pub use register::ctl;
pub use report::{has_event_after_leavers, has_left};
pub use sleep::{arm, disarm, wait_on};

use crate::conn::{self, Kind, Pieces};
use crate::registration::{Place, Registration};
use crate::{clock, limits, stream, sys, tenant, wait};
use libc::{EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLLET, EPOLLIN, c_int, epoll_event};
use links::{each, link, list_of, unlink};
use rdsock_shm::layout::Bell;
use rdsock_shm::lock::{self, Owner, Taken};
use slots::{Slots, Table};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::*};

/// Epoll instances that are mapped at a time.
const EACH: usize = 64;
/// Epoll instances at once, which a reference to a registration has 16 bits for.
const INSTANCES: usize = (1 << 16) - EACH;
/// Data of the kicker in the inner instance.
const KICKED: u64 = u64::MAX;

/// Data of the inner instance's own registration.
static SECRET: AtomicU64 = AtomicU64::new(0);
static POOL: Pieces<Epoll, { INSTANCES / EACH }> = Pieces::new();
/// 1 when instances are looked after: not with RDSOCK_DISABLE.
static STARTED: AtomicU32 = AtomicU32::new(0);
/// Taken while the lists of registrations are read or changed.
static LINK: AtomicU64 = AtomicU64::new(0);

/// The program's registration of a connection, or of another instance, and where it leads.
#[derive(Clone, Copy, Debug)]
struct Slot {
    registration: Registration,
    /// The number that the program registered.
    fd: c_int,
    /// The number by which the kernel knows it, another one when `fd` was closed and a duplicate
    /// lives; -1 when no number leads to it any more.
    number: c_int,
    target: Kind,
    /// The inner instance watches for space on the anchor.
    watches_space: bool,
}

impl std::ops::Deref for Slot {
    type Target = Registration;

    fn deref(&self) -> &Registration {
        &self.registration
    }
}

impl std::ops::DerefMut for Slot {
    fn deref_mut(&mut self) -> &mut Registration {
        &mut self.registration
    }
}

/// One epoll instance of the program.
#[derive(Debug)]
pub struct Epoll {
    lock: AtomicU64,
    /// Its place among all.
    number: AtomicU32,
    /// Entries of the fd table, plus 1 while it is being set up.
    refs: AtomicU32,
    /// The process that made it. Another one shares the kernel's side of it, by fork.
    pid: AtomicU32,
    fd: AtomicI32,
    inner: AtomicI32,
    /// An eventfd in the inner instance, to wake whoever sleeps on it from this process.
    kicker: AtomicI32,
    /// Threads of this process that sleep on it.
    sleepers: AtomicU32,
    /// Registrations in the inner instance.
    streams: AtomicU32,
    /// Registrations of which a thread may be on its way with an event from the program's instance.
    moved: AtomicU32,
    /// [`MAPPED`] when the kernel's events were last compared with it.
    mapped: AtomicU32,
    score: AtomicU32,
    /// First of its own registrations in other instances.
    registrations: AtomicU32,
    /// Its registrations.
    table: Table,
    /// How often marks or edges were taken: news for an instance that has this one, with EPOLLET.
    news: AtomicU64,
    state: UnsafeCell<State>,
}

/// What the lock protects.
#[derive(Debug)]
struct State {
    slots: Slots,
    cursor: usize,
    bell: Option<(usize, &'static Bell)>,
    asked_at: u64,
    /// What the rings had to tell filled the room, when the kernel was to be asked last.
    rings_had_all: bool,
    /// A look has come to a stream that has left, or whose other end has.
    has_leaver: bool,
    /// A look at one stream has taken edges, which have marked others.
    has_edges: bool,
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
    fn slot(&mut self, bit: usize) -> Option<&mut Slot> {
        self.slots.slot(bit)
    }

    fn mark(&mut self, bit: usize) {
        self.mark_if(bit, true);
    }

    fn unmark(&mut self, bit: usize) {
        self.mark_if(bit, false);
    }

    fn mark_if(&mut self, bit: usize, marked: bool) {
        self.slots.set_look(bit, marked);
    }

    /// The bits of a word that are looked at.
    fn candidates(&mut self, word: usize, few: bool) -> u64 {
        let (inner, marked) = self.slots.word(word);
        if few { inner } else { marked }
    }

    /// Calls `found` with each bit that is looked at, until it says true.
    fn any(&mut self, few: bool, mut found: impl FnMut(&mut Self, usize) -> bool) -> bool {
        for word in 0..self.slots.words() {
            let mut bits = self.candidates(word, few);
            while bits != 0 {
                let bit = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                if found(self, bit) {
                    return true;
                }
            }
        }
        false
    }
}

impl Epoll {
    /// True in a process that has it by fork: what it does to the kernel's side of it would be
    /// done to the other process, too.
    fn is_inherited(&self) -> bool {
        self.pid.load(Relaxed) != stream::pid()
    }

    /// Nobody is on the way back with an event of this registration any more.
    fn arrived(&self, slot: &mut Slot) {
        if slot.registration.arrived() {
            self.moved.fetch_sub(1, SeqCst);
        }
    }

    /// True once it has held a stream.
    fn has_inner(&self) -> bool {
        self.inner.load(Acquire) >= 0
    }

    fn is_few(&self) -> bool {
        u64::from(self.streams.load(Relaxed)) <= limits::FEW.get()
    }
}

fn reference(instance: usize, bit: usize) -> u32 {
    ((instance as u32) << 16 | bit as u32) + 1
}

fn of_reference(reference: u32) -> Option<(&'static Epoll, usize, usize)> {
    let value = reference.checked_sub(1)?;
    let instance = (value >> 16) as usize;
    Some((at(instance)?, instance, (value & 0xffff) as usize))
}

/// Begins to look after instances, and makes the secret.
pub fn start() {
    STARTED.store(1, Relaxed);
    // Not an address, not a small number: nothing that a program has as its data.
    let noise = clock::ticks()
        ^ (u64::from(stream::pid()) << 32)
        ^ (&raw const POOL as u64).rotate_left(17);
    SECRET.store(
        noise.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 0x8080_0000_0000_0001,
        Relaxed,
    );
}

fn at(index: usize) -> Option<&'static Epoll> {
    // Zeroes are a valid state of one.
    POOL.get(index, EACH)
}

/// All that there ever were, with their numbers.
fn all() -> impl Iterator<Item = (usize, &'static Epoll)> {
    (0..INSTANCES).map_while(|index| Some((index, at(index)?)))
}

/// A place for an instance, taken. More are mapped where none is free.
fn take_free() -> Option<(usize, &'static Epoll)> {
    loop {
        let mut there = 0;
        for (index, epoll) in all() {
            there = index + 1;
            let is_free = epoll.refs.load(Relaxed) == 0;
            if is_free && epoll.refs.compare_exchange(0, 1, AcqRel, Relaxed).is_ok() {
                return Some((index, epoll));
            }
        }
        POOL.make(there, EACH)?;
    }
}

/// Makes one of the program's new epoll instance. Where there is no memory to follow it, it is the kernel's.
pub fn make(fd: c_int) -> Kind {
    let taken = (STARTED.load(Relaxed) != 0).then(take_free);
    let Some((index, epoll)) = taken.flatten() else {
        return Kind::Other;
    };
    epoll.lock.store(0, Relaxed);
    epoll.number.store(index as u32, Relaxed);
    epoll.pid.store(stream::pid(), Relaxed);
    epoll.fd.store(fd, Relaxed);
    epoll.inner.store(-1, Relaxed);
    epoll.kicker.store(-1, Relaxed);
    for count in [
        &epoll.sleepers,
        &epoll.streams,
        &epoll.moved,
        &epoll.registrations,
    ] {
        count.store(0, Relaxed);
    }
    epoll.score.store(conn::FULL_SCORE, Relaxed);
    // SAFETY: the instance is new, nobody else uses its state.
    unsafe {
        epoll.state.get().write(State {
            slots: Slots::new(&epoll.table),
            cursor: 0,
            bell: None,
            asked_at: 0,
            rings_had_all: false,
            has_leaver: false,
            has_edges: false,
        });
    }
    Kind::Epoll(index)
}

/// Another fd for the same instance, to be put into the table. False where there is no such instance.
pub fn add_ref(index: usize) -> bool {
    let epoll = at(index);
    if let Some(epoll) = epoll {
        epoll.refs.fetch_add(1, AcqRel);
    }
    epoll.is_some()
}

/// An fd of an instance is closed.
pub fn closed(fd: c_int, index: usize) {
    let Some(epoll) = at(index) else { return };
    let more = |refs: u32| (refs > 1).then(|| refs - 1);
    if epoll.refs.fetch_update(AcqRel, Acquire, more).is_ok() {
        if epoll.fd.load(Relaxed) == fd
            && let Some(other) = conn::fd_of(Kind::Epoll(index), fd)
        {
            epoll.fd.store(other, Relaxed);
        }
        return;
    }
    each(&epoll.registrations, |outer, _, bit| {
        if let Some(guard) = take(outer) {
            register::remove(outer, guard.state(), bit, Kind::Epoll(index));
        }
    });
    if let Some(guard) = take(epoll) {
        let state = guard.state();
        for bit in 0..state.slots.high {
            if let Some(slot) = state.slot(bit) {
                let target = slot.target;
                register::remove(epoll, state, bit, target);
            }
        }
        if let Some((number, _)) = state.bell.take()
            && epoll.sleepers.load(SeqCst) == 0
        {
            tenant::return_bell(number);
        }
        state.slots.clear();
        for place in [&epoll.inner, &epoll.kicker] {
            let fd = place.swap(-1, AcqRel);
            if fd >= 0 {
                tenant::close_hidden(fd);
            }
        }
        epoll.streams.store(0, Relaxed);
        epoll.moved.store(0, Relaxed);
    }
    epoll.refs.store(0, Release);
}

/// Streams that are being mapped, whose registrations may not all have moved.
static MAPPING: AtomicU32 = AtomicU32::new(0);
/// Streams that were.
static MAPPED: AtomicU32 = AtomicU32::new(0);

/// A stream is about to be mapped. [`mapped`] follows.
pub fn begin_mapping() {
    MAPPING.fetch_add(1, SeqCst);
}

/// What stands in the program's instance for the inner one.
fn inner_in_program() -> epoll_event {
    epoll_event {
        events: EPOLLIN as u32,
        u64: SECRET.load(Relaxed),
    }
}

/// What stands in the inner instance for the kicker.
fn kicker_in_inner() -> epoll_event {
    epoll_event {
        events: (EPOLLIN | EPOLLET) as u32,
        u64: KICKED,
    }
}

/// The shim's own descriptor `old` is now `new`; both are open.
pub fn moved_inner(old: c_int, new: c_int) {
    for (_, epoll) in all() {
        if epoll.refs.load(Relaxed) == 0 {
            continue;
        }
        // The kernel has it under its number: register the new one before the old goes.
        let is = |place: &AtomicI32| place.compare_exchange(old, new, AcqRel, Relaxed).is_ok();
        let (set, event) = if is(&epoll.inner) {
            (epoll.fd.load(Relaxed), inner_in_program())
        } else if is(&epoll.kicker) {
            (epoll.inner.load(Relaxed), kicker_in_inner())
        } else {
            moves::moved_copy(epoll, old, new);
            continue;
        };
        sys::epoll_ctl(set, EPOLL_CTL_ADD, new, Some(&event));
        if !epoll.is_inherited() {
            sys::epoll_ctl(set, EPOLL_CTL_DEL, old, None);
        }
    }
}

/// Frees every lock in a forked child, which has one thread only. The bells are its parent's.
pub fn after_fork_in_child() {
    LINK.store(0, Relaxed);
    MAPPING.store(0, Relaxed);
    for (_, epoll) in all() {
        if epoll.refs.load(Relaxed) != 0 {
            epoll.lock.store(0, Relaxed);
            epoll.sleepers.store(0, Relaxed);
            // SAFETY: no other thread lives here.
            unsafe { (*epoll.state.get()).bell = None };
        }
    }
}

fn me() -> Owner {
    Owner::new(stream::pid(), sys::thread_pointer())
}

/// Takes a lock of this process. `Nested` for a signal handler that interrupted its holder.
fn take_word(word: &AtomicU64) -> Taken {
    let mut turns = 0_u32;
    loop {
        if let Ok(taken) = lock::try_take(word, me()) {
            return taken;
        }
        turns = turns.wrapping_add(1);
        if turns.is_multiple_of(64) {
            sys::sched_yield();
        }
        std::hint::spin_loop();
    }
}

fn take(epoll: &Epoll) -> Option<Guard<'_>> {
    (take_word(&epoll.lock) == Taken::Outer).then_some(Guard(epoll))
}

/// The instance behind an fd, if the shim follows it.
pub fn followed(epfd: c_int) -> Option<&'static Epoll> {
    match conn::kind(epfd) {
        Kind::Epoll(index) => at(index),
        _ => None,
    }
}

/// The instance behind an fd, if it has an inner one: what it has, the kernel alone can't tell. Also where no stream is left, since
/// what rests in the inner one makes edges that are nobody's.
pub fn with_inner(epfd: c_int) -> Option<&'static Epoll> {
    let Kind::Epoll(index) = conn::kind(epfd) else {
        return None;
    };
    tenant::look();
    at(index).filter(|epoll| epoll.has_inner())
}
