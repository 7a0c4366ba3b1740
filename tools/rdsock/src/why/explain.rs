//! From what a tenant says and the kernel shows to one sentence: why a connection is where it is.

use std::collections::HashMap;

use rdsock_shm::layout::mark;
use rdsock_shm::reason::{Reason, State};

use super::machine::{Machine, Socket};
use crate::daemon::{Direction, Record, Tenant};

/// Where a connection's bytes travel.
#[derive(Debug, PartialEq, Eq)]
pub struct Place {
    /// On rings, in at least one direction.
    pub accelerated: bool,
    /// What it sends goes over a ring.
    pub tx_on_ring: bool,
    /// What it receives comes over a ring.
    pub rx_on_ring: bool,
}

/// Judges a record by the stream's own words.
pub fn place(record: &Record) -> Place {
    let rings = record.state == State::Rings as u32;
    let on_ring =
        |direction: &Direction| rings && direction.switched && direction.mark & mark::END == 0;
    let (tx_on_ring, rx_on_ring, demoted) = match &record.directions {
        Some([tx, rx]) => {
            let demoted = [tx, rx]
                .iter()
                .any(|direction| direction.mark & mark::END != 0);
            (on_ring(tx), on_ring(rx), demoted)
        }
        // A stream that an earlier daemon made lives on; only its ends know more.
        None => {
            let earlier = rings && record.named_stream != 0;
            (earlier, earlier, false)
        }
    };
    Place {
        accelerated: (tx_on_ring || rx_on_ring) && !demoted,
        tx_on_ring,
        rx_on_ring,
    }
}

/// Explains connections that are not on rings.
#[derive(Debug)]
pub struct Explainer<'a> {
    daemon_runs: bool,
    tenants: HashMap<i32, &'a Tenant>,
}

impl<'a> Explainer<'a> {
    /// With the tenants that the daemon told of.
    pub fn new(daemon_runs: bool, tenants: &'a [Tenant]) -> Self {
        Explainer {
            daemon_runs,
            tenants: tenants.iter().map(|tenant| (tenant.pid, tenant)).collect(),
        }
    }

    /// Is this process attached?
    pub fn is_tenant(&self, pid: i32) -> bool {
        self.tenants.contains_key(&pid)
    }

    /// Why a connection of a tenant is not on rings.
    pub fn tenant_connection(
        &self,
        machine: &mut Machine,
        pid: i32,
        socket: Option<&Socket>,
        record: Option<&Record>,
    ) -> String {
        let state = record.map_or(State::Kernel as u32, |record| record.state);
        let said = record.and_then(|record| Reason::from_code(record.reason));
        if state == State::Rings as u32 {
            return "on rings with the next send: no byte was sent since the stream was made"
                .into();
        }
        let open = matches!(
            said,
            None | Some(Reason::None | Reason::Young | Reason::PeerUnknown | Reason::NoDaemon)
        );
        if state == State::Demoted as u32 || state == State::Reset as u32 || !open {
            return said.unwrap_or(Reason::None).text().into();
        }
        if let Some(reason) = socket.and_then(|socket| self.other_end(machine, pid, socket)) {
            return reason;
        }
        match said {
            Some(Reason::NoDaemon) if self.daemon_runs => {
                "it found no daemon when it was used last; a daemon runs now".into()
            }
            Some(reason @ (Reason::PeerUnknown | Reason::NoDaemon)) => reason.text().into(),
            _ => Reason::Young.text().into(),
        }
    }

    /// What the other end has to do with it; `None` when nothing speaks against rings.
    fn other_end(&self, machine: &mut Machine, pid: i32, socket: &Socket) -> Option<String> {
        let netns = machine.netns(pid)?;
        if let Some(inode) = machine.other_end(netns, pid, socket) {
            let holders = machine.holders(inode).to_vec();
            if holders.is_empty() {
                return Some("the other end is held by a process that may not be looked at".into());
            }
            if let Some(tenant) = holders.iter().find_map(|pid| self.tenants.get(pid)) {
                return self.attached_other_end(tenant, machine, inode);
            }
            let names: Vec<String> = holders
                .iter()
                .map(|pid| format!("pid {pid} {}", machine.program(*pid)))
                .collect();
            let absence = machine.absence(*holders.first()?);
            return Some(format!("the other end ({}) {absence}", names.join(", ")));
        }
        if let Some(inode) = machine.other_end_elsewhere(netns, socket) {
            let holder = machine.holders(inode).first().copied();
            let name = holder.map(|pid| format!(" (pid {pid} {})", machine.program(pid)));
            let name = name.unwrap_or_default();
            return Some(format!(
                "the other end{name} is in another network namespace"
            ));
        }
        Some(if machine.is_own_address(socket.peer.ip()) {
            "the other end is closed, or in a network namespace that may not be looked into".into()
        } else {
            "the other end is on another host".into()
        })
    }

    /// The other end is a tenant, too: what does it say?
    fn attached_other_end(
        &self,
        tenant: &Tenant,
        machine: &mut Machine,
        inode: u64,
    ) -> Option<String> {
        let fds: Vec<i32> = tenant.connections.iter().map(|record| record.fd).collect();
        let connections = machine.connections(tenant.pid, &fds)?;
        let (fd, _) = connections
            .iter()
            .find(|(_, socket)| socket.inode == inode)?;
        let record = tenant.connections.iter().find(|record| record.fd == *fd);
        let name = format!("the other end (pid {} {})", tenant.pid, tenant.program);
        let text = match record.and_then(|record| Reason::from_code(record.reason)) {
            // It waits for us: then the reason is ours.
            Some(Reason::PeerUnknown) => return None,
            None | Some(Reason::None | Reason::Young) => "has made too few calls yet",
            Some(reason) => reason.text(),
        };
        Some(format!("{name}: {text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(state: State, directions: Option<[Direction; 2]>) -> Record {
        Record {
            fd: 3,
            state: state as u32,
            reason: 0,
            stream: 1,
            named_stream: 1,
            local: None,
            peer: None,
            node: None,
            directions,
        }
    }

    fn direction(switched: bool, mark: u32) -> Direction {
        Direction {
            switched,
            head: 0,
            tail: 0,
            mark,
        }
    }

    #[test]
    fn one_direction_on_its_ring_is_enough() {
        let (on, off) = (direction(true, 0), direction(false, 0));
        let place_of = |state, a, b| place(&record(state, Some([a, b])));
        assert!(place_of(State::Rings, on, off).accelerated);
        assert!(place_of(State::Rings, off, on).rx_on_ring);
        assert!(!place_of(State::Rings, off, off).accelerated);
        assert!(!place_of(State::Demoted, on, on).accelerated);
        let ended = direction(true, mark::END);
        assert!(!place_of(State::Rings, on, ended).accelerated);
        let finished = direction(true, mark::FIN);
        assert!(place_of(State::Rings, on, finished).accelerated);
    }

    #[test]
    fn a_stream_of_an_earlier_daemon_is_believed() {
        assert!(place(&record(State::Rings, None)).accelerated);
        assert!(!place(&record(State::Announced, None)).accelerated);
    }
}
