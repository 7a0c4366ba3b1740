//! Where the control sockets lie, and who may make them: one for everybody, and beside it one for each user that is known when
//! the daemon starts. What comes to a user's own socket is that user's doing: nobody else fills its backlog.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, listen, setsockopt, socket, sockopt,
};
use nix::unistd::geteuid;
use rdsock_files::{ONLY_BY_NAME, Obstacle, SocketFile, UserSockets};
use rdsock_shm::control::{MACHINE_SOCKET, OF_USERS};
use tracing::{debug, warn};

use crate::channel::take_files;
use crate::remains::Holder;

/// A process that was killed mostly has ended by then.
const DYING: Duration = Duration::from_millis(500);

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
    /// It is dying, and its socket and lock can't be taken from it.
    #[error(
        "rdsockd (process {pid}) was killed, but one of its threads still waits, and with it {path} can't be taken over: {source}; \
         end what it waits for (`cat /proc/{pid}/task/*/stack` says what that is), or name another path"
    )]
    Lingers {
        /// The process.
        pid: i32,
        /// Where it served.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// What is at the path, or around it, is not ours.
    #[error(transparent)]
    Obstacle(Obstacle),
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

impl From<Obstacle> for EndpointError {
    fn from(obstacle: Obstacle) -> Self {
        match obstacle {
            Obstacle::Served(path) => EndpointError::Taken(path),
            obstacle => EndpointError::Obstacle(obstacle),
        }
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> EndpointError {
    let path = path.to_owned();
    move |source| EndpointError::Io { what, path, source }
}

/// A control socket that listens.
#[derive(Debug)]
pub struct Listener {
    /// Who may come; `None` for everybody.
    pub user: Option<u32>,
    /// The socket.
    pub socket: OwnedFd,
}

/// The control sockets. Removed from the file system when dropped.
#[derive(Debug)]
pub struct Endpoint {
    listeners: Vec<Listener>,
    // These go before the lock. The lock file stays: removing it would let two daemons lock two files of one name.
    _of_users: Option<UserSockets>,
    file: SocketFile,
    _lock: Flock<File>,
}

impl Endpoint {
    /// Makes the socket for everybody, and one for each of these users. One of ours that was left behind by a daemon that died is
    /// replaced; whatever else is there stays, and is an error that names it.
    pub fn new(path: &Path, users: &[u32]) -> Result<Self, EndpointError> {
        let root = geteuid().is_root();
        if let Some(dir) = path.parent() {
            rdsock_files::make_directory(dir, if root { ONLY_BY_NAME } else { 0o700 })?;
        }
        let lock = match rdsock_files::check(path) {
            // By one that was killed, maybe. Its lock file is there.
            Err(Obstacle::Served(_)) if lock_path(path).exists() => lock(path)?,
            // Before a lock file is made beside what may be anything.
            looked => looked.map(|()| lock(path))??,
        };
        let (mut listeners, of_users) = listen_for(path, users)?;
        let socket = new_socket().map_err(failed("can't make a socket for", path))?;
        // Anybody on the machine may attach to a daemon of root's; each is then subject to policy.
        let mode = if root { 0o666 } else { 0o600 };
        let file = SocketFile::bind(&socket, path, Some(mode))?;
        start_listening(&socket).map_err(failed("can't listen on", path))?;
        listeners.push(Listener { user: None, socket });
        Ok(Endpoint {
            listeners,
            _of_users: of_users,
            file,
            _lock: lock,
        })
    }

    /// The sockets that listen.
    pub fn listeners(&self) -> &[Listener] {
        &self.listeners
    }

    /// Where the socket for everybody lies.
    pub fn path(&self) -> &Path {
        self.file.path()
    }
}

/// A socket for each user. Who can't be given one calls where everybody does.
fn listen_for(
    path: &Path,
    users: &[u32],
) -> Result<(Vec<Listener>, Option<UserSockets>), EndpointError> {
    if users.is_empty() {
        return Ok((Vec::new(), None));
    }
    let sockets = UserSockets::make(&beside(path, OF_USERS))?;
    let make = |user| -> io::Result<Listener> {
        let socket = new_socket()?;
        sockets.bind(&socket, user)?;
        start_listening(&socket)?;
        let user = Some(user);
        Ok(Listener { user, socket })
    };
    let (mut listeners, mut refused) = (Vec::new(), None);
    for user in users {
        match make(*user) {
            Ok(listener) => listeners.push(listener),
            Err(error) => {
                debug!(user, "no control socket of its own: {error}");
                let kinds = [io::ErrorKind::PermissionDenied, io::ErrorKind::Unsupported];
                refused = refused.or(kinds.contains(&error.kind()).then_some(error));
            }
        }
    }
    if let Some(error) = refused {
        warn!(
            "users have no control socket of their own, so that others can crowd them out ({error}): a daemon for all users \
             needs CAP_CHOWN, and the call fchownat, until it is ready"
        );
    }
    Ok((listeners, Some(sockets)))
}

fn start_listening(socket: &OwnedFd) -> io::Result<()> {
    // What is accepted inherits this: each message then carries its sender's process.
    setsockopt(socket, sockopt::PassCred, &true)?;
    // This, too: who calls sends no descriptors before that is on an account. Linux before 6.16 knows no such thing.
    take_files(socket, false);
    Ok(listen(socket, Backlog::MAXALLOWABLE)?)
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

fn lock_path(socket: &Path) -> PathBuf {
    beside(socket, ".lock")
}

fn beside(socket: &Path, name: &str) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(name);
    path.into()
}

/// Locks the file beside the socket. From a daemon that was killed and does not come to its end the lock is taken away, and
/// the socket with it.
fn lock(socket: &Path) -> Result<Flock<File>, EndpointError> {
    let path = lock_path(socket);
    let mut file = rdsock_files::open_lock(&path)?;
    let start = Instant::now();
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => {
                if let Err(error) = Holder::say(&lock) {
                    debug!("no other daemon will see that this one holds the lock: {error}");
                }
                return Ok(lock);
            }
            Err((file, Errno::EWOULDBLOCK)) => file,
            Err((_, error)) => return Err(failed("can't lock", &path)(error.into())),
        };
        match Holder::of(&file).map_err(failed("can't see who has locked", &path))? {
            Some(holder) if holder.is_dying() => {
                if start.elapsed() < DYING {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
                warn!(
                    pid = holder.pid,
                    "a daemon that was killed still holds the socket: taking it over"
                );
                let taken = holder.take_away(&file);
                taken.map_err(|source| EndpointError::Lingers {
                    pid: holder.pid,
                    path: socket.to_owned(),
                    source,
                })?;
            }
            // It has ended just now, if it can be seen at all.
            None if start.elapsed() < DYING => std::thread::sleep(Duration::from_millis(5)),
            _ => return Err(EndpointError::Taken(socket.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{UnixAddr, bind};
    use nix::sys::stat::Mode;
    use std::fs;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
    use std::os::unix::net::{UnixDatagram, UnixListener};

    fn bound(path: &Path) -> OwnedFd {
        let socket = new_socket().unwrap();
        bind(socket.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        socket
    }

    #[test]
    fn a_dead_daemons_socket_is_replaced_and_a_living_ones_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/s.sock");
        fs::create_dir(dir.path().join("run")).unwrap();
        drop(bound(&path));
        let endpoint = Endpoint::new(&path, &[]).unwrap();
        assert!(matches!(
            Endpoint::new(&path, &[]),
            Err(EndpointError::Taken(_))
        ));
        drop(endpoint);
        assert!(!path.exists());
        // One that serves without our lock file is left alone, too.
        let foreign = bound(&path);
        listen(&foreign, Backlog::new(1).unwrap()).unwrap();
        assert!(matches!(
            Endpoint::new(&path, &[]),
            Err(EndpointError::Taken(_))
        ));
        assert!(path.exists());
    }

    /// What can be told of a file, to see that it was not touched.
    fn look(path: &Path) -> (u64, u32, u64, u32) {
        let found = fs::symlink_metadata(path).unwrap();
        (found.ino(), found.mode(), found.size(), found.uid())
    }

    /// Makes an endpoint there, which must fail with these words and leave everything as it was.
    fn refused(path: &Path, words: &str) {
        let names = || fs::read_dir(path.parent().unwrap()).unwrap().count();
        let before = (look(path), names());
        let error = Endpoint::new(path, &[]).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        assert_eq!((look(path), names()), before, "{words}");
    }

    #[test]
    fn what_is_no_socket_of_ours_stays() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "precious").unwrap();
        fs::create_dir(at("folder")).unwrap();
        nix::unistd::mkfifo(&at("fifo"), Mode::S_IRWXU).unwrap();
        drop(bound(&at("dead")));
        symlink(at("file"), at("link")).unwrap();
        symlink(at("dead"), at("link-to-socket")).unwrap();
        symlink(at("nowhere"), at("link-to-nothing")).unwrap();
        let _stream = UnixListener::bind(at("stream")).unwrap();
        let _datagram = UnixDatagram::bind(at("datagram")).unwrap();
        for (name, words) in [
            ("file", "a regular file"),
            ("folder", "a directory"),
            ("fifo", "a FIFO"),
            ("link", "a symbolic link"),
            ("link-to-socket", "a symbolic link"),
            ("link-to-nothing", "a symbolic link"),
            ("stream", "a socket of another kind"),
            ("datagram", "a socket of another kind"),
        ] {
            refused(&at(name), words);
        }
        assert_eq!(fs::read(at("file")).unwrap(), b"precious");
        assert!(!at("nowhere").exists());
        assert!(Endpoint::new(Path::new("/"), &[]).is_err());
        assert!(Endpoint::new(&at("folder/.."), &[]).is_err());
    }

    #[test]
    fn a_socket_of_somebody_else_stays() {
        if !geteuid().is_root() {
            return eprintln!(
                "SKIPPED, NOTHING WAS CHECKED: only root can make another user's socket"
            );
        }
        let dir = tempfile::tempdir().unwrap();
        // As /tmp: everybody may put something there.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        let path = dir.path().join("s.sock");
        drop(bound(&path));
        std::os::unix::fs::lchown(&path, Some(64001), None).unwrap();
        refused(&path, "belongs to user 64001");
        fs::remove_file(&path).unwrap();
        let lock = dir.path().join("s.sock.lock");
        fs::write(&lock, "theirs").unwrap();
        std::os::unix::fs::chown(&lock, Some(64001), None).unwrap();
        let error = Endpoint::new(&path, &[]).unwrap_err().to_string();
        assert!(
            error.contains("s.sock.lock belongs to user 64001"),
            "{error}"
        );
        assert!(!path.exists());
    }

    #[test]
    fn a_lock_file_that_is_none_is_named_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (path, lock) = (dir.path().join("s.sock"), dir.path().join("s.sock.lock"));
        let precious = dir.path().join("precious");
        fs::write(&precious, "precious").unwrap();
        let refused = |words: &str| {
            let error = Endpoint::new(&path, &[]).unwrap_err().to_string();
            assert!(error.contains("s.sock.lock is a"), "{error}");
            assert!(error.contains(words), "{words}: {error}");
            assert!(!path.exists());
        };
        symlink(&precious, &lock).unwrap();
        refused("a symbolic link");
        fs::remove_file(&lock).unwrap();
        symlink(dir.path().join("new"), &lock).unwrap();
        refused("a symbolic link");
        assert!(!dir.path().join("new").exists());
        fs::remove_file(&lock).unwrap();
        // Opening this one to write would wait for a reader.
        nix::unistd::mkfifo(&lock, Mode::S_IRWXU).unwrap();
        refused("a FIFO");
        fs::remove_file(&lock).unwrap();
        fs::create_dir(&lock).unwrap();
        refused("a directory");
        fs::remove_dir(&lock).unwrap();
        // A file of ours is taken as it is.
        fs::write(&lock, "kept").unwrap();
        fs::set_permissions(&lock, fs::Permissions::from_mode(0o640)).unwrap();
        let before = look(&lock);
        drop(Endpoint::new(&path, &[]).unwrap());
        assert_eq!(look(&lock), before);
        assert_eq!(fs::read(&lock).unwrap(), b"kept");
        assert_eq!(fs::read(&precious).unwrap(), b"precious");
    }

    #[test]
    fn only_the_socket_that_was_bound_is_removed_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let endpoint = Endpoint::new(&path, &[]).unwrap();
        assert!(fs::symlink_metadata(&path).unwrap().file_type().is_socket());
        // Kept, so that the file below gets another number.
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::write(&path, "came later").unwrap();
        drop(endpoint);
        assert_eq!(fs::read(&path).unwrap(), b"came later");
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = Endpoint::new(&dir.path().join("s.sock"), &[]).unwrap_err();
        let obstacle = |error| matches!(error, EndpointError::Obstacle(Obstacle::Directory(_)));
        assert!(obstacle(error));
        // A link to a good one is another name than was given.
        fs::create_dir_all(dir.path().join("a/good")).unwrap();
        symlink(dir.path().join("a/good"), dir.path().join("a/link")).unwrap();
        assert!(obstacle(
            Endpoint::new(&dir.path().join("a/link/s.sock"), &[]).unwrap_err()
        ));
    }

    #[test]
    fn no_directory_is_made_behind_somebody_elses_link() {
        if !geteuid().is_root() {
            return eprintln!(
                "SKIPPED, NOTHING WAS CHECKED: only root can make another user's link"
            );
        }
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        fs::create_dir(&target).unwrap();
        symlink(&target, &link).unwrap();
        drop(Endpoint::new(&link.join("own/run/s.sock"), &[]).unwrap());
        assert!(target.join("own/run").is_dir());
        std::os::unix::fs::lchown(&link, Some(64001), None).unwrap();
        let error = Endpoint::new(&link.join("new/run/s.sock"), &[]).unwrap_err();
        assert!(
            error.to_string().contains("belongs to user 64001"),
            "{error}"
        );
        assert!(!target.join("new").exists());
    }
}
