//! The life of a socket, from `socket` to `shutdown`: here it is seen that a TCP connection comes
//! to be.

use crate::address::{Address, family_of};
use crate::between::{self, Origin};
use crate::conn::{self, Kind, Use, born};
use crate::{brand, demote, handing_over, identity, numbers, process, real, sys, tenant, wait};
use libc::{c_int, sockaddr, socklen_t};
use rdsock_shm::reason::Reason;
use std::sync::atomic::{AtomicBool, Ordering::*};

/// # Safety
/// As `socket(2)`.
pub unsafe fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    // SAFETY: arguments pass through.
    let fd = unsafe { real::socket(domain, kind, protocol) };
    handing_over::made_socket(fd, domain, protocol);
    if fd >= 0 && identity::is_ready() {
        let tcp = matches!(domain, libc::AF_INET | libc::AF_INET6)
            && kind & 0xf == libc::SOCK_STREAM
            && matches!(protocol, 0 | libc::IPPROTO_TCP);
        if identity::is_foreign() {
            return fd;
        }
        if tcp {
            numbers::track(fd, born::NOT_YET);
        } else if conn::kind(fd) != Kind::Other {
            numbers::replace(fd, Kind::Other);
        }
    }
    fd
}

/// # Safety
/// As `bind(2)`.
pub unsafe fn bind(fd: c_int, address: *const sockaddr, len: socklen_t) -> c_int {
    // SAFETY: arguments pass through: a port is the kernel's to give.
    unsafe { real::bind(fd, address, len) }
}

/// # Safety
/// As `listen(2)`.
pub unsafe fn listen(fd: c_int, backlog: c_int) -> c_int {
    // SAFETY: arguments pass through.
    let result = unsafe { real::listen(fd, backlog) };
    if result == 0
        && let Some(held) = conn::of(fd)
    {
        tenant::listens(&held);
    }
    result
}

/// # Safety
/// As `connect(2)`.
pub unsafe fn connect(fd: c_int, address: *const sockaddr, len: socklen_t) -> c_int {
    if !sys::is_bad_pointer(address.cast())
        && len as usize >= size_of::<libc::sa_family_t>()
        // SAFETY: an address of the length given, as the caller says.
        && unsafe { (*address).sa_family } as c_int == libc::AF_UNSPEC
        && matches!(conn::kind(fd), Kind::Conn(_))
    {
        return disconnect(fd, address, len);
    }
    let held = conn::of(fd);
    let mut between = None;
    if let Some(held) = &held {
        tenant::ensure();
        // SAFETY: arguments pass through.
        between = unsafe { between::connect(held, fd, address, len) };
    }
    // SAFETY: arguments pass through.
    let result = between.unwrap_or_else(|| unsafe { real::connect(fd, address, len) });
    if let Some(held) = held {
        let error = real::errno();
        if result == 0 || matches!(error, libc::EINPROGRESS | libc::EINTR) {
            let _ = held
                .conn
                .born
                .compare_exchange(born::NOT_YET, born::ACTIVE, AcqRel, Relaxed);
            if held.conn.stream().is_some() {
                // Another connection: what it had a stream for was broken.
                brand::take_off(fd);
            }
        }
        real::set_errno(error);
    }
    result
}

/// `connect` to no address: the connection is reset, and the socket is as new.
fn disconnect(fd: c_int, address: *const sockaddr, len: socklen_t) -> c_int {
    if let Some(held) = conn::of(fd)
        && let Some(stream) = held.conn.stream()
    {
        stream.at(&held, fd).reset(Reason::Call);
    }
    if let Some(held) = conn::of(fd) {
        // The socket stays open, and with it what is registered in the program's epoll instances.
        held.conn.cookie.store(0, Relaxed);
        held.conn.listens.store(0, Relaxed);
    }
    numbers::replace(fd, Kind::Other);
    // SAFETY: arguments pass through.
    let result = unsafe { real::connect(fd, address, len) };
    brand::take_off(fd);
    if let Some(index) = numbers::track(fd, born::NOT_YET)
        && let Some(conn) = conn::at(index)
    {
        tenant::keep_on_kernel(index, conn, Reason::Call);
    }
    result
}

/// # Safety
/// As `accept(2)`.
pub unsafe fn accept(fd: c_int, address: *mut sockaddr, len: *mut socklen_t) -> c_int {
    // SAFETY: arguments pass through.
    unsafe { accept_by(fd, address, len, || real::accept(fd, address, len)) }
}

/// # Safety
/// As `accept4(2)`.
pub unsafe fn accept4(
    fd: c_int,
    address: *mut sockaddr,
    len: *mut socklen_t,
    flags: c_int,
) -> c_int {
    // SAFETY: arguments pass through.
    unsafe { accept_by(fd, address, len, || real::accept4(fd, address, len, flags)) }
}

