//! Which of the process's fds are TCP connections: the fd table, and one [`Conn`] for each open
//! connection. Private to the process; a forked child gets a copy.
//!
//! A lookup is a few loads. The tables are mapped piece by piece, as they are used, and stay, so
//! nothing here allocates and everything may be used in a signal handler.

use crate::names::Names;
use crate::stream::Stream;
use crate::sys;
use crate::tenant::Offer;
use libc::c_int;
use rdsock_shm::reason::{Reason, State};
use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering::*, fence};

/// fds that the table covers; higher ones are never accelerated.
pub const FDS: usize = 1 << 20;
/// Connections at once.
pub const CONNS: usize = rdsock_shm::layout::CONN_RECORDS;

/// What an fd is, as the table has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing of ours.
    Other,
    /// A TCP connection, or a TCP socket that may become one.
    Conn(usize),
    /// An epoll instance.
    Epoll(usize),
    /// The shim's own descriptor: the program must not see it.
    Internal,
}

impl Kind {
    fn to_word(self) -> u32 {
        match self {
            Kind::Other => 0,
            Kind::Conn(index) => (1 << 30) | index as u32,
            Kind::Epoll(index) => (2 << 30) | index as u32,
            Kind::Internal => 3 << 30,
        }
    }

    #[inline]
    fn from_word(word: u32) -> Self {
        let index = (word & ((1 << 30) - 1)) as usize;
        match word >> 30 {
            0 => Kind::Other,
            1 => Kind::Conn(index),
            2 => Kind::Epoll(index),
            _ => Kind::Internal,
        }
    }
}

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

/// One TCP socket of this process, under one or more fds.
#[repr(align(128))]
#[derive(Debug)]
pub struct Conn {
    /// 0 free, 3 being set up, 1 in use, 2 being taken down.
    occupied: AtomicU32,
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
    /// 1 when `poll` or `epoll` has seen something on the anchor since it was last looked at.
    pub look: AtomicU32,
    /// Sends that found no room and did not wait: an edge for EPOLLET, in each instance, when space comes.
    pub refused: AtomicU32,
    /// Calls of `shutdown`: each is an edge for EPOLLET.
    pub shuts: AtomicU32,
    /// Receives that found bytes since this end last sent: see [`crate::wait::let_gather`].
    pub one_way: AtomicU32,
    /// How long its receiver looks away to let bytes gather, in steps.
    pub gather: AtomicU32,
    /// One of its fds.
    pub fd: AtomicI32,
    /// `SO_COOKIE`, once it was announced; else 0.
    pub cookie: AtomicU64,
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
    /// has the first and never the second, so that wake bytes leave at once.
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

    /// Keeps the connection on the kernel for ever.
    pub fn keep_on_kernel(&self, index: usize, reason: Reason) {
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
                if from == phase::ANNOUNCED {
                    crate::tenant::withdraw(index, self);
                }
                return;
            }
        }
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
            let Some(record) = crate::tenant::record(index) else {
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

/// fds of one piece of the table.
const FD_PIECE: usize = 4096;
/// Connections of one piece of the pool.
const CONN_PIECE: usize = 512;
static TABLE: Pieces<AtomicU32, { FDS / FD_PIECE }> = Pieces::new();
static POOL: Pieces<Conn, { CONNS / CONN_PIECE }> = Pieces::new();
/// 1 when fds are looked after: not with RDSOCK_DISABLE.
static STARTED: AtomicU32 = AtomicU32::new(0);
/// Connections whose pieces are mapped, from the first on.
static THERE: AtomicU32 = AtomicU32::new(0);
/// Where the search for a free connection starts.
static NEXT: AtomicU32 = AtomicU32::new(0);
/// One more than the highest fd ever put in the table.
static HIGH_FD: AtomicI32 = AtomicI32::new(0);
/// One more than the highest connection number ever used.
static HIGH: AtomicU32 = AtomicU32::new(0);
/// 1 when no connection is tracked any more.
static FORGOTTEN: AtomicU32 = AtomicU32::new(0);
static SINGLE_THREADED: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());

/// A table whose memory is mapped piece by piece, as it is used: a program whose address space is limited has it for
/// itself. A piece that can't be mapped is missing, and its fds are the kernel's.
#[derive(Debug)]
pub struct Pieces<T, const N: usize>([AtomicPtr<T>; N]);

impl<T, const N: usize> Pieces<T, N> {
    pub const fn new() -> Self {
        Pieces([const { AtomicPtr::new(std::ptr::null_mut()) }; N])
    }

