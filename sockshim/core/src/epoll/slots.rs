//! The registrations of one instance, and what is noted of them: mapped a piece at a time, as they are used, since most instances
//! have few. Used under the instance's lock, but for what says so.

use super::Slot;
use crate::conn::Pieces;
use crate::registration::Place;
use rdsock_shm::bell;
use rdsock_shm::layout::{BELL_BITS, Bell};
use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::sync::atomic::AtomicU32;

/// Words of a piece's bitmap of registrations.
const WORDS: usize = BELL_BITS / 64;
/// Pieces of an instance, which a reference to a registration has 16 bits for.
const PIECES: usize = MOST / BELL_BITS;
/// Registrations of one instance.
pub(super) const MOST: usize = 1 << 16;

/// Some of an instance's registrations: the first ones have the places of its bell.
#[derive(Debug)]
struct Piece {
    /// Registrations that must be looked at since something has changed in this process, see [`super::news`]. Without the lock.
    own: Bell,
    /// For each registration the next one of the same connection, plus 1: under [`super::LINK`].
    links: [AtomicU32; BELL_BITS],
    noted: UnsafeCell<Noted>,
}

/// What the instance's lock protects.
#[derive(Debug)]
struct Noted {
    /// Registrations to look at.
    look: [u64; WORDS],
    /// Registrations in the inner instance.
    inner: [u64; WORDS],
    /// Written once, up to the highest that was ever used.
    slots: [MaybeUninit<Slot>; BELL_BITS],
}

/// All pieces. They are never unmapped, and go on to the next instance in this place.
#[derive(Debug)]
pub(super) struct Table(Pieces<Piece, PIECES>);

// SAFETY: `noted` is used under the instance's lock alone, by `Slots`; all else is atomic.
unsafe impl Sync for Table {}

impl Table {
    fn piece(&self, bit: usize) -> Option<&'static Piece> {
        self.0.get(bit / BELL_BITS, 1)
    }

    fn pieces(&self) -> impl Iterator<Item = (usize, &'static Piece)> {
        (0..PIECES).map_while(|number| Some((number, self.0.get(number, 1)?)))
    }

    /// Marks a registration, without the lock.
    pub(super) fn ring(&self, bit: usize) {
        if let Some(piece) = self.piece(bit) {
            bell::ring(&piece.own, bit % BELL_BITS);
        }
    }

    /// Takes the mark of [`Table::ring`].
    pub(super) fn unring(&self, bit: usize) {
        if let Some(piece) = self.piece(bit) {
            bell::unring(&piece.own, bit % BELL_BITS);
        }
    }

    /// True when a mark of [`Table::ring`] was not taken yet.
    pub(super) fn is_rung(&self) -> bool {
        self.pieces().any(|(_, piece)| bell::is_rung(&piece.own))
    }

    /// Takes all such marks: `found(word, bits)`.
    pub(super) fn take(&self, mut found: impl FnMut(usize, u64)) {
        for (number, piece) in self.pieces() {
            bell::take(&piece.own, |word, bits| found(number * WORDS + word, bits));
        }
    }

    /// Where the next registration of the same connection stands. Without the lock.
    pub(super) fn link(&self, bit: usize) -> Option<&'static AtomicU32> {
        self.piece(bit)?.links.get(bit % BELL_BITS)
    }
}

/// The registrations, for the holder of the instance's lock.
#[derive(Debug)]
pub(super) struct Slots {
    table: Option<&'static Table>,
    /// One more than the highest slot ever used.
    pub(super) high: usize,
    /// No slot below this is free.
    free: usize,
}

impl Slots {
    /// None yet.
    pub(super) fn new(table: &'static Table) -> Self {
        Slots {
            table: Some(table),
            high: 0,
            free: 0,
        }
    }

    fn noted(&mut self, bit: usize) -> Option<&mut Noted> {
        let piece = self.table?.piece(bit)?;
        // SAFETY: the caller has the lock, and this is borrowed as long as the reference lives.
        Some(unsafe { &mut *piece.noted.get() })
    }

    pub(super) fn slot(&mut self, bit: usize) -> Option<&mut Slot> {
        if bit >= self.high {
            return None;
        }
        let slot = self.noted(bit)?.slots.get_mut(bit % BELL_BITS)?;
        // SAFETY: all below `high` were written.
        Some(unsafe { slot.assume_init_mut() })
    }

    /// A free slot, now used. `None`: there is no memory, or no number.
    pub(super) fn add(&mut self, new: Slot) -> Option<usize> {
        let is_free = |slots: &mut Self, bit: usize| {
            slots
                .slot(bit)
                .is_some_and(|slot| slot.place() == Place::Free)
        };
        let bit = (self.free..self.high)
            .find(|bit| is_free(self, *bit))
            .unwrap_or(self.high);
        self.free = bit;
        if bit >= MOST {
            return None;
        }
        self.table?.0.make(bit / BELL_BITS, 1)?;
        self.noted(bit)?.slots.get_mut(bit % BELL_BITS)?.write(new);
        self.high = self.high.max(bit + 1);
        self.free = bit + 1;
        Some(bit)
    }

    /// A slot is free again.
    pub(super) fn freed(&mut self, bit: usize) {
        self.free = self.free.min(bit);
    }

    /// All are free, and nothing is noted.
    pub(super) fn clear(&mut self) {
        for word in 0..self.words() {
            if let Some(noted) = self.noted(word * 64) {
                noted.look[word % WORDS] = 0;
                noted.inner[word % WORDS] = 0;
            }
        }
        (self.high, self.free) = (0, 0);
    }

    /// Words of the bitmaps that are used.
    pub(super) fn words(&self) -> usize {
        self.high.div_ceil(64)
    }

    /// Says whether a registration is to be looked at.
    pub(super) fn set_look(&mut self, bit: usize, on: bool) {
        if let Some(noted) = self.noted(bit) {
            set_bit(&mut noted.look, bit, on);
        }
    }

    /// Adds to those that are to be looked at.
    pub(super) fn look_at(&mut self, word: usize, bits: u64) {
        if let Some(noted) = self.noted(word * 64) {
            noted.look[word % WORDS] |= bits;
        }
    }

    /// Says whether a registration is in the inner instance.
    pub(super) fn set_inner(&mut self, bit: usize, on: bool) {
        if let Some(noted) = self.noted(bit) {
            set_bit(&mut noted.inner, bit, on);
        }
    }

    /// Those of a word that are in the inner instance, and those of them that are to be looked at.
    pub(super) fn word(&mut self, word: usize) -> (u64, u64) {
        self.noted(word * 64).map_or((0, 0), |noted| {
            let inner = noted.inner[word % WORDS];
            (inner, inner & noted.look[word % WORDS])
        })
    }
}

fn set_bit(words: &mut [u64; WORDS], bit: usize, on: bool) {
    let word = &mut words[bit / 64 % WORDS];
    *word = *word & !(1 << (bit % 64)) | u64::from(on) << (bit % 64);
}
