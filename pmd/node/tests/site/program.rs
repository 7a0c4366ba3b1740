//! A program whose end of a stream is on rings, as the shim would have it.

use super::LIMIT;
use memmap2::{MmapOptions, MmapRaw};
use rdsock_node::memory::stream_bytes;
use rdsock_shm::layout::{DATA_OFFSET, Direction, RxState, StreamHeader, TxState, mark, want};
use rdsock_shm::ring::{Receiver, RingMemory, Sender};
use rdsock_shm::wake;
use rdsock_shm::wake::WAKE_BYTE;
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering::*;
use std::time::Instant;

pub struct Program {
    map: MmapRaw,
    end: usize,
    pub anchor: TcpStream,
    tx: Box<TxState>,
    rx: Box<RxState>,
    /// Bytes of data received and sent on the anchor.
    received: u64,
    sent: u64,
    on_ring: bool,
    drained: u32,
}

impl Program {
    pub fn new(file: &File, end: usize, anchor: TcpStream) -> Self {
        let program = Self::unready(file, end, anchor);
        program.incoming().consumer.ready.store(1, Release);
        program
    }

    /// One that can't read its ring yet.
    pub fn unready(file: &File, end: usize, anchor: TcpStream) -> Self {
        let map = MmapOptions::new().map_raw(file).unwrap();
        // SAFETY: made of integers; zeroes are a value.
        let (tx, rx) = unsafe { (Box::new(std::mem::zeroed()), Box::new(std::mem::zeroed())) };
        Program {
            map,
            end,
            anchor,
            tx,
            rx,
            received: 0,
            sent: 0,
            on_ring: false,
            drained: 0,
        }
    }

    fn direction(&self, number: usize) -> &Direction {
        let header: *const StreamHeader = self.map.as_ptr().cast();
        // SAFETY: the header is the start of the mapping; a direction is made of atomics.
        unsafe { &(&(*header).directions)[number] }
    }

    pub fn out(&self) -> &Direction {
        self.direction(self.end)
    }

    pub fn incoming(&self) -> &Direction {
        self.direction(1 - self.end)
    }

    fn ring(&self, number: usize) -> RingMemory {
        let size = (self.map.len() as u64 - stream_bytes(0)) / 2;
        let at = DATA_OFFSET as usize + number * size as usize;
        // SAFETY: within the mapping, which the program keeps.
        unsafe { RingMemory::new(self.map.as_mut_ptr().add(at), size) }
    }