    /// An entry, in pieces of `each`, where its piece is there.
    #[inline]
    pub fn get(&self, index: usize, each: usize) -> Option<&'static T> {
        let piece = self.0.get(index / each)?.load(Acquire);
        // SAFETY: a piece has `each` zeroed entries, which is a valid state of a Conn and of a word, and is never
        // unmapped.
        (!piece.is_null()).then(|| unsafe { &*piece.add(index % each) })
    }

    /// An entry, whose piece is mapped if need be.
    pub fn make(&self, index: usize, each: usize) -> Option<&'static T> {
        let place = self.0.get(index / each)?;
        if place.load(Acquire).is_null() {
            let size = each * std::mem::size_of::<T>();
            let piece = sys::map(-1, size)?;
            let null = std::ptr::null_mut();
            if place
                .compare_exchange(null, piece.cast(), AcqRel, Relaxed)
                .is_err()
            {
                // Another thread was faster.
                // SAFETY: just mapped, and nobody else has seen it.
                unsafe { sys::unmap(piece, size) };
            }
        }
        self.get(index, each)
    }
}

/// Begins to look after fds.
pub fn start() {
    STARTED.store(1, Release);
    // A char, where glibc has it.
    let flag = crate::real::symbol(c"__libc_single_threaded");
    SINGLE_THREADED.store(flag.cast(), Relaxed);
}

/// True while the process has never had a second thread.
#[inline]
pub fn is_single_threaded() -> bool {
    let flag = SINGLE_THREADED.load(Relaxed);
    // SAFETY: glibc's flag, written only before a thread is made.
    !flag.is_null() && unsafe { flag.read_volatile() } != 0
}

#[inline]
fn entry(fd: c_int) -> Option<&'static AtomicU32> {
    TABLE.get(usize::try_from(fd).ok()?, FD_PIECE)
}

/// The entry of an fd that something is to be noted of.
fn new_entry(fd: c_int) -> Option<&'static AtomicU32> {
    if STARTED.load(Relaxed) == 0 {
        return None;
    }
    TABLE.make(usize::try_from(fd).ok()?, FD_PIECE)
}

/// What an fd is.
#[inline]
pub fn kind(fd: c_int) -> Kind {
    entry(fd).map_or(Kind::Other, |word| Kind::from_word(word.load(Acquire)))
}

/// One more than the highest fd that the table ever had something for.
pub fn high_fd() -> c_int {
    HIGH_FD.load(Relaxed)
}

/// The next fd from one on that the table has something for.
pub fn next_noted(from: c_int) -> Option<c_int> {
    let mut fd = from.max(0);
    while fd < high_fd() {
        match entry(fd) {
            Some(word) if word.load(Relaxed) != 0 => return Some(fd),
            Some(_) => fd += 1,
            // Nothing of this piece.
            None => fd = fd - fd % FD_PIECE as c_int + FD_PIECE as c_int,
        }
    }
    None
}

/// Says what an fd is; what it was.
pub fn set_kind(fd: c_int, kind: Kind) -> Kind {
    let word = match kind {
        Kind::Other => entry(fd),
        _ => new_entry(fd),
    };
    HIGH_FD.fetch_max(fd + 1, Relaxed);
    word.map_or(Kind::Other, |word| {
        Kind::from_word(word.swap(kind.to_word(), AcqRel))
    })
}

/// A connection of the pool.
pub fn at(index: usize) -> Option<&'static Conn> {
    POOL.get(index, CONN_PIECE)
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
    let word = entry(fd)?;
    let value = word.load(Acquire);
    if value >> 30 != 1 {
        return None;
    }
    use_if(word, value)
}

#[inline]
fn use_if(word: &AtomicU32, value: u32) -> Option<Use> {
    let Kind::Conn(index) = Kind::from_word(value) else {
        return None;
    };
    let conn = at(index)?;
    if is_single_threaded() {
        conn.users.store(conn.users.load(Relaxed) + 1, Relaxed);
    } else {
        conn.users.fetch_add(1, SeqCst);
    }
    let held = Use { conn, index };
    // The fd may have been closed before the use was counted.
    if word.load(SeqCst) != value {
        return None;
    }
    Some(held)
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

/// Takes a free connection of the pool, in turn; maps another piece only where none is free.
fn take_free() -> Option<usize> {
    loop {
        let there = THERE.load(Acquire) as usize;
        let start = NEXT.load(Relaxed) as usize;
        for step in 0..there {
            let index = (start + step) % there;
            let taken = at(index)?.occupied.compare_exchange(0, 1, AcqRel, Relaxed);
            if taken.is_ok() {
                return Some(index);
            }
        }
        POOL.make(there, CONN_PIECE)?;
        THERE.fetch_max((there + CONN_PIECE) as u32, AcqRel);
    }
}

/// Tracks a new TCP socket. Nothing is done when the pool is full: it stays the kernel's.
pub fn track(fd: c_int, born: u32) -> Option<usize> {
    new_entry(fd)?;
    if FORGOTTEN.load(Relaxed) != 0 {
        return None;
    }
    let index = take_free()?;
    let conn = at(index)?;
    conn.refs.store(1, Relaxed);
    NEXT.store((index + 1) as u32, Relaxed);
    HIGH.fetch_max((index + 1) as u32, Relaxed);
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
    ] {
        word.store(0, Relaxed);
    }
    conn.owed_at.store(0, Relaxed);
    conn.cookie.store(0, Relaxed);
    conn.names.forget();
    conn.spin_score.store(crate::wait::FULL_SCORE, Relaxed);
    conn.generation.fetch_add(1, Relaxed);
    conn.phase.store(phase::KERNEL, Release);
    conn.tell(index, State::Kernel, Reason::Young);
    replace(fd, Kind::Conn(index));
    Some(index)
}

