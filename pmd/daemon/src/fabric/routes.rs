//! The networks of other nodes, as tenants see them.

use super::octets;
use crate::config::Config;
use crate::daemon::Daemon;
use crate::memory::TenantMap;
use rdsock_shm::routes::Network;
use std::net::IpAddr;
use tracing::warn;

impl Daemon {
    /// Writes the networks of other nodes into a tenant's memory.
    pub(crate) fn tell_routes(&self, map: &TenantMap) {
        if self.fabric.is_none() {
            return;
        }
        map.routes().set(&self.networks());
    }

    pub(crate) fn tell_all_routes(&self) {
        for connection in self.connections.values() {
            if let Some(tenant) = &connection.tenant {
                self.tell_routes(&tenant.map);
            }
        }
    }

    /// Most specific first.
    fn networks(&self) -> Vec<Network> {
        let others = self.config.fabric.iter().flat_map(|fabric| fabric.others());
        let mut networks: Vec<Network> = others
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

    /// Of the fabric, a running daemon follows new addresses of the nodes that it knows; everything else
    /// stays as it was.
    pub(crate) fn reload_fabric(&self, config: &mut Config) {
        let (Some(old), Some(new)) = (&self.config.fabric, &config.fabric) else {
            if self.config.fabric.is_some() || config.fabric.is_some() {
                warn!("[fabric] comes and goes with a restart only");
                config.fabric.clone_from(&self.config.fabric);
            }
            return;
        };
        let ids = |nodes: &[super::config::NodeConfig]| {
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
        config.fabric = Some(kept);
    }
}
