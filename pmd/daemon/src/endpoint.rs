//! Where the control socket lies, and who may make it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, setsockopt,
    socket, sockopt,
};
use nix::unistd::geteuid;

/// The control socket of a daemon that runs for the whole machine.
const MACHINE_SOCKET: &str = "/run/rdsock/rdsockd.sock";

/// Where a daemon makes its socket when nothing else is said.
pub fn default_socket() -> PathBuf {
    let user = geteuid();
    if user.is_root() {
        return MACHINE_SOCKET.into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir).join("rdsock/rdsockd.sock"),
        _ => format!("/tmp/rdsock-{user}/rdsockd.sock").into(),
    }
}

/// Why the socket can't be made.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// Another daemon is there.
    #[error("another rdsockd serves {0}")]
    Taken(PathBuf),
    /// The directory is not ours alone, so somebody else could put a socket there.
    #[error("{0} must be a directory of this user that nobody else can write to")]
    Directory(PathBuf),
    /// The system said no.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> EndpointError {
    let path = path.to_owned();
    move |source| EndpointError::Io { what, path, source }
}

/// A listening control socket. Removed from the file system when dropped.
#[derive(Debug)]
pub struct Endpoint {
    socket: OwnedFd,
    path: PathBuf,
    _lock: Flock<File>,
}

impl Endpoint {
    /// Makes the socket. One that was left behind by a daemon that died is replaced; one that
    /// somebody answers on is not.
    pub fn new(path: &Path) -> Result<Self, EndpointError> {
        let root = geteuid().is_root();
        if let Some(dir) = path.parent() {
            make_directory(dir, if root { 0o755 } else { 0o700 })?;
        }
        let lock = lock(path)?;
        if is_answered(path) {
            return Err(EndpointError::Taken(path.to_owned()));
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("can't replace", path)(error));
            }
            _ => {}
        }
        let socket = new_socket().map_err(failed("can't make a socket for", path))?;
        let address =
            UnixAddr::new(path).map_err(|error| failed("can't use", path)(error.into()))?;
        bind(socket.as_raw_fd(), &address)
            .map_err(|error| failed("can't bind", path)(error.into()))?;
        // Anybody on the machine may attach to a daemon of root's; each is then subject to policy.
        let mode = if root { 0o666 } else { 0o600 };
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(failed("can't set the mode of", path))?;
        // A socket inherits this: each message then carries its sender's process.
        setsockopt(&socket, sockopt::PassCred, &true)
            .and_then(|()| listen(&socket, Backlog::MAXALLOWABLE))
            .map_err(|error| failed("can't listen on", path)(error.into()))?;
        Ok(Endpoint {
            socket,
            path: path.to_owned(),
            _lock: lock,
        })
    }

    /// The listening socket.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        // Still under the lock, so it is ours. The lock file stays: removing it would let two
        // daemons lock two files of one name.
        let _ = fs::remove_file(&self.path);
    }
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        flags,
        None,
    )?)
}

/// Makes the directory, and checks that nobody else can replace what is in it.
fn make_directory(dir: &Path, mode: u32) -> Result<(), EndpointError> {
    let made = DirBuilder::new().recursive(true).mode(mode).create(dir);
    made.map_err(failed("can't make the directory", dir))?;
    let meta = fs::symlink_metadata(dir).map_err(failed("can't look at", dir))?;
    let writable = meta.mode() & 0o022 != 0 && meta.mode() & libc::S_ISVTX == 0;
    let owned = meta.uid() == geteuid().as_raw() || meta.uid() == 0;
    if !meta.is_dir() || writable || !owned {
        return Err(EndpointError::Directory(dir.to_owned()));
    }
    Ok(())
}

fn lock(socket: &Path) -> Result<Flock<File>, EndpointError> {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .map_err(failed("can't open", &path))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(EndpointError::Taken(socket.to_owned())),
        Err((_, error)) => Err(failed("can't lock", &path)(error.into())),
    }
}

fn is_answered(path: &Path) -> bool {
    let connected = new_socket().and_then(|socket| {
        let address = UnixAddr::new(path)?;
        Ok(connect(socket.as_raw_fd(), &address)?)
    });
    connected.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_daemons_socket_is_replaced_and_a_living_ones_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/s.sock");
        fs::create_dir(dir.path().join("run")).unwrap();
        let left_behind = new_socket().unwrap();
        bind(left_behind.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        drop(left_behind);
        let endpoint = Endpoint::new(&path).unwrap();
        assert!(matches!(Endpoint::new(&path), Err(EndpointError::Taken(_))));
        drop(endpoint);
        assert!(!path.exists());
        // One that serves without our lock file is left alone, too.
        let foreign = new_socket().unwrap();
        bind(foreign.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&foreign, Backlog::new(1).unwrap()).unwrap();
        assert!(matches!(Endpoint::new(&path), Err(EndpointError::Taken(_))));
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = Endpoint::new(&dir.path().join("s.sock")).unwrap_err();
        assert!(matches!(error, EndpointError::Directory(_)));
    }
}
