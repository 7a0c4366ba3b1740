//! The functions that stand in front of libc's. Each looks up its fd and, when that is not a
//! connection of ours, calls libc's function with what it was given.

use crate::conn::{self, Kind, Use, born, phase};
use crate::io::{self, Buffers, InKernel, Outcome};
use crate::poll::{Sets, nanoseconds_of};
use crate::stream::Stream;
use crate::{demote, epoll, poll, process, real, sys, tenant};
use libc::{
    c_int, c_uint, c_void, epoll_event, fd_set, iovec, mmsghdr, msghdr, nfds_t, off_t, off64_t,
    pollfd, sigset_t, size_t, sockaddr, socklen_t, ssize_t, timespec, timeval,
};
use rdsock_shm::reason::Reason;
use std::sync::atomic::Ordering::*;

type StreamCall<'a> = &'a dyn for<'s> Fn(&Use, &'s Stream) -> Outcome<'s>;

/// A call that moves bytes: on the stream when there is one, else in the kernel, counted in so that
/// no stream is set up meanwhile.
#[inline]
fn transfer(
    fd: c_int,
    receives: bool,
    on_stream: StreamCall<'_>,
    in_kernel: &dyn Fn() -> isize,
) -> isize {
    let Some(held) = conn::of(fd) else {
        return in_kernel();
    };
    loop {
        if let Some(stream) = held.conn.stream() {
            return match on_stream(&held, stream) {
                Outcome::Done(result) => sys::to_c(result),
                Outcome::Kernel(counted) => {
                    let result = in_kernel();
                    if counted.is_some() {
                        let error = sys::errno();
                        if result < 0 && error == libc::EAGAIN {
                            held.conn.wants_space.store(1, SeqCst);
                        }
                        drop(counted);
                        io::after_kernel_send(&held, stream, fd);
                        sys::set_errno(error);
                    }
                    result
                }
            };
        }
        let counted = InKernel::enter(if receives {
            &held.conn.in_rx
        } else {
            &held.conn.in_tx
        });
        match held.conn.phase.load(SeqCst) {
            phase::INSTALLING => {
                drop(counted);
                sys::sched_yield();
            }
            phase::MAPPED => {}
            _ => {
                let result = in_kernel();
                drop(counted);
                let error = sys::errno();
                tenant::after_call(held.index, held.conn, fd, result);
                sys::set_errno(error);
                return result;
            }
        }
    }
}

/// Flags of a receive that rings honour; with any other the kernel decides.
const RECV_FLAGS: c_int = libc::MSG_PEEK
    | libc::MSG_WAITALL
    | libc::MSG_DONTWAIT
    | libc::MSG_NOSIGNAL
    | libc::MSG_TRUNC
    | libc::MSG_CMSG_CLOEXEC;
/// Flags of a send that rings honour.
const SEND_FLAGS: c_int = libc::MSG_DONTWAIT
    | libc::MSG_NOSIGNAL
    | libc::MSG_MORE
    | libc::MSG_EOR
    | libc::MSG_CONFIRM
    | libc::MSG_DONTROUTE;

/// Flags that make a stream leave the rings, or that ask for something only the kernel has.
fn leave_for_flags(fd: c_int, flags: c_int, known: c_int) {
    if flags & !known != 0
        && flags & libc::MSG_ERRQUEUE == 0
        && let Some(held) = conn::of(fd)
    {
        let reason = if flags & libc::MSG_OOB != 0 {
            Reason::Urgent
        } else {
            Reason::Call
        };
        demote::leave(&held, fd, reason);
    }
}

/// # Safety
/// `parts` points to `count` entries that describe the program's buffers.
unsafe fn receive(
    fd: c_int,
    parts: *const iovec,
    count: usize,
    flags: c_int,
    in_kernel: &dyn Fn() -> isize,
) -> isize {
    if flags & (libc::MSG_ERRQUEUE | libc::MSG_OOB) != 0 {
        return in_kernel();
    }
    if flags & !RECV_FLAGS != 0 {
        leave_for_flags(fd, flags, RECV_FLAGS);
    }
    let on_stream = |held: &Use, stream: &Stream| -> isize {
        // SAFETY: the caller vouches for the entries.
        match unsafe { Buffers::new(parts, count, flags) } {
            Ok(buffers) => match io::recv(held, stream, fd, &buffers, flags) {
                Outcome::Done(result) => result,
                Outcome::Kernel(_) => isize::MIN,
            },
            Err(error) => error,
        }
    };
    transfer(
        fd,
        true,
        &|held, stream| match on_stream(held, stream) {
            isize::MIN => Outcome::Kernel(None),
            result => Outcome::Done(result),
        },
        in_kernel,
    )
}

