//! Nodes on models that are wired to each other, stepped by the test: no thread, no clock. The models are in
//! this process, or (for tests that are compiled into `over_vfio_user`) behind sockets.

mod looked_at;

use looked_at::LookedAt;
use rdsock_model::{Chaos, Counters, Fabric, Fault, Function};
use rdsock_rde::*;
use rdsock_vfio::model::ModelDevice;
use rdsock_vfio::serve::{Server, Serving};
use rdsock_vfio::user::UserDevice;
use rdsock_vfio::{Device, Shared, Space};
use std::sync::Arc;

/// Nanoseconds between two steps.
pub const TICK: u64 = 1000;
/// Bytes of each node's region, and of its local memory.
pub const MEMORY: usize = 64 << 10;

pub struct Node {
    /// The model's side.
    pub function: Function,
    pub rde: Rde,
    pub set: QueueSet,
    /// Memory that other nodes may read and write.
    pub region: Region,
    /// Memory that only this node's descriptors name.
    pub local: Shared,
    /// Outlives all of that.
    pub server: Option<Server>,
}

impl Node {
    pub fn inject(&self, fault: Fault) {
        self.function.inject(fault);
    }

    pub fn counters(&self) -> Counters {
        self.function.counters()
    }

    /// `len` bytes of the region at `at`.
    pub fn region_bytes(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert!(self.region.memory().unwrap().copy_out(at, &mut bytes));
        bytes
    }

    pub fn remote(&self, offset: u64) -> Remote {
        Remote {
            key: self.region.key(),
            offset,
        }
    }

    pub fn completions(&mut self) -> Vec<Completion> {
        let mut all = Vec::new();
        self.set
            .poll_completions(usize::MAX, |c| all.push(c))
            .unwrap();
        all
    }

    pub fn messages(&mut self) -> Vec<Message> {
        let mut all = Vec::new();
        self.set
            .poll_messages(usize::MAX, |m| all.push(*m))
            .unwrap();
        all
    }

    /// Posts and rings.
    pub fn post(&mut self, work: &Work<'_>) {
        self.set.post(work).unwrap();
        self.set.ring();
    }
}

/// Node `i` of the vector has id `i + 1`.
pub struct Nodes {
    pub fabric: Fabric,
    pub nodes: Vec<Node>,
    pub now: u64,
}

pub const SMALL: Sizes = Sizes {
    work: 6,
    completions: 7,
    messages: 6,
};

impl Nodes {
    pub fn new(count: u16, chaos: Chaos, sizes: Sizes) -> Self {
        let fabric = Fabric::new(chaos);
        let nodes = (1..=count)
            .map(|id| node(&fabric, id, count, sizes))
            .collect();
        Nodes {
            fabric,
            nodes,
            now: 0,
        }
    }

    pub fn pair() -> Self {
        Nodes::new(2, Chaos::default(), SMALL)
    }

    /// Lets the devices do all that they can do now.
    pub fn settle(&mut self) {
        for _ in 0..10_000 {
            self.now += TICK;
            if !self.fabric.step(self.now) {
                return;
            }
        }
        panic!("the devices do not come to rest");
    }

    pub fn pass(&mut self, nanoseconds: u64) {
        self.now += nanoseconds;
        self.settle();
    }

    pub fn two(&mut self) -> (&mut Node, &mut Node) {
        let [a, b] = &mut self.nodes[..] else {
            panic!("not two nodes");
        };
        (a, b)
    }
}

/// Adds a device with two queue sets to a fabric.
fn device(fabric: &Fabric) -> (Arc<dyn Device>, Function, Option<Server>) {
    if env!("CARGO_CRATE_NAME") != "over_vfio_user" {
        let device = ModelDevice::new(fabric, 2);
        let function = device.function().clone();
        return (Arc::new(device), function, None);
    }
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("device.sock");
    let serving = Serving {
        queue_sets: 2,
        trapped: false,
    };
    let server = Server::start(fabric, &socket, serving).unwrap();
    let function = server.function().clone();
    let device = UserDevice::connect(&socket).unwrap();
    let device = LookedAt::new(device, function.clone());
    (Arc::new(device), function, Some(server))
}

fn node(fabric: &Fabric, id: u16, count: u16, sizes: Sizes) -> Node {
    let (device, function, server) = device(fabric);
    let rde = Rde::open(Space::new(device)).unwrap();
    let peers: Vec<u16> = (1..=count).collect();
    rde.management().join(id, &peers);
    let set = rde.queue_set(0, sizes).unwrap();
    let memory = Arc::new(rde.space().allocate(2 * MEMORY).unwrap());
    let view = |at| Shared::new(&memory, at, MEMORY).unwrap();
    let region = rde.register(view(0), Rights::ReadWrite, None).unwrap();
    Node {
        function,
        set,
        region,
        local: view(MEMORY),
        rde,
        server,
    }
}

/// A write of `len` bytes of local memory, with a report.
pub fn write<'a>(to: Remote, data: Data<'a>) -> Operation<'a> {
    Operation::Write {
        to,
        data,
        word: None,
        notify: None,
    }
}

pub fn work(target: u16, tag: u64, operation: Operation<'_>) -> Work<'_> {
    Work {
        target,
        operation,
        tag,
        report: true,
    }
}
