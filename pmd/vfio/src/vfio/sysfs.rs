//! What the kernel says of a PCI device in sysfs: driver, IOMMU group, character device.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The address of a PCI function, such as `0000:01:00.0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciAddress(String);

impl FromStr for PciAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let hex = |text: &str, digits: usize| {
            text.len() == digits && text.bytes().all(|digit| digit.is_ascii_hexdigit())
        };
        let parts = |text: &str| -> Option<bool> {
            let (domain, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            let device = hex(device, 2) && u8::from_str_radix(device, 16).is_ok_and(|n| n < 32);
            let function = matches!(function.as_bytes(), [b'0'..=b'7']);
            Some(hex(domain, 4) && hex(bus, 2) && device && function)
        };
        match parts(text) {
            Some(true) => Ok(PciAddress(text.to_ascii_lowercase())),
            _ => Err(format!(
                "{text:?} is no PCI address, expected one such as \"0000:01:00.0\" (lspci -D lists them)"
            )),
        }
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A device's folder in sysfs.
#[derive(Clone, Debug)]
pub(crate) struct Folder(pub PathBuf);

impl Folder {
    pub fn of(address: &PciAddress) -> Self {
        Folder(Path::new("/sys/bus/pci/devices").join(&address.0))
    }

    pub fn exists(&self) -> bool {
        self.0.is_dir()
    }

    /// Name of the driver that it is bound to.
    pub fn driver(&self) -> Option<String> {
        self.link("driver")
    }

    /// Number of its IOMMU group.
    pub fn group(&self) -> Option<String> {
        self.link("iommu_group")
    }

    /// Whether its group is one that VFIO has made up, with no IOMMU behind it.
    pub fn is_without_iommu(&self) -> bool {
        let name = std::fs::read_to_string(self.0.join("iommu_group/name"));
        name.is_ok_and(|name| name.trim() == "vfio-noiommu")
            || self
                .character_device()
                .is_some_and(|name| name.starts_with("noiommu-"))
    }

    /// The other devices of its group, each with its driver.
    pub fn neighbours(&self) -> Vec<(String, Option<String>)> {
        let Ok(entries) = std::fs::read_dir(self.0.join("iommu_group/devices")) else {
            return Vec::new();
        };
        let own = self.0.file_name();
        let others = entries
            .flatten()
            .filter(|entry| Some(entry.file_name().as_os_str()) != own)
            .map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                (name, Folder(entry.path()).driver())
            });
        others.collect()
    }

    /// Name of its character device, `vfioN`, where the kernel makes one.
    pub fn character_device(&self) -> Option<String> {
        let mut entries = std::fs::read_dir(self.0.join("vfio-dev")).ok()?.flatten();
        Some(entries.next()?.file_name().to_string_lossy().into_owned())
    }

    fn link(&self, name: &str) -> Option<String> {
        let target = std::fs::read_link(self.0.join(name)).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn an_address_is_checked() {
        for good in ["0000:01:00.0", "abcd:ff:1f.7"] {
            assert_eq!(good.parse::<PciAddress>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "01:00.0",
            "0000:01:00",
            "0000:01:00.8",
            "0000:01:20.0",
            "0000:1:00.0",
            "0000:01:00.0/../x",
            "0000:01:0+.0",
            "00g0:01:00.0",
            "0000:01:00.00",
        ] {
            assert!(bad.parse::<PciAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_folder_is_read() {
        let root = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let device = make("devices/0000:01:00.0");
        let other = make("devices/0000:01:00.1");
        let group = make("groups/7");
        let members = make("groups/7/devices");
        symlink(make("drivers/vfio-pci"), device.join("driver")).unwrap();
        symlink(make("drivers/e1000e"), other.join("driver")).unwrap();
        symlink(&device, members.join("0000:01:00.0")).unwrap();
        symlink(&other, members.join("0000:01:00.1")).unwrap();
        let folder = Folder(device.clone());
        assert_eq!((folder.group(), folder.character_device()), (None, None));
        symlink(&group, device.join("iommu_group")).unwrap();
        make("devices/0000:01:00.0/vfio-dev/vfio3");
        assert_eq!(folder.driver().as_deref(), Some("vfio-pci"));
        assert_eq!(folder.group().as_deref(), Some("7"));
        assert_eq!(folder.character_device().as_deref(), Some("vfio3"));
        let neighbours = [("0000:01:00.1".into(), Some("e1000e".into()))];
        assert_eq!(folder.neighbours(), neighbours);
        assert!(!folder.is_without_iommu());
        std::fs::write(group.join("name"), "vfio-noiommu\n").unwrap();
        assert!(folder.is_without_iommu());
    }
}
