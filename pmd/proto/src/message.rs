//! The messages between nodes: one mailbox message each, 48 bytes, little-endian.
//!
//! `docs/protocol.md` draws the formats byte by byte. [`Message::decode`] checks every field that
//! can be checked without knowing a stream; a message that does not pass has no effect but to be
//! counted. Nothing here keeps state.

mod fields;

use crate::id::{Place, StreamId};
use fields::{Reader, Writer};
use std::net::Ipv6Addr;

/// Bytes of a message. The device's mailbox carries at least as many.
pub const SIZE: usize = 48;

/// A message as it travels.
pub type Bytes = [u8; SIZE];

/// Version of the protocol, the first byte of each message.
pub const VERSION: u8 = 1;

/// Values of the second byte of a message.
pub mod kind {
    /// Greets a node: epoch, tag, limits.
    pub const HELLO: u8 = 1;
    /// First half of a connect: the asking node's ring and the ports.
    pub const OFFER: u8 = 2;
    /// Second half of a connect: the addresses.
    pub const CONNECT: u8 = 3;
    /// The connect was accepted.
    pub const ACCEPT: u8 = 4;
    /// The connect was refused.
    pub const REFUSE: u8 = 5;
    /// Bytes up to a position are visible (a notification).
    pub const DATA: u8 = 6;
    /// The consumer has read up to a position.
    pub const CREDIT: u8 = 7;
    /// The direction ends at a position.
    pub const SHUT: u8 = 8;
    /// The sender has left the stream: no write and no message of it follows.
    pub const CLOSE: u8 = 9;
    /// The sender has broken the stream: no write and no message of it follows.
    pub const RESET: u8 = 10;
    /// The sender knows this stream from before the session was lost.
    pub const RESUME: u8 = 11;
    /// All RESUMEs were sent.
    pub const RESUMED: u8 = 12;
    /// Keep-alive.
    pub const ALIVE: u8 = 13;
}

/// Why a message was not understood. Consequence: it has no effect, and is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Not [`SIZE`] bytes.
    Length,
    /// Not [`VERSION`].
    Version,
    /// No [`kind`].
    Kind,
    /// A field has an impossible value.
    Field,
    /// A byte that must be 0 is not.
    Reserved,
}

macro_rules! codes {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $code:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u16)]
        pub enum $name { $($(#[$vdoc])* $variant = $code,)* }

        impl $name {
            /// All values, for tables and tests.
            pub const ALL: &'static [$name] = &[$($name::$variant,)*];

            fn from_code(code: u16) -> Result<Self, Malformed> {
                match code { $($code => Ok(Self::$variant),)* _ => Err(Malformed::Field) }
            }
        }
    };
}

codes! {
    /// Why a connect did not become a stream. The program's connection stays on kernel TCP.
    Refusal {
        /// No preloaded program listens there.
        NoListener = 1;
        /// A limit of the asked node is reached.
        Limit = 2;
        /// The asked node's policy forbids it.
        Policy = 3;
        /// No answer in time. Never sent.
        Timeout = 4;
        /// The session was lost before the answer came. Never sent.
        Lost = 5;
    }
}

codes! {
    /// Why a stream was broken.
    Cause {
        /// The program asked for it (`SO_LINGER` 0), died, or closed with unread bytes.
        Program = 1;
        /// Bytes came for a program that had closed.
        Unread = 2;
        /// The asking node had given the connect up before it was accepted.
        GivenUp = 3;
        /// The node that receives this broke a rule.
        Violation = 4;
        /// The engine refused a write into the memory of the node that receives this.
        Access = 5;
    }
}

/// A message: the session it belongs to, and what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The receiver's tag, as learned from its HELLO. 0 only in a HELLO, when not known yet.
    pub session: u32,
    /// What it says.
    pub body: Body,
}

