//! The files in which the kernel tells of devices and drivers.

use std::fs;
use std::path::{Path, PathBuf};

/// The driver of kmod-minimal.
pub const MODULE: &str = "rdsock-vfio";
/// The kernel's own, which gives out any device, whole.
pub const VFIO_PCI: &str = "vfio-pci";

/// Name of a group with nothing behind it.
pub const WITHOUT_IOMMU: &str = "vfio-noiommu";

/// Where they are.
#[derive(Clone, Debug)]
pub struct KernelFiles {
    root: PathBuf,
}

impl KernelFiles {
    /// Below this folder are `sys`, `dev` and `proc`.
    pub fn below(root: &Path) -> Self {
        KernelFiles { root: root.into() }
    }

    /// Something in sysfs.
    pub fn sys(&self, path: &str) -> PathBuf {
        self.root.join("sys").join(path)
    }

    /// Something in `/dev`.
    pub fn dev(&self, path: &str) -> PathBuf {
        self.root.join("dev").join(path)
    }

    /// Something in `/proc`.
    pub fn proc(&self, path: &str) -> PathBuf {
        self.root.join("proc").join(path)
    }

    /// A driver's folder, which is there while the driver is loaded.
    pub fn driver(&self, driver: &str) -> PathBuf {
        self.sys("bus/pci/drivers").join(driver)
    }

    /// Whether it is loaded.
    pub fn has_driver(&self, driver: &str) -> bool {
        self.driver(driver).is_dir()
    }

    /// Whether an IOMMU is on: the kernel then has put devices into groups. VFIO can make up groups without one.
    pub fn has_iommu(&self) -> bool {
        let groups = self.sys("kernel/iommu_groups");
        let is_real = |group: &String| {
            text(&groups.join(group).join("name")).as_deref() != Some(WITHOUT_IOMMU)
        };
        !names(&self.sys("class/iommu")).is_empty() || names(&groups).iter().any(is_real)
    }

    /// Whether interrupts are remapped. `None`: this machine's kernel does not tell, as on processors other than x86.
    pub fn remaps_interrupts(&self) -> Option<bool> {
        let interrupts = fs::read_to_string(self.proc("interrupts")).ok()?;
        // An x86 kernel names the I/O APIC with a prefix where another chip remaps for it.
        match interrupts.contains("IO-APIC") {
            true => Some(interrupts.contains("IR-IO-APIC")),
            false => None,
        }
    }

    /// What the module has refused so far: cause and number, as it prints them.
    pub fn refusals(&self) -> Vec<(String, u64)> {
        let text = fs::read_to_string(self.driver(MODULE).join("refusals")).unwrap_or_default();
        let refusal = |line: &str| {
            let (cause, number) = line.split_once(' ')?;
            Some((cause.to_owned(), number.trim().parse().ok()?))
        };
        text.lines().filter_map(refusal).collect()
    }
}

/// What a folder contains, in order; nothing where it can't be read.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// The last part of what a link leads to.
pub fn link(path: &Path) -> Option<String> {
    let to = fs::read_link(path).ok()?;
    Some(to.file_name()?.to_string_lossy().into_owned())
}

/// A file's text, without what surrounds it.
pub fn text(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use crate::pci::tree::Tree;

    #[test]
    fn remapping_is_told_where_the_kernel_tells_it() {
        let tree = Tree::new();
        let files = tree.files();
        assert_eq!(files.remaps_interrupts(), None);
        tree.write("proc/interrupts", "  2:  0  IO-APIC  2-edge  timer\n");
        assert_eq!(files.remaps_interrupts(), Some(false));
        tree.write("proc/interrupts", "  2:  0  IR-IO-APIC  2-edge  timer\n");
        assert_eq!(files.remaps_interrupts(), Some(true));
        tree.write("proc/interrupts", " 11:  0  GICv3  27 Level  arch_timer\n");
        assert_eq!(files.remaps_interrupts(), None);
    }

    #[test]
    fn an_iommu_is_seen_by_its_groups() {
        let tree = Tree::new();
        assert!(!tree.files().has_iommu());
        tree.rde("0000:03:00.0");
        tree.group(7, &["0000:03:00.0"]);
        assert!(tree.files().has_iommu());
        tree.write("sys/kernel/iommu_groups/7/name", "vfio-noiommu\n");
        assert!(!tree.files().has_iommu());
        tree.write("sys/class/iommu/dmar0/uevent", "");
        assert!(tree.files().has_iommu());
    }
}
