//! Where linked processes meet: a directory with a socket for each node.
//!
//! Whoever may connect there gets the memory of every node, so it must be its owner's alone.
//!
//! The thread of the links looks here again and again ([`Place::look`]), since anything may have happened to the
//! directory: what is missing of its own is made anew, and who is there is told. Nothing is followed or removed
//! that is not what a node makes: no symbolic link, no foreign file, and no other node's socket, whether or not
//! somebody serves it.

use crate::link::LinkError;
use crate::link::spare::Spare;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen,
    socket, sockopt::PeerCredentials,
};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, lstat, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};
use rdsock_files::Obstacle;
use rdsock_model::sheet::MAX_NODE;
use std::ffi::OsStr;
use std::fs::{File, TryLockError};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// A node's place in the directory. Dropping it gives it up.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    id: u16,
    seat: Option<Seat>,
    /// For what is done here.
    pub spare: Spare,
}

/// What a node has in the directory.
#[derive(Debug)]
struct Seat {
    dir: OwnedFd,
    id: u16,
    /// Locked as long as this process has the id. The file stays: who removes it lets two have it.
    lock: File,
    /// Others connect here.
    listener: OwnedFd,
    /// The listener's file.
    socket: FileStat,
}

/// What has become of a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Looked {
    /// All is as it was.
    Same,
    /// It was taken anew, and has another listener.
    New,
}

impl Place {
    /// Takes the place of a node, in a directory that is made if it is not there.
    pub fn take(path: &Path, id: u16) -> Result<Self, LinkError> {
        let mut place = Place {
            path: path.into(),
            id,
            seat: None,
            spare: Spare::default(),
        };
        place.look()?;
        Ok(place)
    }

    /// Where others connect, as long as it has the place.
    pub fn listener(&self) -> Option<&OwnedFd> {
        self.seat.as_ref().map(|seat| &seat.listener)
    }

    /// Makes anew what is missing of the place. When it fails, the place is what it was, unless another process has it
    /// now ([`LinkError::Taken`]).
    pub fn look(&mut self) -> Result<Looked, LinkError> {
        if self.seat.as_ref().is_some_and(|s| s.is_whole(&self.path)) {
            return Ok(Looked::Same);
        }
        let (path, id, old) = (&self.path, self.id, self.seat.as_ref());
        let taken = (self.spare).with(LinkError::errno, || Seat::take(path, id, old));
        match taken {
            Ok(seat) => {
                self.seat = Some(seat);
                Ok(Looked::New)
            }
            Err(error) => {
                if matches!(error, LinkError::Taken { .. }) {
                    self.seat = None;
                }
                Err(error)
            }
        }
    }

    /// The other nodes that have a socket there.
    pub fn others(&mut self) -> Result<Vec<u16>, LinkError> {
        let Some(seat) = &self.seat else {
            return Ok(Vec::new());
        };
        let list = io("listing the directory", &self.path);
        let entries = self.spare.with(LinkError::errno, || {
            std::fs::read_dir(inside(&seat.dir, "")).map_err(&list)
        })?;
        let mut others = Vec::new();
        for entry in entries {
            let name = entry.map_err(&list)?.file_name();
            let id = name
                .to_str()
                .and_then(|name| name.strip_suffix(".sock")?.parse().ok());
            let id = id.filter(|id| *id != 0 && *id != self.id && u32::from(*id) <= MAX_NODE);
            others.extend(id.filter(|id| name == *socket_name(*id)));
        }
        Ok(others)
    }

    /// Connects to another node. `None` when nobody is there, or it takes no more now.
    pub fn dial(&mut self, id: u16) -> Result<Option<OwnedFd>, LinkError> {
        let Some(seat) = &self.seat else {
            return Ok(None);
        };
        let path = self.path.join(socket_name(id));
        self.spare.with(LinkError::errno, || {
            dial(&seat.dir, id).map_err(errno("connecting to a node", &path))
        })
    }
}

