//! A tenant's memory, as the daemon makes and reads it, and its bell board.

use std::io;
use std::mem::offset_of;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use rdsock_shm::control::Request;
use rdsock_shm::layout::{
    BELL_MAGIC, BellBoard, CONN_RECORDS, ConnRecord, QUEUE_SLOTS, QueueSlot, Routes, TENANT_MAGIC,
    TenantHeader, TenantMemory,
};
use rdsock_shm::queue::Taker;
use rdsock_shm::sync::{Ordering, fence};

use super::kept::Kept;
use super::made::{Charges, Made};
use super::stream::make_board;
use super::whole::{can_be_whole, is_whole};
use super::{identity, u32_at, u64_at};
use crate::accounts::Charge;
use crate::channel::{Closer, Foreign};

/// Bytes of the connection records of which those in use are found at once.
const BLOCK: usize = 4096;
/// Blocks that are read at once.
const BLOCKS: usize = 16;

/// What the control thread touches of a tenant's memory: header and queue, and the routes. The records it reads through the file.
const TOUCHED: [Range<usize>; 2] = [
    0..offset_of!(TenantMemory, conns),
    offset_of!(TenantMemory, routes)..size_of::<TenantMemory>(),
];

/// Why an fd is no bell board. Consequence: the tenant is refused.
#[derive(Debug, thiserror::Error)]
pub enum BadBoard {
    /// Not a memfd of ordinary pages.
    #[error("not a memfd of ordinary pages")]
    Kind,
    /// It could shrink or grow, or can't be written.
    #[error("not sealed with F_SEAL_SHRINK and F_SEAL_GROW, or sealed against writing")]
    Seals,
    /// Another size than this version's.
    #[error("{found} bytes, expected {expected}")]
    Size {
        /// Bytes that it has.
        found: u64,
        /// Bytes that it must have.
        expected: u64,
    },
    /// More than one descriptor.
    #[error("HELLO takes one descriptor at most")]
    Number,
    /// Magic or version is wrong.
    #[error("wrong magic or version")]
    Identity,
    /// The system said no.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Checks that an fd is a memfd of ordinary pages that keeps its size, with `expected` bytes. The seals are asked for
/// first: nothing but shared memory has any, and nothing else is looked at, since a look could wait for its owner.
fn check_memfd(fd: BorrowedFd<'_>, expected: u64) -> Result<(), BadBoard> {
    let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map_err(|_| BadBoard::Kind)?;
    if fstatfs(fd).map_err(io::Error::from)?.filesystem_type() != TMPFS_MAGIC {
        return Err(BadBoard::Kind);
    }
    let fixed = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    let unwritable = libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE;
    if seals & fixed != fixed || seals & unwritable != 0 {
        return Err(BadBoard::Seals);
    }
    let found = nix::sys::stat::fstat(fd).map_err(io::Error::from)?.st_size as u64;
    if found != expected {
        return Err(BadBoard::Size { found, expected });
    }
    Ok(())
}

/// A tenant's bell board, to be handed to its peers.
#[derive(Debug)]
pub struct Bells {
    /// The board.
    pub board: Foreign,
    /// Nobody can stall a poll core that rings them: no holes are made in the board, or only by a program of the daemon's own
    /// user, since it is not root.
    pub may_be_rung: bool,
    /// The daemon has made it now: the tenant is to be sent it.
    pub is_new: bool,
}

impl Bells {
    /// For a tenant that has none yet.
    pub fn make(closer: &Closer) -> io::Result<Self> {
        Ok(Bells {
            board: closer.foreign(make_board()?),
            may_be_rung: true,
            is_new: true,
        })
    }

