//! `rdsock bind` and `rdsock unbind`: give a device to a VFIO driver, and back to the kernel's own.
//!
//! First all that speaks against it is looked for; then a few files of the kernel are written to; then what the kernel
//! made of it is looked at. A driver that refuses the device does not get it by halves: what was written is taken back.

use rdsock_output::{OutputError, line};
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use super::function::{Address, Function};
use super::kernel::{KernelFiles, text};
use super::list::file;
use super::obstacle::Obstacle;
use super::uses::is_busy;
use crate::cli::{BindArgs, UnbindArgs, VfioDriver};

/// Why a device stays where it is.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// It is done, but nobody can be told.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// No such device.
    #[error("there is no PCI device {0}: rdsock devices, or lspci -D, lists them")]
    NoDevice(Address),
    /// The module takes its own device and no other.
    #[error(
        "{0} is another device ({1}) than that of docs/device.md, and rdsock-vfio takes no other: \
         --driver vfio-pci gives out any"
    )]
    NotRde(Address, String),
    /// No module.
    #[error(
        "the kernel module rdsock-vfio is not loaded: modprobe rdsock-vfio (kmod-minimal/README.md says how it is \
         built and installed), or --driver vfio-pci, with which nothing protects the management page"
    )]
    NoModule,
    /// No vfio-pci.
    #[error("vfio-pci is not loaded: modprobe vfio-pci")]
    NoVfioPci,
    /// It is in use, or not isolated.
    #[error("{address}: {obstacle}: {}", .obstacle.advice())]
    Obstacle {
        address: Address,
        obstacle: Obstacle,
    },
    /// There is nothing to give back.
    #[error("{address}: {}: only what a VFIO driver has can be given back", has(.driver.as_deref()))]
    NotOurs {
        address: Address,
        driver: Option<String>,
    },
    /// The kernel did not take what was written.
    #[error("writing to {}: {source}{}", .path.display(), remedy(.source))]
    Write { path: PathBuf, source: io::Error },
    /// The driver does not want it.
    #[error(
        "{address}: {driver} did not take it{}: see the kernel's log (dmesg); now {}, as before",
        causes(.refusals), has(.now.as_deref())
    )]
    Refused {
        address: Address,
        driver: &'static str,
        refusals: Vec<String>,
        now: Option<String>,
    },
}

fn has(driver: Option<&str>) -> String {
    match driver {
        Some(driver) => format!("{driver} has it"),
        None => "no driver has it".into(),
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::PermissionDenied => ": run it as root",
        ErrorKind::ReadOnlyFilesystem => {
            ": sysfs is read-only here, as in a container: run it on the host"
        }
        _ => "",
    }
}

fn causes(refusals: &[String]) -> String {
    match refusals.is_empty() {
        true => String::new(),
        false => format!(
            " ({}; kmod-minimal/README.md tells what that is)",
            refusals.join(", ")
        ),
    }
}

