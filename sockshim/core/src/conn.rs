//! The process's TCP connections: one [`Conn`] for each open one, which the table of fds (`fds.rs`) leads to. Private to the
//! process; a forked child gets a copy.
//!
//! A lookup is a few loads. Nothing here allocates, and everything may be used in a signal handler.

pub use crate::fds::{FDS, Kind, Pieces, fd_of, high_fd, kind, next_noted};
pub use crate::identity::is_single_threaded;

use crate::fds;
use crate::names::Names;
use crate::state::{PROCESS, TOLD};
use crate::stream::{Offer, Stream};
use crate::sys;
use libc::c_int;
use rdsock_shm::layout::ConnRecord;
use rdsock_shm::reason::{Reason, State};
use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering::*, fence};

/// Connections at once.
pub const CONNS: usize = rdsock_shm::layout::CONN_RECORDS;

/// Best [`Conn::spin_score`].
pub const FULL_SCORE: u32 = 8;

/// The bit in [`Conn::options`] of `TCP_INQ`, which the anchor has as well.
pub const TELLS_UNREAD: u32 = 4;

/// The bit in [`Conn::options`] of what the program has set where the [brand](crate::brand) is: the kernel is never told.
pub const SAYS_BRAND: u32 = 8;

/// Who opened the connection.
pub mod born {
    /// By `accept`.
    pub const PASSIVE: u32 = 0;
    /// By `connect`.
    pub const ACTIVE: u32 = 1;
    /// Inherited over exec.
    pub const UNKNOWN: u32 = 2;
    /// A socket that is not (yet) connected.
    pub const NOT_YET: u32 = 3;
}

/// Where a connection stands in this process.
pub mod phase {
    /// Kernel TCP; may be announced.
    pub const KERNEL: u32 = 0;
    /// The daemon knows it.
    pub const ANNOUNCED: u32 = 1;
    /// A stream is being mapped: nobody may enter the kernel with it.
    pub const INSTALLING: u32 = 2;
    /// A stream is mapped.
    pub const MAPPED: u32 = 3;
    /// Kernel TCP for ever.
    pub const NEVER: u32 = 4;
}

/// What a place in the pool is.
mod place {
    pub const FREE: u32 = 0;
    pub const IN_USE: u32 = 1;
    /// Being taken down.
    pub const GOING: u32 = 2;
    /// Being set up.
    pub const COMING: u32 = 3;
    /// Taken down, and the daemon could not be told yet.
    pub const UNTOLD: u32 = 4;
}

