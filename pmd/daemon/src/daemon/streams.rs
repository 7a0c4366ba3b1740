//! Streams: made, handed out, found again, given back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rdsock_shm::reason::Reason;
use tracing::debug;

use super::{Daemon, End};
use crate::accounts::{Over, Thing};
use crate::agenda::Due;
use crate::book::{self, Announced, Conn, order};
use crate::channel::Outgoing;
use crate::found::{Found, Kept};
use crate::memory::{HugePages, rounded};
use crate::porters::{KEEPERS, Owner};
use crate::rights::{Ask, Rights};
use crate::streams::{Bells, Memory};

/// Looks at an abandoned stream whose socket somebody still holds: soon at first, then seldom.
const FIRST_LOOK: Duration = Duration::from_millis(50);
const LAST_LOOK: Duration = Duration::from_secs(30);
/// Streams that are looked at in a turn when many lose their holders at once, and the time for a portion.
const PORTION: usize = 64;
const PORTION_TIME: Duration = Duration::from_millis(4);
/// Memory is given back on behalf of no connection: one stream of a user after the other.
const NO_CONNECTION: u64 = 0;
/// Memory for further streams is made when those that come together have theirs.
const RESTOCK: Duration = Duration::from_millis(3);
/// Descriptors of a stream: its memory and two end pages.
const STREAM_DESCRIPTORS: u64 = 3;

/// Who gives back what this user pays for.
pub(super) fn gives_back(payer: u32) -> Owner {
    Owner {
        uid: payer,
        connection: NO_CONNECTION,
    }
}

impl Daemon {
    /// Makes the stream of two ends that were found to hold the same connection.
    pub(super) fn make(&mut self, a: Announced, b: Announced) -> Result<(), Reason> {
        let ends = order(a, b).ok_or(Reason::Foreign)?;
        let (ring_size, uid) = (self.config.ring_size, ends[0].uid);
        let wanted = [
            (Thing::Streams, 1),
            (Thing::Bytes, rounded(ring_size, 4096)),
            (Thing::Descriptors, STREAM_DESCRIPTORS),
        ];
        let mut charge = self.accounts.charge(uid, &wanted).map_err(|over| {
            self.log_over(over, uid, 0);
            Reason::Limit
        })?;
        let tenant = |end: &Announced| {
            let tenant = self.connections.tenant(end.conn.tenant);
            tenant.ok_or(Reason::Unverified)
        };
        let bells = |end: &Announced, other: &Announced| -> Result<Option<Bells>, Reason> {
            let tenant = tenant(end)?;
            let (board, uid) = (tenant.bells.clone(), end.uid);
            let may_ring = Rights::may_ring(other.uid, uid) && tenant.passport.is_users_own();
            Ok(may_ring.then_some(Bells { board, uid }))
        };
        let may_have_holes = |end: &Announced, other: &Announced| -> Result<bool, Reason> {
            let own = tenant(end)?.passport.is_users_own();
            Ok(own && Rights::may_make_holes(other.uid, end.uid))
        };
        let may_be_huge =
            may_have_holes(&ends[0], &ends[1])? && may_have_holes(&ends[1], &ends[0])?;
        let huge_pages = match may_be_huge {
            true => self.config.huge_pages,
            false => HugePages::Never,
        };
        let bells = [bells(&ends[0], &ends[1])?, bells(&ends[1], &ends[0])?];
        let made = self.streams.make_memory(ring_size, huge_pages);
        let (id, fds) = made.map_err(|error| {
            let what = "can't make a stream's memory";
            self.journal.fault(what, uid, &error);
            Reason::NoMemory
        })?;
        // Huge pages are whole ones.
        let more = fds.bytes.saturating_sub(rounded(ring_size, 4096));
        charge.more(Thing::Bytes, more).map_err(|_| Reason::Limit)?;
        if self.streams.is_to_be_restocked() {
            self.agenda.after(RESTOCK, Due::Stock);
        }
        self.journal.counters.streams_opened += 1;
        self.journal.counters.streams_huge += u64::from(fds.huge);
        debug!(stream = id, route = ?ends[0].route, "opened");
        let bytes = fds.bytes;
        let closer = self.porters.closer(gives_back(uid));
        let memory = Memory::new(fds, bells, ring_size, (Arc::new(charge), &closer), None);
        self.streams.open(id, ends, bytes, memory);
        Ok(())
    }