/// # Safety
/// As [`receive`].
unsafe fn transmit(
    fd: c_int,
    parts: *const iovec,
    count: usize,
    flags: c_int,
    in_kernel: &dyn Fn() -> isize,
) -> isize {
    if flags & !SEND_FLAGS != 0 {
        leave_for_flags(fd, flags, SEND_FLAGS);
    }
    transfer(
        fd,
        false,
        // SAFETY: the caller vouches for the entries.
        &|held, stream| match unsafe { Buffers::new(parts, count, flags) } {
            Ok(buffers) => io::send(held, stream, fd, &buffers, flags),
            Err(error) => Outcome::Done(error),
        },
        in_kernel,
    )
}

fn one(buf: *const c_void, len: size_t) -> iovec {
    iovec {
        iov_base: buf.cast_mut(),
        iov_len: len.min(isize::MAX as usize),
    }
}

const IOV_MAX: c_int = 1024;

/// # Safety
/// As `read(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn read(fd: c_int, buf: *mut c_void, len: size_t) -> ssize_t {
    // SAFETY: arguments pass through; a tracked fd's buffer is described by the local entry.
    unsafe {
        if conn::kind(fd) == Kind::Other || len == 0 {
            return real::read(fd, buf, len);
        }
        if len > isize::MAX as usize
            && conn::of(fd).is_some_and(|held| held.conn.stream().is_some())
        {
            sys::set_errno(libc::EFAULT);
            return -1;
        }
        receive(fd, &one(buf, len), 1, 0, &|| real::read(fd, buf, len))
    }
}

/// # Safety
/// As `write(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, buf: *const c_void, len: size_t) -> ssize_t {
    // SAFETY: as in `read`.
    unsafe {
        if conn::kind(fd) == Kind::Other || len == 0 {
            return real::write(fd, buf, len);
        }
        if len > isize::MAX as usize
            && conn::of(fd).is_some_and(|held| held.conn.stream().is_some())
        {
            sys::set_errno(libc::EFAULT);
            return -1;
        }
        transmit(fd, &one(buf, len), 1, 0, &|| real::write(fd, buf, len))
    }
}

/// # Safety
/// As `readv(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn readv(fd: c_int, iov: *const iovec, count: c_int) -> ssize_t {
    // SAFETY: arguments pass through.
    unsafe {
        if conn::kind(fd) == Kind::Other
            || !(1..=IOV_MAX).contains(&count)
            || sys::is_bad_pointer(iov.cast())
        {
            return real::readv(fd, iov, count);
        }
        receive(fd, iov, count as usize, 0, &|| real::readv(fd, iov, count))
    }
}

/// # Safety
/// As `writev(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn writev(fd: c_int, iov: *const iovec, count: c_int) -> ssize_t {
    // SAFETY: arguments pass through.
    unsafe {
        if conn::kind(fd) == Kind::Other
            || !(1..=IOV_MAX).contains(&count)
            || sys::is_bad_pointer(iov.cast())
        {
            return real::writev(fd, iov, count);
        }
        transmit(fd, iov, count as usize, 0, &|| real::writev(fd, iov, count))
    }
}

/// # Safety
/// As `preadv2(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn preadv2(
    fd: c_int,
    iov: *const iovec,
    count: c_int,
    offset: off_t,
    flags: c_int,
) -> ssize_t {
    // SAFETY: arguments pass through.
    unsafe {
        let in_kernel = || real::preadv2(fd, iov, count, offset, flags);
        if conn::kind(fd) == Kind::Other
            || offset != -1
            || !(1..=IOV_MAX).contains(&count)
            || sys::is_bad_pointer(iov.cast())
        {
            return in_kernel();
        }
        if flags & !(libc::RWF_NOWAIT | libc::RWF_HIPRI) != 0 {
            return in_kernel();
        }
        let flags = if flags & libc::RWF_NOWAIT != 0 {
            libc::MSG_DONTWAIT
        } else {
            0
        };
        receive(fd, iov, count as usize, flags, &in_kernel)
    }
}

/// # Safety
/// As `pwritev2(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwritev2(
    fd: c_int,
    iov: *const iovec,
    count: c_int,
    offset: off_t,
    flags: c_int,
) -> ssize_t {
    // SAFETY: arguments pass through.
    unsafe {
        let in_kernel = || real::pwritev2(fd, iov, count, offset, flags);
        if conn::kind(fd) == Kind::Other
            || offset != -1
            || !(1..=IOV_MAX).contains(&count)
            || sys::is_bad_pointer(iov.cast())
        {
            return in_kernel();
        }
        if flags & !(libc::RWF_NOWAIT | libc::RWF_HIPRI) != 0 {
            return in_kernel();
        }
        let flags = if flags & libc::RWF_NOWAIT != 0 {
            libc::MSG_DONTWAIT
        } else {
            0
        };
        transmit(fd, iov, count as usize, flags, &in_kernel)
    }
}

/// # Safety
/// As `preadv2(2)`; the name that programs built for large files use.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn preadv64v2(
    fd: c_int,
    iov: *const iovec,
    count: c_int,
    offset: off_t,
    flags: c_int,
) -> ssize_t {
    // SAFETY: arguments pass through.
    unsafe { preadv2(fd, iov, count, offset, flags) }
}

