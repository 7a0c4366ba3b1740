//! What comes to the port for anchors: the programs' ends of connections to other nodes, and strangers.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::getsockname;
use tracing::debug;

use super::Daemon;
use crate::agenda::{Due, Token};
use crate::channel::sender;
use crate::fabric::{Anchor, Arrival};
use crate::porters::{Owner, STRANGERS};
use crate::rights::{Held, Rights, socket_address};

/// Time until anchors are taken again when there were no descriptors.
const PAUSE: Duration = Duration::from_millis(20);
/// Anchors that are taken in a turn: all that can wait at both listeners.
const ANCHORS: usize = 2 * 129;
/// With so many batches of them that are to be closed, others wait, too.
const STRAYS: usize = 64;

impl Daemon {
    /// Anchors have come in. Not a byte flows before it is known whose each is: that of the program that was promised a
    /// stream for the socket at the other end.
    pub(super) fn on_anchors(&mut self, listener: usize) {
        let mut strays = Vec::new();
        self.take_anchors(listener, &mut strays);
        self.have_closed(strays);
    }

    fn take_anchors(&mut self, listener: usize, strays: &mut Vec<OwnedFd>) {
        while self.turn.arrivals < ANCHORS
            && let Some(fabric) = &mut self.fabric
        {
            self.turn.arrivals += 1;
            if self.porters.waiting_of(STRANGERS) > STRAYS {
                return self.let_anchors_wait(listener);
            }
            match fabric.arrival(listener) {
                Arrival::From(socket, from) => strays.extend(self.on_arrival(socket, from)),
                Arrival::None => return,
                Arrival::Short(error) => {
                    let what = "programs that go to other nodes have to wait: more descriptors are needed (LimitNOFILE=)";
                    self.journal.fault(what, 0, &error);
                    return self.let_anchors_wait(listener);
                }
            }
        }
    }

    /// Those that come now wait in the backlog of the listener.
    fn let_anchors_wait(&mut self, listener: usize) {
        let fabric = self.fabric.as_ref();
        if let Some(socket) = fabric.and_then(|fabric| fabric.listener(listener)) {
            self.agenda.unwatch(socket);
        }
        self.agenda.after(PAUSE, Due::Anchors(listener));
    }

    /// Nobody has asked for these. Who has made one decides what its end costs, which wakes all that watch it: a porter closes them.
    fn have_closed(&mut self, strays: Vec<OwnedFd>) {
        let Some(first) = strays.first() else {
            return;
        };
        let owner = Owner {
            uid: STRANGERS,
            connection: first.as_raw_fd() as u64,
        };
        self.porters.give(owner, move || {
            drop(strays);
            None
        });
    }

    /// A connection has come in. It is given back, if it is nobody's anchor.
    fn on_arrival(&mut self, socket: OwnedFd, from: SocketAddr) -> Option<OwnedFd> {
        let fabric = self.fabric.as_mut()?;
        let name = getsockname(socket.as_raw_fd()).ok();
        let to = name.as_ref().and_then(socket_address);
        let Some((owner, to)) = fabric.expected_from(from).zip(to) else {
            self.journal.counters.stray += 1;
            debug!(%from, "a connection to the anchors' port that nobody asked for");
            return Some(socket);
        };
        let socket = self.porters.foreign(sender(owner), socket);
        fabric.arrive(from, to, socket);
        self.attach_arrival(from);
        None
    }

    /// An anchor has come in. Very many streams may be promised for the address that it comes from, by whoever names it: the
    /// kernel is asked once which socket that is, and again only for those that are promised to who holds it.
    fn attach_arrival(&mut self, from: SocketAddr) {
        let fabric = self.fabric.as_ref();
        let Some((tickets, to)) =
            fabric.and_then(|f| Some((f.promised_to(from), f.arrived_at(from)?)))
        else {
            return;
        };
        let diag = self.rights.namespaces.home_diag();
        let found = diag.and_then(|diag| diag.find_any(from, to).ok().flatten());
        for ticket in tickets {
            if let Some(Anchor::Promised { held, .. }) = self.anchor_of(ticket)
                && found.is_some_and(|found| found.inode == held.inode)
            {
                self.attach_anchor(ticket, held);
            }
        }
    }

    /// Anchors are taken again.
    pub(super) fn on_anchors_due(&mut self, listener: usize) {
        let found = self
            .fabric
            .as_ref()
            .and_then(|fabric| fabric.listener(listener));
        if let Some(socket) = found
            && self
                .agenda
                .watch(socket, Token::Anchors(listener as u64))
                .is_err()
        {
            self.agenda.after(PAUSE, Due::Anchors(listener));
        }
    }

    pub(super) fn anchor_of(&self, ticket: u64) -> Option<Anchor> {
        Some(self.fabric.as_ref()?.carried.get(&ticket)?.anchor)
    }

    /// A program that was promised a stream holds a socket: if that is the other end of an anchor that has come in from
    /// where it was to come, bytes flow.
    pub(super) fn attach_anchor(&mut self, ticket: u64, held: Held) {
        let Some(Anchor::Promised { from, .. }) = self.anchor_of(ticket) else {
            return;
        };
        let Some(fabric) = &mut self.fabric else {
            return;
        };
        let Some(to) = fabric.arrived_at(from) else {
            return;
        };
        let diag = self.rights.namespaces.home_diag().map(|diag| &**diag);
        if Rights::is_between(diag, held, (from, to)) {
            fabric.attach_arrived(ticket, from);
            if let Some(carried) = fabric.carried.get_mut(&ticket) {
                carried.connect = None;
            }
        }
    }
}
