//! Receiving from a stream.

use super::*;
use crate::conn::Use;
use crate::stream::RxGuard;
use crate::{clock, demote, epoll, ready, wait};
use rdsock_shm::layout::{NOT_SWITCHED, anchor, mark, phase};
use rdsock_shm::reason::Reason;
use rdsock_shm::ring::Receiver;
use rdsock_shm::wake;

/// Microseconds between two looks at the anchor of a connection whose ring is found empty by
/// calls that do not wait.
const LOOK_EVERY_US: u64 = 20;

/// Receives from a stream.
pub fn recv<'a>(
    held: &Use,
    stream: &'a Stream,
    fd: c_int,
    to: &Buffers,
    flags: c_int,
) -> Outcome<'a> {
    let mut answer = false;
    let outcome = recv_all(held, stream, fd, to, flags, &mut answer);
    if stream.rx().space_due.load(Relaxed) != 0 {
        stream.rx().space_due.store(0, Relaxed);
        answer = true;
    }
    // On the anchor: an answer may have had to wait until this end's own direction can move.
    if answer
        || stream.tx().phase.load(Relaxed) == phase::ANCHOR
            && stream.incoming().space.want.load(Relaxed) != 0
    {
        after_kernel_send(held, stream, fd);
    }
    outcome
}

/// `answer` is true on return when the producer may wait for space and was not told yet.
fn recv_all<'a>(
    held: &Use,
    stream: &'a Stream,
    fd: c_int,
    to: &Buffers,
    flags: c_int,
    answer: &mut bool,
) -> Outcome<'a> {
    let mut done = 0_usize;
    loop {
        if *answer {
            *answer = false;
            answer_space(held, stream, fd);
        }
        let guard = stream.lock_rx();
        let outcome = match stream.rx().phase.load(Acquire) {
            phase::RING => take(held, stream, &guard, fd, to, flags, &mut done, answer),
            phase::SWITCHING => take_switching(stream, &guard, fd, to, flags, &mut done),
            phase::RESET if done != 0 => return Outcome::Done(done as isize),
            phase::RESET => {
                return Outcome::Done(if demote::take_error(stream) {
                    BROKEN
                } else {
                    0
                });
            }
            _ if done != 0 => return Outcome::Done(done as isize),
            _ => return Outcome::Kernel(None),
        };
        let enough = if flags & libc::MSG_WAITALL != 0 && flags & libc::MSG_PEEK == 0 {
            to.total
        } else {
            1
        };
        match outcome {
            Took::Some if done >= enough || done == to.total => {
                held.conn
                    .one_way
                    .store(held.conn.one_way.load(Relaxed).saturating_add(1), Relaxed);
                // Streams in epoll are asked for again and again: a barrier each time costs more.
                if held.conn.registrations.load(Relaxed) == 0 {
                    stream.note_busy();
                }
                return Outcome::Done(done as isize);
            }
            Took::Some | Took::Again => continue,
            Took::End => return Outcome::Done(done as isize),
            Took::Left => {
                drop(guard);
                demote::follow(held, stream, fd);
                continue;
            }
            Took::Error(error) => {
                return Outcome::Done(if done == 0 { error } else { done as isize });
            }
            Took::Few(position) => {
                drop(guard);
                if !wait::spin(&held.conn.spin_score, || stream.has_bytes_after(position))
                    && let Err(error) = wait::for_more(held, stream, fd, position)
                {
                    return Outcome::Done(error);
                }
                continue;
            }
            Took::Nothing => {}
        }
        if is_nonblocking(stream, flags) {
            // While the program's bytes are on the anchor, only `take_switching` may read there.
            if stream.rx().phase.load(Relaxed) == phase::RING && look_is_due(held) {
                guard.look(fd);
                drop(guard);
                epoll::kick_all(held.conn);
                if wait::receivable(stream) {
                    continue;
                }
            } else {
                drop(guard);
            }
            if wait::missed(held.conn, stream) && wait::receivable(stream) {
                continue;
            }
            return Outcome::Done(if done == 0 { AGAIN } else { done as isize });
        }
        let result = if wait::is_switching(stream) {
            drop(guard);
            wait::for_anchor(held, stream, fd)
        } else {
            drop(guard);
            if wait::spin_for_bytes(held.conn, stream) {
                continue;
            }
            wait::for_bytes(held, stream, fd)
        };
        if let Err(error) = result {
            return Outcome::Done(if done == 0 { error } else { done as isize });
        }
    }
}

/// True when the anchor should be looked at by a call that found its ring empty.
pub fn look_is_due(held: &Use) -> bool {
    let now = clock::ticks();
    if held.conn.look.load(Relaxed) == 0
        && now.wrapping_sub(held.conn.looked_at.load(Relaxed)) < clock::ticks_of(LOOK_EVERY_US)
    {
        return false;
    }
    held.conn.look.store(0, Relaxed);
    held.conn.looked_at.store(now, Relaxed);
    true
}

