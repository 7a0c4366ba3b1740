//! `poll`, `select` and their kin over any mix of fds.

use crate::conn::{self, Kind, Use};
use crate::deadline::Deadline;
use crate::end::End;
use crate::signals::Mask;
use crate::{clock, demote, epoll, io, limits, ready, sys, tenant, wait};
use libc::{
    POLLIN, POLLNVAL, POLLOUT, POLLPRI, POLLRDHUP, c_int, fd_set, nfds_t, pollfd, sigset_t,
    timespec,
};
use rdsock_shm::end::Shared;
use rdsock_shm::layout::{Counter, mark, phase, want};
use std::sync::atomic::{AtomicU32, Ordering::*};

/// Entries for which no memory must be mapped: the most that [`limits::ON_STACK`] can be.
const FEW: usize = 64;
/// An entry for no descriptor.
const NOBODY: pollfd = pollfd {
    fd: -1,
    events: 0,
    revents: 0,
};
/// Nanoseconds of sleep at a time where the anchor can't be slept on.
const STEP_NS: u64 = 1_000_000;

static SCORE: AtomicU32 = AtomicU32::new(conn::FULL_SCORE);

fn on_rings(fd: c_int) -> Option<Use> {
    let held = conn::of(fd)?;
    held.conn
        .stream()
        .is_some_and(demote::is_on_rings)
        .then_some(held)
}

/// True when the kernel alone can't tell what an fd has: it is on rings, or an epoll instance that
/// has held streams.
fn is_ours(fd: c_int) -> bool {
    match conn::kind(fd) {
        Kind::Conn(_) => on_rings(fd).is_some(),
        Kind::Epoll(_) => epoll::with_inner(fd).is_some(),
        _ => false,
    }
}

fn for_input(fd: c_int) -> pollfd {
    pollfd {
        fd,
        events: POLLIN,
        revents: 0,
    }
}

/// True when a sleep on the kernel's own fds is to end with the daemon's greeting, too.
fn is_greeting_awaited() -> bool {
    tenant::stay_attached();
    tenant::greeting().is_some()
}

/// True when any of the fds is on rings, so that the kernel alone can't tell; or an epoll instance, to which a stream may come
/// while the caller sleeps; or while the daemon's greeting is awaited.
///
/// # Safety
/// `fds` points to `count` entries.
pub unsafe fn concerns(fds: *const pollfd, count: nfds_t) -> bool {
    let mut is_tracked = false;
    for i in 0..count as usize {
        // SAFETY: the caller vouches for `count` entries.
        let fd = unsafe { (*fds.add(i)).fd };
        if matches!(conn::kind(fd), Kind::Conn(_) | Kind::Epoll(_)) {
            if !is_tracked {
                tenant::look();
                is_tracked = true;
            }
            if is_ours(fd) || epoll::followed(fd).is_some() {
                return true;
            }
        }
    }
    is_tracked && is_greeting_awaited()
}

/// Fills in the results of those on rings; how many entries have one, and whether there are others.
/// `counted`: the caller is counted in as a sleeper, so it must not wait for those to look; where
/// the other end has left, that counts as a result.
fn look(fds: &mut [pollfd], counted: bool) -> (usize, bool) {
    let (mut found, mut others) = (0, false);
    for entry in fds.iter_mut() {
        entry.revents = 0;
        if entry.fd < 0 {
            continue;
        }
        if let Some(held) = on_rings(entry.fd)
            && let Some(stream) = held.conn.stream()
            && let Some(ready) = ready::of(&held, stream, entry.fd, entry.events, !counted)
        {
            entry.revents = ready;
            let changes = epoll::has_left(stream) || !stream.is_on_rings();
            found += usize::from(ready != 0 || counted && changes);
        } else if let Some(epoll) = epoll::with_inner(entry.fd) {
            if entry.events & ready::IN != 0 {
                match epoll::has_event_after_leavers(epoll, entry.fd, !counted) {
                    Some(false) => {}
                    Some(true) => {
                        entry.revents = entry.events & ready::IN;
                        found += 1;
                    }
                    None => found += 1,
                }
            }
        } else {
            others = true;
        }
    }
    (found, others)
}

