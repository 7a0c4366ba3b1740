//! What the fuzz targets do with their input. `tests/fuzz.rs` runs the same without a fuzzer.

use rdsock_proto::message::{Body, Cause, Message, Refusal, SIZE, kind};
use rdsock_proto::{
    Action, Actions, Addresses, Config, Event, Node, NodeId, Place, Status, StreamId,
};
use std::net::Ipv6Addr;

/// A message is understood or refused; what is understood has no second form.
pub fn message(data: &[u8]) {
    if let Ok(message) = Message::decode(data) {
        assert_eq!(message.encode(), data);
    }
}

const STREAMS: u32 = 24;
const SHARE: u32 = 8;

/// How far an input came, so that a test can tell that inputs get anywhere.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reached {
    pub ups: u64,
    pub incoming: u64,
    pub established: u64,
    pub writes: u64,
    pub resumes: u64,
    pub ended: u64,
    pub released: u64,
}

const PEER: NodeId = NodeId(1);

/// A node and a peer that sends whatever the input says. The first byte of each piece says what
/// happens, the others are its arguments: raw messages, messages with fields that are sometimes
/// possible (the tag of the session and the ids of live streams, which nobody guesses), calls of the
/// daemon, completions, time.
pub fn node(data: &[u8]) -> Reached {
    let mut config = Config::new(2);
    (
        config.streams,
        config.streams_from_node,
        config.pending,
        config.window,
    ) = (STREAMS, SHARE, 4, 8);
    let mut bench = Bench {
        node: Node::new(NodeId(0), 1, 7, config),
        actions: Actions::new(16),
        now: 0,
        tag: 0,
        ids: Vec::new(),
        posted: Vec::new(),
        reached: Reached::default(),
    };
    bench.poll();
    for piece in data.chunks(1 + SIZE) {
        bench.step(piece[0], &piece[1..]);
        assert!(
            bench.node.streams() <= STREAMS as usize,
            "more streams than places"
        );
    }
    bench.reached
}

struct Bench {
    node: Node,
    actions: Actions,
    now: u64,
    /// Our tag, as the node tells it in its HELLO.
    tag: u32,
    ids: Vec<StreamId>,
    posted: Vec<u64>,
    reached: Reached,
}

/// Takes arguments off the input; zeroes when it has no more.
struct Arguments<'a>(&'a [u8]);

impl Arguments<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u64 {
        (0..8).fold(0, |word, _| word << 8 | u64::from(self.byte()))
    }

    /// Mostly small, so that it is sometimes possible.
    fn position(&mut self) -> u64 {
        match self.byte() {
            0 => self.word(),
            small @ 1..128 => u64::from(small & 7) * 512,
            _ => self.word() % 9000,
        }
    }

    fn place(&mut self) -> Place {
        Place {
            key: 1,
            ring: 4096,
            word: 0,
            log2: 12 + self.byte() % 3,
        }
    }
}

impl Bench {
    fn step(&mut self, what: u8, arguments: &[u8]) {
        let mut from = Arguments(arguments);
        match what % 16 {
            0 => self.node.handle_message(PEER, arguments, self.now),
            1..8 => {
                let message = self.message(&mut from);
                self.node.handle_message(PEER, &message.encode(), self.now);
            }
            8 | 9 => self.complete(&mut from),
            10 => self.now += 1 << (from.byte() % 32),
            11 => {
                let loopback = Ipv6Addr::LOCALHOST;
                let addresses = Addresses {
                    source: loopback,
                    source_port: 1,
                    destination: loopback,
                    destination_port: 2,
                };
                self.ids
                    .extend(self.node.connect(PEER, addresses, from.place(), self.now));
            }
            _ => self.call(&mut from),
        }
        self.poll();
    }

    fn id(&self, from: &mut Arguments) -> StreamId {
        let choice = from.byte();
        let known = self
            .ids
            .get(usize::from(choice) % self.ids.len().max(1))
            .copied();
        let any = StreamId::from_u64(1 << 32 | u64::from(choice)).expect("a generation");
        known.filter(|_| choice < 240).unwrap_or(any)
    }

