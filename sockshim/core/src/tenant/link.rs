//! What this process notes of its connection to the daemon. What is done with that is in `attach.rs`; nothing is called here.

use super::lock::Shared;
use super::pauses::{Attempts, Changes};
use crate::state::PROCESS;
use libc::c_int;
use rdsock_shm::control::MACHINE_SOCKET;
use rdsock_shm::reason::Reason;
use std::cell::UnsafeCell;
use std::ffi::CStr;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::*};

/// Bytes of a path in a socket's address, with the one that ends it.
pub(super) const PATH_ROOM: usize = 108;

/// The notes.
#[derive(Debug)]
pub struct Link {
    /// The control connection; -1 for none.
    pub(super) control: AtomicI32,
    /// A control connection of the process that forked this one, in the fork itself, or of this process as another user: only good for ADOPT.
    pub(super) inherited: AtomicI32,
    /// The user whose daemon these lead to.
    pub(super) server: AtomicU32,
    /// When the daemon is asked (again).
    pub(super) attempts: Attempts,
    /// Counts attachments: a stream of an earlier one is unknown to the present daemon.
    pub(super) epoch: AtomicU32,
    /// Effective user and group at HELLO, in the upper and the lower half.
    pub(super) attached_as: AtomicU64,
    /// When this process has attached anew since its user had changed.
    pub(super) changes: Changes,
    /// 1 from HELLO until the daemon's greeting: the routes to other nodes are not known yet.
    pub(super) awaited: AtomicU32,
    /// 1 from HELLO until this process has mapped the memory that the greeting brings: what it asks for waits until then.
    pub(super) greeting: AtomicU32,
    /// 1 when that was waited for in vain: it is not waited for again.
    pub(super) late: AtomicU32,
    /// When it was last looked whether the daemon is there, in ticks,
    pub(super) looked_at: AtomicU64,
    /// and the same on behalf of what listens, in nanoseconds.
    pub(super) looked_for_listeners_at: AtomicU64,
    /// 1 while a program that has just started asks for the streams that it has inherited.
    pub(super) looking_up: AtomicU32,
    /// 1 where the daemon takes some programs and others not.
    pub(super) judges: AtomicU32,
    /// 1 when the program's user was told that the daemon has refused it.
    pub(super) told_refusal: AtomicU32,
    /// Why no connection of this process may be promoted, a [`Reason`]; 0 where they may.
    disabled: AtomicU32,
    path: Shared<[u8; PATH_ROOM]>,
}

impl Link {
    /// There is none yet.
    pub const fn new() -> Self {
        Link {
            control: AtomicI32::new(-1),
            inherited: AtomicI32::new(-1),
            server: AtomicU32::new(u32::MAX),
            attempts: Attempts::new(),
            epoch: AtomicU32::new(0),
            attached_as: AtomicU64::new(0),
            changes: Changes::new(),
            awaited: AtomicU32::new(0),
            greeting: AtomicU32::new(0),
            late: AtomicU32::new(0),
            looked_at: AtomicU64::new(0),
            looked_for_listeners_at: AtomicU64::new(0),
            looking_up: AtomicU32::new(0),
            judges: AtomicU32::new(0),
            told_refusal: AtomicU32::new(0),
            disabled: AtomicU32::new(0),
            path: Shared(UnsafeCell::new([0; PATH_ROOM])),
        }
    }

    /// Notes where the daemon is. A path that is too long for a socket is none.
    ///
    /// # Safety
    /// Nobody reads it yet.
    pub(super) unsafe fn note_path(&self, path: &CStr) {
        if path.to_bytes().len() < PATH_ROOM {
            // SAFETY: as the caller says.
            let place = unsafe { &mut *self.path.0.get() };
            for (to, from) in place.iter_mut().zip(path.to_bytes()) {
                *to = *from;
            }
        }
    }

    /// Where the daemon is.
    pub(super) fn path(&self) -> &[u8] {
        // SAFETY: written by the constructor only.
        let configured = unsafe { &*self.path.0.get() };
        match configured.iter().position(|byte| *byte == 0) {
            Some(len @ 1..) => configured.get(..len).unwrap_or_default(),
            _ => MACHINE_SOCKET.as_bytes(),
        }
    }

    /// Would a program with this environment find its daemon there, too?
    pub(super) fn leads_there(&self, path: Option<&CStr>) -> bool {
        let path = path.map_or(&[][..], CStr::to_bytes);
        let is_path = (1..PATH_ROOM).contains(&path.len());
        self.path()
            == if is_path {
                path
            } else {
                MACHINE_SOCKET.as_bytes()
            }
    }

    /// No connection may be promoted from now on.
    pub(super) fn disable(&self, reason: Reason) {
        self.disabled.store(reason as u32, Relaxed);
    }

