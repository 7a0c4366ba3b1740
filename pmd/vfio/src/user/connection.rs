//! Questions to a vfio-user server and its answers, one at a time. The server is not believed: an answer that cannot
//! be, or none within the time, ends the connection for good.

use super::message::{Header, MAJOR, MINOR, Version, command, flag};
use super::socket::{self, Broken, Received};
use crate::device::BusError;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket};
use nix::unistd::geteuid;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most bytes of an answer that make sense: a region with some hundred areas.
const MOST: usize = 8192;
/// Between two attempts to connect to a server that has no room for more.
const RETRY: Duration = Duration::from_millis(5);
/// What a client can do, said with its version.
const CAPABILITIES: &[u8] = b"{\"capabilities\":{\"max_msg_fds\":1,\"max_data_xfer_size\":4096}}\0";

/// A connection.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    /// Id of the last question. Locked while one is asked.
    turn: Mutex<u16>,
    gone: AtomicBool,
    patience: Duration,
}

/// An answer: its body, and at most one file.
#[derive(Debug)]
pub struct Answer {
    pub body: Vec<u8>,
    pub file: Option<OwnedFd>,
}

impl Connection {
    /// Connects, and agrees on a version.
    pub fn open(path: &Path, patience: Duration) -> Result<Self, BusError> {
        let connection = Connection {
            socket: dial(path, Instant::now() + patience)?,
            turn: Mutex::new(0),
            gone: AtomicBool::new(false),
            patience,
        };
        let ours = Version {
            major: MAJOR,
            minor: MINOR,
        };
        let what = "agree on a version";
        let answer = connection.ask(what, command::VERSION, &[&ours.bytes(), CAPABILITIES], &[])?;
        match Version::split(&answer.body) {
            Some((theirs, _)) if theirs.major == MAJOR => Ok(connection),
            Some(_) => Err(connection.violated("speaks another major version of vfio-user")),
            None => Err(connection.violated("sent too short an answer")),
        }
    }

    /// Asks, and waits for the answer. `what` is what the server is asked to do.
    pub fn ask(
        &self,
        what: &'static str,
        command: u16,
        parts: &[&[u8]],
        files: &[BorrowedFd<'_>],
    ) -> Result<Answer, BusError> {
        let mut turn = self.turn();
        if self.gone.load(Ordering::Relaxed) {
            return Err(BusError::Server("is gone".into()));
        }
        *turn = turn.wrapping_add(1);
        let id = *turn;
        let header = Header {
            id,
            command,
            ..Header::default()
        };
        let deadline = Instant::now() + self.patience;
        let received = socket::send(&self.socket, deadline, header, parts, files)
            .and_then(|()| socket::receive(&self.socket, deadline, MOST));
        let received = received.map_err(|broken| self.broken(broken))?;
        self.check(what, (id, command), received)
    }

    /// As [`Connection::ask`], for an answer that is a structure: `split` takes it.
    pub fn ask_for<T>(
        &self,
        what: &'static str,
        command: u16,
        parts: &[&[u8]],
        split: impl FnOnce(&[u8]) -> Option<(T, &[u8])>,
    ) -> Result<T, BusError> {
        let answer = self.ask(what, command, parts, &[])?;
        match split(&answer.body) {
            Some((read, _)) => Ok(read),
            None => Err(self.violated("sent too short an answer")),
        }
    }

    fn check(
        &self,
        what: &'static str,
        (id, command): (u16, u16),
        received: Received,
    ) -> Result<Answer, BusError> {
        let Received {
            header,
            body,
            mut files,
        } = received;
        if header.flags & flag::TYPE != flag::REPLY {
            return Err(self.violated("asked for something, where an answer was due"));
        }
        if header.id != id || header.command != command {
            return Err(self.violated("answered another question than the one that was asked"));
        }
        if header.flags & flag::ERROR != 0 {
            // Some servers give no number.
            let errno = i32::try_from(header.error).ok().filter(|errno| *errno > 0);
            let source = std::io::Error::from_raw_os_error(errno.unwrap_or(Errno::EIO as i32));
            return Err(BusError::Refused { what, source });
        }
        if files.len() > 1 {
            return Err(self.violated("sent more files than were asked for"));
        }
        Ok(Answer {
            body,
            file: files.pop(),
        })
    }

    /// The server did what it may not: nothing that it says counts any more.
    pub fn violated(&self, what: &'static str) -> BusError {
        self.end();
        BusError::Server(what.into())
    }

    fn broken(&self, broken: Broken) -> BusError {
        self.end();
        BusError::Server(broken.to_string())
    }

    fn end(&self) {
        self.gone.store(true, Ordering::Relaxed);
        // It fails only for a socket that is not connected any more.
        let _ =
            nix::sys::socket::shutdown(self.socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }

    /// Whether the server is gone, or misbehaves by talking unasked.
    pub fn is_gone(&self) -> bool {
        if self.gone.load(Ordering::Relaxed) {
            return true;
        }
        let Ok(_turn) = self.turn.try_lock() else {
            // Somebody waits for an answer, and will find out.
            return false;
        };
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let quiet = matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0) | Err(Errno::EINTR));
        if !quiet {
            self.end();
        }
        !quiet
    }

    fn turn(&self) -> MutexGuard<'_, u16> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn dial(path: &Path, deadline: Instant) -> Result<OwnedFd, BusError> {
    let failed = |errno: Errno| BusError::Io {
        what: match errno {
            Errno::ENOENT | Errno::ECONNREFUSED => {
                "connecting to a vfio-user server (does it run, and listen there?)"
            }
            _ => "connecting to a vfio-user server",
        },
        source: errno.into(),
    };
    let address = UnixAddr::new(path).map_err(failed)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(failed)?;
    loop {
        match connect(socket.as_raw_fd(), &address) {
            Ok(()) => break,
            Err(Errno::EINTR) => {}
            // Too many others wait to be accepted.
            Err(Errno::EAGAIN) if Instant::now() < deadline => std::thread::sleep(RETRY),
            Err(errno) => return Err(failed(errno)),
        }
    }
    // It will be given the memory of all streams. Anybody can put a socket into a directory like /tmp.
    let server = getsockopt(&socket, PeerCredentials).map_err(failed)?.uid();
    match server == 0 || server == geteuid().as_raw() {
        true => Ok(socket),
        false => Err(BusError::Unusable {
            device: path.display().to_string(),
            cause: format!("user {server} serves it, who could read and write all streams"),
            remedy: "have root or this user serve it".into(),
        }),
    }
}