/// # Safety
/// As `pwritev2(2)`; the name that programs built for large files use.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwritev64v2(
    fd: c_int,
    iov: *const iovec,
    count: c_int,
    offset: off_t,
    flags: c_int,
) -> ssize_t {
    // SAFETY: arguments pass through.
    unsafe { pwritev2(fd, iov, count, offset, flags) }
}

/// # Safety
/// As `recv(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recv(fd: c_int, buf: *mut c_void, len: size_t, flags: c_int) -> ssize_t {
    // SAFETY: as in `read`.
    unsafe {
        if conn::kind(fd) == Kind::Other {
            return real::recv(fd, buf, len, flags);
        }
        receive(fd, &one(buf, len), 1, flags, &|| {
            real::recv(fd, buf, len, flags)
        })
    }
}

/// # Safety
/// As `send(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn send(fd: c_int, buf: *const c_void, len: size_t, flags: c_int) -> ssize_t {
    // SAFETY: as in `read`.
    unsafe {
        if conn::kind(fd) == Kind::Other {
            return real::send(fd, buf, len, flags);
        }
        transmit(fd, &one(buf, len), 1, flags, &|| {
            real::send(fd, buf, len, flags)
        })
    }
}

/// # Safety
/// As `recvfrom(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recvfrom(
    fd: c_int,
    buf: *mut c_void,
    len: size_t,
    flags: c_int,
    from: *mut sockaddr,
    from_len: *mut socklen_t,
) -> ssize_t {
    // SAFETY: as in `read`.
    unsafe {
        if conn::kind(fd) == Kind::Other {
            return real::recvfrom(fd, buf, len, flags, from, from_len);
        }
        let result = receive(fd, &one(buf, len), 1, flags, &|| {
            real::recvfrom(fd, buf, len, flags, from, from_len)
        });
        // TCP names no sender.
        if result >= 0
            && !from.is_null()
            && !from_len.is_null()
            && conn::of(fd).is_some_and(|held| held.conn.stream().is_some())
        {
            *from_len = 0;
        }
        result
    }
}

/// # Safety
/// As `sendto(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendto(
    fd: c_int,
    buf: *const c_void,
    len: size_t,
    flags: c_int,
    to: *const sockaddr,
    to_len: socklen_t,
) -> ssize_t {
    // SAFETY: as in `read`.
    unsafe {
        if conn::kind(fd) == Kind::Other {
            return real::sendto(fd, buf, len, flags, to, to_len);
        }
        transmit(fd, &one(buf, len), 1, flags, &|| {
            real::sendto(fd, buf, len, flags, to, to_len)
        })
    }
}

/// # Safety
/// As `recvmsg(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recvmsg(fd: c_int, msg: *mut msghdr, flags: c_int) -> ssize_t {
    // SAFETY: arguments pass through; a header is only read when it is not null.
    unsafe {
        let in_kernel = || real::recvmsg(fd, msg, flags);
        if conn::kind(fd) == Kind::Other {
            let result = in_kernel();
            if result >= 0 && (*msg).msg_controllen != 0 {
                each_passed(msg, |fd| {
                    conn::replace(fd, Kind::Other);
                });
            }
            return result;
        }
        if sys::is_bad_pointer(msg.cast()) || (*msg).msg_iovlen > IOV_MAX as usize {
            return in_kernel();
        }
        let result = receive(fd, (*msg).msg_iov, (*msg).msg_iovlen, flags, &in_kernel);
        if result >= 0
            && conn::of(fd).is_some_and(|held| held.conn.stream().is_some_and(demote::is_on_rings))
        {
            let header = &mut *msg;
            header.msg_namelen = 0;
            header.msg_controllen = 0;
            header.msg_flags = flags & libc::MSG_CMSG_CLOEXEC;
        }
        result
    }
}

/// # Safety
/// As `sendmsg(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendmsg(fd: c_int, msg: *const msghdr, flags: c_int) -> ssize_t {
    // SAFETY: arguments pass through; a header is only read when it is not null.
    unsafe {
        let in_kernel = || real::sendmsg(fd, msg, flags);
        if conn::kind(fd) == Kind::Other {
            if !msg.is_null() && (*msg).msg_controllen != 0 {
                each_passed(msg, |passed| {
                    if let Some(held) = conn::of(passed) {
                        demote::abandon(&held, passed, Reason::Passed);
                    }
                });
            }
            return in_kernel();
        }
        if sys::is_bad_pointer(msg.cast()) || (*msg).msg_iovlen > IOV_MAX as usize {
            return in_kernel();
        }
        if (*msg).msg_controllen != 0
            && let Some(held) = conn::of(fd)
        {
            demote::leave(&held, fd, Reason::Call);
        }
        transmit(fd, (*msg).msg_iov, (*msg).msg_iovlen, flags, &in_kernel)
    }
}

