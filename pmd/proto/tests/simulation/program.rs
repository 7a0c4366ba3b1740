//! The programs of the simulation and their part of the daemon: they write a known pattern, check
//! every byte they read, and end in various ways.

use super::fabric::{Memory, RING, Region, WORD};
use super::rng::{Rng, byte_at};
use rdsock_proto::{EndReason, Node, NodeId, Place, Record, StreamId};

/// How an end saw its connection go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All bytes, then the end.
    Eof,
    Reset(EndReason),
    /// It stayed on kernel TCP.
    Refused,
    /// It closed or reset the connection itself before the end.
    Left,
    /// Its node restarted.
    Died,
}

/// How a program means to end its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Shuts its direction, reads to the end, closes.
    Orderly,
    /// Closes behind its last byte.
    Hasty,
    /// Resets after so many bytes.
    Breaks,
}

/// One direction of a connection, as the referee sees it.
#[derive(Clone, Debug, Default)]
pub struct Side {
    pub host: usize,
    pub written: u64,
    /// The program has ended its direction at `written`.
    pub shut: bool,
    pub outcome: Option<Outcome>,
    pub read: u64,
}

/// One connection, as the referee sees it.
#[derive(Clone, Debug, Default)]
pub struct Connection {
    pub sides: [Side; 2],
    /// Something happened to it after which TCP may reset.
    pub excused: bool,
}

/// One end of a connection.
pub struct End {
    pub connection: usize,
    pub side: usize,
    pub peer: NodeId,
    pub id: StreamId,
    pub key: u32,
    pub size: u64,
    pub head: u64,
    pub credit: u64,
    pub consumed: u64,
    /// What the last notification said.
    pub told: u64,
    /// The program looks at the head word itself, and wants no notifications.
    pub awake: bool,
    pub total: u64,
    pub manner: Manner,
    pub shut: bool,
    pub peer_end: Option<u64>,
    pub established: bool,
    pub closed: bool,
    /// It was closed by a reset.
    pub broke: bool,
    pub record: Option<Record>,
    /// The other end lies: what arrives is not checked.
    pub doubtful: bool,
}

impl End {
    pub fn new(
        rng: &mut Rng,
        connection: usize,
        side: usize,
        peer: NodeId,
        key: u32,
        unruly: bool,
    ) -> Self {
        let total = match rng.below(8) {
            0 => 0,
            1 => rng.below(60_000),
            2 => rng.below(200),
            _ => rng.below(12_000),
        };
        let manner = match rng.below(12) {
            0 if unruly => Manner::Hasty,
            1 if unruly => Manner::Breaks,
            _ => Manner::Orderly,
        };
        End {
            connection,
            side,
            peer,
            id: StreamId::from_u64(1 << 32).unwrap(),
            key,
            size: 4096 << rng.below(3),
            head: 0,
            credit: 0,
            consumed: 0,
            told: 0,
            awake: false,
            total,
            manner,
            shut: false,
            peer_end: None,
            established: false,
            closed: false,
            broke: false,
            record: None,
            doubtful: false,
        }
    }

    pub fn place(&self) -> Place {
        Place {
            key: self.key,
            ring: RING,
            word: WORD,
            log2: self.size.ilog2() as u8,
        }
    }

    /// Registers the end's memory, so that the peer may write.
    pub fn register(&self, memory: &mut Memory) {
        let region = Region {
            peer: self.peer,
            ring: vec![0; self.size as usize],
            word: 0,
        };
        memory.regions.insert(self.key, region);
        memory
            .sources
            .insert(self.id.to_u64(), vec![0; self.size as usize]);
    }

    fn word(&self, memory: &Memory) -> u64 {
        memory
            .regions
            .get(&self.key)
            .map_or(self.consumed, |region| region.word)
    }

    /// One step of the program.
    pub fn step(
        &mut self,
        rng: &mut Rng,
        node: &mut Node,
        memory: &mut Memory,
        connection: &mut Connection,
    ) {
        if !self.established || self.closed {
            return;
        }
        if rng.once_in(16) {
            self.awake = !self.awake;
            let seen = if self.awake {
                self.consumed
            } else {
                self.word(memory).max(self.consumed)
            };
            self.told = self.told.max(seen);
            let asked = node.set_notify(self.id, !self.awake, seen);
            assert!(self.doubtful || asked.is_ok(), "{asked:?}");
        }
        let visible = if self.awake {
            self.word(memory)
        } else {
            self.told
        };
        self.read(rng, node, memory, connection, visible);
        if self.closed {
            return;
        }
        self.write(rng, node, memory, connection);
        self.finish(node, memory, connection);
    }

