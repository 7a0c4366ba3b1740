//! Finds a daemon that answers.

use std::fmt::{self, Display, Formatter};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::{geteuid, getresuid};
use rdsock_shm::control::{MACHINE_SOCKET, OF_USERS, believer, may_serve};

/// Time for a daemon to take a caller, and to answer.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// A daemon that is there, and does not answer.
#[derive(Debug)]
pub struct Silent {
    /// Its socket.
    pub path: PathBuf,
    /// Its process, as far as that can be seen.
    pub pid: Option<i32>,
}

impl std::error::Error for Silent {}

impl Display for Silent {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let path = self.path.display();
        match self.pid {
            Some(pid) if is_stopped(pid) => write!(
                f,
                "rdsockd (pid {pid}, {path}) does not answer, since it is stopped: kill -CONT {pid} lets it go on"
            ),
            Some(pid) => write!(
                f,
                "rdsockd (pid {pid}, {path}) does not answer: it may be stopped or overloaded; see its log and what \
                 top -p {pid} says, or restart it"
            ),
            None => write!(
                f,
                "rdsockd at {path} does not answer: it may be stopped or overloaded; see its log, or restart it"
            ),
        }
    }
}

/// Stopped by a signal, or by a debugger.
fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    state.starts_with(['T', 't'])
}

/// The process that listens where this socket is connected.
pub fn listener_of(socket: &OwnedFd) -> Option<i32> {
    let credentials = getsockopt(socket, sockopt::PeerCredentials).ok()?;
    (credentials.pid() > 0).then_some(credentials.pid())
}

/// Connects to a daemon's socket, in bounded time, first to the one that is this user's alone. One that can't take a caller now is
/// `WouldBlock`.
pub fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    connect_for(path, For::Programs)
}

/// What a daemon is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum For {
    /// Programs, which believe root's and their own user's alone.
    Programs,
    /// Questions: root may also put them to whomever it names, for one that runs as a user of its own.
    Questions,
}

/// May a tool put its questions to a daemon of whomever? `is_named`: to the one that `$RDSOCK_SOCKET` names.
fn may_ask(purpose: For, user: u32, is_named: bool) -> bool {
    purpose == For::Questions && user == 0 && is_named
}

fn connect_for(path: &Path, purpose: For) -> io::Result<OwnedFd> {
    let mut own = path.as_os_str().to_owned();
    own.push(format!("{OF_USERS}/{}", geteuid()));
    let is_machines = path == Path::new(MACHINE_SOCKET);
    let user = geteuid().as_raw();
    let ids = getresuid()?;
    let believer = believer([ids.real, ids.effective, ids.saved].map(|id| id.as_raw()));
    let is_believed = |server| {
        may_serve(server, believer, is_machines) || may_ask(purpose, user, told().is_some())
    };
    match connect_at(Path::new(&own), is_believed) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => connect_at(path, is_believed),
        reached => reached,
    }
}

fn connect_at(path: &Path, is_believed: impl Fn(u32) -> bool) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    let patience = TimeVal::seconds(PATIENCE.as_secs() as i64);
    setsockopt(&socket, sockopt::SendTimeout, &patience)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    let server = getsockopt(&socket, sockopt::PeerCredentials)?.uid();
    match is_believed(server) {
        true => Ok(socket),
        // Anybody can put a socket into a directory like /tmp.
        false => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("user {server} serves it, who is neither root nor this user"),
        )),
    }
}

/// A connection to a running daemon: the one that `$RDSOCK_SOCKET` names, else the machine's, else the user's.
pub fn reach(purpose: For) -> Result<Option<(PathBuf, OwnedFd)>, Silent> {
    let candidates = match told() {
        Some(path) => vec![path],
        None => [vec![MACHINE_SOCKET.into()], user_sockets()].concat(),
    };
    for path in candidates {
        match connect_for(&path, purpose) {
            Ok(socket) => return Ok(Some((path, socket))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(Silent { path, pid: None });
            }
            Err(error) => {
                // What the system says comes with a number: there is none mostly.
                if error.raw_os_error().is_none() {
                    let path = path.display();
                    rdsock_output::complain(
                        "rdsock",
                        format_args!("{path} is passed over: {error}"),
                    );
                }
            }
        }
    }
    Ok(None)
}

/// Where a daemon for programs runs, which is not stopped.
pub fn find() -> Result<Option<PathBuf>, Silent> {
    let Some((path, socket)) = reach(For::Programs)? else {
        return Ok(None);
    };
    let pid = listener_of(&socket);
    match pid.is_some_and(is_stopped) {
        true => Err(Silent { path, pid }),
        false => Ok(Some(path)),
    }
}

fn told() -> Option<PathBuf> {
    let path = std::env::var_os("RDSOCK_SOCKET")?;
    (!path.is_empty()).then(|| path.into())
}

/// Where a daemon of this user's own may lie, best first.
pub fn user_sockets() -> Vec<PathBuf> {
    if let Some(path) = told() {
        return vec![path];
    }
    let user = geteuid();
    let mut sockets = Vec::new();
    if user.is_root() {
        sockets.push(MACHINE_SOCKET.into());
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !dir.is_empty() && !user.is_root() => {
            sockets.push(PathBuf::from(dir).join("rdsock/rdsockd.sock"));
        }
        _ => sockets.push(format!("/tmp/rdsock-{user}/rdsockd.sock").into()),
    }
    sockets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_may_ask_whom_it_names_and_nobody_else_may() {
        assert!(may_ask(For::Questions, 0, true));
        assert!(!may_ask(For::Questions, 0, false));
        assert!(!may_ask(For::Questions, 1000, true));
        assert!(!may_ask(For::Programs, 0, true));
    }
}
