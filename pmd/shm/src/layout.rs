//! The layout of every structure that rdsock keeps in shared memory, in one file.
//!
//! Who writes which word stands beside it. A reader treats a word that another process writes as
//! hostile: it loads it once, checks it, and uses the copy. All structures are `repr(C)`, hold no
//! pointers and no fd numbers of another process, and have their offsets asserted below.
//! `docs/shared-memory.md` draws the same picture for people.

use crate::sync::{AtomicI32, AtomicU32, AtomicU64};

/// Version of every layout in this file and of the control messages; both sides must agree.
pub const VERSION: u32 = 6;

/// First word of a [`StreamHeader`].
pub const STREAM_MAGIC: u64 = u64::from_le_bytes(*b"rdsockST");
/// First word of an [`EndPage`].
pub const END_MAGIC: u64 = u64::from_le_bytes(*b"rdsockEN");
/// First word of a [`TenantHeader`].
pub const TENANT_MAGIC: u64 = u64::from_le_bytes(*b"rdsockTN");
/// First word of a [`BellBoard`].
pub const BELL_MAGIC: u64 = u64::from_le_bytes(*b"rdsockBL");

/// Value of [`Producer::switch_at`] until the sender has moved its direction to the ring.
pub const NOT_SWITCHED: u64 = u64::MAX;

/// Smallest ring, in bytes.
pub const MIN_RING: u64 = 4096;
/// Largest ring, in bytes.
pub const MAX_RING: u64 = 1 << 30;

/// Marks that a producer leaves for its consumer, in [`Producer::mark`].
pub mod mark {
    /// The direction ends at `head`, as after `shutdown(SHUT_WR)` or the last close.
    pub const FIN: u32 = 1;
    /// The ring ends at `head`; the rest comes on the anchor.
    pub const END: u32 = 2;
    /// The connection is broken: the other end reports ECONNRESET.
    pub const RESET: u32 = 4;
}

/// Bits of the words that ask the other end for something: [`Ask::want`].
pub mod want {
    /// Set the asker's bit on its bell board.
    pub const BELL: u32 = 1;
    /// Send one byte on the anchor.
    pub const WAKE: u32 = 2;
    /// The other end is now ringing: it has taken BELL or WAKE and has not finished.
    pub const RINGING: u32 = 4;
    /// The asker has left the rings for ever and reads and writes the anchor. Sticky.
    pub const DEMOTED: u32 = 8;
    /// The asker has closed its last descriptor. Sticky.
    pub const CLOSED: u32 = 16;
    /// The asker has ended its own direction, and asks the other end to end its one as well. It
    /// goes on reading the ring until that is done. Sticky.
    pub const LEAVE: u32 = 32;
    /// The asker has shut both directions: it may read what is there, and takes nothing more. Sticky.
    pub const SHUT: u32 = 64;
    /// Wake the thread that sleeps on this word (FUTEX_WAKE). Of requests for bytes alone.
    pub const NAP: u32 = 128;
}

/// What the producer of a direction tells its consumer. One cache line, written by the producer.
#[repr(C, align(128))]
#[derive(Debug)]
#[cfg_attr(loom, derive(Default))]
pub struct Producer {
    /// Position after the last published byte.
    pub head: AtomicU64,
    /// Position that lies at offset 0 of the ring. Changes only while the ring is empty.
    pub origin: AtomicU64,
    /// Position of the first byte that went to the ring, or [`NOT_SWITCHED`].
    pub switch_at: AtomicU64,
    /// Bits of [`mark`].
    pub mark: AtomicU32,
    /// Wake bytes that this end has sent on the anchor; counted before each is sent.
    pub wakes: AtomicU32,
    /// 1 when the processes of this end take part in global expedited membarriers.
    pub barriers: AtomicU32,
}

