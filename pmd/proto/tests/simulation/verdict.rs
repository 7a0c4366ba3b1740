//! What must hold at the end of a run.

use super::program::Outcome;
use super::world::World;
use rdsock_proto::{Count, NodeId};

impl World {
    pub(super) fn is_over(&self) -> bool {
        self.hosts
            .iter()
            .all(|host| host.node.streams() == 0 && host.ends.is_empty())
    }

    pub(super) fn describe(&self) -> String {
        let mut text = String::new();
        for (index, host) in self.hosts.iter().enumerate() {
            text += &format!("\nnode {index}: {} streams", host.node.streams());
            for peer in 0..self.hosts.len() {
                let counters = host.node.counters(NodeId(peer as u16)).unwrap();
                for count in Count::ALL.iter().filter(|count| counters.get(**count) != 0) {
                    text += &format!(
                        "\n  of node {peer}: {} {}",
                        counters.get(*count),
                        count.text()
                    );
                }
            }
            for end in host.ends.values() {
                text += &format!(
                    "\n  connection {} side {} with {:?}: head {} of {}, credit {}, read {} of {:?}, \
                     closed {}, established {}, progress {:?}",
                    end.connection,
                    end.side,
                    end.peer,
                    end.head,
                    end.total,
                    end.credit,
                    end.consumed,
                    end.peer_end,
                    end.closed,
                    end.established,
                    host.node.progress(end.id)
                );
            }
        }
        text
    }

    /// Nothing leaks, and each connection ended as TCP may end.
    pub(super) fn judge(&self) {
        for (index, connection) in self.connections.iter().enumerate() {
            let [a, b] = &connection.sides;
            for (reader, writer) in [(a, b), (b, a)] {
                if reader.outcome == Some(Outcome::Eof)
                    && self.honest(reader.host)
                    && self.honest(writer.host)
                {
                    assert!(writer.shut, "connection {index}: an end that nobody wrote");
                    assert_eq!(
                        reader.read, writer.written,
                        "connection {index}: a false end"
                    );
                }
            }
            let established = b.outcome.is_some() && a.outcome != Some(Outcome::Refused);
            if established && !connection.excused {
                let both = (a.outcome, b.outcome);
                assert_eq!(
                    both,
                    (Some(Outcome::Eof), Some(Outcome::Eof)),
                    "connection {index}: {connection:?}"
                );
            }
        }
        for (index, memory) in self.fabric.memory.iter().enumerate() {
            assert!(
                memory.regions.is_empty() && memory.sources.is_empty(),
                "node {index} keeps memory"
            );
        }
        if self.fabric.liar.is_none() {
            self.judge_counters();
        }
    }

    /// Honest nodes break no rule.
    pub(super) fn judge_counters(&self) {
        let excused = [
            Count::StaleSession,
            Count::SessionLost,
            Count::PeerRestarted,
            Count::NoRoom,
        ];
        let restarts =
            self.faults.workers != 0 || self.faults.nodes != 0 || self.faults.long_cuts != 0;
        for host in &self.hosts {
            for peer in 0..self.hosts.len() {
                let counters = host.node.counters(NodeId(peer as u16)).unwrap();
                for count in Count::ALL.iter().filter(|count| !excused.contains(count)) {
                    let refused = *count == Count::AccessRefused && restarts;
                    // A restarted worker may have forgotten that it had left a stream.
                    let forgot = *count == Count::UnknownStream && self.faults.workers != 0;
                    assert!(
                        refused || forgot || counters.get(*count) == 0,
                        "{count:?} without a liar"
                    );
                }
            }
        }
    }
}
