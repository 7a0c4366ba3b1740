//! What the path to other nodes needs: the device, memory for it, cores that poll.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::unistd::geteuid;
use rdsock_shm::control::question;
use serde::Deserialize;
use serde_json::Value;

use super::{Finding, Health};
use crate::daemon::Daemon;
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
        Ok(None) => vec![Finding::good(what, "none configured (docs/nodes.md)")],
        Err(error) => {
            let advice = "see rdsockd --check-config --config FILE";
            vec![Finding::new(what, Health::Weak, error, advice)]
        }
    }
}

fn read(path: &Path) -> Result<Option<Fabric>, String> {
    let in_it = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let text = fs::read_to_string(path).map_err(|error| in_it(&error))?;
    let config: Config = toml::from_str(&text).map_err(|error| in_it(&error.message()))?;
    Ok(config.fabric)
}

/// What the daemon that runs was configured with.
fn running() -> Option<Fabric> {
    let stat: Value = Daemon::find()?.ask(question::STAT).ok()?;
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
        let mut findings = vec![self.nodes(), self.device(), self.cores()];
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
            _ => Finding::good(
                what,
                format!("{}: rdsockd tells of it in its log", self.device),
            ),
        }
    }

    /// Models pin nothing.
    fn locked_memory(&self) -> Option<Finding> {
        if self.device.starts_with("model:") {
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
}
