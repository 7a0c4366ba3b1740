//! What the benchmarks measure: one direction of a stream in private memory ([`Stream`]), and both ends of one as they ship
//! ([`Ends`]). `cargo bench -p rdsock-benches` measures time; `tests/cost.rs` counts instructions.

mod ends;

pub use ends::Ends;
use rdsock_shm::layout::{Ask, Bell, Direction, RxState, TxState};
use rdsock_shm::ring::{Receiver, RingMemory, Sender};

/// One direction, both halves of it.
pub struct Stream {
    tx: Box<TxState>,
    rx: Box<RxState>,
    /// The shared words.
    pub wire: Box<Direction>,
    ring: RingMemory,
    memory: Box<[u64]>,
}

// SAFETY: all state is atomic, and the ring's memory is touched by its two halves only.
unsafe impl Sync for Stream {}
// SAFETY: as above.
unsafe impl Send for Stream {}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stream of {} bytes", self.memory.len() * 8)
    }
}

impl Stream {
    /// A stream on rings of `size` bytes, a power of two.
    pub fn new(size: usize) -> Self {
        let mut memory = vec![0_u64; size / 8].into_boxed_slice();
        // SAFETY: the box lives as long as the ring, and nobody else uses it.
        let ring = unsafe { RingMemory::new(memory.as_mut_ptr().cast(), size as u64) };
        // SAFETY: the structures are made of atomics, for which zeroes are a value.
        let stream = unsafe {
            Stream {
                tx: Box::new(std::mem::zeroed()),
                rx: Box::new(std::mem::zeroed()),
                wire: Box::new(std::mem::zeroed()),
                ring,
                memory,
            }
        };
        stream.sender().switch(0);
        stream.receiver().switch(0);
        stream
    }

    fn sender(&self) -> Sender<'_> {
        Sender::new(&self.tx, &self.wire, self.ring, false)
    }

    fn receiver(&self) -> Receiver<'_> {
        Receiver::new(&self.rx, &self.wire, self.ring, false)
    }

    /// Sends as much as fits at once; how much.
    #[inline]
    pub fn send(&self, bytes: &[u8]) -> usize {
        let sender = self.sender();
        let Ok(Some(space)) = sender.reserve(bytes.len() as u64) else {
            return 0;
        };
        // SAFETY: the slice is at least as long as the reservation.
        unsafe { sender.fill(space, 0, bytes.as_ptr(), space.len as usize) };
        sender.publish();
        space.len as usize
    }

    /// Receives what is there; how much.
    #[inline]
    pub fn receive(&self, bytes: &mut [u8]) -> usize {
        let receiver = self.receiver();
        let Ok(Some(available)) = receiver.available() else {
            return 0;
        };
        let len = bytes.len().min(available.len as usize);
        // SAFETY: the slice has `len` bytes.
        unsafe { receiver.copy(available, 0, bytes.as_mut_ptr(), len) };
        receiver.consume(available, len as u64);
        receiver.publish();
        len
    }
}

/// A request word.
pub fn request() -> Box<Ask> {
    // SAFETY: made of atomics, for which zeroes are a value.
    Box::new(unsafe { std::mem::zeroed() })
}

/// A bell.
pub fn bell() -> Box<Bell> {
    // SAFETY: as above.
    Box::new(unsafe { std::mem::zeroed() })
}
