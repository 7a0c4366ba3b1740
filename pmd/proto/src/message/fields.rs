//! The fields of a message, read and written one behind the other.

use super::{Bytes, Malformed, SIZE};
use crate::id::{Place, StreamId};

/// Reads fields one behind the other. No kind has more fields than fit.
pub(super) struct Reader<'a> {
    pub(super) bytes: &'a Bytes,
    pub(super) at: usize,
}

impl Reader<'_> {
    pub(super) fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        field.copy_from_slice(&self.bytes[self.at..self.at + N]);
        self.at += N;
        field
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    pub(super) fn id(&mut self) -> Result<StreamId, Malformed> {
        StreamId::from_u64(self.u64()).ok_or(Malformed::Field)
    }

    pub(super) fn place(&mut self, log2: u16) -> Result<Place, Malformed> {
        let place = Place {
            ring: self.u64(),
            word: self.u64(),
            key: self.u32(),
            log2: log2.try_into().map_err(|_| Malformed::Field)?,
        };
        place.checked()
    }

    pub(super) fn rest(&self) -> &[u8] {
        &self.bytes[self.at..]
    }
}

/// Writes fields one behind the other, behind the head.
pub(super) struct Writer {
    pub(super) bytes: Bytes,
    at: usize,
}

impl Writer {
    pub(super) fn new() -> Self {
        Writer {
            bytes: [0; SIZE],
            at: 8,
        }
    }

    pub(super) fn put(&mut self, field: &[u8]) -> &mut Self {
        self.bytes[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
        self
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.put(&value.to_le_bytes())
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.put(&value.to_le_bytes())
    }

    pub(super) fn id(&mut self, id: StreamId) -> &mut Self {
        self.u64(id.to_u64())
    }

    pub(super) fn place(&mut self, place: &Place) -> &mut Self {
        self.u64(place.ring).u64(place.word).u32(place.key)
    }
}
