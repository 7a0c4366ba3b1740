//! The daemon's end of a program's connection, as an anchor: the calls of the anchors' thread on it, none of which waits. With its
//! stream it is what an [`End`](rdsock_shm::end::End) is driven with.
//!
//! Opts into `unsafe` where the trait hands over addresses, each with a bound that the caller vouches for.

use crate::stream::NodeStream;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, setsockopt, shutdown, sockopt};
use rdsock_shm::end::{Anchor, Got, Patience, Process, Shut, Take, Until};
use rdsock_shm::layout::Counter;
use rdsock_shm::lock::Owner;
use rdsock_shm::reason::Reason;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

/// Who holds a half: the anchors' thread, which has all of a stream's but one step,
const ANCHORS: Owner = Owner::new(1, 1 << 4);
/// and the poll core, which moves what comes in to the ring.
pub const POLL_CORE: Owner = Owner::new(1, 2 << 4);

/// The socket.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Urgent bytes are read in their place: beside it, the kernel says that there is nothing to read, and that there is.
    pub fn new(socket: OwnedFd) -> Self {
        // It can't fail on a TCP socket.
        let _ = setsockopt(&socket, sockopt::OobInline, &true);
        Socket(socket)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a call gave.
fn got(result: Result<usize, Errno>) -> Got {
    match result {
        Ok(0) => Got::End,
        Ok(bytes) => Got::Bytes(bytes),
        Err(Errno::EAGAIN | Errno::EINTR) => Got::Nothing,
        Err(errno) => Got::Error(errno as i32),
    }
}

/// The daemon's end of a program's connection, with what its stream knows of it.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    pub socket: &'a Socket,
    pub stream: &'a NodeStream,
}

impl Side<'_> {
    fn fd(&self) -> i32 {
        self.socket.0.as_raw_fd()
    }
}

impl Anchor for Side<'_> {
    unsafe fn send(&self, from: *const u8, len: usize) -> Got {
        // SAFETY: the caller vouches for the bytes.
        let bytes = unsafe { std::slice::from_raw_parts(from, len) };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        got(send(self.fd(), bytes, flags))
    }

    fn peek(&self) -> Got {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
        got(recv(self.fd(), &mut [0], flags))
    }

    unsafe fn take(&self, to: *mut u8, len: usize, how: Take) -> Got {
        let flags = match how {
            Take::Into => MsgFlags::empty(),
            Take::Peek => MsgFlags::MSG_PEEK,
            Take::Discard => MsgFlags::MSG_TRUNC,
            Take::Count => MsgFlags::MSG_TRUNC | MsgFlags::MSG_PEEK,
        };
        // SAFETY: the caller vouches for the buffer, which is written only.
        let bytes = unsafe { std::slice::from_raw_parts_mut(to, len) };
        got(recv(self.fd(), bytes, flags | MsgFlags::MSG_DONTWAIT))
    }

    fn unread(&self) -> Option<u64> {
        let mut count: libc::c_int = 0;
        // SAFETY: FIONREAD writes an int.
        let result = unsafe { libc::ioctl(self.fd(), libc::FIONREAD, &raw mut count) };
        (result == 0).then_some(count.max(0) as u64)
    }

    /// All that was sent is counted from the first byte on.
    fn sent(&self) -> Option<u64> {
        Some(self.stream.given())
    }

    /// Likewise.
    fn received(&self) -> Option<u64> {
        Some(self.stream.shared().rx().tail.load(Ordering::Relaxed))
    }

    /// An error stays, for who reads.
    fn is_open(&self) -> bool {
        let mut asked = libc::pollfd {
            fd: self.fd(),
            events: libc::POLLRDHUP,
            revents: 0,
        };
        // SAFETY: one entry.
        unsafe { libc::poll(&raw mut asked, 1, 0) == 0 }
    }

    fn shut(&self, which: Shut) {
        let how = match which {
            Shut::Sending => Shutdown::Write,
            Shut::Receiving => Shutdown::Read,
        };
        // It fails when the program has reset the connection, which is seen elsewhere.
        let _ = shutdown(self.fd(), how);
    }

    fn break_at_close(&self) {
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        // Closing then sends RST. If it can't be set, the program sees the mark all the same.
        let _ = setsockopt(&self.socket.0, sockopt::Linger, &linger);
    }

    fn break_now(&self) {
        // SAFETY: zeroes are an address, of no family: AF_UNSPEC.
        let nowhere: libc::sockaddr = unsafe { std::mem::zeroed() };
        let len = size_of_val(&nowhere) as libc::socklen_t;
        // SAFETY: the address is as long as it says.
        if unsafe { libc::connect(self.fd(), &raw const nowhere, len) } != 0 {
            self.break_at_close();
        }
    }

    /// Epoll tells of each of them.
    fn wait(&self, _what: Until, _ms: u32) -> bool {
        false
    }

    fn wait_fd(&self) -> i32 {
        self.fd()
    }
}

impl Process for Side<'_> {
    const IN_PLACE: bool = true;

    fn me(&self) -> Owner {
        ANCHORS
    }

    fn is_sending(&self) -> bool {
        false
    }

    /// While the poll core holds a half: for one step.
    fn give_way(&self) {
        std::thread::yield_now();
    }

    fn rest(&self) {}

    fn milliseconds(&self) -> u64 {
        0
    }

    /// Others wait for the thread: what has not come is come back for.
    fn patience(&self) -> Patience<'_> {
        Patience {
            spent: None,
            most: 0,
            every: 1,
        }
    }

    fn is_running(&self, _pid: u32) -> bool {
        true
    }

    fn name(&self) -> u64 {
        ANCHORS.word()
    }

    fn is_awake(&self, _name: u64) -> bool {
        true
    }

    fn barrier(&self) {}

    fn has_barriers(&self) -> bool {
        false
    }

    fn count(&self, _what: Counter) {}

    /// The poll core is told behind each look at the anchor.
    fn look_later(&self) {}

    fn broken(&self, reason: Reason) {
        let stream = self.stream.ticket;
        tracing::debug!(stream, why = reason.text(), "a stream is broken");
    }

    fn left(&self, _reason: Reason) {}
}
