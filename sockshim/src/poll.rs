//! `poll`, `select` and their kin over any mix of fds.

use crate::conn::{self, Use};
use crate::{clock, demote, ready, real, sys, tenant, wait};
use libc::{
    POLLIN, POLLNVAL, POLLOUT, POLLPRI, POLLRDHUP, c_int, fd_set, nfds_t, pollfd, sigset_t,
    timespec,
};
use rdsock_shm::layout::{Counter, want};
use std::sync::atomic::{AtomicU32, Ordering::*};

/// Entries for which no memory must be mapped.
const FEW: usize = 64;
/// Bits that wait for the receiving half.
const RECEIVES: i16 = ready::IN | POLLRDHUP;
/// Microseconds between two questions to the kernel while the rings are watched.
const ASK_KERNEL_US: u64 = 10;

static SCORE: AtomicU32 = AtomicU32::new(wait::FULL_SCORE);

/// Time left until a deadline.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Option<u64>);

impl Deadline {
    /// From now; `None` waits for ever.
    pub fn after(nanoseconds: Option<u64>) -> Self {
        Deadline(nanoseconds.map(|ns| {
            if ns == 0 {
                0
            } else {
                clock::nanoseconds().saturating_add(ns)
            }
        }))
    }

    /// True when there was nothing to wait for to begin with.
    pub fn is_now(self) -> bool {
        self.0 == Some(0)
    }

    /// Nanoseconds left; `None` is for ever.
    pub fn left(self) -> Option<u64> {
        self.0.map(|at| {
            if at == 0 {
                0
            } else {
                at.saturating_sub(clock::nanoseconds())
            }
        })
    }

    /// As a `timespec`.
    pub fn left_timespec(self) -> Option<timespec> {
        self.left().map(|ns| timespec {
            tv_sec: (ns / 1_000_000_000) as i64,
            tv_nsec: (ns % 1_000_000_000) as i64,
        })
    }
}

/// Nanoseconds of a `timespec`; `None` for ever. `Err` for one that the kernel refuses.
///
/// # Safety
/// `limit` is null or valid.
pub unsafe fn nanoseconds_of(limit: *const timespec) -> Result<Option<u64>, ()> {
    if limit.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller vouches for it.
    let limit = unsafe { &*limit };
    if limit.tv_sec < 0 || !(0..1_000_000_000).contains(&limit.tv_nsec) {
        return Err(());
    }
    Ok(Some(
        (limit.tv_sec as u64)
            .saturating_mul(1_000_000_000)
            .saturating_add(limit.tv_nsec as u64),
    ))
}

fn on_rings(fd: c_int) -> Option<Use> {
    let held = conn::of(fd)?;
    held.conn
        .stream()
        .is_some_and(demote::is_on_rings)
        .then_some(held)
}

/// True when any of the fds is on rings, so that the kernel alone can't tell.
///
/// # Safety
/// `fds` points to `count` entries.
pub unsafe fn concerns(fds: *const pollfd, count: nfds_t) -> bool {
    let mut tracked = false;
    for i in 0..count as usize {
        // SAFETY: the caller vouches for `count` entries.
        let fd = unsafe { (*fds.add(i)).fd };
        if matches!(conn::kind(fd), conn::Kind::Conn(_)) {
            if !tracked {
                tenant::look();
                tracked = true;
            }
            if on_rings(fd).is_some() {
                return true;
            }
        }
    }
    false
}

/// Fills in the results of those on rings; how many entries have one.
fn look(fds: &mut [pollfd]) -> (usize, bool) {
    let (mut found, mut others) = (0, false);
    for entry in fds.iter_mut() {
        entry.revents = 0;
        if entry.fd < 0 {
            continue;
        }
        if let Some(held) = on_rings(entry.fd)
            && let Some(stream) = held.conn.stream()
            && let Some(ready) = ready::of(&held, stream, entry.fd, entry.events, true)
        {
            entry.revents = ready;
            found += usize::from(ready != 0);
        } else {
            others = true;
        }
    }
    (found, others)
}

/// Asks the kernel about all that are not on rings, without waiting. How many have a result.
fn look_at_kernel(fds: &mut [pollfd], copy: &mut [pollfd]) -> usize {
    for (to, from) in copy.iter_mut().zip(fds.iter()) {
        *to = pollfd {
            revents: 0,
            ..*from
        };
        if on_rings(from.fd).is_some() {
            to.fd = -1;
        }
    }
    let got = sys::poll_now(copy);
    if got <= 0 {
        return 0;
    }
    for (to, from) in fds.iter_mut().zip(copy.iter()) {
        if from.fd >= 0 {
            to.revents = from.revents;
        }
    }
    got as usize
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
    let mut few = [pollfd {
        fd: -1,
        events: 0,
        revents: 0,
    }; FEW];
    let size = count * std::mem::size_of::<pollfd>();
    let mapped = if count > FEW {
        sys::map(-1, size)
    } else {
        None
    };
    if count > FEW && mapped.is_none() {
        sys::set_errno(libc::ENOMEM);
        return -1;
    }
    // SAFETY: the caller vouches for `fds`; the mapping has room for `count` entries.
    let (fds, copy) = unsafe {
        (
            std::slice::from_raw_parts_mut(fds, count),
            match mapped {
                Some(at) => std::slice::from_raw_parts_mut(at.cast::<pollfd>(), count),
                None => few.get_mut(..count).unwrap_or(&mut []),
            },
        )
    };
    let result = wait_for(fds, copy, Deadline::after(ns), mask);
    if let Some(at) = mapped {
        // SAFETY: the copy is not used any more.
        unsafe { sys::unmap(at, size) };
    }
    result
}

