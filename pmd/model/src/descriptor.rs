//! Reading of work descriptors (`docs/device.md`, 5.2): bytes that the driver wrote, checked here
//! once, and used from the copy.

use crate::sheet::{
    FEATURES, MAX_INLINE, MAX_NODE, MAX_PIECES, MAX_SLOTS, MAX_TRANSFER, feature, status, work,
};

/// A slot, as words.
pub(crate) type Slot = [u64; 8];

/// A local piece of memory.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Piece {
    pub iova: u64,
    pub len: u32,
}

/// One item of work.
#[derive(Clone, Debug)]
pub(crate) struct Descriptor {
    pub opcode: u8,
    pub flags: u8,
    pub target: u16,
    pub target_set: u16,
    pub key: u32,
    pub length: u32,
    pub offset: u64,
    pub cookie: u32,
    /// Free-running index of the first slot; of a window message, its sequence.
    pub index: u32,
    /// Offset and value of the word.
    pub word: Option<(u64, u64)>,
    /// Payload of the notification or window message.
    pub payload: [u64; 6],
    pieces: [Piece; MAX_PIECES as usize],
    piece_count: u8,
    inline: [u8; MAX_INLINE as usize],
    /// [`status::OK`], or why it is not to be executed.
    pub verdict: u8,
}

/// The number of slots of the descriptor that starts with `slot`; `None` when it makes no sense.
pub(crate) fn slots(slot: &Slot) -> Option<usize> {
    let slots = byte(slot, work::SLOTS).into();
    (1..=MAX_SLOTS).contains(&slots).then_some(slots)
}

fn byte(slot: &[u64], at: u8) -> u8 {
    slot[at as usize / 8].to_le_bytes()[at as usize % 8]
}

impl Descriptor {
    /// A message of the send window: behaves like a WRITE_NOTIFY of length 0 without completion.
    pub fn message(sequence: u32, target: u16, target_set: u16, payload: [u64; 6]) -> Self {
        Descriptor {
            opcode: 0,
            flags: 0,
            target,
            target_set,
            key: 0,
            length: 0,
            offset: 0,
            cookie: 0,
            index: sequence,
            word: None,
            payload,
            pieces: Default::default(),
            piece_count: 0,
            inline: [0; MAX_INLINE as usize],
            verdict: match u32::from(target) {
                1..=MAX_NODE => status::OK,
                _ => status::BAD_TARGET,
            },
        }
    }

    /// Reads a descriptor from its slots, as many as [`slots`] said.
    pub fn read(slots: &[Slot], index: u32) -> Self {
        let words = slots.as_flattened();
        let [a, b, c, d] = [words[0], words[1], words[2], words[3]];
        let mut read = Descriptor::message(index, (a >> 16) as u16, d as u16, [0; 6]);
        read.opcode = a as u8;
        read.flags = (a >> 8) as u8;
        read.key = b as u32;
        read.length = (b >> 32) as u32;
        read.offset = c;
        read.cookie = (d >> 32) as u32;
        if read.parts(words, slots.len()).is_none() {
            read.verdict = status::BAD_DESCRIPTOR;
        }
        read
    }

    pub fn has(&self, flag: u8) -> bool {
        self.flags & 1 << flag != 0
    }

    /// The lane it belongs to; a target that cannot be is in lane 0.
    pub fn lane(&self) -> u16 {
        if u32::from(self.target) <= MAX_NODE {
            self.target
        } else {
            0
        }
    }

    /// Whether a message follows the data.
    pub fn notifies(&self) -> bool {
        matches!(self.opcode, 0 | work::WRITE_NOTIFY)
    }

    /// The local pieces.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces[..usize::from(self.piece_count)]
    }

    /// The data inside the descriptor.
    pub fn inline(&self) -> &[u8] {
        let len = if self.has(work::INLINE) {
            self.length as usize
        } else {
            0
        };
        &self.inline[..len]
    }

    /// Checks header and parts against each other, and takes the parts.
    fn parts(&mut self, words: &[u64], slots: usize) -> Option<()> {
        let writes = matches!(self.opcode, work::WRITE | work::WRITE_NOTIFY);
        let known = matches!(self.opcode, work::WRITE..=work::RESUME);
        let allowed = if writes {
            (1 << work::COMPLETE) | (1 << work::INLINE) | (1 << work::STORE_WORD)
        } else {
            1 << work::COMPLETE
        };
        let moves = writes || self.opcode == work::READ;
        let units = usize::from(byte(words, work::NOTIFY_UNITS));
        let inline = usize::from(byte(words, work::INLINE_BYTES));
        let pieces = usize::from(byte(words, work::PIECES));
        let units_allowed = if self.opcode == work::WRITE_NOTIFY {
            3
        } else {
            0
        };
        if !known
            || self.flags & !allowed != 0
            || units > units_allowed
            || pieces > if moves { MAX_PIECES as usize } else { 0 }
            || inline
                > if self.has(work::INLINE) {
                    MAX_INLINE as usize
                } else {
                    0
                }
            || (self.has(work::INLINE) && pieces != 0)
            || self.length > MAX_TRANSFER
            || !supported(self.opcode, self.flags)
        {
            return None;
        }
        let mut rest = words[4..].iter().copied();
        if self.has(work::STORE_WORD) {
            let (offset, value) = (rest.next()?, rest.next()?);
            self.word = Some((offset, value));
            if !offset.is_multiple_of(8) {
                return None;
            }
        }
        for word in &mut self.payload[..2 * units] {
            *word = rest.next()?;
        }
        let mut sum = inline as u64;
        for piece in &mut self.pieces[..pieces] {
            *piece = Piece {
                iova: rest.next()?,
                len: rest.next()? as u32,
            };
            sum += u64::from(piece.len);
            if piece.len == 0 {
                return None;
            }
        }
        self.piece_count = pieces as u8;
        let used = (words.len() - 4 - rest.len()) * 8 + 32;
        for eight in self.inline[..inline.next_multiple_of(8)].chunks_exact_mut(8) {
            eight.copy_from_slice(&rest.next()?.to_le_bytes());
        }
        let exact = (used + inline).div_ceil(64) == slots;
        (exact && sum == u64::from(self.length)).then_some(())
    }
}

/// Whether the model has the optional features that a descriptor uses.
fn supported(opcode: u8, flags: u8) -> bool {
    let has = |bit: u32| FEATURES & 1 << bit != 0;
    (opcode != work::READ || has(feature::READ))
        && (flags & 1 << work::INLINE == 0 || has(feature::INLINE))
        && (flags & 1 << work::STORE_WORD == 0 || has(feature::STORE_WORD))
}
