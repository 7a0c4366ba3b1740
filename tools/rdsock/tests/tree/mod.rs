//! A made-up machine in a temporary folder: `sys`, `dev` and `proc`, as far as `rdsock devices`, `bind` and `unbind` look
//! at them, and what the kernel does when drivers are changed. For their unit tests, and for those of the built tool.
#![allow(dead_code, reason = "each of the two uses a part")]

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

pub struct Tree {
    root: tempfile::TempDir,
}

impl Tree {
    pub fn new() -> Self {
        let tree = Tree {
            root: tempfile::tempdir().unwrap(),
        };
        tree.write("sys/bus/pci/drivers_probe", "");
        tree.make("sys/bus/pci/devices");
        tree.make("proc/self");
        tree.make("dev/vfio");
        tree
    }

    pub fn root(&self) -> PathBuf {
        self.root.path().into()
    }

    fn make(&self, path: &str) -> PathBuf {
        let path = self.root().join(path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    pub fn write(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// The device's own folder, to which the one below `bus` is a link.
    fn device(&self, address: &str) -> PathBuf {
        self.make(&format!("sys/devices/pci0000:00/{address}"))
    }

    /// A PCI function, with no driver and in no group.
    pub fn function(&self, address: &str, vendor: &str, device: &str) -> PathBuf {
        let folder = self.device(address);
        for (name, text) in [
            ("vendor", vendor),
            ("device", device),
            ("numa_node", "0"),
            ("driver_override", "(null)"),
        ] {
            fs::write(folder.join(name), format!("{text}\n")).unwrap();
        }
        let at = self.root().join("sys/bus/pci/devices").join(address);
        symlink(&folder, at).unwrap();
        fs::canonicalize(folder).unwrap()
    }

    /// The device of docs/device.md.
    pub fn rde(&self, address: &str) -> PathBuf {
        self.function(address, "0x5244", "0x4531")
    }

    /// An IOMMU group with these, and those that were put there before.
    pub fn group(&self, number: u32, addresses: &[&str]) {
        let group = self.make(&format!("sys/kernel/iommu_groups/{number}"));
        let devices = self.make(&format!("sys/kernel/iommu_groups/{number}/devices"));
        for address in addresses {
            symlink(self.device(address), devices.join(address)).unwrap();
            symlink(&group, self.device(address).join("iommu_group")).unwrap();
        }
    }

    pub fn ungroup(&self, address: &str) {
        fs::remove_file(self.device(address).join("iommu_group")).unwrap();
    }

    /// Loads a driver.
    pub fn driver(&self, name: &str) -> PathBuf {
        self.write(&format!("sys/bus/pci/drivers/{name}/unbind"), "");
        self.make(&format!("sys/bus/pci/drivers/{name}"))
    }

    /// The kernel has a driver of its own for a function.
    pub fn takes(&self, address: &str, driver: &str) {
        self.write(&format!("natural/{address}"), driver);
    }

    /// A driver will refuse all.
    pub fn refuses(&self, driver: &str) {
        self.write(&format!("refuses/{driver}"), "");
    }

    /// Has a function bound to a driver, and to no other.
    pub fn bind(&self, address: &str, driver: &str) {
        let at = self.device(address).join("driver");
        let _ = fs::remove_file(&at);
        symlink(self.driver(driver), at).unwrap();
    }

    /// What a function was last told, without the newline.
    pub fn driver_override(&self, address: &str) -> String {
        let text = fs::read_to_string(self.device(address).join("driver_override")).unwrap();
        text.trim().replace("(null)", "")
    }

    /// Something below a device that is also found by its class.
    pub fn part(&self, address: &str, path: &str, class: &str) -> PathBuf {
        let folder = self.device(address).join(path);
        fs::create_dir_all(&folder).unwrap();
        let class = self.make(&format!("sys/class/{class}"));
        symlink(&folder, class.join(folder.file_name().unwrap())).unwrap();
        folder
    }

    /// A process that has a file open.
    pub fn process(&self, pid: i32, program: &str, file: &str) {
        self.write(&format!("proc/{pid}/comm"), &format!("{program}\n"));
        let fds = self.make(&format!("proc/{pid}/fd"));
        symlink(self.root().join(file), fds.join("5")).unwrap();
    }

    /// What the kernel does when this is written to that file.
    pub fn store(&self, path: &Path, text: &str) -> io::Result<()> {
        fs::OpenOptions::new().write(true).open(path)?;
        let address = text.trim();
        match path.file_name().and_then(|name| name.to_str()) {
            Some("driver_override") => {
                let text = if address.is_empty() { "(null)\n" } else { text };
                fs::write(path, text)
            }
            Some("unbind") => fs::remove_file(self.device(address).join("driver")),
            Some("drivers_probe") => {
                self.probe(address);
                Ok(())
            }
            _ => panic!("nobody writes to {}", path.display()),
        }
    }

    fn probe(&self, address: &str) {
        let natural = fs::read_to_string(self.root().join("natural").join(address));
        let wish = Some(self.driver_override(address)).filter(|wish| !wish.is_empty());
        let Some(driver) = wish.or(natural.ok()) else {
            return;
        };
        let refuses = self.root().join("refuses").join(&driver).exists();
        let bound = self.device(address).join("driver").exists();
        if !refuses && !bound {
            self.bind(address, &driver);
        }
    }
}
