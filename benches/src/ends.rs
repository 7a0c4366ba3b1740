//! Both ends of a stream on its rings, over a socket that is never used: what the shim does between a program's call and the ring.

use rdsock_shm::end::{
    Anchor, Buffers, End, Got, How, Patience, Process, Received, Sent, Shared, Shut, Take, Until,
};
use rdsock_shm::layout::{Counter, Direction, EndPage, NOT_SWITCHED};
use rdsock_shm::lock::Owner;
use rdsock_shm::reason::Reason;
use rdsock_shm::ring::RingMemory;
use std::sync::atomic::Ordering::Relaxed;

/// Both ends of a stream.
#[derive(Debug)]
pub struct Ends {
    shared: [Shared; 2],
    // What `shared` leads to.
    _directions: Box<[Direction; 2]>,
    _pages: Box<[EndPage; 2]>,
    _memory: Box<[u64]>,
}

/// A connection that nothing has been sent on, and a process of one thread.
#[derive(Clone, Copy, Debug)]
struct Unused;

impl Ends {
    /// Both directions on rings of `size` bytes, a power of two.
    pub fn new(size: usize) -> Self {
        let mut memory = vec![0_u64; 2 * size / 8].into_boxed_slice();
        // SAFETY: made of integers and their atomics, for which zeroes are a value.
        let (directions, pages): (Box<[Direction; 2]>, Box<[EndPage; 2]>) =
            unsafe { (Box::new(std::mem::zeroed()), Box::new(std::mem::zeroed())) };
        for direction in &*directions {
            direction.producer.switch_at.store(NOT_SWITCHED, Relaxed);
        }
        let start: *mut u8 = memory.as_mut_ptr().cast();
        // SAFETY: the boxes live as long as what leads to them, and nobody else uses the memory.
        let shared = unsafe {
            let rings = [0, 1].map(|number| RingMemory::new(start.add(number * size), size as u64));
            [0, 1].map(|number: usize| {
                Shared::new(
                    directions.as_ptr(),
                    pages.as_ptr().add(number),
                    std::ptr::null(),
                    rings,
                    number as u32,
                )
            })
        };
        let ends = Ends {
            shared,
            _directions: directions,
            _pages: pages,
            _memory: memory,
        };
        for number in [0, 1] {
            ends.end(number).promote(true);
            ends.shared[number].page().holders.store(1, Relaxed);
        }
        assert_eq!(ends.send(&[1]), 1);
        assert_eq!(ends.receive(&mut [0]), 1);
        ends
    }

    #[inline]
    fn end(&self, number: usize) -> End<'_, Unused> {
        End {
            shared: &self.shared[number],
            socket: Unused,
        }
    }

    /// Sends from the first end, as much as fits at once; how much.
    #[inline]
    pub fn send(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        let part = part(bytes.as_ptr().cast_mut(), bytes.len());
        // SAFETY: one entry, valid for the call; the bytes are only read.
        if let Ok(from) = unsafe { Buffers::new(&part, 1, |_| Ok::<_, ()>(())) } {
            let sent = self.end(0).send(&from, &mut done);
            debug_assert!(matches!(sent, Sent::All | Sent::Full));
        }
        done
    }

    /// Receives at the second end what is there; how much.
    #[inline]
    pub fn receive(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        let part = part(bytes.as_mut_ptr(), bytes.len());
        // SAFETY: one entry, valid for the call.
        if let Ok(to) = unsafe { Buffers::new(&part, 1, |_| Ok::<_, ()>(())) } {
            let received = self.end(1).receive(&to, How::default(), &mut done);
            debug_assert!(matches!(received, Received::Bytes | Received::Nothing));
        }
        done
    }
}

fn part(start: *mut u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: start.cast(),
        iov_len: len,
    }
}

impl Anchor for Unused {
    unsafe fn send(&self, _: *const u8, _: usize) -> Got {
        Got::Nothing
    }

    fn peek(&self) -> Got {
        Got::Nothing
    }

    unsafe fn take(&self, _: *mut u8, _: usize, _: Take) -> Got {
        Got::Nothing
    }

    fn unread(&self) -> Option<u64> {
        Some(0)
    }

    fn sent(&self) -> Option<u64> {
        Some(0)
    }

    fn received(&self) -> Option<u64> {
        Some(0)
    }

    fn is_open(&self) -> bool {
        true
    }

    fn shut(&self, _: Shut) {}

    fn break_at_close(&self) {}

    fn wait(&self, _: Until, _: u32) -> bool {
        false
    }

    fn wait_fd(&self) -> i32 {
        -1
    }
}

impl Process for Unused {
    #[inline]
    fn me(&self) -> Owner {
        const { Owner::new(1, 16) }
    }

    /// As where a program has threads.
    #[inline]
    fn is_alone(&self) -> bool {
        false
    }

    fn is_sending(&self) -> bool {
        false
    }

    fn give_way(&self) {}

    fn rest(&self) {}

    fn milliseconds(&self) -> u64 {
        0
    }

    fn patience(&self) -> Patience<'_> {
        Patience {
            spent: None,
            most: 0,
            every: 0,
        }
    }

    fn is_running(&self, _: u32) -> bool {
        true
    }

    fn name(&self) -> u64 {
        1
    }

    fn is_awake(&self, _: u64) -> bool {
        true
    }

    fn barrier(&self) {}

    fn has_barriers(&self) -> bool {
        false
    }

    fn count(&self, _: Counter) {}

    fn look_later(&self) {}

    fn broken(&self, _: Reason) {}

    fn left(&self, _: Reason) {}
}
