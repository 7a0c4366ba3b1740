//! From announcements to pairs. A porter looks whether the tenant holds the socket; then the other end is looked for.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rdsock_shm::control::{Lookup, Message, NotFound, Request, kind};
use rdsock_shm::reason::Reason;
use tracing::debug;

use super::{Daemon, End};
use crate::accounts::Thing;
use crate::book::{self, Announced, Announcement, Conn, Route, Socket, TenantId};
use crate::fabric::{Anchor, Early, addresses};
use crate::found::{Errand, Found};
use crate::porters::{Carrier, NOBODY, Owner};
use crate::rights::{
    Ask, Changed, Claim, Held, Located, Look, Meeting, NotHeld, Passport, Place, Rights, look,
};

/// Who waits for looks at others for longer is looked at once more.
const SEEN_LATELY: Duration = Duration::from_millis(50);
/// After so many looks for a pair, one for each end, it is not asked how long they have taken: where each takes long, there would be no
/// end.
const LOOKS: u8 = 2;

/// How far two ends that find each other have come.
#[derive(Clone, Copy, Debug)]
struct Pairing {
    /// When the later one was found to hold its socket.
    since: Instant,
    /// Looks at their processes since.
    looks: u8,
}

/// What is to be looked at of two ends that find each other.
struct Doubt {
    /// The end whose process is looked at.
    end: Announced,
    /// The socket of the one that has waited.
    other: Socket,
    /// It is not known to have heard what the other one has said.
    is_unheard: bool,
}

/// What a connection record is looked at for.
#[derive(Debug)]
enum Wanted {
    /// It was announced, maybe with the ticket of a stream to another node.
    Match { claim: Box<Claim>, ticket: u64 },
    /// Its other end waits for it, and one of the two processes is looked at once more.
    Pair(Box<Announced>, Pairing),
    /// Its process asks whether it is a stream that it has inherited.
    Lookup,
    /// Its process says that it has inherited this end.
    Hold { stream: u64, end: usize },
}

/// What tenants want of which connection record, while porters look at its socket.
#[derive(Debug, Default)]
pub(super) struct Announcements {
    looked_at: HashMap<TenantId, HashMap<u32, (u32, Wanted)>>,
    /// Those that porters have just brought: they were looked at as late as the one that is matched with them.
    fresh: Vec<Conn>,
}

impl Announcements {
    fn expect(&mut self, conn: Conn, wanted: Wanted) {
        let records = self.looked_at.entry(conn.tenant).or_default();
        records.insert(conn.number, (conn.generation, wanted));
    }

    /// What was wanted of this use of the record, if it is still wanted.
    fn take(&mut self, conn: Conn) -> Option<Wanted> {
        let records = self.looked_at.get_mut(&conn.tenant)?;
        let (generation, _) = records.get(&conn.number)?;
        let wanted = (*generation == conn.generation).then(|| records.remove(&conn.number))?;
        if records.is_empty() {
            self.looked_at.remove(&conn.tenant);
        }
        Some(wanted?.1)
    }

    /// The pair that this use of the record is of, if it is still wanted.
    fn take_pair(&mut self, conn: Conn) -> Option<(Announced, Pairing)> {
        match self.take(conn)? {
            Wanted::Pair(announced, pairing) => Some((*announced, pairing)),
            other => {
                self.expect(conn, other);
                None
            }
        }
    }

    /// The record is given up, unless it is used for something later than that by now.
    pub(super) fn forget(&mut self, conn: Conn) {
        // Generations wrap.
        let is_later = |generation: u32| (conn.generation.wrapping_sub(generation) as i32) < 0;
        if let Some(records) = self.looked_at.get_mut(&conn.tenant) {
            records
                .retain(|number, (generation, _)| *number != conn.number || is_later(*generation));
        }
    }

    /// The record is used for something new.
    fn replace(&mut self, conn: Conn) {
        if let Some(records) = self.looked_at.get_mut(&conn.tenant) {
            records.remove(&conn.number);
        }
    }