/// A call's memory.
struct Work<'a> {
    fds: &'a mut [pollfd],
    /// What the kernel is asked, and behind that what ends a sleep besides.
    copy: &'a mut [pollfd],
    /// What was counted in for each before sleep.
    entered: &'a mut [Entered],
    asked_at: u64,
    /// Something is on rings, so that spinning may pay.
    spins: bool,
    mask: Mask,
}

/// What stands behind an entry of a call that sleeps. Kept from going away meanwhile.
#[derive(Clone, Copy, Debug)]
enum Entered {
    /// The kernel's.
    Nothing,
    /// The number of a connection, in use, and whether the caller is counted in at its stream.
    Conn(u32, bool),
    /// The number of an epoll instance.
    Epoll(u32),
}

/// `ppoll` when some fd is on rings.
///
/// # Safety
/// `fds` points to `count` entries; `mask` is null or valid.
pub unsafe fn ppoll(
    fds: *mut pollfd,
    count: usize,
    ns: Option<u64>,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: the caller vouches for `count` entries.
    let ours = (0..count).any(|i| is_ours(unsafe { (*fds.add(i)).fd }));
    if !ours && let Some(0) = ns {
        let now = timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: arguments pass through.
        return unsafe { (sys::host().ppoll)(fds, count, &now, mask) };
    }
    let mut few = [NOBODY; FEW + 1];
    let mut few_entered = [Entered::Nothing; FEW];
    let size = (count + 1) * std::mem::size_of::<pollfd>();
    let all = size + count * std::mem::size_of::<Entered>();
    let mapped = if count > limits::ON_STACK.get() as usize {
        sys::map(-1, all)
    } else {
        None
    };
    if count > limits::ON_STACK.get() as usize && mapped.is_none() {
        return -libc::ENOMEM;
    }
    // SAFETY: the caller vouches for `fds`; the mapping has room for `count` entries of each kind, and one more of the first.
    // Zeroes are one of either.
    let (fds, copy, entered) = unsafe {
        let fds = std::slice::from_raw_parts_mut(fds, count);
        match mapped {
            Some(at) => {
                let entered = at.add(size).cast::<Entered>();
                (0..count).for_each(|i| entered.add(i).write(Entered::Nothing));
                (
                    fds,
                    std::slice::from_raw_parts_mut(at.cast::<pollfd>(), count + 1),
                    std::slice::from_raw_parts_mut(entered, count),
                )
            }
            None => (
                fds,
                few.get_mut(..count + 1).unwrap_or(&mut []),
                few_entered.get_mut(..count).unwrap_or(&mut []),
            ),
        }
    };
    if let Some(further) = copy.last_mut() {
        *further = NOBODY;
    }
    let mut work = Work {
        fds,
        copy,
        entered,
        asked_at: 0,
        spins: ours,
        mask: Mask::new(mask),
    };
    let result = wait::for_any(&mut work, Deadline::after(ns), false);
    if let Some(at) = mapped {
        // SAFETY: the copy is not used any more.
        unsafe { sys::unmap(at, all) };
    }
    result
}

