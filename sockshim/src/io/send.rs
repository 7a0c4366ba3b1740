//! Sending on a stream.

use super::*;
use crate::conn::Use;
use crate::stream::TxGuard;
use crate::{clock, demote, wait};
use rdsock_shm::layout::{mark, phase, want};
use rdsock_shm::reason::Reason;
use rdsock_shm::wake;

/// Microseconds between two looks at the anchor of a sender whose peer takes nothing.
const PEER_CHECK_US: u64 = 1000;

/// What a sender finds before it looks at the ring.
pub(super) enum Way<'a> {
    Ring,
    Kernel(Option<InKernel<'a>>),
    Error(isize),
}

pub(super) fn way_out<'a>(
    held: &Use,
    stream: &'a Stream,
    guard: &TxGuard<'_>,
    fd: c_int,
) -> Way<'a> {
    let tx = stream.tx();
    if tx.shut.load(Relaxed) != 0 {
        return Way::Error(PIPE);
    }
    match tx.phase.load(Acquire) {
        phase::RING => Way::Ring,
        phase::ANCHOR if demote::is_leaving(stream) => {
            demote::end_sending(held, stream, guard, fd);
            if tx.phase.load(Acquire) == phase::ANCHOR {
                return Way::Kernel(Some(InKernel::enter(&tx.in_kernel)));
            }
            way_out(held, stream, guard, fd)
        }
        phase::ANCHOR if try_switch(held, stream, guard, fd) => Way::Ring,
        phase::ANCHOR => Way::Kernel(Some(InKernel::enter(&tx.in_kernel))),
        phase::RESET => Way::Error(if demote::take_send_error(stream) {
            BROKEN
        } else {
            PIPE
        }),
        _ => Way::Kernel(None),
    }
}

/// Sends on a stream.
pub fn send<'a>(
    held: &Use,
    stream: &'a Stream,
    fd: c_int,
    from: &Buffers,
    flags: c_int,
) -> Outcome<'a> {
    let mut done = 0_usize;
    loop {
        let guard = stream.lock_tx(fd);
        match way_out(held, stream, &guard, fd) {
            Way::Ring => {}
            Way::Kernel(counted) if done != 0 => {
                drop(guard);
                let rest = if is_nonblocking(stream, flags) {
                    0
                } else {
                    send_rest(fd, from, done, flags)
                };
                drop(counted);
                return Outcome::Done((done + rest) as isize);
            }
            Way::Kernel(counted) => return Outcome::Kernel(counted),
            Way::Error(_) if done != 0 => return Outcome::Done(done as isize),
            Way::Error(error) => {
                drop(guard);
                return Outcome::Done(if error == PIPE {
                    broken_pipe(flags)
                } else {
                    error
                });
            }
        }
        if fill(held, stream, &guard, fd, from, &mut done).is_err() {
            stream.reset(fd, Reason::Violation);
            demote::take_send_error(stream);
            return Outcome::Done(if done == 0 { BROKEN } else { done as isize });
        }
        let check = check_is_due(held, &guard);
        let wants = stream.out().bytes.want.load(Acquire);
        if done != from.total && wants & (want::DEMOTED | want::CLOSED | want::LEAVE) != 0 {
            demote::after_answer(held, stream, &guard, fd, wants);
        }
        drop(guard);
        held.conn.one_way.store(0, Relaxed);
        if done == from.total {
            if check {
                peer_has_gone(held, stream, fd);
            }
            return Outcome::Done(done as isize);
        }
        if stream.tx().phase.load(Relaxed) != phase::RING {
            continue;
        }
        if let Err(error) = wait_for_space(held, stream, fd, flags) {
            return Outcome::Done(if done == 0 { error } else { done as isize });
        }
    }
}

/// The ring is full: waits for space, unless the peer has gone. `Err`: to be reported, unless some
/// bytes were sent.
pub(super) fn wait_for_space(
    held: &Use,
    stream: &Stream,
    fd: c_int,
    flags: c_int,
) -> Result<(), isize> {
    if peer_has_gone(held, stream, fd) {
        return Ok(());
    }
    if is_nonblocking(stream, flags) {
        // Said before the last look, so that space which comes now is an edge.
        held.conn.wants_space.store(1, SeqCst);
        wait::owe(stream);
        wait::give_core();
        return if wait::sendable(stream, stream.ring_size() / 3) {
            Ok(())
        } else {
            Err(AGAIN)
        };
    }
    let has_space = || {
        // A poll core makes room in turns.
        wait::owe(stream);
        wait::sendable(stream, 1)
    };
    if wait::spin(&held.conn.spin_score, has_space) {
        return Ok(());
    }
    wait::for_space(held, stream, fd)
}

