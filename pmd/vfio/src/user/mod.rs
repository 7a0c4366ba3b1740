//! The bus to a device that another process serves over a socket, by the protocol vfio-user 0.1.
//!
//! The counterpart is the server: a model (`rdsock-model`), or anybody's device. Whatever it sends, or does not send,
//! it can make the device fail ([`BusError::Server`]: its registers read all ones from then on), and nothing else. What
//! it refuses is reported ([`BusError::Refused`]).
//!
//! It is given the memory that the device may reach as files ([`Device::map_file`]); what has no file cannot be
//! mapped. A region that it offers as memory is mapped, and its registers are plain loads and stores; the registers of
//! others are messages, of some 20 µs.

mod connection;
pub(crate) mod message;
pub(crate) mod socket;

use crate::capabilities::{Area, sparse_areas};
use crate::device::{Access, BusError, Device, RegionInfo, Registers};
use crate::mapped::{Far, MappedArea, RegionRegisters};
use crate::sealed;
use connection::Connection;
use message::{DeviceInfo, DmaMap, DmaUnmap, IrqInfo, RegionAccess, SetIrqs, command, dma};
use nix::sys::eventfd::EventFd;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

/// How long a server may take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Regions and interrupt indices that a PCI function has at least (`linux/vfio.h`).
const PCI_REGIONS: u32 = 8;
/// Index of the configuration space.
const CONFIG: u32 = 7;
/// Index of MSI, and of MSI-X.
const MESSAGES: [u32; 2] = [1, 2];
/// VFIO_DEVICE_FLAGS_PCI.
const IS_PCI: u32 = 1 << 1;
/// VFIO_REGION_INFO_FLAG_MMAP and VFIO_REGION_INFO_FLAG_CAPS.
const CAN_MAP: u32 = 1 << 2;
const HAS_CAPABILITIES: u32 = 1 << 3;
/// Offset and bits of the command register: memory space, bus master.
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 0b110;

/// A device behind a socket.
#[derive(Debug)]
pub struct UserDevice {
    path: PathBuf,
    connection: Arc<Connection>,
    regions: Vec<Region>,
    /// Index of its message signalled interrupts, and their number.
    interrupts: (u32, u32),
}

/// A region, as the server describes it.
#[derive(Debug)]
struct Region {
    size: u64,
    /// A file with the areas that can be mapped, and the offset of the region in it.
    memory: Option<(OwnedFd, u64, Vec<Area>)>,
}

impl UserDevice {
    /// Connects to the server that listens at `path`.
    pub fn connect(path: &Path) -> Result<Self, BusError> {
        Self::connect_with(path, PATIENCE)
    }

    /// As [`UserDevice::connect`], with another time for each answer.
    pub fn connect_with(path: &Path, patience: Duration) -> Result<Self, BusError> {
        let connection = Arc::new(Connection::open(path, patience)?);
        let question = DeviceInfo {
            argsz: DeviceInfo::LEN as u32,
            ..DeviceInfo::default()
        };
        let info = connection.ask_for(
            "describe the device",
            command::DEVICE_GET_INFO,
            &[&question.bytes()],
            DeviceInfo::split,
        )?;
        if info.flags & IS_PCI == 0 || info.regions < PCI_REGIONS {
            return Err(connection.violated("serves no PCI device"));
        }
        let regions = (0..PCI_REGIONS).map(|index| Region::ask(&connection, index));
        let regions = regions.collect::<Result<_, _>>()?;
        let mut interrupts = (MESSAGES[1], 0);
        for index in MESSAGES.into_iter().filter(|index| *index < info.irqs) {
            let count = vectors(&connection, index)?;
            if count != 0 {
                interrupts = (index, count);
            }
        }
        let device = UserDevice {
            path: path.into(),
            connection,
            regions,
            interrupts,
        };
        device.enable()?;
        Ok(device)
    }

    /// Lets the function decode its memory space, access memory and send messages.
    fn enable(&self) -> Result<(), BusError> {
        let config = FarRegion {
            connection: self.connection.clone(),
            index: CONFIG,
        };
        let mut bytes = [0; 2];
        config.try_read(COMMAND, &mut bytes)?;
        let enabled = u16::from_le_bytes(bytes) | MEMORY_AND_MASTER;
        config.try_write(COMMAND, &enabled.to_le_bytes())
    }

