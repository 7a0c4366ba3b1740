//! Memory of a served model: the queue pages that it shows to its client, and the client's files.
//!
//! Opts into `unsafe` to see pages and port in mappings.

use crate::sealed;
use crate::translation::Mapping;
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::MFdFlags;
use rdsock_model::sheet::PAGE_SIZE;
use rdsock_model::{Page, Port, PortMemory};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Weak};

/// A port of this process, and queue pages in a file that the client maps.
#[derive(Debug)]
pub struct ServedMemory {
    port: MmapRaw,
    pages: MmapRaw,
}

impl ServedMemory {
    /// Makes it, and the file of the pages.
    pub fn make(queue_sets: usize) -> std::io::Result<(Self, File)> {
        let len = queue_sets as u64 * PAGE_SIZE;
        let file = sealed::make(c"rde-pages", len, MFdFlags::empty())?;
        let pages = MmapOptions::new().len(len as usize).map_raw(&file)?;
        let port = MmapOptions::new().len(size_of::<Port>()).map_anon()?;
        let port = port.into();
        Ok((ServedMemory { port, pages }, file))
    }
}

impl PortMemory for ServedMemory {
    fn port(&self) -> &Port {
        // SAFETY: the mapping is aligned to pages and as long as the object, which is made of atomics of
        // which any contents are valid; nobody accesses it in another way.
        unsafe { &*self.port.as_ptr().cast() }
    }

    fn pages(&self) -> &[Page] {
        let count = self.pages.len() / PAGE_SIZE as usize;
        // SAFETY: as above. The client stores to it too, as to registers.
        unsafe { std::slice::from_raw_parts(self.pages.as_ptr().cast(), count) }
    }
}

/// The client's files, each mapped once, as a whole: the mapping, and whether it can be written.
#[derive(Debug, Default)]
pub struct Files(HashMap<(u64, u64), (Weak<MmapRaw>, bool)>);

impl Files {
    /// A part of a file, for the device. The file must keep its size, or the client could make this process fault.
    pub fn map(
        &mut self,
        file: &OwnedFd,
        offset: u64,
        len: u64,
        writable: bool,
    ) -> std::io::Result<Mapping> {
        sealed::check(file, offset, len)?;
        let found = nix::sys::stat::fstat(file.as_fd())?;
        let key = (found.st_dev, found.st_ino);
        let known = (self.0.get(&key)).and_then(|(memory, can)| Some((memory.upgrade()?, *can)));
        // It may have grown, or have been passed without the right to write.
        let fits = |(memory, can): &(Arc<MmapRaw>, bool)| {
            offset + len <= memory.len() as u64 && (*can || !writable)
        };
        let memory = match known.filter(fits) {
            Some((memory, _)) => memory,
            None => {
                let (mapping, can) = map_whole(file, writable)?;
                let memory = Arc::new(mapping);
                self.0.retain(|_, (memory, _)| memory.strong_count() != 0);
                self.0.insert(key, (Arc::downgrade(&memory), can));
                memory
            }
        };
        // SAFETY: inside the mapping, as `check` and `fits` have found.
        let host = NonNull::new(unsafe { memory.as_mut_ptr().add(offset as usize) });
        Ok(Mapping {
            host: host.ok_or_else(|| std::io::Error::other("mapped at address 0"))?,
            len,
            writable,
            _memory: Some(memory),
        })
    }
}

/// Maps a file, for writing if that is possible; and whether it was.
fn map_whole(file: &OwnedFd, writable: bool) -> std::io::Result<(MmapRaw, bool)> {
    let len = usize::try_from(sealed::size(file)?).map_err(std::io::Error::other)?;
    let mut options = MmapOptions::new();
    options.len(len);
    match options.map_raw(file.as_raw_fd()) {
        Ok(mapping) => Ok((mapping, true)),
        Err(error) if writable => Err(error),
        Err(_) => Ok((options.map_raw_read_only(file.as_raw_fd())?, false)),
    }
}
