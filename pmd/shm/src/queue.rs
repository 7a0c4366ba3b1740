//! The queue from a tenant to the daemon: bounded, one consumer (the daemon), producers that take
//! turns under a lock of the tenant's. A slot's sequence number says whether it is full, so no
//! index is shared and each side believes only its own.

use crate::control::{Request, bytes_of, from_bytes};
use crate::layout::{QUEUE_SLOTS, QueueSlot};
use crate::sync::Ordering;

const WORDS: usize = 15;
const _: () = assert!(std::mem::size_of::<Request>() == WORDS * 8);

/// The tenant's side: how many requests it has put in.
#[derive(Debug, Default)]
pub struct Putter {
    position: u64,
}

impl Putter {
    /// A putter for an empty queue.
    pub const fn new() -> Self {
        Putter { position: 0 }
    }

    /// Puts a request; false when the queue is full. The daemon frees a slot by storing its
    /// position plus the queue's length.
    pub fn put(&mut self, slots: &[QueueSlot; QUEUE_SLOTS], request: &Request) -> bool {
        let Some(slot) = slots.get(self.position as usize % QUEUE_SLOTS) else {
            return false;
        };
        let free = if self.position < QUEUE_SLOTS as u64 {
            0
        } else {
            self.position
        };
        if slot.sequence.load(Ordering::Acquire) != free {
            return false;
        }
        for (word, bytes) in slot.words.iter().zip(bytes_of(request).chunks_exact(8)) {
            let mut value = [0; 8];
            value.copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(value), Ordering::Relaxed);
        }
        slot.sequence.store(self.position + 1, Ordering::Release);
        self.position += 1;
        true
    }
}

/// The daemon's side. A tenant that writes nonsense into sequence numbers gets its own requests
/// ignored or read twice, and each request is checked by its reader anyway.
#[derive(Debug, Default)]
pub struct Taker {
    position: u64,
}

impl Taker {
    /// A taker for an empty queue.
    pub const fn new() -> Self {
        Taker { position: 0 }
    }

    /// The next request, if there is one.
    pub fn take(&mut self, slots: &[QueueSlot; QUEUE_SLOTS]) -> Option<Request> {
        let slot = slots.get(self.position as usize % QUEUE_SLOTS)?;
        if slot.sequence.load(Ordering::Acquire) != self.position + 1 {
            return None;
        }
        let mut bytes = [0; WORDS * 8];
        for (word, place) in slot.words.iter().zip(bytes.chunks_exact_mut(8)) {
            place.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        slot.sequence
            .store(self.position + QUEUE_SLOTS as u64, Ordering::Release);
        self.position += 1;
        from_bytes(&bytes)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn request(fd: i32) -> Request {
        Request {
            fd,
            ..from_bytes(&[0; WORDS * 8]).unwrap()
        }
    }

    #[test]
    fn fills_empties_and_wraps() {
        // SAFETY: slots are made of integers; zeroes are a value.
        let slots: Box<[QueueSlot; QUEUE_SLOTS]> = Box::new(unsafe { std::mem::zeroed() });
        let (mut putter, mut taker) = (Putter::new(), Taker::new());
        let (mut put, mut taken) = (0, 0);
        for round in 0..if cfg!(miri) { 2 } else { 5 } {
            while putter.put(&slots, &request(put)) {
                put += 1;
            }
            assert_eq!(put - taken, QUEUE_SLOTS as i32, "round {round}");
            for _ in 0..100 + round {
                assert_eq!(taker.take(&slots), Some(request(taken)));
                taken += 1;
            }
        }
    }

    #[test]
    fn nonsense_in_a_sequence_number_gives_nothing() {
        // SAFETY: as above.
        let slots: Box<[QueueSlot; QUEUE_SLOTS]> = Box::new(unsafe { std::mem::zeroed() });
        slots[0].sequence.store(u64::MAX, Ordering::Relaxed);
        assert_eq!(Taker::new().take(&slots), None);
        assert!(!Putter::new().put(&slots, &request(1)));
    }
}
