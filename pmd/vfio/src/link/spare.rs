//! Descriptors that links keep back, for when the process has no others left.
//!
//! A link needs one for a moment whenever the other process names a file. One that is given up for that is taken
//! again as soon as there is one.

use nix::errno::Errno;
use std::os::fd::{AsFd, OwnedFd};

/// How many are kept back.
const COUNT: usize = 4;

/// What to do when there are none: for the log.
pub const REMEDY: &str = "no descriptors are left for links to other nodes: raise the limit (LimitNOFILE= in the unit, \
                          ulimit -n), or lower what each user may have; it is tried again";

/// See the module's text.
#[derive(Debug, Default)]
pub struct Spare(Vec<OwnedFd>);

impl Spare {
    /// Keeps back as many as there can be, duplicates of `like`.
    pub fn keep(&mut self, like: impl AsFd) {
        while self.0.len() < COUNT {
            match like.as_fd().try_clone_to_owned() {
                Ok(fd) => self.0.push(fd),
                Err(_) => return,
            }
        }
    }

    /// Gives one up. False when there is none.
    pub fn give(&mut self) -> bool {
        self.0.pop().is_some()
    }

    /// Does something that needs descriptors, and gives up what is kept back if there are no others.
    pub fn with<T, E>(
        &mut self,
        errno: impl Fn(&E) -> Errno,
        mut call: impl FnMut() -> Result<T, E>,
    ) -> Result<T, E> {
        loop {
            match call() {
                Err(error) if is_shortage(errno(&error)) && self.give() => {}
                done => return done,
            }
        }
    }
}

/// Nothing is wrong but that there is too little of something, for now.
pub fn is_shortage(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS
    )
}
