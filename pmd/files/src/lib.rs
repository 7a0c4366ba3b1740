//! Sockets, locks, logs and directories in the file system: made, replaced and removed without harm to anything else.
//!
//! The daemon's control socket, what `rdsock run` makes beside it, the sockets of linked models and those that serve a
//! device all lie at a path that a person may get wrong, and that somebody else may have put something at. Only a socket
//! that nobody serves, that belongs to this user or root, and that lies in a directory where nobody else can swap it is
//! ever removed. No link is followed at the last part of a path, none of another user on the way there, and no file is
//! cut, changed or removed.
//!
//! What is looked at and what is removed is the same thing: both go through one open directory.
//!
//! This crate knows nothing of rdsock, and has no `unsafe`.

#![forbid(unsafe_code)]

pub mod proc;
mod users;
mod way;

pub use users::{ONLY_BY_NAME, UserSockets};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, socket, sockopt,
};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use way::{Last, enter};

/// Why a path can't be used. Nothing was changed there.
#[derive(Debug, thiserror::Error)]
pub enum Obstacle {
    /// Somebody serves the socket.
    #[error("{} is a socket that somebody serves: end that program, or name another path", .0.display())]
    Served(PathBuf),
    /// Something else is there.
    #[error("{} is {what}, and stays as it is: name another path, or move it away", path.display())]
    Other {
        /// Where.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// It is of another user.
    #[error(
        "{} belongs to user {owner}, and stays as it is: name another path, or have that user remove it",
        path.display()
    )]
    Foreign {
        /// Where.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// Somebody else could swap what is in the directory.
    #[error("{} must be a directory of this user that nobody else can write to", .0.display())]
    Directory(PathBuf),
    /// The path names no file.
    #[error("{:?} names no file: give the path of a socket", .0)]
    Name(PathBuf),
    /// The system said no.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl From<Obstacle> for io::Error {
    fn from(obstacle: Obstacle) -> Self {
        let kind = match &obstacle {
            Obstacle::Served(_) => io::ErrorKind::AddrInUse,
            Obstacle::Io { source, .. } => source.kind(),
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, obstacle)
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(Errno) -> Obstacle {
    let path = path.to_owned();
    move |errno| Obstacle::Io {
        what,
        path,
        source: errno.into(),
    }
}

/// The directory of a path, open, and the name there.
#[derive(Debug)]
struct Spot {
    directory: OwnedFd,
    name: OsString,
    path: PathBuf,
}

impl Spot {
    fn of(path: &Path) -> Result<Self, Obstacle> {
        let name = path.file_name();
        // "a/" names the directory a, as far as the system is concerned.
        let name = name.filter(|_| !path.as_os_str().as_encoded_bytes().ends_with(b"/"));
        let name = name.ok_or_else(|| Obstacle::Name(path.to_owned()))?;
        Ok(Spot {
            directory: enter(directory_of(path), None, Last::Link)?,
            name: name.to_owned(),
            path: path.to_owned(),
        })
    }

    /// What is there, itself and not what it points to.
    fn look(&self) -> Result<Option<FileStat>, Obstacle> {
        let found = fstatat(
            &self.directory,
            self.name.as_os_str(),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        );
        match found {
            Ok(found) => Ok(Some(found)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(failed("can't look at", &self.path)(errno)),
        }
    }

    /// Checks that nobody else can swap what is in the directory.
    fn check_directory(&self) -> Result<(), Obstacle> {
        let dir = directory_of(&self.path);
        let found = fstat(&self.directory).map_err(failed("can't look at", dir))?;
        match is_ours_alone(&found) {
            true => Ok(()),
            false => Err(Obstacle::Directory(dir.to_owned())),
        }
    }

    /// A socket of ours, or nothing; everything else is an obstacle.
    fn look_for_socket(&self) -> Result<Option<FileStat>, Obstacle> {
        let Some(found) = self.look()? else {
            return Ok(None);
        };
        if kind(&found) != SFlag::S_IFSOCK {
            return Err(self.other(name_of(&found)));
        }
        self.check_owner(&found)?;
        Ok(Some(found))
    }

    fn other(&self, what: &'static str) -> Obstacle {
        Obstacle::Other {
            path: self.path.clone(),
            what,
        }
    }

    fn check_owner(&self, found: &FileStat) -> Result<(), Obstacle> {
        match is_ours(found) {
            true => Ok(()),
            false => Err(Obstacle::Foreign {
                path: self.path.clone(),
                owner: found.st_uid,
            }),
        }
    }

    /// Checks that nobody serves the socket; `kind` is that of ours.
    fn check_dead(&self, kind: SockType) -> Result<(), Obstacle> {
        let what = "can't try to connect to";
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let caller = socket(AddressFamily::Unix, kind, flags, None);
        let caller = caller.map_err(failed(what, &self.path))?;
        // By the open directory, so that it is the socket that was looked at.
        let mut at = PathBuf::from(format!("/proc/self/fd/{}", self.directory.as_raw_fd()));
        at.push(&self.name);
        let tried = UnixAddr::new(&at).and_then(|to| connect(caller.as_raw_fd(), &to));
        match tried {
            Err(Errno::ECONNREFUSED) => Ok(()),
            Err(Errno::ENOENT) if self.look()?.is_none() => Ok(()),
            // It listens, and is busy.
            Ok(()) | Err(Errno::EAGAIN) => Err(Obstacle::Served(self.path.clone())),
            Err(Errno::EPROTOTYPE) => Err(self.other("a socket of another kind of program")),
            Err(errno) => Err(failed(what, &self.path)(errno)),
        }
    }

    fn remove(&self) -> Result<(), Errno> {
        let removed = unlinkat(
            &self.directory,
            self.name.as_os_str(),
            UnlinkatFlags::NoRemoveDir,
        );
        match removed {
            Err(Errno::ENOENT) => Ok(()),
            removed => removed,
        }
    }
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => Path::new("/"),
    }
}

fn kind(found: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits())
}

fn name_of(found: &FileStat) -> &'static str {
    match kind(found) {
        SFlag::S_IFREG => "a regular file",
        SFlag::S_IFDIR => "a directory",
        SFlag::S_IFLNK => "a symbolic link",
        SFlag::S_IFIFO => "a FIFO",
        SFlag::S_IFSOCK => "a socket",
        _ => "a device",
    }
}