/// Sends what a blocking call has left on the anchor, since the stream was left in its middle. How
/// much of it.
fn send_rest(fd: c_int, from: &Buffers, done: usize, flags: c_int) -> usize {
    let (mut sent, mut stopped) = (0, false);
    from.each(done, from.total - done, |at, len, _| {
        let mut piece = 0;
        while !stopped && piece < len {
            // SAFETY: the program's buffer, as long as it says.
            let got = unsafe { sys::send_raw(fd, at.wrapping_add(piece), len - piece, flags) };
            stopped = got <= 0;
            piece += got.max(0) as usize;
        }
        sent += piece;
    });
    sent
}

/// Copies as much as fits, and tells the other end. `Err`: it wrote nonsense.
#[inline]
fn fill(
    held: &Use,
    stream: &Stream,
    guard: &TxGuard<'_>,
    fd: c_int,
    from: &Buffers,
    done: &mut usize,
) -> Result<(), ()> {
    let sender = &guard.sender;
    while *done < from.total {
        let Some(space) = sender
            .reserve(((from.total - *done) as u64).min(CHUNK))
            .map_err(|_| ())?
        else {
            return Ok(());
        };
        from.each(*done, space.len as usize, |at, len, skip| {
            // SAFETY: the program's buffer, as long as it says.
            unsafe { sender.fill(space, skip, at, len) }
        });
        sender.publish();
        wait::owe(stream);
        *done += space.len as usize;
        if wake::asked(&stream.out().bytes) != 0 {
            demote::after_answer(
                held,
                stream,
                guard,
                fd,
                stream.answer(fd, &stream.out().bytes),
            );
            if stream.tx().phase.load(Relaxed) != phase::RING {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// A peer that was killed says nothing: its anchor does. True now and then while it takes nothing
/// off the ring, to have the anchor looked at.
#[inline]
fn check_is_due(held: &Use, guard: &TxGuard<'_>) -> bool {
    let calls = held.conn.calls.load(Relaxed).wrapping_add(1);
    held.conn.calls.store(calls, Relaxed);
    if !calls.is_multiple_of(16) {
        return false;
    }
    let now = clock::ticks();
    if now.wrapping_sub(held.conn.looked_at.load(Relaxed)) < clock::ticks_of(PEER_CHECK_US) {
        return false;
    }
    held.conn.looked_at.store(now, Relaxed);
    guard.sender.is_empty() == Ok(false)
}

/// Looks at the anchor; true when the peer has closed or died, and the direction was given up.
pub fn peer_has_gone(held: &Use, stream: &Stream, fd: c_int) -> bool {
    settle_switch(stream);
    let ended = stream.incoming().producer.mark.load(Acquire) & mark::END != 0;
    if ended || stream.tx().phase.load(Acquire) != phase::RING || !anchor_is_dead(fd) {
        return false;
    }
    stream.note_end(false);
    let guard = stream.lock_tx(fd);
    demote::after_answer(held, stream, &guard, fd, want::CLOSED);
    true
}

/// Tells the producer, which waits for space, that there is some. A wake byte may only be sent on
/// a direction that has left the anchor, so this one must switch first; when another thread is in
/// a kernel send, that one looks again when it is done.
pub fn answer_space(held: &Use, stream: &Stream, fd: c_int) {
    let guard = stream.lock_tx(fd);
    let on_ring = match stream.tx().phase.load(Acquire) {
        phase::RING => true,
        phase::ANCHOR => try_switch(held, stream, &guard, fd),
        _ => false,
    };
    // Under the lock: no wake byte may follow the mark that ends this direction.
    if on_ring {
        stream.answer(fd, &stream.incoming().space);
    }
}

/// After a kernel send on a mapped stream: a wake that had to wait for it.
pub fn after_kernel_send(held: &Use, stream: &Stream, fd: c_int) {
    if demote::is_leaving(stream) && stream.tx().phase.load(Acquire) == phase::ANCHOR {
        let guard = stream.lock_tx(fd);
        if !guard.is_nested() {
            demote::end_sending(held, stream, &guard, fd);
        }
    }
    if stream.rx().phase.load(Acquire) == phase::RING
        && wake::asked(&stream.incoming().space) & (want::WAKE | want::BELL) != 0
    {
        answer_space(held, stream, fd);
    }
}

/// Bytes that the other end has not received (`SIOCOUTQ`). `None`: ask the kernel.
pub fn unsent(stream: &Stream, fd: c_int) -> Option<c_int> {
    let guard = stream.lock_tx(fd);
    if stream.tx().phase.load(Acquire) != phase::RING {
        return None;
    }
    let space = guard.sender.space().ok()?;
    Some((stream.ring_size() - space).min(c_int::MAX as u64) as c_int)
}