    /// Other looks are brought: what was fresh is no more.
    pub(super) fn forget_what_is_fresh(&mut self) {
        self.fresh.clear();
    }

    /// The tenant has gone.
    pub(super) fn forget_all(&mut self, tenant: TenantId) {
        self.looked_at.remove(&tenant);
    }
}

impl Daemon {
    /// A tenant holds a connection, or says so.
    pub(super) fn on_announce(&mut self, conn: Conn, request: &Request) -> Result<(), End> {
        self.journal.counters.announced += 1;
        self.announcements.replace(conn);
        if let Some(stream) = self.streams.replace(conn) {
            self.check_stream(stream);
        }
        let ticket = request.stream_id;
        let Some(claim) = Claim::parse(conn, request) else {
            self.journal.counters.bad_requests += 1;
            return self.turn_down(conn, Reason::Unverified);
        };
        let (local, peer) = (claim.local.port(), claim.peer.port());
        if !self.config.policy.allows_ports(local, peer) {
            return self.turn_down(conn, Reason::Policy);
        }
        let ask = self.ask_for(&claim);
        self.have_announced_looked_at(Box::new(claim), ticket, ask);
        Ok(())
    }

    /// Where to ask for the socket that a tenant says it holds.
    fn ask_for(&self, claim: &Claim) -> Option<Ask> {
        let own = self.connections.tenant(claim.conn.tenant)?.netns;
        let names = (claim.local, claim.peer);
        self.rights.ask_at(own, claim.netns_cookie, names)
    }

    fn have_announced_looked_at(&mut self, claim: Box<Claim>, ticket: u64, ask: Option<Ask>) {
        let (conn, socket) = (claim.conn, (claim.fd, claim.cookie));
        let searched = claim.maybe_shared;
        let ask = ask.map(|ask| Ask {
            both: ticket != 0 || self.is_fresh_at(ask.route, claim.cookie),
            ..ask
        });
        self.announcements
            .expect(conn, Wanted::Match { claim, ticket });
        self.have_looked_at(conn.tenant, Errand::Conn(conn), socket, searched, ask);
    }

    /// Was the other end just looked at? Then nothing else is asked before both are given their stream.
    fn is_fresh_at(&self, route: Route, cookie: u64) -> bool {
        let waits = self.streams.opposite_to(route, cookie);
        waits.is_some_and(|waits| self.announcements.fresh.contains(&waits.conn))
    }

    /// A process asks whether a socket that it inherited is a stream.
    pub(super) fn on_lookup(&mut self, id: TenantId, lookup: Lookup) -> Result<(), End> {
        let conn = Conn {
            tenant: id,
            number: lookup.conn,
            generation: lookup.generation,
        };
        let Some((stream, end)) = self.streams.by_cookie(lookup.cookie) else {
            return self.not_found(conn);
        };
        let ask = self.ask_for_end(stream, end);
        self.announcements.expect(conn, Wanted::Lookup);
        let socket = (lookup.fd, lookup.cookie);
        self.have_looked_at(id, Errand::Conn(conn), socket, false, ask);
        Ok(())
    }

    /// A process holds an end by inheritance.
    pub(super) fn on_holds(&mut self, conn: Conn, request: &Request) {
        let (stream, end) = (request.stream_id, request.active as usize);
        let place = self.streams.get(stream).and_then(|s| s.ends.get(end));
        let Some(cookie) = place.map(|end| end.cookie) else {
            self.journal.counters.unverified += 1;
            return;
        };
        let ask = self.ask_for_end(stream, end);
        self.announcements
            .expect(conn, Wanted::Hold { stream, end });
        let socket = (request.fd, cookie);
        self.have_looked_at(conn.tenant, Errand::Conn(conn), socket, false, ask);
    }

