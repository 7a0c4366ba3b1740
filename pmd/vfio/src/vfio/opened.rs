//! Opening a device, and the address space that it reaches, in either way that the kernel has; and what to do where
//! that fails.

use super::ioctl;
use super::sysfs::{Folder, PciAddress};
use crate::device::BusError;
use nix::errno::Errno;
use std::fs::File;
use std::io::ErrorKind;
use std::mem::ManuallyDrop;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError};

/// How the kernel gives out devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By IOMMU groups, `/dev/vfio/GROUP`, with the type 1 v2 container.
    Group,
    /// By a character device of its own, `/dev/vfio/devices/vfioN`, with `/dev/iommu`.
    Iommufd,
}

/// An open device.
pub(crate) enum Opened {
    Group {
        device: ManuallyDrop<VfioDevice>,
        container: Arc<VfioContainer>,
        folder: Folder,
    },
    Iommufd {
        // Closed in this order.
        device: File,
        iommufd: File,
        ioas: u32,
    },
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Opened({:?})", self.way())
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Opened::Group { device, folder, .. } = self {
            // The crate panics when it does not find the group any more.
            if folder.group().is_some() {
                // SAFETY: it is not used after this.
                unsafe { ManuallyDrop::drop(device) };
            } else {
                tracing::warn!("a device has gone while it was open; its descriptor stays open");
            }
        }
    }
}

impl AsFd for Opened {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            // SAFETY: the descriptor is open as long as `self`.
            Opened::Group { device, .. } => unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) },
            Opened::Iommufd { device, .. } => device.as_fd(),
        }
    }
}

impl Opened {
    /// Opens a device in the way given, or in the newer one that it can be opened in.
    pub fn open(address: &PciAddress, way: Option<Way>) -> Result<Self, BusError> {
        let folder = Folder::of(address);
        let cause = |cause: &str, remedy: String| unusable(address, cause.into(), remedy);
        if !folder.exists() {
            let remedy = "lspci -D lists the devices that there are".into();
            return Err(cause("there is no such PCI device", remedy));
        }
        if folder.is_without_iommu() {
            let remedy = "VFIO's mode without IOMMU is refused, since the device could write all memory: turn the IOMMU on \
                          (in the firmware, and with intel_iommu=on where the kernel needs it)";
            return Err(cause("no IOMMU stands before it", remedy.into()));
        }
        if folder.group().is_none() {
            let remedy = "turn the IOMMU on (in the firmware, and with intel_iommu=on where the kernel needs it)";
            return Err(cause("it is in no IOMMU group", remedy.into()));
        }
        if folder.driver().is_none() {
            return Err(cause("no driver is bound to it", bind(address)));
        }
        match way.unwrap_or_else(|| usable_way(&folder)) {
            Way::Group => by_group(address, folder),
            Way::Iommufd => by_iommufd(address, &folder),
        }
    }

    pub fn way(&self) -> Way {
        match self {
            Opened::Group { .. } => Way::Group,
            Opened::Iommufd { .. } => Way::Iommufd,
        }
    }

    /// I/O virtual addresses that the IOMMU translates.
    pub fn iova_ranges(&self) -> Result<Vec<RangeInclusive<u64>>, BusError> {
        let ranges = match self {
            Opened::Group { container, .. } => ioctl::container_ranges(container_fd(container)),
            Opened::Iommufd { iommufd, ioas, .. } => ioctl::ioas_ranges(iommufd.as_fd(), *ioas),
        };
        ranges.map_err(io("asking which I/O virtual addresses there are"))
    }

    /// Maps memory.
    ///
    /// # Safety
    /// As [`crate::Device::map`].
    pub unsafe fn map(
        &self,
        iova: u64,
        host: *mut u8,
        len: usize,
        writable: bool,
    ) -> Result<(), BusError> {
        // SAFETY: the caller's promise.
        let mapped = unsafe {
            match self {
                Opened::Group { container, .. } => {
                    ioctl::container_map(container_fd(container), iova, host, len, writable)
                }
                Opened::Iommufd { iommufd, ioas, .. } => {
                    ioctl::ioas_map((iommufd.as_fd(), *ioas), iova, host, len, writable)
                }
            }
        };
        mapped.map_err(|errno| match errno {
            Errno::EEXIST => BusError::Range {
                iova,
                len: len as u64,
            },
            Errno::ENOMEM => io(
                "mapping DMA memory: it would exceed the limit of locked memory, or there is none \
                                 (ulimit -l, LimitMEMLOCK= of a systemd unit)",
            )(errno),
            Errno::ENOSPC => io(
                "mapping DMA memory: too many mappings (the parameter dma_entry_limit of \
                                 vfio_iommu_type1; huge pages need fewer)",
            )(errno),
            Errno::EINVAL => io(
                "mapping DMA memory (not whole pages, or addresses that the IOMMU does not \
                                 translate)",
            )(errno),
            Errno::EFAULT => io(
                "mapping DMA memory: the device could not be given it for writing, or it is not \
                                 there",
            )(errno),
            _ => io("mapping DMA memory")(errno),
        })
    }

