//! Answers to the command-line tool: who is attached, what is on rings, and what was counted.
//!
//! JSON text, in pieces of one datagram each; an empty piece ends it. A user sees the processes
//! of that user; root and the daemon's own user see all.

use std::collections::HashMap;

use rdsock_shm::control::{Query, question, refusal};
use rdsock_shm::layout::Counter;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Daemon, End};
use crate::accounts::{Statement, Thing};
use crate::book::{Conn, Route, TenantId};
use crate::connections::{Connection, Inbox, Tenant};
use crate::counters::Counters;
use crate::diag;
use crate::found::Found;
use crate::memory::{ConnView, DirectionView};
use crate::porters::{IN_PLACE_OF_USERS, Owner, READERS};
use crate::queries::{Answering, Fetched, Part, Wanted, datagrams, member};
use crate::rights::Rights;

/// Elements of a list in one piece.
const ELEMENTS: usize = 64;
/// Holders of one end that are looked at and named, the oldest ones. A server may have forked very often.
const LISTED: usize = 64;

/// What a tenant says of a connection, and what the daemon knows of it.
#[derive(Debug, Serialize)]
struct ConnAnswer {
    fd: i32,
    state: u32,
    reason: u32,
    /// 0 when there is none, or one of an earlier daemon's.
    stream: u64,
    /// The stream that the tenant names, known to this daemon or not.
    named_stream: u64,
    local: Option<String>,
    peer: Option<String>,
    end: Option<usize>,
    /// The node of the other end; `None` when it is on this host.
    node: Option<u16>,
    /// Processes that hold the other end.
    peer_pids: Vec<i32>,
    /// Sent by this end, then received by it.
    directions: Option<[DirectionView; 2]>,
}

impl Daemon {
    /// A question of the command-line tool. The connection is not read before it is answered.
    pub(super) fn on_query(&mut self, id: TenantId, query: Query) -> Result<(), End> {
        if !matches!(query.what, question::WHY | question::STAT) {
            return Err(End::Refused {
                code: refusal::MALFORMED,
                expected: question::STAT,
                cause: "it asked an unknown question",
            });
        }
        let Some(uid) = self.connections.get(id).map(|asker| asker.peer.uid) else {
            return Ok(());
        };
        let charge = self.accounts.charge(uid, &[(Thing::Queries, 1)])?;
        let answering = Answering {
            query,
            uid,
            part: Part::Start,
            tenants: self
                .connections
                .attached()
                .filter(|(_, connection, _)| sees(uid, query.pid, connection))
                .map(|(id, ..)| id)
                .collect(),
            streams: Vec::new(),
            fetched: None,
            fetching: false,
            follows: false,
            _charge: charge,
        };
        if let Some(asker) = self.connections.get_mut(id) {
            asker.inbox = Inbox::Answering(Box::new(answering));
        }
        self.rewatch(id)?;
        self.goes_on(id);
        Ok(())
    }

    /// What was sent of an answer has left: the next part is due in the next turn.
    pub(super) fn go_on_answering(&mut self, id: TenantId) {
        let asker = self.connections.get(id);
        if asker.is_some_and(|asker| matches!(asker.inbox, Inbox::Answering(_))) {
            self.goes_on(id);
        }
    }

    /// Sends the next part of an answer, if it is due.
    pub(super) fn answer(&mut self, id: TenantId) -> Result<(), End> {
        let Some(asker) = self.connections.get_mut(id) else {
            return Ok(());
        };
        if asker.channel.queued() != 0 || !matches!(asker.inbox, Inbox::Answering(_)) {
            return Ok(());
        }
        let Inbox::Answering(mut answering) = std::mem::replace(&mut asker.inbox, Inbox::Open)
        else {
            return Ok(());
        };
        if answering.fetching || self.fetch(id, &mut answering) {
            if let Some(asker) = self.connections.get_mut(id) {
                asker.inbox = Inbox::Answering(answering);
            }
            return Ok(());
        }
        let last = answering.part == Part::End;
        let mut text = String::new();
        match answering.query.what {
            question::WHY => self.why(&mut answering, &mut text),
            _ => self.stat(&mut answering, &mut text),
        }
        let Some(asker) = self.connections.get_mut(id) else {
            return Ok(());
        };
        for datagram in datagrams(&text, last) {
            asker.channel.queue(datagram).map_err(|_| End::CutOff)?;
        }
        if !last {
            asker.inbox = Inbox::Answering(answering);
            return self.flush(id);
        }
        asker.note_answered();
        drop(answering);
        self.rewatch(id)?;
        self.flush(id)?;
        // What it has said meanwhile is told of.
        Ok(())
    }