/// What the consumer of a direction tells its producer. One cache line, written by the consumer.
#[repr(C, align(128))]
#[derive(Debug)]
#[cfg_attr(loom, derive(Default))]
pub struct Consumer {
    /// Position after the last consumed byte.
    pub tail: AtomicU64,
    /// 1 when the consumer knows its position on the anchor, so that the producer may switch.
    pub ready: AtomicU32,
    _pad: u32,
    /// With [`want::DEMOTED`]: where the consumer left the ring; the producer sends the rest of
    /// the ring again on the anchor, from here.
    pub stop: AtomicU64,
}

/// A request to the other end, on a line of its own: it is read after every publication, and
/// written only by an end that goes to sleep.
#[repr(C, align(128))]
#[derive(Debug)]
#[cfg_attr(loom, derive(Default))]
pub struct Ask {
    /// Bits of [`want`]. The asker sets; the asked end clears BELL, WAKE and NAP, and sets and clears
    /// RINGING.
    pub want: AtomicU32,
    /// The asker's bell number and bit, as made by [`crate::bell::Place::to_word`].
    pub place: AtomicU32,
    /// 1 while the asker promises a barrier on the other end's threads before it sleeps, so that
    /// these need none of their own: see [`crate::wake`].
    pub hot: AtomicU32,
    /// Where the asker is a poll core: the number of the core that it runs on, or slept on, plus 1.
    /// Else 0. On the same core, the other end has to give way before it is noticed.
    pub core: AtomicU32,
}

/// One direction of a stream.
#[repr(C, align(128))]
#[derive(Debug)]
#[cfg_attr(loom, derive(Default))]
pub struct Direction {
    /// Written by the producer.
    pub producer: Producer,
    /// Written by the consumer.
    pub consumer: Consumer,
    /// Asked by the consumer, which waits for bytes.
    pub bytes: Ask,
    /// Asked by the producer, which waits for space.
    pub space: Ask,
}

/// The start of a stream's memory, shared by its two ends and nobody else.
///
/// Behind it, at `data_offset`, lie the two rings of `ring_size` bytes each: first the ring of
/// direction 0. Direction `d` is produced by end `d` and consumed by end `1 - d`; end 0 is the
/// one that called `connect`.
#[repr(C, align(128))]
#[derive(Debug)]
pub struct StreamHeader {
    /// [`STREAM_MAGIC`]. This and the next five are written by the daemon before it hands out
    /// the memory; the ends use the copies in their PROMOTE message, never these.
    pub magic: u64,
    /// [`VERSION`].
    pub version: u32,
    /// `size_of::<StreamHeader>()`.
    pub header_size: u32,
    /// The daemon's number of the stream.
    pub stream_id: u64,
    /// Bytes of each ring, a power of two.
    pub ring_size: u64,
    /// Offset of the first ring.
    pub data_offset: u64,
    _pad: [u64; 11],
    /// The two directions.
    pub directions: [Direction; 2],
}

/// The sending half of one end: state that the processes holding this end share (after `fork`),
/// and that the other end cannot see.
#[repr(C, align(128))]
#[derive(Debug)]
#[cfg_attr(loom, derive(Default))]
pub struct TxState {
    /// Owner of this half, see [`crate::lock`].
    pub lock: AtomicU64,
    /// Position after the last byte that was reserved and written.
    pub head: AtomicU64,
    /// What [`Producer::head`] was last set to: its line is the consumer's most of the time, and
    /// what lies there could have been written by the other end.
    pub published: AtomicU64,
    /// Own copy of [`Producer::origin`].
    pub origin: AtomicU64,
    /// The consumer's tail when last looked at.
    pub seen_tail: AtomicU64,
    /// [`phase`] of this direction.
    pub phase: AtomicU32,
    /// Threads and processes inside a kernel send on the anchor.
    pub in_kernel: AtomicU32,
    /// `shutdown(SHUT_WR)` was called.
    pub shut: AtomicU32,
    /// In `phase::LEAVING`: position of the next byte that goes out again on the anchor; with the highest bit ([`AGAIN`])
    /// while a send of it is under way.
    pub again: AtomicU64,
    /// In `phase::LEAVING`: what the program has said of a close (`SO_LINGER`: 1 for on in the upper half, and seconds). The
    /// kernel has been told otherwise, so that the connection breaks when everybody who holds it ends.
    pub linger: AtomicU64,
}

