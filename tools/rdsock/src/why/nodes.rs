//! Which node an address belongs to, by the daemon's table.

use std::net::IpAddr;

use crate::daemon::Node;

/// All nodes.
#[derive(Debug, Default)]
pub struct Nodes(Vec<Node>);

impl Nodes {
    /// As the daemon told.
    pub fn new(nodes: Vec<Node>) -> Self {
        Nodes(nodes)
    }

    /// The other node that an address belongs to, by the longest prefix.
    pub fn of(&self, address: IpAddr) -> Option<&Node> {
        let longest = |node: &Node| {
            let networks = node.addresses.iter();
            networks.filter_map(|net| prefix_of(net, address)).max()
        };
        let found = self
            .0
            .iter()
            .filter_map(|node| Some((longest(node)?, node)));
        let found = found.max_by_key(|(prefix, _)| *prefix);
        found.map(|(_, node)| node).filter(|node| !node.own)
    }

    /// What people call a node, and whether it is up.
    pub fn label(&self, id: u16) -> String {
        let node = self.0.iter().find(|node| node.id == id);
        let name = node.map_or("", |node| node.name.as_str());
        let absent = match node {
            Some(node) if !node.up => ", absent",
            _ => "",
        };
        match name {
            "" => format!("node {id}{absent}"),
            name => format!("{name} (node {id}{absent})"),
        }
    }
}

/// Length of the prefix of a network, if the address is in it.
fn prefix_of(network: &str, address: IpAddr) -> Option<u32> {
    let (start, prefix) = network.split_once('/')?;
    let (start, prefix): (IpAddr, u32) = (start.parse().ok()?, prefix.parse().ok()?);
    let bits = |address| match address {
        IpAddr::V4(v4) => (u128::from(u32::from(v4)) << 96, 32),
        IpAddr::V6(v6) => (u128::from(v6), 128),
    };
    let ((start, size), (own, own_size)) = (bits(start), bits(address.to_canonical()));
    let differs = (start ^ own)
        .checked_shr(128u32.checked_sub(prefix)?)
        .unwrap_or(0);
    (size == own_size && differs == 0).then_some(prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: u16, name: &str, up: bool, addresses: &[&str]) -> Node {
        Node {
            id,
            name: name.into(),
            addresses: addresses.iter().map(|text| text.to_string()).collect(),
            own: id == 1,
            up,
        }
    }

    #[test]
    fn an_address_belongs_to_the_node_with_the_longest_prefix() {
        let nodes = Nodes::new(vec![
            node(1, "a", false, &["10.1.2.1/32"]),
            node(2, "b", true, &["10.1.0.0/16", "fd00::2/128"]),
            node(3, "", false, &["10.1.2.0/24", "0.0.0.0/0"]),
        ]);
        let of = |address: &str| nodes.of(address.parse().unwrap()).map(|node| node.id);
        assert_eq!(of("10.1.3.4"), Some(2));
        assert_eq!(of("10.1.2.4"), Some(3));
        assert_eq!(of("10.1.2.1"), None);
        assert_eq!(of("192.0.2.1"), Some(3));
        assert_eq!(of("::ffff:10.1.3.4"), Some(2));
        assert_eq!(of("fd00::2"), Some(2));
        assert_eq!(of("fd00::3"), None);
        assert_eq!(nodes.label(2), "b (node 2)");
        assert_eq!(nodes.label(3), "node 3, absent");
    }
}