impl wait::Many for Work<'_> {
    fn score(&self) -> Option<&'static AtomicU32> {
        self.spins.then_some(&SCORE)
    }

    /// What the rings have, and now and then what the kernel has.
    fn look(&mut self) -> usize {
        let (mut rings, mut others) = look(self.fds, false);
        if rings != 0 && self.ask_anchors() {
            let before = others;
            (rings, others) = look(self.fds, false);
            if others && !before {
                // The first look has brought one back to the kernel, which was not asked for it yet.
                self.asked_at = 0;
            }
        }
        let now = clock::ticks();
        if others && now.wrapping_sub(self.asked_at) > clock::ticks_of(limits::ASK_KERNEL_US.get())
        {
            self.asked_at = now;
            self.ask();
            let got = sys::poll_now(self.copy);
            return rings + self.merge(got);
        }
        rings
    }

    /// The kernel's own fds and the anchors once more, since they may not have been asked just now, with
    /// the program's signal mask.
    fn last_look(&mut self) -> c_int {
        let rings = if self.ask_anchors() {
            look(self.fds, false).0
        } else {
            0
        };
        self.ask();
        let got = if !self.mask.is_given() || rings != 0 {
            sys::poll_now(self.copy)
        } else {
            let (copy, now) = (&mut *self.copy, Deadline::after(Some(0)).left_timespec());
            let limit = now.as_ref().map_or(std::ptr::null(), |now| now as *const _);
            // SAFETY: the copy is valid; the caller of the whole vouches for the mask.
            let got = unsafe {
                (sys::host().ppoll)(copy.as_mut_ptr(), copy.len(), limit, self.mask.for_sleep())
            };
            if got < 0 {
                return got;
            }
            got as isize
        };
        (rings + self.merge(got)) as c_int
    }

    fn hold(&mut self) {
        self.mask.hold();
    }

    /// Sleeps in the kernel on all fds. `None`: look again.
    fn sleep(&mut self, deadline: Deadline) -> Option<c_int> {
        let Some(in_steps) = self.enter() else {
            self.leave();
            wait::give_way();
            return None;
        };
        let mut result = None;
        let greeting = tenant::greeting();
        if in_steps {
            self.mask.hold();
        }
        let awake = look(self.fds, true).0 != 0;
        if !awake {
            tenant::count(Counter::Sleeps);
            let step = timespec {
                tv_sec: 0,
                tv_nsec: STEP_NS as i64,
            };
            let left = match deadline.left() {
                Some(left) if !in_steps || left < STEP_NS => deadline.left_timespec(),
                _ => in_steps.then_some(step),
            };
            let limit = left
                .as_ref()
                .map_or(std::ptr::null(), |left| left as *const timespec);
            let copy = &mut *self.copy;
            if let Some(further) = copy.last_mut() {
                *further = greeting.map_or(NOBODY, for_input);
            }
            // SAFETY: the copy is valid; the caller of the whole vouches for the mask.
            let got = unsafe {
                (sys::host().ppoll)(copy.as_mut_ptr(), copy.len(), limit, self.mask.for_sleep())
            };
            if let Some(further) = copy.last_mut()
                && std::mem::replace(further, NOBODY).revents != 0
            {
                tenant::take_greeting();
            }
            result = (got < 0).then_some(got);
        }
        self.leave();
        if awake || result.is_some() {
            return result;
        }
        // Merge what the kernel says of its own with what the rings say now.
        let (mut found, _) = look(self.fds, false);
        for ((entry, seen), entered) in self
            .fds
            .iter_mut()
            .zip(self.copy.iter())
            .zip(self.entered.iter())
        {
            if matches!(entered, Entered::Nothing) && entry.revents == 0 && seen.fd >= 0 {
                entry.revents =
                    seen.revents & (entry.events | libc::POLLERR | libc::POLLHUP | POLLNVAL);
                found += usize::from(entry.revents != 0);
            }
        }
        (found != 0).then_some(found as c_int)
    }
}

