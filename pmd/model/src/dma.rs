//! Host memory as the device reaches it: by I/O virtual address, through whatever stands for the
//! IOMMU. Implemented by the bus; the model touches host memory in no other way.

use std::sync::atomic::AtomicU8;

/// The access was outside what is mapped, or not allowed there. Nothing or a part was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaFault;

/// Access to the memory of one node's host.
///
/// An implementation that unmaps memory must not return from that while an access is under way.
pub trait Dma: Send + Sync {
    /// Reads payload.
    fn read(&self, iova: u64, to: &mut [u8]) -> Result<(), DmaFault>;

    /// Writes payload. Its bytes become visible in any order.
    fn write(&self, iova: u64, from: &[u8]) -> Result<(), DmaFault>;

    /// Loads words of a structure (8-byte aligned), each by one load, none before what the caller
    /// has loaded before.
    fn load(&self, iova: u64, to: &mut [u64]) -> Result<(), DmaFault>;

    /// Stores an entry (8-byte aligned), each word by one store, all after what was written before, and
    /// word 0 after the others.
    fn store(&self, iova: u64, from: &[u64]) -> Result<(), DmaFault>;

    /// Shows the `len` bytes at `iova` to `see`, once, or a copy of them: an implementation that can, shows
    /// the memory itself, so that payload is moved once.
    fn show(
        &self,
        iova: u64,
        len: usize,
        see: &mut dyn FnMut(&[AtomicU8]),
    ) -> Result<(), DmaFault> {
        let mut bytes = vec![0; len];
        self.read(iova, &mut bytes)?;
        let bytes: Vec<AtomicU8> = bytes.into_iter().map(AtomicU8::new).collect();
        see(&bytes);
        Ok(())
    }

    /// Writes payload that others may be writing meanwhile, or that lies in the same memory.
    fn write_shown(&self, iova: u64, from: &[AtomicU8]) -> Result<(), DmaFault> {
        let load = |byte: &AtomicU8| byte.load(std::sync::atomic::Ordering::Relaxed);
        let bytes: Vec<u8> = from.iter().map(load).collect();
        self.write(iova, &bytes)
    }
}
