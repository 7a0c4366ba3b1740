//! What the path to other nodes needs: the device, memory for it, cores that poll.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::unistd::geteuid;
use rdsock_shm::control::question;
use serde::Deserialize;
use serde_json::Value;

use super::{Finding, Health};
use crate::daemon::Daemon;
use crate::pci::{Function, IOMMU_ON, KernelFiles, MODULE, Obstacle};
use crate::show::bytes;

/// Where `make install` puts the machine's configuration.
const CONFIG: &str = "/etc/rdsock/rdsockd.toml";
/// Locked memory below which a device is soon out of it: queues and some streams.
const LOCKED: u64 = 64 << 20;

/// The part of a configuration that is looked at here; `rdsockd --check-config` checks all of it.
#[derive(Debug, Default, Deserialize)]
struct Config {
    fabric: Option<Fabric>,
}

/// The `[fabric]` table.
#[derive(Debug, Default, Deserialize)]
struct Fabric {
    node: u16,
    device: String,
    #[serde(default)]
    poll_cores: Vec<usize>,
    /// Of the other nodes, as the daemon that runs has it: id, and whether it is up.
    #[serde(skip)]
    nodes: Vec<(u64, bool)>,
    /// That daemon's device has failed.
    #[serde(skip)]
    failed: bool,
}

/// All of it: of the configuration in `config`, else of the daemon that runs, else of the machine's.
pub fn look(config: Option<&Path>) -> Vec<Finding> {
    let what = "other nodes";
    let fabric = match config {
        Some(path) => read(path),
        None => match running() {
            Some(fabric) => Ok(Some(fabric)),
            None if Path::new(CONFIG).exists() => read(Path::new(CONFIG)),
            None => Ok(None),
        },
    };
    match fabric {
        Ok(Some(fabric)) => fabric.look(),
        Ok(None) => vec![Finding::good(what, unused(&files()))],
        Err(error) => {
            let advice = "see rdsockd --check-config --config FILE";
            vec![Finding::new(what, Health::Weak, error, advice)]
        }
    }
}

fn files() -> KernelFiles {
    KernelFiles::below(Path::new("/"))
}

/// That no nodes are configured; what there would be for them.
fn unused(files: &KernelFiles) -> String {
    let mut found = String::from("none configured (docs/nodes.md)");
    let functions = Function::all(files).into_iter();
    for function in functions.filter(|function| function.is_rde) {
        let _ = write!(found, "; there is a device at {}", function.address);
    }
    found
}

fn read(path: &Path) -> Result<Option<Fabric>, String> {
    let in_it = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let text = fs::read_to_string(path).map_err(|error| in_it(&error))?;
    let config: Config = toml::from_str(&text).map_err(|error| in_it(&error.message()))?;
    Ok(config.fabric)
}

/// What the daemon that runs was configured with.
fn running() -> Option<Fabric> {
    let stat: Value = Daemon::find().ok()??.ask(question::STAT).ok()?;
    let fabric = stat.get("fabric").filter(|fabric| !fabric.is_null())?;
    let list = |key: &str| fabric[key].as_array().cloned().unwrap_or_default();
    let cpus = list("cores").into_iter();
    let nodes = list("nodes").into_iter();
    Some(Fabric {
        node: fabric["node"].as_u64()? as u16,
        device: fabric["device"].as_str()?.into(),
        poll_cores: cpus
            .filter_map(|core| Some(core["cpu"].as_u64()? as usize))
            .collect(),
        nodes: nodes
            .filter_map(|node| Some((node["id"].as_u64()?, node["up"] == true)))
            .collect(),
        failed: fabric["failed"] == true,
    })
}

impl Fabric {
    fn look(&self) -> Vec<Finding> {
        let mut findings = vec![self.nodes(), self.device()];
        if let Some(("vfio", address)) = self.device.split_once(':') {
            findings.extend(isolation(&files(), address));
        }
        findings.push(self.cores());
        findings.extend(self.locked_memory());
        findings.push(self.huge_pages());
        findings
    }

