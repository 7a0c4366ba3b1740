//! What comes to the port for anchors: the programs' ends of connections to other nodes, and strangers.

use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::getsockname;
use tracing::debug;

use super::Daemon;
use crate::agenda::{Due, Token};
use crate::channel::sender;
use crate::diag::cookie_of;
use crate::fabric::{Anchor, Arrival, Early};
use crate::found::Found;
use crate::porters::{Owner, STRANGERS};
use crate::rights::{Rights, socket_address};

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

    /// Of all listeners: what a program announces may not have been taken yet.
    pub(super) fn take_all_anchors(&mut self) {
        let listeners = self.fabric.as_ref().map_or(0, |fabric| fabric.listeners());
        (0..listeners).for_each(|listener| self.on_anchors(listener));
    }

    fn take_anchors(&mut self, listener: usize, strays: &mut Vec<OwnedFd>) {
        while self.turn.arrivals < ANCHORS
            && let Some(fabric) = &mut self.fabric
            && !fabric.waiting.contains(&listener)
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
        let Some(fabric) = &mut self.fabric else {
            return;
        };
        // Who announces has all listeners looked at, as often as he likes: one that waits does so once.
        if !fabric.waiting.insert(listener) {
            return;
        }
        if let Some(socket) = fabric.listener(listener) {
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
        let cookie = cookie_of(socket.as_fd());
        let expected = fabric.expected_from(from).zip(to).zip(cookie);
        let Some(((owner, to), cookie)) = expected else {
            self.journal.counters.stray += 1;
            debug!(%from, "a connection to the anchors' port that nobody asked for");
            return Some(socket);
        };
        let socket = self.porters.closer(sender(owner)).foreign(socket);
        fabric.arrive(from, to, socket, cookie);
        for ticket in fabric.promised_to(from) {
            self.turn.arrivals += 1;
            self.have_arrival_looked_at(ticket);
        }
        None
    }

    /// An anchor has come in that may be this stream's. If one is looked at, the answer to that tells whether it was this one.
    fn have_arrival_looked_at(&mut self, ticket: u64) {
        if self.is_looked_at(ticket).is_some_and(|waits| !*waits)
            && self.have_anchor_looked_at(ticket, None)
            && let Some(waits) = self.is_looked_at(ticket)
        {
            *waits = true;
        }
    }

    fn is_looked_at(&mut self, ticket: u64) -> Option<&mut bool> {
        let carried = self.fabric.as_mut()?.carried.get_mut(&ticket)?;
        Some(&mut carried.looked_at)
    }

    /// A program was promised a stream for a socket that it held: has it looked at whether that is the other end of the anchor that has
    /// come in from where it was to come. On behalf of that program: the kernel may look for its socket for as long as somebody likes, and each who
    /// shares the address was promised a stream of its own. False where none has come in.
    pub(super) fn have_anchor_looked_at(&mut self, ticket: u64, early: Option<Early>) -> bool {
        let Some(Anchor::Promised {
            from,
            tenant,
            uid,
            held,
        }) = self.anchor_of(ticket)
        else {
            return false;
        };
        let fabric = self.fabric.as_ref();
        let Some((to, cookie)) = fabric.and_then(|fabric| fabric.arrived_at(from)) else {
            return false;
        };
        let ask = self.rights.ask_at_home(from, to);
        let owner = Owner {
            uid,
            connection: tenant,
        };
        self.porters.ask_quick(owner, move |carrier| {
            // Of one that has gone, nothing else is asked: each question may take long, and both ends are asked for in one piece.
            let own = ask.own(carrier, held.cookie).ok().flatten();
            let located = own.and_then(|_| ask.locate(carrier, held.cookie).ok());
            let is_its = located.is_some_and(|located| Rights::is_between(held, located, cookie));
            Some(Found::Anchor {
                ticket,
                cookie,
                is_its,
                early,
            })
        });
        true
    }

    /// It was looked at whether the anchor of which the daemon's socket has this cookie is that of a stream: then bytes flow.
    pub(super) fn on_anchor_looked_at(
        &mut self,
        ticket: u64,
        cookie: u64,
        is_its: bool,
        early: Option<Early>,
    ) {
        self.attach_anchor(ticket, cookie, is_its);
        match early {
            Some(early) => self.settle_early(ticket, early),
            None => self.look_at_later_arrival(ticket, cookie),
        }
    }

    fn attach_anchor(&mut self, ticket: u64, cookie: u64, is_its: bool) {
        let Some(Anchor::Promised { from, .. }) = self.anchor_of(ticket) else {
            return;
        };
        let Some(fabric) = &mut self.fabric else {
            return;
        };
        // Another one may have come in from there meanwhile.
        let is_there = fabric.arrived_at(from).is_some_and(|(_, at)| at == cookie);
        if is_its && is_there {
            fabric.attach_arrived(ticket, from);
            if let Some(carried) = fabric.carried.get_mut(&ticket) {
                carried.connect = None;
            }
        }
    }

    /// An anchor may have come in while an earlier one was looked at.
    fn look_at_later_arrival(&mut self, ticket: u64, looked_at: u64) {
        let fabric = self.fabric.as_mut();
        let Some(carried) = fabric.and_then(|fabric| fabric.carried.get_mut(&ticket)) else {
            return;
        };
        carried.looked_at = false;
        let Anchor::Promised { from, .. } = carried.anchor else {
            return;
        };
        let fabric = self.fabric.as_ref();
        let there = fabric.and_then(|fabric| fabric.arrived_at(from));
        if there.is_some_and(|(_, cookie)| cookie != looked_at) {
            self.have_arrival_looked_at(ticket);
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
            return self.agenda.after(PAUSE, Due::Anchors(listener));
        }
        if let Some(fabric) = &mut self.fabric {
            fabric.waiting.remove(&listener);
        }
    }

    pub(super) fn anchor_of(&self, ticket: u64) -> Option<Anchor> {
        Some(self.fabric.as_ref()?.carried.get(&ticket)?.anchor)
    }
}
