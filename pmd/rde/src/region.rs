//! Memory that other nodes may reach (`docs/device.md`, 4).

use crate::error::OpenError;
use crate::spec::{Key, REGION_SIZE, REGION_TABLE, REGION_VALID, region};
use rdsock_vfio::{Registers, Shared, Window};
use std::sync::{Arc, Mutex, PoisonError};

/// What other nodes may do with a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Write it.
    Write,
    /// Read it.
    Read,
    /// Both.
    ReadWrite,
}

impl Rights {
    fn bits(self) -> u32 {
        match self {
            Rights::Write => 2,
            Rights::Read => 4,
            Rights::ReadWrite => 6,
        }
    }
}

/// The region table of a device.
#[derive(Debug)]
pub(crate) struct Table {
    registers: Arc<dyn Registers>,
    /// Numbers of free entries.
    free: Mutex<Vec<(u16, u16)>>,
}

/// A registered region. Dropping it takes it back: then no remote access to it is under way.
#[derive(Debug)]
pub struct Region {
    table: Arc<Table>,
    entry: u16,
    tag: u16,
    memory: Reach,
}

/// What a region makes reachable, and keeps.
#[derive(Debug)]
pub(crate) enum Reach {
    /// Memory.
    Memory(Shared),
    /// Whatever is mapped in a window.
    Window(Window),
}

impl Reach {
    fn iova(&self) -> u64 {
        match self {
            Reach::Memory(memory) => memory.iova(),
            Reach::Window(window) => window.iova(),
        }
    }

    fn len(&self) -> u64 {
        match self {
            Reach::Memory(memory) => memory.len() as u64,
            Reach::Window(window) => window.len(),
        }
    }
}

impl Table {
    pub fn new(registers: Arc<dyn Registers>, entries: u16) -> Self {
        Table {
            registers,
            free: Mutex::new((0..entries).rev().map(|entry| (entry, 1)).collect()),
        }
    }

    fn at(entry: u16) -> u64 {
        REGION_TABLE + u64::from(entry) * REGION_SIZE
    }

    /// Registers memory for one node, or for all that may reach this one.
    pub fn register(
        self: &Arc<Self>,
        memory: Reach,
        rights: Rights,
        source: Option<u16>,
    ) -> Result<Region, OpenError> {
        if !memory.iova().is_multiple_of(8) {
            return Err(OpenError::Alignment);
        }
        let free = self
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let (entry, tag) = free.ok_or(OpenError::NoRegion)?;
        let (at, registers) = (Self::at(entry), &self.registers);
        registers.write32(at + region::REGION_TAG, tag.into());
        registers.write64(at + region::REGION_ADDR, memory.iova());
        registers.write64(at + region::REGION_LENGTH, memory.len());
        registers.write32(at + region::REGION_SOURCE, source.unwrap_or(0).into());
        let control = REGION_VALID | rights.bits();
        registers.write32(at + region::REGION_CONTROL, control);
        Ok(Region {
            table: self.clone(),
            entry,
            tag,
            memory,
        })
    }
}

impl Region {
    /// What other nodes call it.
    pub fn key(&self) -> Key {
        Key(u32::from(self.tag) << 16 | u32::from(self.entry))
    }

    /// The memory; `None` when it is a window.
    pub fn memory(&self) -> Option<&Shared> {
        match &self.memory {
            Reach::Memory(memory) => Some(memory),
            Reach::Window(_) => None,
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let at = Table::at(self.entry) + region::REGION_CONTROL;
        self.table.registers.write32(at, 0);
        // The load returns when no access through the entry is under way any more (4).
        self.table.registers.read32(at);
        let mut free = self
            .table
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // A tag comes again only after 65 535 uses of the entry; 0 never does.
        free.insert(0, (self.entry, self.tag.checked_add(1).unwrap_or(1)));
    }
}
