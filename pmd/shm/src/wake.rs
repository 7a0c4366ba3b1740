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
//! The fence of the other end stands in every send, and costs most where it is needed least: under
//! load. A receiver that has not slept for long therefore sets [`Ask::hot`], and senders leave
//! their fence out. Before it sleeps it asks, takes `hot` back, and runs a barrier on all threads of
//! the other end (Linux's `membarrier`, global expedited): that stands where each one's own fence
//! would have stood. A sender that still sees `hot` either ran its read of `want` after the
//! barrier, and sees the request, or published before it, and the receiver sees the bytes.
//!
//! While the other end sends the wake, RINGING stands in the word: an asker that leaves the rings
//! waits for it to go, and then knows the exact number of wake bytes on its way.

use crate::layout::{Ask, want};
use crate::sync::{AtomicU32, Ordering, fence};

/// The byte on the anchor that wakes the other end. Any other byte on the anchor of a direction that has switched was
/// sent behind the shim's back.
pub static WAKE_BYTE: u8 = 0xA5;

/// Asks: sets `bits`, and orders that before whatever the caller looks at next. What the word is then.
#[inline]
pub fn ask(word: &AtomicU32, bits: u32) -> u32 {
    let before = word.fetch_or(bits, Ordering::SeqCst);
    fence(Ordering::SeqCst);
    before | bits
}

/// Takes a request back. The bits that the other end had not taken.
#[inline]
pub fn unask(word: &AtomicU32, bits: u32) -> u32 {
    word.fetch_and(!bits, Ordering::AcqRel) & bits
}

/// What the other end wants, after a publication. 0 in the usual case.
#[inline]
pub fn asked(ask: &Ask) -> u32 {
    if ask.hot.load(Ordering::Relaxed) == 0 {
        full_fence();
    } else {
        #[cfg(not(loom))]
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
    }
    ask.want.load(Ordering::Relaxed)
}

/// A sequentially consistent fence. On x86-64 a locked instruction on the stack does it in half
/// the time of `mfence`.
#[inline]
fn full_fence() {
    #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
    // SAFETY: adds nothing to a word of this thread's own stack.
    unsafe {
        std::arch::asm!("lock or dword ptr [rsp], 0");
    }
    #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
    fence(Ordering::SeqCst);
}

/// An asker that gets no token: it would read it as data (DEMOTED), or its kernel would answer it with a reset.
pub(crate) const NO_TOKEN: u32 = want::DEMOTED | want::CLOSED | want::SHUT;

/// What an asker asks for once.
const ASKS: u32 = want::BELL | want::WAKE | want::NAP;

/// Takes the other end's request for a bell, a wake byte or the end of a nap. Returns what it wanted; when that
/// holds BELL or WAKE, the caller rings and then calls [`rung`], when it holds NAP, it wakes who sleeps on the word. A demoted,
/// closed or shut asker gets neither bell nor byte.
pub fn take(word: &AtomicU32) -> u32 {
    let mut old = word.load(Ordering::Relaxed);
    loop {
        let (withheld, ringing) = match old & (want::BELL | want::WAKE) {
            wants if old & NO_TOKEN != 0 => (wants, 0),
            0 => (0, 0),
            _ => (0, want::RINGING),
        };
        let taken = old & ASKS & !withheld;
        if taken == 0 {
            return old & !withheld;
        }
        let new = old & !taken | ringing;
        match word.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => return old & !withheld,
            Err(now) => old = now,
        }
    }
}

/// Takes NAP alone; true when it was there. Whoever has changed what a nap waits for does this behind it: both write the word,
/// so one of them is first, and either sees what the other one has done.
pub fn take_nap(word: &AtomicU32) -> bool {
    word.fetch_and(!want::NAP, Ordering::AcqRel) & want::NAP != 0
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

    #[test]
    fn a_nap_ends_without_a_token_also_where_none_may_be_sent() {
        let word = AtomicU32::new(want::NAP);
        assert_eq!(take(&word), want::NAP);
        assert_eq!(word.load(Ordering::Relaxed), 0);
        let word = AtomicU32::new(want::NAP | want::WAKE | want::SHUT);
        assert_eq!(take(&word), want::NAP | want::SHUT);
        assert_eq!(word.load(Ordering::Relaxed), want::WAKE | want::SHUT);
    }

    #[test]
    fn a_nap_is_taken_once() {
        let word = AtomicU32::new(want::NAP | want::WAKE);
        assert!(take_nap(&word));
        assert!(!take_nap(&word));
        assert_eq!(word.load(Ordering::Relaxed), want::WAKE);
    }
}