/// One TCP socket of this process, under one or more fds.
#[repr(align(128))]
#[derive(Debug)]
pub struct Conn {
    /// One of [`place`].
    occupied: AtomicU32,
    /// The stream that it had, and its end there, while the daemon is still to be told: [`place::UNTOLD`].
    closed_stream: AtomicU64,
    closed_end: AtomicU32,
    /// Entries of the fd table.
    pub refs: AtomicU32,
    /// Calls that use it now.
    pub users: AtomicU32,
    /// One of [`phase`].
    pub phase: AtomicU32,
    /// One of [`born`].
    pub born: AtomicU32,
    /// Counts announcements, so that a late answer is recognised.
    pub generation: AtomicU32,
    /// Send and receive calls so far, to tell a connection that lasts.
    pub calls: AtomicU32,
    /// 1 when other processes may hold it too.
    pub shared: AtomicU32,
    /// Kernel receives under way, before a stream is mapped.
    pub in_rx: AtomicU32,
    /// Kernel sends under way, likewise.
    pub in_tx: AtomicU32,
    /// How well spinning has paid: see [`crate::wait`].
    pub spin_score: AtomicU32,
    /// Short sleeps on the anchor before a receive naps: see [`crate::nap`].
    pub until_nap: AtomicU32,
    /// What is known of the program's time limit for receives: see [`crate::nap`].
    pub limited: AtomicU32,
    /// 1 when `poll` or `epoll` has seen something on the anchor since it was last looked at.
    pub look: AtomicU32,
    /// Sends that found no room and did not wait: an edge for EPOLLET, in each instance, when space comes.
    pub refused: AtomicU32,
    /// Calls of `shutdown`: each is an edge for EPOLLET.
    pub shuts: AtomicU32,
    /// Receives that found bytes since this end last sent: see [`crate::gather`].
    pub one_way: AtomicU32,
    /// How long its receiver looks away to let bytes gather, in steps.
    pub gather: AtomicU32,
    /// One of its fds.
    pub fd: AtomicI32,
    /// `SO_COOKIE`, once it was announced; else 0.
    pub cookie: AtomicU64,
    /// The effective user that this process was to the daemon when it was given the stream.
    pub owner: AtomicU32,
    /// When the anchor was last looked at, in ticks.
    pub looked_at: AtomicU64,
    /// Receives in a row that found nothing and did not wait.
    pub misses: AtomicU32,
    /// How far was read when a poll core on the same core last got a turn for it.
    pub owed_at: AtomicU64,
    /// First of its epoll registrations, 0 for none: see [`crate::epoll`].
    pub registrations: AtomicU32,
    /// Those of them that the program has deleted, and may make again.
    pub resting: AtomicU32,
    /// The attachment to a daemon that its stream came from, or that knows that it listens.
    pub epoch: AtomicU32,
    /// 1 when this process listens on it.
    pub listens: AtomicU32,
    /// What the program is told of its ends where the other one is on another node.
    pub names: Names,
    /// A [`Reason`].
    pub reason: AtomicU32,
    /// A [`State`], as it was last told.
    state: AtomicU32,
    /// The program's own TCP_NODELAY (bit 0) and TCP_CORK (bit 1): the anchor of a stream always
    /// has the first and never the second, so that wake bytes leave at once. And the bits above.
    pub options: AtomicU32,
    /// 1 while an offer of the daemon waits for the kernel calls to end. Under the tenant's lock.
    pub offered: AtomicU32,
    offer: UnsafeCell<MaybeUninit<Offer>>,
    stream: UnsafeCell<MaybeUninit<Stream>>,
}

// SAFETY: all fields are atomics but `stream`, which is written only in phase INSTALLING and
// after the last user has gone, and `offer`, which is used under the tenant's lock.
unsafe impl Sync for Conn {}

impl Conn {
    /// True when the daemon may hold the socket, for some microseconds: it takes a duplicate of what is
    /// announced to it, to look who it is.
    pub fn may_be_looked_at(&self) -> bool {
        self.cookie.load(Relaxed) != 0 || self.listens.load(Relaxed) != 0
    }

    /// A send has found no room, and does not wait.
    pub fn note_refused(&self) {
        self.refused.fetch_add(1, SeqCst);
    }

    /// The stream, in phase MAPPED.
    #[inline]
    pub fn stream(&self) -> Option<&Stream> {
        if self.phase.load(Acquire) != phase::MAPPED {
            return None;
        }
        // SAFETY: written before the phase became MAPPED, and not again while there are users.
        Some(unsafe { (*self.stream.get()).assume_init_ref() })
    }

    /// # Safety
    /// The phase is INSTALLING, and the caller is the one who set it.
    pub unsafe fn set_stream(&self, stream: Stream) {
        // SAFETY: nobody reads in this phase.
        unsafe { *self.stream.get() = MaybeUninit::new(stream) };
    }

    /// Keeps an offer until the kernel calls under way have ended.
    ///
    /// # Safety
    /// The caller holds the tenant's lock.
    pub unsafe fn set_offer(&self, offer: Offer) {
        // SAFETY: only the lock's holder uses it.
        unsafe { *self.offer.get() = MaybeUninit::new(offer) };
        self.offered.store(1, Release);
    }

    /// Takes the offer that waits.
    ///
    /// # Safety
    /// The caller holds the tenant's lock.
    pub unsafe fn take_offer(&self) -> Option<Offer> {
        if self.offered.swap(0, AcqRel) == 0 {
            return None;
        }
        // SAFETY: written before `offered` was set, and only the lock's holder uses it.
        Some(unsafe { (*self.offer.get()).assume_init_read() })
    }

