//! Sending and receiving on a mapped stream. What cannot go over the ring is handed back as
//! [`Outcome::Kernel`], and the caller makes the same call on the anchor.

use crate::conn::Use;
use crate::stream::{RxGuard, Stream, TxGuard};
use crate::{clock, demote, epoll, sys, wait};
use libc::{c_int, iovec};
use rdsock_shm::layout::{NOT_SWITCHED, anchor, mark, phase, want};
use rdsock_shm::reason::Reason;
use rdsock_shm::ring::Receiver;
use rdsock_shm::wake;
use std::sync::atomic::{AtomicU32, Ordering::*};

/// Bytes copied before they are published, so that the other end reads while this one writes.
const CHUNK: u64 = 16 * 1024;
/// Microseconds between two looks at the anchor of a connection whose ring is found empty by
/// calls that do not wait.
const LOOK_EVERY_US: u64 = 20;
/// Microseconds between two looks at the anchor of a sender whose peer takes nothing.
const PEER_CHECK_US: u64 = 1000;
/// The most that one call moves, as in Linux (`MAX_RW_COUNT`).
const MOST: usize = 0x7fff_f000;

/// A counter that is one higher while somebody is inside a kernel call.
#[derive(Debug)]
pub struct InKernel<'a>(&'a AtomicU32);

impl<'a> InKernel<'a> {
    /// Counts one in.
    pub fn enter(counter: &'a AtomicU32) -> Self {
        counter.fetch_add(1, SeqCst);
        InKernel(counter)
    }
}

impl Drop for InKernel<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

/// What became of a call.
#[derive(Debug)]
pub enum Outcome<'a> {
    /// The result: bytes, or a negated error number.
    Done(isize),
    /// To be made on the anchor, while this counts the caller in.
    Kernel(Option<InKernel<'a>>),
}

/// The program's buffers.
#[derive(Clone, Copy, Debug)]
pub struct Buffers {
    parts: *const iovec,
    count: usize,
    /// Bytes in all.
    pub total: usize,
}

impl Buffers {
    /// Checks an array of buffers: `Err` holds a negated error number.
    ///
    /// # Safety
    /// `parts` is null or points to `count` readable entries; what they describe stays valid.
    pub unsafe fn new(parts: *const iovec, count: usize, flags: c_int) -> Result<Self, isize> {
        let discards = flags & libc::MSG_TRUNC;
        let mut total = 0_usize;
        for i in 0..count {
            // SAFETY: the caller vouches for `count` entries.
            let part = unsafe { &*parts.add(i) };
            if part.iov_len > isize::MAX as usize {
                return Err(-(libc::EINVAL as isize));
            }
            if part.iov_len != 0 && discards == 0 && sys::is_bad_pointer(part.iov_base) {
                return Err(-(libc::EFAULT as isize));
            }
            total = total.saturating_add(part.iov_len);
        }
        Ok(Buffers {
            parts,
            count,
            total: total.min(MOST),
        })
    }

    /// Calls `piece(address, length, bytes before it)` for the bytes `from..from + len`.
    #[inline]
    fn each(&self, from: usize, len: usize, mut piece: impl FnMut(*mut u8, usize, u64)) {
        let (mut start, end) = (0_usize, from + len);
        for i in 0..self.count {
            // SAFETY: `new` was promised `count` entries.
            let part = unsafe { &*self.parts.add(i) };
            let (low, high) = (from.max(start), end.min(start + part.iov_len));
            if low < high {
                piece(
                    part.iov_base.cast::<u8>().wrapping_add(low - start),
                    high - low,
                    (low - from) as u64,
                );
            }
            start += part.iov_len;
            if start >= end {
                return;
            }
        }
    }
}

const AGAIN: isize = -(libc::EAGAIN as isize);
const PIPE: isize = -(libc::EPIPE as isize);
const BROKEN: isize = -(libc::ECONNRESET as isize);

fn is_nonblocking(stream: &Stream, flags: c_int) -> bool {
    flags & libc::MSG_DONTWAIT != 0 || stream.end().nonblock.load(Relaxed) != 0
}