/// Calls `found` with each fd that a message passes.
///
/// # Safety
/// A valid message header.
unsafe fn each_passed(msg: *const msghdr, mut found: impl FnMut(c_int)) {
    // SAFETY: the caller vouches for the header; the macros stay inside its control part.
    unsafe {
        let mut item = libc::CMSG_FIRSTHDR(msg);
        while !item.is_null() {
            if (*item).cmsg_level == libc::SOL_SOCKET && (*item).cmsg_type == libc::SCM_RIGHTS {
                let count =
                    ((*item).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize) / 4;
                for i in 0..count.min(253) {
                    found(
                        libc::CMSG_DATA(item)
                            .cast::<c_int>()
                            .add(i)
                            .read_unaligned(),
                    );
                }
            }
            item = libc::CMSG_NXTHDR(msg, item);
        }
    }
}

/// # Safety
/// As `recvmmsg(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recvmmsg(
    fd: c_int,
    msgs: *mut mmsghdr,
    count: c_uint,
    flags: c_int,
    limit: *mut timespec,
) -> c_int {
    // SAFETY: arguments pass through.
    unsafe {
        if conn::kind(fd) == Kind::Other || sys::is_bad_pointer(msgs.cast()) {
            return real::recvmmsg(fd, msgs, count, flags, limit);
        }
        let mut flags = flags;
        let end = match nanoseconds_of(limit) {
            Ok(limit) => poll::Deadline::after(limit),
            Err(()) => {
                sys::set_errno(libc::EINVAL);
                return -1;
            }
        };
        for i in 0..count.min(1024) as usize {
            let entry = &mut *msgs.add(i);
            let got = recvmsg(fd, &mut entry.msg_hdr, flags & !libc::MSG_WAITFORONE);
            if got < 0 || (got == 0 && i != 0) {
                return if i == 0 { -1 } else { i as c_int };
            }
            entry.msg_len = got as c_uint;
            if flags & libc::MSG_WAITFORONE != 0 {
                flags |= libc::MSG_DONTWAIT;
            }
            if got == 0 || end.left() == Some(0) {
                return i as c_int + 1;
            }
        }
        count.min(1024) as c_int
    }
}

/// # Safety
/// As `sendmmsg(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendmmsg(
    fd: c_int,
    msgs: *mut mmsghdr,
    count: c_uint,
    flags: c_int,
) -> c_int {
    // SAFETY: arguments pass through.
    unsafe {
        if sys::is_bad_pointer(msgs.cast()) {
            return real::sendmmsg(fd, msgs, count, flags);
        }
        if conn::kind(fd) == Kind::Other
            && (0..count.min(1024) as usize).all(|i| (*msgs.add(i)).msg_hdr.msg_controllen == 0)
        {
            return real::sendmmsg(fd, msgs, count, flags);
        }
        for i in 0..count.min(1024) as usize {
            let entry = &mut *msgs.add(i);
            let sent = sendmsg(fd, &entry.msg_hdr, flags);
            if sent < 0 {
                return if i == 0 { -1 } else { i as c_int };
            }
            entry.msg_len = sent as c_uint;
        }
        count.min(1024) as c_int
    }
}

/// # Safety
/// As `sendfile(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendfile(
    out: c_int,
    from: c_int,
    offset: *mut off_t,
    count: size_t,
) -> ssize_t {
    // SAFETY: arguments pass through.
    unsafe {
        send_file(out, from, offset, count, &|| {
            real::sendfile(out, from, offset, count)
        })
    }
}

/// # Safety
/// As `sendfile(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendfile64(
    out: c_int,
    from: c_int,
    offset: *mut off64_t,
    count: size_t,
) -> ssize_t {
    // SAFETY: arguments pass through.
    unsafe {
        send_file(out, from, offset, count, &|| {
            real::sendfile64(out, from, offset, count)
        })
    }
}

/// # Safety
/// `offset` is null or valid.
unsafe fn send_file(
    out: c_int,
    from: c_int,
    offset: *mut off64_t,
    count: size_t,
    in_kernel: &dyn Fn() -> isize,
) -> isize {
    if conn::kind(out) == Kind::Other || conn::kind(from) != Kind::Other || count == 0 {
        return in_kernel();
    }
    transfer(
        out,
        false,
        // SAFETY: the caller vouches for the offset.
        &|held, stream| io::send_file(held, stream, out, from, unsafe { offset.as_mut() }, count),
        in_kernel,
    )
}

/// # Safety
/// As `splice(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn splice(
    from: c_int,
    from_at: *mut off64_t,
    to: c_int,
    to_at: *mut off64_t,
    len: size_t,
    flags: c_uint,
) -> ssize_t {
    // SAFETY: arguments pass through.
    let in_kernel = || unsafe { real::splice(from, from_at, to, to_at, len, flags) };
    if len == 0
        || !from_at.is_null()
        || !to_at.is_null()
        || (conn::of(from).is_some() && conn::of(to).is_some())
    {
        return in_kernel();
    }
    let wait = flags & libc::SPLICE_F_NONBLOCK == 0;
    if conn::kind(to) != Kind::Other {
        transfer(
            to,
            false,
            &|held, stream| io::splice_in(held, stream, to, from, len, wait),
            &in_kernel,
        )
    } else if conn::kind(from) != Kind::Other {
        transfer(
            from,
            true,
            &|held, stream| io::splice_out(held, stream, from, to, len, wait),
            &in_kernel,
        )
    } else {
        in_kernel()
    }
}

