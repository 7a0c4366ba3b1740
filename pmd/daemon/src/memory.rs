//! Memory that the daemon shares: it makes the streams' memory, and maps the head of a tenant's.
//!
//! The only module of the daemon that maps memory. Whatever a tenant can write is reached
//! through atomics, or read through the file ([`read_at`]), never through plain references.

use std::fs::File;
use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use rdsock_shm::control::Request;
use rdsock_shm::layout::{
    BELL_MAGIC, BellBoard, ConnRecord, DATA_OFFSET, Direction, END_MAGIC, EndPage, NOT_SWITCHED,
    Producer, QUEUE_SLOTS, QueueSlot, STREAM_MAGIC, StreamHeader, TENANT_MAGIC, TenantHeader,
    TenantMemory, VERSION, stream_bytes,
};
use rdsock_shm::queue::Taker;
use rdsock_shm::sync::{Ordering, fence};

/// Bytes of a huge page.
pub const HUGE_PAGE: u64 = 2 << 20;
const PAGE: u64 = 4096;

/// Why an fd is not memory that the daemon will touch. Consequence: the tenant is refused.
#[derive(Debug, thiserror::Error)]
pub enum BadMemory {
    /// Not a memfd of ordinary pages.
    #[error("not a memfd of ordinary pages")]
    Kind,
    /// It could shrink, which would kill the daemon, or can't be written.
    #[error("not sealed with F_SEAL_SHRINK, or sealed against writing")]
    Seals,
    /// Another size than this version's.
    #[error("{found} bytes, expected {expected}")]
    Size {
        /// Bytes that the file has.
        found: u64,
        /// Bytes that it must have.
        expected: u64,
    },
    /// Magic or version is wrong.
    #[error("wrong magic or version")]
    Identity,
    /// The system said no.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Checks that an fd is a memfd of ordinary pages that can't shrink, with `expected` bytes.
fn check_memfd(fd: BorrowedFd<'_>, expected: u64) -> Result<(), BadMemory> {
    let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map_err(|_| BadMemory::Kind)?;
    if fstatfs(fd).map_err(io::Error::from)?.filesystem_type() != TMPFS_MAGIC {
        return Err(BadMemory::Kind);
    }
    let unwritable = libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE;
    if seals & libc::F_SEAL_SHRINK == 0 || seals & unwritable != 0 {
        return Err(BadMemory::Seals);
    }
    let found = nix::sys::stat::fstat(fd).map_err(io::Error::from)?.st_size as u64;
    if found != expected {
        return Err(BadMemory::Size { found, expected });
    }
    Ok(())
}

fn check_identity(file: &File, magic: u64, size: usize) -> Result<(), BadMemory> {
    let mut start = [0; 16];
    file.read_exact_at(&mut start, 0)?;
    let expected: Vec<u8> = [
        &magic.to_ne_bytes()[..],
        &VERSION.to_ne_bytes(),
        &(size as u32).to_ne_bytes(),
    ]
    .concat();
    if start == *expected {
        Ok(())
    } else {
        Err(BadMemory::Identity)
    }
}

/// Checks a tenant's bell board. The daemon never maps it: it only hands it to the tenant's peers.
pub fn check_bells(fd: OwnedFd) -> Result<OwnedFd, BadMemory> {
    check_memfd(fd.as_fd(), size_of::<BellBoard>() as u64)?;
    let file = File::from(fd);
    check_identity(&file, BELL_MAGIC, size_of::<BellBoard>())?;
    Ok(file.into())
}

/// A tenant's memory: header and queue are mapped, the connection records are read on demand.
#[derive(Debug)]
pub struct TenantMap {
    map: MmapRaw,
    file: File,
    taker: Taker,
}

impl TenantMap {
    /// Checks and maps.
    pub fn new(fd: OwnedFd) -> Result<Self, BadMemory> {
        const MAPPED: usize = offset_of!(TenantMemory, conns);
        check_memfd(fd.as_fd(), size_of::<TenantMemory>() as u64)?;
        let file = File::from(fd);
        check_identity(&file, TENANT_MAGIC, size_of::<TenantMemory>())?;
        let map = MmapOptions::new().len(MAPPED).map_raw(&file)?;
        Ok(TenantMap {
            map,
            file,
            taker: Taker::new(),
        })
    }