/// EPIPE, with the signal unless the call forbids it.
fn broken_pipe(flags: c_int) -> isize {
    if flags & libc::MSG_NOSIGNAL == 0 {
        sys::raise(libc::SIGPIPE);
    }
    PIPE
}

/// The position of the next byte that this socket will send on the anchor, counted from the
/// connection's birth: `tcpi_bytes_acked` (which counts the SYN of an active opener) and what is
/// queued behind it (`SIOCOUTQ`).
fn sent_on_anchor(stream: &Stream, fd: c_int) -> Option<u64> {
    for _ in 0..100 {
        let before = TcpInfo::of(fd)?;
        let queued = sys::ioctl_int(fd, libc::TIOCOUTQ)?;
        if TcpInfo::of(fd)?.acked == before.acked {
            let syn = u64::from(stream.end_number() == 0);
            return (before.acked + queued as u64).checked_sub(syn);
        }
    }
    None
}

/// What the kernel counts of a TCP socket: `struct tcp_info` of linux/tcp.h.
#[derive(Clone, Copy, Debug)]
pub struct TcpInfo {
    /// `tcpi_state`.
    pub state: u8,
    /// `tcpi_bytes_acked`, at offset 120.
    pub acked: u64,
    /// `tcpi_bytes_received`, at offset 128.
    pub received: u64,
}

impl TcpInfo {
    /// `TCP_ESTABLISHED`.
    pub const ESTABLISHED: u8 = 1;
    /// `TCP_CLOSE_WAIT`: the peer has sent its FIN.
    pub const CLOSE_WAIT: u8 = 8;
    /// `TCP_LISTEN`.
    pub const LISTEN: u8 = 10;

    /// Of a socket.
    pub fn of(fd: c_int) -> Option<Self> {
        let words: [u64; 18] = sys::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO)?;
        Some(TcpInfo {
            state: words[0] as u8,
            acked: words[15],
            received: words[16],
        })
    }
}

/// Moves the sending direction to the ring, if nobody is inside a kernel send.
pub fn try_switch(held: &Use, stream: &Stream, guard: &TxGuard<'_>, fd: c_int) -> bool {
    if stream.out().consumer.ready.load(Acquire) != 1
        || guard.is_nested()
        || held.conn.in_tx.load(SeqCst) != 0
        || stream.tx().in_kernel.load(SeqCst) != 0
        || stream.out().bytes.want.load(Acquire) & want::DEMOTED != 0
    {
        return false;
    }
    let Some(at) = sent_on_anchor(stream, fd) else {
        return false;
    };
    guard.sender.switch(at);
    stream.tx().phase.store(phase::RING, Release);
    true
}

/// What a sender finds before it looks at the ring.
enum Way<'a> {
    Ring,
    Kernel(Option<InKernel<'a>>),
    Error(isize),
}

fn way_out<'a>(held: &Use, stream: &'a Stream, guard: &TxGuard<'_>, fd: c_int) -> Way<'a> {
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
        // The ring is full.
        if peer_has_gone(held, stream, fd) {
            continue;
        }
        if is_nonblocking(stream, flags) {
            // Said before the last look, so that space which comes now is an edge.
            held.conn.wants_space.store(1, SeqCst);
            if wait::sendable(stream, stream.ring_size() / 3) {
                continue;
            }
            return Outcome::Done(if done == 0 { AGAIN } else { done as isize });
        }
        if !wait::spin(&held.conn.spin_score, || wait::sendable(stream, 1))
            && let Err(error) = wait::for_space(held, stream, fd)
        {
            return Outcome::Done(if done == 0 { error } else { done as isize });
        }
    }
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

