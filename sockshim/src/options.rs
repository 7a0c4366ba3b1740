//! `fcntl`, `ioctl` and socket options: what changes a stream, and what the anchor must not be told.

use crate::conn::{self, Kind, Use};
use crate::{calls, demote, io, process, real, sys};
use libc::{c_int, c_ulong, c_void, socklen_t};
use rdsock_shm::reason::Reason;
use std::sync::atomic::Ordering::*;

/// Linux's `SIOCOUTQNSD`: bytes not even sent.
const SIOCOUTQNSD: c_ulong = 0x894B;

fn note_nonblocking(held: &Use, on: bool) {
    if let Some(stream) = held.conn.stream() {
        stream.page().nonblock.store(u32::from(on), Relaxed);
    }
}

/// # Safety
/// As `fcntl(2)`; its third argument, whatever its type, comes in one register.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fcntl(fd: c_int, command: c_int, arg: c_ulong) -> c_int {
    // SAFETY: arguments pass through.
    let result = unsafe { real::fcntl(fd, command, arg) };
    if conn::kind(fd) == Kind::Other || result < 0 {
        if result >= 0
            && matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC)
            && conn::kind(result) != Kind::Other
        {
            calls::copied(fd, result);
        }
        return result;
    }
    match command {
        libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => {
            calls::copied(fd, result);
        }
        libc::F_SETFL => {
            if let Some(held) = conn::of(fd) {
                note_nonblocking(&held, arg as c_int & libc::O_NONBLOCK != 0);
                if arg as c_int & libc::O_ASYNC != 0 {
                    demote::leave(&held, fd, Reason::Async);
                }
            }
        }
        _ => {}
    }
    result
}

/// # Safety
/// As `fcntl(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fcntl64(fd: c_int, command: c_int, arg: c_ulong) -> c_int {
    // SAFETY: as the caller says.
    unsafe { fcntl(fd, command, arg) }
}

/// # Safety
/// As `ioctl(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, arg: c_ulong) -> c_int {
    if conn::kind(fd) != Kind::Other
        && let Some(held) = conn::of(fd)
        && let Some(stream) = held.conn.stream()
        && !sys::is_bad_pointer(arg as *const c_void)
    {
        let value = match request {
            libc::FIONREAD => io::unread(&stream.at(&held, fd)),
            libc::TIOCOUTQ | SIOCOUTQNSD => io::unsent(&stream.at(&held, fd)),
            _ => None,
        };
        if let Some(value) = value {
            // SAFETY: these requests store an int where the argument points.
            unsafe { *(arg as *mut c_int) = value };
            return 0;
        }
    }
    // SAFETY: arguments pass through.
    let result = unsafe { real::ioctl(fd, request, arg) };
    if result == 0
        && conn::kind(fd) != Kind::Other
        && let Some(held) = conn::of(fd)
    {
        match request {
            // SAFETY: the kernel has just read an int from where the argument points.
            libc::FIONBIO => note_nonblocking(&held, unsafe { *(arg as *const c_int) } != 0),
            libc::FIOASYNC => demote::leave(&held, fd, Reason::Async),
            _ => {}
        }
    }
    result
}

/// Options of `SOL_SOCKET` that need bytes to pass the kernel.
fn is_kernel_only(level: c_int, name: c_int, value: c_int) -> bool {
    const TCP_ULP: c_int = 31;
    const TCP_INQ: c_int = 36;
    const SO_RCVLOWAT: c_int = 18;
    const SO_OOBINLINE: c_int = 10;
    const SO_ATTACH_FILTER: c_int = 26;
    const SO_TIMESTAMP: [c_int; 6] = [29, 35, 37, 63, 64, 65];
    const SO_ATTACH_BPF: c_int = 50;
    const SO_ZEROCOPY: c_int = 60;
    const TCP_REPAIR: c_int = 19;
    const TCP_ZEROCOPY_RECEIVE: c_int = 35;
    match level {
        libc::SOL_SOCKET if name == SO_RCVLOWAT => value > 1,
        libc::SOL_SOCKET
            if SO_TIMESTAMP.contains(&name) || name == SO_ZEROCOPY || name == SO_OOBINLINE =>
        {
            value != 0
        }
        libc::SOL_SOCKET => matches!(name, SO_ATTACH_FILTER | SO_ATTACH_BPF),
        libc::IPPROTO_TCP => {
            matches!(name, TCP_ULP | TCP_REPAIR | TCP_ZEROCOPY_RECEIVE)
                || (name == TCP_INQ && value != 0)
        }
        _ => false,
    }
}