    fn known_region(&self, index: u32) -> Result<&Region, BusError> {
        let region = self.regions.get(index as usize);
        region.filter(|region| region.size != 0).ok_or({
            BusError::Missing {
                what: "region",
                index,
            }
        })
    }
}

/// Number of vectors of an interrupt index.
fn vectors(connection: &Connection, index: u32) -> Result<u32, BusError> {
    let question = IrqInfo {
        argsz: IrqInfo::LEN as u32,
        index,
        ..IrqInfo::default()
    };
    let info = connection.ask_for(
        "describe its interrupts",
        command::DEVICE_GET_IRQ_INFO,
        &[&question.bytes()],
        IrqInfo::split,
    )?;
    // As many as MSI-X can have.
    Ok(info.count.min(2048))
}

impl Region {
    fn ask(connection: &Connection, index: u32) -> Result<Self, BusError> {
        let what = "describe a region";
        let mut argsz = message::RegionInfo::LEN as u32;
        // A second time when there are capabilities that did not fit.
        for _ in 0..2 {
            let question = message::RegionInfo {
                argsz,
                index,
                ..Default::default()
            };
            let command = command::DEVICE_GET_REGION_INFO;
            let answer = connection.ask(what, command, &[&question.bytes()], &[])?;
            let Some((info, rest)) = message::RegionInfo::split(&answer.body) else {
                return Err(connection.violated("sent too short an answer"));
            };
            if info.index != index {
                return Err(connection.violated("described another region"));
            }
            let whole = vec![Area {
                offset: 0,
                size: info.size,
            }];
            let mut areas = whole;
            if info.flags & HAS_CAPABILITIES != 0 {
                if rest.is_empty() && info.argsz > argsz {
                    argsz = info.argsz;
                    continue;
                }
                match sparse_areas(&answer.body, info.cap_offset) {
                    Ok(None) => {}
                    Ok(Some(sparse)) => areas = sparse,
                    Err(_) => return Err(connection.violated("sent malformed capabilities")),
                }
            }
            let file = answer.file.filter(|_| info.flags & CAN_MAP != 0);
            return Ok(Region {
                size: info.size,
                memory: file.map(|file| (file, info.offset, areas)),
            });
        }
        Err(connection.violated("does not say what a region's capabilities are"))
    }

    /// Maps what can be mapped; the rest works through messages.
    fn map(&self) -> std::io::Result<Vec<MappedArea>> {
        let Some((file, at, areas)) = &self.memory else {
            return Ok(Vec::new());
        };
        let outside = || std::io::Error::other("an area outside of its region");
        let map = |area: &Area| {
            let end = area.offset.checked_add(area.size);
            if end.is_none_or(|end| end > self.size) {
                return Err(outside());
            }
            let from = at.checked_add(area.offset).ok_or_else(outside)?;
            sealed::check(file, from, area.size)?;
            MappedArea::map(file, *at, *area)
        };
        areas.iter().map(map).collect()
    }
}

impl Device for UserDevice {
    fn name(&self) -> String {
        format!("vfio-user:{}", self.path.display())
    }

    fn iova_ranges(&self) -> Vec<RangeInclusive<u64>> {
        // The server has a table for us alone, so any address will do. As an x86 IOMMU would have it.
        vec![0..=0xfedf_ffff, 0xfef0_0000..=0xffff_ffff_ffff]
    }

    unsafe fn map(&self, _: u64, _: NonNull<u8>, _: usize, _: Access) -> Result<(), BusError> {
        Err(BusError::NoFile)
    }