    /// Keeps the connection on the kernel for ever. True where the daemon was told of it, and has to be told that too.
    #[must_use]
    pub fn keep_on_kernel(&self, index: usize, reason: Reason) -> bool {
        // Short, and with signals blocked: never further up this thread's stack.
        while self.phase.load(Acquire) == phase::INSTALLING {
            sys::sched_yield();
        }
        for from in [phase::KERNEL, phase::ANNOUNCED] {
            if self
                .phase
                .compare_exchange(from, phase::NEVER, AcqRel, Acquire)
                .is_ok()
            {
                self.tell(index, State::Kernel, reason);
                return from == phase::ANNOUNCED;
            }
        }
        false
    }

    /// Records state and reason, for `rdsock why`.
    pub fn tell(&self, index: usize, state: State, reason: Reason) {
        self.state.store(state as u32, Relaxed);
        self.reason.store(reason as u32, Relaxed);
        self.show(index);
    }

    /// Writes the record, from what is known here.
    ///
    /// The record may be that of new memory, by the time that it is written ([`show_all`]), or be written by several threads
    /// at once: so who has written it looks whether it has written what is true by now. Who changes something does so before it
    /// writes the record, so the last one to look sees all that was changed.
    fn show(&self, index: usize) {
        const TIMES: usize = 16;
        let words = || {
            [
                self.state.load(Relaxed),
                self.reason.load(Relaxed),
                self.generation.load(Relaxed),
                self.fd.load(Relaxed) as u32,
            ]
        };
        for _ in 0..TIMES {
            let Some(record) = record(index) else {
                return;
            };
            let now = words();
            let [state, reason, generation, fd] = now;
            record.state.store(state, Release);
            record.reason.store(reason, Release);
            record.generation.store(generation, Release);
            record.fd.store(fd as i32, Release);
            fence(SeqCst);
            if words() == now {
                return;
            }
        }
    }
}

/// Who is told of what becomes of a connection: those above, of whom nobody here and in between knows. The process's own is
/// [`TOLD`].
#[derive(Clone, Copy, Debug)]
pub struct Told {
    /// Something has changed at this end, of which the other end tells nobody. Halves of the stream may be held.
    pub changed: fn(&Conn),
    /// Both directions are the kernel's again.
    pub left: fn(&Use),
    /// Must it stay on the kernel, because of who waits for it?
    pub declines: fn(&Conn) -> bool,
    /// A stream is about to be mapped: `mapped` follows.
    pub mapping: fn(),
    /// It is.
    pub mapped: fn(&Use),
    /// It is closed, of which the daemon knew, and has had this stream. False where that must be said once more.
    pub closed: fn(usize, &Conn, Option<&Stream>) -> bool,
}

/// Connections of one piece of the pool.
const CONN_PIECE: usize = 512;

/// The connections of a process.
#[derive(Debug)]
pub struct Connections {
    pool: Pieces<Conn, { CONNS / CONN_PIECE }>,
    /// Those whose pieces are mapped, from the first on.
    there: AtomicU32,
    /// Where the search for a free one starts.
    next: AtomicU32,
    /// One more than the highest number ever used.
    high: AtomicU32,
    /// 1 when none is tracked any more.
    forgotten: AtomicU32,
    /// Places that are [`place::UNTOLD`].
    untold: AtomicU32,
    /// Their records, null where there are none.
    records: AtomicPtr<[ConnRecord; CONNS]>,
}

