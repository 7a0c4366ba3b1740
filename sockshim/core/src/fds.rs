//! What each of the process's fds is: a table by number. A lookup is two loads.
//!
//! The tables are mapped piece by piece, as they are used, and stay, so nothing here allocates and
//! everything may be used in a signal handler. It calls the kernel alone, for memory: what becomes of what stood in an entry is the
//! caller's to see to.

use crate::state::PROCESS;
use crate::sys;
use libc::c_int;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, Ordering::*};

/// fds that the table covers; higher ones are never accelerated.
pub const FDS: usize = 1 << 20;
/// fds of one piece of the table.
const FD_PIECE: usize = 4096;
/// stdin, stdout and stderr are used by stdio, behind the shim's back: never on rings.
pub const STDERR: c_int = 2;

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

/// A table whose memory is mapped piece by piece, as it is used: a program whose address space is limited has it for
/// itself. A piece that can't be mapped is missing, and its fds are the kernel's.
#[derive(Debug)]
pub struct Pieces<T, const N: usize>([AtomicPtr<T>; N]);

impl<T, const N: usize> Pieces<T, N> {
    /// Nothing is open.
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

/// The table.
#[derive(Debug)]
pub struct Fds {
    table: Pieces<AtomicU32, { FDS / FD_PIECE }>,
    /// 1 when fds are looked after: not with RDSOCK_DISABLE.
    started: AtomicU32,
    /// One more than the highest fd ever put in the table.
    high: AtomicI32,
}

impl Fds {
    /// Nothing is looked after.
    /// Nothing is open.
    pub const fn new() -> Self {
        Fds {
            table: Pieces::new(),
            started: AtomicU32::new(0),
            high: AtomicI32::new(0),
        }
    }

    fn start(&self) {
        self.started.store(1, Release);
    }

    #[inline]
    fn entry(&self, fd: c_int) -> Option<&'static AtomicU32> {
        self.table.get(usize::try_from(fd).ok()?, FD_PIECE)
    }

    /// The entry of an fd that something is to be noted of.
    fn new_entry(&self, fd: c_int) -> Option<&'static AtomicU32> {
        if self.started.load(Relaxed) == 0 {
            return None;
        }
        self.table.make(usize::try_from(fd).ok()?, FD_PIECE)
    }

    #[inline]
    fn kind(&self, fd: c_int) -> Kind {
        self.entry(fd)
            .map_or(Kind::Other, |word| Kind::from_word(word.load(Acquire)))
    }

    fn set(&self, fd: c_int, kind: Kind) -> Kind {
        let word = match kind {
            Kind::Other => self.entry(fd),
            _ => self.new_entry(fd),
        };
        self.high.fetch_max(fd + 1, Relaxed);
        word.map_or(Kind::Other, |word| {
            Kind::from_word(word.swap(kind.to_word(), AcqRel))
        })
    }

    fn high(&self) -> c_int {
        self.high.load(Relaxed)
    }

    fn next_noted(&self, from: c_int) -> Option<c_int> {
        let mut fd = from.max(0);
        while fd < self.high() {
            match self.entry(fd) {
                Some(word) if word.load(Relaxed) != 0 => return Some(fd),
                Some(_) => fd += 1,
                // Nothing of this piece.
                None => fd = fd - fd % FD_PIECE as c_int + FD_PIECE as c_int,
            }
        }
        None
    }

    fn of_kind(&self, kind: Kind, not: c_int) -> Option<c_int> {
        let word = kind.to_word();
        (0..self.high()).find(|fd| {
            *fd != not
                && self
                    .entry(*fd)
                    .is_some_and(|entry| entry.load(Relaxed) == word)
        })
    }
}

/// Begins to look after fds.
pub fn start() {
    PROCESS.fds.start();
}

/// True when the table has room for an fd: then something may be noted of it.
pub fn has_room(fd: c_int) -> bool {
    PROCESS.fds.new_entry(fd).is_some()
}

/// What an fd is.
#[inline]
pub fn kind(fd: c_int) -> Kind {
    PROCESS.fds.kind(fd)
}

/// The number of the connection that an fd is, and its entry's word, to be looked at again.
#[inline]
pub fn conn(fd: c_int) -> Option<(usize, Entry)> {
    let word = PROCESS.fds.entry(fd)?;
    let value = word.load(Acquire);
    match Kind::from_word(value) {
        Kind::Conn(index) => Some((index, Entry { word, value })),
        _ => None,
    }
}

/// An entry of the table, as it was when it was looked at.
#[derive(Debug)]
pub struct Entry {
    word: &'static AtomicU32,
    value: u32,
}

impl Entry {
    /// True while it is what it was.
    #[inline]
    pub fn is_same(&self) -> bool {
        self.word.load(SeqCst) == self.value
    }
}

/// One more than the highest fd that the table ever had something for.
pub fn high_fd() -> c_int {
    PROCESS.fds.high()
}

/// The next fd from one on that the table has something for.
pub fn next_noted(from: c_int) -> Option<c_int> {
    PROCESS.fds.next_noted(from)
}

/// Says what an fd is; what it was.
pub fn set_kind(fd: c_int, kind: Kind) -> Kind {
    PROCESS.fds.set(fd, kind)
}

/// An fd of this kind, but not `not`.
pub fn fd_of(kind: Kind, not: c_int) -> Option<c_int> {
    PROCESS.fds.of_kind(kind, not)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started() -> Fds {
        let fds = Fds::new();
        fds.start();
        fds
    }

    #[test]
    fn an_entry_says_what_it_was() {
        let fds = started();
        assert_eq!(fds.set(5, Kind::Conn(7)), Kind::Other);
        assert_eq!(fds.kind(5), Kind::Conn(7));
        assert_eq!(fds.set(5, Kind::Epoll(1)), Kind::Conn(7));
        assert_eq!(fds.set(5, Kind::Internal), Kind::Epoll(1));
        assert_eq!(fds.set(5, Kind::Other), Kind::Internal);
        assert_eq!(fds.kind(5), Kind::Other);
    }

    #[test]
    fn nothing_is_noted_before_the_start_nor_beyond_the_table() {
        let fds = Fds::new();
        fds.set(5, Kind::Internal);
        assert_eq!(fds.kind(5), Kind::Other);
        fds.start();
        for fd in [-1, FDS as c_int] {
            fds.set(fd, Kind::Internal);
            assert_eq!(fds.kind(fd), Kind::Other, "{fd}");
        }
    }

    #[test]
    fn what_is_noted_is_found_across_pieces_that_are_not_there() {
        let fds = started();
        let piece = FD_PIECE as c_int;
        let far = 4 * piece + 3;
        fds.set(2, Kind::Conn(1));
        fds.set(far, Kind::Conn(1));
        assert_eq!(fds.next_noted(0), Some(2));
        assert_eq!(fds.next_noted(3), Some(far));
        assert_eq!(fds.next_noted(piece + 7), Some(far));
        assert_eq!(fds.next_noted(far + 1), None);
        assert_eq!(fds.of_kind(Kind::Conn(1), 2), Some(far));
        assert_eq!(fds.of_kind(Kind::Conn(1), far), Some(2));
        assert_eq!(fds.of_kind(Kind::Conn(2), -1), None);
    }
}
