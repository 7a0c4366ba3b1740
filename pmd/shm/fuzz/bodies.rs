//! What the fuzz targets do with their input. `tests/fuzz.rs` runs the same without a fuzzer.

use rdsock_shm::control::{
    Between, Caller, Head, Hello, Lookup, MAGIC, ParseError, Pod, Promote, Query, Reached, Refused,
    Request, Verdict, Welcome, bytes_of, from_bytes, head, parse,
};
use rdsock_shm::layout::{QUEUE_SLOTS, QueueSlot, VERSION};
use rdsock_shm::queue::Taker;
use rdsock_shm::sync::Ordering;

/// A datagram is a message, one of another version, or none; what is a message has no second form.
pub fn control(data: &[u8]) {
    match parse(data) {
        Ok((kind, body)) => {
            assert_eq!([bytes_of(&head(kind)), body].concat(), data);
            bodies(body);
        }
        Err(ParseError::Version(version)) => {
            assert_ne!(u32::from(version), VERSION);
            assert_eq!(data[..4], MAGIC.to_ne_bytes());
        }
        Err(ParseError::NotAMessage) => {
            assert!(data.len() < size_of::<Head>() || data[..4] != MAGIC.to_ne_bytes());
        }
    }
}

/// A body is read by exactly the types of its size.
fn bodies(body: &[u8]) {
    fn as_one<T: Pod>(body: &[u8]) {
        let read = from_bytes::<T>(body);
        assert_eq!(read.is_some(), body.len() == size_of::<T>());
        if let Some(value) = read {
            assert_eq!(bytes_of(&value), body);
        }
    }
    as_one::<Hello>(body);
    as_one::<Welcome>(body);
    as_one::<Refused>(body);
    as_one::<Promote>(body);
    as_one::<Between>(body);
    as_one::<Reached>(body);
    as_one::<Caller>(body);
    as_one::<Lookup>(body);
    as_one::<Verdict>(body);
    as_one::<Query>(body);
    as_one::<Request>(body);
}

/// Whatever a tenant writes into its queue, the daemon takes what stands in the slot whose turn it is, once
/// for each time that the slot says so, or nothing. Each piece of the input is a store: which slot,
/// which word, what.
pub fn queue(data: &[u8]) {
    // SAFETY: slots are made of integers; zeroes are a value.
    let slots: Box<[QueueSlot; QUEUE_SLOTS]> = Box::new(unsafe { std::mem::zeroed() });
    let mut taker = Taker::new();
    let mut position = 0;
    for piece in data.chunks_exact(4) {
        let &[at, word, low, high] = piece else {
            continue;
        };
        let value = u64::from(low) | u64::from(high) << 8;
        // Mostly near to where the daemon looks.
        let slot = &slots[(position as usize + usize::from(at % 4)) % QUEUE_SLOTS];
        match slot.words.get(usize::from(word % 16)) {
            Some(place) => place.store(value, Ordering::Relaxed),
            None => slot.sequence.store(
                position + 1 + u64::from(low % 4) * u64::from(high % 2),
                Ordering::Relaxed,
            ),
        }
        let due = &slots[position as usize % QUEUE_SLOTS];
        let full = due.sequence.load(Ordering::Relaxed) == position + 1;
        let stands: Vec<u8> = due
            .words
            .iter()
            .flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes())
            .collect();
        let taken = taker.take(&slots);
        assert_eq!(taken.is_some(), full);
        if let Some(request) = taken {
            assert_eq!(bytes_of(&request), stands);
            let freed = due.sequence.load(Ordering::Relaxed);
            assert_eq!(freed, position + QUEUE_SLOTS as u64);
            position += 1;
        }
    }
}
