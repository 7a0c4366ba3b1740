//! A PCI function, as the kernel tells of it.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::unistd::{AccessFlags, Gid, Group, Uid, User, access};
use serde::Serialize;

use super::kernel::{KernelFiles, WITHOUT_IOMMU, link, names, text};
use super::obstacle::Obstacle;
use super::uses::{self, Process};

/// Vendor and device of `docs/device.md`, section 2.
const RDE: (u16, u16) = (0x5244, 0x4531);

/// The address of a PCI function, such as `0000:03:00.0`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Address(String);

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let hex = |text: &str, digits: usize| {
            text.len() == digits && text.bytes().all(|digit| digit.is_ascii_hexdigit())
        };
        let good = || {
            let (domain, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            Some(hex(domain, 4) && hex(bus, 2) && hex(device, 2) && hex(function, 1))
        };
        match good() {
            Some(true) => Ok(Address(text.to_ascii_lowercase())),
            _ => Err("expected an address such as 0000:03:00.0 (rdsock devices lists them)".into()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A device of the same IOMMU group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Member {
    /// Its address, or its name, where it is on another bus.
    pub address: String,
    /// What is bound to it.
    pub driver: Option<String>,
}

/// The file in `/dev/vfio` through which a function's group is opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    /// Its path.
    pub path: PathBuf,
    /// Names of owner and group, or their numbers.
    pub owner: String,
    pub group: String,
    /// Permissions, in octal.
    pub mode: String,
}

impl Node {
    fn at(path: PathBuf) -> Option<Self> {
        let metadata = fs::metadata(&path).ok()?;
        let (uid, gid) = (metadata.uid(), metadata.gid());
        let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
        let group = Group::from_gid(Gid::from_raw(gid)).ok().flatten();
        Some(Node {
            path,
            owner: user.map_or_else(|| uid.to_string(), |user| user.name),
            group: group.map_or_else(|| gid.to_string(), |group| group.name),
            mode: format!("{:04o}", metadata.mode() & 0o7777),
        })
    }
}

/// A PCI function.
#[derive(Debug, Serialize)]
pub struct Function {
    pub address: Address,
    /// Numbers of vendor and device, as lspci has them.
    pub id: String,
    /// What is bound to it.
    pub driver: Option<String>,
    /// Number of its IOMMU group, and what else is in it.
    pub iommu_group: Option<String>,
    pub shares_group_with: Vec<Member>,
    /// `None` where the machine has one node only, or does not tell.
    pub numa_node: Option<u32>,
    pub node: Option<Node>,
    /// What the kernel module was told that it is; `None` where it has not got it.
    pub node_id: Option<u32>,
    /// Processes that have it open.
    pub used_by: Vec<Process>,
    /// What keeps it from being used by rdsockd.
    pub obstacles: Vec<Obstacle>,
    #[serde(skip)]
    pub folder: PathBuf,
    #[serde(skip)]
    pub is_rde: bool,
}

impl Function {
    /// All functions of the machine, by address.
    pub fn all(files: &KernelFiles) -> Vec<Function> {
        let addresses = names(&files.sys("bus/pci/devices")).into_iter();
        addresses
            .filter_map(|name| Function::read(files, &name.parse().ok()?))
            .collect()
    }

    /// One of them; `None` where there is none.
    pub fn read(files: &KernelFiles, address: &Address) -> Option<Function> {
        let place = files.sys("bus/pci/devices").join(&address.0);
        let folder = fs::canonicalize(&place).ok()?;
        let number = |name: &str| {
            let text = text(&folder.join(name))?;
            u16::from_str_radix(text.trim_start_matches("0x"), 16).ok()
        };
        let (vendor, device) = (number("vendor")?, number("device")?);
        let driver = link(&folder.join("driver"));
        let iommu_group = link(&folder.join("iommu_group"));
        let paths = nodes(files, &folder, iommu_group.as_deref());
        let mut function = Function {
            id: format!("{vendor:04x}:{device:04x}"),
            is_rde: (vendor, device) == RDE,
            shares_group_with: members(&folder, address),
            numa_node: text(&folder.join("numa_node")).and_then(|node| node.parse().ok()),
            node: paths.iter().cloned().find_map(Node::at),
            node_id: text(&folder.join("node_id")).and_then(|id| id.parse().ok()),
            used_by: match driver.as_deref().is_some_and(is_vfio) {
                true => uses::openers(files, &paths),
                false => Vec::new(),
            },
            address: address.clone(),
            driver,
            iommu_group,
            obstacles: Vec::new(),
            folder,
        };
        function.obstacles = function.find_obstacles(files);
        Some(function)
    }

    /// Whether a driver has it that gives devices to user space.
    pub fn has_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio)
    }

    fn find_obstacles(&self, files: &KernelFiles) -> Vec<Obstacle> {
        let mut found = Vec::new();
        if self.iommu_group.is_none() || has_no_iommu(&self.folder) {
            found.push(Obstacle::NoIommu);
        }
        if !self.shares_group_with.is_empty() {
            found.push(Obstacle::Shared(self.shares_group_with.clone()));
        }
        let interfaces = uses::interfaces_up(files, &self.folder);
        found.extend(interfaces.into_iter().map(Obstacle::Interface));
        let claimed = uses::claimed_disks(files, &self.folder).into_iter();
        found.extend(claimed.map(|(disk, use_)| Obstacle::Disk { disk, use_ }));
        if !self.used_by.is_empty() {
            found.push(Obstacle::Open(self.used_by.clone()));
        }
        match &self.node {
            _ if !self.has_vfio() => found.push(Obstacle::Bound {
                address: self.address.clone(),
                driver: self.driver.clone(),
            }),
            None => found.push(Obstacle::NoNode),
            Some(node) if !may_open(&node.path) => {
                found.push(Obstacle::Forbidden(node.path.clone()));
            }
            Some(_) => {}
        }
        if self.node_id == Some(0) {
            found.push(Obstacle::NoId(self.address.clone()));
        }
        found
    }
}