impl Connections {
    /// None.
    pub const fn new() -> Self {
        Connections {
            pool: Pieces::new(),
            there: AtomicU32::new(0),
            next: AtomicU32::new(0),
            high: AtomicU32::new(0),
            forgotten: AtomicU32::new(0),
            untold: AtomicU32::new(0),
            records: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    #[inline]
    fn at(&self, index: usize) -> Option<&'static Conn> {
        self.pool.get(index, CONN_PIECE)
    }

    /// Takes a free one of the pool to set it up, in turn; maps another piece only where none is free.
    fn take_free(&self) -> Option<usize> {
        loop {
            let there = self.there.load(Acquire) as usize;
            let start = self.next.load(Relaxed) as usize;
            for step in 0..there {
                let index = (start + step) % there;
                let occupied = &self.at(index)?.occupied;
                if occupied
                    .compare_exchange(place::FREE, place::COMING, AcqRel, Relaxed)
                    .is_ok()
                {
                    self.next.store((index + 1) as u32, Relaxed);
                    self.high.fetch_max((index + 1) as u32, Relaxed);
                    return Some(index);
                }
            }
            self.pool.make(there, CONN_PIECE)?;
            self.there.fetch_max((there + CONN_PIECE) as u32, AcqRel);
        }
    }

    /// See [`tell_untold`].
    fn tell_untold(&self, mut tell: impl FnMut(usize, &Conn, Option<(u64, u32)>) -> bool) {
        for index in 0..self.high() {
            let Some(conn) = self.at(index) else { continue };
            if conn.occupied.load(Acquire) != place::UNTOLD {
                continue;
            }
            let stream = match conn.closed_stream.load(Relaxed) {
                0 => None,
                id => Some((id, conn.closed_end.load(Relaxed))),
            };
            if !tell(index, conn, stream) {
                return;
            }
            self.untold.fetch_sub(1, Relaxed);
            conn.occupied.store(place::FREE, Release);
        }
    }

    fn high(&self) -> usize {
        CONNS.min(self.high.load(Relaxed) as usize)
    }
}

/// A connection of the pool.
#[inline]
pub fn at(index: usize) -> Option<&'static Conn> {
    PROCESS.connections.at(index)
}

/// A connection in use by the current call; its stream stays mapped until this is dropped.
#[derive(Debug)]
pub struct Use {
    /// The connection.
    pub conn: &'static Conn,
    /// Its number.
    pub index: usize,
}

impl Drop for Use {
    #[inline]
    fn drop(&mut self) {
        let users = &self.conn.users;
        let left = if is_single_threaded() {
            let left = users.load(Relaxed).wrapping_sub(1);
            users.store(left, Relaxed);
            left
        } else {
            users.fetch_sub(1, AcqRel) - 1
        };
        if left == 0 && self.conn.refs.load(Acquire) == 0 {
            free(self.index, self.conn);
        }
    }
}

/// The connection behind an fd, kept from going away.
#[inline]
pub fn of(fd: c_int) -> Option<Use> {
    let (index, entry) = fds::conn(fd)?;
    let conn = at(index)?;
    if is_single_threaded() {
        conn.users.store(conn.users.load(Relaxed) + 1, Relaxed);
    } else {
        conn.users.fetch_add(1, SeqCst);
    }
    let held = Use { conn, index };
    // The fd may have been closed before the use was counted.
    entry.is_same().then_some(held)
}

/// The connection with this number, if it is in use.
pub fn by_index(index: usize) -> Option<Use> {
    let conn = at(index)?;
    if is_single_threaded() {
        conn.users.store(conn.users.load(Relaxed) + 1, Relaxed);
    } else {
        conn.users.fetch_add(1, SeqCst);
    }
    let held = Use { conn, index };
    (conn.refs.load(SeqCst) != 0).then_some(held)
}

