//! A stream to another node: what its poll core and the anchors' thread tell each other about it.
//!
//! The program is one end, the daemon the other: an [`End`](rdsock_shm::end::End) whose rings the engine reads and writes in
//! place. *Out* is the direction from the program to the other
//! node, which the daemon's end receives, *in* the one back. Where each direction is, how far, and what the anchor has told of its
//! end, stands in the words of that end ([`NodeStream::shared`]); here stand those that it does not have. Positions count the bytes of a direction from the connection's birth, on the
//! anchor, in the ring and between the nodes alike.

use crate::desk::{Attach, Paid, Seat};
use crate::memory::{Board, StreamMemory};
use rdsock_shm::end::{Shared, take_ask};
use rdsock_shm::layout::{AGAIN, Ask, Direction, mark, phase, want};
use rdsock_shm::wake;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// No position.
pub const NONE: u64 = u64::MAX;

/// What the poll core asks of the anchors' thread, in [`NodeStream::todo`].
pub mod todo {
    /// Bytes have arrived for a program that is still on its anchor.
    pub const ARRIVED: u32 = 1;
    /// There is room in the staging area.
    pub const ROOM: u32 = 2;
    /// Send a wake byte for the ask for bytes.
    pub const WAKE_BYTES: u32 = 4;
    /// Send a wake byte for the ask for space.
    pub const WAKE_SPACE: u32 = 8;
    /// The program has ended its ring, and the engine has come to that end: go on reading the anchor.
    pub const RESUMED: u32 = 16;
    /// The program has left the ring of what comes in: it reads the anchor again.
    pub const LEFT: u32 = 32;
    /// The stream is broken.
    pub const BROKEN: u32 = 64;
    /// The stream is over.
    pub const OVER: u32 = 128;
    /// The program may have become ready to read the ring.
    pub const READY: u32 = 256;
    /// The other end's direction has an end.
    pub const ENDED: u32 = 512;
}

/// Where a stream is carried, and by whom.
#[derive(Debug)]
pub struct Berth {
    /// The poll core.
    pub(crate) core: u16,
    /// Counts the streams of that core.
    pub(crate) load: Arc<()>,
    /// The place at the desk of its user.
    pub(crate) seat: Seat,
}

impl Berth {
    /// The poll core.
    pub fn core(&self) -> u16 {
        self.core
    }
}

/// A stream to another node.
#[derive(Debug)]
pub struct NodeStream {
    /// The daemon's number of it.
    pub ticket: u64,
    /// The other node.
    pub node: u16,
    /// Which end the program is: 0 when it called `connect`.
    pub end: usize,
    /// The poll core that carries it, for its whole life.
    pub core: u16,
    /// Held, so that the streams of that core can be counted.
    _load: Arc<()>,
    /// Where its anchor is served.
    seat: Seat,
    /// Header, rings, staging area.
    pub memory: StreamMemory,
    /// The protocol's id, 0 while there is none.
    pub id: AtomicU64,
    /// The bell board of the program that was handed the stream last.
    board: Mutex<Option<Arc<Board>>>,

    /// Anchors' thread: out, position after the last byte in the staging area.
    pub staged: AtomicU64,
    /// Anchors' thread: both directions of the anchor have ended; what the program sent may still be unread.
    pub hung_up: AtomicBool,
    /// Anchors' thread: bytes on the anchor wait for room in the staging area, and a wake byte may lie behind them.
    pub is_stalled: AtomicBool,

    /// Poll core: out, position up to which the staging area may be used again.
    pub freed: AtomicU64,
    /// Poll core: in, position of the end; [`NONE`].
    pub ends_at: AtomicU64,
    /// Bits of [`mod@todo`], set by the poll core, taken by the anchors' thread.
    pub todo: AtomicU32,

    /// It is in the queue to the poll core, to the anchors' thread.
    pub queued: [AtomicBool; 2],
    // Goes behind all else.
    _paid: Paid,
}

