//! What linked processes send each other: packets of eight words, little-endian, with at most one file.
//!
//! The counterpart is another process of the same user; what it sends is checked here, once.

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

/// First word of a greeting's body: the bytes `rde-link`.
const MAGIC: u64 = u64::from_le_bytes(*b"rde-link");
/// Version of the messages and of what processes share, the layout of ports included.
pub const VERSION: u64 = 1;

const WORDS: usize = 8;
const BYTES: usize = WORDS * 8;
/// Most files that the kernel passes in one message, so that none is ever left behind.
const MAX_FILES: usize = 253;

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// The first in each direction: who it is, and what it puts into locks.
    Hello { version: u64, id: u64, token: u64 },
    /// With a file: the port.
    Port,
    /// With a file: memory that the device reaches, from a change on.
    Map {
        change: u64,
        iova: u64,
        len: u64,
        offset: u64,
        writable: bool,
    },
    /// Memory that it does not reach any more.
    Unmap { change: u64, iova: u64, len: u64 },
    /// With an eventfd: how to fire a vector. Without: not at all.
    Vector { change: u64, vector: u64 },
    /// All that was before this change has been said.
    Ready { change: u64 },
}

/// Why nothing was received.
#[derive(Debug, thiserror::Error)]
pub enum Unreceived {
    #[error("nothing has come")]
    Nothing,
    #[error("it has closed the link")]
    Closed,
    #[error("it sent what is no message")]
    Garbage,
    #[error(transparent)]
    Io(#[from] Errno),
}

impl Message {
    fn encode(self) -> [u64; WORDS] {
        match self {
            Message::Hello { version, id, token } => [1, MAGIC, version, id, token, 0, 0, 0],
            Message::Port => [2, 0, 0, 0, 0, 0, 0, 0],
            Message::Map {
                change,
                iova,
                len,
                offset,
                writable,
            } => [3, change, iova, len, offset, writable.into(), 0, 0],
            Message::Unmap { change, iova, len } => [4, change, iova, len, 0, 0, 0, 0],
            Message::Vector { change, vector } => [5, change, vector, 0, 0, 0, 0, 0],
            Message::Ready { change } => [6, change, 0, 0, 0, 0, 0, 0],
        }
    }

    fn decode(words: [u64; WORDS]) -> Option<Self> {
        let [kind, a, b, c, d, e, ..] = words;
        Some(match kind {
            1 if a == MAGIC => Message::Hello {
                version: b,
                id: c,
                token: d,
            },
            2 => Message::Port,
            3 if e <= 1 => Message::Map {
                change: a,
                iova: b,
                len: c,
                offset: d,
                writable: e == 1,
            },
            4 => Message::Unmap {
                change: a,
                iova: b,
                len: c,
            },
            5 => Message::Vector {
                change: a,
                vector: b,
            },
            6 => Message::Ready { change: a },
            _ => return None,
        })
    }

    /// Sends it, without waiting: `EAGAIN` when there is no room.
    pub fn send(self, socket: &impl AsFd, file: Option<&OwnedFd>) -> Result<(), Errno> {
        let bytes: Vec<u8> = self
            .encode()
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .collect();
        let fds = file.map(|file| [file.as_raw_fd()]);
        let control: Vec<ControlMessage<'_>> = fds
            .iter()
            .map(|fds| ControlMessage::ScmRights(fds))
            .collect();
        sendmsg::<UnixAddr>(
            socket.as_fd().as_raw_fd(),
            &[IoSlice::new(&bytes)],
            &control,
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map(|_| ())
    }

    /// Receives one and its file, without waiting.
    pub fn receive(socket: &impl AsFd) -> Result<(Self, Option<OwnedFd>), Unreceived> {
        let mut bytes = [0; BYTES + 1];
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let mut control = nix::cmsg_space!([RawFd; MAX_FILES]);
        let received = recvmsg::<UnixAddr>(
            socket.as_fd().as_raw_fd(),
            &mut parts,
            Some(&mut control),
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC,
        );
        let received = match received {
            Ok(received) => received,
            Err(Errno::EAGAIN | Errno::EINTR) => return Err(Unreceived::Nothing),
            Err(Errno::ECONNRESET) => return Err(Unreceived::Closed),
            Err(error) => return Err(error.into()),
        };
        let mut files = Vec::new();
        for control in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: the kernel made them for this process just now, and nobody else knows them.
                files.extend(
                    fds.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        let len = received.bytes;
        if len == 0 && files.is_empty() {
            return Err(Unreceived::Closed);
        }
        if len != BYTES || files.len() > 1 {
            return Err(Unreceived::Garbage);
        }
        let mut words = [0; WORDS];
        for (word, eight) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*eight);
        }
        let message = Message::decode(words).ok_or(Unreceived::Garbage)?;
        Ok((message, files.pop()))
    }
}