    unsafe fn map_file(
        &self,
        iova: u64,
        _: NonNull<u8>,
        len: usize,
        access: Access,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<(), BusError> {
        let question = DmaMap {
            argsz: DmaMap::LEN as u32,
            flags: match access {
                Access::Read => dma::READ,
                Access::ReadWrite => dma::READ | dma::WRITE,
            },
            offset,
            address: iova,
            size: len as u64,
        };
        let what = "map memory";
        self.connection
            .ask(what, command::DMA_MAP, &[&question.bytes()], &[file])
            .map(|_| ())
    }

    fn unmap(&self, iova: u64, len: usize) -> Result<(), BusError> {
        let question = DmaUnmap {
            argsz: DmaUnmap::LEN as u32,
            flags: 0,
            address: iova,
            size: len as u64,
        };
        let what = "unmap memory";
        self.connection
            .ask(what, command::DMA_UNMAP, &[&question.bytes()], &[])
            .map(|_| ())
    }

    fn region(&self, index: u32) -> Result<RegionInfo, BusError> {
        let region = self.known_region(index)?;
        Ok(RegionInfo {
            size: region.size,
            mappable: region.memory.is_some(),
        })
    }

    fn registers(&self, index: u32) -> Result<Arc<dyn Registers>, BusError> {
        let region = self.known_region(index)?;
        let areas = region.map().unwrap_or_else(|error| {
            let device = self.name();
            tracing::warn!(%device, region = index, %error, "cannot map a region, using messages");
            Vec::new()
        });
        Ok(Arc::new(RegionRegisters {
            size: region.size,
            areas,
            far: FarRegion {
                connection: self.connection.clone(),
                index,
            },
        }))
    }

    fn vectors(&self) -> u32 {
        self.interrupts.1
    }

    fn set_interrupt(&self, vector: u32, to: Option<Arc<EventFd>>) -> Result<(), BusError> {
        let (index, count) = self.interrupts;
        if vector >= count {
            return Err(BusError::Missing {
                what: "interrupt vector",
                index: vector,
            });
        }
        // VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER; without a file: not at all.
        let question = SetIrqs {
            argsz: SetIrqs::LEN as u32,
            flags: 1 << 2 | 1 << 5,
            index,
            start: vector,
            count: 1,
        };
        let files: Vec<BorrowedFd<'_>> = to.iter().map(|eventfd| eventfd.as_fd()).collect();
        let what = "set an interrupt";
        self.connection
            .ask(what, command::DEVICE_SET_IRQS, &[&question.bytes()], &files)
            .map(|_| ())
    }

    fn reset(&self) -> Result<(), BusError> {
        let command = command::DEVICE_RESET;
        self.connection.ask("reset", command, &[], &[])?;
        self.enable()
    }
}

/// A region that is reached by messages.
#[derive(Debug)]
struct FarRegion {
    connection: Arc<Connection>,
    index: u32,
}

impl FarRegion {
    fn access(&self, offset: u64, len: usize) -> RegionAccess {
        RegionAccess {
            offset,
            region: self.index,
            count: len as u32,
        }
    }

    fn try_read(&self, offset: u64, to: &mut [u8]) -> Result<(), BusError> {
        let question = self.access(offset, to.len());
        let command = command::REGION_READ;
        let answer = self
            .connection
            .ask("read a register", command, &[&question.bytes()], &[])?;
        match RegionAccess::split(&answer.body) {
            Some((access, bytes)) if access == question && bytes.len() == to.len() => {
                to.copy_from_slice(bytes);
                Ok(())
            }
            _ => Err(self
                .connection
                .violated("sent other data than were asked for")),
        }
    }

    fn try_write(&self, offset: u64, from: &[u8]) -> Result<(), BusError> {
        let question = self.access(offset, from.len());
        let command = command::REGION_WRITE;
        let parts: [&[u8]; 2] = [&question.bytes(), from];
        self.connection
            .ask("write a register", command, &parts, &[])
            .map(|_| ())
    }

    fn report(&self, offset: u64, error: &BusError) {
        if !matches!(error, BusError::Server(what) if what == "is gone") {
            let region = self.index;
            tracing::warn!(region, offset = format_args!("{offset:#x}"), %error, "no access to a register");
        }
    }
}

impl Far for FarRegion {
    fn read(&self, offset: u64, to: &mut [u8]) -> bool {
        let read = self.try_read(offset, to);
        read.inspect_err(|error| self.report(offset, error)).is_ok()
    }

    fn write(&self, offset: u64, from: &[u8]) {
        if let Err(error) = self.try_write(offset, from) {
            self.report(offset, &error);
        }
    }

    fn is_gone(&self) -> bool {
        self.connection.is_gone()
    }
}