fn wait_for(
    fds: &mut [pollfd],
    copy: &mut [pollfd],
    deadline: Deadline,
    mask: *const sigset_t,
) -> c_int {
    let mut asked_at = 0;
    loop {
        let mut found = 0;
        let spun = |fds: &mut [pollfd], copy: &mut [pollfd], asked_at: &mut u64| {
            let (rings, others) = look(fds);
            let now = clock::ticks();
            if others && now.wrapping_sub(*asked_at) > clock::ticks_of(ASK_KERNEL_US) {
                *asked_at = now;
                return rings + look_at_kernel(fds, copy);
            }
            rings
        };
        found += spun(fds, copy, &mut asked_at);
        if found == 0 && !deadline.is_now() {
            let cell = std::cell::Cell::new(0);
            let state = std::cell::RefCell::new((&mut *fds, &mut *copy, &mut asked_at));
            wait::spin(&SCORE, || {
                let Ok(mut state) = state.try_borrow_mut() else {
                    return true;
                };
                let (fds, copy, asked_at) = &mut *state;
                cell.set(spun(fds, copy, asked_at));
                cell.get() != 0
            });
            found = cell.get();
        }
        if found != 0 {
            return found as c_int;
        }
        if deadline.is_now() || deadline.left() == Some(0) {
            // The kernel's own fds once more, since they may not have been asked just now.
            return look_at_kernel(fds, copy) as c_int;
        }
        if let Some(result) = sleep(fds, copy, deadline, mask) {
            return result;
        }
    }
}

/// Sleeps in the kernel on all fds. `None`: look again.
fn sleep(
    fds: &mut [pollfd],
    copy: &mut [pollfd],
    deadline: Deadline,
    mask: *const sigset_t,
) -> Option<c_int> {
    for (to, from) in copy.iter_mut().zip(fds.iter()) {
        *to = pollfd {
            revents: 0,
            ..*from
        };
        if let Some(held) = on_rings(from.fd)
            && let Some(stream) = held.conn.stream()
        {
            // Left again below, whatever happens: the sleepers are told apart by their fds.
            let sleeper = wait::Sleeper::enter(
                stream,
                from.events & RECEIVES != 0,
                from.events & ready::OUT != 0,
            );
            let guard = stream.lock_rx();
            if stream.rx().phase.load(Relaxed) == rdsock_shm::layout::phase::RING {
                sleeper.clear(&guard, from.fd);
            }
            drop(guard);
            std::mem::forget(sleeper);
            ready::ask(stream, from.events, want::WAKE);
            let kernel_out = stream.tx().phase.load(Relaxed) != rdsock_shm::layout::phase::RING;
            to.events = POLLIN
                | (from.events & (POLLRDHUP | POLLPRI))
                | if kernel_out { from.events & POLLOUT } else { 0 };
            if from.events & (ready::IN | ready::OUT | POLLRDHUP) == 0 {
                to.events = 0;
            }
        }
    }
    let (found, _) = look(fds);
    let result = if found != 0 {
        Some(found as c_int)
    } else {
        tenant::count(Counter::Sleeps);
        let left = deadline.left_timespec();
        let limit = left
            .as_ref()
            .map_or(std::ptr::null(), |left| left as *const timespec);
        // SAFETY: the copy is valid; the caller of the whole vouches for the mask.
        let got = unsafe { real::ppoll(copy.as_mut_ptr(), copy.len() as nfds_t, limit, mask) };
        for (entry, seen) in fds.iter_mut().zip(copy.iter()) {
            entry.revents = 0;
            match on_rings(entry.fd) {
                Some(held) if seen.revents != 0 => held.conn.look.store(1, Relaxed),
                _ => {}
            }
        }
        if got < 0 { Some(got) } else { None }
    };
    for entry in fds.iter() {
        if let Some(held) = on_rings(entry.fd)
            && let Some(stream) = held.conn.stream()
        {
            ready::unask(stream);
            wait::Sleeper::leave(
                stream,
                entry.events & RECEIVES != 0,
                entry.events & ready::OUT != 0,
            );
        }
    }
    if result.is_some() {
        return result;
    }
    // Merge what the kernel says of its own with what the rings say now.
    let (rings, _) = look(fds);
    let mut found = rings;
    for (entry, seen) in fds.iter_mut().zip(copy.iter()) {
        if on_rings(entry.fd).is_none() && seen.revents != 0 {
            entry.revents =
                seen.revents & (entry.events | libc::POLLERR | libc::POLLHUP | POLLNVAL);
            found += usize::from(entry.revents != 0);
        }
    }
    (found != 0).then_some(found as c_int)
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

    /// True when any of the fds is on rings.
    pub fn concern(&self) -> bool {
        let mut tracked = false;
        (0..self.count).any(|fd| {
            (0..3).any(|which| self.has(which, fd))
                && matches!(conn::kind(fd as c_int), conn::Kind::Conn(_))
                && {
                    if !tracked {
                        tenant::look();
                        tracked = true;
                    }
                    on_rings(fd as c_int).is_some()
                }
        })
    }

    /// `pselect` when some fd is on rings: made of `ppoll`, as in the kernel.
    pub fn select(&self, ns: Option<u64>, mask: *const sigset_t) -> c_int {
        let mut few = [pollfd {
            fd: -1,
            events: 0,
            revents: 0,
        }; FEW];
        let wanted = (0..self.count)
            .filter(|fd| (0..3).any(|which| self.has(which, *fd)))
            .count();
        let size = wanted * std::mem::size_of::<pollfd>();
        let mapped = if wanted > FEW {
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
            sys::set_errno(libc::EBADF);
            result = -1;
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
