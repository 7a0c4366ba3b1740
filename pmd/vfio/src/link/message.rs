//! What linked processes send each other: packets of eight words, little-endian, with at most one file.
//!
//! The counterpart is another process of the same user; what it sends is checked here, once.

//!
//! Opts into `unsafe` to receive files: what the safe call hides when there are too few descriptors must be known here.

use crate::link::spare::Spare;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, recv, sendmsg};
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

/// First word of a greeting's body: the bytes `rde-link`.
const MAGIC: u64 = u64::from_le_bytes(*b"rde-link");
/// Version of the messages and of what processes share, the layout of ports included.
pub const VERSION: u64 = 1;

const WORDS: usize = 8;
const BYTES: usize = WORDS * 8;

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
    /// As [`Unreceived::Nothing`], for now.
    #[error("there is no descriptor for the file that has come")]
    NoDescriptor,
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

    /// Receives one and its file, without waiting. Nothing is lost when there is no descriptor for the file: the message
    /// stays where it is, and can be received later.
    pub fn receive(
        socket: &impl AsFd,
        spare: &mut Spare,
    ) -> Result<(Self, Option<OwnedFd>), Unreceived> {
        let mut bytes = [0; BYTES + 1];
        let mut packet = peek(socket, &mut bytes)?;
        while packet.is_short && packet.files.is_empty() {
            if !spare.give() {
                return Err(Unreceived::NoDescriptor);
            }
            packet = peek(socket, &mut bytes)?;
        }
        let mut files = packet.files;
        if packet.len == 0 && files.is_empty() {
            return Err(Unreceived::Closed);
        }
        // Once more, to take it out. What came with it was received above, and is not received again.
        let flags = MsgFlags::MSG_DONTWAIT;
        recv(socket.as_fd().as_raw_fd(), &mut [0], flags).map_err(unreceived)?;
        if packet.len != BYTES || files.len() > 1 {
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

fn unreceived(error: Errno) -> Unreceived {
    match error {
        Errno::EAGAIN | Errno::EINTR => Unreceived::Nothing,
        Errno::ECONNRESET => Unreceived::Closed,
        error => error.into(),
    }
}

/// A packet that is still in the socket.
struct Packet {
    len: usize,
    files: Vec<OwnedFd>,
    /// It has more files than were received.
    is_short: bool,
}

/// Looks at what comes next.
fn peek(socket: &impl AsFd, bytes: &mut [u8]) -> Result<Packet, Unreceived> {
    // Room for a header and two files: of more, the kernel passes none.
    let mut control = [0_u64; 3];
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: made of integers and pointers, for which zeroes are values.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control) as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC | libc::MSG_PEEK;
    // SAFETY: all that the header names is alive, writable and as long as it says.
    let len = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &mut header, flags) };
    let len = Errno::result(len).map_err(unreceived)?;
    let mut files = Vec::new();
    // SAFETY: the kernel has filled the header in, and `control` is alive.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&header) };
    // SAFETY: null, or inside `control`, which is aligned as the kernel's headers are.
    while let Some(found) = unsafe { next.as_ref() } {
        if (found.cmsg_level, found.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: it only computes.
            let head = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = (found.cmsg_len - head) / size_of::<RawFd>();
            // SAFETY: inside `control`, as the kernel says.
            let fds = unsafe { libc::CMSG_DATA(next) }.cast::<RawFd>();
            for at in 0..count {
                // SAFETY: as above; and the kernel made the descriptor for this process just now, so nobody else
                // knows it.
                files.push(unsafe { OwnedFd::from_raw_fd(fds.add(at).read_unaligned()) });
            }
        }
        // SAFETY: as above.
        next = unsafe { libc::CMSG_NXTHDR(&header, next) };
    }
    Ok(Packet {
        len: len as usize,
        files,
        is_short: header.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC;
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
    }

    #[test]
    fn messages_come_once_in_order_and_with_their_files() {
        let (a, b) = pair();
        let file = sealed_file();
        Message::Port.send(&a, Some(&file)).unwrap();
        Message::Ready { change: 7 }.send(&a, None).unwrap();
        let spare = &mut Spare::default();
        let (first, with) = Message::receive(&b, spare).unwrap();
        assert!(first == Message::Port && with.is_some());
        let (second, with) = Message::receive(&b, spare).unwrap();
        assert!(second == Message::Ready { change: 7 } && with.is_none());
        let none = Message::receive(&b, spare).unwrap_err();
        assert!(matches!(none, Unreceived::Nothing));
        drop(a);
        let none = Message::receive(&b, spare).unwrap_err();
        assert!(matches!(none, Unreceived::Closed));
    }

    #[test]
    fn more_files_than_one_are_garbage() {
        let file = sealed_file();
        for count in [2, 3, 253] {
            let (a, b) = pair();
            let fds = vec![file.as_raw_fd(); count];
            let rights = [ControlMessage::ScmRights(&fds)];
            let bytes = [0; BYTES];
            let parts = [IoSlice::new(&bytes)];
            sendmsg::<UnixAddr>(a.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).unwrap();
            let refused = Message::receive(&b, &mut Spare::default()).unwrap_err();
            assert!(matches!(refused, Unreceived::Garbage), "{count}");
        }
    }

    fn sealed_file() -> OwnedFd {
        use nix::sys::memfd::MFdFlags;
        crate::sealed::make(c"test", 4096, MFdFlags::empty())
            .unwrap()
            .into()
    }
}
