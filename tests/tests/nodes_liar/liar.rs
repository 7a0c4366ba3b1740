//! A node that lies: it holds a device of its own, linked with those of the daemons, and says and writes to node 1
//! what it likes. As long as nobody asks for a lie it is a node like any other, but for its streams, which it
//! leaves to the test.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdsock_model::{Chaos, Fabric};
use rdsock_proto::message::{Body, Bytes, Message};
use rdsock_proto::{Place, StreamId};
use rdsock_rde::spec::{Key, Status};
use rdsock_rde::{Data, Notify, Operation, QueueSet, Rde, Region, Remote, Rights, Sizes, Work};
use rdsock_vfio::model::ModelDevice;
use rdsock_vfio::{Shared, Space};

/// Whom it lies to.
const VICTIM: u16 = 1;
const LIMIT: Duration = Duration::from_secs(30);
/// It says that it lives this often.
const ALIVE: Duration = Duration::from_millis(50);
/// Bytes of the ring that it offers for each stream, and their logarithm.
const RING: usize = 1 << LOG2;
const LOG2: u8 = 16;
/// The head word lies behind the ring.
const MEMORY: usize = RING + 4096;

/// A stream that node 1 has accepted.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    /// Node 1's id of it.
    pub theirs: StreamId,
    /// Where the liar may write.
    pub place: Place,
}

pub struct Liar {
    set: QueueSet,
    region: Region,
    fabric: Fabric,
    _rde: Rde,
    node: u16,
    start: Instant,
    spoke: Instant,
    epoch: u64,
    /// Its tag, and node 1's.
    tag: u32,
    pub session: u32,
    live: bool,
    next: u32,
    accepted: HashMap<StreamId, Stream>,
    /// Connects that were refused.
    pub refused: usize,
    /// Streams of which node 1 has said its last word.
    pub left: HashSet<StreamId>,
    /// What the device said of writes that were not done.
    pub statuses: Vec<Status>,
    /// Whether it takes what comes for it.
    pub reads: bool,
}

pub fn id(number: u32) -> StreamId {
    StreamId::from_u64(1 << 32 | u64::from(number)).expect("a generation")
}

impl Liar {
    /// Joins the fabric, and greets node 1.
    pub fn join(dir: &Path, node: u16) -> Self {
        let fabric = Fabric::new(Chaos::default());
        let device = ModelDevice::linked(&fabric, dir, node, 1).expect("a free node");
        let rde = Rde::open(Space::new(Arc::new(device))).expect("a device");
        rde.management().join(node, &[VICTIM]);
        let set = rde.queue_set(0, Sizes::default()).expect("a queue set");
        let memory = Arc::new(rde.space().allocate(MEMORY).expect("memory"));
        let memory = Shared::new(&memory, 0, MEMORY).expect("all of it");
        let region = rde.register(memory, Rights::Write, None).expect("a region");
        let mut liar = Liar {
            set,
            region,
            fabric,
            _rde: rde,
            node,
            start: Instant::now(),
            spoke: Instant::now(),
            epoch: 1,
            tag: 1,
            session: 0,
            live: false,
            next: 1,
            accepted: HashMap::new(),
            refused: 0,
            left: HashSet::new(),
            statuses: Vec::new(),
            reads: true,
        };
        liar.greet();
        liar
    }

    fn hello(&mut self) {
        let body = Body::Hello {
            epoch: self.epoch,
            tag: self.tag,
            pending: 1024,
        };
        self.say(body);
    }

    fn greet(&mut self) {
        let mut said = Instant::now();
        self.hello();
        self.until("a greeting", |liar| {
            if said.elapsed() > ALIVE && !liar.live {
                said = Instant::now();
                liar.hello();
            }
            liar.live
        });
    }

    /// Begins anew, as a node that has restarted.
    pub fn restart(&mut self) {
        self.forget_session();
        self.epoch += 1;
        self.greet();
    }

    /// Has a new tag, and does not greet.
    pub fn forget_session(&mut self) {
        self.tag += 1;
        self.live = false;
    }

    /// Lets its device work, and takes what has come.
    pub fn turn(&mut self) {
        let now = self.start.elapsed().as_nanos() as u64;
        self.fabric.step(now);
        let statuses = &mut self.statuses;
        let taken = self.set.poll_completions(64, |done| {
            if !done.status.is_ok() {
                statuses.push(done.status);
            }
        });
        taken.expect("an honest device");
        if self.reads {
            let mut messages = Vec::new();
            let taken = self.set.poll_messages(64, |m| messages.push(m.payload));
            taken.expect("an honest device");
            for payload in messages {
                let message = Message::decode(&payload).expect("an honest victim");
                self.hear(message);
            }
        }
        if self.live && self.spoke.elapsed() > ALIVE {
            self.say(Body::Alive);
        }
    }

