//! `fcntl`, `ioctl` and socket options: what changes a stream, and what the anchor must not be told.

use crate::conn::{self, Kind, Use};
use crate::end::{self, End};
use crate::known::{self, Need, SIOCATMARK, SIOCOUTQNSD, TCP_INQ};
use crate::{brand, calls, demote, identity, io, nap, real, sys, tenant};
use libc::{c_int, c_ulong, c_void, socklen_t};
use rdsock_shm::reason::Reason;
use std::sync::atomic::Ordering::*;

fn note_nonblocking(held: &Use, on: bool) {
    if let Some(stream) = held.conn.stream() {
        stream.page().nonblock.store(u32::from(on), Relaxed);
    }
}

/// # Safety
/// As `fcntl(2)`; its third argument, whatever its type, comes in one register.
pub unsafe fn fcntl(fd: c_int, command: c_int, arg: c_ulong) -> c_int {
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
/// As `ioctl(2)`.
pub unsafe fn ioctl(fd: c_int, request: c_ulong, arg: c_ulong) -> c_int {
    // The kernel looks at 32 bits, and some programs extend a sign.
    let known = request & 0xFFFF_FFFF;
    match conn::kind(fd) {
        Kind::Conn(_) if !identity::is_foreign() => {
            // SAFETY: as the caller says.
            if let Some(answer) = unsafe { control(fd, known, arg) } {
                return answer;
            }
        }
        // SAFETY: as the caller says.
        _ => unsafe { hand_over(known, arg) },
    }
    // SAFETY: arguments pass through.
    let result = unsafe { real::ioctl(fd, request, arg) };
    if result == 0
        && conn::kind(fd) != Kind::Other
        && let Some(held) = conn::of(fd)
    {
        match known {
            // SAFETY: the kernel has just read an int from where the argument points.
            libc::FIONBIO => note_nonblocking(&held, unsafe { *(arg as *const c_int) } != 0),
            libc::FIOASYNC => demote::leave(&held, fd, Reason::Async),
            _ => {}
        }
    }
    result
}

/// A control of a connection: its result, where the shim knows that better than the kernel. What is not known makes the
/// connection the kernel's first.
///
/// # Safety
/// As `ioctl(2)`.
unsafe fn control(fd: c_int, request: c_ulong, arg: c_ulong) -> Option<c_int> {
    let held = conn::of(fd)?;
    if !known::is_harmless_control(request) {
        demote::abandon(&held, fd, Reason::HandedOver);
        return None;
    }
    let stream = held.conn.stream()?;
    if sys::is_bad_pointer(arg as *const c_void) {
        return None;
    }
    let value = match request {
        libc::FIONREAD => io::unread(&stream.at(&held, fd)),
        libc::TIOCOUTQ | SIOCOUTQNSD => io::unsent(&stream.at(&held, fd)),
        SIOCATMARK => calls::mark_is_behind_ring(&held, fd).then_some(0),
        _ => None,
    }?;
    // SAFETY: these requests store an int where the argument points.
    unsafe { *(arg as *mut c_int) = value };
    Some(0)
}

/// A control of another file may take a connection for the kernel.
///
/// # Safety
/// As `ioctl(2)`.
#[inline]
unsafe fn hand_over(request: c_ulong, arg: c_ulong) {
    if known::may_name_socket(request) {
        if arg < conn::FDS as c_ulong {
            take_for_kernel(arg as c_int);
        }
    } else if known::points_to_socket(request) && !sys::is_bad_pointer(arg as *const c_void) {
        // SAFETY: the request reads an int from where the argument points.
        take_for_kernel(unsafe { *(arg as *const c_int) });
    }
}

/// The kernel is about to use a connection by itself, if this is one.
pub fn take_for_kernel(fd: c_int) {
    if let Kind::Conn(_) = conn::kind(fd)
        && !identity::is_foreign()
        && let Some(held) = conn::of(fd)
    {
        demote::abandon(&held, fd, Reason::HandedOver);
    }
}

/// Moves where `MSG_PEEK` looks; not carried on rings, as in kernels before 6.9.
const SO_PEEK_OFF: c_int = 42;

/// `SO_RCVTIMEO` of 64 bits everywhere: from asm-generic/socket.h.
const SO_RCVTIMEO_NEW: c_int = 66;

/// The bit of an option that the anchor of a stream has a value of its own for.
fn own_option(level: c_int, name: c_int) -> Option<u32> {
    match (level, name) {
        (libc::IPPROTO_TCP, libc::TCP_NODELAY) => Some(1),
        (libc::IPPROTO_TCP, libc::TCP_CORK) => Some(2),
        _ if brand::is_it(level, name) => Some(conn::SAYS_BRAND),
        _ => None,
    }
}

/// The connection that has a value of its own for this option, and the option's bit: a stream, and of the brand any.
fn with_own_option(fd: c_int, level: c_int, name: c_int) -> Option<(Use, u32)> {
    let bit = own_option(level, name)?;
    let held = match bit {
        conn::SAYS_BRAND => conn::of(fd),
        _ => on_rings(fd),
    }?;
    Some((held, bit))
}

fn on_rings(fd: c_int) -> Option<Use> {
    conn::of(fd).filter(|held| held.conn.stream().is_some_and(demote::is_on_rings))
}

/// What `ask` says of the end of a stream that a descriptor is.
fn at_stream<T>(fd: c_int, ask: impl FnOnce(End<'_>) -> T) -> Option<T> {
    let held = on_rings(fd)?;
    let stream = held.conn.stream()?;
    Some(ask(stream.at(&held, fd)))
}

/// # Safety
/// As `setsockopt(2)`.
pub unsafe fn setsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    len: socklen_t,
) -> c_int {
    if matches!(conn::kind(fd), Kind::Conn(_)) {
        let whole = len as usize >= size_of::<c_int>() && !sys::is_bad_pointer(value);
        let number = if whole {
            // SAFETY: at least an int is there.
            unsafe { value.cast::<c_int>().read_unaligned() }
        } else {
            0
        };
        let need = known::need_of(level, name, number);
        if need != Need::Nothing
            && let Some(held) = conn::of(fd)
            && !identity::is_foreign()
        {
            match need {
                Need::KernelAlone => {
                    demote::abandon(&held, fd, Reason::Option);
                    tenant::listens_for_kernel(&held);
                }
                _ => demote::leave(&held, fd, Reason::Option),
            }
        }
        if level == libc::SOL_SOCKET && name == SO_PEEK_OFF && on_rings(fd).is_some() {
            real::set_errno(libc::EOPNOTSUPP);
            return -1;
        }
        if whole && let Some((held, bit)) = with_own_option(fd, level, name) {
            note_option(&held, bit, number != 0);
            return 0;
        }
        if (level, name) == (libc::SOL_SOCKET, libc::SO_LINGER)
            && len as usize >= size_of::<libc::linger>()
            && !sys::is_bad_pointer(value)
        {
            // SAFETY: it is there.
            let linger = unsafe { value.cast::<libc::linger>().read_unaligned() };
            let says = |end: End<'_>| end.say_linger(end::packed(linger));
            if at_stream(fd, says) == Some(true) {
                return 0;
            }
        }
    }
    // SAFETY: arguments pass through.
    let result = unsafe { real::setsockopt(fd, level, name, value, len) };
    if level == libc::SOL_SOCKET
        && matches!(name, libc::SO_RCVTIMEO | SO_RCVTIMEO_NEW)
        && let Some(held) = conn::of(fd)
    {
        nap::forget_limit(held.conn);
    }
    if result == 0
        && (level, name) == (libc::IPPROTO_TCP, TCP_INQ)
        && let Some(held) = conn::of(fd)
    {
        // SAFETY: the kernel has read an int there.
        let is_on = unsafe { value.cast::<c_int>().read_unaligned() } != 0;
        note_option(&held, conn::TELLS_UNREAD, is_on);
    }
    result
}

fn note_option(held: &Use, bit: u32, is_on: bool) {
    if is_on {
        held.conn.options.fetch_or(bit, Relaxed);
    } else {
        held.conn.options.fetch_and(!bit, Relaxed);
    }
}

/// # Safety
/// As `getsockopt(2)`.
pub unsafe fn getsockopt(
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
        && (level, name) == (libc::SOL_SOCKET, libc::SO_LINGER)
        && let Some(said) = at_stream(fd, |end| end.said_linger()).flatten()
    {
        // SAFETY: the kernel has stored one there, and its length.
        unsafe {
            if *len as usize >= size_of::<libc::linger>() {
                value
                    .cast::<libc::linger>()
                    .write_unaligned(end::unpacked(said));
            }
        }
    }
    if result == 0
        && let Some((held, bit)) = with_own_option(fd, level, name)
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
