//! Messages over the control connection: sent without waiting, and read when the daemon's count of
//! them has moved.

use super::ask::{self, Answer, deliver};
use super::attach::{self, detach, disable, is_greeting_due, refused_for_now};
use super::link::link;
use super::lock::Guard;
use super::memory::{memory, own, show, take_board};
use super::offer::follow;
use super::requests::tell_untold;
use crate::conn::{self, phase};
use crate::stream::Offer;
use crate::{clock, sys};
use libc::c_int;
use rdsock_shm::control::{self, Message, NotFound, Refused, Verdict, kind, refusal};
use rdsock_shm::reason::{Reason, State};
use std::sync::atomic::Ordering::*;

pub(super) fn send_with(socket: c_int, message: &Message, fds: &[c_int]) -> isize {
    let bytes = message.as_bytes();
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr() as *mut _,
        iov_len: bytes.len(),
    };
    let mut room = [0_u64; 8];
    // SAFETY: a header made of integers and pointers; zeroes are a value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut part;
    header.msg_iovlen = 1;
    if !fds.is_empty() && fds.len() <= 3 {
        header.msg_control = room.as_mut_ptr().cast();
        // SAFETY: the room is aligned and large enough for three fds; the CMSG macros stay in it.
        unsafe {
            header.msg_controllen = libc::CMSG_SPACE(size_of_val(fds) as u32) as _;
            let item = libc::CMSG_FIRSTHDR(&header);
            (*item).cmsg_level = libc::SOL_SOCKET;
            (*item).cmsg_type = libc::SCM_RIGHTS;
            (*item).cmsg_len = libc::CMSG_LEN(size_of_val(fds) as u32) as _;
            std::ptr::copy_nonoverlapping(fds.as_ptr(), libc::CMSG_DATA(item).cast(), fds.len());
        }
    }
    // SAFETY: the header points to the locals above.
    unsafe { sys::sendmsg(socket, &header, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) }
}

/// Reads what the daemon has sent, if it has sent something. Of its greeting no memory tells.
#[inline]
pub fn look() {
    if conn::has_untold() {
        tell_untold();
    }
    if let Some(memory) = memory()
        && (memory.header.messages.load(Relaxed) != own().seen.load(Relaxed) || is_greeting_due())
        && let Some(guard) = Guard::take()
    {
        read_messages(&guard);
    }
}

/// Reads all that has come.
#[cold]
pub(super) fn read_messages(guard: &Guard) {
    let Some(memory) = memory() else {
        return;
    };
    let control = link().control.load(Relaxed);
    if control < 0 {
        return;
    }
    own()
        .seen
        .store(memory.header.messages.load(Acquire), Relaxed);
    let mut was_reset = false;
    let mask = sys::block_signals();
    // A message may lead to something that finds the daemon gone.
    while link().control.load(Relaxed) == control {
        let mut bytes = [0_u8; 256];
        let (got, fds) = receive(control, &mut bytes);
        if got == -(libc::ECONNRESET as isize) && !was_reset {
            // Told once, and before what the daemon had to say to the end.
            was_reset = true;
            continue;
        }
        if got <= 0 {
            if got == 0 || got == -(libc::ECONNRESET as isize) {
                detach();
            }
            break;
        }
        let fds_of = |fds: [c_int; 3]| {
            fds.into_iter().filter(|fd| *fd >= 0).for_each(|fd| {
                sys::close(fd);
            })
        };
        let Some((message, body)) = bytes
            .get(..got as usize)
            .and_then(|bytes| control::parse(bytes).ok())
        else {
            fds_of(fds);
            continue;
        };
        match message {
            kind::PROMOTE => {
                if let Some(promote) = control::from_bytes(body)
                    && fds.iter().take(2).all(|fd| *fd >= 0)
                {
                    follow(guard, Offer { promote, fds });
                    continue;
                }
            }
            kind::VERDICT => {
                if let Some(verdict) = control::from_bytes(body) {
                    take_verdict(&verdict);
                }
            }
            kind::REACHED => {
                if let Some(reached) = control::from_bytes(body) {
                    deliver(guard, Answer::Reached(reached));
                }
            }
            kind::CALLER => {
                if let Some(caller) = control::from_bytes(body) {
                    deliver(guard, Answer::Caller(caller));
                }
            }
            kind::WELCOME => {
                if let Some(welcome) = control::from_bytes(body) {
                    ask::welcomed(&welcome);
                    link().judges.store(welcome.judges, Relaxed);
                }
                let [memory, board, _] = fds;
                if board >= 0 && take_board(guard, board) {
                    welcomed(guard, control, memory);
                    fds_of([memory, -1, -1]);
                    continue;
                }
                welcomed(guard, control, memory);
            }
            kind::NOT_FOUND => {
                if let Some(not_found) = control::from_bytes(body) {
                    end_look_up(&not_found);
                }
            }
            kind::REFUSED => refused(control::from_bytes(body)),
            _ => {}
        }
        fds_of(fds);
    }
    sys::restore_signals(mask);
}

