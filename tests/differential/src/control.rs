//! What the conductor and the processes say to each other: lines of text over a UNIX socket that keeps their boundaries.
//! A request is `NUMBER THREAD WORDS`, an answer `NUMBER TEXT`. Hidden words say where in its direction a transfer
//! starts, see [`Place`].

use std::fmt::{Display, Formatter, Result as Formatted};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket,
};

use crate::pattern::Direction;

/// The longest line.
pub const LONGEST: usize = 32 << 10;

/// A socket that keeps boundaries.
///
/// # Errors
/// When the system has none.
pub fn new_socket() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
}

/// A process's end, connected to the conductor.
///
/// # Errors
/// When nobody listens there.
pub fn dial(path: &Path) -> nix::Result<OwnedFd> {
    let socket = new_socket()?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

/// Says a line.
///
/// # Errors
/// When the other end has gone.
pub fn say(socket: &OwnedFd, line: &str) -> nix::Result<()> {
    let sent = send(socket.as_raw_fd(), line.as_bytes(), MsgFlags::MSG_NOSIGNAL)?;
    debug_assert_eq!(sent, line.len());
    Ok(())
}

/// The next line; `None` when the other end has gone.
///
/// # Errors
/// As `recv`.
pub fn hear(socket: &OwnedFd) -> nix::Result<Option<String>> {
    let mut bytes = vec![0; LONGEST];
    let length = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty())?;
    bytes.truncate(length);
    Ok((length > 0).then(|| String::from_utf8_lossy(&bytes).into_owned()))
}

/// Where a transfer starts: `@CONN:FROM:AT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The direction.
    pub direction: Direction,
    /// The byte's number.
    pub at: u64,
}

impl Display for Place {
    fn fmt(&self, out: &mut Formatter) -> Formatted {
        let Direction { conn, from } = self.direction;
        write!(out, "@{conn}:{from}:{}", self.at)
    }
}

impl Place {
    /// Reads it.
    pub fn parse(word: &str) -> Option<Self> {
        let mut numbers = word.strip_prefix('@')?.split(':');
        let place = Place {
            direction: Direction {
                conn: numbers.next()?.parse().ok()?,
                from: numbers.next()?.parse().ok()?,
            },
            at: numbers.next()?.parse().ok()?,
        };
        numbers.next().is_none().then_some(place)
    }
}
