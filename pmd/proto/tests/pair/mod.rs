//! A few nodes wired to each other without delay: what one posts, the other has.
#![allow(dead_code, reason = "each test file uses a part")]

use rdsock_proto::{
    Action, Actions, Addresses, Config, Event, Node, NodeId, Place, Status, StreamId, Write,
};
use std::net::Ipv6Addr;

pub const A: NodeId = NodeId(0);
pub const B: NodeId = NodeId(1);
pub const C: NodeId = NodeId(2);

pub const ADDRESSES: Addresses = Addresses {
    source: Ipv6Addr::LOCALHOST,
    source_port: 40000,
    destination: Ipv6Addr::LOCALHOST,
    destination_port: 80,
};

pub fn place(log2: u8) -> Place {
    Place {
        key: 7,
        ring: 4096,
        word: 64,
        log2,
    }
}

/// A post that was not completed yet.
pub struct Posted {
    pub from: NodeId,
    pub to: NodeId,
    pub seq: u64,
    pub message: Option<rdsock_proto::message::Bytes>,
    pub write: Option<Write>,
}

pub struct Wires {
    pub nodes: Vec<Node>,
    pub actions: Actions,
    pub now: u64,
    /// What was posted and not yet delivered.
    pub posted: Vec<Posted>,
    /// All writes so far, with their source.
    pub writes: Vec<(NodeId, Write)>,
    pub events: Vec<(NodeId, Event)>,
    pub restarts: usize,
}

impl Wires {
    pub fn new(nodes: u16, change: impl Fn(&mut Config)) -> Self {
        let node = |id| {
            let mut config = Config::new(nodes);
            config.streams = 64;
            change(&mut config);
            Node::new(NodeId(id), 1, 100 + u64::from(id), config)
        };
        let mut wires = Wires {
            nodes: (0..nodes).map(node).collect(),
            actions: Actions::new(64),
            now: 1000,
            posted: Vec::new(),
            writes: Vec::new(),
            events: Vec::new(),
            restarts: 0,
        };
        wires.settle();
        wires
    }

    pub fn node(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[usize::from(id.0)]
    }

    /// Polls one node until it has nothing to do; posts stay in flight.
    pub fn poll(&mut self, id: NodeId) {
        while self.poll_once(id) {}
    }

    pub fn poll_once(&mut self, id: NodeId) -> bool {
        let more = self.nodes[usize::from(id.0)].poll(self.now, &mut self.actions);
        for action in self.actions.drain() {
            match action {
                Action::Event(event) => self.events.push((id, event)),
                Action::Restart { .. } => self.restarts += 1,
                Action::Send { node, seq, message } => {
                    self.posted.push(Posted {
                        from: id,
                        to: node,
                        seq,
                        message: Some(message),
                        write: None,
                    });
                }
                Action::Write { node, seq, write } => {
                    self.writes.push((id, write));
                    let message = write.notify;
                    self.posted.push(Posted {
                        from: id,
                        to: node,
                        seq,
                        message,
                        write: Some(write),
                    });
                }
            }
        }
        more
    }

    /// Delivers and completes everything that is in flight.
    pub fn deliver(&mut self) {
        for post in std::mem::take(&mut self.posted) {
            if let Some(message) = post.message {
                let now = self.now;
                self.node(post.to).handle_message(post.from, &message, now);
            }
            let now = self.now;
            self.node(post.from)
                .handle_completion(post.to, post.seq, Status::Success, now);
        }
    }

    /// Until nothing moves any more.
    pub fn settle(&mut self) {
        loop {
            for id in 0..self.nodes.len() {
                self.poll(NodeId(id as u16));
            }
            if self.posted.is_empty() {
                return;
            }
            self.deliver();
        }
    }

    pub fn pass(&mut self, time: u64) {
        self.now += time;
        self.settle();
    }

    /// Events since the last call.
    pub fn events(&mut self) -> Vec<(NodeId, Event)> {
        std::mem::take(&mut self.events)
    }

    /// An established stream: its ids at `from` and at `to`.
    pub fn connect(&mut self, from: NodeId, to: NodeId, log2: u8) -> (StreamId, StreamId) {
        let now = self.now;
        let here = self
            .node(from)
            .connect(to, ADDRESSES, place(log2), now)
            .expect("a session");
        self.settle();
        let incoming = self
            .events
            .iter()
            .rev()
            .find_map(|(at, event)| match event {
                Event::Incoming { stream, .. } if *at == to => Some(*stream),
                _ => None,
            });
        let there = incoming.expect("the other node is asked");
        self.node(to)
            .accept(there, place(log2))
            .expect("it waits for an answer");
        self.settle();
        assert!(
            self.events()
                .contains(&(from, Event::Established { stream: here }))
        );
        (here, there)
    }
}