/// Connections that one call drops which does not wait.
const MOST_DROPPED: u32 = 64;

/// The program's user was told that one was dropped.
static TOLD_DROPPED: AtomicBool = AtomicBool::new(false);

/// # Safety
/// `address` and `len` are what the program gave.
unsafe fn accept_by(
    listener: c_int,
    address: *mut sockaddr,
    len: *mut socklen_t,
    in_kernel: impl Fn() -> c_int,
) -> c_int {
    if let Some(held) = conn::of(listener) {
        tenant::listens(&held);
        if wait::for_connection(listener).is_err() {
            real::set_errno(libc::EINTR);
            return -1;
        }
    }
    // What is wrong with it is the kernel's to say.
    let room = if address.is_null() || sys::is_bad_pointer(len.cast()) {
        0
    } else {
        // SAFETY: the program's own length.
        unsafe { *len }
    };
    let mut dropped = 0;
    loop {
        let fd = in_kernel();
        let held = accepted(listener, fd);
        if fd < 0 {
            return fd;
        }
        let peer = match room {
            0 => None,
            // SAFETY: the kernel has written the peer's address there, as much as there is room for.
            _ => unsafe { Address::given(address, room.min(*len)) }.map(|(_, peer)| peer),
        };
        // Who is not told now asks later, or never.
        let may_be_far = match peer {
            Some(peer) => peer.may_be_daemons(),
            None => held.is_some() && tenant::may_lead_away(),
        };
        if !may_be_far {
            return fd;
        }
        match between::accepted(held.as_ref(), fd, peer) {
            Origin::Far(peer) if !address.is_null() => {
                // SAFETY: as above.
                unsafe { peer.put(address, room, family_of(*len)) };
            }
            Origin::Unknown => {
                // As if it had never come.
                drop(held);
                if !TOLD_DROPPED.swap(true, Relaxed) {
                    sys::warn(
                        "a connection from another node was dropped: it had ended before it was accepted, \
                         or the daemon does not say whose it is",
                    );
                }
                // SAFETY: the program does not know this descriptor.
                unsafe { super::close(fd) };
                if !address.is_null() {
                    // SAFETY: the kernel has written the length there.
                    unsafe { *len = room };
                }
                dropped += 1;
                let waits = sys::fcntl(listener, libc::F_GETFL, 0) & libc::O_NONBLOCK as isize == 0;
                if dropped < MOST_DROPPED || waits {
                    continue;
                }
                // They may come without an end, and whoever does not wait has others to serve.
                real::set_errno(libc::ECONNABORTED);
                return -1;
            }
            _ => {}
        }
        return fd;
    }
}

/// Follows a descriptor that was just accepted.
fn accepted(listener: c_int, fd: c_int) -> Option<Use> {
    if fd < 0 || !identity::is_ready() || identity::is_foreign() {
        return None;
    }
    let error = real::errno();
    let mut accepted = None;
    if matches!(conn::kind(listener), Kind::Conn(_)) || process::is_tcp(fd) {
        tenant::ensure();
        accepted = numbers::track(fd, born::PASSIVE).and_then(conn::by_index);
        if let Some(held) = &accepted
            && conn::of(listener).is_some_and(|listener| tenant::is_for_kernel(&listener))
        {
            tenant::keep_on_kernel(held.index, held.conn, Reason::Option);
        }
    } else if conn::kind(fd) != Kind::Other {
        numbers::replace(fd, Kind::Other);
    }
    real::set_errno(error);
    accepted
}

/// # Safety
/// As `shutdown(2)`.
pub unsafe fn shutdown(fd: c_int, how: c_int) -> c_int {
    if let Some(held) = conn::of(fd) {
        match demote::shutdown(&held, fd, how) {
            Some(0) => return 0,
            Some(error) => {
                real::set_errno(error);
                return -1;
            }
            None => {}
        }
        if held.conn.stream().is_none() {
            tenant::keep_on_kernel(held.index, held.conn, Reason::Call);
        }
    }
    // SAFETY: arguments pass through.
    unsafe { real::shutdown(fd, how) }
}

/// # Safety
/// As `sockatmark(3)`.
pub unsafe fn sockatmark(fd: c_int) -> c_int {
    if let Some(held) = conn::of(fd)
        && mark_is_behind_ring(&held, fd)
    {
        return 0;
    }
    // SAFETY: arguments pass through.
    unsafe { real::sockatmark(fd) }
}

/// True when the mark of urgent data is not next, since bytes of the ring are. Urgent data makes its sender leave the
/// rings, so the kernel knows the mark, once what came on the ring before it has been read.
pub fn mark_is_behind_ring(held: &Use, fd: c_int) -> bool {
    held.conn
        .stream()
        .filter(|stream| demote::is_on_rings(stream))
        .is_some_and(|stream| {
            demote::settle_incoming(held, stream, fd);
            stream.has_unread_ring()
        })
}