    fn hear(&mut self, message: Message) {
        match message.body {
            Body::Hello { tag, .. } => {
                if self.session != tag || message.session != self.tag {
                    self.session = tag;
                    self.live = false;
                    self.hello();
                }
                if message.session == self.tag && !self.live {
                    self.hello();
                    self.say(Body::Resumed);
                }
            }
            Body::Resumed if message.session == self.tag => self.live = true,
            Body::Accept { to, from, place } => {
                let stream = Stream {
                    theirs: from,
                    place,
                };
                self.accepted.insert(to, stream);
            }
            Body::Refuse { .. } => self.refused += 1,
            Body::Close { to, .. } | Body::Reset { to, .. } => {
                self.left.insert(to);
                if let Some(stream) = self.accepted.get(&to) {
                    let (to, cause) = (stream.theirs, rdsock_proto::Cause::Program);
                    self.say(Body::Reset { to, cause });
                }
            }
            _ => {}
        }
    }

    /// Works until something is so.
    pub fn until(&mut self, what: &str, mut so: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + LIMIT;
        loop {
            self.turn();
            if so(self) {
                return;
            }
            assert!(Instant::now() < end, "no sign of {what}");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Says something in the session that there is.
    pub fn say(&mut self, body: Body) {
        let session = self.session;
        self.say_bytes(&Message { session, body }.encode());
    }

    /// Says whatever this is.
    pub fn say_bytes(&mut self, payload: &Bytes) {
        let message = Operation::Message(Notify { set: 0, payload });
        self.post(message);
        self.spoke = Instant::now();
    }

    fn post(&mut self, operation: Operation<'_>) {
        let work = Work {
            target: VICTIM,
            operation,
            tag: 0,
            report: true,
        };
        while self.set.post(&work).is_err() {
            let now = self.start.elapsed().as_nanos() as u64;
            self.set.ring();
            self.fabric.step(now);
            let statuses = &mut self.statuses;
            let taken = self.set.poll_completions(64, |done| {
                if !done.status.is_ok() {
                    statuses.push(done.status);
                }
            });
            taken.expect("an honest device");
        }
        self.set.ring();
    }

    /// A place of its own memory in which node 1 may write, for all streams the same.
    pub fn own_place(&self) -> Place {
        Place {
            key: self.region.key().0,
            ring: 0,
            word: RING as u64,
            log2: LOG2,
        }
    }

    /// Asks for a stream to a port of node 1, whose bytes may be written to `place`; its own id of it.
    pub fn ask(&mut self, port: u16, place: Place) -> StreamId {
        let from = id(self.next);
        self.next += 1;
        self.say(Body::Offer {
            from,
            place,
            source_port: 1000 + self.next as u16,
            destination_port: port,
        });
        let address = |node: u16| std::net::Ipv4Addr::new(127, 0, 0, node as u8).to_ipv6_mapped();
        self.say(Body::Connect {
            from,
            source: address(self.node),
            destination: address(VICTIM),
        });
        from
    }

    /// Asks for a stream, and gets it.
    pub fn open(&mut self, port: u16, place: Place) -> Stream {
        let own = self.ask(port, place);
        self.until("an answer", |liar| liar.accepted.contains_key(&own));
        self.accepted[&own]
    }

    /// Sends bytes at position 0 of a stream as an honest node would.
    pub fn send(&mut self, stream: Stream, bytes: &[u8]) {
        let (to, head) = (stream.theirs, bytes.len() as u64);
        let session = self.session;
        let body = Body::Data { to, head };
        let payload = Message { session, body }.encode();
        let word = Some((stream.place.word, head));
        let notify = Some(Notify {
            set: 0,
            payload: &payload,
        });
        self.write(stream.place.key, stream.place.ring, bytes, word, notify);
    }

    /// Writes wherever this is.
    pub fn write(
        &mut self,
        key: u32,
        offset: u64,
        bytes: &[u8],
        word: Option<(u64, u64)>,
        notify: Option<Notify<'_>>,
    ) {
        self.post(Operation::Write {
            to: Remote {
                key: Key(key),
                offset,
            },
            data: Data::Inline(bytes),
            word,
            notify,
        });
    }
}
