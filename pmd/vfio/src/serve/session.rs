//! What a client asks of a served model, and the answers. A message that makes no sense is answered with an errno;
//! whatever comes, the client harms its own device and nothing else.

use super::config_space::{self, BAR4_SIZE, ConfigSpace};
use super::memory::Files;
use crate::fire::fire;
use crate::translation::Translation;
use crate::user::message::*;
use crate::user::socket::Received;
use nix::errno::Errno;
use rdsock_model::{Bar, Function, Interrupt};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Most bytes of one access to a region.
pub const MOST_DATA: usize = 64 << 10;
/// Said with the version.
const CAPABILITIES: &[u8] =
    b"{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":65536}}\0";

/// Numbers of `linux/vfio.h`.
const REGIONS: u32 = 9;
const IRQS: u32 = 5;
const IS_PCI_WITH_RESET: u32 = 0b11;
const READ_WRITE: u32 = 0b11;
const MMAP_CAPABILITIES: u32 = 0b1100;
const CONFIG_REGION: u32 = 7;
const MSIX: u32 = 2;
/// VFIO_IRQ_INFO_EVENTFD.
const BY_EVENTFD: u32 = 1;
/// VFIO_IRQ_SET_DATA_*, and VFIO_IRQ_SET_ACTION_TRIGGER.
const DATA_NONE: u32 = 1;
const DATA_BOOL: u32 = 1 << 1;
const DATA_EVENTFD: u32 = 1 << 2;
const TRIGGER: u32 = 1 << 5;

/// The device, as a client has it.
#[derive(Debug)]
pub struct Session {
    pub function: Function,
    pub translation: Arc<Translation>,
    /// The queue pages, unless each access to them is to be a message.
    pub pages: Option<File>,
    config: ConfigSpace,
    msix_table: Vec<u8>,
    eventfds: Vec<Option<Arc<OwnedFd>>>,
    files: Files,
    greeted: bool,
}

/// What is answered.
#[derive(Debug, Default)]
pub struct Reply<'a> {
    pub body: Vec<u8>,
    pub file: Option<BorrowedFd<'a>>,
}

impl From<Vec<u8>> for Reply<'_> {
    fn from(body: Vec<u8>) -> Self {
        Reply { body, file: None }
    }
}

impl Session {
    pub fn new(function: Function, translation: Arc<Translation>, pages: Option<File>) -> Self {
        let vectors = function.vectors();
        Session {
            config: ConfigSpace::new(vectors, function.bar_size(Bar::Pages)),
            msix_table: vec![0; BAR4_SIZE as usize],
            eventfds: vec![None; vectors as usize],
            files: Files::default(),
            greeted: false,
            function,
            translation,
            pages,
        }
    }

