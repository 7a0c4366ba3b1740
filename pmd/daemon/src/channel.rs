//! A control connection: datagrams with fds in, datagrams with fds out, nothing blocks.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg, setsockopt, sockopt,
};
use rdsock_shm::control::Message;

/// Messages that may wait for a tenant that does not read. Each answers a request of the tenant's
/// own, so an honest one never comes near.
const MAX_QUEUED: usize = 65536;
/// Longest datagram that is a message; a longer one is cut off by the kernel and is none.
const LONGEST: usize = 256;
/// Most fds that the kernel passes in one message, so that none is ever left behind.
const MAX_FDS: usize = 253;

/// A datagram from the other side.
#[derive(Debug)]
pub struct Received {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The fds beside it.
    pub fds: Vec<OwnedFd>,
    /// Process that sent it, by the kernel's word.
    pub sender: i32,
}

/// A datagram to the other side.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The fds beside it.
    pub fds: Vec<Rc<OwnedFd>>,
}

/// What a receive found.
#[derive(Debug)]
pub enum Receive {
    /// A datagram.
    Message(Received),
    /// Nothing now.
    Nothing,
    /// The other side has hung up.
    Closed,
}

/// How far a send came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Everything is sent.
    Done,
    /// The socket is full: it becomes writable when the other side reads.
    Full,
    /// Too many fds are on their way to processes that do not read, or there is no memory: no
    /// event will say when that ends.
    Later,
}

impl From<Message> for Outgoing {
    fn from(message: Message) -> Self {
        Outgoing {
            bytes: message.as_bytes().to_vec(),
            fds: Vec::new(),
        }
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    queue: VecDeque<Outgoing>,
}

/// The other side does not read what it asked for. Consequence: it is cut off.
#[derive(Debug, thiserror::Error)]
#[error("{MAX_QUEUED} unread messages")]
pub struct Overflow;

impl Channel {
    /// Takes over a connected, non-blocking socket.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        setsockopt(&socket, sockopt::PassCred, &true)?;
        Ok(Channel {
            socket,
            queue: VecDeque::new(),
        })
    }

    /// The socket.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// The next datagram.
    pub fn receive(&self) -> io::Result<Receive> {
        let mut bytes = [0; LONGEST];
        let mut control = nix::cmsg_space!([RawFd; MAX_FDS], libc::ucred);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let fd = self.socket.as_raw_fd();
        let message = match recvmsg::<UnixAddr>(fd, &mut parts, Some(&mut control), flags) {
            Ok(message) => message,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Receive::Nothing),
            Err(Errno::ECONNRESET) => return Ok(Receive::Closed),
            Err(error) => return Err(error.into()),
        };
        let mut fds = Vec::new();
        let mut sender = 0;
        for part in message.cmsgs()? {
            match part {
                ControlMessageOwned::ScmRights(numbers) => {
                    // SAFETY: the kernel has just made these fds for this message, and nothing
                    // else owns them.
                    fds.extend(
                        numbers
                            .iter()
                            .map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }),
                    );
                }
                ControlMessageOwned::ScmCredentials(credentials) => sender = credentials.pid(),
                _ => {}
            }
        }
        let len = message.bytes;
        if len == 0 && sender == 0 {
            return Ok(Receive::Closed);
        }
        Ok(Receive::Message(Received {
            bytes: bytes.get(..len).unwrap_or(&[]).to_vec(),
            fds,
            sender,
        }))
    }

    /// Queues a datagram. Call [`Channel::flush`] afterwards.
    pub fn queue(&mut self, message: Outgoing) -> Result<(), Overflow> {
        if self.queue.len() >= MAX_QUEUED {
            return Err(Overflow);
        }
        self.queue.push_back(message);
        Ok(())
    }

    /// Datagrams that wait.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Sends what the socket takes; `count` is called behind each datagram. (Not before: a tenant
    /// that saw the count and found nothing yet would not look again.)
    pub fn flush(&mut self, mut count: impl FnMut()) -> io::Result<Flush> {
        while let Some(message) = self.queue.front() {
            let fds: Vec<RawFd> = message.fds.iter().map(|fd| fd.as_raw_fd()).collect();
            let rights = [ControlMessage::ScmRights(&fds)];
            let control = if fds.is_empty() { &[][..] } else { &rights[..] };
            let parts = [IoSlice::new(&message.bytes)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<UnixAddr>(self.socket.as_raw_fd(), &parts, control, flags, None) {
                Ok(_) => {
                    self.queue.pop_front();
                    count();
                }
                Err(Errno::EAGAIN) => return Ok(Flush::Full),
                Err(Errno::ETOOMANYREFS | Errno::ENOBUFS | Errno::ENOMEM) => {
                    return Ok(Flush::Later);
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Flush::Done)
    }
}