    /// Sends both tenants their end of the stream that was just made.
    pub(super) fn hand_out(&mut self, served: Announced, other: Announced) -> Result<(), End> {
        if let Some(message) = self.promotion(other.conn) {
            if other.conn.tenant == served.conn.tenant {
                self.send(other.conn.tenant, message)?;
            } else {
                self.send_to_other(other.conn.tenant, message);
            }
        }
        match self.promotion(served.conn) {
            Some(message) => self.send(served.conn.tenant, message),
            None => Ok(()),
        }
    }

    /// The PROMOTE message for a connection that holds an end.
    pub(super) fn promotion(&self, conn: Conn) -> Option<Outgoing> {
        let tenant = self.connections.tenant(conn.tenant)?;
        self.streams.promotion(conn, tenant.passport.peer.uid)
    }

    /// A tenant has inherited an end, and holds it by this connection: that is on its user's account.
    pub(super) fn take_seat(&mut self, conn: Conn, stream: u64, end: usize) -> Result<(), Over> {
        if self.streams.seat_of(conn) == Some((stream, end)) {
            return Ok(());
        }
        let uid = self.connections.get(conn.tenant).map(|one| one.peer.uid);
        let before = self.streams.replace(conn);
        let inherits = uid.filter(|_| !self.streams.holds(conn.tenant, stream, end));
        let charge = inherits.map(|uid| self.accounts.charge(uid, &[(Thing::Inherited, 1)]));
        let taken = charge.transpose();
        let taken = taken.map(|charge| self.streams.hold(stream, end, conn, charge));
        // Only now, so that a stream that only moves is not found abandoned.
        if let Some(before) = before {
            self.check_stream(before);
        }
        taken
    }

    /// A tenant gave up a connection.
    pub(super) fn give_up(&mut self, conn: Conn) {
        self.announcements.forget(conn);
        if let Some(stream) = self.streams.release(conn) {
            self.check_stream(stream);
        }
    }

    /// A tenant could not map its stream: the other end shall not wait for it. It gives up its end, and no more: it may have mapped it all the same,
    /// and go on with it, and then that is on an account.
    pub(super) fn on_declined(&mut self, conn: Conn) {
        let seat = self.streams.seat_of(conn);
        let other_end = seat.and_then(|(id, end)| self.streams.get(id)?.ends.get(1 - end));
        let others: Vec<Conn> = other_end
            .map(|end| end.holders.values().map(|holder| holder.conn).collect())
            .unwrap_or_default();
        self.give_up(conn);
        for other in others.into_iter().filter(|other| *other != conn) {
            self.send_to_other(other.tenant, Self::verdict(other, Reason::PeerDemoted));
        }
    }

    /// A holder of a stream is gone. Gives it back when it was the last, unless a process that the daemon does not know (a child
    /// that has not attached, a program between exec and attach) still holds one of its sockets.
    pub(super) fn check_stream(&mut self, id: u64) {
        self.have_kept_looked_at(&[id], 0);
    }

    fn is_abandoned(&self, id: u64) -> bool {
        let stream = self.streams.get(id);
        stream.is_some_and(|stream| stream.is_abandoned())
    }

    /// It is due to look once more whether somebody holds a stream, which is asked for the so-manieth time.
    pub(super) fn look_again(&mut self, id: u64, times: u32) {
        self.streams.looked(id);
        self.have_kept_looked_at(&[id], times);
    }