    /// Where to ask for the socket of an end.
    fn ask_for_end(&self, stream: u64, end: usize) -> Option<Ask> {
        let end = self.streams.get(stream)?.ends.get(end)?;
        self.rights.ask_for(end.route)
    }

    /// Has a porter look whether a tenant holds a socket, as the descriptor and with the cookie given; `searched` for
    /// other holders, too; and at what the kernel says of its addresses.
    pub(super) fn have_looked_at(
        &mut self,
        tenant: TenantId,
        errand: Errand,
        (fd, cookie): (i32, u64),
        searched: bool,
        ask: Option<Ask>,
    ) {
        let Some(entry) = self.connections.tenant_mut(tenant) else {
            return;
        };
        entry.looks += 1;
        let passport = entry.passport.clone();
        let uid = passport.peer.uid;
        // Who asks as the owner of a port has to be that: the other node's program is told it.
        let bound = match &errand {
            Errand::Reach(question) => addresses(question).map(|(address, to)| Place {
                address,
                to: to.ip(),
                netns_cookie: question.netns,
            }),
            _ => None,
        };
        let listens = matches!(errand, Errand::Listener(..));
        let question = Look {
            passport,
            fd,
            cookie,
            search: searched.then(|| self.rights.searches_of(uid)),
            bound,
            listens: listens.then(|| self.rights.namespaces.home_cookie()),
            ask,
        };
        let owner = Owner {
            uid,
            connection: tenant,
        };
        let load = move |carrier: &Carrier| {
            Some(Found::Socket {
                tenant,
                errand,
                held: look(carrier, &question),
            })
        };
        // A search takes long.
        match searched {
            true => self.porters.ask(owner, load),
            false => self.porters.ask_quick(owner, load),
        }
    }

    /// A porter has looked at a socket.
    pub(super) fn on_look(&mut self, id: TenantId, errand: Errand, held: Result<Held, NotHeld>) {
        if let Some(tenant) = self.connections.tenant_mut(id) {
            tenant.looks = tenant.looks.saturating_sub(1);
        }
        self.serve(id, |daemon| {
            let held = match held {
                // Who is not who it was gets nothing, and is no tenant any more.
                Err(NotHeld::Changed(changed)) if changed != Changed::Hidden => {
                    daemon.journal.counters.changed += 1;
                    return Err(changed.into());
                }
                held => held,
            };
            match errand {
                Errand::Conn(conn) => daemon.on_conn_looked_at(conn, held)?,
                Errand::Listener(fd, cookie, said) => {
                    daemon.on_listener(id, (fd, cookie), said, held);
                }
                Errand::Reach(question) => daemon.reach(id, question, held),
                Errand::Whois(question) => daemon.tell_who(id, question, held)?,
            }
            daemon.unthrottle(id);
            Ok(())
        });
    }

    fn on_conn_looked_at(&mut self, conn: Conn, held: Result<Held, NotHeld>) -> Result<(), End> {
        match (self.announcements.take(conn), held) {
            (None, _) => Ok(()),
            (Some(Wanted::Match { claim, ticket }), Ok(held)) => {
                if let Some(located) = held.located {
                    return self.find(&claim, ticket, held, located);
                }
                if self.is_in_known_netns(conn.tenant, claim.netns_cookie) {
                    return self.look_there(claim, ticket);
                }
                self.announcements
                    .expect(conn, Wanted::Match { claim, ticket });
                self.have_process_followed(conn);
                Ok(())
            }
            (Some(Wanted::Match { .. }), Err(NotHeld::Silent(error))) => {
                let uid = self.connections.get(conn.tenant).map(|one| one.peer.uid);
                let what = "the kernel does not tell of sockets (sock_diag)";
                self.journal
                    .fault(what, uid.unwrap_or(NOBODY), &error.into());
                self.not_verified(conn, Reason::Unverified)
            }
            (Some(Wanted::Match { claim, .. }), Err(error)) => {
                debug!(?conn, fd = claim.fd, "not verified: {error}");
                let reason = match error {
                    NotHeld::Unseen => Reason::Unseen,
                    _ => Reason::Unverified,
                };
                self.not_verified(conn, reason)
            }
            // Of an earlier look.
            (Some(pair @ Wanted::Pair(..)), _) => {
                self.announcements.expect(conn, pair);
                Ok(())
            }
            (Some(Wanted::Lookup), held) => self.inherit_looked_up(conn, held.ok()),
            (Some(Wanted::Hold { stream, end }), held) => {
                if !held.is_ok_and(|held| self.inherit(conn, held, stream, end, Rights::may_hold)) {
                    self.journal.counters.unverified += 1;
                }
                Ok(())
            }
        }
    }