/// The daemon has sent this memory. Where it can't be used, the daemon is asked again after a while.
fn welcomed(guard: &Guard, control: c_int, memory: c_int) {
    match show(guard, memory) {
        Some(address) => attach::welcomed(control, address),
        None => refused_for_now(),
    }
}

/// The daemon's "no" to a look-up: who asked sees it in the connection's phase. One that comes when nobody waits for it
/// any more is of an older generation, or finds the phase another one.
fn end_look_up(not_found: &NotFound) {
    let Some(held) = conn::by_index(not_found.conn as usize) else {
        return;
    };
    let conn = held.conn;
    if conn.generation.load(Relaxed) == not_found.generation {
        let _ = conn
            .phase
            .compare_exchange(phase::ANNOUNCED, phase::KERNEL, AcqRel, Relaxed);
    }
}

/// The daemon does not take this process: not now where a limit is reached, or as who it was, else never.
fn refused(refused: Option<Refused>) {
    if refused.is_some_and(|refused| refused.code == refusal::IDENTITY) {
        // It has changed its user, say. It attaches anew as who it is now.
        return refused_for_now();
    }
    let limit = refused.filter(|refused| refused.code == refusal::LIMIT);
    if limit.is_some() {
        refused_for_now();
    } else {
        disable(Reason::Refused);
        link().awaited.store(0, Relaxed);
    }
    if link().told_refusal.swap(1, Relaxed) != 0 {
        return;
    }
    let Some(limit) = limit else {
        sys::warn("the daemon refused this program (see its log); connections stay on kernel TCP");
        return;
    };
    let mut room = [0; 10];
    sys::warn_with(&[
        "the daemon is at its limit of ",
        sys::decimal(limit.expected, &mut room),
        " (max_tenants or max_tenants_per_user; its log says which): connections stay on kernel TCP until \
         it takes this program; end other programs, or raise the limit in its configuration",
    ]);
}

/// Reads messages until `found`, which is called under the lock, finds what it looks for. `None`
/// when that has not come until `end`, or the daemon is gone.
pub(super) fn await_message<T>(end: u64, mut found: impl FnMut(&Guard) -> Option<T>) -> Option<T> {
    // Another thread may read the message between a look and the sleep that it would end.
    const LOOK_AGAIN_MS: i64 = 1;
    loop {
        {
            let guard = Guard::take()?;
            read_messages(&guard);
            if let Some(found) = found(&guard) {
                return Some(found);
            }
        }
        let control = link().control.load(Relaxed);
        if control < 0 || clock::nanoseconds() >= end {
            return None;
        }
        sys::poll_one(control, libc::POLLIN, LOOK_AGAIN_MS);
    }
}

fn receive(socket: c_int, bytes: &mut [u8]) -> (isize, [c_int; 3]) {
    let mut fds = [-1; 3];
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let mut room = [0_u64; 8];
    // SAFETY: a header made of integers and pointers; zeroes are a value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut part;
    header.msg_iovlen = 1;
    header.msg_control = room.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&room) as _;
    // SAFETY: the header points to the locals above.
    let got = unsafe {
        sys::recvmsg(
            socket,
            &mut header,
            libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT,
        )
    };
    if got <= 0 {
        return (got, fds);
    }
    // SAFETY: the kernel filled the room; the macros stay inside it.
    unsafe {
        let item = libc::CMSG_FIRSTHDR(&header);
        if !item.is_null()
            && (*item).cmsg_level == libc::SOL_SOCKET
            && (*item).cmsg_type == libc::SCM_RIGHTS
        {
            let count = ((*item).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize) / 4;
            for i in 0..count {
                let fd = libc::CMSG_DATA(item)
                    .cast::<c_int>()
                    .add(i)
                    .read_unaligned();
                match fds.get_mut(i) {
                    Some(place) => *place = fd,
                    None => {
                        sys::close(fd);
                    }
                }
            }
        }
    }
    (got, fds)
}

fn take_verdict(verdict: &Verdict) {
    let (Some(held), Some(reason)) = (
        conn::by_index(verdict.conn as usize),
        Reason::from_code(verdict.reason),
    ) else {
        return;
    };
    let conn = held.conn;
    if conn.generation.load(Relaxed) != verdict.generation {
        return;
    }
    if reason == Reason::Shared {
        // Asked again later: the other holder may be about to close.
        if conn
            .phase
            .compare_exchange(phase::ANNOUNCED, phase::KERNEL, AcqRel, Relaxed)
            .is_ok()
        {
            conn.tell(held.index, State::Kernel, reason);
        }
    } else if conn.phase.load(Relaxed) == phase::ANNOUNCED {
        conn.tell(held.index, State::Announced, reason);
    }
}