    fn memory(&self) -> *const TenantMemory {
        self.map.as_ptr().cast()
    }

    fn queue(&self) -> &[QueueSlot; QUEUE_SLOTS] {
        // SAFETY: the queue lies within the mapping (MAPPED is its end), which lives as long as
        // `self`, can't shrink (sealed) and is page-aligned. It is made of atomics only, so what
        // the tenant stores at the same time is no data race.
        unsafe { &(*self.memory()).queue }
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

    /// The connection records in use, as (record number, record). Holes of the file are skipped.
    pub fn conns(&self) -> io::Result<Vec<(u32, ConnView)>> {
        const START: u64 = offset_of!(TenantMemory, conns) as u64;
        const RECORD: u64 = size_of::<ConnRecord>() as u64;
        let mut found = Vec::new();
        let mut at = START;
        let mut block = [0; PAGE as usize];
        while let Some(data) = next_data(&self.file, at)? {
            // Blocks start at record boundaries, so that no record is torn between two.
            at = data.max(START);
            at -= (at - START) % RECORD;
            let len = self.file.read_at(&mut block, at)?;
            let (records, _) = block
                .get(..len)
                .unwrap_or(&[])
                .as_chunks::<{ RECORD as usize }>();
            if records.is_empty() {
                break;
            }
            let first = ((at - START) / RECORD) as u32;
            found.extend(
                (first..)
                    .zip(records)
                    .map(|(number, record)| (number, ConnView::parse(record)))
                    .filter(|(_, record)| record.in_use()),
            );
            at += records.len() as u64 * RECORD;
        }
        Ok(found)
    }
}

/// Offset of the next byte at or behind `at` that is not in a hole.
fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    use nix::unistd::{Whence, lseek};
    match lseek(file, at as i64, Whence::SeekData) {
        Ok(offset) => Ok(Some(offset as u64)),
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

struct Atomics<'a> {
    messages: &'a rdsock_shm::sync::AtomicU64,
    daemon_sleeps: &'a rdsock_shm::sync::AtomicU32,
    taken: &'a rdsock_shm::sync::AtomicU32,
    counters: &'a [rdsock_shm::sync::AtomicU64; 16],
}

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

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|word| word.try_into().ok())
        .map_or(0, u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|word| word.try_into().ok())
        .map_or(0, u64::from_ne_bytes)
}

/// When streams are made of huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// Where enough are free; said once where not.
    Auto,
    /// As `Auto`, but each stream that gets none is warned of.
    Always,
    /// Never.
    Never,
}

/// A stream's memory and the two end pages, as fds.
#[derive(Debug)]
pub struct StreamFds {
    /// Header and rings.
    pub stream: OwnedFd,
    /// The page of each end.
    pub ends: [OwnedFd; 2],
    /// Made of huge pages.
    pub huge: bool,
    /// Bytes of the stream's memory.
    pub bytes: u64,
}

/// Makes the memory of a stream. With `try_huge`, of huge pages if they can be had.
pub fn make_stream(stream_id: u64, ring_size: u64, try_huge: bool) -> io::Result<StreamFds> {
    let (stream, huge, bytes) = match try_huge {
        true => match make_huge(stream_id, ring_size) {
            Ok((file, bytes)) => (file, true, bytes),
            Err(_) => ordinary(stream_id, ring_size)?,
        },
        false => ordinary(stream_id, ring_size)?,
    };
    Ok(StreamFds {
        stream: stream.into(),
        ends: [
            make_end(stream_id, 0)?.into(),
            make_end(stream_id, 1)?.into(),
        ],
        huge,
        bytes,
    })
}

/// Bytes of a stream's memory in pages of `page` bytes.
pub fn rounded(ring_size: u64, page: u64) -> u64 {
    stream_bytes(ring_size).next_multiple_of(page)
}