    pub(super) fn turn_down(&mut self, conn: Conn, reason: Reason) -> Result<(), End> {
        self.journal.counters.turned_down += 1;
        debug!(?conn, "turned down: {}", reason.text());
        self.send(conn.tenant, Self::verdict(conn, reason))
    }

    fn not_verified(&mut self, conn: Conn, reason: Reason) -> Result<(), End> {
        self.journal.counters.unverified += 1;
        self.send(conn.tenant, Self::verdict(conn, reason))
    }

    /// Has a socket that was announced looked at once more: its network namespace was not known before.
    fn look_there(&mut self, claim: Box<Claim>, ticket: u64) -> Result<(), End> {
        match self.ask_for(&claim) {
            Some(ask) => {
                self.have_announced_looked_at(claim, ticket, Some(ask));
                Ok(())
            }
            None => self.not_verified(claim.conn, Reason::OtherNamespace),
        }
    }

    /// A tenant holds the socket that it has announced. Is it the connection that it says it is, and where is the
    /// other end?
    fn find(
        &mut self,
        claim: &Claim,
        ticket: u64,
        held: Held,
        located: Located,
    ) -> Result<(), End> {
        let conn = claim.conn;
        let Some(tenant) = self.connections.tenant(conn.tenant) else {
            return Ok(());
        };
        let passport = tenant.passport.clone();
        let Some(announced) = Rights::announced(claim, held, located, &passport) else {
            debug!(?conn, fd = claim.fd, "not verified: it has other addresses");
            return self.not_verified(conn, Reason::Unverified);
        };
        if ticket != 0 && !self.rights.may_be_anchored(announced.route) {
            return self.not_verified(conn, Reason::OtherNamespace);
        }
        if ticket != 0 {
            if self.is_early(&announced, ticket, claim) {
                let claim = Box::new(claim.clone());
                self.announcements
                    .expect(conn, Wanted::Match { claim, ticket });
                return Ok(());
            }
            return self.on_carried_announced(announced, ticket, held);
        }
        if held.shared {
            return self.turn_down(conn, Reason::Shared);
        }
        self.announcements.fresh.push(conn);
        let pairing = Pairing {
            since: announced.seen,
            looks: 0,
        };
        self.find_other_end(announced, pairing)
    }

    /// Is it not known yet whose the connection is that a tenant says is a stream to another node? Its announcement waits for that.
    fn is_early(&mut self, announced: &Announced, ticket: u64, claim: &Claim) -> bool {
        let early = Early {
            conn: announced.conn,
            socket: (claim.fd, claim.cookie),
            searched: claim.maybe_shared,
        };
        let names = (announced.route.local, announced.route.peer);
        let fabric = self.fabric.as_mut();
        if let Some(call) = fabric.and_then(|fabric| fabric.call_between(ticket, names)) {
            // Of two that say so, the latest: another one asks again.
            let before = call.early.replace(early);
            self.turn_down_early(before.filter(|before| before.conn != early.conn));
            return true;
        }
        self.take_all_anchors();
        let Some(Anchor::Promised { uid, .. }) = self.anchor_of(ticket) else {
            return false;
        };
        let waits = Rights::may_have_promised(announced.uid, uid)
            && self.have_anchor_looked_at(ticket, Some(early));
        if let Some(tenant) = self
            .connections
            .tenant_mut(early.conn.tenant)
            .filter(|_| waits)
        {
            // As a look at its socket, it is waited for.
            tenant.looks += 1;
        }
        waits
    }

