//! A desk: what an anchors' thread shares with the poll core, which asks it to look at streams, and with the control thread, which
//! brings anchors. Each stream has a place at one; with the last of them the thread ends. Nothing here waits.

use crate::mail::{Look, Mail, Waker};
use crate::stream::NodeStream;
use std::any::Any;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Streams of one thread; a user that has more has one more thread.
const STREAMS: usize = 512;
/// Descriptors that a thread costs: what it sleeps in, and what wakes it.
pub const DESCRIPTORS: u64 = 2;

/// A socket that a stream to another node has on this host.
#[derive(Debug)]
pub struct Attach {
    /// The daemon's end of the program's connection.
    pub socket: OwnedFd,
    /// The stream, which pays for it.
    pub stream: Arc<NodeStream>,
}

/// What the thread shares with the others.
#[derive(Debug)]
pub struct Desk {
    /// New anchors.
    pub attach: Mail<Attach>,
    /// Streams to look at.
    pub look: Look,
    /// Ends the thread.
    pub stop: AtomicBool,
    waker: Arc<Waker>,
    /// Streams that it serves. Once there is none, none comes.
    seats: AtomicUsize,
    most: usize,
    /// What its descriptors cost: goes behind them.
    _paid: Paid,
}

/// Held as long as there is what it pays for.
pub type Paid = Box<dyn Any + Send + Sync>;

impl Desk {
    /// For a user's first stream on a poll core, of at most so many, with that stream's place.
    pub fn new(streams: usize, paid: Paid) -> io::Result<(Arc<Self>, Seat)> {
        let waker = Arc::new(Waker::new()?);
        let most = streams.min(STREAMS);
        let desk = Arc::new(Desk {
            attach: Mail::new(most, waker.clone()),
            look: Look::new(most, waker.clone(), 1),
            stop: AtomicBool::new(false),
            waker,
            seats: AtomicUsize::new(1),
            most,
            _paid: paid,
        });
        Ok((desk.clone(), Seat(desk)))
    }

    /// A place for one more stream. `None` when there are too many, or the last has gone.
    pub fn seat(self: &Arc<Self>) -> Option<Seat> {
        let more = |seats: usize| (seats != 0 && seats < self.most).then_some(seats + 1);
        let taken = (self.seats).fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        taken.is_ok().then(|| Seat(self.clone()))
    }

    /// Asks for something, see [`todo`](mod@crate::stream::todo).
    #[inline]
    pub fn ask(&self, stream: &Arc<NodeStream>, what: u32) {
        stream.todo.fetch_or(what, Ordering::AcqRel);
        self.look.put(stream);
    }

    /// Wakes the thread.
    pub fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Ends the thread soon.
    pub fn end(&self) {
        self.stop.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// A stream's place at the desk of its user. With the last one the thread ends.
#[derive(Debug)]
pub struct Seat(Arc<Desk>);

impl Seat {
    /// Where the stream is served.
    #[inline]
    pub fn desk(&self) -> &Desk {
        &self.0
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.0.seats.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.end();
        }
    }
}
