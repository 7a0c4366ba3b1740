//! Messages between a shim (or the command-line tool) and the daemon.
//!
//! The control socket is `SOCK_SEQPACKET`: one datagram is one message, fds travel beside it
//! (`SCM_RIGHTS`). Requests that need no fd go through the tenant's queue ([`crate::queue`])
//! instead, without a system call while the daemon is awake.
//! Every message starts with a [`Head`]; the parser checks magic, version, kind and exact length.

use crate::layout::VERSION;

/// First word of each message.
pub const MAGIC: u32 = u32::from_le_bytes(*b"rdsk");

/// Behind the path of the socket for everybody, this names a directory of sockets, each called by the number of the one user who
/// may connect to it. A caller tries its own one first: nobody else crowds that.
pub const OF_USERS: &str = ".users";

/// Where the socket of the machine's daemon lies.
pub const MACHINE_SOCKET: &str = "/run/rdsock/rdsockd.sock";

/// The number of each user who has none in a user namespace, as the kernel tells it there. It says nothing of who that is.
pub const NAMELESS: u32 = 65534;

/// Whether a program of a user believes a daemon of another one, which is in charge of the memory that its bytes go through: its own
/// user's or root's, and nobody else's, wherever the socket lies. In a user namespace root may have no number: then the place of the
/// [machine's socket](MACHINE_SOCKET) says who it is, since root alone can serve there. It does not where root has one: a program may
/// have changed its root directory to one of somebody else's.
pub const fn may_serve(daemon: u32, user: u32, at_machines: bool) -> bool {
    match daemon {
        0 => true,
        NAMELESS => at_machines,
        _ => daemon == user,
    }
}

/// As whom a program believes a daemon, by its real, effective and saved user. One that only acts as a user, for a while, may be more
/// than that user: it believes root alone.
pub const fn believer([real, effective, saved]: [u32; 3]) -> u32 {
    if real == effective && effective == saved {
        effective
    } else {
        0
    }
}

/// The IPv4 address that the daemon connects from, to a program that listens on this host, on behalf
/// of a program on another node: by it a tenant knows of which accepted connections to ask (WHOIS).
pub const FABRIC_SOURCE_V4: [u8; 4] = [127, 82, 68, 83];

/// The same for IPv6, of which there is one loopback address only: the traffic class of what the daemon sends there, which a socket that is
/// accepted keeps. Anybody may use it: who does is asked about as well.
pub const FABRIC_CLASS_V6: u8 = 0b1010_1100;

/// Kinds of message. The direction is in the name's comment: T tenant, D daemon, C tool.
pub mod kind {
    /// T→D, fd: the bell board, where it has one from an earlier daemon. Body: [`super::Hello`].
    pub const HELLO: u16 = 1;
    /// D→T, fds: the tenant's memory, and a bell board where HELLO brought none. Body: [`super::Welcome`].
    pub const WELCOME: u16 = 2;
    /// D→any: refused, the connection is closed behind it. Body: [`super::Refused`].
    pub const REFUSED: u16 = 3;
    /// T→D: look at your queue. No body.
    pub const KICK: u16 = 4;
    /// D→T, fds: stream memory, end page, and the peer's bell board where this tenant may ring it: where the peer is of the
    /// same user, on this host. Body: [`super::Promote`].
    pub const PROMOTE: u16 = 5;
    /// T→D: is this inherited socket a stream? Body: [`super::Lookup`].
    pub const LOOKUP: u16 = 6;
    /// D→T: answer to LOOKUP: no. Body: [`super::NotFound`].
    pub const NOT_FOUND: u16 = 7;
    /// T→D, fd: one end of a SEQPACKET socket pair, with `SO_PASSCRED` set: a forked child with streams, or a process that has changed
    /// its user and may no longer reach the socket's path, asks for a control connection of its own. No body.
    pub const ADOPT: u16 = 8;
    /// D→T: why an announced connection stays on the kernel for now. Body: [`super::Verdict`].
    pub const VERDICT: u16 = 9;
    /// C→D: a question. Body: [`super::Query`].
    pub const QUERY: u16 = 10;
    /// D→C: a piece of the answer, JSON text behind the head; the last piece is empty.
    pub const ANSWER: u16 = 11;
    /// T→D: may this connect go to another node over the fabric? Body: [`super::Between`].
    pub const REACH: u16 = 12;
    /// D→T: answer to REACH. Body: [`super::Reached`].
    pub const REACHED: u16 = 13;
    /// T→D: for whom did the daemon open this accepted connection? Body: [`super::Between`].
    pub const WHOIS: u16 = 14;
    /// D→T: answer to WHOIS. Body: [`super::Caller`].
    pub const CALLER: u16 = 15;
    /// T→D: this program has mapped the memory of WELCOME. Body: [`super::Attached`].
    pub const ATTACHED: u16 = 16;
}