/// In [`TxState::again`]: bytes from there on are being sent, and nobody knows yet how many.
pub const AGAIN: u64 = 1 << 63;

/// The receiving half of one end. See [`TxState`].
#[repr(C, align(128))]
#[derive(Debug)]
#[cfg_attr(loom, derive(Default))]
pub struct RxState {
    /// Owner of this half, see [`crate::lock`].
    pub lock: AtomicU64,
    /// Position after the last byte given to the program.
    pub tail: AtomicU64,
    /// What [`Consumer::tail`] was last set to.
    pub published: AtomicU64,
    /// The producer's head when last looked at.
    pub seen_head: AtomicU64,
    /// [`phase`] of this direction.
    pub phase: AtomicU32,
    /// Threads and processes inside a kernel receive on the anchor.
    pub in_kernel: AtomicU32,
    /// Wake bytes of the other end that were taken off the anchor.
    pub drained: AtomicU32,
    /// `shutdown(SHUT_RD)` was called.
    pub shut: AtomicU32,
    /// What the anchor told last: bits of [`anchor`].
    pub anchor: AtomicU32,
    /// Receives that found bytes since the last sleep.
    pub quiet_calls: AtomicU32,
    /// Threads that sleep in the kernel on the anchor, for bytes or for space.
    pub waiters: AtomicU32,
    /// 1 when the producer, which may wait for space, is still to be told of some.
    pub space_due: AtomicU32,
    /// When a would-be sleeper first gave way to those counted in `waiters`: in milliseconds (upper
    /// half), and `drained` at that time.
    pub gave_way: AtomicU64,
    /// Who is counted in `waiters`, as far as there is room: process (upper half) and thread, or 0. So
    /// those are found who were killed or cancelled in their sleep.
    pub sleepers: [AtomicU64; SLEEPERS],
    /// The thread that asks by NAP, named as in `sleepers`, or 0.
    pub napper: AtomicU64,
}

/// Entries of [`RxState::sleepers`].
pub const SLEEPERS: usize = if cfg!(loom) { 2 } else { 6 };

/// Where the bytes of a direction travel, in [`TxState::phase`] and [`RxState::phase`].
pub mod phase {
    /// On the anchor, as since birth.
    pub const ANCHOR: u32 = 0;
    /// Receiver: on the anchor up to `switch_at`, then on the ring. Not used by senders.
    pub const SWITCHING: u32 = 1;
    /// On the ring.
    pub const RING: u32 = 2;
    /// On the anchor again, for ever.
    pub const DEMOTED: u32 = 3;
    /// Broken: ECONNRESET.
    pub const RESET: u32 = 4;
    /// Sender: what the other end has left in the ring goes out again on the anchor, before anything else does. Not used by
    /// receivers.
    pub const LEAVING: u32 = 5;
}

/// What an end has seen on its anchor, in [`RxState::anchor`].
pub mod anchor {
    /// The peer's FIN.
    pub const EOF: u32 = 1;
    /// An error of the anchor waits for a receive. On a stream that was reset: it was reported.
    pub const ERROR: u32 = 2;
    /// On a stream that was reset: a send has reported it.
    pub const SEND_ERROR: u32 = 4;
    /// The anchor has ended with an error, whether it was reported or not.
    pub const BROKEN: u32 = 8;
}

/// Entries of [`EndPage::held_by`].
pub const HOLDERS: usize = if cfg!(loom) { 2 } else { 16 };

