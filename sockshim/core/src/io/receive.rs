//! Receiving from a stream: as much as is there, and waiting where there is nothing.

use super::*;
use crate::conn::Use;
use crate::end::End;
use crate::wait::For;
use crate::{clock, limits, wait};
use rdsock_shm::end::{Anchor, How, Received};

/// Receives from a stream.
pub fn recv<'a>(
    held: &'a Use,
    stream: &'a Stream,
    fd: c_int,
    to: &Buffers,
    flags: c_int,
) -> Outcome<'a> {
    let end = stream.at(held, fd);
    let how = How {
        peek: flags & libc::MSG_PEEK != 0,
        discard: flags & libc::MSG_TRUNC != 0,
        whole: flags & libc::MSG_WAITALL != 0 && !is_nonblocking(stream, flags),
    };
    let mut done = 0_usize;
    let mut going = None;
    loop {
        let received = end.receive(to, how, &mut done);
        if received == Received::Bytes {
            note_bytes(&end, held);
            return Outcome::Done(done as isize);
        }
        let going = going.get_or_insert_with(Going::default);
        if let Some(outcome) = go_on(&end, held, to, flags, how, (received, done), going) {
            return outcome;
        }
    }
}

/// A receive that did not have at once what it wants.
#[derive(Debug, Default)]
struct Going {
    waits: wait::Waits,
    /// It has slept, and was not looked at why it was woken.
    has_slept: bool,
}

/// Goes on with such a receive, of which `done` bytes are there: waits for more. What became of it, or `None`: to be tried again.
#[cold]
#[inline(never)]
fn go_on<'a>(
    end: &End<'a>,
    held: &'a Use,
    to: &Buffers,
    flags: c_int,
    how: How,
    (received, done): (Received, usize),
    going: &mut Going,
) -> Option<Outcome<'a>> {
    let (stream, fd) = (end.shared, end.socket.wait_fd());
    let slept = match received {
        Received::Bytes => return Some(Outcome::Done(done as isize)),
        Received::Kernel if done == 0 => return Some(Outcome::Kernel(None)),
        Received::Kernel => {
            going.waits.end();
            let rest = recv_rest(fd, to, done, flags);
            return Some(Outcome::Done((done + rest) as isize));
        }
        Received::End => return Some(Outcome::Done(0)),
        Received::Error(error) => return Some(Outcome::Done(-(error as isize))),
        Received::Nothing if is_nonblocking(stream, flags) => {
            let is_in_vain = going.waits.go_in_vain(done) || !going.waits.are_new();
            if is_in_vain || !look_in_vain(end, held) {
                return Some(Outcome::Done(AGAIN));
            }
            Ok(false)
        }
        Received::Nothing | Received::Few(_) if going.waits.go_in_vain(done) => {
            wait::for_a_moment(end, held, &mut going.waits, For::Bytes, done != 0).map(|()| true)
        }
        // It has slept, the anchor has woken it, and there is nothing: somebody slipped past, or it was another's token.
        Received::Nothing | Received::Few(_) if going.has_slept => {
            end.look();
            Ok(false)
        }
        Received::Nothing if wait::spin_for_bytes(held.conn, stream) => Ok(false),
        Received::Nothing => {
            let wanted = if how.whole { to.total - done } else { 1 };
            wait::for_bytes(end, held, &mut going.waits, wanted as u64, done != 0).map(|()| true)
        }
        Received::Few(position) => {
            if wait::spin(&held.conn.spin_score, || stream.has_bytes_after(position)) {
                Ok(false)
            } else {
                wait::for_more(end, held, &mut going.waits, position).map(|()| true)
            }
        }
    };
    match slept {
        Ok(slept) => {
            going.has_slept = slept;
            None
        }
        Err(error) => Some(Outcome::Done(if done == 0 { error } else { done as isize })),
    }
}

/// A receive has found bytes.
#[inline]
fn note_bytes(end: &End<'_>, held: &Use) {
    let conn = held.conn;
    conn.one_way
        .store(conn.one_way.load(Relaxed).saturating_add(1), Relaxed);
    // Streams in epoll are asked for again and again: a barrier each time costs more.
    if conn.registrations.load(Relaxed) == 0 {
        end.note_busy();
    }
    wait::owe_for_space(conn, end.shared);
}

/// A call that does not wait has found nothing: looks at the anchor now and then, and gives a poll core its turn. True when
/// something is there now.
fn look_in_vain(end: &End<'_>, held: &Use) -> bool {
    let stream = end.shared;
    // While the program's bytes are on the anchor, only a receive may read there.
    if !stream.is_switching() && look_is_due(held) {
        end.look();
        if stream.is_receivable() {
            return true;
        }
    }
    wait::missed(held.conn, stream) && stream.is_receivable()
}

/// Receives what a call that wants all has left, since the stream was left in its middle.
#[cold]
fn recv_rest(fd: c_int, to: &Buffers, done: usize, flags: c_int) -> usize {
    let flags = flags & (libc::MSG_TRUNC | libc::MSG_WAITALL);
    let (mut all, mut stopped) = (0, false);
    to.each(done, to.total - done, |at, len, _| {
        if !stopped {
            // SAFETY: the program's buffer, as long as it says.
            let got = unsafe { sys::recv_raw(fd, at, len, flags) };
            stopped = got < len as isize;
            all += got.max(0) as usize;
        }
    });
    all
}

/// True when the anchor should be looked at by a call that found its ring empty.
pub fn look_is_due(held: &Use) -> bool {
    let now = clock::ticks();
    if held.conn.look.load(Relaxed) == 0
        && now.wrapping_sub(held.conn.looked_at.load(Relaxed))
            < clock::ticks_of(limits::LOOK_EVERY_US.get())
    {
        return false;
    }
    held.conn.look.store(0, Relaxed);
    held.conn.looked_at.store(now, Relaxed);
    true
}

/// The error that the program asks for (`SO_ERROR`), once: where the kernel has just told `kernel`.
pub fn take_error(end: &End<'_>, kernel: c_int) -> c_int {
    end.take_error(kernel)
}

/// Bytes that can be received now (`FIONREAD`). `None`: ask the kernel.
pub fn unread(end: &End<'_>) -> Option<c_int> {
    Some(end.unread()?.min(c_int::MAX as u64) as c_int)
}
