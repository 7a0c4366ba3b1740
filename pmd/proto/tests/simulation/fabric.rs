//! An abstract fabric, as `docs/protocol.md` asks for it: for each pair of nodes a queue that is
//! executed in order, mailboxes that can be full, completions, and faults.

use super::rng::Rng;
use rdsock_proto::message::Bytes;
use rdsock_proto::{NodeId, Status, Write};
use std::collections::{HashMap, HashSet, VecDeque};

/// Where the ring of a region begins, and where its head word lies.
pub const RING: u64 = 4096;
pub const WORD: u64 = 64;

/// Memory that one other node may write.
pub struct Region {
    pub peer: NodeId,
    pub ring: Vec<u8>,
    pub word: u64,
}

/// What a node has registered, and what it has taken back without its peers' consent (restart,
/// peer given up): honest peers may still write there, and are refused.
#[derive(Default)]
pub struct Memory {
    pub regions: HashMap<u32, Region>,
    pub revoked: HashSet<u32>,
    /// Rings that the node's own engine reads.
    pub sources: HashMap<u64, Vec<u8>>,
}

#[derive(Clone)]
pub enum Work {
    Message(Bytes),
    Write(Write),
}

pub struct Packet {
    pub due: u64,
    pub seq: u64,
    pub work: Work,
    /// The bytes of a write are in place, its notification waits for the mailbox.
    written: bool,
}

#[derive(Default)]
pub struct Pipe {
    pub packets: VecDeque<Packet>,
    /// A post has failed: all others are flushed until the restart.
    stopped: bool,
    pub down_until: u64,
}

pub struct Completion {
    pub due: u64,
    pub to: usize,
    pub seq: u64,
    pub status: Status,
}

pub struct Fabric {
    nodes: usize,
    pub pipes: Vec<Pipe>,
    pub memory: Vec<Memory>,
    pub mailboxes: Vec<VecDeque<(NodeId, Bytes)>>,
    pub completions: Vec<VecDeque<Completion>>,
    pub mailbox_size: usize,
    pub pipe_size: usize,
    pub most_delay: u64,
    /// One post in so many fails; 0 for none.
    pub failures: u64,
    /// This node lies: what it writes into nothing is not an error of ours.
    pub liar: Option<usize>,
    pub writes: u64,
    pub bytes: u64,
}

impl Fabric {
    pub fn new(nodes: usize) -> Self {
        Fabric {
            nodes,
            pipes: (0..nodes * nodes).map(|_| Pipe::default()).collect(),
            memory: (0..nodes).map(|_| Memory::default()).collect(),
            mailboxes: (0..nodes).map(|_| VecDeque::new()).collect(),
            completions: (0..nodes).map(|_| VecDeque::new()).collect(),
            mailbox_size: 1024,
            pipe_size: 1024,
            most_delay: 10_000,
            failures: 0,
            liar: None,
            writes: 0,
            bytes: 0,
        }
    }

    pub fn pipe(&mut self, from: usize, to: usize) -> &mut Pipe {
        &mut self.pipes[from * self.nodes + to]
    }

    /// Takes a post; false when the queue is full.
    pub fn post(
        &mut self,
        rng: &mut Rng,
        now: u64,
        from: usize,
        to: usize,
        seq: u64,
        work: Work,
    ) -> bool {
        let delay = 500 + rng.below(self.most_delay);
        let size = self.pipe_size;
        let pipe = self.pipe(from, to);
        if pipe.packets.len() >= size {
            return false;
        }
        let due = pipe
            .packets
            .back()
            .map_or(0, |packet| packet.due)
            .max(now + delay);
        pipe.packets.push_back(Packet {
            due,
            seq,
            work,
            written: false,
        });
        true
    }

    pub fn restart(&mut self, from: usize, to: usize) {
        let pipe = self.pipe(from, to);
        assert!(pipe.packets.is_empty(), "restarted with posts in flight");
        pipe.stopped = false;
    }

    /// Executes what is due.
    pub fn run(&mut self, rng: &mut Rng, now: u64) {
        for from in 0..self.nodes {
            for to in 0..self.nodes {
                while self.step(rng, now, from, to) {}
            }
        }
    }