/// Start of each message.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// [`MAGIC`].
    pub magic: u32,
    /// [`VERSION`], lower half.
    pub version: u16,
    /// One of [`kind`].
    pub kind: u16,
}

/// Plain old data: any bytes are a value, and every byte of a value is initialised.
///
/// # Safety
/// `repr(C)`, made of integers only, without padding.
pub unsafe trait Pod: Copy {}

macro_rules! pod {
    ($(#[$doc:meta])* $name:ident, $size:literal { $($(#[$fdoc:meta])* $field:ident : $ty:ty,)* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name { $($(#[$fdoc])* pub $field: $ty,)* }
        const _: () = assert!(std::mem::size_of::<$name>() == $size && $size == 0 $(+ std::mem::size_of::<$ty>())*);
        // SAFETY: `repr(C)`, integers only; the assertion above shows that there is no padding.
        unsafe impl Pod for $name {}
    };
}

// SAFETY: `repr(C)`, integers only, 4 + 2 + 2 bytes without padding.
unsafe impl Pod for Head {}

pod! {
    /// A tenant introduces itself. Who it is, the daemon asks the kernel (`SO_PEERCRED`).
    Hello, 16 {
        /// Bytes of the tenant memory.
        memory_size: u64,
        /// Bytes of a bell board.
        bell_size: u64,
    }
}
pod! {
    /// The daemon accepts a tenant.
    Welcome, 16 {
        /// The daemon's number of the tenant.
        tenant: u64,
        /// Microseconds within which the daemon answers a REACH, whatever the other node does; 0 when
        /// it has no other nodes.
        answer_us: u32,
        /// 1 where the daemon takes some programs and others not: what a process runs next may be refused. Else 0.
        judges: u32,
    }
}
pod! {
    /// A tenant has mapped its memory. That it has, the daemon asks the kernel.
    Attached, 8 {
        /// Where its mapping starts.
        address: u64,
    }
}
pod! {
    /// The daemon refuses.
    Refused, 8 {
        /// Why, one of [`refusal`].
        code: u32,
        /// What the daemon expected, where a number says it (a version, a size, a limit).
        expected: u32,
    }
}
pod! {
    /// A stream for an announced connection, or the answer to a LOOKUP.
    Promote, 88 {
        /// The tenant's connection record.
        conn: u32,
        /// Its generation; a tenant ignores a stale one.
        generation: u32,
        /// The daemon's number of the stream.
        stream_id: u64,
        /// Bytes of each ring, a power of two.
        ring_size: u64,
        /// Offset of ring 0 in the stream's memory.
        data_offset: u64,
        /// 0 or 1: which end the tenant is.
        end: u32,
        /// 1 when the memory is of huge pages.
        huge: u32,
        /// What the program is told of its own address where the other end is on another node;
        /// IPv4 as a v4-mapped IPv6 address. 0 where the anchor's own addresses are true.
        local: [u8; 16],
        /// Likewise, the peer's address.
        peer: [u8; 16],
        /// Port of `local`, host order; 0 where the anchor's own addresses are true.
        local_port: u32,
        /// Port of `peer`, likewise.
        peer_port: u32,
        /// The other node's id; 0 when the other end is on this host.
        node: u32,
        /// 0.
        reserved: u32,
    }
}
pod! {
    /// A connection, as a tenant sees it: the question of REACH and of WHOIS. The tenant waits for
    /// the answer, which comes within milliseconds.
    Between, 64 {
        /// A number that the answer repeats; a tenant ignores answers to older questions.
        question: u64,
        /// `SO_NETNS_COOKIE` of the socket.
        netns: u64,
        /// Local address; IPv4 as a v4-mapped IPv6 address; 0 in a REACH when it is not bound to
        /// one.
        local: [u8; 16],
        /// Peer address, likewise: in REACH where the program wants to go.
        peer: [u8; 16],
        /// Local port, host order.
        local_port: u32,
        /// Peer port, host order.
        peer_port: u32,
        /// The tenant's fd: in a REACH, the daemon attaches nothing but the socket that it finds there.
        fd: i32,
        /// 0.
        reserved: u32,
    }
}
pod! {
    /// Whether a connect goes over the fabric, and how.
    Reached, 56 {
        /// The question's number.
        question: u64,
        /// Names the stream in the announcement that follows ([`Request::stream_id`]); 0 when the
        /// connect is to be the kernel's.
        ticket: u64,
        /// Where to connect the anchor: the daemon listens there.
        anchor: [u8; 16],
        /// What the program is told of its own address.
        local: [u8; 16],
        /// Port of `anchor`, host order.
        anchor_port: u32,
        /// With ticket 0: why, a [`crate::reason::Reason`].
        reason: u32,
    }
}
pod! {
    /// Whose connection with the daemon this is: for whom it opened it, or where it goes.
    Caller, 56 {
        /// The question's number.
        question: u64,
        /// Names the stream in the announcement that follows ([`Request::stream_id`]); 0 when the
        /// connection is not the daemon's, and the addresses are true.
        ticket: u64,
        /// The program's own true address.
        local: [u8; 16],
        /// The peer's true address.
        peer: [u8; 16],
        /// Port of `local`, host order.
        local_port: u32,
        /// Port of `peer`, host order.
        peer_port: u32,
    }
}
pod! {
    /// Is this inherited socket an end of a stream?
    Lookup, 24 {
        /// The tenant's connection record.
        conn: u32,
        /// Its generation.
        generation: u32,
        /// The socket's cookie (`SO_COOKIE`).
        cookie: u64,
        /// The tenant's fd.
        fd: i32,
        /// 0.
        reserved: u32,
    }
}
pod! {
    /// No stream that this tenant may have belongs to the socket of a LOOKUP.
    NotFound, 8 {
        /// The tenant's connection record.
        conn: u32,
        /// Its generation; a tenant ignores a stale one.
        generation: u32,
    }
}
pod! {
    /// Why a connection is not promoted for now.
    Verdict, 16 {
        /// The tenant's connection record.
        conn: u32,
        /// Its generation.
        generation: u32,
        /// A [`crate::reason::Reason`].
        reason: u32,
        /// 0.
        reserved: u32,
    }
}
pod! {
    /// A question of the command-line tool.
    Query, 8 {
        /// One of [`question`].
        what: u32,
        /// A process, or 0 for all.
        pid: u32,
    }
}

/// Codes of [`Refused`].
pub mod refusal {
    /// Another version of shim and daemon.
    pub const VERSION: u32 = 1;
    /// The message is not one the daemon knows, or has a wrong length.
    pub const MALFORMED: u32 = 2;
    /// The bell board is no sealed memfd, or of a wrong size; a size in HELLO is not the daemon's.
    pub const MEMORY: u32 = 3;
    /// The policy excludes this user.
    pub const POLICY: u32 = 4;
    /// A limit is reached: `max_tenants`, or the share of the user.
    pub const LIMIT: u32 = 5;
    /// The process is not who it was when it attached: it runs another program, or has other rights. It may attach anew.
    pub const IDENTITY: u32 = 6;
}

/// Questions of [`Query`].
pub mod question {
    /// Each TCP connection of each tenant, and why.
    pub const WHY: u32 = 1;
    /// Counters.
    pub const STAT: u32 = 2;
}

pod! {
    /// What a tenant asks through its queue. One size for all; unused fields are 0.
    Request, 120 {
        /// One of [`request`].
        what: u32,
        /// The tenant's connection record.
        conn: u32,
        /// Its generation.
        generation: u32,
        /// The tenant's fd.
        fd: i32,
        /// `SO_COOKIE` of the socket.
        cookie: u64,
        /// `SO_NETNS_COOKIE` of the socket.
        netns: u64,
        /// The stream, for [`request::CLOSED`] and the like. ANNOUNCE: the ticket of a stream to
        /// another node, else 0.
        stream_id: u64,
        /// Local address; IPv4 as a v4-mapped IPv6 address.
        local: [u8; 16],
        /// Peer address, likewise.
        peer: [u8; 16],
        /// Local port, host order.
        local_port: u32,
        /// Peer port, host order.
        peer_port: u32,
        /// 1 when this end called `connect`, 0 when it came from `accept`, 2 when unknown
        /// (inherited over `exec`): then the other end must know. In HOLDS: which end.
        active: u32,
        /// ANNOUNCE: 1 when other processes may hold the socket too (it lived through a fork or
        /// exec); the daemon promotes only when it finds a single holder. LEFT: a reason.
        extra: u32,
        /// 0.
        reserved: [u64; 4],
    }
}

/// Values of [`Request::what`].
pub mod request {
    /// The tenant holds this connection and would take a stream for it. May be sent again with a
    /// new generation, which replaces the old announcement.
    pub const ANNOUNCE: u32 = 1;
    /// The tenant no longer holds this connection (closed, or no stream wanted any more).
    pub const CLOSED: u32 = 2;
    /// The stream of the connection was left for the kernel or broken.
    pub const LEFT: u32 = 3;
    /// A PROMOTE could not be followed (no memory, stale): the tenant gives up its end.
    pub const DECLINED: u32 = 4;
    /// A process holds a stream by inheritance (fork or exec): `stream_id`, `active` its end.
    pub const HOLDS: u32 = 5;
    /// A PROMOTE was followed: the end is mapped and installed.
    pub const MAPPED: u32 = 6;
    /// This process listens on a TCP socket: `fd`, `cookie`, `netns`, `local`, `local_port`; `conn`
    /// and `generation` are 0. Connects from other nodes may be given to it.
    pub const LISTENS: u32 = 7;
}

/// The bytes of a value.
pub fn bytes_of<T: Pod>(value: &T) -> &[u8] {
    // SAFETY: a Pod has no padding, so all its bytes are initialised; the borrow keeps it alive.
    unsafe { std::slice::from_raw_parts((value as *const T).cast(), std::mem::size_of::<T>()) }
}

/// A value from bytes of exactly its size.
pub fn from_bytes<T: Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() != std::mem::size_of::<T>() {
        return None;
    }
    // SAFETY: the length was checked, any bytes are a value of a Pod, and the read is unaligned.
    Some(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
}

/// The head of a message of this version.
pub fn head(kind: u16) -> Head {
    Head {
        magic: MAGIC,
        version: VERSION as u16,
        kind,
    }
}

/// Why a datagram is not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseError {
    /// Shorter than a head, or another magic. Consequence: refused as malformed.
    NotAMessage,
    /// Another version. Consequence: refused, told the version expected.
    Version(u16),
}