    /// It is known by now whether an anchor is that of a stream which a tenant has announced.
    pub(super) fn settle_early(&mut self, ticket: u64, early: Early) {
        let id = early.conn.tenant;
        if let Some(tenant) = self.connections.tenant_mut(id) {
            tenant.looks = tenant.looks.saturating_sub(1);
        }
        match self.anchor_of(ticket) {
            Some(Anchor::Attached { .. }) => self.look_at_early(Some(early)),
            _ => self.turn_down_early(Some(early)),
        }
        self.unthrottle(id);
    }

    fn turn_down_early(&mut self, early: Option<Early>) {
        let Some(Early { conn, .. }) = early else {
            return;
        };
        if self.announcements.take(conn).is_some() {
            self.serve(conn.tenant, |daemon| {
                daemon.turn_down(conn, Reason::Unverified)
            });
        }
    }

    /// Is the network namespace known that a tenant says its socket is in?
    fn is_in_known_netns(&self, id: TenantId, cookie: u64) -> bool {
        let own = self.connections.tenant(id).map(|tenant| tenant.netns);
        let is_known = |own| self.rights.namespaces.locate(cookie, own).is_some();
        own.is_none_or(|own| own.is_some_and(is_known))
    }

    /// Has a porter look which network namespace a tenant's process is in by now: it may have moved since it attached.
    fn have_process_followed(&mut self, conn: Conn) {
        let Some(tenant) = self.connections.tenant_mut(conn.tenant) else {
            return;
        };
        // As a look at its socket, it is waited for.
        tenant.looks += 1;
        let (peer, known) = (tenant.passport.peer.clone(), tenant.netns);
        let (uid, connection) = (peer.uid, conn.tenant);
        self.have_namespace_opened(Owner { uid, connection }, peer.pid, known, Some(conn));
    }

    /// A tenant's process is in this network namespace.
    fn move_to_netns(&mut self, id: TenantId, now: u64) {
        let before = self.connections.tenant(id).and_then(|tenant| tenant.netns);
        if before == Some(now) || self.enter_netns(id, now).is_none() {
            return;
        }
        if let Some(tenant) = self.connections.tenant_mut(id) {
            tenant.netns = Some(now);
        }
        if let Some(before) = before {
            self.leave_netns(id, before);
        }
    }

    /// The network namespace that an announcement has waited for is open, or can't be (`None`).
    pub(super) fn on_followed(&mut self, conn: Conn, netns: Option<u64>) {
        let id = conn.tenant;
        if let Some(tenant) = self.connections.tenant_mut(id) {
            tenant.looks = tenant.looks.saturating_sub(1);
        }
        self.serve(id, |daemon| {
            if let Some(netns) = netns {
                daemon.move_to_netns(id, netns);
            }
            if let Some(Wanted::Match { claim, ticket }) = daemon.announcements.take(conn) {
                daemon.look_there(claim, ticket)?;
            }
            daemon.unthrottle(id);
            Ok(())
        });
    }