    /// Has read what the next part of an answer needs. False when it is there.
    fn fetch(&self, asker: TenantId, answering: &mut Answering) -> bool {
        let Some(wanted) = self.wanted(answering) else {
            return false;
        };
        answering.fetching = true;
        let before = answering.fetched.take().unwrap_or_default();
        let owner = Owner {
            uid: READERS,
            connection: asker,
        };
        self.porters.give_quick(owner, move || {
            Some(Found::Fetched {
                asker,
                fetched: wanted.read(before),
            })
        });
        true
    }

    /// What is to be read for the next part of an answer.
    fn wanted(&self, answering: &Answering) -> Option<Wanted> {
        let fetched = answering.fetched.as_ref();
        if fetched.is_some_and(|fetched| fetched.directions.is_some()) {
            return None;
        }
        let file = |id: u64| Some((id, self.streams.get(id)?.memory.file()));
        match (answering.part, fetched) {
            (Part::Connections(id, from), None) => {
                let (_, tenant) = self.seen(answering, id)?;
                Some(Wanted::Records(tenant.map.records(), from))
            }
            (Part::Connections(tenant, _), Some(fetched)) => {
                let stream = |(number, record): &(u32, ConnView)| {
                    let conn = Conn {
                        tenant,
                        number: *number,
                        generation: record.generation,
                    };
                    file(self.streams.seat_of(conn)?.0)
                };
                let streams = fetched.records.0.iter().filter_map(stream);
                Some(Wanted::Directions(streams.collect()))
            }
            (Part::Streams(_), _) => {
                let streams = answering.streams.iter();
                let streams = streams.filter_map(|id| file(*id));
                Some(Wanted::Directions(streams.collect()))
            }
            _ => None,
        }
    }

    /// What the next part of an answer needs was read.
    pub(super) fn on_fetched(&mut self, asker: TenantId, fetched: Fetched) {
        if let Some(connection) = self.connections.get_mut(asker)
            && let Inbox::Answering(answering) = &mut connection.inbox
        {
            answering.fetching = false;
            answering.fetched = Some(fetched);
            self.goes_on(asker);
        }
    }

    fn daemon_answer(&self) -> Value {
        json!({
            "socket": self.endpoint.path(),
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "uptime_seconds": self.started.elapsed().as_secs(),
            "confinement": self.confinement,
        })
    }

    /// A tenant that the asker may see, if it is there still.
    fn seen(&self, answering: &Answering, id: TenantId) -> Option<(&Connection, &Tenant)> {
        let connection = self.connections.get(id)?;
        let seen = sees(answering.uid, answering.query.pid, connection);
        Some((connection, connection.tenant().filter(|_| seen)?))
    }

    /// The next part of the answer to WHY.
    fn why(&self, answering: &mut Answering, text: &mut String) {
        match answering.part {
            Part::Start => {
                text.push('{');
                member(text, "daemon", &self.daemon_answer());
                member(text, "nodes", &self.nodes_answer());
                answering.open(text, "tenants");
                answering.part = Part::Tenants;
            }
            Part::Tenants => {
                let Some(id) = answering.tenants.pop_front() else {
                    answering.part = Part::End;
                    return;
                };
                let Some((connection, tenant)) = self.seen(answering, id) else {
                    return;
                };
                answering.separate(text);
                text.push('{');
                member(text, "pid", &connection.peer.pid);
                member(text, "uid", &connection.peer.uid);
                member(text, "program", &tenant.passport.program.name);
                answering.open(text, "connections");
                answering.part = Part::Connections(id, 0);
            }
            Part::Connections(id, _) => {
                let fetched = answering.fetched.take().unwrap_or_default();
                let (records, next) = fetched.records;
                let directions = fetched.directions.unwrap_or_default();
                for (number, record) in records {
                    let answer = self.conn_answer(id, number, record, &directions);
                    answering.element(text, &answer);
                }
                answering.part = match next {
                    Some(from) => Part::Connections(id, from),
                    None => {
                        text.push_str("]}");
                        answering.follows = true;
                        Part::Tenants
                    }
                };
            }
            Part::Streams(_) | Part::End => text.push_str("]}"),
        }
    }