    fn nodes(&self) -> Finding {
        let what = "other nodes";
        let absent: Vec<String> = (self.nodes.iter())
            .filter(|(_, up)| !up)
            .map(|(id, _)| id.to_string())
            .collect();
        let found = format!("this is node {}", self.node);
        if self.nodes.is_empty() {
            return Finding::good(what, format!("{found}; no daemon that knows more runs"));
        }
        if absent.is_empty() {
            return Finding::good(what, format!("{found}, {} others are up", self.nodes.len()));
        }
        Finding::new(
            what,
            Health::Weak,
            format!("{found}; absent: {}", absent.join(", ")),
            "connections to these stay on the kernel: does rdsockd run there, with the same table of \
             nodes, and does its log say that it has joined?",
        )
    }

    fn device(&self) -> Finding {
        let what = "device";
        if self.failed {
            let advice =
                "new connections stay on the kernel: see the log of rdsockd, and restart it";
            return Finding::new(
                what,
                Health::Weak,
                format!("{} has failed", self.device),
                advice,
            );
        }
        match self.device.split_once(':') {
            _ if !self.nodes.is_empty() => Finding::good(what, format!("{}, in use", self.device)),
            Some(("model", directory)) => model(Path::new(directory)),
            Some(("vfio-user", socket)) => served(Path::new(socket)),
            Some(("vfio", address)) => pci(&files(), address),
            _ => Finding::good(
                what,
                format!("{}: rdsockd tells of it in its log", self.device),
            ),
        }
    }

    /// Only the kernel's VFIO locks memory.
    fn locked_memory(&self) -> Option<Finding> {
        if !self.device.starts_with("vfio:") {
            return None;
        }
        let what = "locked memory for the device";
        let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap_or((0, 0));
        Some(match soft {
            RLIM_INFINITY => Finding::good(what, "unlimited"),
            soft if soft < LOCKED => Finding::new(
                what,
                Health::Weak,
                bytes(soft),
                "the queues and every stream to another node are locked: LimitMEMLOCK=infinity in the unit of \
                 rdsockd, or ulimit -l",
            ),
            soft => Finding::good(what, bytes(soft)),
        })
    }

    /// The queues of each poll core fit one.
    fn huge_pages(&self) -> Finding {
        let what = "huge pages for queues";
        let needed = self.poll_cores.len().max(1) as u64;
        let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
        let free = fs::read_to_string(path).ok();
        let free: u64 = free.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        // A daemon that runs has taken what it wanted.
        if free >= needed || !self.nodes.is_empty() {
            return Finding::good(what, format!("{free} free, {needed} wanted at the start"));
        }
        Finding::new(
            what,
            Health::Weak,
            format!("{free} free, {needed} wanted at the start"),
            "ordinary pages are used, which the device translates more often: sysctl vm.nr_hugepages=N",
        )
    }

    fn cores(&self) -> Finding {
        let what = "poll cores";
        if self.poll_cores.is_empty() {
            return Finding::good(what, "one, on any core (poll_cores = [N] pins it)");
        }
        let list = |name: &str| {
            let path = format!("/sys/devices/system/cpu/{name}");
            cpu_list(&fs::read_to_string(path).unwrap_or_default())
        };
        let (online, isolated) = (list("online"), list("isolated"));
        let without = |set: &BTreeSet<usize>| {
            let missing = self.poll_cores.iter().filter(|cpu| !set.contains(cpu));
            missing.map(usize::to_string).collect::<Vec<_>>().join(",")
        };
        let found = format!("{:?}", self.poll_cores);
        let offline = without(&online);
        if !offline.is_empty() {
            let advice = format!("rdsockd can't start: this machine has no core {offline}");
            return Finding::new(what, Health::Weak, found, &advice);
        }
        let shared = without(&isolated);
        if shared.is_empty() {
            return Finding::good(what, format!("{found}, isolated"));
        }
        let advice = format!(
            "other programs run on {shared} too, which delays by milliseconds now and then: boot with \
             isolcpus={shared} nohz_full={shared}, or keep them off with cpusets"
        );
        Finding::new(
            what,
            Health::Weak,
            format!("{found}, not isolated"),
            &advice,
        )
    }
}