    /// Has two ends looked at that find each other, and the process of one of them: it may run another program by now. False where
    /// its tenant has gone.
    fn have_pair_looked_at(
        &mut self,
        announced: Announced,
        pairing: Pairing,
        doubt: Doubt,
    ) -> bool {
        let Doubt {
            end,
            other,
            is_unheard,
        } = doubt;
        let whose = end.conn;
        let (conn, own) = (announced.conn, announced.socket());
        let Some(mut ask) = self.rights.ask_for(announced.route) else {
            return false;
        };
        ask.both = true;
        let Some(tenant) = self.connections.tenant_mut(whose.tenant) else {
            return false;
        };
        // On the account of that end: the other one has no say in how long it takes.
        tenant.looks += 1;
        let passport = tenant.passport.clone();
        let owner = Owner {
            uid: passport.peer.uid,
            connection: whose.tenant,
        };
        let pairing = Pairing {
            looks: pairing.looks.saturating_add(1),
            ..pairing
        };
        let pair = Wanted::Pair(Box::new(announced), pairing);
        self.announcements.expect(conn, pair);
        self.porters.ask_quick(owner, move |carrier| {
            Some(Found::Pair {
                conn,
                whose,
                other,
                heard: is_unheard.then(|| Rights::heard(&end, &passport)).flatten(),
                meeting: passport
                    .check_program()
                    .map(|()| ask.meet(carrier, own, other)),
            })
        });
        true
    }

    /// Two ends were looked at that find each other, and the process of one of them.
    pub(super) fn on_pair(
        &mut self,
        conn: Conn,
        whose: Conn,
        other: Socket,
        meeting: Result<Meeting, Changed>,
        heard: Option<Instant>,
    ) {
        let now = Instant::now();
        if let Some(tenant) = self.connections.tenant_mut(whose.tenant) {
            tenant.looks = tenant.looks.saturating_sub(1);
        }
        let pair = self.announcements.take_pair(conn);
        // Of the one that has waited nothing is known where the other one has gone.
        let gone = match conn == whose {
            true => Meeting::None,
            false => Meeting::One,
        };
        self.serve(whose.tenant, |daemon| {
            match meeting {
                Ok(meeting) if meeting != gone => daemon.streams.note_seen(whose, now, heard),
                Ok(_) | Err(Changed::Hidden) => {
                    daemon.give_up(whose);
                    daemon.not_verified(whose, Reason::Unverified)?;
                }
                Err(changed) => {
                    daemon.journal.counters.changed += 1;
                    return Err(changed.into());
                }
            }
            daemon.unthrottle(whose.tenant);
            Ok(())
        });
        let Some((mut announced, pairing)) = pair else {
            return;
        };
        if conn == whose {
            announced.seen = now;
            announced.note_heard(heard);
        }
        if let Ok(meeting) = meeting {
            announced.other_end = (meeting == Meeting::Both).then_some(other);
        }
        self.serve(conn.tenant, |daemon| match meeting {
            // It was told so above.
            Ok(Meeting::None) | Err(_) if conn == whose => Ok(()),
            Ok(Meeting::None) => daemon.not_verified(conn, Reason::Unverified),
            _ => daemon.find_other_end(announced, pairing),
        });
    }

    /// What has to be looked at of two ends of a connection before they are given their stream: the
    /// one that has waited, where it was last seen before the other one was found to hold its socket; whether they meet; and who was
    /// seen long ago.
    fn in_doubt(&self, announced: &Announced, pairing: Pairing) -> Option<Doubt> {
        let waits = self.streams.opposite(announced)?;
        let is_unheard = !Rights::have_heard(&waits, announced);
        let doubt = |end: &Announced| Doubt {
            end: *end,
            other: waits.socket(),
            is_unheard,
        };
        let has_looks = pairing.looks < LOOKS;
        let is_old = |end: &Announced| has_looks && end.seen.elapsed() > SEEN_LATELY;
        let is_fresh = self.announcements.fresh.contains(&waits.conn);
        let is_due = !is_fresh && (waits.seen < pairing.since || is_old(&waits));
        let was_met = announced.other_end == Some(waits.socket());
        if is_due || (has_looks && (!was_met || is_unheard)) {
            return Some(doubt(&waits));
        }
        is_old(announced).then(|| doubt(announced))
    }

