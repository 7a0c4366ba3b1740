//! A stream's end as this process has it: what `rdsock_shm::end` asks of the kernel and of the process, answered with raw
//! system calls on the program's own descriptor.

use crate::conn::{self, Use};
use crate::state::{PROCESS, TOLD};
use crate::stream::{self, Stream};
use crate::tcp_info::TcpInfo;
use crate::{brand, clock, demote, gather, limits, sys, tenant};
use libc::c_int;
use rdsock_shm::end::{self, Anchor, Got, Limits, Patience, Process, Shut, Take, Until};
use rdsock_shm::layout::Counter;
use rdsock_shm::lock::Owner;
use rdsock_shm::reason::{Reason, State};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*};

/// One end of a stream, for the length of a call.
pub type End<'a> = end::End<'a, Socket<'a>>;

/// The socket under a stream, and the connection that it is for this process.
#[derive(Clone, Copy, Debug)]
pub struct Socket<'a> {
    held: &'a Use,
    stream: &'a Stream,
    fd: c_int,
}

impl Stream {
    /// The end, for a call on `fd`.
    #[inline]
    pub fn at<'a>(&'a self, held: &'a Use, fd: c_int) -> End<'a> {
        End {
            shared: self,
            socket: Socket {
                held,
                stream: self,
                fd,
            },
        }
    }
}

/// Whether urgent data comes next: from asm-generic/sockios.h.
const SIOCATMARK: u64 = 0x8905;

/// What this process has waited for programs of its own user (whose bells it has), and for others: who uses up the patience
/// for one kind leaves the other kind's.
#[derive(Debug)]
pub struct Waited {
    own: AtomicU64,
    others: AtomicU64,
}

impl Waited {
    /// For nobody yet.
    pub const fn new() -> Self {
        Waited {
            own: AtomicU64::new(0),
            others: AtomicU64::new(0),
        }
    }
}

/// What a raw system call gave.
fn got(result: isize) -> Got {
    match result {
        0 => Got::End,
        bytes if bytes > 0 => Got::Bytes(bytes as usize),
        error => match -error as c_int {
            libc::EAGAIN | libc::EINTR => Got::Nothing,
            error => Got::Error(error),
        },
    }
}

/// `SO_LINGER` as it stands in the end page.
pub fn packed(linger: libc::linger) -> u64 {
    u64::from(linger.l_onoff != 0) << 32 | u64::from(linger.l_linger as u32)
}

/// The other way.
pub fn unpacked(linger: u64) -> libc::linger {
    libc::linger {
        l_onoff: (linger >> 32) as c_int,
        l_linger: linger as u32 as c_int,
    }
}

impl Anchor for Socket<'_> {
    unsafe fn send(&self, from: *const u8, len: usize) -> Got {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the caller vouches for the bytes.
        got(unsafe { sys::send_raw(self.fd, from, len, flags) })
    }

    fn peek(&self) -> Got {
        got(sys::recv_now(self.fd, &mut [0], libc::MSG_PEEK))
    }

    unsafe fn take(&self, to: *mut u8, len: usize, how: Take) -> Got {
        let flags = match how {
            Take::Into => 0,
            Take::Peek => libc::MSG_PEEK,
            Take::Discard => libc::MSG_TRUNC,
            Take::Count => libc::MSG_TRUNC | libc::MSG_PEEK,
        };
        // SAFETY: the caller vouches for the buffer.
        got(unsafe { sys::recv_raw(self.fd, to, len, libc::MSG_DONTWAIT | flags) })
    }

    unsafe fn peek_behind(&self, skip: u64, to: *mut u8, len: usize) -> Got {
        // SAFETY: the caller vouches for the buffer.
        match unsafe { sys::peek_behind(self.fd, skip, to, len) } {
            0 => Got::Nothing,
            bytes => Got::Bytes(bytes),
        }
    }

    fn unread(&self) -> Option<u64> {
        Some(sys::ioctl_int(self.fd, libc::FIONREAD)? as u64)
    }

    fn unsent(&self) -> Option<u64> {
        Some(sys::ioctl_int(self.fd, libc::TIOCOUTQ)? as u64)
    }

    fn sent(&self) -> Option<u64> {
        TcpInfo::sent(self.fd, self.stream.end_number() == 0)
    }

    fn received(&self) -> Option<u64> {
        TcpInfo::received(self.fd)
    }

    fn is_open(&self) -> bool {
        TcpInfo::of(self.fd).is_some_and(|info| info.state == TcpInfo::ESTABLISHED)
    }

    fn hears_end(&self) -> bool {
        let ends = libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR;
        sys::poll_one(self.fd, libc::POLLRDHUP, 0).max(0) as i16 & ends != 0
    }

    fn is_at_mark(&self) -> bool {
        sys::ioctl_int(self.fd, SIOCATMARK).is_some_and(|is_there| is_there != 0)
    }

    fn shut(&self, which: Shut) {
        let how = match which {
            Shut::Sending => libc::SHUT_WR,
            Shut::Receiving => libc::SHUT_RD,
        };
        sys::shutdown(self.fd, how);
    }

    fn break_at_close(&self) {
        self.set_linger(1 << 32);
    }

    fn linger(&self) -> u64 {
        sys::getsockopt(self.fd, libc::SOL_SOCKET, libc::SO_LINGER).map_or(0, packed)
    }

    fn set_linger(&self, linger: u64) {
        let linger = unpacked(linger);
        sys::setsockopt(self.fd, libc::SOL_SOCKET, libc::SO_LINGER, &linger);
    }

    fn break_now(&self) {
        if sys::disconnect(self.fd) == 0 {
            // It may be connected anew.
            brand::take_off(self.fd);
        } else {
            // A sandbox, or an old kernel while somebody sleeps in it.
            self.break_at_close();
        }
    }

    fn wait(&self, what: Until, ms: u32) -> bool {
        let events = match what {
            Until::Bytes => libc::POLLIN,
            Until::Room => libc::POLLOUT,
        };
        sys::poll_one(self.fd, events, i64::from(ms)) > 0
    }

    fn wait_fd(&self) -> c_int {
        self.fd
    }
}

