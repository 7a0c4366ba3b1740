//! Names of nodes, streams and remote memory, as they stand in messages.

use crate::message::Malformed;

/// A node of the fabric: its number in the device, from 0. The device tells a message's source, so
/// a node cannot claim to be another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u16);

impl NodeId {
    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// One end of a stream, as the node that gave the number knows it.
///
/// The index finds the stream in a table; the generation says which use of that place is meant, so
/// that an id that has outlived its stream is recognised. Generation 0 is never used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl StreamId {
    /// The id as one number: the index below, the generation in the upper 32 bits. Never 0.
    pub fn to_u64(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// The id with that number, or `None` when no id has it.
    pub fn from_u64(number: u64) -> Option<Self> {
        let id = StreamId {
            index: number as u32,
            generation: (number >> 32) as u32,
        };
        (id.generation != 0).then_some(id)
    }

    pub(crate) fn at(self) -> usize {
        self.index as usize
    }
}

/// Where the other node's engine may write for one stream: the ring it fills, and the head word
/// that it stores behind the bytes. All in one region of the device.
///
/// The byte at position `p` lies at `ring + p % size`. The head word is the stream's 64-bit
/// `Producer::head` (`docs/shared-memory.md`): the position after the last byte that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Key of the region.
    pub key: u32,
    /// Offset of the ring in the region, in bytes.
    pub ring: u64,
    /// Offset of the head word in the region, in bytes; a multiple of 8.
    pub word: u64,
    /// Binary logarithm of the ring's size in bytes, from [`Place::MIN_LOG2`] to
    /// [`Place::MAX_LOG2`].
    pub log2: u8,
}

impl Place {
    /// Smallest ring: 4 KiB (`rdsock_shm::layout::MIN_RING`).
    pub const MIN_LOG2: u8 = 12;
    /// Largest ring: 1 GiB (`rdsock_shm::layout::MAX_RING`).
    pub const MAX_LOG2: u8 = 30;

    /// Bytes of the ring, a power of two.
    pub fn size(&self) -> u64 {
        1 << self.log2
    }

    /// The same place if every field is possible.
    ///
    /// # Errors
    /// [`Malformed::Field`] when the size is out of range, the ring or the head word would reach
    /// beyond 2^64, the head word is not aligned, or it lies inside the ring.
    pub fn checked(self) -> Result<Self, Malformed> {
        if !(Self::MIN_LOG2..=Self::MAX_LOG2).contains(&self.log2) {
            return Err(Malformed::Field);
        }
        let ring_end = self.ring.checked_add(self.size()).ok_or(Malformed::Field)?;
        let word_end = self.word.checked_add(8).ok_or(Malformed::Field)?;
        let apart = word_end <= self.ring || ring_end <= self.word;
        if apart && self.word.is_multiple_of(8) {
            Ok(self)
        } else {
            Err(Malformed::Field)
        }
    }
}