fn ordinary(stream_id: u64, ring_size: u64) -> io::Result<(File, bool, u64)> {
    let bytes = rounded(ring_size, PAGE);
    let file = memfd(c"rdsock-stream", MFdFlags::empty(), bytes)?;
    file.write_all_at(&header_bytes(stream_id, ring_size), 0)?;
    seal(&file)?;
    Ok((file, false, bytes))
}

fn make_huge(stream_id: u64, ring_size: u64) -> io::Result<(File, u64)> {
    let bytes = rounded(ring_size, HUGE_PAGE);
    let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let file = memfd(c"rdsock-stream", flags, bytes)?;
    // Mapping all of it reserves the pages for the file, so that neither end can fault into a
    // lack of them. hugetlbfs has no write(2), so the header goes through the mapping.
    let map = MmapOptions::new().len(bytes as usize).map_raw(&file)?;
    let header = header_bytes(stream_id, ring_size);
    // SAFETY: the mapping is longer than a header, and nobody else has the fd yet.
    unsafe { std::ptr::copy_nonoverlapping(header.as_ptr(), map.as_mut_ptr(), header.len()) };
    seal(&file)?;
    Ok((file, bytes))
}

fn memfd(name: &std::ffi::CStr, flags: MFdFlags, bytes: u64) -> io::Result<File> {
    let flags = flags | MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(name, flags)?);
    file.set_len(bytes)?;
    Ok(file)
}

fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(())
}

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    if let Some(place) = bytes.get_mut(at..at + N) {
        place.copy_from_slice(&value);
    }
}

/// Offset of `switch_at` of a direction in a stream's memory.
const fn producer_at(direction: usize) -> usize {
    offset_of!(StreamHeader, directions)
        + direction * size_of::<Direction>()
        + offset_of!(Direction, producer)
}

fn header_bytes(stream_id: u64, ring_size: u64) -> Vec<u8> {
    let mut bytes = vec![0; size_of::<StreamHeader>()];
    put(
        &mut bytes,
        offset_of!(StreamHeader, magic),
        STREAM_MAGIC.to_ne_bytes(),
    );
    put(
        &mut bytes,
        offset_of!(StreamHeader, version),
        VERSION.to_ne_bytes(),
    );
    let size = size_of::<StreamHeader>() as u32;
    put(
        &mut bytes,
        offset_of!(StreamHeader, header_size),
        size.to_ne_bytes(),
    );
    put(
        &mut bytes,
        offset_of!(StreamHeader, stream_id),
        stream_id.to_ne_bytes(),
    );
    put(
        &mut bytes,
        offset_of!(StreamHeader, ring_size),
        ring_size.to_ne_bytes(),
    );
    put(
        &mut bytes,
        offset_of!(StreamHeader, data_offset),
        DATA_OFFSET.to_ne_bytes(),
    );
    for direction in 0..2 {
        let at = producer_at(direction) + offset_of!(Producer, switch_at);
        put(&mut bytes, at, NOT_SWITCHED.to_ne_bytes());
    }
    bytes
}

fn make_end(stream_id: u64, end: u32) -> io::Result<File> {
    let file = memfd(c"rdsock-end", MFdFlags::empty(), PAGE)?;
    let mut bytes = vec![0; size_of::<EndPage>()];
    put(
        &mut bytes,
        offset_of!(EndPage, magic),
        END_MAGIC.to_ne_bytes(),
    );
    put(
        &mut bytes,
        offset_of!(EndPage, version),
        VERSION.to_ne_bytes(),
    );
    put(&mut bytes, offset_of!(EndPage, end), end.to_ne_bytes());
    put(
        &mut bytes,
        offset_of!(EndPage, stream_id),
        stream_id.to_ne_bytes(),
    );
    put(&mut bytes, offset_of!(EndPage, holders), 1u32.to_ne_bytes());
    file.write_all_at(&bytes, 0)?;
    seal(&file)?;
    Ok(file)
}

