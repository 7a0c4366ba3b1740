//! Questions of the command-line tool that are being answered: a piece at a time, so that neither a long answer nor an
//! asker who does not read costs more than that piece.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use rdsock_shm::control::{Query, bytes_of, head, kind};
use serde::Serialize;

use crate::accounts::Charge;
use crate::book::TenantId;
use crate::channel::Foreign;
use crate::channel::Outgoing;
use crate::memory::{DirectionView, Numbered, Records};

/// Bytes of one datagram: it must fit a socket's buffer.
const PIECE: usize = 60_000;

/// What comes next in an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What stands before the lists.
    Start,
    /// The next tenants.
    Tenants,
    /// The connections of a tenant, from this place in its memory on.
    Connections(TenantId, u64),
    /// The next streams, from this number on.
    Streams(u64),
    /// What stands behind the lists.
    End,
}

/// A question that is being answered.
#[derive(Debug)]
pub struct Answering {
    /// What was asked.
    pub query: Query,
    /// Who asks.
    pub uid: u32,
    /// What comes next.
    pub part: Part,
    /// Tenants that are still to come.
    pub tenants: VecDeque<TenantId>,
    /// Streams of the next part.
    pub streams: Vec<u64>,
    /// What was read for the next part.
    pub fetched: Option<Fetched>,
    /// That is being read.
    pub fetching: bool,
    /// The list that is being written has an element already.
    pub follows: bool,
    /// On the account of who asks.
    pub _charge: Charge,
}

/// What was read of memory that others write.
#[derive(Debug, Default)]
pub struct Fetched {
    /// Connection records, and where to go on.
    pub records: (Vec<Numbered>, Option<u64>),
    /// Both directions of streams, once they were read.
    pub directions: Option<HashMap<u64, [DirectionView; 2]>>,
}

/// What is to be read next. Who has a page mapped very often can have each read of it wait: whoever reads is replaced then.
#[derive(Debug)]
pub enum Wanted {
    /// Connection records from this place on.
    Records(Records, u64),
    /// Both directions of these streams.
    Directions(Vec<(u64, Arc<Foreign>)>),
}

impl Wanted {
    /// Reads it, beside what was read before.
    pub fn read(self, mut before: Fetched) -> Fetched {
        match self {
            Wanted::Records(records, from) => {
                before.records = records.read(from).unwrap_or_default();
            }
            Wanted::Directions(streams) => {
                let read = |(id, file): (u64, Arc<Foreign>)| {
                    Some((id, DirectionView::read_both(&*file).ok()?))
                };
                before.directions = Some(streams.into_iter().filter_map(read).collect());
            }
        }
        before
    }
}

impl Answering {
    /// Opens a list.
    pub fn open(&mut self, text: &mut String, name: &str) {
        text.push_str(&format!("\"{name}\":["));
        self.follows = false;
    }

    /// Writes the next element of a list.
    pub fn element(&mut self, text: &mut String, element: &impl Serialize) {
        self.separate(text);
        // What it is made of can be written.
        text.push_str(&serde_json::to_string(element).unwrap_or_default());
    }

    /// Writes what stands before the next element of a list.
    pub fn separate(&mut self, text: &mut String) {
        if std::mem::replace(&mut self.follows, true) {
            text.push(',');
        }
    }
}

/// A member of an object.
pub fn member(text: &mut String, name: &str, value: &impl Serialize) {
    let value = serde_json::to_string(value).unwrap_or_default();
    text.push_str(&format!("\"{name}\":{value},"));
}

/// A part of an answer as datagrams; an empty one ends the answer.
pub fn datagrams(text: &str, last: bool) -> Vec<Outgoing> {
    let pieces = text.as_bytes().chunks(PIECE);
    let end: &[&[u8]] = if last { &[&[]] } else { &[] };
    let pieces = pieces.chain(end.iter().copied());
    let datagram = |piece: &[u8]| Outgoing {
        bytes: [bytes_of(&head(kind::ANSWER)), piece].concat(),
        fds: Vec::new(),
    };
    pieces.map(datagram).collect()
}
