//! Whole messages over a stream socket, each within a deadline. Both the client and the server of vfio-user
//! use it, so neither believes the other: a message is framed by the size in its header, which is limited.
//!
//! Opts into `unsafe` to own the descriptors that come with a message.

use super::message::Header;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Instant;

/// Most descriptors that the kernel passes at once, so that none is ever left behind.
const MAX_FILES: usize = 253;

/// A message.
#[derive(Debug)]
pub struct Received {
    pub header: Header,
    pub body: Vec<u8>,
    pub files: Vec<OwnedFd>,
}

/// Why a message was not sent or received. The stream cannot be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("has closed the connection")]
    Closed,
    #[error("did not go on within the time")]
    Late,
    #[error("sent a message of an impossible size")]
    Size,
    #[error("cannot be talked to: {0}")]
    Io(#[from] Errno),
}

/// Sends a message whose body is the parts one after the other. The header's size is filled in.
pub fn send(
    socket: &OwnedFd,
    deadline: Instant,
    header: Header,
    parts: &[&[u8]],
    files: &[BorrowedFd<'_>],
) -> Result<(), Broken> {
    let body: usize = parts.iter().map(|part| part.len()).sum();
    let header = Header {
        size: (Header::LEN + body) as u32,
        ..header
    };
    let mut bytes = Vec::with_capacity(Header::LEN + body);
    bytes.extend_from_slice(&header.bytes());
    for part in parts {
        bytes.extend_from_slice(part);
    }
    let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let mut control = match fds.is_empty() {
        true => vec![],
        false => vec![ControlMessage::ScmRights(&fds)],
    };
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let parts = [IoSlice::new(rest)];
        match sendmsg::<UnixAddr>(socket.as_raw_fd(), &parts, &control, flags, None) {
            Ok(sent) => {
                control.clear();
                rest = rest.get(sent..).unwrap_or(&[]);
            }
            Err(Errno::EAGAIN) => wait(socket, PollFlags::POLLOUT, deadline)?,
            Err(Errno::EINTR) => {}
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(Broken::Closed),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Receives a message whose body has at most `most` bytes.
pub fn receive(socket: &OwnedFd, deadline: Instant, most: usize) -> Result<Received, Broken> {
    let mut files = Vec::new();
    let mut bytes = [0; Header::LEN];
    fill(socket, deadline, &mut bytes, &mut files)?;
    let (header, _) = Header::split(&bytes).ok_or(Broken::Size)?;
    let len = (header.size as usize).checked_sub(Header::LEN);
    let len = len.filter(|len| *len <= most).ok_or(Broken::Size)?;
    let mut body = vec![0; len];
    fill(socket, deadline, &mut body, &mut files)?;
    Ok(Received {
        header,
        body,
        files,
    })
}

fn fill(
    socket: &OwnedFd,
    deadline: Instant,
    buffer: &mut [u8],
    files: &mut Vec<OwnedFd>,
) -> Result<(), Broken> {
    let mut at = 0;
    while at < buffer.len() {
        let mut parts = [IoSliceMut::new(&mut buffer[at..])];
        let mut control = nix::cmsg_space!([RawFd; MAX_FILES]);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let received =
            recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags);
        let received = match received {
            Ok(received) => received,
            Err(Errno::EAGAIN) => {
                wait(socket, PollFlags::POLLIN, deadline)?;
                continue;
            }
            Err(Errno::EINTR) => continue,
            Err(Errno::ECONNRESET) => return Err(Broken::Closed),
            Err(error) => return Err(error.into()),
        };
        for control in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                let owned = fds.into_iter().map(|fd| {
                    // SAFETY: the kernel made it for this process just now, and nobody else knows it.
                    unsafe { OwnedFd::from_raw_fd(fd) }
                });
                files.extend(owned);
            }
        }
        if received.bytes == 0 {
            return Err(Broken::Closed);
        }
        at += received.bytes;
    }
    Ok(())
}

/// Waits until the socket is ready, or the deadline has passed.
fn wait(socket: &OwnedFd, ready: PollFlags, deadline: Instant) -> Result<(), Broken> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(Broken::Late);
    }
    // Rounded up, so that it does not end before the deadline and come again.
    let millis = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
    let mut fds = [PollFd::new(socket.as_fd(), ready)];
    match poll(&mut fds, PollTimeout::from(millis)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
