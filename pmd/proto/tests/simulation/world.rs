//! Hosts on the fabric: what the daemon of each does with its node's actions, the faults, and the
//! verdict at the end.

use super::fabric::{Fabric, Work};
use super::liar;
use super::program::{Connection, End, Outcome};
use super::rng::Rng;
use rdsock_proto::{
    Action, Actions, Addresses, Config, Count, Event, Node, NodeId, Positions, Refusal, StreamId,
};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

const US: u64 = 1000;

/// What may happen in a run.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Programs that close early or reset.
    pub unruly: bool,
    /// One post in so many fails.
    pub failures: u64,
    /// One tick in so many cuts a link for up to a millisecond; for long.
    pub short_cuts: u64,
    pub long_cuts: u64,
    /// One tick in so many restarts the worker of a daemon; a node.
    pub workers: u64,
    pub nodes: u64,
    /// Node 0 lies.
    pub liar: bool,
}

pub struct Host {
    pub node: Node,
    actions: Actions,
    pub ends: BTreeMap<u64, End>,
    /// Connects that the daemon has not answered yet.
    offers: Vec<(u64, StreamId, usize)>,
    blocked: BTreeSet<usize>,
    epoch: u64,
}

pub struct World {
    pub rng: Rng,
    pub now: u64,
    pub fabric: Fabric,
    pub hosts: Vec<Host>,
    pub connections: Vec<Connection>,
    faults: Faults,
    config: Config,
    keys: u32,
    pub lies: liar::Lies,
}

impl World {
    pub fn new(seed: u64, nodes: usize, faults: Faults) -> Self {
        let mut rng = Rng::new(seed);
        let mut fabric = Fabric::new(nodes);
        if rng.once_in(3) {
            fabric.mailbox_size = 1 + rng.below(6) as usize;
        }
        if rng.once_in(3) {
            fabric.pipe_size = 1 + rng.below(8) as usize;
        }
        fabric.most_delay = [1_000, 10_000, 40_000][rng.below(3) as usize];
        fabric.failures = faults.failures;
        fabric.liar = faults.liar.then_some(0);
        let config = Config {
            streams: 16 * nodes as u32,
            streams_from_node: 16,
            pending: 1 + rng.below(12) as u32,
            window: 4 + rng.below(20) as u32,
            quantum: 600 << rng.below(5),
            bulk: 256,
            hello_interval: 50 * US,
            keep_alive: 300 * US,
            silence: 1500 * US,
            resume_timeout: 8000 * US,
            ..Config::new(nodes as u16)
        };
        let host = |index: usize| Host {
            node: Node::new(NodeId(index as u16), 1, seed ^ index as u64, config.clone()),
            actions: Actions::new(4),
            ends: BTreeMap::new(),
            offers: Vec::new(),
            blocked: BTreeSet::new(),
            epoch: 1,
        };
        let hosts = (0..nodes).map(host).collect();
        let lies = liar::Lies::default();
        World {
            rng,
            now: 0,
            fabric,
            hosts,
            connections: Vec::new(),
            faults,
            config,
            keys: 1,
            lies,
        }
    }

    /// Runs `ticks` with new connections and faults, then until all is over.
    pub fn run(&mut self, ticks: u64, connections: usize) {
        for tick in 0..ticks {
            if self.connections.len() < connections
                && self.rng.once_in(1 + ticks / (2 * connections as u64))
            {
                self.connect();
            }
            if tick > 20 {
                self.fault();
            }
            self.tick();
        }
        self.fabric.failures = 0;
        self.fabric
            .pipes
            .iter_mut()
            .for_each(|pipe| pipe.down_until = 0);
        if self.faults.liar {
            self.faults.liar = false;
            self.restart_node(0);
        }
        for _ in 0..40_000 {
            if self.is_over() {
                return self.judge();
            }
            self.tick();
        }
        panic!("hangs: {}", self.describe());
    }

    fn is_over(&self) -> bool {
        self.hosts
            .iter()
            .all(|host| host.node.streams() == 0 && host.ends.is_empty())
    }

