//! Waiting for an instance: by looking, then asleep in the kernel on the program's own fd.

use super::news::{is_marked, leave};
use super::report::{
    Look, ask_again, ask_kernel, collect, follow_leavers, harvest, merge, must_move, strip,
};
use super::*;
use crate::deadline::Deadline;
use crate::ready;
use crate::signals::Mask;
use libc::{sigset_t, timespec};
use rdsock_shm::bell;
use rdsock_shm::layout::{Counter, want};

/// `epoll_wait` and its kin; `kernel` is the kernel's own call. It returns a negated error number, as this does.
///
/// # Safety
/// `events` has room for `most`, or is bad in a way that the kernel refuses; `mask` is null or
/// valid.
pub unsafe fn wait_on(
    epfd: c_int,
    events: *mut epoll_event,
    most: c_int,
    ns: Option<u64>,
    mask: *const sigset_t,
    kernel: impl Fn() -> c_int,
) -> c_int {
    let Kind::Epoll(index) = conn::kind(epfd) else {
        return kernel();
    };
    let Some(epoll) = at(index) else {
        return kernel();
    };
    if most <= 0 || sys::is_bad_pointer(events.cast()) {
        return kernel();
    }
    tenant::look();
    // SAFETY: as the caller says.
    let events = unsafe { std::slice::from_raw_parts_mut(events, most as usize) };
    // Behind what is owed to others: a handler may never return.
    let mut mask = Mask::new(mask);
    let found = wait_as_asked(epoll, epfd, events, Deadline::after(ns), &mut mask, kernel);
    leave(epoll);
    found
}

fn wait_as_asked(
    epoll: &'static Epoll,
    epfd: c_int,
    events: &mut [epoll_event],
    deadline: Deadline,
    mask: &mut Mask,
    kernel: impl Fn() -> c_int,
) -> c_int {
    tenant::stay_attached();
    epoll.sleepers.fetch_add(1, SeqCst);
    if epoll.streams.load(SeqCst) != 0 || tenant::greeting().is_some() {
        count_out(epoll);
        let mut wait = Wait {
            epoll,
            epfd,
            events,
            mask,
        };
        return wait::for_any(&mut wait, deadline, false);
    }
    // A stream may come while this sleeps: then its sign is among the events.
    let got = kernel();
    count_out(epoll);
    if got <= 0 {
        return got;
    }
    let (kept, ours) = strip(epoll, events, got as usize);
    if !ours && kept != 0 {
        return kept as c_int;
    }
    let found = now(epoll, epfd, events, kept);
    if found != 0 {
        return found as c_int;
    }
    let mut wait = Wait {
        epoll,
        epfd,
        events,
        mask,
    };
    wait::for_any(&mut wait, deadline, true)
}

/// A thread that sleeps no more. It may have slept on the one that had this place before.
fn count_out(epoll: &Epoll) {
    let less = |count: u32| count.checked_sub(1);
    let _ = epoll.sleepers.fetch_update(SeqCst, SeqCst, less);
}

/// What the instance has after its inner one has spoken, without waiting, behind what the kernel gave.
fn now(epoll: &Epoll, epfd: c_int, events: &mut [epoll_event], kept: usize) -> usize {
    harvest(epoll);
    take(epoll).map_or(kept, |guard| of_rings(epoll, epfd, guard, events, kept))
}

/// A call that waits on an instance that holds streams.
struct Wait<'a> {
    epoll: &'static Epoll,
    epfd: c_int,
    events: &'a mut [epoll_event],
    mask: &'a mut Mask,
}

impl wait::Many for Wait<'_> {
    fn score(&self) -> Option<&'static AtomicU32> {
        Some(&self.epoll.score)
    }

    fn first_look(&mut self, deadline: Deadline) -> usize {
        gather(self.epoll, self.epfd, self.events, !deadline.is_now())
    }

    fn look(&mut self) -> usize {
        gather(self.epoll, self.epfd, self.events, false)
    }

    fn hold(&mut self) {
        self.mask.hold();
    }

    /// The kernel's fds, with the program's signal mask, and the rings once more.
    fn last_look(&mut self) -> c_int {
        let Wait {
            epoll,
            epfd,
            events,
            mask,
        } = self;
        follow_leavers(epoll);
        let mut found = 0;
        if !mask.is_given() {
            found = ask_kernel(epoll, *epfd, events).0;
        } else {
            let got = kernel_wait(*epfd, events, Deadline::after(Some(0)), mask);
            if got < 0 {
                return got;
            }
            found += strip(epoll, events, got as usize).0;
        }
        if found == 0 {
            found = now(epoll, *epfd, events, 0);
        }
        found as c_int
    }

    fn sleep(&mut self, deadline: Deadline) -> Option<c_int> {
        sleep(self.epoll, self.epfd, self.events, deadline, self.mask)
    }
}

