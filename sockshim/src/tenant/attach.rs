//! The control connection: where the daemon is, how it is reached, and what becomes of the
//! connections when it is gone.

use super::hidden::{close_hidden, hide};
use super::listeners::tell_all;
use super::lock::{Guard, Shared};
use super::memory::{MEMFDS, MEMORY, make_memory, memory};
use super::messages::{SEEN, send_with};
use super::requests::PUTTER;
use crate::conn::{self, Conn, phase};
use crate::{clock, sys};
use libc::c_int;
use rdsock_shm::control::{Hello, Message, kind};
use rdsock_shm::layout::{BellBoard, TenantMemory};
use rdsock_shm::queue::Putter;
use rdsock_shm::reason::{Reason, State};
use std::cell::UnsafeCell;
use std::mem::size_of;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::*};

/// Milliseconds between two attempts to reach a daemon.
pub(super) const RETRY_MS: u64 = 500;

pub(super) static CONTROL: AtomicI32 = AtomicI32::new(-1);
/// A control connection of the process that forked this one: only good for ADOPT.
pub(super) static INHERITED: AtomicI32 = AtomicI32::new(-1);
pub(super) static TRIED_AT: AtomicU64 = AtomicU64::new(0);
/// Counts attachments: a stream of an earlier one is unknown to the present daemon.
pub(super) static EPOCH: AtomicU32 = AtomicU32::new(0);
/// 1 from HELLO until the daemon's greeting: the routes to other nodes are not known yet.
pub(super) static AWAITED: AtomicU32 = AtomicU32::new(0);
static DISABLED: AtomicU32 = AtomicU32::new(0);
static PATH: Shared<[u8; 108]> = Shared(UnsafeCell::new([0; 108]));

/// Notes the daemon's address, from the environment.
pub fn start(path: Option<&std::ffi::CStr>, disabled: bool) {
    DISABLED.store(u32::from(disabled), Relaxed);
    if let Some(path) = path
        && path.to_bytes().len() < 108
    {
        // SAFETY: the constructor runs before anybody reads it.
        let place = unsafe { &mut *PATH.0.get() };
        for (to, from) in place.iter_mut().zip(path.to_bytes()) {
            *to = *from;
        }
    }
}

/// True when no connection of this process may be promoted.
pub(super) fn is_disabled() -> bool {
    DISABLED.load(Relaxed) != 0
}

/// No connection may be promoted from now on.
pub fn disable() {
    DISABLED.store(1, Relaxed);
}

/// Makes the tenant's memory and tries to reach the daemon, once, when the first TCP socket of
/// the process is used.
pub fn ensure() {
    if MEMORY.load(Relaxed).is_null()
        && !is_disabled()
        && let Some(guard) = Guard::take()
    {
        make_memory();
        attach(&guard);
    }
}

pub(super) fn attach(guard: &Guard) {
    let now = clock::nanoseconds();
    let tried = TRIED_AT.load(Relaxed);
    if CONTROL.load(Relaxed) >= 0 || (tried != 0 && now.wrapping_sub(tried) < RETRY_MS * 1_000_000)
    {
        return;
    }
    TRIED_AT.store(now, Relaxed);
    let Some(memory) = memory() else { return };
    let Some(fd) = adopted().or_else(connected) else {
        return;
    };
    let fd = hide(fd);
    let fds = [MEMFDS[0].load(Relaxed), MEMFDS[1].load(Relaxed)];
    let hello = Hello {
        memory_size: size_of::<TenantMemory>() as u64,
        bell_size: size_of::<BellBoard>() as u64,
    };
    // A fresh start for the queue and the routes: requests that an earlier daemon did not take are
    // void, and what it wrote as well.
    // SAFETY: the lock is held.
    unsafe { *PUTTER.0.get() = Putter::new() };
    for slot in &memory.queue {
        slot.sequence.store(0, Relaxed);
    }
    memory.routes.set(&[]);
    SEEN.store(memory.header.messages.load(Relaxed), Relaxed);
    AWAITED.store(1, Relaxed);
    if send_with(fd, &Message::new(kind::HELLO, &hello), &fds) < 0 {
        AWAITED.store(0, Relaxed);
        close_hidden(fd);
        return;
    }
    EPOCH.fetch_add(1, AcqRel);
    CONTROL.store(fd, Release);
    clock::calibrate();
    tell_all(guard);
}

/// A control connection through the one of the process that forked this one: works after chroot
/// and after a change of user, too.
fn adopted() -> Option<c_int> {
    let inherited = INHERITED.swap(-1, AcqRel);
    if inherited < 0 {
        return None;
    }
    let pair = sys::socketpair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK);
    let sent = pair.is_some_and(|[_, theirs]| {
        send_with(inherited, &Message::empty(kind::ADOPT), &[theirs]) >= 0
    });
    close_hidden(inherited);
    let [ours, theirs] = pair?;
    sys::close(theirs);
    if !sent {
        sys::close(ours);
        return None;
    }
    Some(ours)
}

fn connected() -> Option<c_int> {
    // SAFETY: written by the constructor only.
    let configured = unsafe { &*PATH.0.get() };
    let fd = sys::socket(
        libc::AF_UNIX,
        libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
        0,
    ) as c_int;
    if fd < 0 {
        return None;
    }
    let mut address = libc::sockaddr_un {
        sun_family: libc::AF_UNIX as u16,
        sun_path: [0; 108],
    };
    let mut reach = |path: &[u8]| {
        address.sun_path = [0; 108];
        for (to, from) in address.sun_path.iter_mut().zip(path) {
            *to = *from as libc::c_char;
        }
        sys::connect_unix(fd, &address, size_of::<libc::sockaddr_un>()) == 0
    };
    let reached = if configured[0] != 0 {
        reach(configured)
    } else {
        reach(b"/run/rdsock/rdsockd.sock\0")
    };
    if !reached {
        sys::close(fd);
        return None;
    }
    Some(fd)
}

/// The daemon is gone: what was announced is announced anew once there is another.
pub(super) fn detach() {
    let control = CONTROL.swap(-1, AcqRel);
    if control >= 0 {
        close_hidden(control);
    }
    AWAITED.store(0, Relaxed);
    conn::each(|index, conn| {
        if conn
            .phase
            .compare_exchange(phase::ANNOUNCED, phase::KERNEL, AcqRel, Relaxed)
            .is_ok()
        {
            conn.calls.store(0, Relaxed);
            conn.tell(index, State::Kernel, Reason::NoDaemon);
        }
    });
}

pub(super) fn has_hung_up(control: c_int) -> bool {
    sys::poll_one(control, libc::POLLIN, 0) as i16 & libc::POLLHUP != 0
}

/// True when the daemon can be asked for this connection's stream by a program that this one turns
/// into.
pub fn is_known(conn: &Conn) -> bool {
    let control = CONTROL.load(Relaxed);
    conn.epoch.load(Relaxed) == EPOCH.load(Relaxed) && control >= 0 && !has_hung_up(control)
}
