//! Sleep and wake between the two ends of a stream.
//!
//! An end that goes to sleep *asks*: it sets a bit in its [`Ask`] word, looks once more for what
//! it waits for, and sleeps in the kernel on its anchor. The other end publishes (bytes, or space),
//! looks at the word, and if it is asked, takes the request and sends a byte or rings a bell.
//!
//! The argument: the asker does `want := WAKE; fence; read position`, the other end does
//! `position := new; fence; read want`. Both fences are sequentially consistent, so one of them
//! comes first in their single order. If it is the asker's, the other end's read of `want`
//! sees WAKE; if it is the other end's, the asker's read sees the new position. Both misses at
//! once cannot happen. Taking the request is an atomic exchange, so one request gives one wake.
//!
//! While the other end sends the wake, RINGING stands in the word: an asker that leaves the rings
//! waits for it to go, and then knows the exact number of wake bytes on its way.

use crate::layout::{Ask, want};
use crate::sync::{AtomicU32, Ordering, fence};

/// Asks: sets `bits`, and orders that before whatever the caller looks at next.
#[inline]
pub fn ask(word: &AtomicU32, bits: u32) {
    word.fetch_or(bits, Ordering::SeqCst);
    fence(Ordering::SeqCst);
}

/// Takes a request back. The bits that the other end had not taken.
#[inline]
pub fn unask(word: &AtomicU32, bits: u32) -> u32 {
    word.fetch_and(!bits, Ordering::AcqRel) & bits
}

/// What the other end wants, after a publication. 0 in the usual case.
#[inline]
pub fn asked(ask: &Ask) -> u32 {
    fence(Ordering::SeqCst);
    ask.want.load(Ordering::Relaxed)
}

/// Takes the other end's request for a bell or a wake byte. Returns what it wanted; when that
/// holds BELL or WAKE, the caller rings and then calls [`rung`]. A demoted or closed asker gets
/// neither.
pub fn take(word: &AtomicU32) -> u32 {
    let mut old = word.load(Ordering::Relaxed);
    loop {
        let wants = old & (want::BELL | want::WAKE);
        if wants == 0 || old & (want::DEMOTED | want::CLOSED) != 0 {
            return old & !(want::BELL | want::WAKE);
        }
        let new = (old & !(want::BELL | want::WAKE)) | want::RINGING;
        match word.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => return old,
            Err(now) => old = now,
        }
    }
}

/// Ends what [`take`] began.
pub fn rung(word: &AtomicU32) {
    word.fetch_and(!want::RINGING, Ordering::AcqRel);
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_taken_once() {
        let word = AtomicU32::new(0);
        ask(&word, want::WAKE);
        assert_eq!(take(&word), want::WAKE);
        assert_eq!(word.load(Ordering::Relaxed), want::RINGING);
        assert_eq!(take(&word), want::RINGING);
        rung(&word);
        assert_eq!(unask(&word, want::WAKE), 0);
    }

    #[test]
    fn a_demoted_asker_is_not_woken() {
        let word = AtomicU32::new(want::WAKE | want::DEMOTED);
        assert_eq!(take(&word), want::DEMOTED);
    }
}
