//! A device behind a socket whose model looks at a queue page when the driver reads a register there. A model does so
//! when it likes; like this, a test that steps the model itself can wait for SET_STATE.

use rdsock_model::{Bar, Function};
use rdsock_vfio::{Access, BusError, Device, EventFd, RegionInfo, Registers};
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

#[derive(Debug)]
pub struct LookedAt<D> {
    device: D,
    function: Function,
}

impl<D: Device> LookedAt<D> {
    pub fn new(device: D, function: Function) -> Self {
        LookedAt { device, function }
    }
}

impl<D: Device> Device for LookedAt<D> {
    fn name(&self) -> String {
        self.device.name()
    }
    fn iova_ranges(&self) -> Vec<RangeInclusive<u64>> {
        self.device.iova_ranges()
    }
    unsafe fn map(
        &self,
        iova: u64,
        host: NonNull<u8>,
        len: usize,
        access: Access,
    ) -> Result<(), BusError> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.device.map(iova, host, len, access) }
    }
    unsafe fn map_file(
        &self,
        iova: u64,
        host: NonNull<u8>,
        len: usize,
        access: Access,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<(), BusError> {
        // SAFETY: the caller's promise is the same.
        unsafe { (self.device).map_file(iova, host, len, access, file, offset) }
    }
    fn unmap(&self, iova: u64, len: usize) -> Result<(), BusError> {
        self.device.unmap(iova, len)
    }
    fn region(&self, index: u32) -> Result<RegionInfo, BusError> {
        self.device.region(index)
    }
    fn registers(&self, index: u32) -> Result<Arc<dyn Registers>, BusError> {
        let registers = self.device.registers(index)?;
        if index != 2 {
            return Ok(registers);
        }
        Ok(Arc::new(Pages {
            registers,
            function: self.function.clone(),
        }))
    }
    fn vectors(&self) -> u32 {
        self.device.vectors()
    }
    fn set_interrupt(&self, vector: u32, to: Option<Arc<EventFd>>) -> Result<(), BusError> {
        self.device.set_interrupt(vector, to)
    }
    fn reset(&self) -> Result<(), BusError> {
        self.device.reset()
    }
}

#[derive(Debug)]
struct Pages {
    registers: Arc<dyn Registers>,
    function: Function,
}

impl Registers for Pages {
    fn read32(&self, offset: u64) -> u32 {
        // What it reads is the model's side; the driver reads what lies in the memory.
        self.function.read(Bar::Pages, offset, 4);
        self.registers.read32(offset)
    }
    fn read64(&self, offset: u64) -> u64 {
        self.registers.read64(offset)
    }
    fn write32(&self, offset: u64, value: u32) {
        self.registers.write32(offset, value);
    }
    fn write64(&self, offset: u64, value: u64) {
        self.registers.write64(offset, value);
    }
}
