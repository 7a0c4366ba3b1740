//! When a connection is announced to the daemon: when it has shown that it lasts.

use super::attach::{attach, is_disabled};
use super::lock::Guard;
use super::memory::make_memory;
use super::messages::look;
use super::offer::follow;
use super::requests::{blank, put};
use crate::conn::{Conn, born, phase};
use crate::sys;
use libc::c_int;
use rdsock_shm::control::{Request, request};
use rdsock_shm::reason::{Reason, State};
use std::sync::atomic::Ordering::*;

/// Calls on a connection before it is announced.
const CALLS_TO_ANNOUNCE: u32 = 4;
/// Bytes in one call that show as well that a connection is worth it.
const BYTES_TO_ANNOUNCE: usize = 32 * 1024;

/// After a kernel call on a connection: announces it when it has shown that it lasts, and follows
/// an offer that waits.
#[inline]
pub fn after_call(index: usize, conn: &'static Conn, fd: c_int, bytes: isize) {
    if bytes <= 0 {
        return;
    }
    let step = if bytes >= BYTES_TO_ANNOUNCE as isize {
        CALLS_TO_ANNOUNCE
    } else {
        1
    };
    let calls = conn.calls.load(Relaxed) + step;
    conn.calls.store(calls, Relaxed);
    match conn.phase.load(Relaxed) {
        phase::KERNEL if calls >= CALLS_TO_ANNOUNCE => announce(index, conn, fd),
        phase::ANNOUNCED => {
            look();
            if conn.offered.load(Relaxed) != 0
                && let Some(guard) = Guard::take()
            {
                // SAFETY: the lock is held.
                if let Some(offer) = unsafe { conn.take_offer() } {
                    follow(&guard, offer);
                }
            }
        }
        _ => {}
    }
}

#[cold]
fn announce(index: usize, conn: &'static Conn, fd: c_int) {
    if is_disabled() {
        conn.keep_on_kernel(index, Reason::Disabled);
        return;
    }
    // Tried again with growing distance.
    if !conn.calls.load(Relaxed).is_power_of_two()
        && !conn.calls.load(Relaxed).is_multiple_of(1024)
        && conn.reason.load(Relaxed) != Reason::Young as u32
    {
        return;
    }
    let (Some(local), Some(peer)) = (sys::name_of(fd, false), sys::name_of(fd, true)) else {
        return;
    };
    let (Some((local, local_port)), Some((peer, peer_port))) = (ip_of(&local), ip_of(&peer)) else {
        conn.keep_on_kernel(index, Reason::Call);
        return;
    };
    const SO_NETNS_COOKIE: c_int = 71;
    let Some(cookie) = sys::getsockopt(fd, libc::SOL_SOCKET, libc::SO_COOKIE) else {
        return;
    };
    let netns = sys::getsockopt(fd, libc::SOL_SOCKET, SO_NETNS_COOKIE).unwrap_or(0);
    let Some(guard) = Guard::take() else { return };
    make_memory();
    attach(&guard);
    if conn
        .phase
        .compare_exchange(phase::KERNEL, phase::ANNOUNCED, AcqRel, Relaxed)
        .is_err()
    {
        return;
    }
    conn.generation.fetch_add(1, Relaxed);
    conn.cookie.store(cookie, Relaxed);
    let request = Request {
        fd,
        cookie,
        netns,
        local,
        peer,
        local_port,
        peer_port,
        active: conn.born.load(Relaxed).min(born::UNKNOWN),
        extra: conn.shared.load(Relaxed),
        ..blank(request::ANNOUNCE, index, conn)
    };
    if put(&guard, &request) {
        conn.tell(index, State::Announced, Reason::PeerUnknown);
    } else {
        conn.phase.store(phase::KERNEL, Release);
        conn.tell(index, State::Kernel, Reason::NoDaemon);
    }
}

/// Address (IPv4 as v4-mapped) and port of a name; `None` for another family.
fn ip_of(name: &libc::sockaddr_storage) -> Option<([u8; 16], u32)> {
    let at = name as *const libc::sockaddr_storage;
    match name.ss_family as c_int {
        libc::AF_INET => {
            // SAFETY: the storage holds an address of this family.
            let v4 = unsafe { &*at.cast::<libc::sockaddr_in>() };
            let [a, b, c, d] = v4.sin_addr.s_addr.to_ne_bytes();
            Some((
                [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d],
                u16::from_be(v4.sin_port).into(),
            ))
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let v6 = unsafe { &*at.cast::<libc::sockaddr_in6>() };
            Some((v6.sin6_addr.s6_addr, u16::from_be(v6.sin6_port).into()))
        }
        _ => None,
    }
}
