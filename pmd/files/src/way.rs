//! The way to a directory, gone part by part, so that what is looked at and what is entered is the same thing.
//!
//! A symbolic link is followed only where it belongs to this user or root: somebody else's could lead, as soon as it was
//! looked at, to another place than before.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, readlinkat};
use nix::sys::stat::{Mode, SFlag, fstat, mkdirat};

use crate::{Obstacle, failed, is_ours, kind};

/// As many links as the kernel follows.
const MOST_LINKS: usize = 40;

/// Where the last part of a path may lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Last {
    /// Through a link of this user's or of root's.
    Link,
    /// Nowhere else: it is the directory itself.
    Itself,
}

/// Opens a directory (`O_PATH`). With a mode, what is missing of it is made.
pub(crate) fn enter(path: &Path, making: Option<u32>, last: Last) -> Result<OwnedFd, Obstacle> {
    let what = match making {
        Some(_) => "can't make the directory",
        None => "can't open the directory",
    };
    Walk {
        asked: path,
        what,
        making,
        links: 0,
    }
    .run(last)
}

struct Walk<'a> {
    asked: &'a Path,
    what: &'static str,
    making: Option<u32>,
    links: usize,
}

const THIS: OFlag = OFlag::O_PATH
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

impl Walk<'_> {
    fn run(mut self, last: Last) -> Result<OwnedFd, Obstacle> {
        let mut parts = parts_of(self.asked.as_os_str());
        // For messages: a link's own path, not where it led.
        let mut way = start_of(self.asked.as_os_str());
        let mut now = self.open_start(&way)?;
        while let Some(name) = parts.pop() {
            way.push(&name);
            match self.step(&now, &name)? {
                Step::Directory(next) => now = next,
                Step::Link(_) if last == Last::Itself && parts.is_empty() => {
                    return Err(Obstacle::Directory(self.asked.to_owned()));
                }
                Step::Link(link) => {
                    let target = self.follow(&link, &way)?;
                    if target.as_bytes().starts_with(b"/") {
                        now = self.open_start(Path::new("/"))?;
                        way = PathBuf::from("/");
                    } else {
                        way.pop();
                    }
                    parts.extend(parts_of(&target));
                }
            }
        }
        Ok(now)
    }

    fn open_start(&self, at: &Path) -> Result<OwnedFd, Obstacle> {
        open(at, THIS | OFlag::O_DIRECTORY, Mode::empty()).map_err(self.failed())
    }

    /// Opens what has a name in a directory, and makes it if it has to be.
    fn step(&self, now: &OwnedFd, name: &OsStr) -> Result<Step, Obstacle> {
        let directory = || openat(now, name, THIS | OFlag::O_DIRECTORY, Mode::empty());
        match directory() {
            Ok(next) => Ok(Step::Directory(next)),
            Err(Errno::ENOTDIR | Errno::ELOOP) => {
                let there = openat(now, name, THIS, Mode::empty()).map_err(self.failed())?;
                let found = fstat(&there).map_err(self.failed())?;
                match kind(&found) {
                    SFlag::S_IFLNK => Ok(Step::Link(there)),
                    _ => Err(self.failed()(Errno::ENOTDIR)),
                }
            }
            Err(Errno::ENOENT) => {
                let mode = self.making.ok_or_else(|| self.failed()(Errno::ENOENT))?;
                match mkdirat(now, name, Mode::from_bits_truncate(mode)) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(errno) => return Err(self.failed()(errno)),
                }
                // What another one has made there meanwhile is no link of ours.
                Ok(Step::Directory(directory().map_err(self.failed())?))
            }
            Err(errno) => Err(self.failed()(errno)),
        }
    }

    /// Where a link leads, if it may be followed.
    fn follow(&mut self, link: &OwnedFd, way: &Path) -> Result<OsString, Obstacle> {
        let found = fstat(link.as_fd()).map_err(self.failed())?;
        if !is_ours(&found) {
            return Err(Obstacle::Foreign {
                path: way.to_owned(),
                owner: found.st_uid,
            });
        }
        self.links += 1;
        if self.links > MOST_LINKS {
            return Err(self.failed()(Errno::ELOOP));
        }
        // By the open link itself.
        readlinkat(link, "").map_err(self.failed())
    }

    fn failed(&self) -> impl FnOnce(Errno) -> Obstacle {
        failed(self.what, self.asked)
    }
}

/// What a part of a path is.
enum Step {
    Directory(OwnedFd),
    Link(OwnedFd),
}

/// Where a path starts.
fn start_of(path: &OsStr) -> PathBuf {
    match path.as_bytes().starts_with(b"/") {
        true => "/".into(),
        false => ".".into(),
    }
}

/// The parts of a path, the first one last.
fn parts_of(path: &OsStr) -> Vec<OsString> {
    let parts = path.as_bytes().split(|byte| *byte == b'/');
    let parts = parts.filter(|part| !part.is_empty() && *part != b".");
    let mut parts: Vec<OsString> = parts
        .map(|part| OsStr::from_bytes(part).to_owned())
        .collect();
    parts.reverse();
    parts
}
