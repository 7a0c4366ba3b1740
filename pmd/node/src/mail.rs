//! How the threads of a node tell each other things: bounded queues, and an eventfd for a reader that
//! sleeps. Who puts something makes a system call only when the reader sleeps.

use crate::stream::NodeStream;
use crossbeam_queue::ArrayQueue;
use rdsock_vfio::{EventFd, EventFlags};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// Wakes one thread.
#[derive(Debug)]
pub struct Waker {
    event: EventFd,
    asleep: AtomicBool,
}

impl Waker {
    /// For a thread that is awake.
    pub fn new() -> std::io::Result<Self> {
        let flags = EventFlags::EFD_CLOEXEC | EventFlags::EFD_NONBLOCK;
        Ok(Waker {
            event: EventFd::from_value_and_flags(0, flags)?,
            asleep: AtomicBool::new(false),
        })
    }

    /// To be called after something was put where the thread looks before it sleeps.
    #[inline]
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::AcqRel) {
            // It fails only when it is full, and then the thread wakes anyway.
            let _ = self.event.write(1);
        }
    }

    /// The thread is about to sleep until the descriptor is readable. It looks once more after this.
    pub fn start_sleep(&self) {
        self.asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The thread is awake.
    pub fn end_sleep(&self) {
        self.asleep.store(false, Ordering::Relaxed);
        let _ = self.event.read();
    }

    /// What becomes readable.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// A queue with a reader that may sleep.
#[derive(Debug)]
pub struct Mail<T> {
    queue: ArrayQueue<T>,
    waker: Arc<Waker>,
}

impl<T> Mail<T> {
    /// Takes up to `most`, for the thread of `waker`.
    pub fn new(most: usize, waker: Arc<Waker>) -> Self {
        Mail {
            queue: ArrayQueue::new(most),
            waker,
        }
    }

    /// Puts something; gives it back when the queue is full.
    pub fn put(&self, item: T) -> Result<(), T> {
        self.queue.push(item)?;
        self.waker.wake();
        Ok(())
    }

    /// Takes the next.
    #[inline]
    pub fn take(&self) -> Option<T> {
        self.queue.pop()
    }

    /// True when there is nothing.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// How many more fit.
    pub fn room(&self) -> usize {
        self.queue.capacity() - self.queue.len()
    }
}

/// A queue of streams to be looked at, each in it at most once: as long as there are no more streams than
/// it takes, it is never full.
#[derive(Debug)]
pub struct Look {
    mail: Mail<Arc<NodeStream>>,
    /// Index into [`NodeStream::queued`].
    side: usize,
}

impl Look {
    /// For `streams` streams. `side` is 0 for the poll core's queue, 1 for the anchors' thread's.
    pub fn new(streams: usize, waker: Arc<Waker>, side: usize) -> Self {
        Look {
            mail: Mail::new(streams, waker),
            side: side & 1,
        }
    }

    /// Has the reader look at a stream.
    pub fn put(&self, stream: &Arc<NodeStream>) {
        if !stream.queued[self.side].swap(true, Ordering::AcqRel) {
            // Not full: see above.
            let _ = self.mail.put(stream.clone());
        }
    }

    /// The next stream to look at. What is said of it from now on is told anew.
    pub fn take(&self) -> Option<Arc<NodeStream>> {
        let stream = self.mail.take()?;
        stream.queued[self.side].swap(false, Ordering::AcqRel);
        Some(stream)
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.mail.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.mail.len()
    }
}
