//! A stream's memory and its two end pages.

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use memmap2::MmapOptions;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fchmod};
use rdsock_shm::layout::{
    BELL_MAGIC, BellBoard, DATA_OFFSET, Direction, END_MAGIC, EndPage, NOT_SWITCHED, Producer,
    STREAM_MAGIC, StreamHeader, VERSION, stream_bytes,
};

use super::kept::Kept;
use super::whole::make_whole;
use super::{identity, u32_at, u64_at};
use crate::accounts::Charge;

/// Bytes of a huge page.
pub const HUGE_PAGE: u64 = 2 << 20;
const PAGE: u64 = 4096;

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
    /// The page of each end that a program holds.
    pub ends: [Option<OwnedFd>; 2],
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
            Some(make_end(stream_id, 0)?.into()),
            Some(make_end(stream_id, 1)?.into()),
        ],
        huge,
        bytes,
    })
}

/// Makes the memory of a stream to another node, of `bytes` bytes and ordinary pages: the device maps it in
/// whole, so it is small. A program of this node holds the end `end`, 0 or 1. Its pages are kept for as long as a poll core touches
/// them, and so is what is paid for all of that.
pub fn make_stream_with(
    stream_id: u64,
    ring_size: u64,
    bytes: u64,
    end: usize,
    charge: Arc<Charge>,
) -> io::Result<(StreamFds, Kept)> {
    let mut ends = [None, None];
    if let Some(place) = ends.get_mut(end) {
        *place = Some(make_end(stream_id, end as u32)?.into());
    }
    let (stream, is_whole) = of_pages(stream_id, ring_size, bytes)?;
    let kept = match is_whole {
        true => Kept::pages_of(&[stream.as_fd()], charge)?,
        // Who can make holes in it has no need to collapse it.
        false => Kept::nothing(charge),
    };
    let fds = StreamFds {
        stream: stream.into(),
        ends,
        huge: false,
        bytes,
    };
    Ok((fds, kept))
}

/// Makes a bell board.
pub fn make_board() -> io::Result<OwnedFd> {
    let size = size_of::<BellBoard>();
    let file = memfd(c"rdsock-bells", size as u64)?;
    file.write_all_at(&identity(BELL_MAGIC, size), 0)?;
    seal(&file)?;
    Ok(file.into())
}

/// Bytes of a stream's memory in pages of `page` bytes.
pub fn rounded(ring_size: u64, page: u64) -> u64 {
    stream_bytes(ring_size).next_multiple_of(page)
}

fn ordinary(stream_id: u64, ring_size: u64) -> io::Result<(File, bool, u64)> {
    let bytes = rounded(ring_size, PAGE);
    Ok((of_pages(stream_id, ring_size, bytes)?.0, false, bytes))
}

/// And whether nobody makes holes in it.
fn of_pages(stream_id: u64, ring_size: u64, bytes: u64) -> io::Result<(File, bool)> {
    let file = memfd(c"rdsock-stream", bytes)?;
    file.write_all_at(&header_bytes(stream_id, ring_size), 0)?;
    let is_whole = seal(&file)?;
    Ok((file, is_whole))
}

fn make_huge(stream_id: u64, ring_size: u64) -> io::Result<(File, u64)> {
    let bytes = rounded(ring_size, HUGE_PAGE);
    let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let file = memfd_with(c"rdsock-stream", flags, bytes)?;
    // Mapping all of it reserves the pages for the file, so that neither end can fault into a
    // lack of them. hugetlbfs has no write(2), so the header goes through the mapping.
    let map = MmapOptions::new().len(bytes as usize).map_raw(&file)?;
    let header = header_bytes(stream_id, ring_size);
    // SAFETY: the mapping is longer than a header, and nobody else has the fd yet.
    unsafe { std::ptr::copy_nonoverlapping(header.as_ptr(), map.as_mut_ptr(), header.len()) };
    seal(&file)?;
    Ok((file, bytes))
}

/// A memfd of ordinary pages.
pub(super) fn memfd(name: &std::ffi::CStr, bytes: u64) -> io::Result<File> {
    memfd_with(name, MFdFlags::empty(), bytes)
}

fn memfd_with(name: &std::ffi::CStr, flags: MFdFlags, bytes: u64) -> io::Result<File> {
    let flags = flags | MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(name, flags)?);
    // Who is given the descriptor uses it. Who may not open the file anew can't have it watched (inotify), so that whoever reads or closes it
    // wakes as many as he likes.
    fchmod(&file, Mode::empty())?;
    file.set_len(bytes)?;
    Ok(file)
}

/// It keeps its size, and has no holes made in it where that can be had: then true.
fn seal(file: &File) -> io::Result<bool> {
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(make_whole(file))
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
    let file = memfd(c"rdsock-end", PAGE)?;
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
    use std::os::unix::fs::MetadataExt;

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
        let stream = File::from(fds.stream);
        // Nobody else can open it, and so nobody can watch it.
        assert_eq!(stream.metadata().unwrap().mode() & 0o777, 0);
        // Sealed: nobody can make the other end fault.
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
}
