//! Shared memory is hostile: whatever the other side writes into a word, at any time, this side
//! neither panics nor touches memory outside the ring, and either goes on or says so.
//!
//! Each test plays the honest side with this crate and the hostile one with plain stores. The ring
//! lies between two canaries; under miri (`.ci/miri`) every access is checked as well.
#![cfg(not(loom))]

use proptest::prelude::*;
use rdsock_shm::bell::{self, Place};
use rdsock_shm::control::{self, *};
use rdsock_shm::layout::*;
use rdsock_shm::lock::{self, Owner};
use rdsock_shm::queue::{Putter, Taker};
use rdsock_shm::reason::{Reason, State};
use rdsock_shm::ring::{Receiver, RingMemory, Sender};
use rdsock_shm::wake;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

const RING: u64 = MIN_RING;
const CANARY: u8 = 0x5A;
const MARGIN: usize = 256;

/// A value made of zeroes.
fn zeroed<T: Zero>() -> Box<T> {
    // SAFETY: made of integers and their atomics (`Zero`), for which zeroes are a value.
    Box::new(unsafe { std::mem::zeroed() })
}

/// # Safety
/// Zeroes are a value.
unsafe trait Zero {}
// SAFETY: made of atomics and integers.
unsafe impl Zero for TxState {}
// SAFETY: as above.
unsafe impl Zero for RxState {}
// SAFETY: as above.
unsafe impl Zero for Direction {}
// SAFETY: as above.
unsafe impl Zero for Bell {}
// SAFETY: as above.
unsafe impl Zero for [QueueSlot; QUEUE_SLOTS] {}

/// One direction between an honest end and a hostile one.
struct Bench {
    tx: Box<TxState>,
    rx: Box<RxState>,
    wire: Box<Direction>,
    memory: Vec<u8>,
}

impl Bench {
    fn new(at: u64) -> Self {
        let mut bench = Bench {
            tx: zeroed(),
            rx: zeroed(),
            wire: zeroed(),
            memory: vec![CANARY; RING as usize + 2 * MARGIN],
        };
        let ring = bench.ring();
        bench.sender(ring).switch(at);
        bench.receiver(ring).switch(at);
        bench
    }

    fn ring(&mut self) -> RingMemory {
        // SAFETY: the vector is not moved or resized while the ring is used.
        unsafe { RingMemory::new(self.memory.as_mut_ptr().add(MARGIN), RING) }
    }

    fn sender(&self, ring: RingMemory) -> Sender<'_> {
        Sender::new(&self.tx, &self.wire, ring, false)
    }

    fn receiver(&self, ring: RingMemory) -> Receiver<'_> {
        Receiver::new(&self.rx, &self.wire, ring, false)
    }

    fn assert_margins(&self) {
        let (start, end) = self.memory.split_at(MARGIN);
        assert!(
            start.iter().all(|byte| *byte == CANARY),
            "written before the ring"
        );
        let end = &end[RING as usize..];
        assert!(
            end.iter().all(|byte| *byte == CANARY),
            "written behind the ring"
        );
    }
}

/// Positions worth trying: near the honest one, near the limits, and any.
fn position() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..3 * RING,
        (0..64_u64).prop_map(|n| u64::MAX - n),
        (0..64_u64).prop_map(|n| (1 << 63) - 32 + n),
        any::<u64>(),
    ]
}

/// Where a connection can stand when it switches: any position that a kernel can count to.
fn start() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), 0..1_u64 << 20, Just((1 << 62) - 7)]
}

#[derive(Clone, Debug)]
enum Step {
    /// The hostile end writes a word.
    Head(u64),
    Origin(u64),
    Tail(u64),
    SwitchAt(u64),
    Mark(u32),
    Stop(u64),
    /// The honest end makes a call with that many bytes.
    Call(u64),
    /// The same, and gives part of it back, or takes only part.
    Partly(u64),
    Look,
    /// Its process died, and another one takes over.
    Recover,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        position().prop_map(Step::Head),
        position().prop_map(Step::Origin),
        position().prop_map(Step::Tail),
        position().prop_map(Step::SwitchAt),
        any::<u32>().prop_map(Step::Mark),
        position().prop_map(Step::Stop),
        (0..2 * RING).prop_map(Step::Call),
        (1..RING).prop_map(Step::Partly),
        Just(Step::Look),
        Just(Step::Recover),
    ]
}