/// One direction of a stream as its ends have left it, for people: hostile words, shown as they
/// are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct DirectionView {
    /// The sender has moved to the ring.
    pub switched: bool,
    /// Position after the last byte published.
    pub head: u64,
    /// Position after the last byte consumed.
    pub tail: u64,
    /// Bits of [`rdsock_shm::layout::mark`].
    pub mark: u32,
    /// Wake bytes sent by the producer.
    pub wakes: u32,
}

impl DirectionView {
    /// Reads both directions of a stream through its file, which can't fault and allocates
    /// nothing.
    pub fn read_both(stream: impl AsFd) -> io::Result<[DirectionView; 2]> {
        use rdsock_shm::layout::Consumer;
        let mut bytes = [0; size_of::<StreamHeader>()];
        nix::sys::uio::pread(stream, &mut bytes, 0)?;
        Ok([0, 1].map(|direction| {
            let at = producer_at(direction);
            let consumer = at - offset_of!(Direction, producer) + offset_of!(Direction, consumer);
            DirectionView {
                switched: u64_at(&bytes, at + offset_of!(Producer, switch_at)) != NOT_SWITCHED,
                head: u64_at(&bytes, at + offset_of!(Producer, head)),
                tail: u64_at(&bytes, consumer + offset_of!(Consumer, tail)),
                mark: u32_at(&bytes, at + offset_of!(Producer, mark)),
                wakes: u32_at(&bytes, at + offset_of!(Producer, wakes)),
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_starts_with_both_directions_on_the_anchor() {
        let fds = make_stream(7, 65536, false).unwrap();
        assert!(!fds.huge);
        assert_eq!(fds.bytes, 4096 + 2 * 65536);
        let untouched = DirectionView::default();
        assert_eq!(
            DirectionView::read_both(&fds.stream).unwrap(),
            [untouched; 2]
        );
        // Sealed: nobody can make the other end fault.
        let stream = File::from(fds.stream);
        assert!(stream.set_len(0).is_err() && stream.set_len(1 << 30).is_err());
        let directions = producer_at(1) + offset_of!(Producer, switch_at);
        stream
            .write_all_at(&9u64.to_ne_bytes(), directions as u64)
            .unwrap();
        let [first, second] = DirectionView::read_both(&stream).unwrap();
        assert!(!first.switched && second.switched);
    }

    #[test]
    fn a_stream_of_huge_pages_reads_the_same() {
        let fds = make_stream(7, 65536, true).unwrap();
        if !fds.huge {
            return eprintln!("left out: no huge page is free");
        }
        assert_eq!(fds.bytes, HUGE_PAGE);
        let untouched = DirectionView::default();
        assert_eq!(
            DirectionView::read_both(&fds.stream).unwrap(),
            [untouched; 2]
        );
        let map = MmapOptions::new().map_raw(&fds.stream).unwrap();
        // SAFETY: within the mapping, aligned, and nobody else writes it.
        let magic = unsafe { map.as_ptr().cast::<u64>().read() };
        assert_eq!(magic, STREAM_MAGIC);
    }

    #[test]
    fn only_records_in_use_are_found() {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"test", flags).unwrap());
        file.set_len(size_of::<TenantMemory>() as u64).unwrap();
        let start: Vec<u8> = [
            &TENANT_MAGIC.to_ne_bytes()[..],
            &VERSION.to_ne_bytes(),
            &(size_of::<TenantMemory>() as u32).to_ne_bytes(),
        ]
        .concat();
        file.write_all_at(&start, 0).unwrap();
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
        assert!(TenantMap::new(file.try_clone().unwrap().into()).is_err());
        let seal = SealFlag::F_SEAL_SHRINK;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seal)).unwrap();
        let map = TenantMap::new(file.into()).unwrap();
        let found: Vec<(u32, i32)> = map
            .conns()
            .unwrap()
            .iter()
            .map(|(number, record)| (*number, record.fd))
            .collect();
        assert_eq!(found, [(0, 5), (130, 0), (65_535, 9)]);
    }
}