/// True when the anchor's connection is over, whatever still lies on it.
pub fn anchor_is_dead(fd: c_int) -> bool {
    TcpInfo::of(fd).is_none_or(|info| info.state != TcpInfo::ESTABLISHED)
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

/// Moves the receiving half to the ring when it stands where the other end switched: so that a
/// program which only sends gets there as well.
pub fn settle_switch(stream: &Stream) {
    if stream.rx().phase.load(Acquire) != phase::SWITCHING {
        return;
    }
    let guard = stream.lock_rx();
    if let Some(at) = Receiver::switch_at(stream.incoming())
        && !guard.is_nested()
        && stream.rx().phase.load(Acquire) == phase::SWITCHING
        && at == stream.rx().tail.load(Relaxed)
    {
        guard.receiver.switch(at);
        stream.rx().phase.store(phase::RING, Release);
    }
}

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

/// True when the anchor should be looked at by a call that found its ring empty.
fn look_is_due(held: &Use) -> bool {
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
            got if got < 0 => Took::Error(got),
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
        Some(error) => Took::Error(error),
    }
}

/// `sendfile` onto a stream: the file is read straight into the ring. `offset` is where to read,
/// and is moved; without one the file's own position is used.
pub fn send_file<'a>(
    held: &Use,
    stream: &'a Stream,
    fd: c_int,
    file: c_int,
    mut offset: Option<&mut i64>,
    count: usize,
) -> Outcome<'a> {
    let mut done = 0_usize;
    let count = count.min(MOST);
    loop {
        let guard = stream.lock_tx(fd);
        match way_out(held, stream, &guard, fd) {
            Way::Ring => {}
            Way::Kernel(_) if done != 0 => return Outcome::Done(done as isize),
            Way::Kernel(counted) => return Outcome::Kernel(counted),
            Way::Error(_) if done != 0 => return Outcome::Done(done as isize),
            Way::Error(error) => {
                drop(guard);
                return Outcome::Done(if error == PIPE { broken_pipe(0) } else { error });
            }
        }
        let (mut full, mut stop) = (false, None);
        while done < count && stop.is_none() && stream.tx().phase.load(Relaxed) == phase::RING {
            let space = match guard.sender.reserve(((count - done) as u64).min(CHUNK * 4)) {
                Ok(Some(space)) => space,
                Ok(None) => {
                    full = true;
                    break;
                }
                Err(_) => {
                    stream.reset(fd, Reason::Violation);
                    return Outcome::Done(if done == 0 { BROKEN } else { done as isize });
                }
            };
            let (at, len) = guard.sender.piece(space);
            // SAFETY: the piece is reserved space of the ring.
            let got = unsafe { sys::pread(file, at, len, offset.as_ref().map(|at| **at)) };
            let used = got.max(0) as u64;
            if used != space.len && !guard.sender.give_back(space, used) {
                // Only a handler that sent in the middle of this brings us here: its bytes lie
                // behind a gap that cannot be closed.
                stream.reset(fd, Reason::Call);
                return Outcome::Done(BROKEN);
            }
            if let Some(offset) = offset.as_deref_mut() {
                *offset += used as i64;
            }
            done += used as usize;
            if got <= 0 {
                stop = Some(got);
            }
            guard.sender.publish();
            if wake::asked(&stream.out().bytes) != 0 {
                demote::after_answer(
                    held,
                    stream,
                    &guard,
                    fd,
                    stream.answer(fd, &stream.out().bytes),
                );
            }
        }
        let wants = stream.out().bytes.want.load(Acquire);
        if full && wants & (want::DEMOTED | want::CLOSED | want::LEAVE) != 0 {
            demote::after_answer(held, stream, &guard, fd, wants);
        }
        drop(guard);
        match stop {
            Some(error) if error < 0 && done == 0 => return Outcome::Done(error),
            Some(_) => return Outcome::Done(done as isize),
            None if done == count => return Outcome::Done(done as isize),
            None => {}
        }
        if !full || peer_has_gone(held, stream, fd) {
            continue;
        }
        if is_nonblocking(stream, 0) {
            // Said before the last look, so that space which comes now is an edge.
            held.conn.wants_space.store(1, SeqCst);
            if wait::sendable(stream, stream.ring_size() / 3) {
                continue;
            }
            return Outcome::Done(if done == 0 { AGAIN } else { done as isize });
        }
        if !wait::spin(&held.conn.spin_score, || wait::sendable(stream, 1))
            && let Err(error) = wait::for_space(held, stream, fd)
        {
            return Outcome::Done(if done == 0 { error } else { done as isize });
        }
    }
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