/// What stands beside a process's number in [`EndPage::held_by`].
pub mod holder {
    /// The bits of the number: Linux gives out none from `PID_MAX_LIMIT` on, which is 2^22.
    pub const PID: u32 = (1 << 22) - 1;
    /// It is about to run another program, which does not get the end.
    pub const GOING: u32 = 1 << 30;
    /// It is about to close its last descriptor.
    pub const CLOSING: u32 = 1 << 31;
}

/// State of one end, in memory of its own: the other end must not be able to write it.
#[repr(C, align(128))]
#[derive(Debug)]
#[cfg_attr(loom, derive(Default))]
pub struct EndPage {
    /// [`END_MAGIC`].
    pub magic: u64,
    /// [`VERSION`].
    pub version: u32,
    /// 0 or 1.
    pub end: u32,
    /// The daemon's number of the stream.
    pub stream_id: u64,
    /// Processes that hold this end, each counted before it comes to be.
    pub holders: AtomicU32,
    /// 1 while the open file description is O_NONBLOCK.
    pub nonblock: AtomicU32,
    /// Why the stream was demoted or reset: a [`crate::reason::Reason`], 0 for none.
    pub reason: AtomicU32,
    /// 1 once the end was set up by the first process that mapped it.
    pub installed: AtomicU32,
    /// Who is counted in `holders`, as far as it has said so: its process number and bits of [`holder`], or 0.
    pub held_by: [AtomicU32; HOLDERS],
    _pad: [u64; 3],
    /// Sending half.
    pub tx: TxState,
    /// Receiving half.
    pub rx: RxState,
}

/// Requests that fit into a tenant's queue. A power of two.
pub const QUEUE_SLOTS: usize = if cfg!(loom) { 2 } else { 256 };
/// Connections that a tenant can describe.
pub const CONN_RECORDS: usize = 65536;

/// One request of a tenant to the daemon: see [`crate::queue`].
#[repr(C, align(128))]
#[derive(Debug)]
#[cfg_attr(loom, derive(Default))]
pub struct QueueSlot {
    /// Position + 1 when the slot is full.
    pub sequence: AtomicU64,
    /// The request, as words of [`crate::control::Request`].
    pub words: [AtomicU64; 15],
}

/// What a tenant says of one of its TCP connections, for `rdsock why`.
#[repr(C, align(32))]
#[derive(Debug)]
pub struct ConnRecord {
    /// The tenant's fd, -1 when the record is free.
    pub fd: AtomicI32,
    /// A [`crate::reason::State`].
    pub state: AtomicU32,
    /// A [`crate::reason::Reason`].
    pub reason: AtomicU32,
    /// Counts the uses of this record.
    pub generation: AtomicU32,
    /// The stream, 0 for none.
    pub stream_id: AtomicU64,
    _pad: u64,
}

/// A tenant's memory, shared with the daemon alone, which makes it.
#[repr(C, align(128))]
#[derive(Debug)]
pub struct TenantHeader {
    /// [`TENANT_MAGIC`].
    pub magic: u64,
    /// [`VERSION`].
    pub version: u32,
    /// `size_of::<TenantMemory>()`.
    pub size: u32,
    _pad0: [u64; 14],
    /// Written by the daemon: messages that it has sent on the control socket, behind WELCOME.
    pub messages: AtomicU64,
    _pad1: [u64; 15],
    /// Written by the daemon: 1 while it sleeps and wants a KICK after a request.
    pub daemon_sleeps: AtomicU32,
    /// Written by the daemon: requests taken off the queue.
    pub taken: AtomicU32,
    _pad2: [u64; 15],
    /// Written by the tenant: counters for `rdsock stat`, by [`Counter`].
    pub counters: [AtomicU64; 16],
}

/// Index into [`TenantHeader::counters`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Counter {
    /// Streams that this tenant mapped.
    Promoted = 0,
    /// Streams that it left for the kernel.
    Demoted = 1,
    /// Streams that it broke because shared memory or the anchor held what it must not hold.
    Reset = 2,
    /// Wake bytes sent.
    Wakes = 3,
    /// Times it slept in the kernel for a stream.
    Sleeps = 4,
    /// Bells rung.
    Bells = 5,
    /// Announcements that found the queue full.
    QueueFull = 6,
    /// Times it slept on the word of a request.
    Naps = 7,
}

