//! The thread of a device's links: takes in what comes over them, and makes those that are missing, for as long as
//! the device lives.
//!
//! Whatever ended a link, it is made again by whichever of the two notices first that there is none: each looks at the
//! directory once a [`LOOK`], and connects to those there to which it has no link. So nothing has to be done when a
//! process, a link or a file has gone, and nothing is tried more often than that.

use crate::link::LinkError;
use crate::link::ends::SharedEnds;
use crate::link::place::{Looked, Place, is_own_user};
use crate::link::said::Said;
use crate::link::spare::{REMEDY, is_shortage};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{SockFlag, accept4};
use rdsock_model::Fabric;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often it looks at the directory, and at what is missing.
const LOOK: Duration = Duration::from_secs(1);

/// Events of epoll: everything else is a link.
pub const STOP: u64 = 1;
const LISTENER: u64 = 2;

/// See the module's text.
#[derive(Debug)]
pub struct Watch {
    pub fabric: Fabric,
    pub ends: SharedEnds,
    pub place: Place,
    pub epoll: Arc<Epoll>,
    /// Epoll looks at the listener.
    is_listening: bool,
    said: Said,
}

impl Watch {
    pub fn new(fabric: Fabric, ends: SharedEnds, place: Place, epoll: Arc<Epoll>) -> Self {
        Watch {
            fabric,
            ends,
            place,
            epoll,
            is_listening: false,
            said: Said::default(),
        }
    }

    /// Goes on until it is told to stop.
    pub fn run(mut self) {
        let mut events = [EpollEvent::empty(); 16];
        let mut next_look = Instant::now() + LOOK;
        loop {
            let mut wait = next_look.saturating_duration_since(Instant::now());
            if let Some(again) = self.ends.lock().again() {
                wait = wait.min(again);
            }
            // Rounded up, or it would spin for the last part of a millisecond.
            let wait = wait.as_nanos().div_ceil(1_000_000) as u16;
            let count = match self.epoll.wait(&mut events, EpollTimeout::from(wait)) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "cannot wait for links any more");
                    return;
                }
            };
            let has = |data| events[..count].iter().any(|event| event.data() == data);
            if has(STOP) {
                return;
            }
            if has(LISTENER) {
                self.accept();
            }
            self.fabric.poll_wire();
            if Instant::now() >= next_look {
                self.look();
                next_look = Instant::now() + LOOK;
            }
        }
    }

    /// Looks whether all is there that should be, and makes what is not.
    pub fn look(&mut self) {
        self.place.spare.keep(&self.epoll.0);
        match self.place.look() {
            Ok(Looked::Same) => {}
            Ok(Looked::New) => self.is_listening = false,
            Err(error) => {
                if matches!(error, LinkError::Taken { .. }) {
                    self.is_listening = false;
                    self.fabric
                        .with_peers(|peers| self.ends.lock().give_up(peers));
                }
                self.say(&error);
            }
        }
        self.listen();
        let others = self.place.others().unwrap_or_else(|error| {
            self.say(&error);
            Vec::new()
        });
        for node in others {
            if self.ends.lock().leads_to(node) {
                continue;
            }
            match self.place.dial(node) {
                Ok(Some(socket)) => self.meet(socket, Some(node)),
                Ok(None) => {}
                Err(error) => self.say(&error),
            }
        }
    }

    /// Lets epoll look at the listener.
    fn listen(&mut self) {
        let listener = self.place.listener().filter(|_| !self.is_listening);
        let event = EpollEvent::new(EpollFlags::EPOLLIN, LISTENER);
        // It is tried again at the next look.
        self.is_listening |= listener.is_some_and(|fd| self.epoll.add(fd, event).is_ok());
    }

    /// Takes those who have connected. Where there is no descriptor for one, it waits at the listener until the next
    /// look.
    fn accept(&mut self) {
        while let Some(listener) = self.place.listener() {
            let (listener, flags) = (
                listener.as_raw_fd(),
                SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            );
            let accepted = (self.place.spare).with(|e: &Errno| *e, || accept4(listener, flags));
            match accepted {
                Ok(fd) => {
                    // SAFETY: the kernel made it for this process just now, and nobody else knows it.
                    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
                    if is_own_user(&socket) {
                        self.meet(socket, None);
                    } else if self.said.is_due("refused") {
                        tracing::warn!("refused a link to a process of another user");
                    }
                }
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                Err(error) => {
                    let listener = self.place.listener();
                    self.is_listening &= listener.is_none_or(|fd| self.epoll.delete(fd).is_err());
                    return self.say_errno("cannot accept a link", error);
                }
            }
        }
    }

    fn meet(&mut self, socket: OwnedFd, dialled: Option<u16>) {
        let met = self.ends.lock().meet(socket, dialled);
        if let Err(error) = met {
            self.say_errno("cannot watch a link", error);
        }
    }

    fn say(&mut self, error: &LinkError) {
        match error.errno() {
            errno if is_shortage(errno) => self.say_errno("cannot make a link", errno),
            _ if self.said.is_due(&error.to_string()) => {
                tracing::warn!(%error, "the links to other nodes are not as they should be; it is tried again");
            }
            _ => {}
        }
    }

    fn say_errno(&mut self, what: &str, error: Errno) {
        if matches!(error, Errno::EMFILE | Errno::ENFILE) {
            if self.said.is_due(REMEDY) {
                tracing::warn!(%error, "{what}: {REMEDY}");
            }
        } else if self.said.is_due(&format!("{what}: {error}")) {
            tracing::warn!(%error, "{what}; it is tried again");
        }
    }
}