    fn conn_answer(
        &self,
        tenant: TenantId,
        number: u32,
        record: ConnView,
        directions: &HashMap<u64, [DirectionView; 2]>,
    ) -> ConnAnswer {
        let conn = Conn {
            tenant,
            number,
            generation: record.generation,
        };
        let (route, seat) = self.streams.look(conn).unzip();
        let seat = seat.flatten();
        let stream = seat.and_then(|(id, _)| self.streams.get(id));
        let end = seat.map(|(_, end)| end);
        let peer_pids = match (stream, end) {
            (Some(stream), Some(end)) => stream
                .ends
                .get(1 - end)
                .into_iter()
                .flat_map(|other| other.holders.values().take(LISTED))
                .filter_map(|holder| Some(self.connections.get(holder.conn.tenant)?.peer.pid))
                .collect(),
            _ => Vec::new(),
        };
        let mut directions = seat.and_then(|(id, _)| directions.get(&id).copied());
        if end == Some(1)
            && let Some(directions) = &mut directions
        {
            directions.swap(0, 1);
        }
        let elsewhere = match stream {
            Some(stream) => (stream.memory.elsewhere.as_ref())
                .map(|elsewhere| (elsewhere.node, elsewhere.local(), elsewhere.peer())),
            None => self
                .fabric
                .as_ref()
                .zip(route.filter(|route| self.rights.may_be_anchored(*route)))
                .and_then(|(fabric, route)| fabric.way_of_anchor(record.stream_id, route)),
        };
        let (local, peer) = match elsewhere {
            Some((_, local, peer)) => (Some(local), Some(peer)),
            None => route.map(|route| (route.local, route.peer)).unzip(),
        };
        ConnAnswer {
            fd: record.fd,
            state: record.state,
            reason: record.reason,
            stream: seat.map_or(0, |(id, _)| id),
            named_stream: record.stream_id,
            local: local.map(|address| address.to_string()),
            peer: peer.map(|address| address.to_string()),
            end,
            node: elsewhere.map(|(node, ..)| node),
            peer_pids,
            directions,
        }
    }

    /// The next part of the answer to STAT.
    fn stat(&self, answering: &mut Answering, text: &mut String) {
        match answering.part {
            Part::Start => {
                text.push('{');
                member(text, "daemon", &self.daemon_answer());
                let counters = Counters {
                    asked: diag::asked(),
                    ..self.journal.counters
                };
                member(text, "counters", &counters);
                member(text, "tenants_now", &self.connections.tenants());
                member(text, "streams_now", &self.streams.streams());
                member(text, "streams_in_stock", &self.streams.in_stock());
                member(text, "waiting_now", &self.streams.waiting());
                let looks = self.connections.attached().map(|(.., tenant)| tenant.looks);
                member(text, "looks_now", &looks.sum::<usize>());
                member(text, "limits", &amounts(&self.accounts.limits().user));
                member(text, "limits_of_all", &amounts(&self.accounts.limits().all));
                member(text, "users", &self.users_answer(answering.uid));
                member(text, "fabric", &self.fabric_answer());
                answering.open(text, "tenants");
                answering.part = Part::Tenants;
            }
            Part::Tenants => {
                let count = answering.tenants.len().min(ELEMENTS);
                let ids: Vec<TenantId> = answering.tenants.drain(..count).collect();
                for id in ids {
                    if let Some((connection, tenant)) = self.seen(answering, id) {
                        let answer = tenant_answer(id, connection, tenant);
                        answering.element(text, &answer);
                    }
                }
                if answering.tenants.is_empty() {
                    text.push_str("],");
                    answering.open(text, "streams");
                    self.go_to_streams(answering, 0);
                }
            }
            Part::Streams(next) => {
                let fetched = answering.fetched.take().unwrap_or_default();
                let directions = fetched.directions.unwrap_or_default();
                for id in std::mem::take(&mut answering.streams) {
                    let directions = directions.get(&id).copied();
                    if let Some(answer) = self.stream_answer(answering, id, directions) {
                        answering.element(text, &answer);
                    }
                }
                self.go_to_streams(answering, next);
            }
            Part::Connections(..) | Part::End => text.push_str("]}"),
        }
    }