fn is_vfio(driver: &str) -> bool {
    driver.contains("vfio")
}

fn may_open(node: &Path) -> bool {
    access(node, AccessFlags::R_OK | AccessFlags::W_OK).is_ok()
}

/// The other devices of its group: on any bus, bridges among them.
fn members(folder: &Path, address: &Address) -> Vec<Member> {
    let devices = folder.join("iommu_group/devices");
    let others = names(&devices)
        .into_iter()
        .filter(|name| *name != address.0);
    let member = |name: String| Member {
        driver: link(&devices.join(&name).join("driver")),
        address: name,
    };
    others.map(member).collect()
}

/// A group that VFIO has made up, with nothing behind it.
fn has_no_iommu(folder: &Path) -> bool {
    text(&folder.join("iommu_group/name")).as_deref() == Some(WITHOUT_IOMMU)
}

/// The files through which a function can be opened: of its group, of itself.
fn nodes(files: &KernelFiles, folder: &Path, group: Option<&str>) -> Vec<PathBuf> {
    let group = group.map(|group| files.dev("vfio").join(group));
    let own = names(&folder.join("vfio-dev")).into_iter();
    let own = own.map(|name| files.dev("vfio/devices").join(name));
    group.into_iter().chain(own).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::tree::Tree;

    const ADDRESS: &str = "0000:03:00.0";

    fn read(tree: &Tree) -> Function {
        Function::read(&tree.files(), &ADDRESS.parse().unwrap()).unwrap()
    }

    /// What `obstacles` say, one a line.
    fn said(function: &Function) -> String {
        let lines = function.obstacles.iter().map(Obstacle::to_string);
        lines.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn an_address_is_checked() {
        for good in [ADDRESS, "abcd:ff:1f.7"] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "03:00.0",
            "0000:03:00",
            "0000:3:00.0",
            "../../x",
            "0000:03:00.0/..",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_function_that_is_ready_has_no_obstacle() {
        let tree = Tree::new();
        tree.rde(ADDRESS);
        tree.group(7, &[ADDRESS]);
        tree.bind(ADDRESS, "rdsock-vfio");
        tree.write(&format!("sys/bus/pci/devices/{ADDRESS}/node_id"), "3\n");
        tree.write("dev/vfio/7", "");
        let function = read(&tree);
        assert_eq!(said(&function), "");
        assert_eq!(function.driver.as_deref(), Some("rdsock-vfio"));
        assert_eq!(function.iommu_group.as_deref(), Some("7"));
        assert_eq!((function.numa_node, function.node_id), (Some(0), Some(3)));
        assert_eq!(function.id, "5244:4531");
        assert_eq!(function.node.unwrap().path, tree.root().join("dev/vfio/7"));
        assert!(function.is_rde && function.used_by.is_empty());
    }

    #[test]
    fn what_is_missing_is_told() {
        let tree = Tree::new();
        tree.rde(ADDRESS);
        let bare = said(&read(&tree));
        assert!(
            bare.contains("no IOMMU") && bare.contains("no driver"),
            "{bare}"
        );
        tree.group(7, &[ADDRESS]);
        tree.bind(ADDRESS, "e1000e");
        let bound = said(&read(&tree));
        assert!(
            !bound.contains("IOMMU") && bound.contains("e1000e has it"),
            "{bound}"
        );
        tree.bind(ADDRESS, "rdsock-vfio");
        tree.write(&format!("sys/bus/pci/devices/{ADDRESS}/node_id"), "0\n");
        let function = read(&tree);
        let vfio = said(&function);
        assert!(
            vfio.contains("/dev/vfio") && vfio.contains("node id"),
            "{vfio}"
        );
        let advice = function.obstacles[1].advice();
        assert!(
            advice.contains(ADDRESS) && advice.contains("node_id"),
            "{advice}"
        );
    }

    #[test]
    fn a_group_without_an_iommu_is_found_out() {
        let tree = Tree::new();
        tree.rde(ADDRESS);
        tree.group(0, &[ADDRESS]);
        tree.write("sys/kernel/iommu_groups/0/name", "vfio-noiommu\n");
        assert!(read(&tree).obstacles.contains(&Obstacle::NoIommu));
    }

    #[test]
    fn others_of_the_group_are_named_with_their_drivers() {
        let tree = Tree::new();
        tree.rde(ADDRESS);
        tree.function("0000:03:00.1", "0x8086", "0x10c9");
        tree.bind("0000:03:00.1", "igb");
        tree.group(7, &[ADDRESS, "0000:03:00.1"]);
        let member = Member {
            address: "0000:03:00.1".into(),
            driver: Some("igb".into()),
        };
        let function = read(&tree);
        assert_eq!(function.shares_group_with, [member]);
        assert!(said(&function).contains("0000:03:00.1 (igb)"));
    }

    #[test]
    fn who_has_it_open_is_named() {
        let tree = Tree::new();
        tree.rde(ADDRESS);
        tree.group(7, &[ADDRESS]);
        tree.bind(ADDRESS, "vfio-pci");
        tree.write("dev/vfio/7", "");
        tree.process(42, "rdsockd", "dev/vfio/7");
        assert!(said(&read(&tree)).contains("rdsockd (42)"));
        // Also by the device's own file.
        std::fs::remove_dir_all(tree.root().join("proc/42")).unwrap();
        assert!(read(&tree).used_by.is_empty());
        tree.write(
            &format!("sys/bus/pci/devices/{ADDRESS}/vfio-dev/vfio3/dev"),
            "",
        );
        tree.process(43, "other", "dev/vfio/devices/vfio3");
        assert_eq!(read(&tree).used_by[0].pid, 43);
    }
}