impl NodeStream {
    /// A stream that nothing was done for yet.
    pub(crate) fn new(
        ticket: u64,
        node: u16,
        end: usize,
        Berth { core, load, seat }: Berth,
        memory: StreamMemory,
        paid: Paid,
    ) -> Self {
        NodeStream {
            ticket,
            node,
            end: end & 1,
            core,
            _load: load,
            seat,
            memory,
            id: AtomicU64::new(0),
            board: Mutex::new(None),
            staged: AtomicU64::new(0),
            hung_up: AtomicBool::new(false),
            is_stalled: AtomicBool::new(false),
            freed: AtomicU64::new(0),
            ends_at: AtomicU64::new(NONE),
            todo: AtomicU32::new(0),
            queued: [AtomicBool::new(false), AtomicBool::new(false)],
            _paid: paid,
        }
    }

    /// A program is handed the stream, with this bell board. Without one it gets a wake byte in place of each bell.
    pub fn set_board(&self, board: Option<Board>) {
        *self.board.lock().unwrap_or_else(PoisonError::into_inner) = board.map(Arc::new);
    }

    fn board(&self) -> Option<Arc<Board>> {
        let board = self.board.lock();
        board.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has its anchors' thread do something, see [`mod@todo`].
    #[inline]
    pub(crate) fn ask(self: &Arc<Self>, what: u32) {
        self.seat.desk().ask(self, what);
    }

    /// Has its anchors' thread serve its anchor.
    pub(crate) fn attach(self: &Arc<Self>, socket: OwnedFd) {
        let stream = self.clone();
        // There is room: the queue takes one for each of the desk's streams.
        let _ = self.seat.desk().attach.put(Attach { stream, socket });
    }

    /// The daemon's end.
    #[inline]
    pub fn shared(&self) -> &Shared {
        self.memory.shared()
    }

    /// The direction from the program to the other node.
    #[inline]
    pub fn out(&self) -> &Direction {
        self.shared().incoming()
    }

    /// The direction from the other node to the program.
    #[inline]
    pub fn incoming(&self) -> &Direction {
        self.shared().out()
    }

    /// In: position after the last byte that has arrived. The poll core's.
    #[inline]
    pub fn arrived(&self) -> u64 {
        self.shared().tx().head.load(Ordering::SeqCst)
    }

    /// In: position after the last byte given to the anchor. The anchors' thread's.
    #[inline]
    pub fn given(&self) -> u64 {
        self.shared().tx().again.load(Ordering::Acquire) & !AGAIN
    }

    /// In: the program reads the ring.
    #[inline]
    pub fn is_on_ring(&self) -> bool {
        self.shared().tx().phase.load(Ordering::SeqCst) == phase::RING
    }

    /// The anchor has told of an end, or the stream is broken.
    #[inline]
    pub fn has_told(&self) -> bool {
        let rx = self.shared().rx();
        rx.anchor.load(Ordering::Acquire) != 0 || rx.phase.load(Ordering::Acquire) == phase::RESET
    }

    /// No wake byte of the program would be seen now, when it takes bytes off its ring.
    #[inline]
    pub fn is_deaf(&self) -> bool {
        self.is_stalled.load(Ordering::Acquire) && self.is_on_ring()
    }

    /// The program has closed its last descriptor.
    pub fn is_closed(&self) -> bool {
        let asks = [&self.incoming().bytes, &self.out().space];
        asks.iter()
            .any(|ask| ask.want.load(Ordering::Acquire) & want::CLOSED != 0)
    }

    /// The program has ended what it sends.
    pub fn has_shut(&self) -> bool {
        let on_anchor = self.shared().rx().anchor.load(Ordering::Acquire) != 0;
        on_anchor || self.out().producer.mark.load(Ordering::Acquire) & mark::FIN != 0
    }

    /// The program has left the ring of what comes in.
    pub fn has_left(&self) -> bool {
        self.incoming().bytes.want.load(Ordering::Acquire) & want::DEMOTED != 0
    }

    /// After something was published for a program on its ring: does what it asked for. True when
    /// a wake byte is to be sent, after which the asker is told with [`wake::rung`].
    #[inline]
    pub fn answer(&self, ask: &Ask) -> bool {
        wake::asked(ask) & (want::BELL | want::WAKE) != 0 && self.take(ask)
    }

    #[cold]
    fn take(&self, ask: &Ask) -> bool {
        let (taken, token) = take_ask(ask, |place| Some(self.board()?.ring(place)));
        if !token && taken & (want::BELL | want::WAKE) != 0 {
            wake::rung(&ask.want);
        }
        token
    }
}