fn is_ours(found: &FileStat) -> bool {
    found.st_uid == geteuid().as_raw() || found.st_uid == 0
}

/// A directory in which nobody else can swap what is ours.
fn is_ours_alone(found: &FileStat) -> bool {
    let writable = found.st_mode & 0o022 != 0 && found.st_mode & libc::S_ISVTX == 0;
    kind(found) == SFlag::S_IFDIR && is_ours(found) && !writable
}

/// Checks that at `path` there is nothing, or a socket of ours that nobody serves; says else what is there. For those who
/// make other files beside a socket of the type SEQPACKET first.
pub fn check(path: &Path) -> Result<(), Obstacle> {
    let spot = Spot::of(path)?;
    match spot.look_for_socket()? {
        Some(_) => spot.check_dead(SockType::SeqPacket),
        None => Ok(()),
    }
}

/// Removes the socket at `path` that a program which has died left behind, if there is one. All else stays, and is an
/// obstacle. For sockets of the type SEQPACKET.
pub fn remove_left_behind(path: &Path) -> Result<(), Obstacle> {
    remove(&Spot::of(path)?, SockType::SeqPacket)
}

fn remove(spot: &Spot, kind: SockType) -> Result<(), Obstacle> {
    if spot.look_for_socket()?.is_none() {
        return Ok(());
    }
    spot.check_directory()?;
    spot.check_dead(kind)?;
    spot.remove().map_err(failed("can't replace", &spot.path))
}

/// Opens a file to lock, and makes it if need be. It must be a regular file of ours, and is not changed.
pub fn open_lock(path: &Path) -> Result<File, Obstacle> {
    open_file(path, OFlag::O_WRONLY, "can't open the lock file")
}

/// Opens a file to append to and to read, and makes it if need be. It must be a regular file of ours.
pub fn open_log(path: &Path) -> Result<File, Obstacle> {
    open_file(path, OFlag::O_RDWR | OFlag::O_APPEND, "can't open the log")
}

fn open_file(path: &Path, access: OFlag, what: &'static str) -> Result<File, Obstacle> {
    let spot = Spot::of(path)?;
    loop {
        // A FIFO would wait for a reader.
        let mut flags = access | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        match spot.look()? {
            None => flags |= OFlag::O_CREAT | OFlag::O_EXCL,
            Some(found) => spot.check_file(&found)?,
        }
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        match openat(&spot.directory, spot.name.as_os_str(), flags, mode) {
            // Made or removed in this moment: looked at again.
            Err(Errno::EEXIST | Errno::ENOENT) => {}
            Err(errno) => return Err(failed(what, path)(errno)),
            Ok(file) => {
                spot.check_file(&fstat(&file).map_err(failed(what, path))?)?;
                return Ok(file.into());
            }
        }
    }
}

