//! Which sockets this process listens on: told to the daemon, so that connections from other nodes
//! can be given to it.

use super::attach::{attach, hang_up, is_as_attached, is_disabled, note_hang_up};
use super::link::link;
use super::lock::Guard;
use super::memory::make_memory;
use super::pauses::RETRY_MS;
use super::requests::{blank, put};
use crate::address::Address;
use crate::conn::{self, Conn, Use};
use crate::{clock, sys};
use rdsock_shm::control::{Request, request};
use std::sync::atomic::Ordering::*;

/// In [`Conn::listens`]: the daemon is to know of it.
const LISTENS: u32 = 1;
/// Likewise: connections from other nodes do not come to it.
const NOT_FOR_OTHERS: u32 = 2;

/// The kernel alone lets connections in there, by an option of the socket's (a signature, a filter): the daemon makes none, from now on.
pub fn listens_for_kernel(held: &Use) {
    let before = held.conn.listens.swap(NOT_FOR_OTHERS, Relaxed);
    if before == LISTENS {
        hang_up();
    }
}

/// Does the kernel alone let connections in there? It does to them what it does to the socket.
pub fn is_for_kernel(held: &Use) -> bool {
    held.conn.listens.load(Relaxed) == NOT_FOR_OTHERS
}

/// The program listens on a socket, or is about to accept from it: the daemon is told once, and
/// again after it was started anew.
pub fn listens(held: &Use) {
    let conn = held.conn;
    match conn.listens.load(Relaxed) {
        0 => {
            conn.epoch.store(0, Relaxed);
            conn.listens.store(LISTENS, Relaxed);
        }
        NOT_FOR_OTHERS => return,
        _ => {}
    }
    let is_told = conn.epoch.load(Relaxed) == link().epoch.load(Relaxed);
    let (now, looked_at) = (
        clock::nanoseconds(),
        link().looked_for_listeners_at.load(Relaxed),
    );
    if (is_told || link().control.load(Relaxed) < 0)
        && looked_at != 0
        && now.wrapping_sub(looked_at) < RETRY_MS * 1_000_000
    {
        return;
    }
    link().looked_for_listeners_at.store(now, Relaxed);
    make_known(held.index, conn);
}

#[cold]
fn make_known(index: usize, conn: &Conn) {
    if is_disabled() {
        return;
    }
    let Some(guard) = Guard::take() else { return };
    make_memory();
    note_hang_up(&guard);
    attach(&guard);
    tell(&guard, index, conn);
}

/// Tells a daemon that this process has just attached to.
pub(super) fn tell_all(guard: &Guard) {
    conn::each(|index, conn| {
        if conn.listens.load(Relaxed) == LISTENS {
            tell(guard, index, conn);
        }
    });
}

/// Does the daemon know of something that this process listens on?
pub(super) fn is_any_told() -> bool {
    let mut is_told = false;
    conn::each(|_, conn| is_told |= conn.listens.load(Relaxed) == LISTENS);
    is_told
}

fn tell(guard: &Guard, index: usize, conn: &Conn) {
    let epoch = link().epoch.load(Relaxed);
    let is_known = conn.epoch.load(Relaxed) == epoch;
    if is_known || link().control.load(Relaxed) < 0 || !is_as_attached() || is_disabled() {
        return;
    }
    let fd = conn.fd.load(Relaxed);
    let (Some(local), Some(cookie)) = (
        sys::name_of(fd, false).and_then(|name| Address::of(&name)),
        sys::cookie(fd),
    ) else {
        return;
    };
    let request = Request {
        conn: 0,
        generation: 0,
        cookie,
        netns: sys::network_namespace(fd),
        local: local.ip,
        local_port: local.port.into(),
        ..blank(request::LISTENS, index, conn)
    };
    if put(guard, &request) {
        conn.epoch.store(epoch, Relaxed);
    }
}

/// After fork, in the child: it says that it listens once it accepts, which it may never do.
pub(super) fn after_fork_in_child() {
    conn::each(|_, conn| {
        let _ = conn.listens.compare_exchange(LISTENS, 0, Relaxed, Relaxed);
    });
}
