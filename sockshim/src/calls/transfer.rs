//! What the calls that move bytes have in common: on the stream when there is one, else in the
//! kernel, and counted there, so that no stream is set up meanwhile.

use crate::conn::{self, Use, phase};
use crate::io::{self, InKernel, Outcome};
use crate::signals::{self, Ended, Interrupted};
use crate::stream::Stream;
use crate::{demote, limits, real, rest, sys, tenant};
use libc::{c_int, c_void, iovec, size_t};
use rdsock_shm::reason::Reason;
use std::sync::atomic::Ordering::*;

/// Where a call moves bytes, as its program sees it.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Moves {
    Out,
    /// It may wait for them.
    In {
        waits: bool,
    },
}

type StreamCall<'a> = &'a dyn for<'s> Fn(&'s Use, &'s Stream) -> Outcome<'s>;

/// A call that moves bytes: on the stream when there is one, else in the kernel, counted in so that
/// no stream is set up meanwhile.
#[inline]
pub(super) fn transfer(
    fd: c_int,
    moves: Moves,
    on_stream: StreamCall<'_>,
    in_kernel: &dyn Fn() -> isize,
) -> isize {
    let Some(held) = conn::of(fd) else {
        return in_kernel();
    };
    loop {
        if let Some(stream) = held.conn.stream() {
            return match on_stream(&held, stream) {
                Outcome::Done(result) => real::to_c(result),
                Outcome::Kernel(counted) => on_anchor(&held, stream, fd, moves, counted, in_kernel),
            };
        }
        if let Some(result) = without_stream(&held, fd, moves, in_kernel) {
            return result;
        }
    }
}

/// A call that a stream hands back, `counted` in there: made on the anchor.
#[inline(never)]
fn on_anchor(
    held: &Use,
    stream: &Stream,
    fd: c_int,
    moves: Moves,
    counted: Option<InKernel<'_>>,
    in_kernel: &dyn Fn() -> isize,
) -> isize {
    if let Moves::In { waits } = moves
        && stream.has_rest()
        && let Err(error) = rest::for_bytes(&stream.at(held, fd), held, waits)
    {
        return real::to_c(error);
    }
    let result = in_kernel();
    if result < 0 && moves == Moves::Out && tells_break(stream, real::errno()) {
        // It is told once, whatever marks say of it.
        stream.at(held, fd).take_send_error();
    }
    if counted.is_some() {
        let error = real::errno();
        if result < 0 && error == libc::EAGAIN {
            held.conn.note_refused();
        }
        drop(counted);
        io::after_kernel_send(held, stream, fd);
        real::set_errno(error);
    }
    result
}

/// True for an error of the kernel's that tells of a break. Behind the other end's FIN that is EPIPE, which says nothing where the
/// program has ended its direction itself.
fn tells_break(stream: &Stream, error: c_int) -> bool {
    error == libc::ECONNRESET || error == libc::EPIPE && stream.tx().shut.load(Acquire) == 0
}

/// A call on a connection that has no stream, counted in. `None` where one has come: to be tried again.
#[inline(never)]
fn without_stream(
    held: &Use,
    fd: c_int,
    moves: Moves,
    in_kernel: &dyn Fn() -> isize,
) -> Option<isize> {
    let mut signals = None;
    if moves == (Moves::In { waits: true }) && held.conn.offered.load(Relaxed) != 0 {
        signals = match give_way_to_offer(held, fd) {
            Ok(signals) => signals,
            Err(Interrupted) => return Some(real::to_c(-(libc::EINTR as isize))),
        };
    }
    if moves != Moves::Out {
        tenant::stay_attached();
    }
    let counted = InKernel::enter(match moves {
        Moves::In { .. } => &held.conn.in_rx,
        Moves::Out => &held.conn.in_tx,
    });
    match held.conn.phase.load(SeqCst) {
        phase::INSTALLING => {
            drop(counted);
            sys::sched_yield();
            return None;
        }
        phase::MAPPED => return None,
        _ => {}
    }
    if let Some(signals) = signals
        && wait_in_kernel(signals, fd) == Err(Interrupted)
    {
        drop(counted);
        return Some(real::to_c(-(libc::EINTR as isize)));
    }
    let result = in_kernel();
    drop(counted);
    let error = real::errno();
    tenant::after_call(held.index, held.conn, fd, result);
    real::set_errno(error);
    Some(result)
}

/// Looks for bytes while not counted in, for a while: an offer is followed when nobody is inside the kernel, and
/// where one thread waits for bytes and another one for space, somebody always would be. A signal ends it where
/// the kernel's own receive would have been interrupted. What is left is held back, until the call goes on to [`wait_in_kernel`].
#[cold]
fn give_way_to_offer(held: &Use, fd: c_int) -> Result<Option<signals::Held>, Interrupted> {
    let error = real::errno();
    let timeout: Option<libc::timeval> = sys::getsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO);
    let is_limited = timeout.is_none_or(|limit| limit.tv_sec != 0 || limit.tv_usec != 0);
    if is_limited || sys::poll_one(fd, libc::POLLIN, 0) != 0 {
        return Ok(None);
    }
    let mut signals = signals::Held::hold(Ended::ByInterrupting);
    for _ in 0..limits::GIVE_WAY_TURNS.get() {
        if held.conn.offered.load(Relaxed) == 0 || !waits(fd) {
            break;
        }
        let turn = limits::GIVE_WAY_MS.get() * 1_000_000;
        let (again, is_there) = signals.wait(fd, libc::POLLIN, Some(turn))?;
        signals = again;
        if is_there {
            break;
        }
    }
    real::set_errno(error);
    Ok(Some(signals))
}

/// The same receive goes on, counted in: until the kernel's own would not wait any more.
fn wait_in_kernel(mut signals: signals::Held, fd: c_int) -> Result<(), Interrupted> {
    while waits(fd) && sys::poll_one(fd, libc::POLLIN, 0) == 0 {
        (signals, _) = signals.wait(fd, libc::POLLIN, None)?;
    }
    Ok(())
}

/// True unless the descriptor does not wait.
fn waits(fd: c_int) -> bool {
    sys::fcntl(fd, libc::F_GETFL, 0) & libc::O_NONBLOCK as isize == 0
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
pub(super) unsafe fn receive(
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
        match unsafe { io::buffers(parts, count, flags) } {
            Ok(buffers) => match io::recv(held, stream, fd, &buffers, flags) {
                Outcome::Done(result) => result,
                Outcome::Kernel(_) => isize::MIN,
            },
            Err(error) => error,
        }
    };
    transfer(
        fd,
        Moves::In {
            waits: flags & libc::MSG_DONTWAIT == 0,
        },
        &|held, stream| match on_stream(held, stream) {
            isize::MIN => Outcome::Kernel(None),
            result => Outcome::Done(result),
        },
        in_kernel,
    )
}

/// # Safety
/// As [`receive`].
pub(super) unsafe fn transmit(
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
        Moves::Out,
        // SAFETY: the caller vouches for the entries.
        &|held, stream| match unsafe { io::buffers(parts, count, flags) } {
            Ok(buffers) => io::send(held, stream, fd, &buffers, flags),
            Err(error) => Outcome::Done(error),
        },
        in_kernel,
    )
}

pub(super) fn one(buf: *const c_void, len: size_t) -> iovec {
    iovec {
        iov_base: buf.cast_mut(),
        iov_len: len.min(isize::MAX as usize),
    }
}

pub(super) const IOV_MAX: c_int = 1024;
