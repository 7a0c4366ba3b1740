//! Work descriptors (`docs/device.md`, 5.2): what a caller asks for, and its encoding.

use crate::error::NotPosted;
use crate::rde::Capabilities;
use crate::spec::{Key, MAX_SLOTS, PAYLOAD, SLOT_WORDS, feature, work};
use rdsock_vfio::Piece;

/// Words of the longest descriptor.
const WORDS: usize = MAX_SLOTS * SLOT_WORDS;
const HEADER_WORDS: usize = 4;

/// A place in another node's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// The region.
    pub key: Key,
    /// Offset inside the region.
    pub offset: u64,
}

/// Where the data of a write are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data<'a> {
    /// In DMA memory, which must stay as it is until completion.
    Pieces(&'a [Piece]),
    /// Here; they are copied into the descriptor.
    Inline(&'a [u8]),
}

/// A message that follows the data of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notify<'a> {
    /// Queue set at the target.
    pub set: u16,
    /// At most 48 bytes; short ones make short descriptors (steps of 16).
    pub payload: &'a [u8],
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    /// Write to remote memory.
    Write {
        /// Where to.
        to: Remote,
        /// What.
        data: Data<'a>,
        /// Offset inside the region (a multiple of 8) and value of a word to store after the data.
        word: Option<(u64, u64)>,
        /// A message to send after both.
        notify: Option<Notify<'a>>,
    },
    /// A message alone, in order with the writes to the same target.
    Message(Notify<'a>),
    /// Read remote memory.
    Read {
        /// Where from.
        from: Remote,
        /// Where to.
        into: &'a [Piece],
    },
    /// Nothing; complete when everything before it to the same target has.
    Flush,
    /// End the failed state of the lanes to the target (7.3).
    Resume,
}

/// An operation on a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work<'a> {
    /// Node id.
    pub target: u16,
    /// What.
    pub operation: Operation<'a>,
    /// Given back in the completion.
    pub tag: u64,
    /// Whether to report success; a failure is always reported. A report covers everything before
    /// it to the same target.
    pub report: bool,
}

/// A descriptor but for its cookie.
#[derive(Debug)]
pub(crate) struct Encoded {
    words: [u64; WORDS],
    slots: usize,
    pub opcode: u8,
    pub length: u32,
}

impl Encoded {
    /// The words of the slots, with a cookie, and whether the device shall write a completion.
    pub fn finish(&mut self, cookie: u32, complete: bool) -> &[u64] {
        self.words[0] |= u64::from(complete) << (8 + work::COMPLETE);
        self.words[3] |= u64::from(cookie) << 32;
        &self.words[..self.slots * SLOT_WORDS]
    }

    /// Slots of the work queue that it needs.
    pub fn slots(&self) -> usize {
        self.slots
    }
}

impl Work<'_> {
    pub(crate) fn encode(&self, caps: &Capabilities) -> Result<Encoded, NotPosted> {
        if self.target == 0 || self.target > caps.max_node {
            return Err(NotPosted::Invalid("no such node id"));
        }
        let mut writer = Writer::default();
        let (opcode, remote) = match self.operation {
            Operation::Flush => (work::FLUSH, None),
            Operation::Resume => (work::RESUME, None),
            Operation::Message(notify) => {
                writer.notify(notify)?;
                (work::WRITE_NOTIFY, None)
            }
            Operation::Read { from, into } => {
                caps.need(feature::READ, "READ")?;
                writer.pieces(into, caps)?;
                (work::READ, Some(from))
            }
            Operation::Write {
                to,
                data,
                word,
                notify,
            } => {
                if let Some((offset, value)) = word {
                    caps.need(feature::STORE_WORD, "STORE_WORD")?;
                    writer.word(offset, value)?;
                }
                if let Some(notify) = notify {
                    writer.notify(notify)?;
                }
                match data {
                    Data::Pieces(pieces) => writer.pieces(pieces, caps)?,
                    Data::Inline(bytes) => writer.inline(bytes, caps)?,
                }
                let opcode = match notify {
                    Some(_) => work::WRITE_NOTIFY,
                    None => work::WRITE,
                };
                (opcode, Some(to))
            }
        };
        writer.finish(opcode, self.target, remote)
    }
}

