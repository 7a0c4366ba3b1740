//! The table of messages: each kind with its sender, its descriptors and the fields of its body. What
//! lies in one field at a time, or writes rubbish into all, goes by it. It is checked against
//! `control.rs`: sizes and offsets when it is compiled, names and numbers by [`check_against_source`].

#![allow(dead_code, reason = "each test uses a part")]

use std::mem::offset_of;

use rdsock_shm::control::{
    Attached, Between, Caller, Head, Hello, Lookup, NotFound, Promote, Query, Reached, Refused,
    Request, Verdict, Welcome, kind, request,
};

/// A field of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    pub name: &'static str,
    pub offset: usize,
    pub size: usize,
}

/// Who sends a kind of message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    Tenant,
    Daemon,
    Tool,
}

/// A kind of message.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub name: &'static str,
    pub kind: u16,
    pub sender: Sender,
    /// Descriptors beside it.
    pub fds: usize,
    pub body: &'static [Field],
}

const fn width<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// Where the fields end, when each begins where the one before it ends.
const fn end(fields: &[Field]) -> usize {
    let (mut at, mut number) = (0, 0);
    while number < fields.len() {
        assert!(fields[number].offset == at, "a field is missing");
        at += fields[number].size;
        number += 1;
    }
    at
}

macro_rules! body {
    ($name:ident = $type:ident { $($field:ident)* }) => {
        pub const $name: &[Field] = &[$(Field {
            name: stringify!($field),
            offset: offset_of!($type, $field),
            size: width::<$type, _>(|body| &body.$field),
        },)*];
        const _: () = assert!(end($name) == size_of::<$type>(), "a field is missing");
    };
}

body!(HEAD = Head { magic version kind });
body!(HELLO = Hello { memory_size bell_size });
body!(WELCOME = Welcome { tenant answer_us judges });
body!(ATTACHED = Attached { address });
body!(REFUSED = Refused { code expected });
body!(PROMOTE = Promote {
    conn generation stream_id ring_size data_offset end huge local peer local_port peer_port node reserved
});
body!(BETWEEN = Between { question netns local peer local_port peer_port fd reserved });
body!(REACHED = Reached { question ticket anchor local anchor_port reason });
body!(CALLER = Caller { question ticket local peer local_port peer_port });
body!(LOOKUP = Lookup { conn generation cookie fd reserved });
body!(NOT_FOUND = NotFound { conn generation });
body!(VERDICT = Verdict { conn generation reason reserved });
body!(QUERY = Query { what pid });
body!(REQUEST = Request {
    what conn generation fd cookie netns stream_id local peer local_port peer_port active extra reserved
});
const NONE: &[Field] = &[];

macro_rules! rows {
    ($($name:ident $sender:ident $fds:literal $body:ident)*) => {
        &[$(Row {
            name: stringify!($name),
            kind: kind::$name,
            sender: Sender::$sender,
            fds: $fds,
            body: $body,
        },)*]
    };
}

/// All kinds of message. ANSWER has text behind its head.
pub const MESSAGES: &[Row] = rows! {
    HELLO Tenant 1 HELLO
    WELCOME Daemon 2 WELCOME
    REFUSED Daemon 0 REFUSED
    KICK Tenant 0 NONE
    PROMOTE Daemon 3 PROMOTE
    LOOKUP Tenant 0 LOOKUP
    NOT_FOUND Daemon 0 NOT_FOUND
    ADOPT Tenant 1 NONE
    VERDICT Daemon 0 VERDICT
    QUERY Tool 0 QUERY
    ANSWER Daemon 0 NONE
    REACH Tenant 0 BETWEEN
    REACHED Daemon 0 REACHED
    WHOIS Tenant 0 BETWEEN
    CALLER Daemon 0 CALLER
    ATTACHED Tenant 0 ATTACHED
};

/// What a tenant asks for through its queue.
pub const REQUESTS: &[(&str, u32)] = &[
    ("ANNOUNCE", request::ANNOUNCE),
    ("CLOSED", request::CLOSED),
    ("LEFT", request::LEFT),
    ("DECLINED", request::DECLINED),
    ("HOLDS", request::HOLDS),
    ("MAPPED", request::MAPPED),
    ("LISTENS", request::LISTENS),
];

/// The row of a kind.
pub fn row(kind: u16) -> Option<&'static Row> {
    MESSAGES.iter().find(|row| row.kind == kind)
}

/// Bytes of a body.
pub fn size(body: &[Field]) -> usize {
    end(body)
}

/// Does the table name what `control.rs` names? A new kind of message or request has to come here, too.
pub fn check_against_source() {
    let source = include_str!("../../../shm/src/control.rs");
    let named = |module: &str, width: &str| -> Vec<(String, u32)> {
        let (_, text) = source.split_once(&format!("pub mod {module} {{")).unwrap();
        let (text, _) = text.split_once("\n}").unwrap();
        let constants = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("pub const "));
        constants
            .map(|constant| {
                let (name, value) = constant.split_once(&format!(": {width} = ")).unwrap();
                (
                    name.to_owned(),
                    value.trim_end_matches(';').parse().unwrap(),
                )
            })
            .collect()
    };
    let kinds: Vec<_> = MESSAGES
        .iter()
        .map(|row| (row.name.to_owned(), u32::from(row.kind)))
        .collect();
    assert_eq!(named("kind", "u16"), kinds);
    let requests: Vec<_> = REQUESTS
        .iter()
        .map(|(name, what)| ((*name).to_owned(), *what))
        .collect();
    assert_eq!(named("request", "u32"), requests);
}
