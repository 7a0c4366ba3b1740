//! The report, as `--json` prints it. Its keys are part of the tool's interface.

use rdsock_shm::reason::State;
use serde::Serialize;

use super::explain::{Explainer, place};
use super::machine::{Absence, Machine, Socket};
use super::nodes::Nodes;
use crate::daemon::{Daemon, Record, Tenant, WhyAnswer};

/// The daemon that answered.
#[derive(Debug, Serialize)]
pub struct DaemonLine {
    /// Its control socket.
    pub socket: String,
    /// Its process.
    pub pid: i32,
}

/// A process.
#[derive(Debug, Serialize)]
pub struct ProcessLine {
    /// Its id.
    pub pid: i32,
    /// What its program is called.
    pub program: String,
    /// Known to the daemon.
    pub attached: bool,
    /// If not attached, why not.
    pub reason: Option<String>,
}

/// One end of a connection.
#[derive(Debug, Serialize)]
pub struct ConnectionLine {
    /// The process that holds it.
    pub pid: i32,
    /// What its program is called.
    pub program: String,
    /// The descriptor.
    pub fd: i32,
    /// Its own address.
    pub local: String,
    /// The other end's.
    pub peer: String,
    /// The node of the other end, if that is another one: its id.
    pub node: Option<u16>,
    /// What people call that.
    pub node_name: Option<String>,
    /// On rings, in at least one direction.
    pub accelerated: bool,
    /// One word: `kernel`, `announced`, `rings`, `demoted` or `reset`.
    pub state: &'static str,
    /// If not on rings, why not.
    pub reason: Option<String>,
    /// The stream; `None` for none.
    pub stream: Option<u64>,
    /// What it sends goes over a ring.
    pub tx_on_ring: bool,
    /// What it receives comes over a ring.
    pub rx_on_ring: bool,
    /// Position after the last byte that it sent, once on a ring.
    pub tx_bytes: u64,
    /// Position after the last byte that it took, once on a ring.
    pub rx_bytes: u64,
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The daemon that answered, if one did.
    pub daemon: Option<DaemonLine>,
    /// The processes that were asked about.
    pub processes: Vec<ProcessLine>,
    /// Their connections.
    pub connections: Vec<ConnectionLine>,
    /// Processes that keep whoever looks at them waiting: whether they are preloaded is not known.
    pub not_looked_at: Vec<i32>,
}

impl Report {
    /// Joins the daemon's answer with what the kernel shows.
    pub fn new(
        daemon: Option<&Daemon>,
        answer: Option<WhyAnswer>,
        only: Option<i32>,
        machine: &mut Machine,
    ) -> Self {
        let line = daemon
            .zip(answer.as_ref())
            .map(|(daemon, answer)| DaemonLine {
                socket: daemon.path.display().to_string(),
                pid: answer.daemon.pid,
            });
        let (mut tenants, nodes) = answer
            .map(|answer| (answer.tenants, Nodes::new(answer.nodes)))
            .unwrap_or_default();
        tenants.sort_by_key(|tenant| tenant.pid);
        let explainer = Explainer::new(line.is_some(), &tenants, &nodes);
        let mut report = Report {
            daemon: line,
            processes: Vec::new(),
            connections: Vec::new(),
            not_looked_at: Vec::new(),
        };
        for tenant in tenants
            .iter()
            .filter(|tenant| only.is_none_or(|pid| pid == tenant.pid))
        {
            report.add_tenant(tenant, &explainer, machine);
        }
        let strangers = match (only, daemon) {
            (Some(pid), _) => vec![pid],
            (None, Some(daemon)) => {
                let preloaded = machine.preloaded(&daemon.path);
                report.not_looked_at = preloaded.stuck;
                report
                    .not_looked_at
                    .retain(|pid| !explainer.is_tenant(*pid));
                preloaded.found
            }
            (None, None) => Vec::new(),
        };
        for pid in strangers {
            if !explainer.is_tenant(pid) {
                report.add_stranger(pid, only.is_some(), machine);
            }
        }
        report
    }

