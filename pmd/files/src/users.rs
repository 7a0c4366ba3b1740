//! A directory of sockets, each for one user: only that user, and root, can connect to it.
//!
//! Many who connect fill up a socket's backlog, and whoever comes then is turned away by the kernel. Who has a socket of its own
//! finds it full only by its own doing.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::socket::{UnixAddr, bind};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmod, fchmodat, fstatat};
use nix::unistd::{Uid, UnlinkatFlags, fchownat, unlinkat};

use crate::{Obstacle, Spot, failed, kind, make_directory};

/// A directory that holds the sockets of one process, and that nobody else can write to. The sockets, and the directory if
/// nothing else is in it, are removed when this is dropped.
#[derive(Debug)]
pub struct UserSockets {
    directory: OwnedFd,
    /// Where it lies.
    spot: Spot,
}

/// The mode of a directory of root's in which everybody finds what he knows by name. Who can't list it can't keep its lock either, by a
/// list into a page that does not answer, from those who look for a name in it.
pub const ONLY_BY_NAME: u32 = 0o711;

impl UserSockets {
    /// Makes the directory, or takes over what a process that died has left there. The caller makes sure that no other one
    /// uses it.
    pub fn make(path: &Path) -> Result<Self, Obstacle> {
        let sockets = UserSockets {
            directory: make_directory(path, ONLY_BY_NAME)?,
            spot: Spot::of(path)?,
        };
        // One that was left there, too.
        let mode = Mode::from_bits_truncate(ONLY_BY_NAME);
        fchmodat(&sockets.directory, c".", mode, FchmodatFlags::FollowSymlink)
            .map_err(failed("can't set the mode of", path))?;
        sockets
            .remove_all()
            .map_err(failed("can't remove what is left in", path))?;
        Ok(sockets)
    }

    /// Binds a socket to a user's path: the directory's, and the user's number.
    pub fn bind(&self, socket: &OwnedFd, user: u32) -> Result<(), Obstacle> {
        let path = self.spot.path.join(user.to_string());
        // What can't be named can't be connected to.
        UnixAddr::new(&path).map_err(failed("can't use", &path))?;
        let spot = Spot {
            directory: self
                .directory
                .try_clone()
                .map_err(|error| failed("can't use", &path)(errno_of(&error)))?,
            name: user.to_string().into(),
            path,
        };
        // The file gets the mode of the socket, and is root's until it is that user's: nobody connects before.
        let only_its_owner = Mode::S_IRUSR | Mode::S_IWUSR;
        fchmod(socket, only_its_owner).map_err(failed("can't set the mode of", &spot.path))?;
        let address = spot.address().map_err(failed("can't use", &spot.path))?;
        bind(socket.as_raw_fd(), &address).map_err(failed("can't bind", &spot.path))?;
        let (file, _) = spot.open_made()?;
        // By the open file: no name is followed any more.
        let given = fchownat(
            &file,
            c"",
            Some(Uid::from_raw(user)),
            None,
            AtFlags::AT_EMPTY_PATH,
        );
        given.map_err(|errno| {
            // Nobody but root would get in.
            let _ = spot.remove();
            failed("can't give to its user", &spot.path)(errno)
        })
    }

    fn remove_all(&self) -> Result<(), Errno> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let list = openat(&self.directory, c".", flags, Mode::empty())?;
        let names = Dir::from_fd(list)?
            .iter()
            .map(|entry| Ok(entry?.file_name().to_owned()))
            .collect::<Result<Vec<CString>, Errno>>()?;
        for name in names {
            let name = name.as_c_str();
            let found = fstatat(&self.directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            if kind(&found) == SFlag::S_IFSOCK {
                unlinkat(self.directory.as_fd(), name, UnlinkatFlags::NoRemoveDir)?;
            }
        }
        Ok(())
    }
}

impl Drop for UserSockets {
    fn drop(&mut self) {
        let _ = self.remove_all();
        // It stays where something else is in it.
        let name = self.spot.name.as_os_str();
        let _ = unlinkat(&self.spot.directory, name, UnlinkatFlags::RemoveDir);
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or_default())
}