unsafe extern "C" {
    fn __chk_fail() -> !;
}

/// Ends the program, as glibc's fortified functions do, when a buffer is smaller than asked.
fn fortify(len: size_t, room: size_t) {
    if len > room {
        // SAFETY: glibc's own end of a program whose buffer overflows.
        unsafe { __chk_fail() }
    }
}

/// # Safety
/// As `read(2)`, with the buffer's size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __read_chk(
    fd: c_int,
    buf: *mut c_void,
    len: size_t,
    room: size_t,
) -> ssize_t {
    fortify(len, room);
    // SAFETY: as the caller says.
    unsafe { read(fd, buf, len) }
}

/// # Safety
/// As `recv(2)`, with the buffer's size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __recv_chk(
    fd: c_int,
    buf: *mut c_void,
    len: size_t,
    room: size_t,
    flags: c_int,
) -> ssize_t {
    fortify(len, room);
    // SAFETY: as the caller says.
    unsafe { recv(fd, buf, len, flags) }
}

/// # Safety
/// As `recvfrom(2)`, with the buffer's size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __recvfrom_chk(
    fd: c_int,
    buf: *mut c_void,
    len: size_t,
    room: size_t,
    flags: c_int,
    from: *mut sockaddr,
    from_len: *mut socklen_t,
) -> ssize_t {
    fortify(len, room);
    // SAFETY: as the caller says.
    unsafe { recvfrom(fd, buf, len, flags, from, from_len) }
}

/// # Safety
/// As `poll(2)`, with the array's size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __poll_chk(
    fds: *mut pollfd,
    count: nfds_t,
    ms: c_int,
    room: size_t,
) -> c_int {
    fortify(count as usize, room / size_of::<pollfd>());
    // SAFETY: as the caller says.
    unsafe { poll(fds, count, ms) }
}

/// # Safety
/// As `ppoll(2)`, with the array's size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __ppoll_chk(
    fds: *mut pollfd,
    count: nfds_t,
    limit: *const timespec,
    mask: *const sigset_t,
    room: size_t,
) -> c_int {
    fortify(count as usize, room / size_of::<pollfd>());
    // SAFETY: as the caller says.
    unsafe { ppoll(fds, count, limit, mask) }
}

/// # Safety
/// As `poll(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn poll(fds: *mut pollfd, count: nfds_t, ms: c_int) -> c_int {
    // SAFETY: arguments pass through; bad ones are the kernel's to refuse.
    unsafe {
        if sys::is_bad_pointer(fds.cast())
            || count > conn::FDS as nfds_t
            || !poll::concerns(fds, count)
        {
            return real::poll(fds, count, ms);
        }
        let ns = u64::try_from(ms).ok().map(|ms| ms * 1_000_000);
        poll::ppoll(fds, count as usize, ns, std::ptr::null())
    }
}

/// # Safety
/// As `ppoll(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ppoll(
    fds: *mut pollfd,
    count: nfds_t,
    limit: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: as in `poll`.
    unsafe {
        match nanoseconds_of(limit) {
            Ok(ns)
                if !sys::is_bad_pointer(fds.cast())
                    && count <= conn::FDS as nfds_t
                    && poll::concerns(fds, count) =>
            {
                poll::ppoll(fds, count as usize, ns, mask)
            }
            _ => real::ppoll(fds, count, limit, mask),
        }
    }
}

/// # Safety
/// As `select(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn select(
    count: c_int,
    read: *mut fd_set,
    write: *mut fd_set,
    except: *mut fd_set,
    limit: *mut timeval,
) -> c_int {
    let sets = Sets {
        count: count.max(0) as usize,
        sets: [read, write, except],
    };
    if !sets.concern() {
        // SAFETY: arguments pass through.
        return unsafe { real::select(count, read, write, except, limit) };
    }
    // SAFETY: null or valid, as the caller says.
    let Some(limit) = (unsafe { limit.as_mut() }) else {
        return sets.select(None, std::ptr::null());
    };
    if limit.tv_sec < 0 || limit.tv_usec < 0 {
        sys::set_errno(libc::EINVAL);
        return -1;
    }
    let ns = (limit.tv_sec as u64)
        .saturating_mul(1_000_000_000)
        .saturating_add(limit.tv_usec as u64 * 1000);
    let deadline = poll::Deadline::after(Some(ns));
    let result = sets.select(Some(ns), std::ptr::null());
    // Linux says how much time was left.
    let left = deadline.left().unwrap_or(0);
    limit.tv_sec = (left / 1_000_000_000) as i64;
    limit.tv_usec = (left % 1_000_000_000 / 1000) as i64;
    result
}