    /// Unmaps it.
    pub fn unmap(&self, iova: u64, len: usize) -> Result<(), BusError> {
        let what = "unmapping DMA memory";
        let unmapped = match self {
            Opened::Group { container, .. } => match container.vfio_dma_unmap(iova, len) {
                Ok(()) => Ok(len as u64),
                Err(VfioError::IommuDmaUnmap(error)) => Err(Errno::from_raw(error.errno())),
                // Less was unmapped than was asked for.
                Err(_) => Ok(0),
            },
            Opened::Iommufd { iommufd, ioas, .. } => {
                ioctl::ioas_unmap((iommufd.as_fd(), *ioas), iova, len)
            }
        };
        match unmapped {
            Ok(bytes) if bytes == len as u64 => Ok(()),
            Ok(_) => Err(BusError::Range {
                iova,
                len: len as u64,
            }),
            Err(errno) => Err(io(what)(errno)),
        }
    }
}

fn container_fd(container: &VfioContainer) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the container.
    unsafe { BorrowedFd::borrow_raw(container.as_raw_fd()) }
}

pub(crate) fn io(what: &'static str) -> impl Fn(Errno) -> BusError {
    move |errno| BusError::Io {
        what,
        source: errno.into(),
    }
}

fn unusable(address: &PciAddress, cause: String, remedy: String) -> BusError {
    BusError::Unusable {
        device: address.to_string(),
        cause,
        remedy,
    }
}

fn bind(address: &PciAddress) -> String {
    format!("bind it: rdsock bind {address}, or with --driver vfio-pci where it is no rde")
}

/// The newer way, if the kernel has it and this process may.
fn usable_way(folder: &Folder) -> Way {
    let may = |path: &Path| {
        use nix::unistd::{AccessFlags, access};
        access(path, AccessFlags::R_OK | AccessFlags::W_OK).is_ok()
    };
    match folder.character_device() {
        Some(name) if may(Path::new("/dev/iommu")) && may(&cdev_path(&name)) => Way::Iommufd,
        _ => Way::Group,
    }
}

fn cdev_path(name: &str) -> PathBuf {
    Path::new("/dev/vfio/devices").join(name)
}

fn by_iommufd(address: &PciAddress, folder: &Folder) -> Result<Opened, BusError> {
    let name = folder.character_device().ok_or_else(|| {
        let cause = "it has no character device (the kernel is older than 6.6, was built without \
                     CONFIG_VFIO_DEVICE_CDEV, or the device is not bound to vfio-pci)";
        unusable(address, cause.into(), bind(address))
    })?;
    let open = |path: &Path| {
        let opened = File::options().read(true).write(true).open(path);
        opened.map_err(|error| open_failed(address, folder, path, &error))
    };
    let iommufd = open(Path::new("/dev/iommu"))?;
    let device = open(&cdev_path(&name))?;
    let ioas = ioctl::ioas_alloc(iommufd.as_fd()).map_err(io("making an I/O address space"))?;
    ioctl::bind_iommufd(device.as_fd(), iommufd.as_fd(), ioas)
        .map_err(|errno| attach_failed(address, folder, errno))?;
    Ok(Opened::Iommufd {
        device,
        iommufd,
        ioas,
    })
}

fn by_group(address: &PciAddress, folder: Folder) -> Result<Opened, BusError> {
    let container = Arc::new(VfioContainer::new(None).map_err(|error| match error {
        VfioError::OpenContainer(error) if error.kind() == ErrorKind::NotFound => {
            let cause = "the kernel's VFIO is not there (no /dev/vfio/vfio)".into();
            unusable(address, cause, "modprobe vfio-pci".into())
        }
        VfioError::OpenContainer(error) => {
            open_failed(address, &folder, Path::new("/dev/vfio/vfio"), &error)
        }
        other => {
            let remedy = "the kernel needs VFIO with IOMMU type 1 v2: modprobe vfio_iommu_type1";
            unusable(address, other.to_string(), remedy.into())
        }
    })?);
    let opened = VfioDevice::new(&folder.0, container.clone(), false);
    let device = opened.map_err(|error| group_failed(address, &folder, error))?;
    Ok(Opened::Group {
        device: ManuallyDrop::new(device),
        container,
        folder,
    })
}