    /// The next part is of the next streams from this number on, if there are any: their numbers are collected now. However many there
    /// are, that is a part's worth of work.
    fn go_to_streams(&self, answering: &mut Answering, from: u64) {
        answering.streams = self.streams.streams_from(from).take(ELEMENTS).collect();
        answering.part = match answering.streams.last() {
            Some(last) => Part::Streams(last + 1),
            None => Part::End,
        };
    }

    fn stream_answer(
        &self,
        answering: &Answering,
        id: u64,
        directions: Option<[DirectionView; 2]>,
    ) -> Option<Value> {
        let stream = self.streams.get(id)?;
        let pids = stream.ends.each_ref().map(|end| {
            let pid = |tenant| Some(self.seen(answering, tenant)?.0.peer.pid);
            let tenants = end.holders.keys().take(LISTED);
            tenants
                .filter_map(|tenant| pid(*tenant))
                .collect::<Vec<i32>>()
        });
        let seen = Rights::sees_all(answering.uid) || pids.iter().any(|pids| !pids.is_empty());
        if !seen {
            return None;
        }
        let [connector, _] = &stream.ends;
        let elsewhere = stream.memory.elsewhere.as_ref();
        let Route { local, peer, .. } = connector.route;
        let (local, peer) = elsewhere.map_or((local, peer), |elsewhere| {
            (elsewhere.source, elsewhere.destination)
        });
        Some(json!({
            "stream": id,
            "local": local.to_string(),
            "peer": peer.to_string(),
            "node": elsewhere.map(|elsewhere| elsewhere.node),
            "pids": pids,
            "uid": stream.payer,
            "bytes": stream.bytes,
            "huge": stream.memory.huge,
            "directions": directions,
        }))
    }

    /// What users have, and how often a limit was in their way.
    fn users_answer(&self, asker: u32) -> Vec<Value> {
        let statements = self.accounts.statements();
        let is_user = |uid: u32| !IN_PLACE_OF_USERS.contains(&uid);
        let seen = statements.filter(|user| is_user(user.uid) && Rights::may_see(asker, user.uid));
        let answer = |user: Statement| {
            let mut answer = amounts(&user.has);
            answer.insert("uid".into(), user.uid.into());
            answer.insert("refused".into(), amounts(&user.refused).into());
            answer.into()
        };
        seen.map(answer).collect()
    }
}

/// May the asker see this connection's process, and did it ask for that?
fn sees(asker: u32, pid: u32, other: &Connection) -> bool {
    Rights::may_see(asker, other.peer.uid) && (pid == 0 || other.peer.pid == pid as i32)
}

fn amounts(amounts: &crate::accounts::Amounts) -> Map<String, Value> {
    let named = Thing::ALL.iter().zip(amounts);
    named
        .map(|(thing, amount)| (thing.name().to_owned(), Value::from(*amount)))
        .collect()
}

fn tenant_answer(id: TenantId, connection: &Connection, tenant: &Tenant) -> Value {
    let counters = tenant.map.counters();
    let counter = |which: Counter| counters.get(which as usize).copied().unwrap_or(0);
    json!({
        "tenant": id,
        "pid": connection.peer.pid,
        "uid": connection.peer.uid,
        "program": tenant.passport.program.name,
        "promoted": counter(Counter::Promoted),
        "demoted": counter(Counter::Demoted),
        "reset": counter(Counter::Reset),
        "wakes": counter(Counter::Wakes),
        "sleeps": counter(Counter::Sleeps),
        "bells": counter(Counter::Bells),
        "naps": counter(Counter::Naps),
        "queue_full": counter(Counter::QueueFull),
        "unread_messages": connection.channel.queued(),
    })
}