/// What one attempt to receive gave.
enum Took {
    /// Bytes were added.
    Some,
    /// Nothing is there, and more may come.
    Nothing,
    /// Fewer bytes than the call waits for are there, up to this position.
    Few(u64),
    /// Something changed: look again.
    Again,
    /// End of file.
    End,
    /// The other end has left the rings.
    Left,
    /// A negated error number.
    Error(isize),
}

#[inline]
#[allow(clippy::too_many_arguments)]
fn take(
    held: &Use,
    stream: &Stream,
    guard: &RxGuard<'_>,
    fd: c_int,
    to: &Buffers,
    flags: c_int,
    done: &mut usize,
    answer: &mut bool,
) -> Took {
    let receiver = &guard.receiver;
    // The producer's line is read once: each look takes it away from the producer.
    let cached = stream
        .rx()
        .seen_head
        .load(Relaxed)
        .wrapping_sub(stream.rx().tail.load(Relaxed));
    let enough = cached >= (to.total - *done) as u64;
    let mut available = match if enough {
        receiver.available()
    } else {
        receiver.available_now()
    } {
        Ok(Some(available)) => available,
        Ok(None) => return take_end(stream, guard, fd),
        Err(_) => {
            stream.reset(fd, Reason::Violation);
            return Took::Again;
        }
    };
    if available.len < (to.total - *done) as u64 {
        wait::let_gather(held.conn, available.len, || {
            if let Ok(Some(now)) = receiver.available_now() {
                available = now;
            }
            available.len
        });
        let whole = libc::MSG_PEEK | libc::MSG_WAITALL;
        if flags & whole == whole
            && flags & libc::MSG_DONTWAIT == 0
            && available.len < (to.total as u64).min(stream.ring_size())
            && !wait::has_ended(stream)
        {
            return Took::Few(available.at + available.len);
        }
    }
    let len = ((to.total - *done) as u64)
        .min(available.len)
        .min(CHUNK * 16);
    if flags & libc::MSG_TRUNC == 0 {
        to.each(*done, len as usize, |at, len, skip| {
            // SAFETY: the program's buffer, as long as it says.
            unsafe { receiver.copy(available, skip, at, len) }
        });
    }
    if flags & libc::MSG_PEEK == 0 {
        if !receiver.consume(available, len) {
            return Took::Again;
        }
        if receiver.publish() && wake::asked(&stream.incoming().space) != 0 {
            *answer = true;
        }
        wait::owe_for_space(held.conn, stream, available.at + len);
    }
    *done += len as usize;
    Took::Some
}

/// The ring is empty: has the direction ended?
fn take_end(stream: &Stream, guard: &RxGuard<'_>, fd: c_int) -> Took {
    // The anchor's end comes after the marks, so it is looked at first.
    let seen = stream.rx().anchor.load(Acquire);
    let marks = stream.incoming().producer.mark.load(Acquire);
    let shut = stream.rx().shut.load(Relaxed) != 0;
    if marks == 0 && seen == 0 && !shut {
        return Took::Nothing;
    }
    // Marks, and the anchor's end, come after the last byte: look for that once more.
    match guard.receiver.available_now() {
        Ok(Some(_)) => return Took::Again,
        Ok(None) => {}
        Err(_) => {
            stream.reset(fd, Reason::Violation);
            return Took::Again;
        }
    }
    if marks & mark::RESET != 0 {
        stream.reset(fd, Reason::PeerReset);
        return Took::Again;
    }
    if marks & mark::END != 0 {
        demote::incoming_ended(stream, guard, fd);
        return Took::Left;
    }
    if marks & mark::FIN != 0 || shut {
        return Took::End;
    }
    anchor_end(stream)
}

/// The anchor has ended while it was read, unless the other end has switched meanwhile: then the
/// rest is on the ring.
fn anchor_end_unless_switched(stream: &Stream, before: u64) -> Took {
    if stream.incoming().producer.switch_at.load(Acquire) != before {
        return Took::Again;
    }
    anchor_end(stream)
}

/// The anchor has ended: with the error that a look at it has taken, if there was one.
fn anchor_end(stream: &Stream) -> Took {
    if stream.rx().anchor.fetch_and(!anchor::ERROR, AcqRel) & anchor::ERROR != 0 {
        return Took::Error(BROKEN);
    }
    Took::End
}

/// The kernel reports an error of the anchor. It resets a connection for wake bytes that its end has
/// not read, which the program must not see; unless the other end has broken it, and has said so before.
fn anchor_error(stream: &Stream, before: u64, error: isize) -> Took {
    if error != BROKEN {
        return Took::Error(error);
    }
    if stream.incoming().producer.mark.load(Acquire) & mark::RESET != 0 {
        return Took::Again;
    }
    stream.note_end(true);
    anchor_end_unless_switched(stream, before)
}