/// Splits a datagram into its kind and body.
pub fn parse(datagram: &[u8]) -> Result<(u16, &[u8]), ParseError> {
    const HEAD: usize = std::mem::size_of::<Head>();
    if datagram.len() < HEAD {
        return Err(ParseError::NotAMessage);
    }
    let (head, body) = datagram.split_at(HEAD);
    let Some(head) = from_bytes::<Head>(head) else {
        return Err(ParseError::NotAMessage);
    };
    if head.magic != MAGIC {
        return Err(ParseError::NotAMessage);
    }
    if u32::from(head.version) != VERSION {
        return Err(ParseError::Version(head.version));
    }
    Ok((head.kind, body))
}

/// A message in a fixed buffer, to be sent as one datagram.
#[derive(Clone, Copy, Debug)]
pub struct Message {
    bytes: [u8; 128],
    len: usize,
}

impl Message {
    /// A message without a body.
    pub fn empty(kind: u16) -> Self {
        let mut message = Message {
            bytes: [0; 128],
            len: 0,
        };
        message.push(bytes_of(&head(kind)));
        message
    }

    /// A message with a body.
    pub fn new<T: Pod>(kind: u16, body: &T) -> Self {
        let mut message = Self::empty(kind);
        message.push(bytes_of(body));
        message
    }

