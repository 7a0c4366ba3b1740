//! Waiting while what the other end has left in the ring goes out on the anchor (`rdsock_shm::end`, phase LEAVING): a blocking
//! send waits for room behind that, and a blocking receive that is the kernel's sends it on meanwhile, since nobody else may.
//! A call that must not wait does not wait here.

use crate::conn::Use;
use crate::deadline::Deadline;
use crate::end::End;
use crate::signals::{Ended, Held, Interrupted};
use crate::{sys, tenant, wait};
use libc::{POLLIN, POLLOUT, POLLRDHUP, c_int};
use rdsock_shm::end::Anchor;
use rdsock_shm::layout::Counter;
use rdsock_shm::reason::Reason;
use std::sync::atomic::{AtomicU32, Ordering::*};

const AGAIN: isize = -(libc::EAGAIN as isize);

/// A send has found no room behind the rest: waits for some, where it may. `Err`: to be reported, unless some bytes were sent
/// (`partial`).
#[cold]
pub fn for_room(end: &End<'_>, held: &Use, flags: c_int, partial: bool) -> Result<(), isize> {
    if flags & libc::MSG_DONTWAIT != 0 || end.shared.page().nonblock.load(Relaxed) != 0 {
        // The anchor has refused, so that room which comes is an edge.
        held.conn.note_refused();
        return Err(AGAIN);
    }
    let shut = &end.shared.tx().shut;
    let limit = Deadline::after(wait::limit_of(end.socket.wait_fd(), libc::SO_SNDTIMEO));
    sleep(end, held, POLLOUT, shut, limit, hold(limit, partial)).map(drop)
}

/// A receive is about to be the kernel's, which sends nothing: sends the rest as room comes, until there are bytes or it is out.
#[cold]
pub fn for_bytes(end: &End<'_>, held: &Use, waits: bool) -> Result<(), isize> {
    let fd = end.socket.wait_fd();
    let limit = Deadline::after(wait::limit_of(fd, libc::SO_RCVTIMEO));
    let mut signals = None;
    loop {
        end.send_rest();
        end.finished(Reason::PeerDemoted);
        let may_wait = waits && end.shared.page().nonblock.load(Relaxed) == 0;
        if !may_wait || !end.shared.has_rest() || sys::poll_one(fd, POLLIN | POLLRDHUP, 0) != 0 {
            return Ok(());
        }
        let shut = &end.shared.rx().shut;
        let held_back = signals.take().unwrap_or_else(|| hold(limit, false));
        let events = POLLIN | POLLRDHUP | POLLOUT;
        signals = Some(sleep(end, held, events, shut, limit, held_back)?);
    }
}

/// Signals from now on, as they end such a call.
fn hold(limit: Deadline, partial: bool) -> Held {
    Held::hold(if partial || limit.left().is_some() {
        Ended::ByAny
    } else {
        Ended::ByInterrupting
    })
}

/// Sleeps until the anchor has what `events` names, or the program has `shut` the direction. A signal ends it as it ends the
/// kernel's own wait.
fn sleep(
    end: &End<'_>,
    held: &Use,
    events: i16,
    shut: &AtomicU32,
    deadline: Deadline,
    mut signals: Held,
) -> Result<Held, isize> {
    let (fd, stream) = (end.socket.wait_fd(), end.shared);
    tenant::stay_attached();
    tenant::count(Counter::Sleeps);
    let slice = wait::slice(held);
    loop {
        let ns = [deadline.left(), slice].into_iter().flatten().min();
        signals = match signals.wait(fd, events, ns) {
            Ok((signals, _)) => signals,
            Err(Interrupted) => return Err(-(libc::EINTR as isize)),
        };
        if !wait::is_still(held, fd) {
            return Err(-(libc::EBADF as isize));
        }
        let is_over = shut.load(Acquire) != 0 || !stream.has_rest();
        if is_over || sys::poll_one(fd, events, 0) != 0 {
            return Ok(signals);
        }
        if deadline.left() == Some(0) {
            return Err(AGAIN);
        }
    }
}