    fn describe(&self) -> String {
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
    fn judge(&self) {
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
    fn judge_counters(&self) {
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

    pub fn honest(&self, host: usize) -> bool {
        self.fabric.liar != Some(host)
    }

    fn tick(&mut self) {
        self.now += 200 + self.rng.below(5 * US);
        self.fabric.run(&mut self.rng, self.now);
        for host in 0..self.hosts.len() {
            if self.rng.below(4) != 0 {
                self.run_host(host);
            }
        }
    }

    fn connect(&mut self) {
        let from = self.rng.below(self.hosts.len() as u64) as usize;
        let to = self.rng.below(self.hosts.len() as u64) as usize;
        if from == to {
            return;
        }
        let number = self.connections.len();
        let addresses = Addresses {
            source: Ipv6Addr::from(number as u128),
            source_port: from as u16,
            destination: Ipv6Addr::LOCALHOST,
            destination_port: to as u16,
        };
        let peer = NodeId(to as u16);
        let mut end = End::new(
            &mut self.rng,
            number,
            0,
            peer,
            self.keys,
            self.faults.unruly,
        );
        self.keys += 1;
        let asked = self.hosts[from]
            .node
            .connect(peer, addresses, end.place(), self.now);
        let Ok(id) = asked else { return };
        end.id = id;
        end.doubtful = !self.honest(from) || !self.honest(to);
        end.register(&mut self.fabric.memory[from]);
        self.hosts[from].ends.insert(id.to_u64(), end);
        let mut connection = Connection::default();
        connection.excused = !self.honest(from) || !self.honest(to);
        (connection.sides[0].host, connection.sides[1].host) = (from, to);
        self.connections.push(connection);
    }

    fn fault(&mut self) {
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

    fn excuse(&mut self, which: impl Fn(&[super::program::Side; 2]) -> bool) {
        for connection in &mut self.connections {
            connection.excused |= which(&connection.sides);
        }
    }

    /// The daemon's worker dies and is started again; shared memory and keys outlive it.
    fn restart_worker(&mut self, index: usize) {
        self.fabric.reset(&mut self.rng, index);
        let seed = self.rng.next();
        let host = &mut self.hosts[index];
        host.node = Node::new(NodeId(index as u16), host.epoch, seed, self.config.clone());
        host.offers.clear();
        host.blocked.clear();
        let memory = &mut self.fabric.memory[index];
        for (id, mut end) in std::mem::take(&mut host.ends) {
            let connection = &mut self.connections[end.connection];
            let Some(record) = end.record.clone() else {
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
    fn restart_node(&mut self, index: usize) {
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

    /// One round of a daemon.
    fn run_host(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        for _ in 0..self.rng.below(12) {
            let Some((from, message)) = self.fabric.mailboxes[index].pop_front() else {
                break;
            };
            host.node.handle_message(from, &message, self.now);
        }
        while self.fabric.completions[index]
            .front()
            .is_some_and(|first| first.due <= self.now)
        {
            let Some(done) = self.fabric.completions[index].pop_front() else {
                break;
            };
            host.node
                .handle_completion(NodeId(done.to as u16), done.seq, done.status, self.now);
        }
        let size = self.fabric.pipe_size;
        for to in host.blocked.clone() {
            if self.fabric.pipe(index, to).packets.len() < size {
                host.blocked.remove(&to);
                host.node.handle_room(NodeId(to as u16));
            }
        }
        self.answer_offers(index);
        let host = &mut self.hosts[index];
        for end in host.ends.values_mut() {
            let connection = &mut self.connections[end.connection];
            end.step(
                &mut self.rng,
                &mut host.node,
                &mut self.fabric.memory[index],
                connection,
            );
        }
        let mut actions = std::mem::replace(&mut self.hosts[index].actions, Actions::new(4));
        for _ in 0..1 + self.rng.below(20) {
            let more = self.hosts[index].node.poll(self.now, &mut actions);
            let list: Vec<Action> = actions.drain().collect();
            list.into_iter()
                .for_each(|action| self.carry_out(index, action));
            if !more {
                break;
            }
        }
        self.hosts[index].actions = actions;
    }

    fn carry_out(&mut self, index: usize, action: Action) {
        let (to, seq, work) = match action {
            Action::Event(event) => return self.on_event(index, event),
            Action::Restart { node } => return self.fabric.restart(index, node.0.into()),
            Action::Send { node, seq, message } => {
                (usize::from(node.0), seq, Work::Message(message))
            }
            Action::Write { node, seq, write } => (usize::from(node.0), seq, Work::Write(write)),
        };
        if self.hosts[index].blocked.contains(&to) {
            return; // Taken back already, with the first that was rejected.
        }
        let work = match self.faults.liar && !self.honest(index) {
            true => self.lies.twist(&mut self.rng, to, work),
            false => work,
        };
        if !self
            .fabric
            .post(&mut self.rng, self.now, index, to, seq, work)
        {
            self.hosts[index].blocked.insert(to);
            self.hosts[index]
                .node
                .handle_rejected(NodeId(to as u16), seq);
        }
    }

    fn answer_offers(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        let due: Vec<_> = host
            .offers
            .extract_if(.., |offer| offer.0 <= self.now)
            .collect();
        for (_, id, number) in due {
            if self.rng.once_in(20) {
                let _ = host.node.refuse(id, Refusal::NoListener);
                continue;
            }
            let Some(connection) = self.connections.get_mut(number) else {
                let _ = host.node.refuse(id, Refusal::NoListener);
                continue;
            };
            let peer = NodeId(connection.sides[0].host as u16);
            let mut end = End::new(
                &mut self.rng,
                number,
                1,
                peer,
                self.keys,
                self.faults.unruly,
            );
            self.keys += 1;
            end.id = id;
            end.doubtful = connection.excused
                && self
                    .fabric
                    .liar
                    .is_some_and(|liar| connection.sides.iter().any(|side| side.host == liar));
            if host.node.accept(id, end.place()).is_err() {
                continue; // `Ended` has come.
            }
            end.established = true;
            end.record = host.node.record(id);
            end.register(&mut self.fabric.memory[index]);
            host.ends.insert(id.to_u64(), end);
        }
    }

    fn on_event(&mut self, index: usize, event: Event) {
        let host = &mut self.hosts[index];
        let id = match event {
            Event::Incoming {
                stream,
                node,
                addresses,
            } => {
                let number = addresses.source.to_bits() as usize;
                let known = self.connections.get(number).filter(|connection| {
                    connection.sides[0].host == usize::from(node.0)
                        && connection.sides[1].host == index
                });
                assert!(
                    known.is_some() || self.fabric.liar == Some(node.0.into()),
                    "{addresses:?}"
                );
                let number = if known.is_some() { number } else { usize::MAX };
                let wait = if self.rng.once_in(10) {
                    3000 * US
                } else {
                    30 * US
                };
                let due = self.now + self.rng.below(wait);
                return host.offers.push((due, stream, number));
            }
            Event::NodeUp { .. } => return,
            Event::NodeGone { node } => {
                let memory = &mut self.fabric.memory[index];
                for end in host.ends.values().filter(|end| end.peer == node) {
                    memory.regions.remove(&end.key);
                    memory.revoked.insert(end.key);
                }
                return;
            }
            Event::Established { stream }
            | Event::Refused { stream, .. }
            | Event::PeerHead { stream, .. }
            | Event::Credit { stream, .. }
            | Event::PeerShut { stream, .. }
            | Event::Ended { stream, .. }
            | Event::Resume { stream }
            | Event::Released { stream } => stream,
        };
        let Some(end) = host.ends.get_mut(&id.to_u64()) else {
            // A connect that was not accepted.
            host.offers.retain(|offer| offer.1 != id);
            if let Event::Ended { .. } = event {
                host.node.close(id).unwrap();
            }
            return;
        };
        let connection = &mut self.connections[end.connection];
        match event {
            Event::Established { .. } => end.established = true,
            Event::Refused { .. } => end.leave(connection, Outcome::Refused),
            Event::PeerHead { head, .. } => end.told = end.told.max(head),
            Event::Credit { to, .. } => {
                assert!(to >= end.credit && to <= end.head);
                end.credit = to;
            }
            Event::PeerShut { end: position, .. } => end.peer_end = Some(position),
            Event::Ended { reason, .. } => end.ended(&mut host.node, connection, reason),
            Event::Resume { .. } => {
                let memory = &self.fabric.memory[index];
                let region = memory.regions.get(&end.key);
                assert!(region.is_some() || memory.revoked.contains(&end.key));
                let head = region.map_or(0, |region| region.word).max(end.consumed);
                end.told = end.told.max(head);
                if host.node.resume(id, head).is_err() {
                    assert!(end.doubtful, "an impossible head word");
                    if !end.closed {
                        end.leave(connection, Outcome::Left);
                        host.node.reset(id).unwrap();
                    }
                }
            }
            Event::Released { .. } => {
                self.fabric.memory[index].regions.remove(&end.key);
                self.fabric.memory[index].sources.remove(&id.to_u64());
                host.ends.remove(&id.to_u64());
                return;
            }
            Event::Incoming { .. } | Event::NodeUp { .. } | Event::NodeGone { .. } => {}
        }
        if let Some(record) = host.node.record(id) {
            end.record = Some(record);
        }
    }
}