    fn push(&mut self, bytes: &[u8]) {
        let end = self.len + bytes.len();
        if let Some(place) = self.bytes.get_mut(self.len..end) {
            place.copy_from_slice(bytes);
            self.len = end;
        }
    }

    /// The datagram.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn messages_round_trip() {
        let promote = Promote {
            conn: 7,
            generation: 3,
            stream_id: 9,
            ring_size: 4096,
            data_offset: 4096,
            end: 1,
            huge: 0,
            local: [0; 16],
            peer: [0; 16],
            local_port: 0,
            peer_port: 0,
            node: 0,
            reserved: 0,
        };
        let message = Message::new(kind::PROMOTE, &promote);
        let (kind, body) = parse(message.as_bytes()).unwrap();
        assert_eq!(kind, super::kind::PROMOTE);
        assert_eq!(from_bytes::<Promote>(body), Some(promote));
        assert_eq!(from_bytes::<Promote>(&body[1..]), None);
    }

    #[test]
    fn garbage_is_told_apart_from_another_version() {
        assert_eq!(parse(b""), Err(ParseError::NotAMessage));
        assert_eq!(parse(b"GET / HTTP/1.1"), Err(ParseError::NotAMessage));
        let mut message = Message::empty(kind::KICK).as_bytes().to_vec();
        message[4] = 99;
        assert_eq!(parse(&message), Err(ParseError::Version(99)));
    }
}