/// What the rings have, and now and then what the kernel has. Where the rings have filled the room, the kernel comes first next time.
/// Where they have nothing, and a sleep may follow (`may_sleep`), that asks the kernel.
fn gather(epoll: &Epoll, epfd: c_int, events: &mut [epoll_event], may_sleep: bool) -> usize {
    let Some(guard) = take(epoll) else { return 0 };
    let state = guard.state();
    let now = clock::ticks();
    let is_due = now.wrapping_sub(state.asked_at) > clock::ticks_of(limits::ASK_KERNEL_US.get());
    if is_due && std::mem::take(&mut state.rings_had_all) {
        state.asked_at = now;
        drop(guard);
        // First: what has left is the kernel's to tell.
        follow_leavers(epoll);
        let (found, _) = ask_kernel(epoll, epfd, events);
        return take(epoll).map_or(found, |guard| of_rings(epoll, epfd, guard, events, found));
    }
    let found = of_rings(epoll, epfd, guard, events, 0);
    if !is_due || found == 0 && may_sleep {
        return found;
    }
    if let Some(guard) = take(epoll) {
        let state = guard.state();
        (state.asked_at, state.rings_had_all) = (now, found == events.len());
    }
    let (found, has_edges) = ask_again(epoll, epfd, events, found);
    if !has_edges {
        return found;
    }
    // What an edge has marked may have left.
    let all = take(epoll).map_or(found, |guard| of_rings(epoll, epfd, guard, events, found));
    merge(events, found, all)
}

/// What the rings have now, behind the first `found` events: how many there are then.
fn collect_more(epoll: &Epoll, events: &mut [epoll_event], found: usize) -> usize {
    take(epoll).map_or(found, |guard| {
        let all = collect(epoll, &guard, events, found, Look::to_take(epoll, false));
        merge(events, found, all)
    })
}

/// What the rings have, behind the first `kept` events, which the kernel gave. What turns out to have left is followed, and told of in
/// the same call: by the kernel, or by the ring that it has not read to the end. So is what an edge has marked that was taken on the way.
fn of_rings(
    epoll: &Epoll,
    epfd: c_int,
    guard: Guard<'_>,
    events: &mut [epoll_event],
    kept: usize,
) -> usize {
    let look = Look::to_take(epoll, false);
    let mut found = collect(epoll, &guard, events, kept, look);
    let state = guard.state();
    let has_leaver = std::mem::take(&mut state.has_leaver);
    let has_more = has_leaver | std::mem::take(&mut state.has_edges);
    drop(guard);
    if has_leaver && follow_leavers(epoll) {
        (found, _) = ask_again(epoll, epfd, events, found);
    }
    if has_more {
        found = collect_more(epoll, events, found);
    }
    found
}

/// Sleeps in the kernel. `None`: look again.
fn sleep(
    epoll: &Epoll,
    epfd: c_int,
    events: &mut [epoll_event],
    deadline: Deadline,
    mask: &Mask,
) -> Option<c_int> {
    epoll.sleepers.fetch_add(1, SeqCst);
    let bell = take(epoll).and_then(|guard| guard.state().bell);
    if let Some((_, bell)) = bell {
        bell::start_sleep(&bell.sleepers);
    }
    let result = sleep_counted(epoll, epfd, events, deadline, mask, bell.map(|bell| bell.1));
    if let Some((_, bell)) = bell {
        bell::end_sleep(&bell.sleepers);
    }
    count_out(epoll);
    result
}

