//! What goes wrong in a run: links, workers, nodes.

use super::program::{Outcome, Side};
use super::world::{US, World};
use rdsock_proto::{Node, NodeId, Positions};

impl World {
    pub(super) fn fault(&mut self) {
        let nodes = self.hosts.len() as u64;
        for (once_in, most) in [
            (self.faults.short_cuts, 1000 * US),
            (self.faults.long_cuts, 30_000 * US),
        ] {
            if self.rng.once_in(once_in) {
                let (a, b) = (
                    self.rng.below(nodes) as usize,
                    self.rng.below(nodes) as usize,
                );
                let until = self.now + self.rng.below(most);
                self.fabric.pipe(a, b).down_until = until;
                self.fabric.pipe(b, a).down_until = until;
                if most > self.config.resume_timeout {
                    self.excuse(|sides| {
                        [a, b].contains(&sides[0].host) && [a, b].contains(&sides[1].host)
                    });
                }
            }
        }
        let node = self.rng.below(nodes) as usize;
        if self.rng.once_in(self.faults.workers) {
            self.restart_worker(node);
        }
        if self.rng.once_in(self.faults.nodes) {
            self.restart_node(node);
        }
    }

    pub(super) fn excuse(&mut self, which: impl Fn(&[Side; 2]) -> bool) {
        for connection in &mut self.connections {
            connection.excused |= which(&connection.sides);
        }
    }

    /// The daemon's worker dies and is started again; shared memory and keys outlive it.
    pub(super) fn restart_worker(&mut self, index: usize) {
        self.fabric.reset(&mut self.rng, index);
        let seed = self.rng.next();
        let host = &mut self.hosts[index];
        host.node = Node::new(NodeId(index as u16), host.epoch, seed, self.config.clone());
        host.offers.clear();
        host.blocked.clear();
        let memory = &mut self.fabric.memory[index];
        for (id, mut end) in std::mem::take(&mut host.ends) {
            let connection = &mut self.connections[end.connection];
            let Some(record) = end.record else {
                memory.regions.remove(&end.key);
                memory.revoked.insert(end.key);
                memory.sources.remove(&id);
                connection.excused = true;
                if !end.closed {
                    end.leave(connection, Outcome::Refused);
                }
                continue;
            };
            let positions = Positions {
                head: end.head,
                credit: end.credit,
                consumed: end.consumed,
            };
            let restored = host.node.restore(&record, positions, self.now);
            assert_eq!(restored, Ok(()), "connection {}", end.connection);
            if end.shut {
                host.node.shut(end.id).unwrap();
            }
            if end.closed {
                connection.excused = true;
                let node = &mut host.node;
                let left = if end.broke {
                    node.reset(end.id)
                } else {
                    node.close(end.id)
                };
                assert_eq!(left, Ok(()));
            }
            host.ends.insert(id, end);
        }
    }

    /// A node loses everything.
    pub(super) fn restart_node(&mut self, index: usize) {
        self.fabric.reset(&mut self.rng, index);
        let seed = self.rng.next();
        let host = &mut self.hosts[index];
        host.epoch += 1;
        host.node = Node::new(NodeId(index as u16), host.epoch, seed, self.config.clone());
        host.offers.clear();
        host.blocked.clear();
        for mut end in std::mem::take(&mut host.ends).into_values() {
            if !end.closed {
                end.leave(&mut self.connections[end.connection], Outcome::Died);
            }
        }
        let memory = &mut self.fabric.memory[index];
        memory.revoked.extend(memory.regions.keys());
        memory.regions.clear();
        memory.sources.clear();
        self.excuse(|sides| sides.iter().any(|side| side.host == index));
    }
}