/// Makes a connection of a new TCP socket. `None` when the pool is full: it stays the kernel's.
pub fn make(fd: c_int, born: u32) -> Option<usize> {
    if !fds::has_room(fd) || are_forgotten() {
        return None;
    }
    let index = PROCESS.connections.take_free()?;
    let conn = at(index)?;
    conn.refs.store(1, Relaxed);
    // From now on who uses it sees that it has an fd, and does not free it.
    conn.occupied.store(place::IN_USE, Release);
    conn.born.store(born, Relaxed);
    conn.fd.store(fd, Relaxed);
    for word in [
        &conn.calls,
        &conn.shared,
        &conn.in_rx,
        &conn.in_tx,
        &conn.look,
        &conn.registrations,
        &conn.resting,
        &conn.options,
        &conn.listens,
        &conn.refused,
        &conn.shuts,
        &conn.one_way,
        &conn.gather,
        &conn.misses,
        &conn.limited,
    ] {
        word.store(0, Relaxed);
    }
    conn.owed_at.store(0, Relaxed);
    conn.cookie.store(0, Relaxed);
    conn.names.forget();
    conn.spin_score.store(FULL_SCORE, Relaxed);
    conn.until_nap.store(1, Relaxed);
    conn.generation.fetch_add(1, Relaxed);
    conn.phase.store(phase::KERNEL, Release);
    conn.tell(index, State::Kernel, Reason::Young);
    Some(index)
}

/// The kernel has them all, for as long as the process runs.
pub fn make_no_more() {
    PROCESS.connections.forgotten.store(1, Relaxed);
}

/// True where the kernel has them all for good.
pub fn are_forgotten() -> bool {
    PROCESS.connections.forgotten.load(Relaxed) != 0
}

/// Another fd for the same connection, to be put into the table. False where there is no such connection.
pub fn add_ref(index: usize) -> bool {
    let conn = at(index);
    if let Some(conn) = conn {
        conn.refs.fetch_add(1, AcqRel);
    }
    conn.is_some()
}

/// An entry of the table is gone. The connection, where it was its last.
#[must_use]
pub fn let_go(fd: c_int, index: usize) -> Option<Use> {
    let conn = at(index)?;
    conn.users.fetch_add(1, SeqCst);
    let held = Use { conn, index };
    if conn.fd.load(Relaxed) == fd {
        conn.fd.store(other_fd(index).unwrap_or(-1), Relaxed);
        conn.show(index);
    }
    (conn.refs.fetch_sub(1, SeqCst) == 1).then_some(held)
}

fn other_fd(index: usize) -> Option<c_int> {
    let most = at(index)?.refs.load(Relaxed);
    if most <= 1 {
        return None;
    }
    fd_of(Kind::Conn(index), -1)
}

/// The last use of a connection without fds has ended.
fn free(index: usize, conn: &Conn) {
    // One of several that come here at once does it.
    if conn
        .occupied
        .compare_exchange(place::IN_USE, place::GOING, AcqRel, Relaxed)
        .is_err()
    {
        return;
    }
    // The entry may have been given out again since the caller saw it unused.
    if conn.refs.load(SeqCst) != 0 || conn.users.load(SeqCst) != 0 {
        conn.occupied.store(place::IN_USE, Release);
        return;
    }
    let phase = conn.phase.swap(phase::NEVER, AcqRel);
    conn.fd.store(-1, Relaxed);
    conn.state.store(State::Kernel as u32, Relaxed);
    conn.show(index);
    let is_told = match phase {
        phase::MAPPED => {
            // SAFETY: it was MAPPED, no fd leads here and no call uses it: nobody else reads it.
            let stream = unsafe { (*conn.stream.get()).assume_init_read() };
            conn.closed_stream.store(stream.id, Relaxed);
            conn.closed_end.store(stream.end_number(), Relaxed);
            let is_told = (TOLD.closed)(index, conn, Some(&stream));
            stream.unmap();
            is_told
        }
        // Whatever it is here: who kept it on the kernel may have been a `vfork` child, which tells the daemon nothing.
        _ if conn.cookie.load(Relaxed) != 0 => {
            conn.closed_stream.store(0, Relaxed);
            (TOLD.closed)(index, conn, None)
        }
        _ => true,
    };
    if is_told {
        conn.occupied.store(place::FREE, Release);
    } else {
        conn.occupied.store(place::UNTOLD, Release);
        PROCESS.connections.untold.fetch_add(1, Release);
    }
}