fn sleep_counted(
    epoll: &Epoll,
    epfd: c_int,
    events: &mut [epoll_event],
    deadline: Deadline,
    mask: &Mask,
    bell: Option<&Bell>,
) -> Option<c_int> {
    if let Some(guard) = take(epoll) {
        let found = collect(epoll, &guard, events, 0, Look::to_take(epoll, true));
        if found != 0 {
            return Some(found as c_int);
        }
        let state = guard.state();
        let has_leaver = std::mem::take(&mut state.has_leaver);
        if has_leaver || is_marked(epoll, bell) || state.any(epoll.is_few(), must_move) {
            drop(guard);
            follow_leavers(epoll);
            return None;
        }
    }
    tenant::count(Counter::Sleeps);
    let got = match tenant::greeting() {
        Some(greeting) => wait_also_for(greeting, epfd, events, deadline, mask),
        None => kernel_wait(epfd, events, deadline, mask),
    };
    if got < 0 {
        return Some(got);
    }
    let (kept, ours) = strip(epoll, events, got as usize);
    if ours {
        harvest(epoll);
    }
    let found = take(epoll).map_or(kept, |guard| of_rings(epoll, epfd, guard, events, kept));
    (found != 0 || (got == 0 && deadline.left() == Some(0))).then_some(found as c_int)
}

/// Asks every stream of an instance for a byte, for somebody who sleeps on the instance's fd, or on one that it is in. All are
/// marked: a peer that takes an earlier ask just now rings a bell that wakes nobody.
pub(super) fn ask_all(epoll: &Epoll) {
    if let Some(guard) = take(epoll) {
        guard.state().any(true, |state, bit| {
            state.mark(bit);
            ask(state, bit);
            false
        });
    }
}

/// Asks what stands behind a registration for a byte.
fn ask(state: &mut State, bit: usize) {
    let Some(slot) = state.slot(bit).copied() else {
        return;
    };
    if !slot.is_armed() {
        return;
    }
    match slot.target {
        Kind::Conn(index) => {
            if let Some(held) = conn::by_index(index)
                && let Some(stream) = held.conn.stream()
            {
                let end = stream.at(&held, slot.number);
                ready::ask(&end, slot.events as i16, want::WAKE);
            }
        }
        Kind::Epoll(index) => {
            if let Some(inner) = at(index) {
                ask_all(inner);
            }
        }
        _ => {}
    }
}

/// Somebody is about to sleep on the instance's fd in `poll`: counts them in and asks the streams.
pub fn arm(epoll: &Epoll) {
    epoll.sleepers.fetch_add(1, SeqCst);
    ask_all(epoll);
}

/// Ends what [`arm`] began.
pub fn disarm(index: usize) {
    if let Some(epoll) = at(index) {
        count_out(epoll);
    }
}

/// The kernel's own wait, which the daemon's `greeting` ends, too.
fn wait_also_for(
    greeting: c_int,
    epfd: c_int,
    events: &mut [epoll_event],
    deadline: Deadline,
    mask: &Mask,
) -> c_int {
    let left: Option<timespec> = deadline.left_timespec();
    let limit = left
        .as_ref()
        .map_or(std::ptr::null(), |left| left as *const timespec);
    let mut fds = [epfd, greeting].map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    // SAFETY: two valid entries; the caller vouches for the mask.
    let got = unsafe { (sys::host().ppoll)(fds.as_mut_ptr(), 2, limit, mask.for_sleep()) };
    if got < 0 {
        return got;
    }
    if fds[1].revents != 0 {
        tenant::take_greeting();
    }
    kernel_wait(epfd, events, Deadline::after(Some(0)), mask)
}

/// The kernel's own wait: a cancellation point, ended by signals as ever.
fn kernel_wait(epfd: c_int, events: &mut [epoll_event], deadline: Deadline, mask: &Mask) -> c_int {
    let most = events.len().min(c_int::MAX as usize) as c_int;
    let left: Option<timespec> = deadline.left_timespec();
    let limit = left
        .as_ref()
        .map_or(std::ptr::null(), |left| left as *const timespec);
    // SAFETY: the events are valid for `most` entries; the caller vouches for the mask.
    let got = unsafe {
        (sys::host().epoll_pwait2)(epfd, events.as_mut_ptr(), most, limit, mask.for_sleep())
    };
    if got >= 0 || !sys::is_missing(got) {
        return got;
    }
    // Before Linux 5.11, or behind a filter that does not know it: whole milliseconds, rounded up.
    let ms = deadline.left().map_or(-1, |ns| {
        ns.div_ceil(1_000_000).min(c_int::MAX as u64) as c_int
    });
    // SAFETY: as above.
    unsafe { (sys::host().epoll_pwait)(epfd, events.as_mut_ptr(), most, ms, mask.for_sleep()) }
}
