//! `send`, `recv` and their kin: the calls that only sockets take, with flags, addresses, messages
//! and the descriptors that messages pass.

use super::transfer::{IOV_MAX, one, receive, transmit};
use crate::conn::{self, Kind};
use crate::deadline::{Deadline, nanoseconds_of};
use crate::known::TCP_INQ;
use crate::tcp_info::TcpInfo;
use crate::{demote, handing_over, io, numbers, real, sys};
use libc::{
    c_int, c_uint, c_void, mmsghdr, msghdr, size_t, sockaddr, socklen_t, ssize_t, timespec,
};
use rdsock_shm::layout::{anchor, mark};
use rdsock_shm::reason::Reason;
use std::cell::Cell;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// # Safety
/// As `recv(2)`.
pub unsafe fn recv(fd: c_int, buf: *mut c_void, len: size_t, flags: c_int) -> ssize_t {
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
pub unsafe fn send(fd: c_int, buf: *const c_void, len: size_t, flags: c_int) -> ssize_t {
    // SAFETY: as in `read`.
    unsafe {
        if conn::kind(fd) == Kind::Other {
            handing_over::telling(fd, &one(buf, len), 1);
            return real::send(fd, buf, len, flags);
        }
        transmit(fd, &one(buf, len), 1, flags, &|| {
            real::send(fd, buf, len, flags)
        })
    }
}

/// # Safety
/// As `recvfrom(2)`.
pub unsafe fn recvfrom(
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
        let in_kernel = Cell::new(false);
        let result = receive(fd, &one(buf, len), 1, flags, &|| {
            in_kernel.set(true);
            real::recvfrom(fd, buf, len, flags, from, from_len)
        });
        // TCP names no sender.
        if result >= 0 && !in_kernel.get() && !from.is_null() && !from_len.is_null() {
            *from_len = 0;
        }
        result
    }
}

/// # Safety
/// As `sendto(2)`.
pub unsafe fn sendto(
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
            handing_over::telling(fd, &one(buf, len), 1);
            return real::sendto(fd, buf, len, flags, to, to_len);
        }
        transmit(fd, &one(buf, len), 1, flags, &|| {
            real::sendto(fd, buf, len, flags, to, to_len)
        })
    }
}

/// # Safety
/// As `recvmsg(2)`.
pub unsafe fn recvmsg(fd: c_int, msg: *mut msghdr, flags: c_int) -> ssize_t {
    // SAFETY: arguments pass through; a header is only read when it is not null.
    unsafe {
        // The kernel fills what the program gave it. Whether there is a stream afterwards does not say so: it may have come
        // or gone meanwhile.
        let by_kernel = Cell::new(false);
        let in_kernel = || {
            by_kernel.set(true);
            real::recvmsg(fd, msg, flags)
        };
        if conn::kind(fd) == Kind::Other {
            let result = in_kernel();
            if result >= 0 && (*msg).msg_controllen != 0 {
                each_passed(msg, |fd| {
                    numbers::replace(fd, Kind::Other);
                });
            }
            return result;
        }
        if sys::is_bad_pointer(msg.cast()) || (*msg).msg_iovlen > IOV_MAX as usize {
            return in_kernel();
        }
        let result = receive(fd, (*msg).msg_iov, (*msg).msg_iovlen, flags, &in_kernel);
        // Bytes of the ring come alone, whatever the stream has become meanwhile.
        if result >= 0 && !by_kernel.get() {
            let header = &mut *msg;
            header.msg_namelen = 0;
            header.msg_flags = flags & libc::MSG_CMSG_CLOEXEC;
            let room = std::mem::take(&mut header.msg_controllen);
            let has_room = (0..header.msg_iovlen).any(|i| (*header.msg_iov.add(i)).iov_len != 0);
            let is_at_end = result == 0 && has_room;
            if let Some(unread) = unread_to_tell(fd, is_at_end) {
                put_unread(header, room, unread);
            }
        }
        result
    }
}

/// What `TCP_INQ` tells with each message, where the program has set it: the bytes that are left, and one more for the
/// end. `is_at_end`: the message was the end.
fn unread_to_tell(fd: c_int, is_at_end: bool) -> Option<c_int> {
    let held = conn::of(fd)?;
    if held.conn.options.load(Relaxed) & conn::TELLS_UNREAD == 0 {
        return None;
    }
    let stream = held.conn.stream()?;
    let unread =
        io::unread(&stream.at(&held, fd)).or_else(|| sys::ioctl_int(fd, libc::FIONREAD))?;
    let rx = stream.rx();
    let ended = stream.incoming().producer.mark.load(Acquire) & mark::FIN != 0
        || !stream.is_all_on_rings()
            && match TcpInfo::of(fd)?.state {
                TcpInfo::CLOSE_WAIT => true,
                // A break came behind the end; or there was no end, and it was told as an error before.
                TcpInfo::CLOSE => {
                    is_at_end
                        && rx.anchor.load(Acquire) & anchor::BROKEN == 0
                        && rx.shut.load(Acquire) == 0
                }
                _ => false,
            };
    Some(unread + c_int::from(ended))
}

/// Puts the control message of `TCP_INQ` into a header whose control part has so much room, as the kernel does.
///
/// # Safety
/// A valid message header.
unsafe fn put_unread(header: &mut msghdr, room: usize, unread: c_int) {
    let head = size_of::<libc::cmsghdr>();
    let whole = head + size_of::<c_int>();
    if header.msg_control.is_null() || room < whole {
        header.msg_flags |= libc::MSG_CTRUNC;
    }
    if header.msg_control.is_null() || room < head {
        return;
    }
    let fitting = room.min(whole);
    let item = header.msg_control.cast::<libc::cmsghdr>();
    // SAFETY: there is room for the item and for the part of the int behind it, as was just seen.
    unsafe {
        item.write_unaligned(libc::cmsghdr {
            cmsg_len: fitting as _,
            cmsg_level: libc::IPPROTO_TCP,
            cmsg_type: TCP_INQ,
        });
        let bytes = unread.to_ne_bytes();
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), item.add(1).cast(), fitting - head);
    }
    header.msg_controllen = room.min(whole.next_multiple_of(size_of::<usize>()));
}

/// # Safety
/// As `sendmsg(2)`.
pub unsafe fn sendmsg(fd: c_int, msg: *const msghdr, flags: c_int) -> ssize_t {
    // SAFETY: arguments pass through; a header is only read when it is not null.
    unsafe {
        let in_kernel = || real::sendmsg(fd, msg, flags);
        if conn::kind(fd) == Kind::Other {
            if !sys::is_bad_pointer(msg.cast()) {
                handing_over::telling(fd, (*msg).msg_iov, (*msg).msg_iovlen);
            }
            if !msg.is_null() && (*msg).msg_controllen != 0 {
                each_passed(msg, |passed| {
                    if let Some(held) = conn::of(passed) {
                        held.conn.shared.store(1, Release);
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

/// # Safety
/// As `recvmmsg(2)`.
pub unsafe fn recvmmsg(
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
            Ok(limit) => Deadline::after(limit),
            Err(error) => return real::told(error),
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
pub unsafe fn sendmmsg(fd: c_int, msgs: *mut mmsghdr, count: c_uint, flags: c_int) -> c_int {
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
