//! Sockets and lock files in the file system: made, replaced and removed without harm to anything else.
//!
//! The daemon's control socket, the sockets of linked models and those that serve a device all lie at a path that a
//! person may get wrong, and that somebody else may have put something at. Only a socket that nobody serves, that belongs
//! to this user or root, and that lies in a directory where nobody else can swap it is ever removed. No link is followed
//! at the last part of a path, and no file is cut, changed or removed.
//!
//! What is looked at and what is removed is the same thing: both go through one open directory.

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, socket, sockopt,
};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

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
        let parent = directory_of(path);
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(parent, flags, Mode::empty());
        Ok(Spot {
            directory: directory.map_err(failed("can't open the directory", parent))?,
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
    let spot = Spot::of(path)?;
    let what = "can't open the lock file";
    loop {
        let mut flags = OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        match spot.look()? {
            None => flags |= OFlag::O_CREAT | OFlag::O_EXCL,
            Some(found) => spot.check_lock(&found)?,
        }
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        match openat(&spot.directory, spot.name.as_os_str(), flags, mode) {
            // Made or removed in this moment: looked at again.
            Err(Errno::EEXIST | Errno::ENOENT) => {}
            Err(errno) => return Err(failed(what, path)(errno)),
            Ok(file) => {
                spot.check_lock(&fstat(&file).map_err(failed(what, path))?)?;
                return Ok(file.into());
            }
        }
    }
}

impl Spot {
    fn check_lock(&self, found: &FileStat) -> Result<(), Obstacle> {
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
        let address = UnixAddr::new(path).map_err(failed("can't use", path))?;
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

/// Makes a directory, and those above it that are missing, and checks that nobody else can swap what is in it. No link
/// of another user is followed on the way to what is made.
pub fn make_directory(dir: &Path, mode: u32) -> Result<(), Obstacle> {
    let dir = directory_of_socket(dir);
    let mut missing: Vec<&OsStr> = Vec::new();
    let mut there = dir;
    while matches!(std::fs::symlink_metadata(there), Err(error) if error.kind() == io::ErrorKind::NotFound)
    {
        let (Some(name), Some(_)) = (there.file_name(), there.parent()) else {
            break;
        };
        missing.push(name);
        there = directory_of(there);
    }
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let what = "can't make the directory";
    // The last part may not be a link, whoever made it: the directory is the one that was named.
    let no_follow = match missing.is_empty() {
        true => OFlag::O_NOFOLLOW,
        false => {
            check_links(there)?;
            OFlag::empty()
        }
    };
    let mut now = match open(there, flags | no_follow, Mode::empty()) {
        Err(Errno::ENOTDIR | Errno::ELOOP) => return Err(Obstacle::Directory(there.to_owned())),
        opened => opened.map_err(failed(what, dir))?,
    };
    for name in missing.into_iter().rev() {
        match mkdirat(&now, name, Mode::from_bits_truncate(mode)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(failed(what, dir)(errno)),
        }
        now = openat(&now, name, flags | OFlag::O_NOFOLLOW, Mode::empty())
            .map_err(failed(what, dir))?;
    }
    let found = fstat(now.as_fd()).map_err(failed("can't look at", dir))?;
    match is_ours_alone(&found) {
        true => Ok(()),
        false => Err(Obstacle::Directory(dir.to_owned())),
    }
}

fn directory_of_socket(dir: &Path) -> &Path {
    match dir.as_os_str().is_empty() {
        true => Path::new("."),
        false => dir,
    }
}

/// Checks that each link on the way to a directory belongs to this user or root.
fn check_links(dir: &Path) -> Result<(), Obstacle> {
    let mut way = PathBuf::new();
    for part in dir.components() {
        way.push(part);
        if part == Component::RootDir || part == Component::CurDir {
            continue;
        }
        let found = std::fs::symlink_metadata(&way).map_err(|source| Obstacle::Io {
            what: "can't look at",
            path: way.clone(),
            source,
        })?;
        let ours = found.uid() == geteuid().as_raw() || found.uid() == 0;
        if found.is_symlink() && !ours {
            return Err(Obstacle::Foreign {
                path: way,
                owner: found.uid(),
            });
        }
    }
    Ok(())
}
