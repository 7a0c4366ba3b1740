//! What the machine is doing with a device: interfaces that are up, disks in use, processes that have it open.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::kernel::{KernelFiles, names, text};

/// Somebody who has a device open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Process {
    pub pid: i32,
    pub program: String,
}

/// The processes that have one of these files open, as far as this user may see.
pub fn openers(files: &KernelFiles, paths: &[PathBuf]) -> Vec<Process> {
    let has_it_open = |pid: i32| {
        let folder = files.proc(&format!("{pid}/fd"));
        let fds = fs::read_dir(folder).into_iter().flatten().flatten();
        let mut targets = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
        targets.any(|target| paths.contains(&target))
    };
    let pids = names(&files.proc("")).into_iter();
    pids.filter_map(|name| name.parse().ok())
        .filter(|pid| has_it_open(*pid))
        .map(|pid| Process {
            pid,
            program: text(&files.proc(&format!("{pid}/comm"))).unwrap_or_default(),
        })
        .collect()
}

/// Whether somebody has the group of this file open, also where who that is can't be seen. The file opens once, so this
/// is in the way of a daemon that opens it at the same moment.
pub fn is_busy(group: &Path) -> bool {
    let opened = fs::File::options().read(true).write(true).open(group);
    opened.is_err_and(|error| error.kind() == std::io::ErrorKind::ResourceBusy)
}

/// Names of its network interfaces that are up. Those of other network namespaces are not seen.
pub fn interfaces_up(files: &KernelFiles, device: &Path) -> Vec<String> {
    const IFF_UP: u32 = 1;
    let class = files.sys("class/net");
    let is_up = |name: &String| {
        let place = class.join(name);
        let flags = text(&place.join("flags")).unwrap_or_default();
        let flags = u32::from_str_radix(flags.trim_start_matches("0x"), 16).unwrap_or(0);
        is_part(&place, device) && flags & IFF_UP != 0
    };
    names(&class).into_iter().filter(is_up).collect()
}

/// Its disks and partitions that are in use, each with what it is used for.
pub fn claimed_disks(files: &KernelFiles, device: &Path) -> Vec<(String, String)> {
    let class = files.sys("class/block");
    let mounts = fs::read_to_string(files.proc("self/mountinfo")).unwrap_or_default();
    let swaps = fs::read_to_string(files.proc("swaps")).unwrap_or_default();
    let mut claimed = Vec::new();
    for name in names(&class) {
        let place = class.join(&name);
        if !is_disk_of(&place, device) {
            continue;
        }
        let number = text(&place.join("dev")).unwrap_or_default();
        let is_it = |path: &str| Path::new(path).file_name() == Some(name.as_ref());
        let holders = names(&place.join("holders"));
        if let Some(point) = mounts
            .lines()
            .find_map(|line| mount_point(line, &number, is_it))
        {
            claimed.push((name, format!("mounted at {point}")));
        } else if swaps
            .lines()
            .any(|line| is_it(line.split(' ').next().unwrap_or("")))
        {
            claimed.push((name, "swapped to".into()));
        } else if !holders.is_empty() {
            claimed.push((name, format!("a part of {}", holders.join(", "))));
        }
    }
    claimed
}

/// Where a line of `/proc/self/mountinfo` says that this disk is mounted, if it speaks of it. Some file systems have
/// numbers of their own there, so the name counts, too.
fn mount_point(line: &str, number: &str, is_it: impl Fn(&str) -> bool) -> Option<String> {
    let (mount, source) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(2);
    let (of, point) = (mount.next()?, mount.nth(1)?);
    let source = source.split(' ').nth(1)?;
    (of == number || is_it(source)).then(|| point.to_owned())
}

/// Whether what is there in sysfs is below this device.
fn is_part(place: &Path, device: &Path) -> bool {
    fs::canonicalize(place).is_ok_and(|place| place.starts_with(device))
}