/// Has the daemon to be told of connections that were closed?
#[inline]
pub fn has_untold() -> bool {
    PROCESS.connections.untold.load(Relaxed) != 0
}

/// Tells of each connection of which the daemon could not be told, until `tell` says that it can't be now: with its number, and the
/// stream and end that it had. The tenant's lock is held.
pub fn tell_untold(tell: impl FnMut(usize, &Conn, Option<(u64, u32)>) -> bool) {
    PROCESS.connections.tell_untold(tell);
}

/// One more than the highest connection number ever used.
pub fn high() -> usize {
    PROCESS.connections.high()
}

/// The records, which the daemon sees, lie here from now on.
pub fn show_in(records: Option<&'static [ConnRecord; CONNS]>) {
    let at = records.map_or(std::ptr::null_mut(), |records| {
        std::ptr::from_ref(records).cast_mut()
    });
    PROCESS.connections.records.store(at, Release);
}

/// The record of a connection, where there are any.
pub fn record(index: usize) -> Option<&'static ConnRecord> {
    // SAFETY: null, or a reference that `show_in` was given; all that changes in a record is atomic.
    unsafe { PROCESS.connections.records.load(Acquire).as_ref() }?.get(index)
}

/// Writes all records again: the memory that they lie in has just been exchanged.
pub fn show_all() {
    for index in 0..high() {
        if let Some(conn) = at(index) {
            conn.show(index);
        }
    }
}

/// Calls `found` with each connection that has an fd.
pub fn each(mut found: impl FnMut(usize, &'static Conn)) {
    for index in 0..high() {
        if let Some(conn) = at(index)
            && conn.refs.load(Acquire) != 0
        {
            found(index, conn);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_taken_in_turn_and_again_once_free() {
        let connections = Connections::new();
        for index in 0..CONN_PIECE {
            assert_eq!(connections.take_free(), Some(index));
        }
        let free = |index| connections.at(index).unwrap().occupied.store(0, Relaxed);
        free(7);
        free(9);
        assert_eq!(connections.take_free(), Some(7));
        // The one that was given back last is not the next.
        free(7);
        assert_eq!(connections.take_free(), Some(9));
        assert_eq!(connections.high(), CONN_PIECE);
        assert_eq!(connections.take_free(), Some(7));
        // None is free: another piece.
        assert!(
            connections
                .take_free()
                .is_some_and(|index| index >= CONN_PIECE)
        );
        assert!(connections.high() > CONN_PIECE);
    }
    /// Who uses one by its number (a late message of the daemon names it, say) finds that it has no fd, and lets go of it.
    #[test]
    fn a_connection_that_is_being_set_up_is_not_freed_by_who_looks_at_it() {
        let connections = Connections::new();
        let index = connections.take_free().unwrap();
        let conn = connections.at(index).unwrap();
        free(index, conn);
        assert_ne!(conn.occupied.load(Relaxed), 0, "it is given out once more");
    }

    #[test]
    fn what_the_daemon_could_not_be_told_of_is_told_once() {
        let connections = Connections::new();
        let places: Vec<usize> = (0..4).filter_map(|_| connections.take_free()).collect();
        for index in [1, 2, 3] {
            let conn = connections.at(places[index]).unwrap();
            conn.closed_stream.store(10 * index as u64, Relaxed);
            conn.occupied.store(place::UNTOLD, Relaxed);
            connections.untold.fetch_add(1, Relaxed);
        }
        let mut told = Vec::new();
        let mut tell = |most| {
            connections.tell_untold(|index, _, stream| {
                let may = told.len() < most;
                if may {
                    told.push((index, stream));
                }
                may
            });
            told.clone()
        };
        // There is room for one, and later for all.
        assert_eq!(tell(1), [(places[1], Some((10, 0)))]);
        assert_eq!(tell(9).len(), 3);
        assert_eq!(tell(9).len(), 3);
        assert_eq!(connections.untold.load(Relaxed), 0);
        assert_eq!(
            connections.at(places[0]).unwrap().occupied.load(Relaxed),
            place::COMING
        );
    }
}