/// Puts the parts of a descriptor behind its header.
struct Writer {
    words: [u64; WORDS],
    at: usize,
    /// Bytes in the last words that are data inside the descriptor.
    length: u64,
    flags: u8,
    pieces: u8,
    units: u8,
    inline: u8,
    set: u16,
}

impl Default for Writer {
    fn default() -> Self {
        Writer {
            words: [0; WORDS],
            at: HEADER_WORDS,
            length: 0,
            flags: 0,
            pieces: 0,
            units: 0,
            inline: 0,
            set: 0,
        }
    }
}

impl Writer {
    fn put(&mut self, word: u64) -> Result<(), NotPosted> {
        let place = self.words.get_mut(self.at);
        *place.ok_or(NotPosted::Invalid("descriptor too long"))? = word;
        self.at += 1;
        Ok(())
    }

    /// Puts bytes, and zeroes up to a multiple of `unit` bytes.
    fn put_bytes(&mut self, bytes: &[u8], unit: usize) -> Result<(), NotPosted> {
        let end = self.at + bytes.len().next_multiple_of(unit) / 8;
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.put(u64::from_le_bytes(word))?;
        }
        while self.at < end {
            self.put(0)?;
        }
        Ok(())
    }

    fn word(&mut self, offset: u64, value: u64) -> Result<(), NotPosted> {
        if !offset.is_multiple_of(8) {
            return Err(NotPosted::Invalid("the word's offset is no multiple of 8"));
        }
        self.flags |= 1 << work::STORE_WORD;
        self.put(offset)?;
        self.put(value)
    }

    fn notify(&mut self, notify: Notify<'_>) -> Result<(), NotPosted> {
        if notify.payload.len() > PAYLOAD {
            return Err(NotPosted::Invalid("a message has at most 48 bytes"));
        }
        self.set = notify.set;
        self.units = notify.payload.len().div_ceil(16) as u8;
        self.put_bytes(notify.payload, 16)
    }

    fn pieces(&mut self, pieces: &[Piece], caps: &Capabilities) -> Result<(), NotPosted> {
        if pieces.len() > usize::from(caps.max_pieces) {
            return Err(NotPosted::Invalid("too many pieces"));
        }
        for piece in pieces {
            if piece.is_empty() {
                return Err(NotPosted::Invalid("an empty piece"));
            }
            self.put(piece.iova())?;
            self.put(piece.len().into())?;
            self.length += u64::from(piece.len());
        }
        if self.length > caps.max_transfer.into() {
            return Err(NotPosted::Invalid("more bytes than one transfer moves"));
        }
        self.pieces = pieces.len() as u8;
        Ok(())
    }

    fn inline(&mut self, bytes: &[u8], caps: &Capabilities) -> Result<(), NotPosted> {
        caps.need(feature::INLINE, "INLINE")?;
        if bytes.len() > usize::from(caps.max_inline) {
            return Err(NotPosted::Invalid("too many inline bytes"));
        }
        self.flags |= 1 << work::INLINE;
        self.inline = bytes.len() as u8;
        self.length = bytes.len() as u64;
        self.put_bytes(bytes, 8)
    }

    fn finish(mut self, opcode: u8, target: u16, to: Option<Remote>) -> Result<Encoded, NotPosted> {
        let slots = self.at.div_ceil(SLOT_WORDS);
        let to = to.unwrap_or(Remote {
            key: Key(0),
            offset: 0,
        });
        let byte = |value: u8, at: u8| u64::from(value) << (8 * at);
        self.words[0] = byte(opcode, work::OPCODE)
            | byte(self.flags, work::FLAGS)
            | u64::from(target) << (8 * work::TARGET)
            | byte(slots as u8, work::SLOTS)
            | byte(self.pieces, work::PIECES)
            | byte(self.units, work::NOTIFY_UNITS)
            | byte(self.inline, work::INLINE_BYTES);
        self.words[1] = u64::from(to.key.0) | self.length << 32;
        self.words[2] = to.offset;
        self.words[3] = self.set.into();
        Ok(Encoded {
            words: self.words,
            slots,
            opcode,
            length: self.length as u32,
        })
    }
}
