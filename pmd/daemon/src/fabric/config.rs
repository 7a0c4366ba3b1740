//! The `[fabric]` table of the configuration: this node, its device, and the other nodes.

use ipnet::IpNet;
use rdsock_node::Idle;
use rdsock_shm::layout::{MAX_RING, ROUTES};
use rdsock_vfio::vfio::PciAddress;
use serde::{Deserialize, Deserializer, de};
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Greatest id of a node (`docs/device.md`).
const MAX_NODE: u16 = 1023;

/// The `[fabric]` table.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "Given")]
pub struct FabricConfig {
    /// This node's id.
    pub node: u16,
    /// The device.
    pub device: Device,
    /// The core of the poll core; `None` for any.
    pub cpu: Option<usize>,
    /// What a poll core does without work.
    pub idle: Idle,
    /// Bytes of each ring of a stream to another node.
    pub ring_size: u64,
    /// Streams to other nodes.
    pub max_streams: usize,
    /// How long a connect waits for the other node's answer.
    pub connect_timeout: Duration,
    /// All nodes, this one among them.
    pub nodes: Vec<NodeConfig>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Its id.
    #[serde(deserialize_with = "node_id")]
    pub id: u16,
    /// What people call it.
    #[serde(default)]
    pub name: String,
    /// Its addresses and networks.
    #[serde(deserialize_with = "networks")]
    pub addresses: Vec<IpNet>,
}

impl NodeConfig {
    /// For people.
    pub fn label(&self) -> String {
        match self.name.as_str() {
            "" => format!("node {}", self.id),
            name => format!("{name} (node {})", self.id),
        }
    }
}

/// Where the device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    /// A model in this process, which meets the models of other nodes in a directory.
    Model(PathBuf),
    /// Behind a vfio-user socket.
    VfioUser(PathBuf),
    /// A PCI device that the kernel's VFIO gives out.
    Vfio(PciAddress),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Model(directory) => write!(f, "model:{}", directory.display()),
            Device::VfioUser(socket) => write!(f, "vfio-user:{}", socket.display()),
            Device::Vfio(address) => write!(f, "vfio:{address}"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let place = match text.split_once(':') {
            Some(("model", directory)) => Device::Model(directory.into()),
            Some(("vfio-user", socket)) => Device::VfioUser(socket.into()),
            Some(("vfio", address)) => Device::Vfio(address.parse()?),
            _ => {
                return Err(format!(
                    "unknown device {text:?}: expected \"model:DIRECTORY\", \"vfio-user:SOCKET\" or \
                     \"vfio:PCI ADDRESS\""
                ));
            }
        };
        match &place {
            Device::Model(path) | Device::VfioUser(path) if !path.is_absolute() => {
                Err(format!("the path in {text:?} is not absolute"))
            }
            _ => Ok(place),
        }
    }
}

/// The table as it stands in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Given {
    #[serde(deserialize_with = "node_id")]
    node: u16,
    #[serde(deserialize_with = "device")]
    device: Device,
    #[serde(default, deserialize_with = "poll_cores")]
    poll_cores: Option<usize>,
    #[serde(default)]
    idle: Policy,
    #[serde(default = "spin")]
    spin_us: u64,
    #[serde(default = "ring", deserialize_with = "ring_size")]
    ring_size: u64,
    #[serde(default = "streams", deserialize_with = "max_streams")]
    max_streams: usize,
    #[serde(default = "timeout", deserialize_with = "connect_timeout")]
    connect_timeout_us: u64,
    nodes: Vec<NodeConfig>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Policy {
    Busy,
    #[default]
    Adaptive,
}

fn spin() -> u64 {
    50
}

fn ring() -> u64 {
    256 << 10
}

fn streams() -> usize {
    8192
}

fn timeout() -> u64 {
    1000
}

impl TryFrom<Given> for FabricConfig {
    type Error = String;

    fn try_from(given: Given) -> Result<Self, String> {
        let nodes = given.nodes;
        for (at, node) in nodes.iter().enumerate() {
            let before = nodes.get(..at).unwrap_or(&[]);
            if before.iter().any(|other| other.id == node.id) {
                return Err(format!("nodes: two have the id {}", node.id));
            }
            for other in before {
                if let Some(shared) = node.addresses.iter().find(|a| other.addresses.contains(a)) {
                    let (a, b) = (other.label(), node.label());
                    return Err(format!("nodes: {shared} belongs to {a} and to {b}"));
                }
            }
        }
        if !nodes.iter().any(|node| node.id == given.node) {
            return Err(format!(
                "nodes: none has the id {}, which `node` says is this one",
                given.node
            ));
        }
        let others = nodes.iter().filter(|node| node.id != given.node);
        let networks: usize = others.map(|node| node.addresses.len()).sum();
        if networks > ROUTES {
            return Err(format!(
                "nodes: the others have {networks} addresses and networks, expected at most {ROUTES}: \
                 give networks"
            ));
        }
        let idle = match given.idle {
            Policy::Busy => Idle::Busy,
            Policy::Adaptive => Idle::Adaptive {
                spin: Duration::from_micros(given.spin_us),
            },
        };
        Ok(FabricConfig {
            node: given.node,
            device: given.device,
            cpu: given.poll_cores,
            idle,
            ring_size: given.ring_size,
            max_streams: given.max_streams,
            connect_timeout: Duration::from_micros(given.connect_timeout_us),
            nodes,
        })
    }
}

impl FabricConfig {
    /// The other nodes.
    pub fn others(&self) -> impl Iterator<Item = &NodeConfig> {
        self.nodes.iter().filter(|node| node.id != self.node)
    }