/// What a message says. `to` is the receiver's id of a stream, `from` the sender's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// Greets.
    Hello {
        /// The sender's epoch, not 0: another one means that it has lost all its streams.
        epoch: u64,
        /// The sender's tag, not 0: what it wants to see as `session` from now on.
        tag: u32,
        /// Connects that the sender lets stand unanswered at a time.
        pending: u32,
    },
    /// First half of a connect.
    Offer {
        /// The asking node's id of the stream to be.
        from: StreamId,
        /// Where the asking node lets its bytes be written.
        place: Place,
        /// The connecting program's port.
        source_port: u16,
        /// The port it connects to.
        destination_port: u16,
    },
    /// Second half of a connect, behind the OFFER of the same stream.
    Connect {
        /// As in the OFFER.
        from: StreamId,
        /// The connecting program's address; IPv4 as a v4-mapped address.
        source: Ipv6Addr,
        /// The address it connects to, likewise.
        destination: Ipv6Addr,
    },
    /// The answer to a connect: accepted.
    Accept {
        /// The asking node's id.
        to: StreamId,
        /// The accepting node's id.
        from: StreamId,
        /// Where the accepting node lets its bytes be written.
        place: Place,
    },
    /// The answer to a connect: refused.
    Refuse {
        /// The asking node's id.
        to: StreamId,
        /// Why.
        refusal: Refusal,
    },
    /// Bytes are visible.
    Data {
        /// The stream.
        to: StreamId,
        /// Position after the last of them.
        head: u64,
    },
    /// The consumer has read.
    Credit {
        /// The stream.
        to: StreamId,
        /// Position after the last byte that was read.
        consumed: u64,
        /// Position after the last byte that the consumer has seen.
        seen: u64,
        /// Whether it wants to be notified of bytes from `seen` on.
        notify: bool,
    },
    /// The sender's direction ends.
    Shut {
        /// The stream.
        to: StreamId,
        /// Position after its last byte. All bytes before it are visible.
        end: u64,
    },
    /// The sender has left the stream.
    Close {
        /// The stream.
        to: StreamId,
        /// As in SHUT.
        end: u64,
        /// Position after the last byte that the sender's program has read.
        consumed: u64,
    },
    /// The sender has broken the stream.
    Reset {
        /// The stream.
        to: StreamId,
        /// Why.
        cause: Cause,
    },
    /// The sender knows the stream.
    Resume {
        /// The stream.
        to: StreamId,
        /// The sender's id of it.
        from: StreamId,
        /// The sender's head word: all bytes before this position are visible to it.
        arrived: u64,
        /// As in CREDIT.
        consumed: u64,
        /// As in CREDIT, from `arrived` on.
        notify: bool,
    },
    /// All streams that the sender knows have been named.
    Resumed,
    /// Keep-alive.
    Alive,
}

impl Message {
    /// The message as bytes.
    pub fn encode(&self) -> Bytes {
        let mut to = Writer::new();
        let (kind, code) = self.body.write(&mut to);
        let mut bytes = to.bytes;
        bytes[0] = VERSION;
        bytes[1] = kind;
        bytes[2..4].copy_from_slice(&code.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.session.to_le_bytes());
        bytes
    }

    /// Understands a message.
    ///
    /// # Errors
    /// [`Malformed`]: the message must have no effect.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let bytes: &Bytes = bytes.try_into().map_err(|_| Malformed::Length)?;
        let mut from = Reader { bytes, at: 0 };
        let [version, kind] = from.take();
        if version != VERSION {
            return Err(Malformed::Version);
        }
        let code = u16::from_le_bytes(from.take());
        let session = from.u32();
        let body = Body::read(kind, code, &mut from)?;
        let greets = matches!(body, Body::Hello { .. });
        if session == 0 && !greets {
            return Err(Malformed::Field);
        }
        if from.rest().iter().any(|byte| *byte != 0) {
            return Err(Malformed::Reserved);
        }
        Ok(Message { session, body })
    }
}

