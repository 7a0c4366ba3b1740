//! When a connection is announced to the daemon: when it has shown that it lasts.

use super::attach::{attach, is_as_attached, is_disabled, note_hang_up};
use super::link::link;
use super::lock::Guard;
use super::memory::make_memory;
use super::messages::look;
use super::offer::follow;
use super::requests::{blank, keep_on_kernel, put};
use crate::address::Address;
use crate::conn::{Conn, born, phase};
use crate::fds::STDERR;
use crate::hidden::are_few;
use crate::{limits, sys};
use libc::c_int;
use rdsock_shm::control::{Request, request};
use rdsock_shm::reason::{Reason, State};
use std::sync::atomic::Ordering::*;

/// After a kernel call on a connection: announces it when it has shown that it lasts, and follows
/// an offer that waits.
#[inline]
pub fn after_call(index: usize, conn: &'static Conn, fd: c_int, bytes: isize) {
    if bytes <= 0 {
        return;
    }
    let enough = limits::CALLS.get() as u32;
    let step = if bytes as u64 >= limits::BYTES.get() {
        enough
    } else {
        1
    };
    let calls = conn.calls.load(Relaxed) + step;
    conn.calls.store(calls, Relaxed);
    match conn.phase.load(Relaxed) {
        phase::KERNEL if calls >= enough => announce(index, conn, fd),
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

/// Announces a connection to another node, which the daemon carries already: at once, or with the
/// next call on it where it is not established yet.
pub fn announce_now(index: usize, conn: &'static Conn, fd: c_int) {
    conn.calls.store(limits::CALLS.get() as u32, Relaxed);
    if conn.phase.load(Relaxed) == phase::KERNEL {
        announce(index, conn, fd);
    }
}

#[cold]
fn announce(index: usize, conn: &'static Conn, fd: c_int) {
    if is_disabled() {
        keep_on_kernel(index, conn, link().why_disabled());
        return;
    }
    if fd <= STDERR || are_few() {
        let reason = if fd <= STDERR {
            Reason::Stdio
        } else {
            Reason::FewDescriptors
        };
        keep_on_kernel(index, conn, reason);
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
    let (Some(local), Some(peer)) = (Address::of(&local), Address::of(&peer)) else {
        keep_on_kernel(index, conn, Reason::Call);
        return;
    };
    let Some(cookie) = sys::cookie(fd) else {
        return;
    };
    let netns = sys::network_namespace(fd);
    let Some(guard) = Guard::take() else { return };
    make_memory();
    note_hang_up(&guard);
    attach(&guard);
    if !is_as_attached() {
        return;
    }
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
        stream_id: conn.names.ticket(),
        local: local.ip,
        peer: peer.ip,
        local_port: local.port.into(),
        peer_port: peer.port.into(),
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