/// Gives a device to a VFIO driver.
pub fn bind(args: &BindArgs) -> Result<ExitCode, BindError> {
    let files = KernelFiles::below(&args.root);
    let (address, driver) = (&args.address, args.driver.name());
    match Change::to(&files, address, args.driver)? {
        Some(change) => change.make(&files, &mut write)?,
        None => line!("{address} was bound to {driver} before")?,
    }
    rdsock_output::write(format_args!("{}", report(&files, address, driver)))?;
    if args.driver == VfioDriver::VfioPci {
        rdsock_output::complain("rdsock", format_args!("warning: {UNPROTECTED}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// What vfio-pci leaves open.
const UNPROTECTED: &str = "with vfio-pci nothing protects the device's management page: who opens the device can make \
                           itself any node, and let any node in (docs/threat-model.md)";

/// What is there now, what is to be done next, and the way back.
fn report(files: &KernelFiles, address: &Address, driver: &str) -> String {
    let mut report = format!("{address} is bound to {driver}");
    let Some(function) = Function::read(files, address) else {
        return report;
    };
    if let Some(node) = &function.node {
        let _ = write!(report, ": {}", file(node));
    }
    report.push('\n');
    for obstacle in &function.obstacles {
        let _ = writeln!(report, "next: {obstacle}: {}", obstacle.advice());
    }
    let _ = writeln!(report, "the way back: rdsock unbind {address}");
    report
}

/// Gives a device back.
pub fn unbind(args: &UnbindArgs) -> Result<ExitCode, BindError> {
    let files = KernelFiles::below(&args.root);
    let address = &args.address;
    Change::back(&files, address)?.make(&files, &mut write)?;
    let driver = Function::read(&files, address).and_then(|function| function.driver);
    line!("{address}: {}", has(driver.as_deref()))?;
    Ok(ExitCode::SUCCESS)
}

/// What is written to a file of the kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Step {
    pub path: PathBuf,
    pub text: String,
}

/// Such a file is there, or the kernel can't do it.
fn write(step: &Step) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(&step.path)?;
    file.write_all(step.text.as_bytes())
}

/// A change of driver against which nothing speaks.
#[derive(Debug)]
struct Change {
    address: Address,
    /// The driver that is to have it; `None` for whichever the kernel finds.
    to: Option<&'static str>,
    steps: Vec<Step>,
    /// How each is taken back.
    undo: Vec<Step>,
}

impl Change {
    /// To a VFIO driver. `None`: it has it.
    fn to(
        files: &KernelFiles,
        address: &Address,
        driver: VfioDriver,
    ) -> Result<Option<Self>, BindError> {
        let function = find(files, address)?;
        let name = driver.name();
        if function.driver.as_deref() == Some(name) {
            return Ok(None);
        }
        if driver == VfioDriver::RdsockVfio && !function.is_rde {
            return Err(BindError::NotRde(address.clone(), function.id));
        }
        refuse(files, &function, Obstacle::forbids_binding)?;
        if !files.has_driver(name) {
            return Err(match driver {
                VfioDriver::RdsockVfio => BindError::NoModule,
                VfioDriver::VfioPci => BindError::NoVfioPci,
            });
        }
        Ok(Some(Change::new(files, &function, Some(name))))
    }

    /// To the kernel's own driver, if it has one.
    fn back(files: &KernelFiles, address: &Address) -> Result<Self, BindError> {
        let function = find(files, address)?;
        if !function.has_vfio() {
            return Err(BindError::NotOurs {
                address: address.clone(),
                driver: function.driver,
            });
        }
        refuse(files, &function, |obstacle| {
            matches!(obstacle, Obstacle::Open(_))
        })?;
        Ok(Change::new(files, &function, None))
    }

    fn new(files: &KernelFiles, function: &Function, to: Option<&'static str>) -> Self {
        let wish = |driver: &str| Step {
            path: function.folder.join("driver_override"),
            text: format!("{driver}\n"),
        };
        let address = &function.address;
        let probe = || Step {
            path: files.sys("bus/pci/drivers_probe"),
            text: format!("{address}\n"),
        };
        let mut steps = vec![wish(to.unwrap_or(""))];
        if function.driver.is_some() {
            steps.push(Step {
                path: function.folder.join("driver/unbind"),
                text: format!("{address}\n"),
            });
        }
        steps.push(probe());
        let before = text(&function.folder.join("driver_override")).unwrap_or_default();
        let before = if before == "(null)" { "" } else { &before };
        Change {
            address: address.clone(),
            to,
            steps,
            undo: vec![wish(before), probe()],
        }
    }

    /// Writes, and looks at what became of it. `write` is the kernel's ear; tests have one of their own.
    fn make(
        &self,
        files: &KernelFiles,
        write: &mut dyn FnMut(&Step) -> io::Result<()>,
    ) -> Result<(), BindError> {
        let refused = files.refusals();
        let probe = files.sys("bus/pci/drivers_probe");
        for step in &self.steps {
            match write(step) {
                Ok(()) => {}
                // A driver that failed: that is told below.
                Err(error) if step.path == probe && error.kind() != ErrorKind::PermissionDenied => {
                }
                Err(source) => {
                    self.take_back(write);
                    let path = step.path.clone();
                    return Err(BindError::Write { path, source });
                }
            }
        }
        let driver = || Function::read(files, &self.address).and_then(|function| function.driver);
        match self.to {
            Some(to) if driver().as_deref() != Some(to) => {
                self.take_back(write);
                let now = files.refusals().into_iter();
                let new = now.filter(|(cause, number)| {
                    let before = refused.iter().find(|(known, _)| known == cause);
                    *number > before.map_or(0, |(_, number)| *number)
                });
                Err(BindError::Refused {
                    address: self.address.clone(),
                    driver: to,
                    refusals: new.map(|(cause, _)| cause).collect(),
                    now: driver(),
                })
            }
            _ => Ok(()),
        }
    }

    /// As far as that goes; the error that led here is the one to tell.
    fn take_back(&self, write: &mut dyn FnMut(&Step) -> io::Result<()>) {
        for step in &self.undo {
            let _ = write(step);
        }
    }
}

fn find(files: &KernelFiles, address: &Address) -> Result<Function, BindError> {
    Function::read(files, address).ok_or_else(|| BindError::NoDevice(address.clone()))
}

/// The first thing that speaks against it, if any does.
fn refuse(
    files: &KernelFiles,
    function: &Function,
    counts: impl Fn(&Obstacle) -> bool,
) -> Result<(), BindError> {
    let obstacle = function.obstacles.iter().find(|obstacle| counts(obstacle));
    let busy = || {
        let group = files.dev("vfio").join(function.iommu_group.as_ref()?);
        (function.has_vfio() && is_busy(&group)).then(|| Obstacle::Open(Vec::new()))
    };
    match obstacle.cloned().or_else(busy) {
        Some(obstacle) => Err(BindError::Obstacle {
            address: function.address.clone(),
            obstacle,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::tree::Tree;

    const ADDRESS: &str = "0000:03:00.0";

    fn address() -> Address {
        ADDRESS.parse().unwrap()
    }

    /// A machine with an RDMA device alone in its group, and both drivers.
    fn machine() -> Tree {
        let tree = Tree::new();
        tree.rde(ADDRESS);
        tree.group(7, &[ADDRESS]);
        tree.driver("rdsock-vfio");
        tree.driver("vfio-pci");
        tree
    }

    fn bind_to(tree: &Tree, driver: VfioDriver) -> Result<(), BindError> {
        let files = tree.files();
        match Change::to(&files, &address(), driver)? {
            Some(change) => change.make(&files, &mut |step| tree.store(&step.path, &step.text)),
            None => Ok(()),
        }
    }

    fn unbind(tree: &Tree) -> Result<(), BindError> {
        let files = tree.files();
        let change = Change::back(&files, &address())?;
        change.make(&files, &mut |step| tree.store(&step.path, &step.text))
    }

    fn driver(tree: &Tree) -> Option<String> {
        Function::read(&tree.files(), &address()).unwrap().driver
    }

    fn refusal(tree: &Tree, driver: VfioDriver) -> String {
        bind_to(tree, driver).unwrap_err().to_string()
    }

    #[test]
    fn a_device_goes_there_and_back() {
        let tree = machine();
        for to in [VfioDriver::RdsockVfio, VfioDriver::VfioPci] {
            bind_to(&tree, to).unwrap();
            assert_eq!(driver(&tree).as_deref(), Some(to.name()));
        }
        unbind(&tree).unwrap();
        assert_eq!(
            (driver(&tree), tree.driver_override(ADDRESS)),
            (None, String::new())
        );
        // Also where a driver of the kernel had it: that has it again.
        tree.takes(ADDRESS, "igb");
        tree.bind(ADDRESS, "igb");
        bind_to(&tree, VfioDriver::VfioPci).unwrap();
        unbind(&tree).unwrap();
        assert_eq!(driver(&tree).as_deref(), Some("igb"));
        let error = unbind(&tree).unwrap_err().to_string();
        assert!(
            error.contains("igb has it") && error.contains("given back"),
            "{error}"
        );
    }

    #[test]
    fn what_is_there_already_is_left_alone() {
        let tree = machine();
        tree.bind(ADDRESS, "rdsock-vfio");
        let change = Change::to(&tree.files(), &address(), VfioDriver::RdsockVfio).unwrap();
        assert!(change.is_none());
    }

    #[test]
    fn a_module_that_is_not_loaded_is_said_with_how_to_load_it() {
        let tree = Tree::new();
        tree.rde(ADDRESS);
        tree.group(7, &[ADDRESS]);
        let error = refusal(&tree, VfioDriver::RdsockVfio);
        assert!(
            error.contains("modprobe rdsock-vfio") && error.contains("--driver vfio-pci"),
            "{error}"
        );
        assert!(refusal(&tree, VfioDriver::VfioPci).contains("modprobe vfio-pci"));
    }

    #[test]
    fn what_is_no_rdma_device_is_not_for_the_module() {
        let tree = machine();
        tree.function("0000:02:00.0", "0x8086", "0x10c9");
        tree.group(8, &["0000:02:00.0"]);
        let files = tree.files();
        let to = |driver| Change::to(&files, &"0000:02:00.0".parse().unwrap(), driver);
        let error = to(VfioDriver::RdsockVfio).unwrap_err().to_string();
        assert!(error.contains("8086:10c9"), "{error}");
        assert!(to(VfioDriver::VfioPci).unwrap().is_some());
        let none = Change::to(
            &files,
            &"0000:09:00.0".parse().unwrap(),
            VfioDriver::VfioPci,
        );
        assert!(
            none.unwrap_err()
                .to_string()
                .contains("no PCI device 0000:09:00.0")
        );
    }

    #[test]
    fn what_is_not_isolated_or_in_use_stays_where_it_is() {
        type Spoil = fn(&Tree);
        let cases: [(Spoil, &[&str]); 5] = [
            (
                |tree| tree.ungroup(ADDRESS),
                &["no IOMMU", "intel_iommu=on"],
            ),
            (
                |tree| {
                    tree.function("0000:03:00.1", "0x8086", "0x10c9");
                    tree.group(7, &["0000:03:00.1"]);
                },
                &["0000:03:00.1", "slot of its own"],
            ),
            (
                |tree| {
                    let interface = tree.part(ADDRESS, "net/eth0", "net");
                    std::fs::write(interface.join("flags"), "0x1003\n").unwrap();
                },
                &["eth0", "ip link set eth0 down"],
            ),
            (
                |tree| {
                    let disk = tree.part(ADDRESS, "nvme/nvme0/nvme0n1", "block");
                    std::fs::write(disk.join("dev"), "259:0\n").unwrap();
                    let line = "36 22 259:0 / /data rw - ext4 /dev/nvme0n1 rw\n";
                    tree.write("proc/self/mountinfo", line);
                },
                &["nvme0n1", "/data", "unmount"],
            ),
            (
                |tree| {
                    tree.bind(ADDRESS, "other-vfio-pci");
                    tree.write("dev/vfio/7", "");
                    tree.process(42, "rdsockd", "dev/vfio/7");
                },
                &["rdsockd (42)", "end these"],
            ),
        ];
        for (spoil, words) in cases {
            let tree = machine();
            spoil(&tree);
            let before = driver(&tree);
            for to in [VfioDriver::RdsockVfio, VfioDriver::VfioPci] {
                let error = refusal(&tree, to);
                let said = |word: &&str| error.contains(*word);
                assert!(error.contains(ADDRESS) && words.iter().all(said), "{error}");
            }
            assert_eq!(
                (driver(&tree), tree.driver_override(ADDRESS)),
                (before, String::new())
            );
        }
    }

    #[test]
    fn a_device_that_is_open_is_not_taken_from_its_owner() {
        let tree = machine();
        bind_to(&tree, VfioDriver::RdsockVfio).unwrap();
        tree.write("dev/vfio/7", "");
        tree.process(42, "rdsockd", "dev/vfio/7");
        let error = unbind(&tree).unwrap_err().to_string();
        assert!(error.contains("rdsockd (42)"), "{error}");
        assert_eq!(driver(&tree).as_deref(), Some("rdsock-vfio"));
    }

    #[test]
    fn a_driver_that_refuses_is_told_and_the_old_one_has_it_again() {
        let tree = machine();
        tree.takes(ADDRESS, "igb");
        tree.bind(ADDRESS, "igb");
        let count = |number| {
            let text = format!("NO_IOMMU 0\nNO_REMAPPING {number}\n");
            tree.write("sys/bus/pci/drivers/rdsock-vfio/refusals", &text);
        };
        count(3);
        tree.refuses("rdsock-vfio");
        let files = tree.files();
        let change = Change::to(&files, &address(), VfioDriver::RdsockVfio);
        let mut asked = 0;
        let error = change.unwrap().unwrap().make(&files, &mut |step| {
            if step.path.ends_with("drivers_probe") {
                asked += 1;
                count(4);
            }
            tree.store(&step.path, &step.text)
        });
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("NO_REMAPPING") && !error.contains("NO_IOMMU"),
            "{error}"
        );
        assert!(
            error.contains("igb has it") && error.contains("dmesg"),
            "{error}"
        );
        assert_eq!((asked, driver(&tree).as_deref()), (2, Some("igb")));
        assert_eq!(tree.driver_override(ADDRESS), "");
    }

    #[test]
    fn a_file_that_may_not_be_written_is_named() {
        let tree = machine();
        let files = tree.files();
        let change = Change::to(&files, &address(), VfioDriver::VfioPci);
        let denied = |_: &Step| Err(ErrorKind::PermissionDenied.into());
        let error = change.unwrap().unwrap().make(&files, &mut { denied });
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("driver_override") && error.contains("as root"),
            "{error}"
        );
    }

    #[test]
    fn the_report_says_what_is_next_and_the_way_back() {
        let tree = machine();
        tree.bind(ADDRESS, "rdsock-vfio");
        tree.write(&format!("sys/bus/pci/devices/{ADDRESS}/node_id"), "0\n");
        tree.write("dev/vfio/7", "");
        let report = report(&tree.files(), &address(), "rdsock-vfio");
        for word in [
            "is bound to rdsock-vfio",
            "dev/vfio/7",
            "next:",
            "node_id",
            "rdsock unbind 0000:03:00.0",
        ] {
            assert!(report.contains(word), "no {word}: {report}");
        }
    }
}