/// The hostile part of a step: any word of the direction may be written by the other end's process,
/// also those that are ours by convention.
fn write(wire: &Direction, step: &Step) {
    match *step {
        Step::Head(value) => wire.producer.head.store(value, Relaxed),
        Step::Origin(value) => wire.producer.origin.store(value, Relaxed),
        Step::Tail(value) => wire.consumer.tail.store(value, Relaxed),
        Step::SwitchAt(value) => wire.producer.switch_at.store(value, Relaxed),
        Step::Mark(value) => wire.producer.mark.store(value, Relaxed),
        Step::Stop(value) => wire.consumer.stop.store(value, Relaxed),
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_receiver_survives_any_words(at in start(), steps in prop::collection::vec(step(), 0..40)) {
        let mut bench = Bench::new(at);
        let ring = bench.ring();
        for step in &steps {
            write(&bench.wire, step);
            let receiver = bench.receiver(ring);
            let most = match step {
                Step::Call(len) | Step::Partly(len) => *len,
                Step::Look => {
                    let _ = receiver.available_now();
                    let _ = Receiver::switch_at(&bench.wire);
                    continue;
                }
                _ => continue,
            };
            let Ok(Some(available)) = receiver.available() else { continue };
            prop_assert!(available.len >= 1 && available.len <= RING);
            let len = most.min(available.len);
            let mut bytes = vec![0_u8; len as usize];
            // SAFETY: the buffer has `len` bytes.
            unsafe { receiver.copy(available, 0, bytes.as_mut_ptr(), bytes.len()) };
            let (start, piece) = receiver.piece(available);
            let first = bench.memory.as_ptr().wrapping_add(MARGIN);
            prop_assert!(start >= first && start.wrapping_add(piece) <= first.wrapping_add(RING as usize));
            prop_assert!(receiver.consume(available, len));
            receiver.publish();
        }
        bench.assert_margins();
    }

    #[test]
    fn a_sender_survives_any_words(at in start(), steps in prop::collection::vec(step(), 0..40)) {
        let mut bench = Bench::new(at);
        let ring = bench.ring();
        let bytes = vec![7_u8; RING as usize];
        for step in &steps {
            write(&bench.wire, step);
            let sender = bench.sender(ring);
            let len = match step {
                Step::Call(len) | Step::Partly(len) => *len,
                Step::Look => {
                    let _ = sender.space();
                    let _ = sender.is_empty();
                    continue;
                }
                Step::Stop(from) => {
                    if let Ok(Some((start, len))) = sender.with_published(*from, |start, len| (start, len)) {
                        let first = bench.memory.as_ptr().wrapping_add(MARGIN);
                        let end = first.wrapping_add(RING as usize);
                        prop_assert!(start >= first && start.wrapping_add(len) <= end);
                    }
                    continue;
                }
                Step::Recover => {
                    sender.recover();
                    continue;
                }
                _ => continue,
            };
            let Ok(Some(space)) = sender.reserve(len) else { continue };
            prop_assert!(space.len >= 1 && space.len <= RING && space.len <= len);
            let (start, piece) = sender.piece(space);
            let first = bench.memory.as_ptr().wrapping_add(MARGIN);
            let start = start.cast_const();
            prop_assert!(start >= first && start.wrapping_add(piece) <= first.wrapping_add(RING as usize));
            // SAFETY: the slice has a ring's length, and a reservation is no longer.
            unsafe { sender.fill(space, 0, bytes.as_ptr(), space.len as usize) };
            if let Step::Partly(_) = step {
                prop_assert!(sender.give_back(space, space.len / 2));
            }
            sender.publish();
        }
        bench.assert_margins();
    }

    /// What an honest receiver has read from an honest sender is right, whatever a liar writes into
    /// the words that neither of them reads for that.
    #[test]
    fn positions_are_taken_once(at in start(), lens in prop::collection::vec(1..RING / 2, 1..20)) {
        let mut bench = Bench::new(at);
        let ring = bench.ring();
        let mut next = 0_u8;
        for len in lens {
            let bytes: Vec<u8> = (0..len).map(|_| { next = next.wrapping_add(1); next }).collect();
            let sender = bench.sender(ring);
            let space = sender.reserve(len).unwrap().unwrap();
            prop_assert_eq!(space.len, len);
            // SAFETY: the slice is as long as the reservation.
            unsafe { sender.fill(space, 0, bytes.as_ptr(), bytes.len()) };
            sender.publish();
            // Lies about what was not ours to read: the receiver's tail comes from its own page.
            let receiver = bench.receiver(ring);
            let available = receiver.available().unwrap().unwrap();
            let mut got = vec![0; available.len as usize];
            // SAFETY: the buffer is as long as what is available.
            unsafe { receiver.copy(available, 0, got.as_mut_ptr(), got.len()) };
            prop_assert_eq!(got, bytes);
            prop_assert!(receiver.consume(available, available.len));
            receiver.publish();
        }
    }

    #[test]
    fn a_position_beyond_the_ring_is_a_violation(at in start(), beyond in 1..u64::MAX - RING) {
        let mut bench = Bench::new(at);
        let ring = bench.ring();
        bench.wire.producer.head.store(at.wrapping_add(RING).wrapping_add(beyond), Relaxed);
        prop_assert!(bench.receiver(ring).available_now().is_err());
        if let Some(tail) = at.checked_add(beyond) {
            bench.wire.consumer.tail.store(tail, Relaxed);
            prop_assert!(bench.sender(ring).space().is_err());
        }
    }

    #[test]
    fn a_request_gives_one_wake_at_most(word in any::<u32>(), asked in any::<u32>()) {
        let want = AtomicU32::new(word);
        let taken = wake::take(&want);
        let after = want.load(Relaxed);
        let sticky = !(want::BELL | want::WAKE | want::RINGING | want::NAP);
        prop_assert_eq!(after & sticky, word & sticky);
        prop_assert_eq!(taken & want::NAP, word & want::NAP);
        prop_assert_eq!(after & want::NAP, 0);
        let gone = word & (want::DEMOTED | want::CLOSED | want::SHUT) != 0;
        if taken & (want::BELL | want::WAKE) != 0 {
            prop_assert!(!gone && after & want::RINGING != 0);
            prop_assert_eq!(after & (want::BELL | want::WAKE), 0);
            wake::rung(&want);
            prop_assert_eq!(want.load(Relaxed) & want::RINGING, 0);
        } else {
            prop_assert!(gone || word & (want::BELL | want::WAKE) == 0);
            prop_assert_eq!(after, word & !want::NAP);
        }
        prop_assert_eq!(wake::ask(&want, asked), want.load(Relaxed));
        prop_assert_eq!(want.load(Relaxed) & asked, asked);
    }

    #[test]
    fn a_place_is_on_the_board_or_nowhere(word in any::<u32>()) {
        if let Some(place) = Place::from_word(word) {
            prop_assert!(place.bell < BELLS && place.bit < BELL_BITS);
            prop_assert_eq!(place.to_word(), word);
        }
    }

    #[test]
    fn a_bell_of_any_words_names_streams_that_exist(
        summary in any::<u64>(), words in prop::collection::vec(any::<u64>(), BELL_BITS / 64), bit in any::<usize>(),
    ) {
        let bell: Box<Bell> = zeroed();
        bell.summary.store(summary, Relaxed);
        for (word, value) in bell.words.iter().zip(&words) {
            word.store(*value, Relaxed);
        }
        bell::ring(&bell, bit);
        let mut seen = Vec::new();
        bell::take(&bell, |word, bits| seen.push((word, bits)));
        for (word, bits) in seen {
            prop_assert!(word < BELL_BITS / 64);
            let rung = if bit / 64 == word { 1 << (bit % 64) } else { 0 };
            prop_assert_eq!(bits, words[word] | rung);
        }
        prop_assert!(!bell::is_rung(&bell));
    }

    #[test]
    fn a_queue_of_any_words_gives_what_stands_there_or_nothing(
        writes in prop::collection::vec((0..QUEUE_SLOTS, 0..16_usize, position()), 0..60),
    ) {
        let slots: Box<[QueueSlot; QUEUE_SLOTS]> = zeroed();
        let (mut putter, mut taker) = (Putter::new(), Taker::new());
        let request = control::from_bytes::<Request>(&[3; size_of::<Request>()]).unwrap();
        for (slot, word, value) in writes {
            match slots[slot].words.get(word) {
                Some(place) => place.store(value, Relaxed),
                None => slots[slot].sequence.store(value, Relaxed),
            }
            putter.put(&slots, &request);
            if let Some(taken) = taker.take(&slots) {
                // Any bytes are a request; the reader checks each field.
                prop_assert_eq!(control::bytes_of(&taken).len(), size_of::<Request>());
            }
        }
    }

    #[test]
    fn an_owner_word_is_a_process_and_a_thread(word in any::<u64>(), pid in 1..4_194_304_u32, thread in any::<u64>()) {
        let lock = std::sync::atomic::AtomicU64::new(word);
        let me = Owner::new(pid, thread);
        match lock::try_take(&lock, me) {
            Ok(taken) => lock::release(&lock, taken),
            Err(owner) => {
                prop_assert_eq!(owner, word);
                prop_assert_eq!(Owner::pid_of(owner), (word >> 42) as u32);
                prop_assert!(lock::take_from_dead(&lock, owner, me));
                prop_assert!(!lock::take_from_dead(&lock, owner, me));
            }
        }
    }

    #[test]
    fn codes_are_known_or_not(code in prop_oneof![0..64_u32, any::<u32>()]) {
        if let Some(reason) = Reason::from_code(code) {
            prop_assert_eq!(reason as u32, code);
            prop_assert!(!reason.text().is_empty() || code == 0);
        }
        if let Some(state) = State::from_code(code) {
            prop_assert_eq!(state as u32, code);
        }
    }

    #[test]
    fn any_datagram_is_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        read_everything(&bytes)?;
    }

    /// A true message with some bytes changed, cut off or appended.
    #[test]
    fn a_damaged_message_is_parsed_or_refused(
        kind in 0..14_u16,
        body in prop::collection::vec(any::<u8>(), 0..120),
        damage in prop::collection::vec((0..130_usize, any::<u8>()), 0..4),
        cut in 0..140_usize,
    ) {
        let mut bytes = control::bytes_of(&control::head(kind)).to_vec();
        bytes.extend(&body);
        let (parsed, rest) = control::parse(&bytes).unwrap();
        prop_assert_eq!((parsed, rest), (kind, &body[..]));
        for (at, value) in damage {
            if let Some(place) = bytes.get_mut(at) {
                *place = value;
            }
        }
        bytes.truncate(cut);
        read_everything(&bytes)?;
    }

    #[test]
    fn messages_come_back_as_they_were_sent(bytes in prop::collection::vec(any::<u8>(), size_of::<Promote>())) {
        let promote: Promote = control::from_bytes(&bytes).unwrap();
        let message = Message::new(kind::PROMOTE, &promote);
        let (kind, body) = control::parse(message.as_bytes()).unwrap();
        prop_assert_eq!(kind, kind::PROMOTE);
        prop_assert_eq!(control::from_bytes::<Promote>(body), Some(promote));
        // A body too long for the buffer leaves the message without it, and nothing breaks.
        let request = control::from_bytes::<Request>(&[1; size_of::<Request>()]).unwrap();
        prop_assert!(Message::new(kind::KICK, &request).as_bytes().len() <= 128);
    }
}

fn read_everything(bytes: &[u8]) -> Result<(), TestCaseError> {
    let whole = match control::parse(bytes) {
        Ok((_, body)) => {
            prop_assert_eq!(body.len() + size_of::<Head>(), bytes.len());
            body
        }
        Err(_) => bytes,
    };
    read_as::<Head>(whole)?;
    read_as::<Hello>(whole)?;
    read_as::<Welcome>(whole)?;
    read_as::<Refused>(whole)?;
    read_as::<Promote>(whole)?;
    read_as::<Lookup>(whole)?;
    read_as::<Verdict>(whole)?;
    read_as::<Query>(whole)?;
    read_as::<Request>(whole)
}

fn read_as<T: Pod>(bytes: &[u8]) -> Result<(), TestCaseError> {
    // Also where the bytes are not aligned.
    for start in 0..bytes.len().min(3) {
        let bytes = &bytes[start..];
        let value = control::from_bytes::<T>(bytes);
        prop_assert_eq!(value.is_some(), bytes.len() == size_of::<T>());
        if let Some(value) = value {
            prop_assert_eq!(control::bytes_of(&value), bytes);
        }
    }
    Ok(())
}
