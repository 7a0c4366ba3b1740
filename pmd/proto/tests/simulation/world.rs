//! Hosts on the fabric: what the daemon of each does with its node's actions.

use super::fabric::{Fabric, Work};
use super::liar;
use super::program::{Connection, End, Outcome};
use super::rng::Rng;
use rdsock_proto::{Action, Actions, Addresses, Config, Event, Node, NodeId, Refusal, StreamId};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

pub const US: u64 = 1000;

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
    pub offers: Vec<(u64, StreamId, usize)>,
    pub blocked: BTreeSet<usize>,
    pub epoch: u64,
}

pub struct World {
    pub rng: Rng,
    pub now: u64,
    pub fabric: Fabric,
    pub hosts: Vec<Host>,
    pub connections: Vec<Connection>,
    pub faults: Faults,
    pub config: Config,
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
        let mut connection = Connection {
            excused: !self.honest(from) || !self.honest(to),
            ..Connection::default()
        };
        (connection.sides[0].host, connection.sides[1].host) = (from, to);
        self.connections.push(connection);
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