impl Process for Socket<'_> {
    #[inline]
    fn me(&self) -> Owner {
        Owner::new(stream::pid(), sys::thread_pointer())
    }

    #[inline]
    fn is_alone(&self) -> bool {
        conn::is_single_threaded()
    }

    fn is_sending(&self) -> bool {
        self.held.conn.in_tx.load(SeqCst) != 0
    }

    fn give_way(&self) {
        sys::sched_yield();
    }

    fn rest(&self) {
        sys::poll_one(-1, 0, 1);
    }

    fn milliseconds(&self) -> u64 {
        clock::nanoseconds() / 1_000_000
    }

    fn patience(&self) -> Patience<'_> {
        let (_, _, bells) = self.stream.places();
        let Waited { own, others } = &PROCESS.waited;
        let account = if bells.is_null() { others } else { own };
        // Of a stream to another node the other end is the daemon, and its thread takes a moment for each token.
        let is_daemon = self.held.conn.names.are_told();
        Patience {
            spent: (!is_daemon).then_some(account),
            most: limits::PATIENCE_MS.get() as u32,
            every: limits::PATIENCE_EVERY_MS.get() as u32,
        }
    }

    fn undisturbed(&self, step: impl FnOnce()) {
        let mask = sys::block_signals();
        step();
        sys::restore_signals(mask);
    }

    fn is_running(&self, pid: u32) -> bool {
        sys::is_alive(pid)
    }

    fn may_have_anchor(&self, pid: u32) -> bool {
        sys::may_have_open(pid, self.fd)
    }

    fn name(&self) -> u64 {
        sys::thread_name(stream::pid())
    }

    fn is_awake(&self, name: u64) -> bool {
        sys::is_thread_alive((name >> 32) as u32, name as u32)
    }

    fn barrier(&self) {
        if !sys::membarrier() {
            // Forbidden since (a sandbox): no store buffer holds a store for so long.
            self.rest();
        }
    }

    #[inline]
    fn has_barriers(&self) -> bool {
        stream::has_barriers()
    }

    #[inline]
    fn gather(&self, found: u64, now: impl FnOnce() -> u64) {
        gather::let_gather(self.held.conn, found, now);
    }

    fn wake(&self, word: &AtomicU32) {
        sys::futex_wake(word);
    }

    fn count(&self, what: Counter) {
        tenant::count(what);
    }

    fn changed(&self) {
        (TOLD.changed)(self.held.conn);
    }

    fn look_later(&self) {
        self.held.conn.look.store(1, Relaxed);
    }

    fn broken(&self, reason: Reason) {
        tenant::stream_left(self.fd, self.stream, State::Reset, reason);
    }

    #[inline]
    fn limits(&self) -> Limits {
        Limits {
            piece: limits::PIECE.get(),
            chunk: limits::CHUNK.get(),
            hot_mask: limits::HOT_AFTER.mask(),
        }
    }

    fn left(&self, reason: Reason) {
        tenant::stream_left(self.fd, self.stream, State::Demoted, reason);
        demote::restore_options(self.held, self.fd);
        (TOLD.left)(self.held);
    }
}
