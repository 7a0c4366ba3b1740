//! Two nodes for one measurement: a daemon each, whose models of the device are linked through a private directory.
//!
//! Where there are two network namespaces, each node is in one, with the addresses of the virtual Ethernet between
//! them. Else both are on this host's loopback.

use super::child::Child;
use super::ground::{Ground, within};
use super::veth::Veth;
use crate::error::{Doing, Error, Result};
use crate::plan::ComparePlan;
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The loopback addresses of the two nodes, where there are no namespaces.
const LOOPBACK: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 1)),
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)),
];
/// Longest time until both daemons say that the other node is up.
const START: Duration = Duration::from_secs(15);
/// Longest time for a daemon to end.
const END: Duration = Duration::from_secs(5);
/// Longest time for one call of `rdsock stat`.
const LIMIT: Duration = Duration::from_secs(10);
/// Time between two questions.
const PAUSE: Duration = Duration::from_millis(10);

/// Two running daemons: that of the server's node, then that of the client's.
pub struct Nodes {
    daemons: Vec<Child>,
    sockets: [PathBuf; 2],
    place: Place,
}

/// A folder of this user alone, removed when dropped.
struct Place(PathBuf);

impl Place {
    fn make() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let (pid, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(format!("rdsock-perf-{pid}-{count}"));
        let made = std::fs::DirBuilder::new().mode(0o700).create(&path);
        made.doing(|| format!("make the folder {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Nodes {
    /// The address at which a server on its node listens.
    pub fn server_address(veth: Option<&Veth>) -> IpAddr {
        addresses(veth)[0]
    }

    /// Starts both daemons, and waits until each knows that the other node is there.
    pub fn start(plan: &ComparePlan, ground: &Ground) -> Result<Self> {
        let (Some(rdsock), Some(rdsockd)) = (&ground.rdsock, &ground.rdsockd) else {
            unreachable!("a path that was not left out has its programs");
        };
        let place = Place::make()?;
        let sockets = ["server.sock", "client.sock"].map(|name| place.0.join(name));
        let mut nodes = Self {
            daemons: Vec::new(),
            sockets,
            place,
        };
        let cores = [plan.poll_cores.server, plan.poll_cores.client];
        let commands = within(ground.veth.as_ref(), rdsockd);
        for (at, mut command) in commands.into_iter().enumerate() {
            let folder = &nodes.place.0;
            let config = folder.join(format!("{at}.toml"));
            let text = configuration(at, cores[at], &folder.join("fabric"), ground.veth.as_ref());
            std::fs::write(&config, text).doing(|| format!("write {}", config.display()))?;
            command.arg("--config").arg(config);
            command.arg("--socket").arg(&nodes.sockets[at]);
            let name = format!("the daemon of node {}", at + 1);
            nodes.daemons.push(Child::start(&name, command)?);
        }
        nodes.wait_until_up(rdsock)?;
        Ok(nodes)
    }

    /// The daemons' sockets: the server's, then the client's.
    pub fn sockets(&self) -> &[PathBuf; 2] {
        &self.sockets
    }

    /// Ends both daemons.
    pub fn finish(self) -> Result<()> {
        for daemon in self.daemons {
            daemon.terminate(END)?;
        }
        Ok(())
    }

    fn wait_until_up(&mut self, rdsock: &Path) -> Result<()> {
        let deadline = Instant::now() + START;
        for (daemon, socket) in self.daemons.iter_mut().zip(&self.sockets) {
            while !is_up(rdsock, socket)? {
                daemon.check()?;
                if Instant::now() > deadline {
                    let seconds = START.as_secs();
                    return Err(Error::NotAccelerated(format!(
                        "a daemon did not find the other node within {seconds} s"
                    )));
                }
                std::thread::sleep(PAUSE);
            }
        }
        Ok(())
    }
}

fn addresses(veth: Option<&Veth>) -> [IpAddr; 2] {
    match veth {
        Some(_) => [Veth::SERVER, Veth::CLIENT],
        None => LOOPBACK,
    }
}

/// The configuration of a daemon: the server's (0) or the client's (1).
fn configuration(at: usize, core: usize, fabric: &Path, veth: Option<&Veth>) -> String {
    let [server, client] = addresses(veth);
    let node = at + 1;
    let fabric = fabric.display();
    format!(
        "[fabric]
node = {node}
device = \"model:{fabric}\"
poll_cores = [{core}]
connect_timeout_us = 1000000

[[fabric.nodes]]
id = 1
name = \"server\"
addresses = [\"{server}\"]

[[fabric.nodes]]
id = 2
name = \"client\"
addresses = [\"{client}\"]
"
    )
}

/// Whether a daemon says that the other node is up.
fn is_up(rdsock: &Path, socket: &Path) -> Result<bool> {
    let mut command = Command::new(rdsock);
    command
        .args(["stat", "--json"])
        .env(super::ground::SOCKET, socket);
    let (good, text) = Child::start("rdsock stat", command)?.output(LIMIT)?;
    // It fails as long as the daemon does not listen.
    let answer: Option<Value> = serde_json::from_str(&text).ok().filter(|_| good);
    let up = |answer: Value| {
        answer["fabric"]["nodes"]
            .as_array()
            .map(|nodes| nodes.iter().any(|node| node["up"] == true))
    };
    Ok(answer.and_then(up).unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_node_knows_both() {
        let text = configuration(1, 7, Path::new("/somewhere"), None);
        for line in [
            "node = 2",
            "poll_cores = [7]",
            "device = \"model:/somewhere\"",
            "addresses = [\"127.0.0.1\"]",
        ] {
            assert!(text.lines().any(|given| given == line), "{line}: {text}");
        }
    }

    #[test]
    fn a_place_is_removed() {
        let place = Place::make().unwrap();
        let path = place.0.clone();
        assert!(path.is_dir());
        drop(place);
        assert!(!path.exists());
    }
}