    pub fn sender(&self) -> Sender<'_> {
        Sender::new(&self.tx, self.out(), self.ring(self.end), false)
    }

    fn receiver(&self) -> Receiver<'_> {
        Receiver::new(&self.rx, self.incoming(), self.ring(1 - self.end), false)
    }

    pub fn send_on_anchor(&mut self, bytes: &[u8]) {
        self.anchor.write_all(bytes).unwrap();
        self.sent += bytes.len() as u64;
    }

    /// Moves what is sent from here on to the ring.
    pub fn switch(&mut self) {
        let end = Instant::now() + LIMIT;
        while self.out().consumer.ready.load(Acquire) == 0 {
            assert!(Instant::now() < end, "the daemon is not ready");
            std::thread::yield_now();
        }
        self.sender().switch(self.sent);
    }

    fn answer(&mut self) {
        if wake::asked(&self.out().bytes) & want::WAKE != 0
            && wake::take(&self.out().bytes.want) & want::WAKE != 0
        {
            self.wake();
            wake::rung(&self.out().bytes.want);
        }
        if wake::asked(&self.incoming().space) & want::WAKE != 0
            && wake::take(&self.incoming().space.want) & want::WAKE != 0
        {
            self.wake();
            wake::rung(&self.incoming().space.want);
        }
    }

    pub fn wake(&mut self) {
        self.out().producer.wakes.fetch_add(1, AcqRel);
        self.anchor.write_all(&[WAKE_BYTE]).unwrap();
    }

    /// Sends on the ring; waits for space asleep on the anchor.
    pub fn send(&mut self, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let sender = self.sender();
            match sender.reserve((bytes.len() - done) as u64).unwrap() {
                Some(space) => {
                    let part = &bytes[done..];
                    // SAFETY: the slice is at least as long as the reservation.
                    unsafe { sender.fill(space, 0, part.as_ptr(), space.len as usize) };
                    sender.publish();
                    done += space.len as usize;
                    self.answer();
                }
                None => {
                    wake::ask(&self.out().space.want, want::WAKE);
                    if self.sender().space().unwrap() == 0 {
                        self.sleep();
                    }
                }
            }
        }
    }

    /// Sleeps until a wake byte comes.
    fn sleep(&mut self) {
        let mut byte = [0];
        if let Err(error) = self.anchor.read_exact(&mut byte) {
            panic!("{error}; in {:?} out {:?}", self.incoming(), self.out());
        }
        self.drained += 1;
        assert_eq!(byte[0], WAKE_BYTE, "only wake bytes come on the anchor");
        assert!(self.drained <= self.incoming().producer.wakes.load(Acquire));
    }

    /// Receives some bytes; none at the end of the direction.
    pub fn receive(&mut self, most: usize) -> Vec<u8> {
        loop {
            if !self.on_ring {
                let switch_at = Receiver::switch_at(self.incoming());
                if switch_at == Some(self.received) {
                    self.receiver().switch(self.received);
                    self.on_ring = true;
                    continue;
                }
                wake::ask(&self.incoming().bytes.want, want::WAKE);
                if Receiver::switch_at(self.incoming()) != switch_at {
                    continue;
                }
                // What there is when it has not switched is data, and looked at once more if it has.
                self.anchor.peek(&mut [0]).unwrap();
                let now = Receiver::switch_at(self.incoming());
                let left = now.map_or(most as u64, |at| at - self.received);
                let mut bytes = vec![0; most.min(left as usize)];
                if bytes.is_empty() {
                    continue;
                }
                let got = self.anchor.read(&mut bytes).unwrap();
                bytes.truncate(got);
                self.received += got as u64;
                return bytes;
            }
            let ended = self.incoming().producer.mark.load(Acquire) & mark::FIN != 0;
            let receiver = self.receiver();
            if let Some(available) = receiver.available().unwrap() {
                let len = most.min(available.len as usize);
                let mut bytes = vec![0; len];
                // SAFETY: the buffer has `len` bytes.
                unsafe { receiver.copy(available, 0, bytes.as_mut_ptr(), len) };
                assert!(receiver.consume(available, len as u64));
                receiver.publish();
                self.answer();
                return bytes;
            }
            if ended {
                return Vec::new();
            }
            wake::ask(&self.incoming().bytes.want, want::WAKE);
            let nothing = self.receiver().available_now().unwrap().is_none()
                && self.incoming().producer.mark.load(Acquire) & mark::FIN == 0;
            if nothing {
                self.sleep();
            }
        }
    }

    /// Looks for bytes on its ring, without asking for a sign, until `len` of them are there, and reads them.
    pub fn receive_awake(&mut self, len: usize) -> Vec<u8> {
        if !self.on_ring {
            while Receiver::switch_at(self.incoming()) != Some(self.received) {
                std::thread::yield_now();
            }
            self.receiver().switch(self.received);
            self.on_ring = true;
        }
        let end = Instant::now() + LIMIT;
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let receiver = self.receiver();
            let Some(available) = receiver.available_now().unwrap() else {
                assert!(Instant::now() < end, "{} of {len} came", bytes.len());
                std::thread::yield_now();
                continue;
            };
            let part = (len - bytes.len()).min(available.len as usize);
            let at = bytes.len();
            bytes.resize(at + part, 0);
            // SAFETY: the buffer has `part` bytes at `at`.
            unsafe { receiver.copy(available, 0, bytes[at..].as_mut_ptr(), part) };
            assert!(receiver.consume(available, part as u64));
            receiver.publish();
            self.answer();
        }
        bytes
    }

    pub fn receive_exactly(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let more = self.receive(len - bytes.len());
            assert!(!more.is_empty(), "the end came after {} bytes", bytes.len());
            bytes.extend(more);
        }
        bytes
    }

    /// Ends its direction, as `shutdown` does.
    pub fn shut(&mut self) {
        self.out().producer.mark.fetch_or(mark::FIN, AcqRel);
        self.answer();
    }

    /// Goes back to the anchor with what it sends.
    pub fn leave(&mut self) {
        self.out().producer.wakes.fetch_add(1, AcqRel);
        self.out().producer.mark.fetch_or(mark::END, SeqCst);
        self.anchor.write_all(&[WAKE_BYTE]).unwrap();
    }

    /// Goes back to the anchor with what it receives: it has not read any further.
    pub fn abandon(&mut self) {
        let tail = self.incoming().consumer.tail.load(Relaxed);
        self.incoming().consumer.stop.store(tail, Release);
        for ask in [&self.incoming().bytes, &self.out().space] {
            ask.want.fetch_or(want::DEMOTED, SeqCst);
        }
        self.leave();
        self.received = tail;
        while self.drained < self.incoming().producer.wakes.load(Acquire) {
            self.sleep();
        }
    }

    /// Receives on the anchor, after it has left.
    pub fn receive_on_anchor(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.anchor.read_exact(&mut bytes).unwrap();
        bytes
    }
}