/// Bytes that the other end has not received (`SIOCOUTQ`). `None`: ask the kernel.
pub fn unsent(stream: &Stream, fd: c_int) -> Option<c_int> {
    let guard = stream.lock_tx(fd);
    if stream.tx().phase.load(Acquire) != phase::RING {
        return None;
    }
    let space = guard.sender.space().ok()?;
    Some((stream.ring_size() - space).min(c_int::MAX as u64) as c_int)
}

/// `splice` from a pipe onto a stream: what the pipe holds now is read straight into the ring.
pub fn splice_in<'a>(
    held: &Use,
    stream: &'a Stream,
    fd: c_int,
    pipe: c_int,
    len: usize,
    wait: bool,
) -> Outcome<'a> {
    if stream.tx().phase.load(Acquire) != phase::RING {
        match send_file(held, stream, fd, pipe, None, 0) {
            Outcome::Done(0) => {}
            other => return other,
        }
    }
    loop {
        match sys::ioctl_int(pipe, libc::FIONREAD) {
            None => return Outcome::Done(-(libc::EINVAL as isize)),
            Some(0) => {}
            Some(ready) => return send_file(held, stream, fd, pipe, None, len.min(ready as usize)),
        }
        let nonblocking =
            !wait || sys::fcntl(pipe, libc::F_GETFL, 0) & libc::O_NONBLOCK as isize != 0;
        let seen = sys::poll_one(pipe, libc::POLLIN, if nonblocking { 0 } else { 1000 });
        if seen < 0 {
            return Outcome::Done(seen);
        }
        let readable = sys::ioctl_int(pipe, libc::FIONREAD) != Some(0);
        if seen & libc::POLLHUP as isize != 0 && !readable {
            return Outcome::Done(0);
        }
        if nonblocking && !readable {
            return Outcome::Done(AGAIN);
        }
    }
}

/// Bytes that a pipe takes without blocking once it is writable.
const PIPE_PIECE: usize = 4096;

/// `splice` from a stream into a pipe: a piece that the pipe has room for.
pub fn splice_out<'a>(
    held: &Use,
    stream: &'a Stream,
    fd: c_int,
    pipe: c_int,
    len: usize,
    wait: bool,
) -> Outcome<'a> {
    if !matches!(
        stream.rx().phase.load(Acquire),
        phase::RING | phase::SWITCHING
    ) {
        return Outcome::Kernel(None);
    }
    let mut bytes = [0_u8; PIPE_PIECE];
    let part = iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: len.min(PIPE_PIECE),
    };
    // SAFETY: one entry that describes the local buffer.
    let Ok(buffers) = (unsafe { Buffers::new(&part, 1, 0) }) else {
        return Outcome::Done(AGAIN);
    };
    let flags = if wait { 0 } else { libc::MSG_DONTWAIT };
    // Wait for bytes first, then for room, then move them.
    let ready = match recv(held, stream, fd, &buffers, libc::MSG_PEEK | flags) {
        Outcome::Done(ready) if ready > 0 => ready as usize,
        other => return other,
    };
    loop {
        let seen = sys::poll_one(pipe, libc::POLLOUT, if wait { 1000 } else { 0 });
        if seen & libc::POLLOUT as isize != 0 && seen > 0 {
            break;
        }
        if seen < 0 || !wait {
            return Outcome::Done(if seen < 0 { seen } else { AGAIN });
        }
    }
    let part = iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: ready,
    };
    // SAFETY: as above.
    let Ok(buffers) = (unsafe { Buffers::new(&part, 1, 0) }) else {
        return Outcome::Done(AGAIN);
    };
    match recv(held, stream, fd, &buffers, libc::MSG_DONTWAIT) {
        Outcome::Done(got) if got > 0 => {
            // SAFETY: `got` bytes of the local buffer are filled.
            Outcome::Done(unsafe { sys::write(pipe, bytes.as_ptr(), got as usize) })
        }
        other => other,
    }
}
