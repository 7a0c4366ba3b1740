//! What keeps a device from being used, in words, and what to do about it.

use std::fmt;
use std::path::PathBuf;

use rdsock_output::in_line;
use serde::ser::{Serialize, SerializeStruct, Serializer};

use super::function::{Address, Member};
use super::uses::Process;

/// What to do without an IOMMU.
pub const IOMMU_ON: &str = "turn the IOMMU on: in the firmware (VT-d, AMD-Vi, SMMU), and with intel_iommu=on on the \
                            kernel's command line where it needs it (docs/deployment.md)";

/// One thing that does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Its DMA could reach all memory.
    NoIommu,
    /// Others are in its IOMMU group, and it could reach their registers past the IOMMU.
    Shared(Vec<Member>),
    /// A network interface of it that is up.
    Interface(String),
    /// A disk or partition of it that is in use.
    Disk { disk: String, use_: String },
    /// These have it open; none: somebody has.
    Open(Vec<Process>),
    /// A driver of the kernel has it, or none.
    Bound {
        address: Address,
        driver: Option<String>,
    },
    /// A VFIO driver has it, and nothing is in `/dev/vfio`.
    NoNode,
    /// This user may not open the file.
    Forbidden(PathBuf),
    /// The kernel module was not told which node it is.
    NoId(Address),
}

impl Obstacle {
    /// Whether it also keeps a driver from being changed. The others are what is to be done next.
    pub fn forbids_binding(&self) -> bool {
        match self {
            Obstacle::NoIommu
            | Obstacle::Shared(_)
            | Obstacle::Interface(_)
            | Obstacle::Disk { .. }
            | Obstacle::Open(_) => true,
            Obstacle::Bound { .. }
            | Obstacle::NoNode
            | Obstacle::Forbidden(_)
            | Obstacle::NoId(_) => false,
        }
    }

    /// What to do.
    pub fn advice(&self) -> String {
        match self {
            Obstacle::NoIommu => IOMMU_ON.into(),
            Obstacle::Shared(_) => {
                "put it into a slot of its own, behind a port with access control services (ACS)"
                    .into()
            }
            Obstacle::Interface(name) => {
                format!("if nothing needs the interface: ip link set {name} down")
            }
            Obstacle::Disk { .. } => "a disk that is in use can't be taken away: unmount it".into(),
            Obstacle::Open(_) => "end these first, since the kernel waits for them".into(),
            Obstacle::Bound { address, .. } => format!("rdsock bind {address}"),
            Obstacle::NoNode => {
                "see the kernel's log (dmesg), and whether udev or devtmpfs runs".into()
            }
            Obstacle::Forbidden(node) => format!(
                "give it to the group of rdsockd: chgrp rdsock {0} && chmod 660 {0}, or a udev rule \
                 (docs/deployment.md)",
                node.display()
            ),
            Obstacle::NoId(address) => format!(
                "say which node this is, as root: echo ID >/sys/bus/pci/devices/{address}/node_id, and who may \
                 reach it in peers beside it"
            ),
        }
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::NoIommu => f.write_str("no IOMMU stands before it"),
            Obstacle::Shared(members) => {
                let member = |member: &Member| match &member.driver {
                    Some(driver) => format!("{} ({driver})", member.address),
                    None => member.address.clone(),
                };
                let members: Vec<String> = members.iter().map(member).collect();
                write!(f, "others are in its IOMMU group: {}", members.join(", "))
            }
            Obstacle::Interface(name) => write!(f, "its network interface {name} is up"),
            Obstacle::Disk { disk, use_ } => write!(f, "its disk {disk} is {use_}"),
            Obstacle::Open(processes) if processes.is_empty() => {
                f.write_str("it is open in a process that can't be seen from here")
            }
            Obstacle::Open(processes) => {
                let process =
                    |process: &Process| format!("{} ({})", in_line(&process.program), process.pid);
                let processes: Vec<String> = processes.iter().map(process).collect();
                write!(f, "it is open in {}", processes.join(", "))
            }
            Obstacle::Bound { driver, .. } => match driver {
                Some(driver) => write!(f, "{driver} has it"),
                None => f.write_str("no driver has it"),
            },
            Obstacle::NoNode => f.write_str("it has no file in /dev/vfio"),
            Obstacle::Forbidden(node) => write!(f, "this user may not open {}", node.display()),
            Obstacle::NoId(_) => f.write_str("it was given no node id"),
        }
    }
}

impl Serialize for Obstacle {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut both = serializer.serialize_struct("Obstacle", 2)?;
        both.serialize_field("what", &self.to_string())?;
        both.serialize_field("advice", &self.advice())?;
        both.end()
    }
}
