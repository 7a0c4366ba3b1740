//! A program connects to an address of another node.

use super::{Asking, addresses, octets};
use crate::book::TenantId;
use crate::connections::End;
use crate::daemon::Daemon;
use rdsock_node::{Command, Opening};
use rdsock_proto::{Addresses, Refusal};
use rdsock_shm::control::{Between, Message, Reached, kind};
use rdsock_shm::reason::Reason;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use tracing::debug;

impl Daemon {
    /// A tenant asks whether a connect may go over the fabric.
    pub(crate) fn on_reach(&mut self, id: TenantId, question: Between) -> Result<(), End> {
        self.counters.reaches += 1;
        match self.try_reach(id, &question) {
            Ok(ticket) => {
                if let Some(fabric) = &mut self.fabric {
                    let tenant = id;
                    fabric.asking.insert(ticket, Asking { tenant, question });
                }
                Ok(())
            }
            Err(reason) => {
                debug!(tenant = id, "not over the fabric: {}", reason.text());
                self.decline(id, &question, reason);
                Ok(())
            }
        }
    }

    fn try_reach(&mut self, id: TenantId, question: &Between) -> Result<u64, Reason> {
        let (Some(fabric), Some(config)) = (&self.fabric, &self.config.fabric) else {
            return Err(Reason::NoDevice);
        };
        let (local, peer) = addresses(question).ok_or(Reason::Unverified)?;
        let uid = self
            .connections
            .get(&id)
            .map(|connection| connection.peer.uid);
        let uid = uid.ok_or(Reason::Unverified)?;
        if fabric.failed {
            return Err(Reason::NoDevice);
        }
        if !self.namespaces.is_home(question.netns) {
            return Err(Reason::OtherNamespace);
        }
        if !self.config.policy.allows_ports(local.port(), peer.port()) {
            return Err(Reason::Policy);
        }
        let node = config.node_of(peer.ip()).map(|node| node.id);
        let node = node.filter(|node| *node != config.node && fabric.poller.is_up(*node));
        let node = node.ok_or(Reason::NodeAbsent)?;
        let source = if local.ip().is_unspecified() {
            config.own_address(peer.ip()).ok_or(Reason::NodeAbsent)?
        } else {
            local.ip()
        };
        let mapped = |ip: IpAddr| Ipv6Addr::from(octets(ip));
        let addresses = Addresses {
            source: mapped(source),
            source_port: local.port(),
            destination: mapped(peer.ip()),
            destination_port: peer.port(),
        };
        let ticket = self
            .carry(node, Opening::Connect, &addresses, uid)
            .map_err(|error| {
                debug!(tenant = id, "no stream: {error}");
                Reason::Limit
            })?;
        let Some(fabric) = &mut self.fabric else {
            return Err(Reason::NoDevice);
        };
        if let Some(carried) = fabric.carried.get(&ticket) {
            let stream = carried.stream.clone();
            fabric
                .poller
                .command(Command::Connect { stream, addresses });
        }
        Ok(ticket)
    }

    fn decline(&mut self, id: TenantId, question: &Between, reason: Reason) {
        self.counters.not_reached += 1;
        let answer = Reached {
            question: question.question,
            ticket: 0,
            anchor: [0; 16],
            local: [0; 16],
            anchor_port: 0,
            reason: reason as u32,
        };
        self.reply(id, Message::new(kind::REACHED, &answer));
    }

    /// The other node has accepted: the program may make its anchor.
    pub(super) fn on_established(&mut self, ticket: u64) {
        let Some(fabric) = &mut self.fabric else {
            return;
        };
        let (Some(asking), Some(carried)) =
            (fabric.asking.remove(&ticket), fabric.carried.get(&ticket))
        else {
            return;
        };
        let source = carried.source;
        let listener = fabric
            .listeners
            .iter()
            .filter_map(|listener| listener.local_addr().ok())
            .find(|address| address.is_ipv4() == source.is_ipv4());
        let Some((listener, (local, _))) = listener.zip(addresses(&asking.question)) else {
            self.abandon_carried(ticket);
            return self.decline(asking.tenant, &asking.question, Reason::NoDevice);
        };
        // From where the kernel will connect the program's socket.
        let from = match local.ip() {
            ip if !ip.is_unspecified() => ip,
            _ if listener.is_ipv4() => IpAddr::V4(Ipv4Addr::LOCALHOST),
            _ => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        let from = SocketAddr::new(from, local.port());
        fabric.expected.insert(from, ticket);
        let answer = Reached {
            question: asking.question.question,
            ticket,
            anchor: octets(listener.ip()),
            local: octets(source.ip()),
            anchor_port: listener.port().into(),
            reason: 0,
        };
        self.counters.reached += 1;
        self.give_time_for_anchor(ticket);
        self.reply(asking.tenant, Message::new(kind::REACHED, &answer));
    }

    /// The other node has not accepted.
    pub(super) fn on_refused(&mut self, ticket: u64, why: Refusal) {
        let asking = self
            .fabric
            .as_mut()
            .and_then(|fabric| fabric.asking.remove(&ticket));
        if let Some(asking) = asking {
            let reason = match why {
                Refusal::NoListener => Reason::NoListener,
                Refusal::Limit | Refusal::Policy => Reason::NodeRefused,
                Refusal::Timeout | Refusal::Lost => Reason::NodeAbsent,
            };
            debug!(tenant = asking.tenant, ?why, "not over the fabric");
            self.decline(asking.tenant, &asking.question, reason);
        }
    }

    /// A program has made its anchor.
    pub(crate) fn on_anchors(&mut self, listener: usize) {
        loop {
            let Some(fabric) = &mut self.fabric else {
                return;
            };
            let Some(listener) = fabric.listeners.get(listener) else {
                return;
            };
            let Ok((socket, from)) = listener.accept() else {
                return;
            };
            let Ok(to) = socket.local_addr() else {
                continue;
            };
            match fabric.expected.remove(&from) {
                // As the program's socket has them.
                Some(ticket) => self.attach_anchor(ticket, socket.into(), (from, to)),
                None => {
                    self.counters.stray += 1;
                    debug!(%from, "a connection to the anchors' port that nobody asked for");
                }
            }
        }
    }
}
