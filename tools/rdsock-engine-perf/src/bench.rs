//! Two nodes on models, and one thread that drives both.

use crate::cli::Devices;
use crate::plan::{Error, Plan};
use rdsock_model::{Chaos, Counters, Fabric, Running};
use rdsock_rde::{Message, QueueSet, Rde, Region, Remote, Rights, Sizes};
use rdsock_vfio::{Piece, Shared, Space, model::ModelDevice};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Empty polls between two looks at the clock.
pub const POLLS: u32 = 1 << 16;

/// One node.
pub struct Node {
    pub device: Arc<ModelDevice>,
    pub set: QueueSet,
    pub region: Region,
    pub piece: [Piece; 1],
    pub rde: Rde,
}

/// Both nodes, and who runs their devices.
pub struct Bench {
    pub nodes: [Node; 2],
    fabric: Fabric,
    start: Instant,
    thread: Option<Running>,
}

impl Bench {
    /// Makes two nodes with memory of the planned size.
    pub fn new(plan: &Plan) -> Result<Self, Error> {
        let fabric = Fabric::new(Chaos::default());
        let device = || Arc::new(ModelDevice::new(&fabric, 1));
        let nodes = [node(device(), 1, plan.size)?, node(device(), 2, plan.size)?];
        let core = plan.device_core;
        let thread = match plan.devices {
            Devices::Inline | Devices::Linked => None,
            Devices::Thread => {
                let pin = move || {
                    core.map(core_affinity::set_for_current);
                };
                Some(Running::start(fabric.clone(), true, pin).map_err(Error::Thread)?)
            }
        };
        Ok(Bench {
            nodes,
            fabric,
            start: Instant::now(),
            thread,
        })
    }

    /// What both devices have done, once nothing moves.
    pub fn counters(&self) -> [Counters; 2] {
        let counters = |node: &Node| node.device.function().counters();
        [counters(&self.nodes[0]), counters(&self.nodes[1])]
    }

    /// Where node `from` writes to at the other one.
    pub fn remote(&self, from: usize) -> Remote {
        Remote {
            key: self.nodes[1 - from].region.key(),
            offset: 0,
        }
    }

    /// Polls a node until `take` gets something of it.
    pub fn until<T>(
        &mut self,
        node: usize,
        mut take: impl FnMut(&mut QueueSet) -> Result<Option<T>, Error>,
    ) -> Result<T, Error> {
        let mut since = None;
        loop {
            for _ in 0..POLLS {
                if self.thread.is_none() {
                    self.fabric.step(self.start.elapsed().as_nanos() as u64);
                }
                if let Some(got) = take(&mut self.nodes[node].set)? {
                    return Ok(got);
                }
                std::hint::spin_loop();
            }
            if since.get_or_insert_with(Instant::now).elapsed() > Duration::from_secs(1) {
                self.nodes[node].set.check()?;
                return Err(Error::Silence);
            }
        }
    }

    /// Waits for the next message at a node.
    pub fn message(&mut self, node: usize) -> Result<Message, Error> {
        self.until(node, |set| {
            let mut got = None;
            set.poll_messages(1, |message| got = Some(*message))?;
            Ok(got)
        })
    }
}

/// Makes node 1 or 2 of a device, with memory for operations of a size.
pub fn node(device: Arc<ModelDevice>, id: u16, size: u32) -> Result<Node, Error> {
    let rde = Rde::open(Space::new(device.clone()))?;
    let half = size.next_multiple_of(64) as usize;
    let memory = Arc::new(rde.space().allocate(2 * half)?);
    let missing = || rdsock_vfio::BusError::BadLength(size as usize);
    let view = |at| Shared::new(&memory, at, size as usize).ok_or_else(missing);
    let region = rde.register(view(0)?, Rights::Write, None)?;
    let local = view(half)?;
    let set = rde.queue_set(0, Sizes::default())?;
    // Last: a message to a node that is there, but does not run the queue set, fails.
    rde.management().join(id, &[1, 2]);
    Ok(Node {
        set,
        region,
        piece: [local.piece(0, size).ok_or_else(missing)?],
        device,
        rde,
    })
}