/// A directory in which models meet.
fn model(directory: &Path) -> Finding {
    let what = "device";
    let found = format!("a model that meets others in {}", directory.display());
    let advice = format!(
        "who can enter it can write into the memory of every node: mkdir -m 700 {}, as the user of rdsockd",
        directory.display()
    );
    let user = geteuid().as_raw();
    let wrong = match fs::symlink_metadata(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Finding::good(what, format!("{found}, which rdsockd makes"));
        }
        Err(error) => error.to_string(),
        Ok(metadata) if !metadata.is_dir() => "it is no directory".into(),
        Ok(metadata) if metadata.mode() & 0o077 != 0 => {
            format!("its mode is {:o}, not 700", metadata.mode() & 0o777)
        }
        Ok(metadata) if metadata.uid() != user => {
            format!("it belongs to user {}, this one is {user}", metadata.uid())
        }
        Ok(_) => return Finding::good(what, found),
    };
    Finding::new(what, Health::Weak, format!("{found}: {wrong}"), &advice)
}

/// A socket where a device is served.
fn served(socket: &Path) -> Finding {
    let what = "device";
    let found = format!("one that is served at {}", socket.display());
    match fs::metadata(socket) {
        Ok(metadata) if metadata.file_type().is_socket() => Finding::good(what, found),
        Ok(_) => Finding::new(
            what,
            Health::Weak,
            format!("{found}: it is no socket"),
            SERVE,
        ),
        Err(error) => Finding::new(what, Health::Weak, format!("{found}: {error}"), SERVE),
    }
}

const SERVE: &str = "start who serves it before rdsockd: rdsock-model --node ID=SOCKET";

/// A PCI device, by its address.
fn pci(files: &KernelFiles, address: &str) -> Finding {
    let what = "device";
    let found = format!("PCI device {address}");
    let weak = |wrong: &str, advice: &str| {
        Finding::new(what, Health::Weak, format!("{found}: {wrong}"), advice)
    };
    let function = match address.parse() {
        Ok(address) => Function::read(files, &address),
        Err(error) => return weak("it is no PCI address", &error),
    };
    let Some(function) = function else {
        return weak("there is none", "rdsock devices, or lspci -D, lists them");
    };
    if function.obstacles.is_empty() {
        let group = function.iommu_group.unwrap_or_default();
        return Finding::good(what, format!("{found}, alone in IOMMU group {group}"));
    }
    let obstacles = function.obstacles.iter().map(ToString::to_string);
    let advice = function.obstacles.iter().map(Obstacle::advice);
    weak(
        &obstacles.collect::<Vec<_>>().join("; "),
        &advice.collect::<Vec<_>>().join("; "),
    )
}

/// What must stand between a PCI device and the rest of the machine.
fn isolation(files: &KernelFiles, address: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let what = "IOMMU";
    findings.push(match files.has_iommu() {
        true => Finding::good(what, "on"),
        false => Finding::new(what, Health::Weak, "off", IOMMU_ON),
    });
    let what = "interrupt remapping";
    findings.push(match files.remaps_interrupts() {
        Some(true) => Finding::good(what, "on"),
        Some(false) => Finding::new(
            what,
            Health::Weak,
            "off",
            "without it a device can raise any interrupt, so VFIO refuses it: turn it on in the firmware (with \
             x2APIC, on Intel), and take intremap=off from the kernel's command line",
        ),
        None => Finding::good(what, "this kernel does not tell"),
    });
    let what = "management page";
    let driver = address.parse().ok();
    let driver = driver.and_then(|address| Function::read(files, &address)?.driver);
    let load = if files.has_driver(MODULE) {
        "the module is loaded"
    } else {
        "the module is not loaded"
    };
    findings.push(match driver.as_deref() {
        Some(MODULE) => Finding::good(what, format!("kept by the kernel module {MODULE}")),
        _ => Finding::new(
            what,
            Health::Weak,
            format!("nothing protects it ({load})"),
            "whoever opens the device can make itself any node: modprobe rdsock-vfio (kmod-minimal/README.md), then \
             rdsock bind BDF",
        ),
    });
    findings
}