    fn read(
        &mut self,
        rng: &mut Rng,
        node: &mut Node,
        memory: &Memory,
        connection: &mut Connection,
        visible: u64,
    ) {
        let waiting = visible
            .checked_sub(self.consumed)
            .filter(|waiting| *waiting <= self.size);
        let Some(waiting) = waiting else {
            // The shim resets a stream with impossible positions.
            assert!(
                self.doubtful,
                "an impossible head word: {visible}, read {}",
                self.consumed
            );
            self.leave(connection, Outcome::Left);
            return self.reset(node);
        };
        let n = if rng.once_in(2) {
            waiting
        } else {
            rng.below(waiting + 1)
        };
        self.verify(memory, connection, n);
        if n != 0 {
            let advanced = node.advance_consumed(self.id, self.consumed);
            assert!(self.doubtful || advanced.is_ok(), "{advanced:?}");
            if advanced.is_err() {
                // Beyond the end that the liar has named.
                self.leave(connection, Outcome::Left);
                self.reset(node);
            }
        }
    }

    fn verify(&mut self, memory: &Memory, connection: &mut Connection, n: u64) {
        let writer = &connection.sides[1 - self.side];
        if let (false, Some(region)) = (self.doubtful, memory.regions.get(&self.key)) {
            assert!(
                self.consumed + n <= writer.written,
                "bytes that nobody wrote"
            );
            for position in self.consumed..self.consumed + n {
                let found = region.ring[(position % self.size) as usize];
                let expected = byte_at(self.connection, 1 - self.side, position);
                assert_eq!(
                    found, expected,
                    "connection {} byte {position}",
                    self.connection
                );
            }
        }
        self.consumed += n;
        connection.sides[self.side].read = self.consumed;
    }

    fn write(
        &mut self,
        rng: &mut Rng,
        node: &mut Node,
        memory: &mut Memory,
        connection: &mut Connection,
    ) {
        let space = self.size - (self.head - self.credit);
        let most = space.min(self.total - self.head);
        let n = if rng.once_in(3) {
            most
        } else {
            rng.below(most.min(300) + 1)
        };
        if n == 0 || self.shut {
            return;
        }
        let ring = memory
            .sources
            .get_mut(&self.id.to_u64())
            .expect("an open stream has a ring");
        for position in self.head..self.head + n {
            ring[(position % self.size) as usize] = byte_at(self.connection, self.side, position);
        }
        self.head += n;
        connection.sides[self.side].written = self.head;
        node.advance_head(self.id, self.head).unwrap();
    }

    fn finish(&mut self, node: &mut Node, memory: &Memory, connection: &mut Connection) {
        if self.head == self.total && !self.shut {
            match self.manner {
                Manner::Orderly => {
                    self.shut = true;
                    connection.sides[self.side].shut = true;
                    node.shut(self.id).unwrap();
                }
                Manner::Hasty => {
                    connection.sides[self.side].shut = true;
                    self.leave(connection, Outcome::Left);
                    let unread = self.word(memory) > self.consumed;
                    if unread {
                        self.abort(node)
                    } else {
                        node.close(self.id).unwrap()
                    }
                    return;
                }
                Manner::Breaks => {
                    self.leave(connection, Outcome::Left);
                    return self.reset(node);
                }
            }
        }
        if self.shut && self.peer_end == Some(self.consumed) {
            self.leave(connection, Outcome::Eof);
            node.close(self.id).unwrap();
        }
    }

    /// The stream was broken: the program reads what has arrived, then sees ECONNRESET.
    pub fn ended(&mut self, node: &mut Node, connection: &mut Connection, reason: EndReason) {
        if !self.closed {
            self.leave(connection, Outcome::Reset(reason));
            node.close(self.id).unwrap();
        }
    }

    fn abort(&mut self, node: &mut Node) {
        self.broke = true;
        node.abort(self.id).unwrap();
    }

    fn reset(&mut self, node: &mut Node) {
        self.broke = true;
        node.reset(self.id).unwrap();
    }

    /// The program has nothing to do with the connection any more.
    pub fn leave(&mut self, connection: &mut Connection, outcome: Outcome) {
        self.closed = true;
        connection.excused |= outcome == Outcome::Left;
        connection.sides[self.side].outcome = Some(outcome);
    }
}