    /// Checks those that a tenant has, from a daemon before this one, or made by itself.
    pub fn check(board: Foreign) -> Result<Self, BadBoard> {
        check_memfd(board.as_fd(), size_of::<BellBoard>() as u64)?;
        let mut start = [0; 16];
        nix::sys::uio::pread(&board, &mut start, 0).map_err(io::Error::from)?;
        if start[..] != identity(BELL_MAGIC, size_of::<BellBoard>())[..] {
            return Err(BadBoard::Identity);
        }
        Ok(Bells {
            may_be_rung: is_whole(&board) || !can_be_whole(),
            board,
            is_new: false,
        })
    }
}

/// A tenant's memory, in which nobody makes holes. Of what is mapped, the connection records are read through the file,
/// on demand.
#[derive(Debug)]
pub struct TenantMap {
    map: Made,
    taker: Taker,
}

impl TenantMap {
    /// Makes it, and keeps the pages of the bells, too, where these may be rung by a poll core and have no holes. Waits for all who change the
    /// daemon's own mappings, and for whoever has a page of the bells: for a porter, and so does whoever lets go of it. Each charge is for a
    /// descriptor.
    pub fn make(bells: &Bells, memory: Charge, pages: Charge) -> io::Result<Foreign<Self>> {
        const SIZE: usize = size_of::<TenantMemory>();
        let start = identity(TENANT_MAGIC, SIZE);
        let board = is_whole(&bells.board).then(|| bells.board.as_fd());
        let charges = Charges { memory, pages };
        let closer = bells.board.closer();
        let (name, parts) = (c"rdsock-tenant", &TOUCHED);
        Ok(closer.foreign(TenantMap {
            map: Made::new(name, &start, SIZE, parts, board, charges, closer)?,
            taker: Taker::new(),
        }))
    }

    /// Who has it has mapped it: from now on it may be touched. For a porter. Fails where the tenant has seen to it that the daemon
    /// would have to wait.
    pub fn keep_whole(&self) -> io::Result<()> {
        self.map.keep_whole()
    }

    /// What keeps its pages and those of its bells.
    pub fn kept(&self) -> &Arc<Kept> {
        self.map.kept()
    }

    /// The memory's file.
    pub fn file(&self) -> &Arc<Foreign> {
        self.map.file()
    }

    fn memory(&self) -> *const TenantMemory {
        self.map.as_ptr().cast()
    }

    fn queue(&self) -> &[QueueSlot; QUEUE_SLOTS] {
        // SAFETY: the queue lies within the mapping which lives as long as
        // `self`, can't shrink (sealed) and is page-aligned. It is made of atomics only, so what
        // the tenant stores at the same time is no data race.
        unsafe { &(*self.memory()).queue }
    }

    /// The networks that belong to other nodes, as the tenant is told.
    pub fn routes(&self) -> &Routes {
        // SAFETY: as in `queue`.
        unsafe { &(*self.memory()).routes }
    }

    fn atomics(&self) -> Atomics<'_> {
        // SAFETY: as in `queue`; only the atomic fields of the header are borrowed.
        unsafe {
            let header: *const TenantHeader = &raw const (*self.memory()).header;
            Atomics {
                messages: &(*header).messages,
                daemon_sleeps: &(*header).daemon_sleeps,
                taken: &(*header).taken,
                counters: &(*header).counters,
            }
        }
    }

    /// The next request of the tenant's queue.
    pub fn take(&mut self) -> Option<Request> {
        // The queue's borrow ends before the taker's begins: both are fields of `self`.
        let mut taker = std::mem::take(&mut self.taker);
        let request = taker.take(self.queue());
        self.taker = taker;
        if request.is_some() {
            self.atomics().taken.fetch_add(1, Ordering::Relaxed);
        }
        request
    }