/// What to do when a device node could not be opened.
fn open_failed(
    address: &PciAddress,
    folder: &Folder,
    path: &Path,
    error: &std::io::Error,
) -> BusError {
    let remedy = match error.kind() {
        ErrorKind::NotFound => match folder.driver().as_deref() {
            None | Some("vfio-pci") => bind(address),
            Some(other) => format!(
                "it is bound to {other}: unbind that, then {}",
                bind(address)
            ),
        },
        ErrorKind::PermissionDenied => format!(
            "give this user the node (chown or a udev rule: the group of {} needs reading and writing)",
            path.display()
        ),
        ErrorKind::ResourceBusy => "end the process that has it open (fuser -v finds it)".into(),
        _ => "see the kernel's log (dmesg)".into(),
    };
    unusable(
        address,
        format!("opening {}: {error}", path.display()),
        remedy,
    )
}

/// What to do when the device could not be put behind the IOMMU.
fn attach_failed(address: &PciAddress, folder: &Folder, errno: Errno) -> BusError {
    let cause = format!("putting it behind the IOMMU: {}", errno.desc());
    let remedy = match errno {
        Errno::EPERM => {
            "the platform does not remap interrupts, so the device could send any; turn that on (intremap), \
             or, knowing that, load vfio_iommu_type1 (or iommufd) with allow_unsafe_interrupts=1"
                .into()
        }
        Errno::EBUSY => "end the process that has it, or a device of its IOMMU group, open".into(),
        Errno::EINVAL | Errno::ENODEV => neighbours(folder),
        _ => "see the kernel's log (dmesg)".into(),
    };
    unusable(address, cause, remedy)
}

fn neighbours(folder: &Folder) -> String {
    let others: Vec<String> = folder
        .neighbours()
        .into_iter()
        .map(|(name, driver)| format!("{name} ({})", driver.as_deref().unwrap_or("no driver")))
        .collect();
    match others.is_empty() {
        true => "see the kernel's log (dmesg)".into(),
        false => format!(
            "bind the other devices of its IOMMU group to vfio-pci, or to none: {}",
            others.join(", ")
        ),
    }
}

fn group_failed(address: &PciAddress, folder: &Folder, error: VfioError) -> BusError {
    match error {
        VfioError::OpenGroup(error, group) => {
            let path = Path::new("/dev/vfio").join(group);
            open_failed(address, folder, &path, &error)
        }
        VfioError::GroupViable => {
            let cause = "other devices of its IOMMU group belong to drivers of the kernel".into();
            unusable(address, cause, neighbours(folder))
        }
        VfioError::ContainerSetIOMMU(error) => {
            attach_failed(address, folder, Errno::from_raw(error.errno()))
        }
        VfioError::GroupGetDeviceFD(error) => {
            let errno = Errno::from_raw(error.errno());
            let remedy = match errno {
                Errno::EPERM | Errno::EACCES => {
                    "the kernel module refuses this user, or this device: see the kernel's log (dmesg)".into()
                }
                Errno::EBUSY => "end the process that has it open".into(),
                _ => match folder.driver().as_deref() {
                    Some("vfio-pci") | None => "see the kernel's log (dmesg)".into(),
                    Some(driver) => format!("it is bound to {driver}: {}", bind(address)),
                },
            };
            unusable(
                address,
                format!("taking it from its group: {}", errno.desc()),
                remedy,
            )
        }
        other => unusable(
            address,
            other.to_string(),
            "see the kernel's log (dmesg)".into(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address() -> PciAddress {
        "ffff:ff:1f.7".parse().unwrap()
    }

    #[test]
    fn a_device_that_is_not_there_is_named_with_what_to_do() {
        let error = Opened::open(&address(), None).unwrap_err().to_string();
        assert!(
            error.contains("ffff:ff:1f.7") && error.contains("no such PCI device"),
            "{error}"
        );
        assert!(error.contains("lspci"), "{error}");
    }

    #[test]
    fn each_failure_has_its_remedy() {
        let folder = Folder::of(&address());
        let open = |errno: Errno| {
            let error = std::io::Error::from(errno);
            open_failed(&address(), &folder, Path::new("/dev/vfio/7"), &error).to_string()
        };
        let attach = |errno| attach_failed(&address(), &folder, errno).to_string();
        for (error, said) in [
            (open(Errno::ENOENT), "rdsock bind"),
            (open(Errno::EACCES), "chown"),
            (open(Errno::EPERM), "chown"),
            (open(Errno::EBUSY), "fuser"),
            (attach(Errno::EPERM), "allow_unsafe_interrupts"),
            (attach(Errno::EBUSY), "end the process"),
            (
                group_failed(&address(), &folder, VfioError::GroupViable).to_string(),
                "group",
            ),
        ] {
            assert!(error.contains(said), "{error}");
            assert!(error.contains("ffff:ff:1f.7"), "{error}");
        }
    }
}