impl Seat {
    /// Takes the place of a node. What there is of `old` and is still in its place is taken over.
    fn take(path: &Path, id: u16, old: Option<&Seat>) -> Result<Self, LinkError> {
        let dir = enter(path)?;
        let name = lock_name(id);
        let lock = match old {
            Some(old) if is_file(&dir, &name, fstat(&old.lock)) => {
                old.lock.try_clone().map_err(io("keeping a lock", path))?
            }
            _ => lock(&dir, path, id)?,
        };
        let name = socket_name(id);
        let at = path.join(&name);
        let found = fstatat(&dir, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
        match found {
            Err(Errno::ENOENT) => {}
            Ok(found) if is_own_socket(&found) => {
                // It is this node's, and only one process at a time has the lock.
                let removed = unlinkat(&dir, name.as_str(), UnlinkatFlags::NoRemoveDir);
                removed.map_err(errno("removing the socket that this node had", &at))?;
            }
            Ok(_) => return Err(LinkError::Foreign { path: at }),
            Err(error) => return Err(errno("looking at a socket", &at)(error)),
        }
        let (listener, socket) = listen_at(&dir, &name).map_err(errno("listening", &at))?;
        Ok(Seat {
            dir,
            id,
            lock,
            listener,
            socket,
        })
    }

    /// Whether others who look there find all of it.
    fn is_whole(&self, path: &Path) -> bool {
        let is_dir = lstat(path).is_ok_and(|found| same(&found, fstat(&self.dir)));
        is_dir
            && is_file(&self.dir, &lock_name(self.id), fstat(&self.lock))
            && is_file(&self.dir, &socket_name(self.id), Ok(self.socket))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        // A later seat of this process may have put its own socket there. If removing fails, who finds it finds nobody.
        let name = socket_name(self.id);
        if is_file(&self.dir, &name, Ok(self.socket)) {
            let _ = unlinkat(&self.dir, name.as_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

fn lock_name(id: u16) -> String {
    format!("{id}.lock")
}

fn socket_name(id: u16) -> String {
    format!("{id}.sock")
}

/// The path of something in a directory that is open: short enough for a socket, and the same whatever becomes of
/// the directory's name.
fn inside(dir: &OwnedFd, name: &str) -> PathBuf {
    format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()).into()
}

fn same(found: &FileStat, known: Result<FileStat, Errno>) -> bool {
    known.is_ok_and(|known| (found.st_dev, found.st_ino) == (known.st_dev, known.st_ino))
}

/// Whether a name leads to this file.
fn is_file(dir: &OwnedFd, name: &str, known: Result<FileStat, Errno>) -> bool {
    fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok_and(|found| same(&found, known))
}

fn kind(found: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT
}

fn is_own_socket(found: &FileStat) -> bool {
    kind(found) == SFlag::S_IFSOCK && found.st_uid == geteuid().as_raw()
}

/// Opens the directory, and makes it if it is not there. It must belong to this user, and nobody else may enter it.
fn enter(path: &Path) -> Result<OwnedFd, LinkError> {
    let (parent, name) = match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => (parent, name),
        _ => (path, OsStr::new(".")),
    };
    let parent = rdsock_files::open_directory(parent, 0o700).map_err(obstacle(path))?;
    match mkdirat(&parent, name, Mode::from_bits_truncate(0o700)) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(error) => return Err(errno("making the directory", path)(error)),
    }
    let user = geteuid().as_raw();
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let open = |owner, mode| LinkError::Open {
        dir: path.into(),
        user,
        owner,
        mode,
    };
    let dir = match openat(&parent, name, flags, Mode::empty()) {
        Ok(dir) => dir,
        // A symbolic link, or no directory at all.
        Err(error @ (Errno::ELOOP | Errno::ENOTDIR)) => {
            let found = fstatat(&parent, name, AtFlags::AT_SYMLINK_NOFOLLOW);
            let found = found.map_err(|_| errno("opening the directory", path)(error))?;
            return Err(open(found.st_uid, found.st_mode & 0o7777));
        }
        Err(error) => return Err(errno("opening the directory", path)(error)),
    };
    let found = fstat(&dir).map_err(errno("looking at the directory", path))?;
    if found.st_uid != user || found.st_mode & 0o077 != 0 {
        return Err(open(found.st_uid, found.st_mode & 0o7777));
    }
    Ok(dir)
}

/// Takes the lock of a node's id.
fn lock(dir: &OwnedFd, path: &Path, id: u16) -> Result<File, LinkError> {
    let name = lock_name(id);
    let at = path.join(&name);
    let flags =
        OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = match openat(dir, name.as_str(), flags, Mode::from_bits_truncate(0o600)) {
        Ok(file) => file,
        Err(Errno::ELOOP | Errno::ENXIO | Errno::EISDIR) => {
            return Err(LinkError::Foreign { path: at });
        }
        Err(error) => return Err(errno("opening a lock file", &at)(error)),
    };
    let found = fstat(&file).map_err(errno("looking at a lock file", &at))?;
    if kind(&found) != SFlag::S_IFREG || found.st_uid != geteuid().as_raw() {
        return Err(LinkError::Foreign { path: at });
    }
    let file = File::from(file);
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(LinkError::Taken {
            id,
            dir: path.into(),
        }),
        Err(TryLockError::Error(error)) => Err(io("locking a node id", &at)(error)),
    }
}

fn open_socket() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
}

fn listen_at(dir: &OwnedFd, name: &str) -> Result<(OwnedFd, FileStat), Errno> {
    let listener = open_socket()?;
    bind(listener.as_raw_fd(), &UnixAddr::new(&inside(dir, name))?)?;
    let found = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    listen(&listener, Backlog::MAXALLOWABLE)?;
    Ok((listener, found))
}

fn dial(dir: &OwnedFd, id: u16) -> Result<Option<OwnedFd>, Errno> {
    let name = socket_name(id);
    match fstatat(dir, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(found) if is_own_socket(&found) => {}
        // Not what a node makes.
        Ok(_) | Err(Errno::ENOENT) => return Ok(None),
        Err(error) => return Err(error),
    }
    let socket = open_socket()?;
    match connect(socket.as_raw_fd(), &UnixAddr::new(&inside(dir, &name))?) {
        Ok(()) => Ok(is_own_user(&socket).then_some(socket)),
        Err(Errno::ECONNREFUSED | Errno::ENOENT | Errno::EAGAIN | Errno::EPROTOTYPE) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the process at the other end is this user's.
pub fn is_own_user(socket: &impl AsFd) -> bool {
    let user = getsockopt(socket, PeerCredentials).map(|peer| peer.uid());
    user == Ok(geteuid().as_raw())
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

/// The way to the directory can't be gone. What the system said stays an error of the system, by which a shortage is known.
fn obstacle(path: &Path) -> impl Fn(Obstacle) -> LinkError + '_ {
    move |obstacle| {
        io("making the directory", path)(match obstacle {
            Obstacle::Io { source, .. } => source,
            other => std::io::Error::other(other),
        })
    }
}