    /// One packet of a pipe; false when there is nothing to do.
    fn step(&mut self, rng: &mut Rng, now: u64, from: usize, to: usize) -> bool {
        let fails = rng.once_in(self.failures);
        let pipe = self.pipe(from, to);
        let down = now < pipe.down_until;
        if pipe.packets.front().is_none_or(|packet| packet.due > now) {
            return false;
        }
        let Some(mut packet) = pipe.packets.pop_front() else {
            return false;
        };
        let status = if pipe.stopped {
            Status::Flushed
        } else if down || (fails && rng.once_in(2)) {
            Status::Failed
        } else {
            match self.execute(from, to, &mut packet) {
                None => {
                    self.pipe(from, to).packets.push_front(packet);
                    return false;
                }
                // Carried out, but the answer is lost.
                Some(Status::Success) if fails => Status::Failed,
                Some(status) => status,
            }
        };
        self.pipe(from, to).stopped |= status != Status::Success;
        let due = now + 200 + rng.below(2000);
        let due = self.completions[from]
            .back()
            .map_or(0, |last| last.due)
            .max(due);
        self.completions[from].push_back(Completion {
            due,
            to,
            seq: packet.seq,
            status,
        });
        true
    }

    /// Carries a packet out; `None` while the mailbox is full.
    fn execute(&mut self, from: usize, to: usize, packet: &mut Packet) -> Option<Status> {
        let message = match &packet.work {
            Work::Message(message) => Some(*message),
            Work::Write(write) => {
                if !packet.written && !self.write(from, to, write) {
                    return Some(Status::Refused);
                }
                packet.written = true;
                write.notify
            }
        };
        if let Some(message) = message {
            if self.mailboxes[to].len() >= self.mailbox_size {
                return None;
            }
            self.mailboxes[to].push_back((NodeId(from as u16), message));
        }
        Some(Status::Success)
    }

    /// The target's protection, then the bytes, then the head word.
    fn write(&mut self, from: usize, to: usize, write: &Write) -> bool {
        let honest = self.liar != Some(from) && self.liar != Some(to);
        let bytes = match self.memory[from].sources.get(&write.stream.to_u64()) {
            Some(ring) => {
                let start = write.position as usize % ring.len();
                let end = start + write.len as usize;
                assert!(
                    end <= ring.len() || self.liar == Some(from),
                    "a write that wraps: {write:?}"
                );
                ring[start..end.min(ring.len())].to_vec()
            }
            None => {
                assert!(
                    self.liar == Some(from),
                    "node {from} reads a released ring: {write:?}"
                );
                vec![0xEE; write.len as usize % 5000]
            }
        };
        let memory = &mut self.memory[to];
        let Some(region) = memory.regions.get_mut(&write.key) else {
            let excused = !honest || memory.revoked.contains(&write.key);
            assert!(
                excused,
                "node {from} writes into released memory of node {to}: {write:?}"
            );
            return false;
        };
        let start = write.offset.checked_sub(RING);
        let range = start.and_then(|start| {
            let end = start.checked_add(bytes.len() as u64)?;
            (end <= region.ring.len() as u64).then_some(start as usize..end as usize)
        });
        let allowed = usize::from(region.peer.0) == from && write.word == WORD;
        let (Some(range), true) = (range, allowed) else {
            assert!(!honest, "node {from} writes where it may not: {write:?}");
            return false;
        };
        region.ring[range].copy_from_slice(&bytes);
        if honest {
            assert!(write.head >= region.word, "a head word goes back");
        }
        region.word = write.head;
        self.writes += 1;
        self.bytes += bytes.len() as u64;
        true
    }

    /// The device of a node is reset: some of its posts are carried out, the others and what lay in
    /// its mailbox are forgotten, and nothing completes.
    pub fn reset(&mut self, rng: &mut Rng, node: usize) {
        for to in 0..self.nodes {
            let done = rng.below(1 + self.pipe(node, to).packets.len() as u64);
            for _ in 0..done {
                let Some(mut packet) = self.pipe(node, to).packets.pop_front() else {
                    break;
                };
                let stopped = self.pipe(node, to).stopped;
                if stopped || self.execute(node, to, &mut packet) != Some(Status::Success) {
                    break;
                }
            }
            let pipe = self.pipe(node, to);
            pipe.packets.clear();
            pipe.stopped = false;
        }
        self.mailboxes[node].clear();
        self.completions[node].clear();
    }
}
