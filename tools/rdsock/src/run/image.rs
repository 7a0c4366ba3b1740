//! What a program's file says of itself. It is its owner's word, and may be nonsense: as much is read as the system would read, and nothing
//! but a file is opened.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use elf::abi::{EI_NIDENT, PT_INTERP};
use elf::endian::AnyEndian;
use elf::file::{Class, FileHeader, parse_ident};
use elf::parse::ParseAt;
use elf::segment::{ProgramHeader, SegmentTable};

/// Longest file header; that of a 32-bit program is shorter.
const HEADER: u64 = 64;
/// The system takes no longer table of segments,
const SEGMENTS: u64 = 65536;
/// and no longer name of a loader.
const NAME: u64 = 4096;

/// Opens a program's file to read. To open something else may wait, or do something.
pub fn open(path: &Path) -> Option<File> {
    let mut named = OpenOptions::new();
    let named = named.read(true).custom_flags(libc::O_PATH);
    let found = named.open(path).ok()?;
    let is_file = found.metadata().is_ok_and(|found| found.is_file());
    // By number: its name may lead elsewhere by now.
    let by_number = format!("/proc/self/fd/{}", found.as_raw_fd());
    is_file.then(|| File::open(by_number).ok())?
}

/// An ELF file.
#[derive(Debug)]
pub struct Image {
    /// For how many bits it is.
    pub class: Class,
    /// Path of the loader that it names, if it names one, up to a zero.
    pub loader: Option<Vec<u8>>,
}

impl Image {
    /// `None` for what is no ELF file, or none that the system runs.
    pub fn of(file: &File) -> Option<Self> {
        let head = read(file, 0, HEADER)?;
        let (ident, tail) = head.split_at_checked(EI_NIDENT)?;
        let ident = parse_ident::<AnyEndian>(ident).ok()?;
        let header = FileHeader::parse_tail(ident, tail).ok()?;
        let (class, size) = (header.class, usize::from(header.e_phentsize));
        ProgramHeader::validate_entsize(class, size).ok()?;
        let table = u64::from(header.e_phnum) * u64::from(header.e_phentsize);
        if table > SEGMENTS {
            return None;
        }
        let table = read(file, header.e_phoff, table)?;
        let segments = SegmentTable::new(header.endianness, class, &table);
        let named = segments.iter().find(|segment| segment.p_type == PT_INTERP);
        let loader = match named {
            None => None,
            Some(segment) if segment.p_filesz > NAME => return None,
            Some(segment) => {
                let mut name = read(file, segment.p_offset, segment.p_filesz)?;
                let end = name.iter().position(|byte| *byte == 0);
                name.truncate(end.unwrap_or(name.len()));
                Some(name)
            }
        };
        Some(Image { class, loader })
    }
}

/// What stands at an offset, as far as the file goes.
fn read(file: &File, at: u64, len: u64) -> Option<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).ok()?];
    let mut got = 0;
    while let Some(rest) = bytes.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at.checked_add(got as u64)?) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
    bytes.truncate(got);
    Some(bytes)
}