/// # Safety
/// As `pselect(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pselect(
    count: c_int,
    read: *mut fd_set,
    write: *mut fd_set,
    except: *mut fd_set,
    limit: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    let sets = Sets {
        count: count.max(0) as usize,
        sets: [read, write, except],
    };
    // SAFETY: arguments pass through.
    unsafe {
        match nanoseconds_of(limit) {
            Ok(ns) if sets.concern() => sets.select(ns, mask),
            _ => real::pselect(count, read, write, except, limit, mask),
        }
    }
}

/// # Safety
/// As `epoll_create(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn epoll_create(size: c_int) -> c_int {
    // SAFETY: arguments pass through.
    made_epoll(unsafe { real::epoll_create(size) })
}

/// # Safety
/// As `epoll_create1(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn epoll_create1(flags: c_int) -> c_int {
    // SAFETY: arguments pass through.
    made_epoll(unsafe { real::epoll_create1(flags) })
}

fn made_epoll(fd: c_int) -> c_int {
    if fd >= 0 && process::is_ready() && !process::is_foreign() {
        epoll::track(fd);
    }
    fd
}

/// # Safety
/// As `epoll_ctl(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn epoll_ctl(
    epfd: c_int,
    op: c_int,
    fd: c_int,
    event: *mut epoll_event,
) -> c_int {
    // SAFETY: arguments pass through.
    unsafe {
        match epoll::ctl(epfd, op, fd, event) {
            Some(result) => result,
            None => real::epoll_ctl(epfd, op, fd, event),
        }
    }
}

/// # Safety
/// As `epoll_wait(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn epoll_wait(
    epfd: c_int,
    events: *mut epoll_event,
    most: c_int,
    ms: c_int,
) -> c_int {
    let ns = u64::try_from(ms).ok().map(|ms| ms * 1_000_000);
    // SAFETY: arguments pass through.
    unsafe {
        epoll::wait_on(epfd, events, most, ns, std::ptr::null(), || {
            real::epoll_wait(epfd, events, most, ms)
        })
    }
}

/// # Safety
/// As `epoll_pwait(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn epoll_pwait(
    epfd: c_int,
    events: *mut epoll_event,
    most: c_int,
    ms: c_int,
    mask: *const sigset_t,
) -> c_int {
    let ns = u64::try_from(ms).ok().map(|ms| ms * 1_000_000);
    // SAFETY: arguments pass through.
    unsafe {
        epoll::wait_on(epfd, events, most, ns, mask, || {
            real::epoll_pwait(epfd, events, most, ms, mask)
        })
    }
}

/// # Safety
/// As `epoll_pwait2(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn epoll_pwait2(
    epfd: c_int,
    events: *mut epoll_event,
    most: c_int,
    limit: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: arguments pass through.
    unsafe {
        let kernel = || real::epoll_pwait2(epfd, events, most, limit, mask);
        match nanoseconds_of(limit) {
            Ok(ns) => epoll::wait_on(epfd, events, most, ns, mask, kernel),
            Err(()) => kernel(),
        }
    }
}

/// # Safety
/// As `socket(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    // SAFETY: arguments pass through.
    let fd = unsafe { real::socket(domain, kind, protocol) };
    if fd >= 0 && process::is_ready() {
        let tcp = matches!(domain, libc::AF_INET | libc::AF_INET6)
            && kind & 0xf == libc::SOCK_STREAM
            && matches!(protocol, 0 | libc::IPPROTO_TCP);
        if process::is_foreign() {
            return fd;
        }
        if tcp {
            conn::track(fd, born::NOT_YET);
        } else if conn::kind(fd) != Kind::Other {
            conn::replace(fd, Kind::Other);
        }
    }
    fd
}

/// # Safety
/// As `bind(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bind(fd: c_int, address: *const sockaddr, len: socklen_t) -> c_int {
    // SAFETY: arguments pass through: a port is the kernel's to give.
    unsafe { real::bind(fd, address, len) }
}

/// # Safety
/// As `listen(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn listen(fd: c_int, backlog: c_int) -> c_int {
    // SAFETY: arguments pass through.
    let result = unsafe { real::listen(fd, backlog) };
    if result == 0 && matches!(conn::kind(fd), Kind::Conn(_)) {
        tenant::ensure();
    }
    result
}

/// # Safety
/// As `connect(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn connect(fd: c_int, address: *const sockaddr, len: socklen_t) -> c_int {
    if !sys::is_bad_pointer(address.cast())
        && len as usize >= size_of::<libc::sa_family_t>()
        // SAFETY: an address of the length given, as the caller says.
        && unsafe { (*address).sa_family } as c_int == libc::AF_UNSPEC
        && matches!(conn::kind(fd), Kind::Conn(_))
    {
        return disconnect(fd, address, len);
    }
    let held = conn::of(fd);
    if held.is_some() {
        tenant::ensure();
    }
    // SAFETY: arguments pass through.
    let result = unsafe { real::connect(fd, address, len) };
    if let Some(held) = held {
        let error = sys::errno();
        if result == 0 || matches!(error, libc::EINPROGRESS | libc::EINTR) {
            let _ = held
                .conn
                .born
                .compare_exchange(born::NOT_YET, born::ACTIVE, AcqRel, Relaxed);
        }
        sys::set_errno(error);
    }
    result
}

