//! Waits of the shim's own that signals end as they end a blocking call of the kernel: a handler with
//! `SA_RESTART` runs and the call goes on, any other ends it with `EINTR`. `poll` alone cannot tell:
//! it is ended by both, and which handler has run is not known afterwards. So signals are held back,
//! looked at, and let through.

use crate::{conn, limits, sys, tenant};
use libc::c_int;

/// This thread's signals, held back until [`Held::release`].
#[derive(Debug)]
#[must_use]
pub struct Held {
    /// What the program has blocked.
    mask: u64,
    /// Readable when one of the others has come; negative when there is no fd to be had.
    fd: c_int,
}

impl Held {
    /// Holds back all from now on.
    pub fn hold() -> Self {
        let mask = sys::block_signals();
        let fd = sys::signal_fd(!mask);
        Held {
            mask,
            fd: if fd < 0 { fd } else { tenant::hide(fd) },
        }
    }

    /// Waits until `fd` has what `events` names (or -1: for the time alone), a signal comes, or the time is up
    /// (`None`: never). False in the last case; it may also be sooner.
    pub fn wait(&self, fd: c_int, events: i16, ms: Option<i64>) -> bool {
        let entry = |fd, events| libc::pollfd {
            fd,
            events,
            revents: 0,
        };
        let mut fds = [entry(fd, events), entry(self.fd, libc::POLLIN)];
        let ms = match ms {
            _ if self.fd >= 0 => ms,
            // Without a descriptor, a signal is found only at the end of a wait.
            Some(ms) => Some(ms.min(limits::STEP_MS.get() as i64)),
            None => Some(limits::STEP_MS.get() as i64),
        };
        sys::poll_for(&mut fds, ms) > 0
    }

    /// Lets them through: handlers run now. True when one of them interrupts calls.
    pub fn release(self) -> bool {
        let interrupts = sys::pending_signal_interrupts(self.mask);
        // Before a handler runs, which may never return. The program may have taken the number.
        if self.fd >= 0 && conn::kind(self.fd) == conn::Kind::Internal {
            tenant::close_hidden(self.fd);
        }
        sys::restore_signals(self.mask);
        interrupts
    }
}
