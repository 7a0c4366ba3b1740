//! Finds a daemon that answers.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::geteuid;

/// The socket of a daemon that serves the whole machine.
pub const MACHINE_SOCKET: &str = "/run/rdsock/rdsockd.sock";

/// Connects to a daemon's socket.
pub fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

/// A running daemon: the one that `$RDSOCK_SOCKET` names, else the machine's, else the user's.
pub fn find() -> Option<(PathBuf, OwnedFd)> {
    let candidates = match told() {
        Some(path) => vec![path],
        None => [vec![MACHINE_SOCKET.into()], user_sockets()].concat(),
    };
    candidates.into_iter().find_map(|path| {
        let socket = connect_to(&path).ok()?;
        Some((path, socket))
    })
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
