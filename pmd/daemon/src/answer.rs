//! Answers to the command-line tool: who is attached, what is on rings, and what was counted.
//!
//! JSON text, in pieces of one datagram each; an empty piece ends it. A user sees the processes
//! of that user; root and the daemon's own user see all.

use std::collections::HashMap;

use nix::unistd::geteuid;
use rdsock_shm::control::{Query, bytes_of, head, kind, question, refusal};
use rdsock_shm::layout::Counter;
use serde::Serialize;
use serde_json::{Value, json};

use crate::book::{Conn, Route, TenantId};
use crate::channel::Outgoing;
use crate::connections::{Connection, End};
use crate::counters::Counters;
use crate::daemon::Daemon;
use crate::memory::{ConnView, DirectionView};
use crate::tenants::Tenant;

/// Bytes of one piece: a datagram must fit a socket's buffer.
const PIECE: usize = 60_000;

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

/// A tenant.
#[derive(Debug, Serialize)]
struct TenantAnswer {
    pid: i32,
    uid: u32,
    program: String,
    connections: Vec<ConnAnswer>,
}

impl Daemon {
    /// A question of the command-line tool.
    pub(crate) fn on_query(&mut self, id: TenantId, query: Query) -> Result<(), End> {
        let Some(asker) = self.connections.get(&id) else {
            return Ok(());
        };
        let uid = asker.peer.uid;
        let sees_all = uid == 0 || uid == geteuid().as_raw();
        let sees = |other: &Connection| {
            (sees_all || other.peer.uid == uid)
                && (query.pid == 0 || other.peer.pid == query.pid as i32)
        };
        let answer = match query.what {
            question::WHY => self.why(sees),
            question::STAT => self.stat(sees, sees_all, uid),
            _ => {
                return Err(End::Refused {
                    code: refusal::MALFORMED,
                    expected: question::STAT,
                    cause: "it asked an unknown question",
                });
            }
        };
        let text = answer.to_string();
        for piece in text.as_bytes().chunks(PIECE).chain([&[][..]]) {
            let bytes = [bytes_of(&head(kind::ANSWER)), piece].concat();
            let fds = Vec::new();
            self.send(id, Outgoing { bytes, fds })?;
        }
        Ok(())
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

    /// The tenants that the asker may see.
    fn seen<'a>(
        &'a self,
        sees: impl Fn(&Connection) -> bool + 'a,
    ) -> impl Iterator<Item = (TenantId, &'a Connection, &'a Tenant)> {
        self.connections
            .iter()
            .filter(move |(_, connection)| sees(connection))
            .filter_map(|(id, connection)| Some((*id, connection, connection.tenant.as_ref()?)))
    }

    fn why(&self, sees: impl Fn(&Connection) -> bool) -> Value {
        let tenants: Vec<TenantAnswer> = self
            .seen(sees)
            .map(|(id, connection, tenant)| TenantAnswer {
                pid: connection.peer.pid,
                uid: connection.peer.uid,
                program: tenant.program.clone(),
                connections: tenant
                    .map
                    .conns()
                    .unwrap_or_default()
                    .into_iter()
                    .map(|(number, record)| self.conn_answer(id, number, record))
                    .collect(),
            })
            .collect();
        json!({
            "daemon": self.daemon_answer(),
            "tenants": tenants,
            "nodes": self.nodes_answer(),
        })
    }

    fn conn_answer(&self, tenant: TenantId, number: u32, record: ConnView) -> ConnAnswer {
        let conn = Conn {
            tenant,
            number,
            generation: record.generation,
        };
        let (route, seat) = self.book.look(conn).unzip();
        let seat = seat.flatten();
        let stream = seat.and_then(|(id, _)| self.book.stream(id));
        let end = seat.map(|(_, end)| end);
        let peer_pids = match (stream, end) {
            (Some(stream), Some(end)) => stream
                .ends
                .get(1 - end)
                .into_iter()
                .flat_map(|other| &other.holders)
                .filter_map(|holder| Some(self.connections.get(&holder.conn.tenant)?.peer.pid))
                .collect(),
            _ => Vec::new(),
        };
        let mut directions = stream.and_then(|stream| stream.memory.directions().ok());
        if end == Some(1)
            && let Some(directions) = &mut directions
        {
            directions.swap(0, 1);
        }
        let elsewhere = match stream {
            Some(stream) => (stream.memory.elsewhere.as_ref())
                .map(|elsewhere| (elsewhere.node, elsewhere.local(), elsewhere.peer())),
            None => route.and_then(|route| self.way_of_anchor(record.stream_id, route)),
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

    fn stat(&self, sees: impl Fn(&Connection) -> bool, sees_all: bool, uid: u32) -> Value {
        let mut numbers = HashMap::new();
        let tenants: Vec<Value> = self
            .seen(sees)
            .map(|(id, connection, tenant)| {
                numbers.insert(id, connection.peer.pid);
                let counters = tenant.map.counters();
                let counter = |which: Counter| counters.get(which as usize).copied().unwrap_or(0);
                json!({
                    "tenant": id,
                    "pid": connection.peer.pid,
                    "uid": connection.peer.uid,
                    "program": tenant.program,
                    "promoted": counter(Counter::Promoted),
                    "demoted": counter(Counter::Demoted),
                    "reset": counter(Counter::Reset),
                    "wakes": counter(Counter::Wakes),
                    "sleeps": counter(Counter::Sleeps),
                    "bells": counter(Counter::Bells),
                    "queue_full": counter(Counter::QueueFull),
                    "unread_messages": connection.channel.queued(),
                })
            })
            .collect();
        let streams: Vec<Value> = self
            .book
            .streams()
            .filter_map(|(id, stream)| {
                let pids = stream.ends.each_ref().map(|end| {
                    let pid = |tenant| numbers.get(tenant).copied();
                    let tenants = end.holders.iter().map(|holder| &holder.conn.tenant);
                    tenants.filter_map(pid).collect::<Vec<i32>>()
                });
                let seen = sees_all || pids.iter().any(|pids| !pids.is_empty());
                seen.then(|| {
                    let [connector, _] = &stream.ends;
                    let elsewhere = stream.memory.elsewhere.as_ref();
                    let Route { local, peer, .. } = connector.route;
                    let (local, peer) = elsewhere.map_or((local, peer), |elsewhere| {
                        (elsewhere.source, elsewhere.destination)
                    });
                    json!({
                        "stream": id,
                        "local": local.to_string(),
                        "peer": peer.to_string(),
                        "node": elsewhere.map(|elsewhere| elsewhere.node),
                        "pids": pids,
                        "uid": stream.payer,
                        "bytes": stream.bytes,
                        "huge": stream.memory.huge,
                        "directions": stream.memory.directions().ok(),
                    })
                })
            })
            .collect();
        let users: Vec<Value> = self
            .book
            .accounts()
            .filter(|(user, _)| sees_all || *user == uid)
            .map(|(user, account)| {
                json!({ "uid": user, "streams": account.streams, "bytes": account.bytes })
            })
            .collect();
        let counters: Counters = self.counters;
        json!({
            "daemon": self.daemon_answer(),
            "counters": counters,
            "tenants_now": self.tenants(),
            "streams_now": self.book.streams().count(),
            "waiting_now": self.book.waiting(),
            "tenants": tenants,
            "streams": streams,
            "users": users,
            "fabric": self.fabric_answer(),
        })
    }
}