/// The same for a disk or a partition. An NVMe disk with several paths is below none of them, and has links to each.
fn is_disk_of(place: &Path, device: &Path) -> bool {
    let Ok(real) = fs::canonicalize(place) else {
        return false;
    };
    if real.starts_with(device) {
        return true;
    }
    let disk = match real.join("partition").exists() {
        true => real.parent().unwrap_or(&real),
        false => &real,
    };
    let subsystem = disk.join("device");
    let mut paths = names(&subsystem).into_iter();
    paths.any(|name| name.starts_with("nvme") && is_part(&subsystem.join(name), device))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::tree::Tree;

    const NIC: &str = "0000:02:00.0";
    const DISK: &str = "0000:04:00.0";

    #[test]
    fn interfaces_that_are_up_are_found() {
        let tree = Tree::new();
        let device = tree.function(NIC, "0x8086", "0x10c9");
        let other = tree.function(DISK, "0x8086", "0x10c9");
        let interface = tree.part(NIC, "net/eth0", "net");
        let files = tree.files();
        fs::write(interface.join("flags"), "0x1002\n").unwrap();
        assert!(interfaces_up(&files, &device).is_empty());
        fs::write(interface.join("flags"), "0x1003\n").unwrap();
        assert_eq!(interfaces_up(&files, &device), ["eth0"]);
        assert!(interfaces_up(&files, &other).is_empty());
    }

    #[test]
    fn disks_in_use_are_found() {
        let tree = Tree::new();
        let device = tree.function(DISK, "0x144d", "0xa808");
        let disk = tree.part(DISK, "nvme/nvme0/nvme0n1", "block");
        fs::write(disk.join("dev"), "259:0\n").unwrap();
        let part = tree.part(DISK, "nvme/nvme0/nvme0n1/nvme0n1p2", "block");
        fs::write(part.join("dev"), "259:2\n").unwrap();
        let files = tree.files();
        let used = || {
            let claimed = claimed_disks(&files, &device);
            let lines = claimed.iter().map(|(disk, use_)| format!("{disk} {use_}"));
            lines.collect::<Vec<_>>().join("; ")
        };
        assert_eq!(used(), "");
        let mounts = |text: &str| tree.write("proc/self/mountinfo", text);
        mounts("22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n");
        assert_eq!(used(), "");
        mounts("36 22 259:2 / /home rw - ext4 /dev/root rw\n");
        assert_eq!(used(), "nvme0n1p2 mounted at /home");
        mounts("36 22 0:45 /@ /data rw - btrfs /dev/nvme0n1 rw\n");
        assert_eq!(used(), "nvme0n1 mounted at /data");
        mounts("");
        tree.write(
            "proc/swaps",
            "Filename Type\n/dev/nvme0n1p2  partition 1 0 -2\n",
        );
        assert_eq!(used(), "nvme0n1p2 swapped to");
        tree.write("proc/swaps", "");
        fs::create_dir_all(part.join("holders/dm-0")).unwrap();
        assert_eq!(used(), "nvme0n1p2 a part of dm-0");
    }

    #[test]
    fn a_disk_with_several_paths_belongs_to_each() {
        let tree = Tree::new();
        let device = tree.function(DISK, "0x144d", "0xa808");
        let other = tree.function(NIC, "0x144d", "0xa808");
        let controller = tree.part(DISK, "nvme/nvme0", "nvme");
        let subsystem = tree
            .root()
            .join("sys/devices/virtual/nvme-subsystem/nvme-subsys0");
        let part = subsystem.join("nvme0n1/nvme0n1p1");
        fs::create_dir_all(&part).unwrap();
        fs::write(part.join("partition"), "1\n").unwrap();
        fs::write(part.join("dev"), "259:1\n").unwrap();
        let link = |to: &Path, at: PathBuf| std::os::unix::fs::symlink(to, at).unwrap();
        link(&controller, subsystem.join("nvme0"));
        link(&subsystem, subsystem.join("nvme0n1/device"));
        fs::create_dir_all(tree.root().join("sys/class/block")).unwrap();
        link(&part, tree.root().join("sys/class/block/nvme0n1p1"));
        tree.write(
            "proc/self/mountinfo",
            "36 22 259:1 / /home rw - ext4 /dev/x rw\n",
        );
        assert_eq!(claimed_disks(&tree.files(), &device).len(), 1);
        assert!(claimed_disks(&tree.files(), &other).is_empty());
    }
}