/// Puts a kind in the table and lets go of what stood there: an entry that is still set for a
/// number that the kernel has just given out was closed behind the shim's back.
pub fn replace(fd: c_int, kind: Kind) {
    let old = set_kind(fd, kind);
    let_go(fd, old);
}

/// Forgets which fds are connections: the kernel has them all, for as long as the process runs.
pub fn forget_all() {
    FORGOTTEN.store(1, Relaxed);
    crate::epoll::close_copies();
    for fd in 0..high_fd() {
        if matches!(kind(fd), Kind::Conn(_)) {
            set_kind(fd, Kind::Other);
        }
    }
}

/// Another fd for the same connection.
pub fn add_ref(fd: c_int, index: usize) {
    if let Some(conn) = at(index) {
        conn.refs.fetch_add(1, AcqRel);
        replace(fd, Kind::Conn(index));
    }
}

/// An entry of the table is gone.
pub fn let_go(fd: c_int, kind: Kind) {
    match kind {
        Kind::Conn(index) => {
            let Some(conn) = at(index) else { return };
            conn.users.fetch_add(1, SeqCst);
            let held = Use { conn, index };
            if conn.fd.load(Relaxed) == fd {
                conn.fd.store(other_fd(index).unwrap_or(-1), Relaxed);
                conn.show(index);
            }
            if conn.refs.fetch_sub(1, SeqCst) == 1 {
                crate::epoll::forget(conn);
            }
            drop(held);
        }
        Kind::Epoll(index) => crate::epoll::closed(fd, index),
        Kind::Other | Kind::Internal => {}
    }
}

fn other_fd(index: usize) -> Option<c_int> {
    let most = at(index)?.refs.load(Relaxed);
    if most <= 1 {
        return None;
    }
    let word = Kind::Conn(index).to_word();
    (0..65536).find(|fd| entry(*fd).is_some_and(|entry| entry.load(Relaxed) == word))
}

/// An fd of this kind, but not `not`.
pub fn fd_of(kind: Kind, not: c_int) -> Option<c_int> {
    let word = kind.to_word();
    (0..high_fd())
        .find(|fd| *fd != not && entry(*fd).is_some_and(|entry| entry.load(Relaxed) == word))
}

/// The last use of a connection without fds has ended.
fn free(index: usize, conn: &Conn) {
    // One of several that come here at once does it.
    if conn
        .occupied
        .compare_exchange(1, 2, AcqRel, Relaxed)
        .is_err()
    {
        return;
    }
    // The entry may have been given out again since the caller saw it unused.
    if conn.refs.load(SeqCst) != 0 || conn.users.load(SeqCst) != 0 {
        conn.occupied.store(1, Release);
        return;
    }
    let phase = conn.phase.swap(phase::NEVER, AcqRel);
    conn.fd.store(-1, Relaxed);
    conn.state.store(State::Kernel as u32, Relaxed);
    conn.show(index);
    match phase {
        phase::MAPPED => {
            // SAFETY: it was MAPPED, no fd leads here and no call uses it: nobody else reads it.
            let stream = unsafe { (*conn.stream.get()).assume_init_read() };
            crate::tenant::stream_closed(index, conn, &stream);
            stream.unmap();
        }
        // Whatever it is here: who kept it on the kernel may have been a `vfork` child, which tells the daemon nothing.
        _ if conn.cookie.load(Relaxed) != 0 => crate::tenant::withdraw(index, conn),
        _ => {}
    }
    conn.occupied.store(0, Release);
}

/// One more than the highest connection number ever used.
pub fn high() -> usize {
    CONNS.min(HIGH.load(Relaxed) as usize)
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