    /// Does what a message asks for.
    pub fn handle(&mut self, message: Received) -> Result<Reply<'_>, Errno> {
        let Received {
            header,
            body,
            mut files,
        } = message;
        if !self.greeted && header.command != command::VERSION {
            return Err(Errno::EPROTO);
        }
        match header.command {
            command::VERSION => self.version(&body).map(Reply::from),
            command::DMA_MAP if files.len() > 1 => Err(Errno::EINVAL),
            command::DMA_MAP => self.map(&body, files.pop()).map(Reply::from),
            command::DMA_UNMAP => self.unmap(&body).map(Reply::from),
            command::DEVICE_GET_INFO => {
                let info = DeviceInfo {
                    argsz: DeviceInfo::LEN as u32,
                    flags: IS_PCI_WITH_RESET,
                    regions: REGIONS,
                    irqs: IRQS,
                };
                Ok(info.bytes().to_vec().into())
            }
            command::DEVICE_GET_REGION_INFO => self.describe_region(&body),
            command::DEVICE_GET_IRQ_INFO => self.describe_irq(&body).map(Reply::from),
            command::DEVICE_SET_IRQS => self.set_irqs(&body, files).map(Reply::from),
            command::REGION_READ => self.read(&body).map(Reply::from),
            command::REGION_WRITE => self.write(&body).map(Reply::from),
            command::DEVICE_RESET => {
                self.reset();
                Ok(Reply::default())
            }
            _ => Err(Errno::EOPNOTSUPP),
        }
    }

    /// The client has gone: the device is as it was before it came, and reaches nothing.
    pub fn end(&mut self) {
        self.greeted = false;
        self.reset();
        self.config.reset();
        self.disable_interrupts();
        self.cut(0, u64::MAX);
    }

    fn reset(&mut self) {
        self.function.reset();
        self.config.reset();
        self.msix_table.fill(0);
    }

    fn version(&mut self, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let (theirs, _) = Version::split(body).ok_or(Errno::EINVAL)?;
        if theirs.major != MAJOR {
            return Err(Errno::EPROTONOSUPPORT);
        }
        self.greeted = true;
        let agreed = Version {
            major: MAJOR,
            minor: theirs.minor.min(MINOR),
        };
        Ok([&agreed.bytes()[..], CAPABILITIES].concat())
    }

    fn map(&mut self, body: &[u8], file: Option<OwnedFd>) -> Result<Vec<u8>, Errno> {
        let (map, _) = DmaMap::split(body).ok_or(Errno::EINVAL)?;
        let writable = match map.flags {
            dma::READ => false,
            flags if flags == dma::READ | dma::WRITE => true,
            _ => return Err(Errno::EINVAL),
        };
        // A virtual machine tells of its ROM and of other devices' registers too, of which there is no file: nothing
        // that this device could reach.
        let Some(file) = file else {
            return Ok(Vec::new());
        };
        let mapped = self.files.map(&file, map.offset, map.size, writable);
        let mapping = mapped.map_err(|error| {
            tracing::warn!(iova = format_args!("{:#x}", map.address), %error, "cannot map memory of the client");
            error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw)
        })?;
        let inserted = self
            .function
            .change_reach(|_| self.translation.insert(map.address, mapping));
        inserted.map_err(|_| Errno::EEXIST)?;
        Ok(Vec::new())
    }

    /// Never fails for what is not mapped: virtual machines unmap great ranges to be sure.
    fn unmap(&mut self, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let (unmap, _) = DmaUnmap::split(body).ok_or(Errno::EINVAL)?;
        match unmap.flags {
            0 => self.cut(unmap.address, unmap.size),
            dma::UNMAP_ALL => self.cut(0, u64::MAX),
            _ => return Err(Errno::EINVAL),
        }
        Ok(unmap.bytes().to_vec())
    }

    /// When it has returned, no access to the range is under way.
    fn cut(&self, address: u64, size: u64) {
        let done: Result<(), Errno> = self.function.change_reach(|_| {
            self.translation.cut(address, size);
            Ok(())
        });
        // It is what the closure returned.
        let _ = done;
    }

    fn region_size(&self, index: u32) -> u64 {
        match index {
            0 => self.function.bar_size(Bar::Management),
            2 => self.function.bar_size(Bar::Pages),
            4 => BAR4_SIZE,
            CONFIG_REGION => config_space::SIZE as u64,
            _ => 0,
        }
    }

    fn describe_region(&self, body: &[u8]) -> Result<Reply<'_>, Errno> {
        let (asked, _) = RegionInfo::split(body).ok_or(Errno::EINVAL)?;
        if asked.index >= REGIONS || (asked.argsz as usize) < RegionInfo::LEN {
            return Err(Errno::EINVAL);
        }
        let size = self.region_size(asked.index);
        let mut info = RegionInfo {
            argsz: RegionInfo::LEN as u32,
            flags: if size == 0 { 0 } else { READ_WRITE },
            index: asked.index,
            cap_offset: 0,
            size,
            offset: 0,
        };
        let Some(pages) = self.pages.as_ref().filter(|_| asked.index == 2) else {
            return Ok(info.bytes().to_vec().into());
        };
        // One area, which is all of it: with it comes the file.
        let mut areas = Vec::new();
        areas.extend(1u16.to_ne_bytes());
        areas.extend(1u16.to_ne_bytes());
        areas.extend([0; 4]);
        areas.extend(1u32.to_ne_bytes());
        areas.extend([0; 4]);
        areas.extend(0u64.to_ne_bytes());
        areas.extend(size.to_ne_bytes());
        info.flags |= MMAP_CAPABILITIES;
        info.cap_offset = RegionInfo::LEN as u32;
        info.argsz += areas.len() as u32;
        let mut bytes = info.bytes().to_vec();
        if asked.argsz < info.argsz {
            return Ok(bytes.into());
        }
        bytes.extend(areas);
        Ok(Reply {
            body: bytes,
            file: Some(pages.as_fd()),
        })
    }

    fn describe_irq(&self, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let (asked, _) = IrqInfo::split(body).ok_or(Errno::EINVAL)?;
        if asked.index >= IRQS {
            return Err(Errno::EINVAL);
        }
        let (flags, count) = match asked.index {
            MSIX => (BY_EVENTFD, self.function.vectors()),
            _ => (0, 0),
        };
        let info = IrqInfo {
            argsz: IrqInfo::LEN as u32,
            flags,
            index: asked.index,
            count,
        };
        Ok(info.bytes().to_vec())
    }

    fn set_irqs(&mut self, body: &[u8], files: Vec<OwnedFd>) -> Result<Vec<u8>, Errno> {
        let (set, data) = SetIrqs::split(body).ok_or(Errno::EINVAL)?;
        let end = set.start.checked_add(set.count).ok_or(Errno::EINVAL)?;
        if set.index != MSIX {
            // There are none; to disable them all is nothing to do.
            let disables = set.index < IRQS && set.count == 0;
            return if disables {
                Ok(Vec::new())
            } else {
                Err(Errno::EINVAL)
            };
        }
        if end as usize > self.eventfds.len() {
            return Err(Errno::EINVAL);
        }
        let range = set.start as usize..end as usize;
        match set.flags.checked_sub(TRIGGER) {
            Some(DATA_EVENTFD) if files.is_empty() => {
                range.for_each(|vector| self.set_eventfd(vector, None))
            }
            Some(DATA_EVENTFD) if files.len() == range.len() => {
                for (vector, eventfd) in range.zip(files) {
                    self.set_eventfd(vector, Some(Arc::new(eventfd)));
                }
            }
            Some(DATA_NONE) if set.count == 0 => self.disable_interrupts(),
            Some(DATA_NONE) => self.eventfds[range]
                .iter()
                .flatten()
                .for_each(|to| fire(to)),
            Some(DATA_BOOL) if data.len() == range.len() => {
                for (to, fires) in self.eventfds[range].iter().zip(data) {
                    if let Some(to) = to.as_ref().filter(|_| *fires != 0) {
                        fire(to);
                    }
                }
            }
            _ => return Err(Errno::EINVAL),
        }
        Ok(Vec::new())
    }

    fn set_eventfd(&mut self, vector: usize, eventfd: Option<Arc<OwnedFd>>) {
        self.eventfds[vector].clone_from(&eventfd);
        let interrupt = eventfd.map(|eventfd| -> Interrupt { Arc::new(move || fire(&eventfd)) });
        self.function.set_interrupt(vector as u32, interrupt);
    }

    fn disable_interrupts(&mut self) {
        (0..self.eventfds.len()).for_each(|vector| self.set_eventfd(vector, None));
    }

    /// Checks an access: the offset of its first byte.
    fn inside(&self, access: &RegionAccess) -> Result<usize, Errno> {
        let end = access.offset.checked_add(access.count.into());
        let inside = end.is_some_and(|end| end <= self.region_size(access.region));
        if !inside || access.count as usize > MOST_DATA {
            return Err(Errno::EINVAL);
        }
        Ok(access.offset as usize)
    }

    fn read(&self, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let (access, _) = RegionAccess::split(body).ok_or(Errno::EINVAL)?;
        let at = self.inside(&access)?;
        // An access that is not to one register reads all ones.
        let len = access.count as usize;
        let mut data = vec![0xff; len];
        match access.region {
            CONFIG_REGION => self.config.read(at, &mut data),
            4 => data.copy_from_slice(&self.msix_table[at..at + len]),
            region => {
                if let (Some(bar), 4 | 8) = (bar(region), len) {
                    let value = self.function.read(bar, access.offset, access.count);
                    data.copy_from_slice(&value.to_le_bytes()[..len]);
                }
            }
        }
        Ok([&access.bytes()[..], &data].concat())
    }

    fn write(&mut self, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let (access, data) = RegionAccess::split(body).ok_or(Errno::EINVAL)?;
        let at = self.inside(&access)?;
        if data.len() != access.count as usize {
            return Err(Errno::EINVAL);
        }
        match access.region {
            CONFIG_REGION => {
                if self.config.write(at, data) {
                    self.reset();
                }
            }
            4 if at < config_space::PENDING_BITS as usize => {
                self.msix_table[at..at + data.len()].copy_from_slice(data)
            }
            region => {
                if let (Some(bar), 4 | 8) = (bar(region), data.len()) {
                    let mut bytes = [0; 8];
                    bytes[..data.len()].copy_from_slice(data);
                    let value = u64::from_le_bytes(bytes);
                    self.function.write(bar, access.offset, access.count, value);
                }
            }
        }
        Ok(access.bytes().to_vec())
    }
}

fn bar(region: u32) -> Option<Bar> {
    match region {
        0 => Some(Bar::Management),
        2 => Some(Bar::Pages),
        _ => None,
    }
}
