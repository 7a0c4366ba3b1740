//! Interrupts to other processes.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, OwnedFd};

/// Adds 1 to an eventfd of another process, unless that would block: then as many are pending as can be.
pub(crate) fn fire(eventfd: &OwnedFd) {
    let mut fds = [PollFd::new(eventfd.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut fds, PollTimeout::ZERO) == Ok(1) {
        // It belongs to another process: whether that has closed it is not for us to know.
        let _ = nix::unistd::write(eventfd, &1u64.to_ne_bytes());
    }
}
