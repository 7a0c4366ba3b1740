//! Where linked processes meet: a directory with a socket for each node.
//!
//! Whoever may connect there gets the memory of every node, so it must be its owner's alone.

use crate::link::LinkError;
use crate::socket_file::{self, SocketFile};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, connect, listen, socket,
};
use rdsock_model::sheet::MAX_NODE;
use std::fs::{DirBuilder, File, TryLockError};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long others may take to join before us.
const PATIENCE: Duration = Duration::from_secs(5);

/// A node's place in the directory. Dropping it gives it up.
#[derive(Debug)]
pub struct Place {
    _file: SocketFile,
    /// Others connect here.
    pub listener: OwnedFd,
    /// Locked as long as this process has the id. The file stays: who removes it lets two have it.
    _id: File,
}

impl Place {
    /// Takes the place of a node, and connects to all that are there. Whoever comes later connects to it.
    pub fn take(dir: &Path, id: u16) -> Result<(Self, Vec<OwnedFd>), LinkError> {
        check(dir)?;
        let own = lock_file(dir, &format!("{id}.lock"))?;
        match own.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(LinkError::Taken {
                    id,
                    dir: dir.into(),
                });
            }
            Err(TryLockError::Error(error)) => return Err(io("locking a node id", dir)(error)),
        }
        // One joins at a time, so of each two one comes later.
        let _turn = turn(dir)?;
        let socket_path = dir.join(format!("{id}.sock"));
        let what = "listening";
        let listener = open().map_err(errno(what, &socket_path))?;
        let file = SocketFile::bind(&listener, &socket_path, None)?;
        listen(&listener, Backlog::MAXALLOWABLE).map_err(errno(what, &socket_path))?;
        let place = Place {
            _file: file,
            listener,
            _id: own,
        };
        let others = others(dir, id)?;
        Ok((place, others))
    }
}

fn open() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
}

/// Makes the directory if it is not there. It must belong to this user, and nobody else may enter it.
fn check(dir: &Path) -> Result<(), LinkError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(io("making the directory", dir))?;
    let found = std::fs::symlink_metadata(dir).map_err(io("looking at the directory", dir))?;
    let user = nix::unistd::geteuid().as_raw();
    if !found.is_dir() || found.uid() != user || found.mode() & 0o077 != 0 {
        return Err(LinkError::Open {
            dir: dir.into(),
            user,
            owner: found.uid(),
            mode: found.mode() & 0o7777,
        });
    }
    Ok(())
}

fn lock_file(dir: &Path, name: &str) -> Result<File, LinkError> {
    Ok(socket_file::open_lock(&dir.join(name))?)
}

/// Waits until nobody else is joining.
fn turn(dir: &Path) -> Result<File, LinkError> {
    let file = lock_file(dir, "join.lock")?;
    let since = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if since.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(TryLockError::WouldBlock) => return Err(LinkError::Busy { dir: dir.into() }),
            Err(TryLockError::Error(error)) => return Err(io("waiting to join", dir)(error)),
        }
    }
}

/// Connects to all that are there, and removes sockets where nobody is.
fn others(dir: &Path, id: u16) -> Result<Vec<OwnedFd>, LinkError> {
    let mut connected = Vec::new();
    let entries = std::fs::read_dir(dir).map_err(io("listing the directory", dir))?;
    for entry in entries {
        let path = entry.map_err(io("listing the directory", dir))?.path();
        let other = path
            .file_stem()
            .and_then(|stem| stem.to_str()?.parse().ok());
        let is_socket = path.extension().is_some_and(|name| name == "sock");
        let other = other.filter(|other| is_socket && (1..=MAX_NODE).contains(other));
        if other.is_none_or(|other| other == u32::from(id)) {
            continue;
        }
        let what = "connecting to a node";
        let socket = open().map_err(errno(what, &path))?;
        let address = UnixAddr::new(&path).map_err(errno(what, &path))?;
        match connect(socket.as_raw_fd(), &address) {
            Ok(()) => connected.push(socket),
            Err(Errno::ECONNREFUSED) => {
                socket_file::remove_left_behind(&path)?;
            }
            Err(Errno::ENOENT) => {}
            Err(error) => return Err(errno(what, &path)(error)),
        }
    }
    Ok(connected)
}

pub fn io<'a>(what: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> LinkError + 'a {
    move |source| LinkError::Io {
        what,
        path: path.into(),
        source,
    }
}

fn errno<'a>(what: &'static str, path: &'a Path) -> impl Fn(Errno) -> LinkError + 'a {
    move |source| io(what, path)(source.into())
}