    fn find_other_end(&mut self, announced: Announced, pairing: Pairing) -> Result<(), End> {
        let conn = announced.conn;
        loop {
            if let Some(doubt) = self.in_doubt(&announced, pairing)
                && self.have_pair_looked_at(announced, pairing, doubt)
            {
                return Ok(());
            }
            let pay = || self.accounts.charge(announced.uid, &[(Thing::Waiting, 1)]);
            let other = match self.streams.announce(announced, pay) {
                Announcement::Waits => return Ok(()),
                Announcement::Refused(reason) => return self.turn_down(conn, reason),
                Announcement::Over(over) => {
                    self.log_over(over, announced.uid, announced.pid);
                    return self.turn_down(conn, Reason::Limit);
                }
                Announcement::Matches(other) => other,
            };
            // It may have been closed, and its addresses used again by somebody else, since it
            // was announced.
            if !self.still_there(&announced, &other)? {
                self.journal.counters.unverified += 1;
                self.tell(other.conn, conn, Reason::Unverified)?;
                continue;
            }
            return match self.make(announced, other) {
                Ok(()) => self.hand_out(announced, other),
                Err(reason) => {
                    self.journal.counters.turned_down += 2;
                    debug!(?conn, other = ?other.conn, "turned down: {}", reason.text());
                    self.tell(other.conn, conn, reason)?;
                    self.send(conn.tenant, Self::verdict(conn, reason))
                }
            };
        }
    }

    /// May the tenant that announced the other end be given it now? One that is not who it was is detached.
    fn still_there(&mut self, served: &Announced, other: &Announced) -> Result<bool, End> {
        let id = other.conn.tenant;
        let Some(tenant) = self.connections.tenant(id) else {
            return Ok(false);
        };
        match Rights::still_holds(other, served, &tenant.passport) {
            Ok(holds) => Ok(holds),
            Err(Changed::Hidden) => Ok(false),
            Err(changed) => {
                self.journal.counters.changed += 1;
                if id == served.conn.tenant {
                    return Err(changed.into());
                }
                self.serve(id, |_| Err(changed.into()));
                Ok(false)
            }
        }
    }

    /// Sends a verdict to another connection than the one being served, maybe of the same tenant.
    fn tell(&mut self, whom: Conn, served: Conn, reason: Reason) -> Result<(), End> {
        let verdict = Self::verdict(whom, reason);
        if whom.tenant == served.tenant {
            return self.send(whom.tenant, verdict);
        }
        self.send_to_other(whom.tenant, verdict);
        Ok(())
    }

    fn inherit_looked_up(&mut self, conn: Conn, held: Option<Held>) -> Result<(), End> {
        let found = held.and_then(|held| Some((held, self.streams.by_cookie(held.cookie)?)));
        if let Some((held, (stream, end))) = found
            && self.inherit(conn, held, stream, end, Rights::may_inherit)
        {
            self.note_mapped(stream);
            self.journal.counters.inherited += 1;
            if let Some(message) = self.promotion(conn) {
                return self.send(conn.tenant, message);
            }
        }
        self.not_found(conn)
    }

    fn not_found(&mut self, conn: Conn) -> Result<(), End> {
        let answer = NotFound {
            conn: conn.number,
            generation: conn.generation,
        };
        self.send(conn.tenant, Message::new(kind::NOT_FOUND, &answer).into())
    }

    /// A tenant holds the socket of an end, by inheritance: it holds the end, too, if it may.
    fn inherit(
        &mut self,
        conn: Conn,
        held: Held,
        stream: u64,
        end: usize,
        may: fn(Held, &Passport, &book::End) -> bool,
    ) -> bool {
        let place = self.streams.get(stream).and_then(|s| s.ends.get(end));
        let tenant = self.connections.tenant(conn.tenant);
        let (Some(place), Some(tenant)) = (place, tenant) else {
            return false;
        };
        let (uid, pid) = (tenant.passport.peer.uid, tenant.passport.peer.pid);
        if !may(held, &tenant.passport, place) {
            return false;
        }
        let taken = self.take_seat(conn, stream, end);
        if let Err(over) = taken {
            self.log_over(over, uid, pid);
        }
        taken.is_ok()
    }
}