/// Networks of other nodes that a tenant is told of.
pub const ROUTES: usize = 64;

/// A network that belongs to another node, written by the daemon.
#[repr(C, align(32))]
#[derive(Debug)]
pub struct RouteEntry {
    /// Network address; IPv4 as a v4-mapped IPv6 address. The 16 bytes in network order, as two
    /// words in the host's order.
    pub address: [AtomicU64; 2],
    /// Leading bits that count, 0 to 128; of an IPv4 network 96 more than usual.
    pub prefix: AtomicU32,
    /// The node's id.
    pub node: AtomicU32,
    _pad: u64,
}

/// The networks that belong to other nodes: a `connect` to one asks the daemon (REACH) first. Written
/// by the daemon, also while the tenant runs: who reads looks at `sequence` before and after.
#[repr(C, align(128))]
#[derive(Debug)]
pub struct Routes {
    /// Odd while the daemon writes.
    pub sequence: AtomicU32,
    /// Entries in use, most specific first.
    pub count: AtomicU32,
    _pad: [u64; 15],
    /// The networks.
    pub entries: [RouteEntry; ROUTES],
}

/// The whole of a tenant's memory.
#[repr(C, align(128))]
#[derive(Debug)]
pub struct TenantMemory {
    /// Identity, message count, counters.
    pub header: TenantHeader,
    /// Requests to the daemon.
    pub queue: [QueueSlot; QUEUE_SLOTS],
    /// One record for each TCP connection.
    pub conns: [ConnRecord; CONN_RECORDS],
    /// Networks that belong to other nodes.
    pub routes: Routes,
}

/// Bells of a tenant: one for each epoll instance that holds streams.
pub const BELLS: usize = 64;
/// Streams that one bell can tell apart.
pub const BELL_BITS: usize = if cfg!(loom) { 128 } else { 4096 };

/// The readiness bitmap of one epoll instance. The tenant's peers set bits, the tenant takes them.
#[repr(C, align(128))]
#[derive(Debug)]
#[cfg_attr(loom, derive(Default))]
pub struct Bell {
    /// Bit `w` is set after a bit of `words[w]` was set.
    pub summary: AtomicU64,
    /// Threads asleep in the kernel on this epoll instance; whoever sets a bit while this is not
    /// 0 also sends a wake byte. Written by the tenant.
    pub sleepers: AtomicU32,
    _pad: u32,
    _pad1: [u64; 14],
    /// One bit for each stream.
    pub words: [AtomicU64; BELL_BITS / 64],
}

/// All bells of a tenant: memory that every peer of the tenant maps.
#[repr(C, align(128))]
#[derive(Debug)]
pub struct BellBoard {
    /// [`BELL_MAGIC`].
    pub magic: u64,
    /// [`VERSION`].
    pub version: u32,
    /// `size_of::<BellBoard>()`.
    pub size: u32,
    _pad: [u64; 14],
    /// The bells.
    pub bells: [Bell; BELLS],
}

/// Offset of the first ring in a stream's memory: behind the header, in its page. A stream of small
/// messages stays in the first [`crate::ring::REWIND_AFTER`] bytes of each ring, so an idle one has
/// two pages here and two end pages.
pub const DATA_OFFSET: u64 = 2048;

/// Bytes of a stream's memory with rings of `ring_size` bytes, before rounding to huge pages.
pub const fn stream_bytes(ring_size: u64) -> u64 {
    DATA_OFFSET + 2 * ring_size
}

#[cfg(not(loom))]
mod assertions {
    use super::*;
    use std::mem::{offset_of, size_of};

