//! Waiting while what the other end has left in the ring goes out on the anchor (`rdsock_shm::end`, phase LEAVING): a blocking
//! send waits for room behind that, and a blocking receive that is the kernel's sends it on meanwhile, since nobody else may.
//! A call that must not wait does not wait here.

use crate::conn::{self, Use};
use crate::end::End;
use crate::poll::Deadline;
use crate::{limits, real, signals, sys, tenant, wait};
use libc::{POLLIN, POLLOUT, POLLRDHUP, c_int};
use rdsock_shm::end::Anchor;
use rdsock_shm::layout::Counter;
use rdsock_shm::reason::Reason;
use std::sync::atomic::{AtomicU32, Ordering::*};

const AGAIN: isize = -(libc::EAGAIN as isize);

/// A send has found no room behind the rest: waits for some, where it may. `Err`: to be reported, unless some bytes were sent.
#[cold]
pub fn for_room(end: &End<'_>, held: &Use, flags: c_int) -> Result<(), isize> {
    if flags & libc::MSG_DONTWAIT != 0 || end.shared.page().nonblock.load(Relaxed) != 0 {
        // The anchor has refused, so that room which comes is an edge.
        held.conn.note_refused();
        return Err(AGAIN);
    }
    let shut = &end.shared.tx().shut;
    sleep(end, held, POLLOUT, shut, limit(end, libc::SO_SNDTIMEO))
}

/// A receive is about to be the kernel's, which sends nothing: sends the rest as room comes, until there are bytes or it is out.
#[cold]
pub fn for_bytes(end: &End<'_>, held: &Use, waits: bool) -> Result<(), isize> {
    let fd = end.socket.wait_fd();
    let limit = limit(end, libc::SO_RCVTIMEO);
    loop {
        end.send_rest();
        end.finished(Reason::PeerDemoted);
        let may_wait = waits && end.shared.page().nonblock.load(Relaxed) == 0;
        if !may_wait || !end.shared.has_rest() || sys::poll_one(fd, POLLIN | POLLRDHUP, 0) != 0 {
            return Ok(());
        }
        let shut = &end.shared.rx().shut;
        sleep(end, held, POLLIN | POLLRDHUP | POLLOUT, shut, limit)?;
    }
}

/// How long the program lets such a call wait.
fn limit(end: &End<'_>, name: c_int) -> Deadline {
    let value: Option<libc::timeval> =
        sys::getsockopt(end.socket.wait_fd(), libc::SOL_SOCKET, name);
    let us = value.map_or(0, |value| value.tv_sec * 1_000_000 + value.tv_usec);
    Deadline::after((us > 0).then_some(us as u64 * 1000))
}

/// Sleeps until the anchor has what `events` names, or the program has `shut` the direction. A signal ends it as it ends the
/// kernel's own wait.
fn sleep(
    end: &End<'_>,
    held: &Use,
    events: i16,
    shut: &AtomicU32,
    deadline: Deadline,
) -> Result<(), isize> {
    let (fd, stream) = (end.socket.wait_fd(), end.shared);
    tenant::stay_attached();
    tenant::count(Counter::Sleeps);
    // What another thread or process does, its shutdown say, leaves no trace on the anchor.
    let alone = conn::is_single_threaded() && held.conn.shared.load(Relaxed) == 0;
    let slice = (!alone).then_some(limits::SLICE_MS.get());
    loop {
        let left = deadline.left().map(|ns| ns.div_ceil(1_000_000));
        let ms = match (left, slice) {
            (Some(left), Some(slice)) => Some(left.min(slice)),
            (left, slice) => left.or(slice),
        };
        // SAFETY: no pollfd. A cancellation point where nothing is held yet.
        unsafe { real::poll(std::ptr::null_mut(), 0, 0) };
        let signals = signals::Held::hold();
        signals.wait(fd, events, ms.map(|ms| ms.min(i64::MAX as u64) as i64));
        if signals.release() {
            return Err(-(libc::EINTR as isize));
        }
        if !wait::is_still(held, fd) {
            return Err(-(libc::EBADF as isize));
        }
        let is_over = shut.load(Acquire) != 0 || !stream.has_rest();
        if is_over || sys::poll_one(fd, events, 0) != 0 {
            return Ok(());
        }
        if deadline.left() == Some(0) {
            return Err(AGAIN);
        }
    }
}