impl Body {
    /// Writes the fields behind the head; returns the kind and the head's code.
    fn write(&self, out: &mut Writer) -> (u8, u16) {
        match *self {
            Body::Hello {
                epoch,
                tag,
                pending,
            } => {
                out.u64(epoch).u32(tag).u32(pending);
                (kind::HELLO, 0)
            }
            Body::Offer {
                from,
                place,
                source_port,
                destination_port,
            } => {
                out.id(from).place(&place);
                out.put(&source_port.to_le_bytes())
                    .put(&destination_port.to_le_bytes());
                (kind::OFFER, place.log2.into())
            }
            Body::Connect {
                from,
                source,
                destination,
            } => {
                out.id(from)
                    .put(&source.octets())
                    .put(&destination.octets());
                (kind::CONNECT, 0)
            }
            Body::Accept { to, from, place } => {
                out.id(to).place(&place).id(from);
                (kind::ACCEPT, place.log2.into())
            }
            Body::Refuse { to, refusal } => {
                out.id(to);
                (kind::REFUSE, refusal as u16)
            }
            Body::Data { to, head } => {
                out.id(to).u64(head);
                (kind::DATA, 0)
            }
            Body::Credit {
                to,
                consumed,
                seen,
                notify,
            } => {
                out.id(to).u64(consumed).u64(seen);
                (kind::CREDIT, notify.into())
            }
            Body::Shut { to, end } => {
                out.id(to).u64(end);
                (kind::SHUT, 0)
            }
            Body::Close { to, end, consumed } => {
                out.id(to).u64(end).u64(consumed);
                (kind::CLOSE, 0)
            }
            Body::Reset { to, cause } => {
                out.id(to);
                (kind::RESET, cause as u16)
            }
            Body::Resume {
                to,
                from,
                arrived,
                consumed,
                notify,
            } => {
                out.id(to).id(from).u64(arrived).u64(consumed);
                (kind::RESUME, notify.into())
            }
            Body::Resumed => (kind::RESUMED, 0),
            Body::Alive => (kind::ALIVE, 0),
        }
    }

    fn read(kind: u8, code: u16, from: &mut Reader) -> Result<Self, Malformed> {
        let coded = [
            kind::OFFER,
            kind::ACCEPT,
            kind::REFUSE,
            kind::CREDIT,
            kind::RESET,
            kind::RESUME,
        ];
        if (kind::HELLO..=kind::ALIVE).contains(&kind) && !coded.contains(&kind) && code != 0 {
            return Err(Malformed::Reserved);
        }
        Ok(match kind {
            kind::HELLO => Body::Hello {
                epoch: nonzero(from.u64())?,
                tag: nonzero(from.u32())?,
                pending: from.u32(),
            },
            kind::OFFER => Body::Offer {
                from: from.id()?,
                place: from.place(code)?,
                source_port: u16::from_le_bytes(from.take()),
                destination_port: u16::from_le_bytes(from.take()),
            },
            kind::CONNECT => Body::Connect {
                from: from.id()?,
                source: Ipv6Addr::from(from.take::<16>()),
                destination: Ipv6Addr::from(from.take::<16>()),
            },
            kind::ACCEPT => Body::Accept {
                to: from.id()?,
                place: from.place(code)?,
                from: from.id()?,
            },
            kind::REFUSE => Body::Refuse {
                to: from.id()?,
                refusal: Refusal::from_code(code)?,
            },
            kind::DATA => Body::Data {
                to: from.id()?,
                head: from.u64(),
            },
            kind::CREDIT => Body::Credit {
                to: from.id()?,
                consumed: from.u64(),
                seen: from.u64(),
                notify: flag(code)?,
            },
            kind::SHUT => Body::Shut {
                to: from.id()?,
                end: from.u64(),
            },
            kind::CLOSE => Body::Close {
                to: from.id()?,
                end: from.u64(),
                consumed: from.u64(),
            },
            kind::RESET => Body::Reset {
                to: from.id()?,
                cause: Cause::from_code(code)?,
            },
            kind::RESUME => Body::Resume {
                to: from.id()?,
                from: from.id()?,
                arrived: from.u64(),
                consumed: from.u64(),
                notify: flag(code)?,
            },
            kind::RESUMED => Body::Resumed,
            kind::ALIVE => Body::Alive,
            _ => return Err(Malformed::Kind),
        })
    }
}

fn nonzero<T: Default + PartialEq>(value: T) -> Result<T, Malformed> {
    if value == T::default() {
        Err(Malformed::Field)
    } else {
        Ok(value)
    }
}

fn flag(code: u16) -> Result<bool, Malformed> {
    match code {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Malformed::Field),
    }
}