/// `connect` to no address: the connection is reset, and the socket is as new.
fn disconnect(fd: c_int, address: *const sockaddr, len: socklen_t) -> c_int {
    if let Some(held) = conn::of(fd)
        && let Some(stream) = held.conn.stream()
    {
        stream.reset(fd, Reason::Call);
    }
    conn::replace(fd, Kind::Other);
    // SAFETY: arguments pass through.
    let result = unsafe { real::connect(fd, address, len) };
    if let Some(index) = conn::track(fd, born::NOT_YET)
        && let Some(conn) = conn::at(index)
    {
        conn.keep_on_kernel(index, Reason::Call);
    }
    result
}

/// # Safety
/// As `accept(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn accept(fd: c_int, address: *mut sockaddr, len: *mut socklen_t) -> c_int {
    // SAFETY: arguments pass through.
    accepted(fd, unsafe { real::accept(fd, address, len) })
}

/// # Safety
/// As `accept4(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn accept4(
    fd: c_int,
    address: *mut sockaddr,
    len: *mut socklen_t,
    flags: c_int,
) -> c_int {
    // SAFETY: arguments pass through.
    accepted(fd, unsafe { real::accept4(fd, address, len, flags) })
}

fn accepted(listener: c_int, fd: c_int) -> c_int {
    if fd < 0 || !process::is_ready() || process::is_foreign() {
        return fd;
    }
    let error = sys::errno();
    if matches!(conn::kind(listener), Kind::Conn(_)) || process::is_tcp(fd) {
        tenant::ensure();
        conn::track(fd, born::PASSIVE);
    } else if conn::kind(fd) != Kind::Other {
        conn::replace(fd, Kind::Other);
    }
    sys::set_errno(error);
    fd
}

/// # Safety
/// As `shutdown(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn shutdown(fd: c_int, how: c_int) -> c_int {
    if let Some(held) = conn::of(fd) {
        match demote::shutdown(&held, fd, how) {
            Some(0) => return 0,
            Some(error) => {
                sys::set_errno(error);
                return -1;
            }
            None => {}
        }
        if held.conn.stream().is_none() {
            held.conn.keep_on_kernel(held.index, Reason::Call);
        }
    }
    // SAFETY: arguments pass through.
    unsafe { real::shutdown(fd, how) }
}

/// Before an fd of the program is closed, whichever way: what stands behind it is let go. False
/// when it is not the program's to close.
fn closing(fd: c_int) -> bool {
    match conn::kind(fd) {
        Kind::Other => true,
        _ if process::is_foreign() => true,
        Kind::Internal => false,
        Kind::Conn(_) => {
            if let Some(held) = conn::of(fd)
                && held.conn.refs.load(Acquire) == 1
            {
                demote::before_close(&held, fd);
            } else if let Some(held) = conn::of(fd) {
                epoll::renumber(&held, fd);
            }
            conn::replace(fd, Kind::Other);
            true
        }
        Kind::Epoll(_) => {
            conn::replace(fd, Kind::Other);
            true
        }
    }
}

/// # Safety
/// As `close(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    if !closing(fd) {
        sys::set_errno(libc::EBADF);
        return -1;
    }
    // SAFETY: arguments pass through.
    unsafe { real::close(fd) }
}

/// # Safety
/// As `close_range(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    const UNSHARE: c_int = 2;
    const CLOEXEC: c_int = 4;
    if first > last
        || flags & !(UNSHARE | CLOEXEC) != 0
        || flags & CLOEXEC != 0
        || process::is_foreign()
        || !process::is_ready()
    {
        // SAFETY: arguments pass through.
        return unsafe { real::close_range(first, last, flags) };
    }
    // The shim's own descriptors stay: the range is closed piece by piece around them.
    let end = (last as usize).min(conn::FDS - 1) as c_uint;
    let mut start = first;
    let mut fd = first;
    while fd <= end {
        if closing(fd as c_int) {
            fd += 1;
            continue;
        }
        if fd > start {
            // SAFETY: a piece of the program's range.
            unsafe { real::close_range(start, fd - 1, flags) };
        }
        fd += 1;
        start = fd;
    }
    if start > last {
        return 0;
    }
    // SAFETY: the rest of the program's range.
    unsafe { real::close_range(start, last, flags) }
}

/// # Safety
/// As `closefrom(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn closefrom(first: c_int) {
    // SAFETY: any numbers are sound.
    unsafe { close_range(first.max(0) as c_uint, c_uint::MAX, 0) };
}

fn duplicated(old: c_int, new: c_int) -> c_int {
    if new < 0 || process::is_foreign() {
        return new;
    }
    match conn::kind(old) {
        Kind::Conn(index) => conn::add_ref(new, index),
        Kind::Epoll(index) => epoll::add_ref(new, index),
        _ if conn::kind(new) != Kind::Other => conn::replace(new, Kind::Other),
        _ => {}
    }
    new
}