/// Options after which the kernel itself reads the bytes, so that not one may come otherwise.
fn is_parsed_by_kernel(level: c_int, name: c_int) -> bool {
    const ULP_REPAIR_ZEROCOPY: [c_int; 3] = [31, 19, 35];
    const FILTERS: [c_int; 2] = [26, 50];
    level == libc::IPPROTO_TCP && ULP_REPAIR_ZEROCOPY.contains(&name)
        || level == libc::SOL_SOCKET && FILTERS.contains(&name)
}

/// Moves where `MSG_PEEK` looks; not carried on rings, as in kernels before 6.9.
const SO_PEEK_OFF: c_int = 42;

/// The bit of an option that the anchor of a stream has a value of its own for.
fn own_option(level: c_int, name: c_int) -> Option<u32> {
    match (level, name) {
        (libc::IPPROTO_TCP, libc::TCP_NODELAY) => Some(1),
        (libc::IPPROTO_TCP, libc::TCP_CORK) => Some(2),
        _ => None,
    }
}

fn on_rings(fd: c_int) -> Option<Use> {
    conn::of(fd).filter(|held| held.conn.stream().is_some_and(demote::is_on_rings))
}

/// # Safety
/// As `setsockopt(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn setsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    len: socklen_t,
) -> c_int {
    let whole = len as usize >= size_of::<c_int>() && !sys::is_bad_pointer(value);
    if whole && matches!(conn::kind(fd), Kind::Conn(_)) {
        // SAFETY: at least an int is there.
        let number = unsafe { value.cast::<c_int>().read_unaligned() };
        if is_kernel_only(level, name, number)
            && let Some(held) = conn::of(fd)
            && !process::is_foreign()
        {
            if is_parsed_by_kernel(level, name) {
                demote::abandon(&held, fd, Reason::Option);
            } else {
                demote::leave(&held, fd, Reason::Option);
            }
        }
        if level == libc::SOL_SOCKET && name == SO_PEEK_OFF && on_rings(fd).is_some() {
            sys::set_errno(libc::EOPNOTSUPP);
            return -1;
        }
        if let Some(bit) = own_option(level, name)
            && let Some(held) = on_rings(fd)
        {
            if number != 0 {
                held.conn.options.fetch_or(bit, Relaxed);
            } else {
                held.conn.options.fetch_and(!bit, Relaxed);
            }
            return 0;
        }
    }
    // SAFETY: arguments pass through.
    unsafe { real::setsockopt(fd, level, name, value, len) }
}

/// # Safety
/// As `getsockopt(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *mut c_void,
    len: *mut socklen_t,
) -> c_int {
    if (level, name) == (libc::SOL_SOCKET, libc::SO_PEERNAME) {
        // SAFETY: arguments pass through.
        return unsafe { calls::peer_name(fd, value, len) };
    }
    // SAFETY: arguments pass through.
    let result = unsafe { real::getsockopt(fd, level, name, value, len) };
    if result == 0
        && (level, name) == (libc::SOL_SOCKET, libc::SO_ERROR)
        && let Some(held) = on_rings(fd)
        && let Some(stream) = held.conn.stream()
    {
        let mut bytes = [0; size_of::<c_int>()];
        // SAFETY: the kernel has stored an int there, or the part of one that the length says.
        let stored = unsafe {
            let size = (*len as usize).min(bytes.len());
            std::slice::from_raw_parts_mut(value.cast::<u8>(), size)
        };
        stored
            .iter()
            .zip(&mut bytes)
            .for_each(|(from, to)| *to = *from);
        let error = io::take_error(&stream.at(&held, fd), c_int::from_ne_bytes(bytes));
        let bytes = error.to_ne_bytes();
        stored
            .iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = from);
    }
    if result == 0
        && let Some(bit) = own_option(level, name)
        && let Some(held) = on_rings(fd)
    {
        // SAFETY: the kernel has stored an int there, and its length.
        unsafe {
            if *len as usize >= size_of::<c_int>() {
                let on = held.conn.options.load(Relaxed) & bit != 0;
                value.cast::<c_int>().write_unaligned(c_int::from(on));
            }
        }
    }
    result
}