impl Work<'_> {
    /// True when one of the anchors has something to say that was not looked at: a peer that was killed, or of whose last close
    /// nobody has told, says nothing else. They are asked by one call, where a look is due, of those that have nothing or room
    /// alone for a program that waits for input as well.
    fn ask_anchors(&mut self) -> bool {
        let mut due = false;
        for (to, from) in self.copy.iter_mut().zip(self.fds.iter()) {
            let may_end = from.revents & !ready::OUT == 0
                && (from.revents == 0 || from.events & (ready::IN | POLLRDHUP) != 0);
            let is_due = may_end && on_rings(from.fd).is_some_and(|held| io::look_is_due(&held));
            due |= is_due;
            *to = pollfd {
                fd: if is_due { from.fd } else { -1 },
                events: POLLIN | POLLRDHUP,
                revents: 0,
            };
        }
        if !due || sys::poll_now(self.copy) <= 0 {
            return false;
        }
        for seen in self.copy.iter().filter(|seen| seen.revents != 0) {
            if let Some(held) = on_rings(seen.fd) {
                held.conn.look.store(1, Relaxed);
            }
        }
        true
    }

    /// Prepares to ask the kernel about all that are not on rings.
    fn ask(&mut self) {
        for (to, from) in self.copy.iter_mut().zip(self.fds.iter()) {
            *to = pollfd {
                fd: if is_ours(from.fd) { -1 } else { from.fd },
                events: from.events,
                revents: 0,
            };
        }
    }

    /// Takes over what the kernel has said; how many have a result.
    fn merge(&mut self, got: isize) -> usize {
        if got <= 0 {
            return 0;
        }
        for (to, from) in self.fds.iter_mut().zip(self.copy.iter()) {
            if from.fd >= 0 {
                to.revents = from.revents;
            }
        }
        got as usize
    }

    /// Counts the caller in at every stream, and prepares what the kernel is asked. True when it
    /// must not be asked for long; `None` when others must look first.
    fn enter(&mut self) -> Option<bool> {
        let mut in_steps = false;
        self.entered.fill(Entered::Nothing);
        for ((to, from), entered) in self
            .copy
            .iter_mut()
            .zip(self.fds.iter())
            .zip(self.entered.iter_mut())
        {
            *to = pollfd {
                revents: 0,
                ..*from
            };
            if let Some(held) = on_rings(from.fd) {
                let Some(stream) = held.conn.stream() else {
                    continue;
                };
                let needs = ready::needs(stream, from.events);
                let waits = needs.bytes || from.events & ready::OUT != 0;
                (to.events, in_steps) = if waits {
                    let (events, steps) = enter_stream(&stream.at(&held, from.fd), from)?;
                    (events, in_steps | steps)
                } else {
                    (from.events & POLLPRI | room_for_rest(stream), in_steps)
                };
                *entered = Entered::Conn(held.index as u32, waits);
                // In use until it is left.
                std::mem::forget(held);
            } else if let Kind::Epoll(index) = conn::kind(from.fd)
                && let Some(epoll) = epoll::followed(from.fd)
            {
                *entered = Entered::Epoll(index as u32);
                epoll::arm(epoll);
            }
        }
        Some(in_steps)
    }

    /// Counts the caller out, exactly where it was counted in.
    fn leave(&mut self) {
        for (entered, seen) in self.entered.iter().zip(self.copy.iter()) {
            match *entered {
                Entered::Nothing => {}
                Entered::Epoll(index) => epoll::disarm(index as usize),
                Entered::Conn(index, counted) => {
                    let index = index as usize;
                    let Some(conn) = conn::at(index) else {
                        continue;
                    };
                    // The use that was kept.
                    let held = Use { conn, index };
                    let Some(stream) = held.conn.stream() else {
                        continue;
                    };
                    if ready::needs_look(&stream.at(&held, seen.fd), seen.revents) {
                        held.conn.look.store(1, Relaxed);
                    }
                    if counted {
                        drop(wait::Sleeper::remembered(stream, wait::own_name()));
                    }
                }
            }
        }
    }
}

/// Counts a sleeper in at a stream and asks it for a sign. What the kernel is asked about its
/// anchor, and true when that would not wait; `None` when others must look first.
fn enter_stream(end: &End<'_>, entry: &pollfd) -> Option<(i16, bool)> {
    let stream = end.shared;
    end.settle_switch();
    // Left again in `leave`, whatever happens.
    std::mem::forget(wait::Sleeper::enter(end)?);
    let receives = stream.rx().phase.load(Relaxed);
    ready::ask(end, entry.events, want::WAKE);
    let sends = stream.tx().phase.load(Relaxed);
    let mut events = entry.events & (POLLRDHUP | POLLPRI);
    if sends != phase::RING {
        events |= entry.events & ready::OUT;
    }
    // Bytes that stand on the anchor, and that the caller does not wait for, would end the sleep
    // at once.
    let goes_on = stream.marks() & mark::END != 0;
    let full = entry.events & ready::IN == 0
        && (receives != phase::RING || goes_on)
        && sys::poll_one(entry.fd, POLLIN, 0) > 0;
    if !full {
        // The end of the anchor, which is input as well, is told from tokens so.
        events |= POLLIN | POLLRDHUP;
    }
    Some((events | room_for_rest(stream), full))
}

