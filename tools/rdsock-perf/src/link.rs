//! One connected stream socket and the calls that move bytes on it.
//!
//! Every measured byte goes through [`Link::try_send`] and [`Link::try_recv`]: one `send` or `recv` each, with
//! `MSG_DONTWAIT` when spinning. Partial transfers and `EINTR` are handled by the callers of those two, below.

use crate::error::{Doing, Error, Result};
use crate::plan::Wait;
use crate::wire::RECORD;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

/// A connected socket of either family.
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// A UNIX stream socket.
    Unix(UnixStream),
}

/// A connected stream socket and the way in which calls on it wait. Dropping it closes the socket.
pub struct Link {
    stream: Stream,
    fd: RawFd,
    wait: Wait,
}

impl Link {
    /// Takes over a connected stream socket.
    pub fn new(stream: Stream, wait: Wait) -> Self {
        let fd = match &stream {
            Stream::Tcp(tcp) => tcp.as_raw_fd(),
            Stream::Unix(unix) => unix.as_raw_fd(),
        };
        Self { stream, fd, wait }
    }

    /// Changes how calls wait from now on.
    pub fn set_wait(&mut self, wait: Wait) {
        self.wait = wait;
    }

    /// Sends small messages at once (`TCP_NODELAY`); nothing to do on a UNIX socket.
    pub fn set_nodelay(&self) -> Result<()> {
        match &self.stream {
            Stream::Tcp(tcp) => tcp.set_nodelay(true).doing(|| "set TCP_NODELAY"),
            Stream::Unix(_) => Ok(()),
        }
    }

    /// The two addresses of a TCP connection as text, (local, peer); empty for a UNIX socket.
    pub fn ends(&self) -> Result<(String, String)> {
        let Stream::Tcp(tcp) = &self.stream else {
            return Ok(Default::default());
        };
        let doing = || "ask for the addresses of a connection";
        Ok((
            tcp.local_addr().doing(doing)?.to_string(),
            tcp.peer_addr().doing(doing)?.to_string(),
        ))
    }

    /// The flag that makes a call return instead of sleeping, where this link spins.
    #[inline(always)]
    fn waiting_flag(&self, wait: Wait) -> i32 {
        match wait {
            Wait::Spin => libc::MSG_DONTWAIT,
            Wait::Block => 0,
        }
    }

    /// One `send`: how many bytes it took, or `None` where it must be called again.
    #[inline]
    fn try_send(&self, bytes: &[u8], wait: Wait) -> Result<Option<usize>> {
        let flags = self.waiting_flag(wait) | libc::MSG_NOSIGNAL;
        // SAFETY: `bytes` is readable for its length, and the fd is open for as long as `self` lives.
        let sent = unsafe { libc::send(self.fd, bytes.as_ptr().cast(), bytes.len(), flags) };
        if sent >= 0 {
            Ok(Some(sent as usize))
        } else {
            again("send")
        }
    }

    /// One `recv`: how many bytes it gave (0 at the end of the stream), or `None` where it must be called again.
    #[inline]
    fn try_recv(&self, buffer: &mut [u8], wait: Wait) -> Result<Option<usize>> {
        let flags = self.waiting_flag(wait);
        // SAFETY: `buffer` is writable for its length, and the fd is open for as long as `self` lives.
        let received =
            unsafe { libc::recv(self.fd, buffer.as_mut_ptr().cast(), buffer.len(), flags) };
        if received >= 0 {
            Ok(Some(received as usize))
        } else {
            again("recv")
        }
    }

    /// Sends without ever sleeping, whatever the link's way of waiting: bytes taken, 0 where there is no room.
    #[inline]
    pub fn send_now(&self, bytes: &[u8]) -> Result<usize> {
        Ok(self.try_send(bytes, Wait::Spin)?.unwrap_or(0))
    }

    /// Receives without ever sleeping: bytes received, 0 where there are none; the end of the stream is an error.
    #[inline]
    pub fn recv_now(&self, buffer: &mut [u8]) -> Result<usize> {
        match self.try_recv(buffer, Wait::Spin)? {
            Some(0) => Err(cut_short()),
            Some(received) => Ok(received),
            None => Ok(0),
        }
    }

    /// Sends all of `bytes`.
    #[inline]
    pub fn send_all(&self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if let Some(sent) = self.try_send(bytes, self.wait)? {
                bytes = &bytes[sent..];
            }
        }
        Ok(())
    }

    /// Receives what there is, at least one byte; 0 at the end of the stream.
    #[inline]
    pub fn recv_some(&self, buffer: &mut [u8]) -> Result<usize> {
        loop {
            if let Some(received) = self.try_recv(buffer, self.wait)? {
                return Ok(received);
            }
        }
    }

    /// Fills `buffer`; the end of the stream is an error.
    #[inline]
    pub fn recv_exact(&self, buffer: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.recv_some(&mut buffer[filled..])? {
                0 => return Err(cut_short()),
                received => filled += received,
            }
        }
        Ok(())
    }

    /// Receives one record, sleeping in the kernel; `None` where the stream ends before its first byte.
    pub fn recv_record(&self) -> Result<Option<[u8; RECORD]>> {
        let mut record = [0; RECORD];
        let mut filled = 0;
        while filled < RECORD {
            match self.try_recv(&mut record[filled..], Wait::Block)? {
                Some(0) if filled == 0 => return Ok(None),
                Some(0) => return Err(cut_short()),
                Some(received) => filled += received,
                None => {}
            }
        }
        Ok(Some(record))
    }
}

/// After a failed call: `None` where it is to be repeated, else the error.
#[cold]
fn again(call: &str) -> Result<Option<usize>> {
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR) => Ok(None),
        _ => Err(Error::Io {
            doing: call.into(),
            source: error,
        }),
    }
}

/// The peer closed the stream in the middle of something.
fn cut_short() -> Error {
    Error::Peer("the other end closed the connection in the middle of a measurement".into())
}