    /// The node that an address belongs to, by the longest prefix.
    pub fn node_of(&self, address: IpAddr) -> Option<&NodeConfig> {
        let longest = |node: &NodeConfig| {
            let networks = node.addresses.iter().filter(|net| net.contains(&address));
            networks.map(|net| net.prefix_len()).max()
        };
        self.nodes
            .iter()
            .filter_map(|node| Some((longest(node)?, node)))
            .max_by_key(|(prefix, _)| *prefix)
            .map(|(_, node)| node)
    }

    /// This node's first address of the family of `peer`.
    pub fn own_address(&self, peer: IpAddr) -> Option<IpAddr> {
        let own = self.nodes.iter().find(|node| node.id == self.node)?;
        own.addresses
            .iter()
            .map(IpNet::addr)
            .find(|address| address.is_ipv4() == peer.is_ipv4())
    }
}

fn node_id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    in_range(deserializer, 1, MAX_NODE.into()).map(|id| id as u16)
}

fn in_range<'de, D: Deserializer<'de>>(from: D, least: u64, most: u64) -> Result<u64, D::Error> {
    let value = u64::deserialize(from)?;
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    let expected = format!("{value} is out of range, expected {least} to {most}");
    Err(de::Error::custom(expected))
}

fn device<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Device, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(de::Error::custom)
}

fn poll_cores<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    match *Vec::<usize>::deserialize(deserializer)? {
        [] => Ok(None),
        [cpu] => Ok(Some(cpu)),
        _ => Err(de::Error::custom(
            "more than one poll core is not possible yet, expected [] (any core) or [N]",
        )),
    }
}

fn ring_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let size = in_range(deserializer, rdsock_node::memory::STAGING, MAX_RING)?;
    match size.is_power_of_two() {
        true => Ok(size),
        false => Err(de::Error::custom("expected a power of two")),
    }
}

fn max_streams<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    in_range(deserializer, 1, 65_536).map(|streams| streams as usize)
}

fn connect_timeout<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    in_range(deserializer, 1, 10_000_000)
}

fn networks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    if texts.is_empty() {
        return Err(de::Error::custom(
            "expected at least one address or network",
        ));
    }
    texts
        .iter()
        .map(|text| {
            let parsed: Option<IpNet> = match text.contains('/') {
                true => text.parse().ok(),
                false => text.parse::<IpAddr>().ok().map(IpNet::from),
            };
            parsed.ok_or_else(|| {
                let expected = "expected an address (\"10.0.0.1\") or a network (\"fd00::/64\")";
                de::Error::custom(format!("{text:?} is neither, {expected}"))
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    const GOOD: &str = r#"
[fabric]
node = 1
device = "model:/run/rdsock/fabric"
[[fabric.nodes]]
id = 1
name = "a"
addresses = ["10.0.0.1", "fd00::1"]
[[fabric.nodes]]
id = 2
addresses = ["10.0.0.2", "10.1.0.0/16"]
[[fabric.nodes]]
id = 3
addresses = ["10.1.2.0/24"]
"#;

    #[test]
    fn an_address_belongs_to_the_node_with_the_longest_prefix() {
        let fabric = Config::parse(GOOD).unwrap().fabric.unwrap();
        let node = |address: &str| fabric.node_of(address.parse().unwrap()).map(|node| node.id);
        assert_eq!(node("10.0.0.1"), Some(1));
        assert_eq!(node("10.1.3.4"), Some(2));
        assert_eq!(node("10.1.2.4"), Some(3));
        assert_eq!(node("10.2.2.4"), None);
        let own = |peer: &str| fabric.own_address(peer.parse().unwrap());
        assert_eq!(own("10.0.0.2"), Some("10.0.0.1".parse().unwrap()));
        assert_eq!(own("fd00::9"), Some("fd00::1".parse().unwrap()));
        assert_eq!(fabric.others().count(), 2);
    }

    #[test]
    fn a_device_is_shown_as_it_is_written() {
        for text in ["model:/run/x", "vfio-user:/run/a.sock", "vfio:0000:01:00.0"] {
            assert_eq!(text.parse::<super::Device>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn errors_say_where_and_what_was_expected() {
        for (good, bad, line, said) in [
            ("node = 1\n", "node = 0\n", 3, "1 to 1023"),
            ("node = 1\n", "node = 4\n", 2, "none has the id 4"),
            ("model:/run", "rocket:/run", 4, "model:DIRECTORY"),
            ("model:/run", "model:run", 4, "not absolute"),
            ("model:/run", "vfio-user:run", 4, "not absolute"),
            (
                "model:/run/rdsock/fabric",
                "vfio:01:00.0",
                4,
                "0000:01:00.0",
            ),
            ("id = 3", "id = 2", 2, "two have the id 2"),
            (
                "\"10.0.0.2\"",
                "\"10.0.0.1\"",
                2,
                "belongs to a (node 1) and to node 2",
            ),
            ("10.1.0.0/16", "10.1.0.0/99", 11, "expected an address"),
            (
                "node = 1\n",
                "node = 1\nring_size = 99999\n",
                4,
                "power of two",
            ),
            ("node = 1\n", "node = 1\nring_size = 4096\n", 4, "65536 to"),
            (
                "node = 1\n",
                "node = 1\npoll_cores = [0, 1]\n",
                4,
                "more than one",
            ),
            ("node = 1\n", "node = 1\nidle = \"lazy\"\n", 4, "adaptive"),
            ("node = 1\n", "node = 1\nspeed = 9\n", 4, "speed"),
        ] {
            let error = Config::parse(&GOOD.replacen(good, bad, 1)).unwrap_err();
            let place = format!("line {line}");
            assert!(
                error.contains(&place) && error.contains(said),
                "{bad}: {error}"
            );
        }
    }
}
