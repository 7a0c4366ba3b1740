//! The daemon's end of a program's connection, as an anchor: the calls of the anchors' thread on it, none of which waits.
//!
//! Opts into `unsafe` where the trait hands over addresses, each with a bound that the caller vouches for.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, setsockopt, shutdown, sockopt};
use rdsock_shm::end::{Anchor, Got, Shut, Take, Until};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

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

impl Anchor for Socket {
    unsafe fn send(&self, from: *const u8, len: usize) -> Got {
        // SAFETY: the caller vouches for the bytes.
        let bytes = unsafe { std::slice::from_raw_parts(from, len) };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        got(send(self.0.as_raw_fd(), bytes, flags))
    }

    fn peek(&self) -> Got {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
        got(recv(self.0.as_raw_fd(), &mut [0], flags))
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
        got(recv(
            self.0.as_raw_fd(),
            bytes,
            flags | MsgFlags::MSG_DONTWAIT,
        ))
    }

    fn unread(&self) -> Option<u64> {
        let mut count: libc::c_int = 0;
        // SAFETY: FIONREAD writes an int.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::FIONREAD, &raw mut count) };
        (result == 0).then_some(count.max(0) as u64)
    }

    /// The anchors' thread counts what it sends itself.
    fn sent(&self) -> Option<u64> {
        None
    }

    /// Likewise.
    fn received(&self) -> Option<u64> {
        None
    }

    fn is_open(&self) -> bool {
        !matches!(self.peek(), Got::End | Got::Error(_))
    }

    fn shut(&self, which: Shut) {
        let how = match which {
            Shut::Sending => Shutdown::Write,
            Shut::Receiving => Shutdown::Read,
        };
        // It fails when the program has reset the connection, which is seen elsewhere.
        let _ = shutdown(self.0.as_raw_fd(), how);
    }

    fn break_at_close(&self) {
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        // Closing then sends RST. If it can't be set, the program sees the mark all the same.
        let _ = setsockopt(&self.0, sockopt::Linger, &linger);
    }

    fn wait(&self, what: Until, ms: u32) -> bool {
        let events = match what {
            Until::Bytes => PollFlags::POLLIN,
            Until::Room => PollFlags::POLLOUT,
        };
        let timeout = PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX);
        poll(&mut [PollFd::new(self.0.as_fd(), events)], timeout).is_ok_and(|ready| ready != 0)
    }

    fn wait_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}