/// Receives on the anchor what was sent there before the other end switched.
fn take_switching(
    stream: &Stream,
    guard: &RxGuard<'_>,
    fd: c_int,
    to: &Buffers,
    flags: c_int,
    done: &mut usize,
) -> Took {
    let rx = stream.rx();
    let position = rx.tail.load(Relaxed);
    let mut limit = to.total - *done;
    let before = stream.incoming().producer.switch_at.load(Acquire);
    let (ready, ended) = if before == NOT_SWITCHED {
        // What is on the anchor now is the program's, unless the other end switches meanwhile.
        let ready = sys::ioctl_int(fd, libc::FIONREAD).unwrap_or(0) as u64;
        let marks = stream.incoming().producer.mark.load(Acquire);
        (ready, marks & mark::END != 0)
    } else {
        (u64::MAX, false)
    };
    match Receiver::switch_at(stream.incoming()) {
        Some(at) if at == position => {
            guard.receiver.switch(at);
            rx.phase.store(phase::RING, Release);
            return Took::Again;
        }
        Some(at) if at < position => {
            stream.reset(fd, Reason::Violation);
            return Took::Again;
        }
        Some(at) => limit = limit.min((at - position) as usize),
        None if ended => {
            demote::incoming_ended(stream, guard, fd);
            return Took::Left;
        }
        None => limit = limit.min(ready as usize),
    }
    if stream.incoming().producer.mark.load(Acquire) & mark::RESET != 0 {
        stream.reset(fd, Reason::PeerReset);
        return Took::Again;
    }
    if limit == 0 {
        // A receive of one byte, that takes nothing, tells the end and errors.
        let got = sys::recv_now(fd, &mut [0], libc::MSG_PEEK);
        return match got {
            0 => anchor_end_unless_switched(stream, before),
            AGAIN => Took::Nothing,
            got if got < 0 => anchor_error(stream, before, got),
            _ if to.total == *done => Took::Some,
            _ => Took::Again,
        };
    }
    let mut total = 0_usize;
    let mut stop = None;
    to.each(*done, limit, |at, len, _| {
        if stop.is_none() {
            // SAFETY: the program's buffer, as long as it says.
            let got = unsafe {
                sys::recv_raw(
                    fd,
                    at,
                    len,
                    libc::MSG_DONTWAIT | flags & (libc::MSG_PEEK | libc::MSG_TRUNC),
                )
            };
            if got > 0 {
                total += got as usize;
            }
            if got < len as isize || flags & libc::MSG_PEEK != 0 {
                stop = Some(got);
            }
        }
    });
    if total != 0 {
        if flags & libc::MSG_PEEK == 0 {
            rx.tail.store(position + total as u64, Relaxed);
        }
        *done += total;
        return Took::Some;
    }
    match stop {
        Some(0) => anchor_end_unless_switched(stream, before),
        Some(AGAIN) | None => Took::Nothing,
        Some(error) => anchor_error(stream, before, error),
    }
}

/// The error that the program asks for (`SO_ERROR`), once: where the kernel has just told `kernel`, and told the shim of
/// others when that looked.
pub fn take_error(stream: &Stream, fd: c_int, kernel: c_int) -> c_int {
    ready::settle_reset(stream, fd);
    let marks = stream.incoming().producer.mark.load(Acquire);
    let is_pending = if stream.is_reset() {
        demote::take_error(stream)
    } else {
        let judged = kernel == libc::ECONNRESET && stream.judges_end() && marks & mark::RESET == 0;
        if judged && stream.rx().anchor.load(Acquire) == 0 {
            stream.note_end(true);
        }
        let pending = stream.rx().anchor.fetch_and(!anchor::ERROR, AcqRel) & anchor::ERROR != 0;
        if !pending && !judged {
            return kernel;
        }
        pending
    };
    if is_pending { libc::ECONNRESET } else { 0 }
}

/// Bytes that can be received now (`FIONREAD`). `None`: ask the kernel.
pub fn unread(stream: &Stream, fd: c_int) -> Option<c_int> {
    let guard = stream.lock_rx();
    let position = stream.rx().tail.load(Relaxed);
    let ring = match stream.rx().phase.load(Acquire) {
        phase::RING => guard
            .receiver
            .available_now()
            .ok()?
            .map_or(0, |available| available.len),
        phase::SWITCHING => {
            let on_anchor = sys::ioctl_int(fd, libc::FIONREAD)? as u64;
            match Receiver::switch_at(stream.incoming()) {
                None => on_anchor,
                Some(at) => {
                    let head = stream.incoming().producer.head.load(Acquire);
                    on_anchor.min(at.saturating_sub(position))
                        + head.saturating_sub(at).min(stream.ring_size())
                }
            }
        }
        _ => return None,
    };
    Some(ring.min(c_int::MAX as u64) as c_int)
}