    /// Has looked at whether somebody holds one of the sockets of each of these streams, if they are abandoned.
    fn have_kept_looked_at(&mut self, streams: &[u64], times: u32) {
        let mut questions: BTreeMap<u32, Vec<_>> = BTreeMap::new();
        for id in streams.iter().copied() {
            // One look at a time: who takes and gives up an end without end has no more of them.
            if !self.is_abandoned(id) || !self.streams.begin_look(id) {
                continue;
            }
            if let Some(stream) = self.streams.get(id) {
                let question = (id, self.sockets_of(stream));
                questions.entry(stream.payer).or_default().push(question);
            }
        }
        for (payer, questions) in questions {
            let owner = Owner {
                uid: KEEPERS,
                connection: payer.into(),
            };
            self.porters.ask_quick(owner, move |carrier| {
                let looked_at = questions.into_iter().map(|(stream, sockets)| {
                    let mut sockets = sockets.into_iter();
                    let kept =
                        sockets.any(|(ask, cookie, inode)| ask.is_there(carrier, cookie, inode));
                    Kept {
                        stream,
                        times,
                        kept,
                    }
                });
                Some(Found::Kept(looked_at.collect()))
            });
        }
    }

    /// Where to ask for the sockets of a stream's ends, with their cookies and inodes. Of one to another node, one end's is the daemon's.
    fn sockets_of(&self, stream: &book::Stream<Memory>) -> Vec<(Ask, u64, u64)> {
        let elsewhere = stream.memory.elsewhere.as_ref();
        let ends = (0..).zip(&stream.ends);
        let ends = ends.filter(|(at, _)| elsewhere.is_none_or(|elsewhere| elsewhere.end == *at));
        let ask = |end: &book::End| Some((self.rights.ask_for(end.route)?, end.cookie, end.inode));
        ends.filter_map(|(_, end)| ask(end)).collect()
    }

    /// It was looked at whether somebody holds these streams: one that is kept is looked at again, less and less often.
    pub(super) fn on_kept(&mut self, looked_at: &[Kept]) {
        for Kept {
            stream,
            times,
            kept,
        } in looked_at.iter().copied()
        {
            let is_outdated = self.streams.end_look(stream);
            if !self.is_abandoned(stream) {
                continue;
            }
            if is_outdated {
                self.check_stream(stream);
            } else if !kept {
                self.close_stream(stream);
            } else if self.streams.look_after(stream) {
                let wait = LAST_LOOK.min(FIRST_LOOK * 2u32.saturating_pow(times.min(16)));
                self.agenda.after(wait, Due::Stream(stream, times + 1));
            }
        }
    }

    fn close_stream(&mut self, id: u64) {
        if self.is_carried(id) {
            // Its anchor tells the poll core how it ended, and it is closed when the other node knows.
            return;
        }
        if let Some(stream) = self.streams.close(id) {
            self.journal.counters.streams_closed += 1;
            debug!(stream = id, "closed");
            self.give_back(stream);
        }
    }

    /// Has a porter give a stream's memory back, since whoever is the last to hold it has to take it apart. Until then
    /// it is on its payer's account.
    pub(super) fn give_back(&mut self, stream: book::Stream<Memory>) {
        self.porters.give(gives_back(stream.payer), move || {
            drop(stream);
            None
        });
    }

    /// Holders of these streams are gone. Many are looked at in portions, so that others have their turn between.
    pub(super) fn check_streams(&mut self, streams: &[u64]) {
        for (portion, streams) in (0..).zip(streams.chunks(PORTION)) {
            if portion == 0 {
                self.have_kept_looked_at(streams, 0);
                continue;
            }
            for stream in streams {
                if self.streams.look_after(*stream) {
                    self.agenda
                        .after(PORTION_TIME * portion, Due::Stream(*stream, 0));
                }
            }
        }
    }
}
