//! The ring between two threads, on the processor as it is, and under miri, which reports every
//! race on a byte.
#![cfg(not(loom))]

use rdsock_shm::layout::{Direction, RxState, TxState};
use rdsock_shm::ring::{Receiver, RingMemory, Sender};

const RING: usize = 4096;

#[test]
fn a_stream_of_odd_lengths_comes_out_as_it_went_in() {
    let total: u64 = if cfg!(miri) { 12_000 } else { 50_000_000 };
    // SAFETY: made of atomics, for which zeroes are a value.
    let (tx, rx, wire): (TxState, RxState, Direction) = unsafe { std::mem::zeroed() };
    let mut memory = vec![0_u8; RING];
    // SAFETY: the vector lives as long as the threads and is not used otherwise.
    let ring = unsafe { RingMemory::new(memory.as_mut_ptr(), RING as u64) };
    Sender::new(&tx, &wire, ring, false).switch(77);
    Receiver::new(&rx, &wire, ring, false).switch(77);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut sent, mut len) = (0, 1);
            while sent < total {
                let sender = Sender::new(&tx, &wire, ring, false);
                let Some(space) = sender.reserve(len.min(total - sent)).unwrap() else {
                    std::thread::yield_now();
                    continue;
                };
                let bytes: Vec<u8> = (sent..sent + space.len).map(byte_at).collect();
                // SAFETY: the slice is as long as the reservation.
                unsafe { sender.fill(space, 0, bytes.as_ptr(), bytes.len()) };
                sender.publish();
                sent += space.len;
                // Short messages rewind an empty ring, long ones wrap.
                len = if sent / 40_000 % 2 == 0 {
                    len % 63 + 1
                } else {
                    len % 3001 + 37
                };
            }
        });
        let (mut got, mut bytes) = (0, vec![0_u8; RING]);
        while got < total {
            let receiver = Receiver::new(&rx, &wire, ring, false);
            let Some(available) = receiver.available().unwrap() else {
                std::thread::yield_now();
                continue;
            };
            let len = available.len.min(got % 1000 + 1) as usize;
            // SAFETY: the buffer has a ring's length.
            unsafe { receiver.copy(available, 0, bytes.as_mut_ptr(), len) };
            assert!(receiver.consume(available, len as u64));
            receiver.publish();
            for byte in &bytes[..len] {
                assert_eq!(*byte, byte_at(got));
                got += 1;
            }
        }
    });
}

/// A pattern that no shift by a power of two maps to itself.
fn byte_at(position: u64) -> u8 {
    (position % 251) as u8
}
