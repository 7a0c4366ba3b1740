//! `rdsock devices`, `rdsock bind`, `rdsock unbind`: PCI devices, which driver has them, and what keeps them from being
//! used. `rdsock doctor` asks here, too.
//!
//! Reads and writes files of the kernel below a root, which is `/` but for tests. Never opens a device.

mod bind;
mod function;
mod kernel;
mod list;
mod obstacle;
#[cfg(test)]
#[path = "../../tests/tree/mod.rs"]
pub mod tree;
mod uses;

pub use bind::{bind, unbind};
pub use function::{Address, Function};
pub use kernel::{KernelFiles, MODULE, VFIO_PCI};
pub use list::devices;
pub use obstacle::{IOMMU_ON, Obstacle};

#[cfg(test)]
impl tree::Tree {
    /// As the commands see it.
    pub fn files(&self) -> KernelFiles {
        KernelFiles::below(&self.root())
    }
}