    /// True when no connection of this process may be promoted.
    pub(super) fn is_disabled(&self) -> bool {
        self.disabled.load(Relaxed) != 0
    }

    /// Why that is so.
    pub(super) fn why_disabled(&self) -> Reason {
        Reason::from_code(self.disabled.load(Relaxed)).unwrap_or(Reason::Disabled)
    }

    /// True when the daemon is not to know this process. Where something else keeps its connections on the kernel, it is told, so that
    /// `rdsock why` can say what.
    pub(super) fn stays_unknown(&self) -> bool {
        let speaks = [Reason::IoUring, Reason::DeepBind, Reason::HandedOver];
        self.is_disabled() && !speaks.contains(&self.why_disabled())
    }

    /// The daemon has greeted this process, or is not there any more.
    pub(super) fn await_nothing(&self) {
        self.awaited.store(0, Relaxed);
        self.greeting.store(0, Relaxed);
    }

    /// In a child, which attaches anew: at once through the connection that it has from its parent, or later without it. A descriptor
    /// that is of no use any more.
    #[must_use]
    pub(super) fn forget_in_child(&self) -> Option<c_int> {
        let control = self.control.swap(-1, Relaxed);
        let inherited = self.inherited.load(Relaxed);
        if control >= 0 {
            self.inherited.store(control, Relaxed);
        }
        self.looked_at.store(0, Relaxed);
        self.looked_for_listeners_at.store(0, Relaxed);
        self.attempts.forget();
        self.changes.forget();
        self.await_nothing();
        (control >= 0 && inherited >= 0).then_some(inherited)
    }

    /// The connection of the process that forked this one, where it was not used. Who has it can read there what that process is told.
    #[must_use]
    pub(super) fn give_up_inherited(&self) -> Option<c_int> {
        let inherited = self.inherited.swap(-1, AcqRel);
        (inherited >= 0).then_some(inherited)
    }

    /// The shim's own descriptor `old` is now `new`.
    pub(super) fn moved(&self, old: c_int, new: c_int) {
        for place in [&self.control, &self.inherited] {
            let _ = place.compare_exchange(old, new, AcqRel, Relaxed);
        }
    }
}

/// Of this process.
#[inline]
pub(super) fn link() -> &'static Link {
    &PROCESS.tenant.link
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_attaches_through_the_connection_of_its_parent() {
        let link = Link::new();
        assert_eq!(link.forget_in_child(), None);
        link.control.store(5, Relaxed);
        assert_eq!(link.forget_in_child(), None);
        let fds = |link: &Link| (link.control.load(Relaxed), link.inherited.load(Relaxed));
        assert_eq!(fds(&link), (-1, 5));
        // Its own child, before it has attached: the same one.
        assert_eq!(link.forget_in_child(), None);
        assert_eq!(fds(&link), (-1, 5));
        // And after: its own.
        link.control.store(6, Relaxed);
        assert_eq!(link.forget_in_child(), Some(5));
        assert_eq!(fds(&link), (-1, 6));
        link.moved(6, 8);
        link.moved(-2, 9);
        assert_eq!(fds(&link), (-1, 8));
        assert_eq!(link.give_up_inherited(), Some(8));
        assert_eq!((link.give_up_inherited(), fds(&link)), (None, (-1, -1)));
    }

    #[test]
    fn a_daemon_is_told_of_those_that_something_else_keeps_on_the_kernel() {
        let link = Link::new();
        assert!(!link.is_disabled() && !link.stays_unknown());
        for (reason, stays_unknown) in [
            (Reason::Disabled, true),
            (Reason::Refused, true),
            (Reason::Shared, true),
            (Reason::IoUring, false),
            (Reason::DeepBind, false),
            (Reason::HandedOver, false),
        ] {
            link.disable(reason);
            assert!(link.is_disabled());
            assert_eq!(link.why_disabled(), reason);
            assert_eq!(link.stays_unknown(), stays_unknown, "{reason:?}");
        }
    }

    #[test]
    fn the_daemon_is_where_the_environment_says_or_the_machines() {
        let link = Link::new();
        assert_eq!(link.path(), MACHINE_SOCKET.as_bytes());
        let note = |path: &CStr| {
            // SAFETY: nobody else has it.
            unsafe { link.note_path(path) };
        };
        let too_long = std::ffi::CString::new(vec![b'a'; PATH_ROOM]).unwrap();
        note(&too_long);
        note(c"");
        assert_eq!(link.path(), MACHINE_SOCKET.as_bytes());
        assert!(link.leads_there(None) && link.leads_there(Some(c"")));
        note(c"/run/s");
        assert_eq!(link.path(), b"/run/s");
        assert!(link.leads_there(Some(c"/run/s")));
        assert!(!link.leads_there(None) && !link.leads_there(Some(c"/run/t")));
    }
}
