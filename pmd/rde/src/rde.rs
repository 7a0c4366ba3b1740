//! A device that was found to be an rde, and what it can do (`docs/device.md`, 3).

use crate::error::{DeviceFailed, NotPosted, OpenError};
use crate::management::Management;
use crate::queue_set::QueueSet;
use crate::region::{Reach, Region, Rights, Table};
use crate::spec::{GONE, MAGIC, MAJOR, MIN_QUEUE, PAGE_SIZE, management};
use crate::start::Sizes;
use rdsock_vfio::{Registers, Shared, Space, Window};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a device can do, read once and checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Bits of FEATURES.
    pub features: u64,
    /// Queue sets, 1 to 256.
    pub queue_sets: u32,
    /// Greatest node id.
    pub max_node: u16,
    /// Entries of the region table.
    pub regions: u16,
    /// log2 of the most entries of a queue.
    pub max_queue: u8,
    /// Most bytes of one operation.
    pub max_transfer: u32,
    /// Most operations of a queue set that wait for one node.
    pub lane_depth: u32,
    /// Most local pieces of one operation.
    pub max_pieces: u8,
    /// Most inline bytes of one operation.
    pub max_inline: u8,
}

impl Capabilities {
    fn read(registers: &dyn Registers) -> Result<Self, OpenError> {
        let limited = |offset, least: u32, most: u32, name| match registers.read32(offset) {
            value if (least..=most).contains(&value) => Ok(value),
            GONE => Err(DeviceFailed::Gone.into()),
            _ => Err(OpenError::Impossible(name)),
        };
        Ok(Capabilities {
            features: registers.read64(management::FEATURES),
            queue_sets: limited(management::QUEUE_SETS, 1, 256, "QUEUE_SETS")?,
            max_node: limited(management::MAX_NODE, 1, 1023, "MAX_NODE")? as u16,
            regions: limited(management::REGIONS, 1, 1024, "REGIONS")? as u16,
            max_queue: limited(management::MAX_QUEUE, MIN_QUEUE.into(), 16, "MAX_QUEUE")? as u8,
            max_transfer: limited(management::MAX_TRANSFER, 1, 1 << 30, "MAX_TRANSFER")?,
            lane_depth: limited(management::LANE_DEPTH, 1, 1 << 16, "LANE_DEPTH")?,
            max_pieces: limited(management::MAX_PIECES, 1, 8, "MAX_PIECES")? as u8,
            max_inline: limited(management::MAX_INLINE, 0, 128, "MAX_INLINE")? as u8,
        })
    }

    pub(crate) fn need(&self, feature: u32, name: &'static str) -> Result<(), NotPosted> {
        match self.features >> feature & 1 {
            0 => Err(NotPosted::Invalid(name)),
            _ => Ok(()),
        }
    }
}

/// An open device.
#[derive(Debug)]
pub struct Rde {
    space: Space,
    bar0: Arc<dyn Registers>,
    pages: Arc<dyn Registers>,
    capabilities: Capabilities,
    regions: Arc<Table>,
    /// Which queue sets are in use.
    taken: Arc<[AtomicBool]>,
}

impl Rde {
    /// Looks whether the device is one that this driver knows.
    pub fn open(space: Space) -> Result<Self, OpenError> {
        let bar0 = space.device().registers(0)?;
        match bar0.read64(management::MAGIC) {
            MAGIC => {}
            u64::MAX => return Err(DeviceFailed::Gone.into()),
            other => return Err(OpenError::NotRde(other)),
        }
        let major = bar0.read32(management::VERSION) >> 16;
        if major != MAJOR {
            return Err(OpenError::Version(major));
        }
        let capabilities = Capabilities::read(&*bar0)?;
        let pages = space.device().registers(2)?;
        if space.device().region(2)?.size < u64::from(capabilities.queue_sets) * PAGE_SIZE {
            return Err(OpenError::Impossible("size of BAR2"));
        }
        let sets = (0..capabilities.queue_sets).map(|_| AtomicBool::new(false));
        Ok(Rde {
            regions: Arc::new(Table::new(bar0.clone(), capabilities.regions)),
            taken: sets.collect(),
            space,
            bar0,
            pages,
            capabilities,
        })
    }

    /// What it can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Where its memory comes from.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// The management page.
    pub fn management(&self) -> Management {
        Management::new(self.bar0.clone(), self.pages.clone())
    }

    /// Lets other nodes (or only `source`) reach memory.
    pub fn register(
        &self,
        memory: Shared,
        rights: Rights,
        source: Option<u16>,
    ) -> Result<Region, OpenError> {
        let memory = Reach::Memory(memory);
        self.regions.register(memory, rights, source)
    }

    /// Lets other nodes (or only `source`) reach whatever is mapped in a window. An access to a
    /// place where nothing is mapped fails.
    pub fn register_window(
        &self,
        window: &Window,
        rights: Rights,
        source: Option<u16>,
    ) -> Result<Region, OpenError> {
        let window = Reach::Window(window.clone());
        self.regions.register(window, rights, source)
    }

    /// Starts a queue set. Dropping it stops it.
    pub fn queue_set(&self, set: u32, sizes: Sizes) -> Result<QueueSet, OpenError> {
        let taken = self
            .taken
            .get(set as usize)
            .ok_or(OpenError::NoQueueSet(set))?;
        let allowed = MIN_QUEUE..=self.capabilities.max_queue;
        if [sizes.work, sizes.completions, sizes.messages]
            .iter()
            .any(|log2| !allowed.contains(log2))
        {
            return Err(OpenError::Sizes(self.capabilities.max_queue));
        }
        if taken.swap(true, Ordering::AcqRel) {
            return Err(OpenError::Busy(set));
        }
        let claim = Claim {
            taken: self.taken.clone(),
            set,
        };
        QueueSet::start(
            &self.space,
            self.pages.clone(),
            self.capabilities,
            claim,
            sizes,
        )
    }
}

/// The right to use a queue set.
#[derive(Debug)]
pub(crate) struct Claim {
    taken: Arc<[AtomicBool]>,
    pub set: u32,
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(taken) = self.taken.get(self.set as usize) {
            taken.store(false, Ordering::Release);
        }
    }
}
