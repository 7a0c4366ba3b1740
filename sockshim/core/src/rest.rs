//! Waiting while what the other end has left in the ring goes out on the anchor (`rdsock_shm::end`, phase LEAVING): a blocking
//! send waits for room behind that, and a blocking receive that is the kernel's sends it on meanwhile, since nobody else may.
//! A call that must not wait does not wait here.

use crate::conn::Use;
use crate::end::End;
use crate::sys;
use crate::wait::{self, For, Waits};
use libc::{POLLIN, POLLRDHUP, c_int};
use rdsock_shm::end::Anchor;
use rdsock_shm::reason::Reason;
use std::sync::atomic::Ordering::*;

const AGAIN: isize = -(libc::EAGAIN as isize);

/// A send has found no room behind the rest: waits for some, where it may. `Err`: to be reported, unless some bytes were sent
/// (`partial`).
#[cold]
pub fn for_room(
    end: &End<'_>,
    held: &Use,
    waits: &mut Waits,
    flags: c_int,
    partial: bool,
) -> Result<(), isize> {
    if flags & libc::MSG_DONTWAIT != 0 || end.shared.page().nonblock.load(Relaxed) != 0 {
        // The anchor has refused, so that room which comes is an edge.
        held.conn.note_refused();
        return Err(AGAIN);
    }
    wait::for_rest(end, held, waits, For::Space, partial)
}

/// A receive is about to be the kernel's, which sends nothing: sends the rest as room comes, until there are bytes or it is out.
#[cold]
pub fn for_bytes(end: &End<'_>, held: &Use, may_wait: bool) -> Result<(), isize> {
    let fd = end.socket.wait_fd();
    let mut waits = Waits::new();
    loop {
        end.send_rest();
        end.finished(Reason::PeerDemoted);
        let may_wait = may_wait && end.shared.page().nonblock.load(Relaxed) == 0;
        if !may_wait || !end.shared.has_rest() || sys::poll_one(fd, POLLIN | POLLRDHUP, 0) != 0 {
            return Ok(());
        }
        wait::for_rest(end, held, &mut waits, For::Bytes, false)?;
    }
}