    /// The daemon is about to sleep: the tenant sends a KICK behind its next request. Look at the
    /// queue once more after this.
    pub fn start_sleep(&self) {
        self.atomics().daemon_sleeps.store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The daemon is awake and will look at the queue.
    pub fn end_sleep(&self) {
        self.atomics().daemon_sleeps.store(0, Ordering::SeqCst);
    }

    /// A message was sent to the tenant: it looks when it sees the count change.
    pub fn count_message(&self) {
        self.atomics().messages.fetch_add(1, Ordering::Release);
    }

    /// What the tenant counts, by [`rdsock_shm::layout::Counter`].
    pub fn counters(&self) -> [u64; 16] {
        self.atomics()
            .counters
            .each_ref()
            .map(|counter| counter.load(Ordering::Relaxed))
    }

    /// The connection records, to be read by whoever may wait.
    pub fn records(&self) -> Records {
        Records(self.map.file().clone())
    }
}

/// The connection records of a tenant, which has them in its hands: a read may wait.
#[derive(Debug)]
pub struct Records(Arc<Foreign>);

impl Records {
    /// Some of the connection records in use, as (record number, record), from the place `from` on, 0 at first; and the
    /// place to go on from, `None` behind the last one. Those of one block are found, the next one in which there is anything.
    ///
    /// (Where holes are, the kernel would tell only who takes the file's lock, which the tenant can keep.)
    pub fn read(&self, from: u64) -> io::Result<(Vec<Numbered>, Option<u64>)> {
        const START: u64 = offset_of!(TenantMemory, conns) as u64;
        const RECORD: u64 = size_of::<ConnRecord>() as u64;
        const END: u64 = START + RECORD * CONN_RECORDS as u64;
        // Blocks start at record boundaries, so that no record is torn between two.
        let mut at = from.max(START);
        let mut room = vec![0; BLOCKS * BLOCK];
        while at < END {
            let most = room.len().min((END - at) as usize);
            let len = nix::sys::uio::pread(&self.0, &mut room[..most], at as i64)?;
            let mut blocks = room[..len].chunks(BLOCK);
            let Some(empty) = blocks.position(|block| *block != [0; BLOCK][..block.len()]) else {
                if len == 0 {
                    break;
                }
                at += len as u64;
                continue;
            };
            at += (empty * BLOCK) as u64;
            let block = &room[empty * BLOCK..len.min((empty + 1) * BLOCK)];
            let (records, _) = block.as_chunks::<{ RECORD as usize }>();
            let first = ((at - START) / RECORD) as u32;
            let found = (first..)
                .zip(records)
                .map(|(number, record)| (number, ConnView::parse(record)))
                .filter(|(_, record)| record.in_use())
                .collect();
            let next = at + records.len() as u64 * RECORD;
            return Ok((found, (!records.is_empty() && next < END).then_some(next)));
        }
        Ok((Vec::new(), None))
    }
}

struct Atomics<'a> {
    messages: &'a rdsock_shm::sync::AtomicU64,
    daemon_sleeps: &'a rdsock_shm::sync::AtomicU32,
    taken: &'a rdsock_shm::sync::AtomicU32,
    counters: &'a [rdsock_shm::sync::AtomicU64; 16],
}

/// A record's number, and the record.
pub type Numbered = (u32, ConnView);

/// A copy of a [`ConnRecord`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnView {
    /// The tenant's fd.
    pub fd: i32,
    /// Code of a [`rdsock_shm::reason::State`].
    pub state: u32,
    /// Code of a [`rdsock_shm::reason::Reason`].
    pub reason: u32,
    /// Uses of the record.
    pub generation: u32,
    /// The stream, 0 for none.
    pub stream_id: u64,
}

impl ConnView {
    fn parse(bytes: &[u8; size_of::<ConnRecord>()]) -> Self {
        let field = |at: usize| u32_at(bytes, at);
        ConnView {
            fd: field(offset_of!(ConnRecord, fd)) as i32,
            state: field(offset_of!(ConnRecord, state)),
            reason: field(offset_of!(ConnRecord, reason)),
            generation: field(offset_of!(ConnRecord, generation)),
            stream_id: u64_at(bytes, offset_of!(ConnRecord, stream_id)),
        }
    }

    /// A record of zeroes was never used.
    fn in_use(&self) -> bool {
        self.fd >= 0 && self.generation != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::closer_of_test;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    #[test]
    fn only_records_in_use_are_found() {
        let map = TenantMap::make(
            &Bells::make(&closer_of_test()).unwrap(),
            Charge::of_nothing(),
            Charge::of_nothing(),
        )
        .unwrap();
        let file = File::from(map.file().as_fd().try_clone_to_owned().unwrap());
        let record = |number: u64, fd: i32, generation: u32| {
            let at = offset_of!(TenantMemory, conns) as u64 + 32 * number;
            file.write_all_at(&fd.to_ne_bytes(), at).unwrap();
            let at = at + offset_of!(ConnRecord, generation) as u64;
            file.write_all_at(&generation.to_ne_bytes(), at).unwrap();
        };
        record(0, 5, 1);
        record(1, -1, 3);
        record(130, 0, 2);
        record(65_535, 9, 1);
        let (mut found, mut place) = (Vec::new(), Some(0));
        while let Some(from) = place {
            let (records, next) = map.records().read(from).unwrap();
            assert!(next.is_none_or(|next| next > from));
            found.extend(records.iter().map(|(number, record)| (*number, record.fd)));
            place = next;
        }
        assert_eq!(found, [(0, 5), (130, 0), (65_535, 9)]);
    }
}