/// The numbers of a list such as `0-3,7`.
fn cpu_list(text: &str) -> BTreeSet<usize> {
    let ranges = text.trim().split(',');
    let numbers = ranges.filter_map(|range| {
        let (from, to) = range.split_once('-').unwrap_or((range, range));
        Some(from.parse().ok()?..=to.parse().ok()?)
    });
    numbers.flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::tree::Tree;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn lists_of_cores_are_understood() {
        let list = |text| cpu_list(text).into_iter().collect::<Vec<_>>();
        assert_eq!(list("0-3,7\n"), [0, 1, 2, 3, 7]);
        assert_eq!(list("5"), [5]);
        assert!(list("\n").is_empty());
    }

    #[test]
    fn a_directory_that_others_can_enter_is_found_out() {
        let dir = tempfile::tempdir().unwrap();
        let of = |mode| {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
            model(dir.path())
        };
        assert_eq!(of(0o700).health, Health::Good);
        let open = of(0o755);
        assert_eq!(open.health, Health::Weak);
        assert!(open.found.contains("755") && open.advice.unwrap().contains("mkdir -m 700"));
        assert_eq!(model(&dir.path().join("none")).health, Health::Good);
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(model(file.path()).health, Health::Weak);
    }

    #[test]
    fn a_socket_where_nobody_serves_is_found_out() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("a.sock");
        assert_eq!(served(&socket).health, Health::Weak);
        let _serves = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(served(&socket).health, Health::Good);
    }

    #[test]
    fn a_pci_device_needs_its_driver_and_an_iommu() {
        let tree = Tree::new();
        let address = "0000:01:00.0";
        let wrong = || pci(&tree.files(), address).found;
        assert!(pci(&tree.files(), "1:0").found.contains("no PCI address"));
        assert!(wrong().contains("there is none"));
        tree.rde(address);
        assert!(wrong().contains("no driver has it") && wrong().contains("no IOMMU"));
        tree.bind(address, "nvme");
        assert!(wrong().contains("nvme has it"));
        let bind = pci(&tree.files(), address).advice.unwrap();
        assert!(bind.contains("rdsock bind 0000:01:00.0"), "{bind}");
        tree.bind(address, "rdsock-vfio");
        tree.group(7, &[address]);
        assert!(wrong().contains("/dev/vfio"));
        tree.write("dev/vfio/7", "");
        let good = pci(&tree.files(), address);
        assert_eq!(good.health, Health::Good, "{good:?}");
        assert!(good.found.contains("alone in IOMMU group 7"), "{good:?}");
    }

    #[test]
    fn what_isolates_a_pci_device_is_told() {
        let tree = Tree::new();
        let address = "0000:01:00.0";
        let health = || {
            let findings = isolation(&tree.files(), address);
            findings
                .iter()
                .map(|found| found.health)
                .collect::<Vec<_>>()
        };
        tree.rde(address);
        tree.write("proc/interrupts", " 9: 1 IO-APIC 9-fasteoi acpi\n");
        assert_eq!(health(), [Health::Weak; 3]);
        tree.write("proc/interrupts", " 9: 1 IR-IO-APIC 9-fasteoi acpi\n");
        tree.group(7, &[address]);
        tree.bind(address, "rdsock-vfio");
        assert_eq!(health(), [Health::Good; 3]);
        tree.bind(address, "vfio-pci");
        let findings = isolation(&tree.files(), address);
        assert!(
            findings[2].found.contains("module is loaded"),
            "{findings:?}"
        );
    }

    #[test]
    fn a_device_that_nobody_uses_is_mentioned() {
        let tree = Tree::new();
        assert_eq!(unused(&tree.files()), "none configured (docs/nodes.md)");
        tree.rde("0000:01:00.0");
        tree.function("0000:02:00.0", "0x8086", "0x10c9");
        let found = unused(&tree.files());
        assert!(found.ends_with("a device at 0000:01:00.0"), "{found}");
    }
}
