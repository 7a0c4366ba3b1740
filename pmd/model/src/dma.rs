//! Host memory as the device reaches it: by I/O virtual address, through whatever stands for the
//! IOMMU. Implemented by the bus; the model touches host memory in no other way.

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
}
