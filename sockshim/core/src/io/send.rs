//! Sending on a stream: as much as fits, and waiting where there is no room.

use super::*;
use crate::conn::Use;
use crate::end::End;
use crate::wait::For;
use crate::{clock, limits, rest, wait};
use rdsock_shm::end::{Anchor, Sent};
use rdsock_shm::layout::{mark, phase, want};
use rdsock_shm::reason::Reason;

/// Sends on a stream.
pub fn send<'a>(
    held: &'a Use,
    stream: &'a Stream,
    fd: c_int,
    from: &Buffers,
    flags: c_int,
) -> Outcome<'a> {
    let end = stream.at(held, fd);
    let mut done = 0_usize;
    let mut going = None;
    loop {
        let sent = end.send(from, &mut done);
        if done != 0 {
            wait::owe(held.conn, stream);
            held.conn.one_way.store(0, Relaxed);
        }
        if let Sent::All = sent {
            if check_is_due(held) && stream.has_unread() {
                peer_has_gone(&end);
            }
            return Outcome::Done(done as isize);
        }
        let going = going.get_or_insert_with(Going::default);
        if let Some(outcome) = go_on(&end, held, from, flags, (sent, done), going) {
            return outcome;
        }
    }
}

/// A send that could not put all into the ring at once.
#[derive(Debug, Default)]
struct Going {
    waits: wait::Waits,
    /// It has slept, and was not looked at why it was woken.
    has_slept: bool,
}

/// Goes on with such a send, of which `done` bytes have gone: waits for room. What became of it, or `None`: to be tried again.
#[cold]
#[inline(never)]
fn go_on<'a>(
    end: &End<'a>,
    held: &'a Use,
    from: &Buffers,
    flags: c_int,
    (sent, done): (Sent<'a>, usize),
    going: &mut Going,
) -> Option<Outcome<'a>> {
    Some(match sent {
        Sent::All => Outcome::Done(done as isize),
        Sent::Behind => match rest::for_room(end, held, &mut going.waits, flags, done != 0) {
            Ok(()) => return None,
            Err(error) if done == 0 => Outcome::Done(error),
            Err(_) => Outcome::Done(done as isize),
        },
        Sent::Kernel(counted) if done == 0 => {
            end.finished(Reason::PeerDemoted);
            Outcome::Kernel(counted)
        }
        Sent::Kernel(counted) => {
            going.waits.end();
            let rest = send_rest(held, end.socket.wait_fd(), from, done, flags);
            if counted.is_some() {
                drop(counted);
                end.after_kernel_send();
            }
            Outcome::Done((done + rest) as isize)
        }
        Sent::Pipe | Sent::Broken if done != 0 => Outcome::Done(done as isize),
        Sent::Pipe => Outcome::Done(broken_pipe(flags)),
        Sent::Broken => Outcome::Done(BROKEN),
        Sent::Full if going.has_slept => {
            // It was woken, and there is no room: somebody slipped past, or it was another's token.
            end.look();
            going.has_slept = false;
            return None;
        }
        Sent::Full => match wait_for_space(end, held, &mut going.waits, flags, done) {
            Ok(slept) => {
                going.has_slept = slept;
                return None;
            }
            Err(error) if done == 0 => Outcome::Done(error),
            Err(_) => Outcome::Done(done as isize),
        },
    })
}

/// The ring is full: waits for space, unless the peer has gone. True when it has slept. `Err`: to be reported, unless some
/// bytes were sent (`done`).
pub(super) fn wait_for_space(
    end: &End<'_>,
    held: &Use,
    waits: &mut wait::Waits,
    flags: c_int,
    done: usize,
) -> Result<bool, isize> {
    let stream = end.shared;
    let is_nonblocking = is_nonblocking(stream, flags);
    let is_in_vain = waits.go_in_vain(done);
    if is_nonblocking && !waits.are_new() {
        // There was to be space, and is none: it is the other end that says so.
        return Err(AGAIN);
    }
    if is_in_vain {
        return wait::for_a_moment(end, held, waits, For::Space, done != 0).map(|()| true);
    }
    if peer_has_gone(end) {
        return Ok(false);
    }
    if is_nonblocking {
        // Said before the last look, so that space which comes now is an edge.
        held.conn.note_refused();
        wait::owe(held.conn, stream);
        wait::give_core();
        return if stream.is_sendable(stream.ring_size() / 3) {
            Ok(false)
        } else {
            Err(AGAIN)
        };
    }
    let has_space = || {
        // A poll core makes room in turns.
        wait::owe(held.conn, stream);
        stream.is_sendable(1)
    };
    if wait::spin(&held.conn.spin_score, has_space) {
        return Ok(false);
    }
    wait::for_space(end, held, waits, done != 0).map(|()| true)
}

/// Sends on the anchor what a call has left, since the stream was left in its middle: all of it, or as much as goes where the
/// call does not wait. How much.
#[cold]
fn send_rest(held: &Use, fd: c_int, from: &Buffers, done: usize, flags: c_int) -> usize {
    let (mut sent, mut stopped) = (0, false);
    from.each(done, from.total - done, |at, len, _| {
        let mut piece = 0;
        while !stopped && piece < len {
            // SAFETY: the program's buffer, as long as it says.
            let got = unsafe { sys::send_raw(fd, at.wrapping_add(piece), len - piece, flags) };
            stopped = got <= 0;
            if got == AGAIN {
                held.conn.note_refused();
            }
            piece += got.max(0) as usize;
        }
        sent += piece;
    });
    sent
}

/// A peer that was killed says nothing: its anchor does. True now and then, to have the anchor looked at where the peer takes
/// nothing off the ring.
#[inline]
fn check_is_due(held: &Use) -> bool {
    let calls = held.conn.calls.load(Relaxed).wrapping_add(1);
    held.conn.calls.store(calls, Relaxed);
    if !calls.is_multiple_of(16) {
        return false;
    }
    let now = clock::ticks();
    if now.wrapping_sub(held.conn.looked_at.load(Relaxed))
        < clock::ticks_of(limits::PEER_CHECK_US.get())
    {
        return false;
    }
    held.conn.looked_at.store(now, Relaxed);
    true
}

/// Looks at the anchor; true when the peer has closed or died, and the direction was given up.
fn peer_has_gone(end: &End<'_>) -> bool {
    let stream = end.shared;
    end.settle_switch();
    let ended = stream.incoming().producer.mark.load(Acquire) & mark::END != 0;
    if ended || stream.tx().phase.load(Acquire) != phase::RING || end.socket.is_open() {
        return false;
    }
    end.note_end(false);
    end.lock_tx().after_answer(want::CLOSED);
    true
}

/// After a kernel send on a mapped stream: a wake that had to wait for it.
pub fn after_kernel_send(held: &Use, stream: &Stream, fd: c_int) {
    stream.at(held, fd).after_kernel_send();
}

/// Bytes that the other end has not received (`SIOCOUTQ`). `None`: ask the kernel.
pub fn unsent(end: &End<'_>) -> Option<c_int> {
    let rest = end.shared.rest();
    if rest != 0 {
        let behind = sys::ioctl_int(end.socket.wait_fd(), libc::TIOCOUTQ)?;
        return Some((rest + behind.max(0) as u64).min(c_int::MAX as u64) as c_int);
    }
    Some(end.unsent()?.min(c_int::MAX as u64) as c_int)
}