    /// The JSON text.
    pub fn to_json(&self) -> String {
        // Numbers, strings and lists only: that can't fail.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    fn add_tenant(&mut self, tenant: &Tenant, explainer: &Explainer<'_>, machine: &mut Machine) {
        self.processes.push(ProcessLine {
            pid: tenant.pid,
            program: tenant.program.clone(),
            attached: true,
            reason: None,
        });
        let fds: Vec<i32> = tenant.connections.iter().map(|record| record.fd).collect();
        match machine.connections(tenant.pid, &fds) {
            Some(connections) => {
                for (fd, socket) in connections {
                    let record = tenant.connections.iter().find(|record| record.fd == fd);
                    let reason = |machine: &mut Machine| {
                        explainer.tenant_connection(machine, tenant.pid, Some(&socket), record)
                    };
                    let nodes = explainer.nodes;
                    self.add_connection(
                        tenant,
                        fd,
                        (Some(&socket), record),
                        nodes,
                        machine,
                        reason,
                    );
                }
            }
            // A tenant that may not be looked at: what it says itself.
            None => {
                for record in &tenant.connections {
                    let reason = |machine: &mut Machine| {
                        explainer.tenant_connection(machine, tenant.pid, None, Some(record))
                    };
                    let (nodes, said) = (explainer.nodes, Some(record));
                    self.add_connection(tenant, record.fd, (None, said), nodes, machine, reason);
                }
            }
        }
    }

    fn add_connection(
        &mut self,
        tenant: &Tenant,
        fd: i32,
        (socket, record): (Option<&Socket>, Option<&Record>),
        nodes: &Nodes,
        machine: &mut Machine,
        reason: impl FnOnce(&mut Machine) -> String,
    ) {
        let announced = |address: fn(&Record) -> &Option<String>| {
            record
                .and_then(|record| address(record).clone())
                .unwrap_or("?".into())
        };
        let carried_to = record.and_then(|record| record.node);
        let (local, peer) = match socket {
            // To another node, the kernel's socket leads to the daemon.
            Some(socket) if carried_to.is_none() => {
                (socket.local.to_string(), socket.peer.to_string())
            }
            _ => (
                announced(|record| &record.local),
                announced(|record| &record.peer),
            ),
        };
        let node = carried_to.or_else(|| Some(nodes.of(socket?.peer.ip())?.id));
        let place = record.map(place);
        let on_ring = place
            .as_ref()
            .map_or((false, false), |place| (place.tx_on_ring, place.rx_on_ring));
        let directions = record.and_then(|record| record.directions);
        let accelerated = place.is_some_and(|place| place.accelerated);
        let state = record.and_then(|record| State::from_code(record.state));
        let stream = record.map(|record| record.stream.max(record.named_stream));
        self.connections.push(ConnectionLine {
            pid: tenant.pid,
            program: tenant.program.clone(),
            fd,
            local,
            peer,
            node,
            node_name: node.map(|node| nodes.label(node)),
            accelerated,
            state: state.unwrap_or(State::Kernel).text(),
            reason: (!accelerated).then(|| reason(machine)),
            stream: stream.filter(|stream| *stream != 0),
            tx_on_ring: on_ring.0,
            rx_on_ring: on_ring.1,
            tx_bytes: directions
                .filter(|_| on_ring.0)
                .map_or(0, |[tx, _]| tx.head),
            rx_bytes: directions
                .filter(|_| on_ring.1)
                .map_or(0, |[_, rx]| rx.tail),
        });
    }

    /// A process that the daemon does not know. Its connections are told where it was `named`, or had
    /// attached: else they are somebody's from whom it inherited them.
    fn add_stranger(&mut self, pid: i32, named: bool, machine: &mut Machine) {
        let program = machine.program(pid);
        let absence = machine.absence(pid);
        let mut why = format!("the program {absence}");
        if self.daemon.is_none() {
            why = format!("no daemon answers, and {why}");
        }
        let connections = match named || absence == Absence::LeftBehind {
            true => machine.connections(pid, &[]).unwrap_or_default(),
            false => Vec::new(),
        };
        for (fd, socket) in connections {
            self.connections.push(ConnectionLine {
                pid,
                program: program.clone(),
                fd,
                local: socket.local.to_string(),
                peer: socket.peer.to_string(),
                node: None,
                node_name: None,
                accelerated: false,
                state: State::Kernel.text(),
                reason: Some(why.clone()),
                stream: None,
                tx_on_ring: false,
                rx_on_ring: false,
                tx_bytes: 0,
                rx_bytes: 0,
            });
        }
        self.processes.push(ProcessLine {
            pid,
            program,
            attached: false,
            reason: Some(why),
        });
    }
}