    const _: () = {
        assert!(size_of::<Producer>() == 128);
        assert!(offset_of!(Producer, head) == 0);
        assert!(offset_of!(Producer, origin) == 8);
        assert!(offset_of!(Producer, switch_at) == 16);
        assert!(offset_of!(Producer, mark) == 24);
        assert!(offset_of!(Producer, wakes) == 28);
        assert!(offset_of!(Producer, barriers) == 32);
        assert!(size_of::<Consumer>() == 128);
        assert!(offset_of!(Consumer, tail) == 0);
        assert!(offset_of!(Consumer, ready) == 8);
        assert!(offset_of!(Consumer, stop) == 16);
        assert!(size_of::<Ask>() == 128);
        assert!(offset_of!(Ask, want) == 0);
        assert!(offset_of!(Ask, place) == 4);
        assert!(offset_of!(Ask, hot) == 8);
        assert!(offset_of!(Ask, core) == 12);
        assert!(size_of::<Direction>() == 512);
        assert!(offset_of!(Direction, producer) == 0);
        assert!(offset_of!(Direction, consumer) == 128);
        assert!(offset_of!(Direction, bytes) == 256);
        assert!(offset_of!(Direction, space) == 384);
        assert!(size_of::<StreamHeader>() == 1152);
        assert!(size_of::<StreamHeader>() as u64 <= DATA_OFFSET);
        assert!(offset_of!(StreamHeader, magic) == 0);
        assert!(offset_of!(StreamHeader, version) == 8);
        assert!(offset_of!(StreamHeader, header_size) == 12);
        assert!(offset_of!(StreamHeader, stream_id) == 16);
        assert!(offset_of!(StreamHeader, ring_size) == 24);
        assert!(offset_of!(StreamHeader, data_offset) == 32);
        assert!(offset_of!(StreamHeader, directions) == 128);
        assert!(size_of::<TxState>() == 128);
        assert!(offset_of!(TxState, phase) == 40);
        assert!(offset_of!(TxState, again) == 56);
        assert!(offset_of!(TxState, linger) == 64);
        assert!(size_of::<RxState>() == 128);
        assert!(offset_of!(RxState, phase) == 32);
        assert!(offset_of!(RxState, sleepers) == 72);
        assert!(offset_of!(RxState, napper) == 120);
        assert!(size_of::<EndPage>() == 384);
        assert!(offset_of!(EndPage, holders) == 24);
        assert!(offset_of!(EndPage, held_by) == 40);
        assert!(offset_of!(EndPage, tx) == 128);
        assert!(offset_of!(EndPage, rx) == 256);
        assert!(size_of::<QueueSlot>() == 128);
        assert!(size_of::<ConnRecord>() == 32);
        assert!(offset_of!(ConnRecord, stream_id) == 16);
        assert!(offset_of!(TenantHeader, messages) == 128);
        assert!(offset_of!(TenantHeader, daemon_sleeps) == 256);
        assert!(offset_of!(TenantHeader, taken) == 260);
        assert!(offset_of!(TenantHeader, counters) == 384);
        assert!(size_of::<TenantHeader>() == 512);
        assert!(offset_of!(TenantMemory, queue) == 512);
        assert!(offset_of!(TenantMemory, conns) == 512 + 128 * QUEUE_SLOTS);
        assert!(offset_of!(TenantMemory, routes) == 512 + 128 * QUEUE_SLOTS + 32 * CONN_RECORDS);
        assert!(size_of::<RouteEntry>() == 32);
        assert!(offset_of!(RouteEntry, prefix) == 16);
        assert!(offset_of!(RouteEntry, node) == 20);
        assert!(size_of::<Routes>() == 128 + 32 * ROUTES);
        assert!(offset_of!(Routes, entries) == 128);
        assert!(size_of::<Bell>() == 640);
        assert!(offset_of!(Bell, sleepers) == 8);
        assert!(offset_of!(Bell, words) == 128);
        assert!(offset_of!(BellBoard, bells) == 128);
        assert!(BELL_BITS / 64 <= 64);
    };
}