/// # Safety
/// As `dup(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup(fd: c_int) -> c_int {
    // SAFETY: arguments pass through.
    duplicated(fd, unsafe { real::dup(fd) })
}

/// The number that a descriptor is to be copied to is about to be taken. False: EBADF.
fn making_room(old: c_int, new: c_int) -> bool {
    if process::is_foreign() || old == new {
        return true;
    }
    if conn::kind(old) == Kind::Internal {
        sys::set_errno(libc::EBADF);
        return false;
    }
    if conn::kind(new) == Kind::Internal {
        tenant::move_hidden(new);
    } else if sys::fcntl(old, libc::F_GETFD, 0) >= 0 {
        closing(new);
        // stdin, stdout and stderr are used by stdio, behind the shim's back.
        if new <= 2
            && let Some(held) = conn::of(old)
        {
            demote::abandon(&held, old, Reason::Stdio);
        }
    }
    true
}

/// # Safety
/// As `dup2(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup2(old: c_int, new: c_int) -> c_int {
    if !making_room(old, new) {
        return -1;
    }
    // SAFETY: arguments pass through.
    let result = unsafe { real::dup2(old, new) };
    if old == new {
        result
    } else {
        duplicated(old, result)
    }
}

/// # Safety
/// As `dup3(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
    if !making_room(old, new) {
        return -1;
    }
    // SAFETY: arguments pass through.
    let result = unsafe { real::dup3(old, new, flags) };
    if old == new {
        result
    } else {
        duplicated(old, result)
    }
}

/// Records a copy made by `fcntl(F_DUPFD)`.
pub fn copied(old: c_int, new: c_int) -> c_int {
    duplicated(old, new)
}

/// # Safety
/// As `fdopen(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdopen(fd: c_int, mode: *const libc::c_char) -> *mut libc::FILE {
    // SAFETY: arguments pass through; the mode is a C string.
    unsafe {
        let file = real::fdopen(fd, mode);
        let Some(held) = conn::of(fd) else {
            return file;
        };
        if file.is_null() {
            return file;
        }
        // stdio reads and writes behind the shim's back: the connection becomes the kernel's, and
        // what was received already goes into the stream's own buffer.
        let reads = std::ffi::CStr::from_ptr(mode)
            .to_bytes()
            .iter()
            .any(|byte| matches!(byte, b'r' | b'+'));
        if reads && let Some(stream) = held.conn.stream() {
            stdio_takes(&held, stream, fd, file);
        }
        demote::abandon(&held, fd, Reason::Stdio);
        file
    }
}

unsafe extern "C" {
    fn rdsock_stdio_take(file: *mut libc::FILE, bytes: *const libc::c_char, len: size_t) -> c_int;
}

/// Puts what is in the ring into a stdio stream's buffer.
fn stdio_takes(held: &Use, stream: &Stream, fd: c_int, file: *mut libc::FILE) {
    let Some(unread) = io::unread(stream, fd).filter(|unread| *unread > 0) else {
        return;
    };
    let Some(bytes) = sys::map(-1, unread as usize) else {
        return;
    };
    let part = one(bytes.cast(), unread as usize);
    // SAFETY: the mapping has room for what is asked; it is unmapped when nobody uses it.
    unsafe {
        if let Ok(buffers) = Buffers::new(&part, 1, 0)
            && let Outcome::Done(got) = io::recv(held, stream, fd, &buffers, libc::MSG_DONTWAIT)
            && got > 0
        {
            rdsock_stdio_take(file, bytes.cast(), got.max(0) as usize);
        }
        sys::unmap(bytes, unread as usize);
    }
}

/// `write` of a whole text, for `dprintf`.
///
/// # Safety
/// `text` is valid for reads of `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdsock_write_all(
    fd: c_int,
    text: *const libc::c_char,
    len: size_t,
) -> c_int {
    let mut done = 0;
    while done < len {
        // SAFETY: the rest of the text.
        let sent = unsafe { write(fd, text.add(done).cast(), len - done) };
        if sent < 0 {
            return -1;
        }
        done += sent as usize;
    }
    len as c_int
}

/// Whether stdio must not write to this fd by itself.
#[unsafe(no_mangle)]
pub extern "C" fn rdsock_is_ours(fd: c_int) -> c_int {
    c_int::from(matches!(conn::kind(fd), Kind::Conn(_)))
}

/// # Safety
/// As `sockatmark(3)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sockatmark(fd: c_int) -> c_int {
    // Urgent data makes its sender leave the rings, so the kernel knows the mark, once what came on
    // the ring before it has been read.
    if let Some(held) = conn::of(fd)
        && let Some(stream) = held.conn.stream()
        && demote::is_on_rings(stream)
    {
        demote::settle_incoming(&held, stream, fd);
        if stream.has_unread_ring() {
            return 0;
        }
    }
    // SAFETY: arguments pass through.
    unsafe { real::sockatmark(fd) }
}
