//! The ring between one producer and one consumer: wrap, rewind, nothing lost or torn.

use crate::model::{Memory, check, direction};
use loom::thread;
use rdsock_shm::layout::{Direction, RxState, TxState};
use rdsock_shm::ring::{Receiver, Sender};
use std::sync::Arc;

struct Stream {
    tx: TxState,
    rx: RxState,
    wire: Direction,
    memory: Memory,
}

impl Stream {
    fn new(size: usize, at: u64) -> Arc<Self> {
        let stream = Stream {
            tx: TxState::default(),
            rx: RxState::default(),
            wire: direction(),
            memory: Memory::new(size),
        };
        stream.sender().switch(at);
        stream.receiver().switch(at);
        Arc::new(stream)
    }

    fn sender(&self) -> Sender<'_> {
        Sender::new(&self.tx, &self.wire, self.memory.ring(), false)
    }

    fn receiver(&self) -> Receiver<'_> {
        Receiver::new(&self.rx, &self.wire, self.memory.ring(), false)
    }
}

/// Sends the bytes `from..to`, as many at once as fit.
fn send(stream: &Stream, from: u8, to: u8) {
    let bytes: Vec<u8> = (from..to).collect();
    let mut done = 0;
    while done < bytes.len() {
        let sender = stream.sender();
        match sender.reserve((bytes.len() - done) as u64).unwrap() {
            Some(space) => {
                // SAFETY: the slice is at least as long as the reservation.
                unsafe { sender.fill(space, 0, bytes[done..].as_ptr(), space.len as usize) };
                sender.publish();
                done += space.len as usize;
            }
            None => thread::yield_now(),
        }
    }
}

/// Receives until `most` bytes are there, at most `at_once` with each call.
fn receive(stream: &Stream, most: usize, at_once: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < most {
        let receiver = stream.receiver();
        match receiver.available().unwrap() {
            Some(available) => {
                let len = at_once.min(available.len as usize);
                let mut bytes = vec![0; len];
                // SAFETY: the buffer has `len` bytes.
                unsafe { receiver.copy(available, 0, bytes.as_mut_ptr(), len) };
                assert!(receiver.consume(available, len as u64));
                receiver.publish();
                all.extend(bytes);
            }
            None => thread::yield_now(),
        }
    }
    all
}

fn run(size: usize, at: u64, messages: &'static [u8], at_once: usize) {
    check(3, move || {
        let stream = Stream::new(size, at);
        let total: u8 = messages.iter().sum();
        let producer = {
            let stream = stream.clone();
            thread::spawn(move || {
                let mut next = 0;
                for len in messages {
                    send(&stream, next, next + len);
                    next += len;
                }
            })
        };
        let got = receive(&stream, total as usize, at_once);
        assert_eq!(got, (0..total).collect::<Vec<u8>>());
        producer.join().unwrap();
    });
}

#[test]
fn a_small_ring_wraps() {
    // Messages too long for a rewind: the third one wraps.
    run(8, 5, &[4, 4, 4], 8);
}

#[test]
fn a_full_ring_goes_on_when_there_is_space() {
    run(8, 0, &[8, 6], 5);
}

#[test]
fn a_ring_that_runs_empty_rewinds() {
    // Every message is short, and after four bytes the sender starts again where it finds the ring
    // empty.
    run(8, 3, &[2, 2, 2, 2], 8);
}

#[test]
fn a_rewind_amid_partial_reads_keeps_the_order() {
    run(8, 7, &[3, 1, 3, 1], 2);
}