/// What the anchor is asked for whatever the program waits for: room, where bytes are to go out that the other end has left.
fn room_for_rest(stream: &Shared) -> i16 {
    if stream.has_rest() { POLLOUT } else { 0 }
}

/// The sets of a `select` call.
#[derive(Clone, Copy, Debug)]
pub struct Sets {
    /// fds below this are looked at.
    pub count: usize,
    /// Readable, writable, exceptional.
    pub sets: [*mut fd_set; 3],
}

impl Sets {
    fn has(&self, which: usize, fd: usize) -> bool {
        let set = self.sets[which];
        // SAFETY: the program's set covers `count` bits.
        !set.is_null() && unsafe { *set.cast::<u64>().add(fd / 64) } >> (fd % 64) & 1 == 1
    }

    fn put(&self, which: usize, fd: usize, on: bool) {
        let set = self.sets[which];
        if !set.is_null() {
            // SAFETY: as above.
            let word = unsafe { &mut *set.cast::<u64>().add(fd / 64) };
            *word = *word & !(1 << (fd % 64)) | u64::from(on) << (fd % 64);
        }
    }

    /// As [`concerns`].
    pub fn concern(&self) -> bool {
        let mut is_tracked = false;
        let is_ours = (0..self.count).any(|fd| {
            (0..3).any(|which| self.has(which, fd))
                && matches!(conn::kind(fd as c_int), Kind::Conn(_) | Kind::Epoll(_))
                && {
                    if !is_tracked {
                        tenant::look();
                        is_tracked = true;
                    }
                    is_ours(fd as c_int) || epoll::followed(fd as c_int).is_some()
                }
        });
        is_ours || is_tracked && is_greeting_awaited()
    }

    /// `pselect` when some fd is on rings: made of `ppoll`, as in the kernel.
    ///
    /// # Safety
    /// `mask` is null or valid.
    pub unsafe fn select(&self, ns: Option<u64>, mask: *const sigset_t) -> c_int {
        let mut few = [NOBODY; FEW];
        let wanted = (0..self.count)
            .filter(|fd| (0..3).any(|which| self.has(which, *fd)))
            .count();
        let size = wanted * std::mem::size_of::<pollfd>();
        let mapped = if wanted > limits::ON_STACK.get() as usize {
            sys::map(-1, size)
        } else {
            None
        };
        let fds = match mapped {
            // SAFETY: the mapping has room for them.
            Some(at) => unsafe { std::slice::from_raw_parts_mut(at.cast::<pollfd>(), wanted) },
            None => few.get_mut(..wanted).unwrap_or(&mut []),
        };
        let mut entries = fds.iter_mut();
        for fd in 0..self.count {
            let mut events = 0;
            for (which, bits) in [POLLIN, POLLOUT, POLLPRI].into_iter().enumerate() {
                if self.has(which, fd) {
                    events |= bits;
                }
            }
            if events != 0
                && let Some(entry) = entries.next()
            {
                *entry = pollfd {
                    fd: fd as c_int,
                    events,
                    revents: 0,
                };
            }
        }
        // SAFETY: the entries are valid; the caller vouches for the mask.
        let mut result = unsafe { ppoll(fds.as_mut_ptr(), fds.len(), ns, mask) };
        if result >= 0 && fds.iter().any(|entry| entry.revents & POLLNVAL != 0) {
            result = -libc::EBADF;
        }
        if result >= 0 {
            result = 0;
            for entry in fds.iter() {
                let seen = [
                    POLLIN | libc::POLLHUP | libc::POLLERR,
                    POLLOUT | libc::POLLERR,
                    POLLPRI,
                ];
                for (which, bits) in seen.into_iter().enumerate() {
                    let on = self.has(which, entry.fd as usize) && entry.revents & bits != 0;
                    self.put(which, entry.fd as usize, on);
                    result += c_int::from(on);
                }
            }
        }
        if let Some(at) = mapped {
            // SAFETY: the entries are not used any more.
            unsafe { sys::unmap(at, size) };
        }
        result
    }
}
