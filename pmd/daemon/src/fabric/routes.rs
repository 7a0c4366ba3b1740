//! The networks of other nodes, as tenants see them, and what of the table `[fabric]` a running daemon follows.

use super::config::{FabricConfig, NodeConfig};
use super::octets;
use rdsock_shm::routes::Network;
use std::net::IpAddr;
use tracing::warn;

impl FabricConfig {
    /// The networks of the other nodes, most specific first.
    pub fn networks(&self) -> Vec<Network> {
        let mut networks: Vec<Network> = self
            .others()
            .flat_map(|node| node.addresses.iter().map(|net| (node.id, net)))
            .map(|(node, net)| Network {
                address: octets(net.network()),
                prefix: match net.addr() {
                    IpAddr::V4(_) => 96 + u32::from(net.prefix_len()),
                    IpAddr::V6(_) => net.prefix_len().into(),
                },
                node: node.into(),
            })
            .collect();
        networks.sort_by_key(|network| std::cmp::Reverse(network.prefix));
        networks
    }
}

/// What counts when the table was `old` and is `new` now: a running daemon follows new addresses of the nodes that it
/// knows; everything else stays as it was.
pub fn follow(old: Option<&FabricConfig>, new: Option<FabricConfig>) -> Option<FabricConfig> {
    let (Some(old), Some(new)) = (old, &new) else {
        if old.is_some() || new.is_some() {
            warn!("[fabric] comes and goes with a restart only");
        }
        return old.cloned();
    };
    let ids = |nodes: &[NodeConfig]| {
        let mut ids: Vec<u16> = nodes.iter().map(|node| node.id).collect();
        ids.sort_unstable();
        ids
    };
    let mut kept = old.clone();
    if ids(&old.nodes) == ids(&new.nodes) && old.node == new.node {
        kept.nodes.clone_from(&new.nodes);
    }
    if kept != *new {
        warn!("of [fabric], only the nodes' names and addresses change without a restart");
    }
    Some(kept)
}