    fn message(&self, from: &mut Arguments) -> Message {
        let theirs = |from: &mut Arguments| {
            StreamId::from_u64(1 << 32 | u64::from(from.byte() % 8)).expect("a generation")
        };
        let body = match from.byte() % 24 {
            0 => Body::Hello {
                epoch: 1 + u64::from(from.byte() / 250),
                tag: 5 + u32::from(from.byte() / 200),
                pending: 4,
            },
            1 | 2 => Body::Offer {
                from: theirs(from),
                place: from.place(),
                source_port: 1,
                destination_port: 2,
            },
            3..6 => Body::Connect {
                from: theirs(from),
                source: Ipv6Addr::LOCALHOST,
                destination: Ipv6Addr::LOCALHOST,
            },
            6..8 => Body::Accept {
                to: self.id(from),
                from: theirs(from),
                place: from.place(),
            },
            8 => Body::Refuse {
                to: self.id(from),
                refusal: Refusal::Limit,
            },
            9..11 => Body::Data {
                to: self.id(from),
                head: from.position(),
            },
            11..15 => Body::Credit {
                to: self.id(from),
                consumed: from.position(),
                seen: from.position(),
                notify: from.byte() < 128,
            },
            15 => Body::Shut {
                to: self.id(from),
                end: from.position(),
            },
            16 => Body::Close {
                to: self.id(from),
                end: from.position(),
                consumed: from.position(),
            },
            17 => Body::Reset {
                to: self.id(from),
                cause: Cause::Program,
            },
            18..21 => Body::Resume {
                to: self.id(from),
                from: theirs(from),
                arrived: from.position(),
                consumed: from.position(),
                notify: true,
            },
            21 | 22 => Body::Resumed,
            _ => Body::Alive,
        };
        Message {
            session: self.tag,
            body,
        }
    }

    fn complete(&mut self, from: &mut Arguments) {
        let status = match from.byte() {
            0..200 => Status::Success,
            200..220 => Status::Refused,
            220..240 => Status::Failed,
            _ => Status::Flushed,
        };
        for seq in std::mem::take(&mut self.posted) {
            self.node.handle_completion(PEER, seq, status, self.now);
        }
    }

    fn call(&mut self, from: &mut Arguments) {
        let id = self.id(from);
        // An error is an answer too; what matters is that nothing breaks.
        let _ = match from.byte() % 16 {
            0..6 => self.node.accept(id, from.place()),
            6 | 7 => self.node.advance_head(id, from.position()),
            8 => self.node.advance_consumed(id, from.position()),
            9 => self.node.set_notify(id, from.byte() < 128, from.position()),
            10 => self.node.shut(id),
            11 => self.node.close(id),
            12 => self.node.reset(id),
            13 => self.node.refuse(id, Refusal::Policy),
            _ => self.node.resume(id, from.position()),
        };
    }

    fn poll(&mut self) {
        let mut rounds = 0;
        while self.node.poll(self.now, &mut self.actions) {
            rounds += 1;
            assert!(rounds < 1000, "it never comes to rest");
            self.carry_out();
        }
        self.carry_out();
    }

    fn carry_out(&mut self) {
        let mut resumed = Vec::new();
        for action in self.actions.drain() {
            match action {
                Action::Send { seq, message, .. } => {
                    self.posted.push(seq);
                    if message[1] == kind::HELLO {
                        let Ok(Message {
                            body: Body::Hello { tag, .. },
                            ..
                        }) = Message::decode(&message)
                        else {
                            panic!("a HELLO of ours that is none");
                        };
                        self.tag = tag;
                    }
                }
                Action::Write { seq, write, .. } => {
                    assert!(write.len > 0 && write.head == write.position + u64::from(write.len));
                    self.posted.push(seq);
                    self.reached.writes += 1;
                }
                Action::Restart { .. } => {
                    assert!(self.posted.is_empty(), "restarted with posts in flight")
                }
                Action::Event(event) => match event {
                    Event::Incoming { stream, .. } => {
                        self.reached.incoming += 1;
                        self.ids.push(stream);
                    }
                    Event::Released { stream } => {
                        self.reached.released += 1;
                        self.ids.retain(|id| *id != stream);
                    }
                    Event::NodeUp { .. } => self.reached.ups += 1,
                    Event::Established { .. } => self.reached.established += 1,
                    Event::Ended { .. } => self.reached.ended += 1,
                    Event::Resume { stream } => resumed.push(stream),
                    _ => {}
                },
            }
        }
        for stream in resumed {
            self.reached.resumes += 1;
            let _ = self.node.resume(stream, 0);
        }
        assert!(self.posted.len() <= 8, "more in flight than the window");
    }
}
