//! Bells: the readiness bitmap of an epoll instance, so that readiness among thousands of streams
//! is found without a scan. A peer may set any bit at any time: a bit means "look", nothing more.

use crate::layout::{BELL_BITS, BELLS, Bell};
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// A stream's place on its owner's bell board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which bell, below [`BELLS`].
    pub bell: usize,
    /// Which bit, below [`BELL_BITS`].
    pub bit: usize,
}

impl Place {
    /// As stored in [`crate::layout::Ask::place`]; never 0.
    pub fn to_word(self) -> u32 {
        ((self.bell as u32) << 16) | (self.bit as u32 + 1)
    }

    /// Checks a word that the peer wrote. `None`: it names no place.
    pub fn from_word(word: u32) -> Option<Self> {
        let bell = (word >> 16) as usize;
        let bit = ((word & 0xffff) as usize).checked_sub(1)?;
        (bell < BELLS && bit < BELL_BITS).then_some(Place { bell, bit })
    }
}

/// Sets a bit; true when a thread sleeps on this bell and wants a wake byte.
///
/// The fence pairs with the one in [`start_sleep`]: either this sees the sleeper, or the sleeper
/// sees the bit.
pub fn ring(bell: &Bell, bit: usize) -> bool {
    let Some(word) = bell.words.get(bit / 64) else {
        return false;
    };
    set(word, bit % 64);
    set(&bell.summary, bit / 64);
    fence(Ordering::SeqCst);
    bell.sleepers.load(Ordering::Relaxed) != 0
}

fn set(word: &AtomicU64, bit: usize) {
    word.fetch_or(1 << (bit % 64), Ordering::AcqRel);
}

/// Takes all bits that are set, a word at a time: `found(word index, bits)`.
pub fn take(bell: &Bell, mut found: impl FnMut(usize, u64)) {
    if bell.summary.load(Ordering::Relaxed) == 0 {
        return;
    }
    let mut summary = bell.summary.swap(0, Ordering::AcqRel);
    while summary != 0 {
        let index = summary.trailing_zeros() as usize;
        summary &= summary - 1;
        if let Some(word) = bell.words.get(index) {
            found(index, word.swap(0, Ordering::AcqRel));
        }
    }
}

/// Takes one bit, just before what stands behind it is looked at.
#[inline]
pub fn unring(bell: &Bell, bit: usize) {
    let Some(word) = bell.words.get(bit / 64) else {
        return;
    };
    if word.load(Ordering::Relaxed) >> (bit % 64) & 1 != 0 {
        word.fetch_and(!(1 << (bit % 64)), Ordering::AcqRel);
    }
}

/// True when a bit waits to be taken.
pub fn is_rung(bell: &Bell) -> bool {
    bell.summary.load(Ordering::Relaxed) != 0
}

/// A thread is about to sleep. Look at [`is_rung`] after this, and sleep only if it is not.
pub fn start_sleep(sleepers: &AtomicU32) {
    sleepers.fetch_add(1, Ordering::SeqCst);
    fence(Ordering::SeqCst);
}

/// The thread is awake again.
pub fn end_sleep(sleepers: &AtomicU32) {
    sleepers.fetch_sub(1, Ordering::SeqCst);
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn places_are_checked() {
        let place = Place {
            bell: BELLS - 1,
            bit: BELL_BITS - 1,
        };
        assert_eq!(Place::from_word(place.to_word()), Some(place));
        assert_eq!(Place::from_word(0), None);
        assert_eq!(Place::from_word(u32::MAX), None);
        assert_eq!(Place::from_word(((BELLS as u32) << 16) | 1), None);
    }

    #[test]
    fn every_bit_is_found_once() {
        // SAFETY: a bell is made of integers; zeroes are a value.
        let bell: Box<Bell> = Box::new(unsafe { std::mem::zeroed() });
        for bit in [0, 63, 64, 4095] {
            assert!(!ring(&bell, bit));
        }
        start_sleep(&bell.sleepers);
        assert!(ring(&bell, 1));
        let mut bits = Vec::new();
        take(&bell, |word, set| {
            bits.extend((0..64).filter(|b| set >> b & 1 == 1).map(|b| word * 64 + b))
        });
        assert_eq!(bits, [0, 1, 63, 64, 4095]);
        assert!(!is_rung(&bell));
        assert!(!ring(&bell, BELL_BITS + 5));
        ring(&bell, 7);
        ring(&bell, 8);
        unring(&bell, 7);
        let mut bits = Vec::new();
        take(&bell, |word, set| bits.push((word, set)));
        assert_eq!(bits, [(0, 1 << 8)]);
    }
}
