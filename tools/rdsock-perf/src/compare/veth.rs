//! Two network namespaces joined by a pair of virtual Ethernet devices: made here, removed here.

use super::child::Child;
use super::ground::is_root;
use crate::error::{Error, Result};
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Names of our namespaces: prefix, pid of the comparison, then `-s` or `-c`.
const PREFIX: &str = "rdsock-perf-";
/// Longest time for one call of `ip`.
const LIMIT: Duration = Duration::from_secs(10);

/// The namespaces of one comparison; removed when dropped.
pub struct Veth {
    server: String,
    client: String,
}

impl Veth {
    /// The server's address; from the range for benchmarks (RFC 2544), and in its own namespace anyway.
    pub const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 18, 0, 1));
    /// The client's.
    pub const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 18, 0, 2));

    /// Makes the namespaces, or says why that is impossible.
    pub fn make() -> std::result::Result<Self, String> {
        if !is_root() {
            return Err("network namespaces need root".into());
        }
        remove_leftovers();
        let id = std::process::id();
        let (server, client) = (format!("{PREFIX}{id}-s"), format!("{PREFIX}{id}-c"));
        let veth = Self { server, client };
        veth.build()
            .map(|()| veth)
            .map_err(|error| format!("could not make network namespaces: {error}"))
    }

    /// Runs `ip` for each step; what was made before a failing step is removed by `drop`.
    fn build(&self) -> Result<()> {
        let (server, client) = (self.server.as_str(), self.client.as_str());
        ip(&["netns", "add", server])?;
        ip(&["netns", "add", client])?;
        ip(&[
            "-n", server, "link", "add", "perf", "type", "veth", "peer", "name", "perf", "netns",
            client,
        ])?;
        for (namespace, address) in [(server, Self::SERVER), (client, Self::CLIENT)] {
            let address = format!("{address}/30");
            ip(&["-n", namespace, "address", "add", &address, "dev", "perf"])?;
            ip(&["-n", namespace, "link", "set", "perf", "up"])?;
            ip(&["-n", namespace, "link", "set", "lo", "up"])?;
        }
        Ok(())
    }

    /// The start of a command that runs in the server's namespace.
    pub fn in_server(&self) -> Command {
        within(&self.server)
    }

    /// The start of a command that runs in the client's namespace.
    pub fn in_client(&self) -> Command {
        within(&self.client)
    }
}

impl Drop for Veth {
    fn drop(&mut self) {
        for namespace in [&self.server, &self.client] {
            delete(namespace);
        }
    }
}

/// `ip netns exec NAMESPACE`
fn within(namespace: &str) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace]);
    command
}

/// Runs `ip` with `arguments`.
fn ip(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("ip");
    command.args(arguments);
    match Child::start("ip", command)?.output(LIMIT)? {
        (true, _) => Ok(()),
        (false, said) => Err(Error::Peer(format!(
            "ip {}: {}",
            arguments.join(" "),
            said.trim()
        ))),
    }
}

/// Removes a namespace, also after Ctrl-C, when [`ip`] refuses to wait.
fn delete(namespace: &str) {
    let mut command = Command::new("ip");
    command
        .args(["netns", "delete", namespace])
        .stderr(Stdio::null());
    let Ok(mut process) = command.spawn() else {
        return;
    };
    let end = Instant::now() + LIMIT;
    while matches!(process.try_wait(), Ok(None)) {
        if Instant::now() >= end {
            let _ = process.kill();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Removes namespaces of comparisons that were killed.
fn remove_leftovers() {
    let Ok(folder) = std::fs::read_dir("/run/netns") else {
        return;
    };
    for name in folder
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
    {
        if let Some(pid) = owner(&name)
            && !std::path::Path::new("/proc").join(pid.to_string()).exists()
        {
            delete(&name);
        }
    }
}

/// The pid in the name of one of our namespaces.
fn owner(name: &str) -> Option<u32> {
    let (pid, side) = name.strip_prefix(PREFIX)?.split_once('-')?;
    matches!(side, "s" | "c").then_some(())?;
    pid.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::owner;

    #[test]
    fn only_our_namespaces_have_an_owner() {
        assert_eq!(owner("rdsock-perf-123-s"), Some(123));
        assert_eq!(owner("rdsock-perf-123-x"), None);
        assert_eq!(owner("rdsock-perf-me-s"), None);
        assert_eq!(owner("blue"), None);
    }
}