impl Spot {
    fn check_file(&self, found: &FileStat) -> Result<(), Obstacle> {
        if kind(found) != SFlag::S_IFREG {
            return Err(self.other(name_of(found)));
        }
        self.check_owner(found)
    }
}

/// A socket's file that this process made. Dropping it removes that file, and nothing that came in its place.
#[derive(Debug)]
pub struct SocketFile {
    spot: Spot,
    made: (u64, u64),
}

impl SocketFile {
    /// Binds a socket to `path`, in place of one that was left behind there. With a mode the file has that one; else the
    /// umask decides.
    pub fn bind(socket: &OwnedFd, path: &Path, mode: Option<u32>) -> Result<Self, Obstacle> {
        let spot = Spot::of(path)?;
        let kind = getsockopt(socket, sockopt::SockType).map_err(failed("can't use", path))?;
        remove(&spot, kind)?;
        // What can't be named can't be connected to.
        UnixAddr::new(path).map_err(failed("can't use", path))?;
        let address = spot.address().map_err(failed("can't use", path))?;
        if let Some(mode) = mode {
            // The file gets the mode of the socket less the umask, so it is at no time open to more than it will be.
            nix::sys::stat::fchmod(socket, Mode::from_bits_truncate(mode))
                .map_err(failed("can't set the mode of", path))?;
        }
        bind(socket.as_raw_fd(), &address).map_err(failed("can't bind", path))?;
        let (file, found) = spot.open_made()?;
        let bound = SocketFile {
            made: (found.st_dev, found.st_ino),
            spot,
        };
        if let Some(mode) = mode {
            // By the open file: no name is followed any more.
            let by_number = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            let permissions = std::fs::Permissions::from_mode(mode);
            let set = std::fs::set_permissions(by_number, permissions);
            set.map_err(|source| Obstacle::Io {
                what: "can't set the mode of",
                path: path.to_owned(),
                source,
            })?;
        }
        Ok(bound)
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.spot.path
    }
}

impl Spot {
    /// Where a socket is bound, by the open directory: whoever swaps a directory on the way there gets no socket made elsewhere.
    fn address(&self) -> nix::Result<UnixAddr> {
        let directory = format!("/proc/self/fd/{}", self.directory.as_raw_fd());
        UnixAddr::new(&Path::new(&directory).join(&self.name))
    }

    /// The file of a socket that was bound just now.
    fn open_made(&self) -> Result<(OwnedFd, FileStat), Obstacle> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        // It is missing where another directory has come in place of this one.
        let file = openat(&self.directory, self.name.as_os_str(), flags, Mode::empty());
        let file = file.map_err(failed("can't find the new socket", &self.path))?;
        let found = fstat(&file).map_err(failed("can't look at", &self.path))?;
        if kind(&found) != SFlag::S_IFSOCK || found.st_uid != geteuid().as_raw() {
            return Err(self.other("not the socket that was just made"));
        }
        Ok((file, found))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let there = self.spot.look().ok().flatten();
        if there.is_some_and(|found| (found.st_dev, found.st_ino) == self.made) {
            // Who finds it finds nobody there, and removes it.
            let _ = self.spot.remove();
        }
    }
}

/// Makes a directory, and those above it that are missing, and checks that nobody else can swap what is in it. Returns
/// it, open as a place to start from (`O_PATH`).
pub fn make_directory(dir: &Path, mode: u32) -> Result<OwnedFd, Obstacle> {
    // The last part may not be a link, whoever made it: the directory is the one that was named.
    let made = enter(dir, Some(mode), Last::Itself)?;
    let found = fstat(&made).map_err(failed("can't look at", dir))?;
    match is_ours_alone(&found) {
        true => Ok(made),
        false => Err(Obstacle::Directory(dir.to_owned())),
    }
}

/// Opens a directory as a place to start from (`O_PATH`), and makes it and those above it that are missing. It may be
/// anybody's.
pub fn open_directory(dir: &Path, mode: u32) -> Result<OwnedFd, Obstacle> {
    enter(dir, Some(mode), Last::Link)
}

/// Makes a directory that is not there yet in one that is open, and opens it as a place to start from (`O_PATH`).
pub fn make_fresh(within: &OwnedFd, name: &str, mode: u32) -> Result<OwnedFd, Obstacle> {
    let path = Path::new(name);
    let what = "can't make the directory";
    mkdirat(within, name, Mode::from_bits_truncate(mode)).map_err(failed(what, path))?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let made = openat(within, name, flags, Mode::empty()).map_err(failed(what, path))?;
    let found = fstat(&made).map_err(failed("can't look at", path))?;
    match is_ours_alone(&found) {
        true => Ok(made),
        false => Err(Obstacle::Directory(path.to_owned())),
    }
}
