//! A node: an rde behind the kernel's VFIO, with a running queue set and memory.

use crate::{Outcome, check};
use rdsock_rde::spec::{GONE, Status, management};
use rdsock_rde::{Data, Message, Operation, QueueSet, Rde, Region, Remote, Rights, Sizes, Work};
use rdsock_vfio::vfio::{PciAddress, PciDevice, Way};
use rdsock_vfio::{Device, Shared, Space};
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes that the other node may reach.
pub const MEMORY: usize = 4 << 20;
/// How long the emulated machine gets for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where a device is, and how it is opened.
#[derive(Clone, Debug)]
pub struct Place {
    pub address: PciAddress,
    pub way: Way,
}

impl Place {
    pub fn parse(address: &str, way: &str) -> Result<Self, Box<dyn Error>> {
        let way = match way {
            "group" => Way::Group,
            "iommufd" => Way::Iommufd,
            _ => return Err(format!("{way} is no way to open a device").into()),
        };
        let address = address.parse()?;
        Ok(Place { address, way })
    }

    /// As on a command line.
    pub fn words(&self) -> [String; 2] {
        let way = match self.way {
            Way::Group => "group",
            Way::Iommufd => "iommufd",
        };
        [self.address.to_string(), way.into()]
    }
}

/// In the order in which they must go.
pub struct Node {
    pub id: u16,
    pub set: QueueSet,
    /// The first half of the memory.
    pub region: Region,
    /// The second half, which only this node's descriptors name.
    pub local: Shared,
    pub huge: bool,
    pub rde: Rde,
    pub device: Arc<PciDevice>,
}

impl Node {
    /// Opens the device as node `id`. `kept` says whether the kernel module is expected to keep its management page.
    pub fn open(place: &Place, id: u16, kept: bool) -> Result<Self, Box<dyn Error>> {
        let device = Arc::new(PciDevice::open_by(&place.address, place.way)?);
        let rde = Rde::open(Space::new(device.clone()))?;
        let management = rde.management();
        if management.is_kept() != kept {
            return Err(format!("KEPT is {}", management.is_kept()).into());
        }
        management.join(id, &[1, 2]);
        if management.node() != u32::from(id) {
            return Err(format!("it is node {}", management.node()).into());
        }
        wait("a link", || Ok(management.status().link_up()))?;
        let set = rde.queue_set(0, Sizes::default())?;
        let memory = rde.space().allocate(2 * MEMORY)?;
        let huge = memory.is_huge();
        let memory = Arc::new(memory);
        let half = |at| Shared::new(&memory, at, MEMORY).ok_or("no memory");
        let region = rde.register(half(0)?, Rights::ReadWrite, None)?;
        Ok(Node {
            id,
            set,
            region,
            local: half(MEMORY)?,
            huge,
            rde,
            device,
        })
    }

    pub fn remote(&self, offset: u64) -> Remote {
        let key = self.region.key();
        Remote { key, offset }
    }

    /// Does an operation on a node, and waits for what became of it.
    pub fn finish(
        &mut self,
        target: u16,
        operation: Operation<'_>,
    ) -> Result<Status, Box<dyn Error>> {
        self.set.post(&Work {
            target,
            operation,
            tag: 77,
            report: true,
        })?;
        self.set.ring();
        let mut status = None;
        wait("a completion", || {
            self.set
                .poll_completions(64, |done| status = Some(done.status))?;
            Ok(status.is_some())
        })?;
        Ok(status.ok_or("no completion")?)
    }

    /// Writes a few bytes.
    pub fn write(&mut self, target: u16, to: Remote) -> Result<Status, Box<dyn Error>> {
        let data = Data::Inline(b"these bytes must not arrive");
        self.finish(
            target,
            Operation::Write {
                to,
                data,
                word: None,
                notify: None,
            },
        )
    }

    /// Reads a few bytes.
    pub fn read(&mut self, target: u16, from: Remote) -> Result<(Status, u64), Box<dyn Error>> {
        let into = [self.local.piece(0, 8).ok_or("no piece")?];
        let status = self.finish(target, Operation::Read { from, into: &into })?;
        Ok((status, self.local.load_word(0).ok_or("no word")?))
    }

    /// Waits for a message.
    pub fn message(&mut self) -> Result<Message, Box<dyn Error>> {
        let mut found = None;
        wait("a message", || {
            self.set.poll_completions(64, |_| ())?;
            self.set
                .poll_messages(1, |message| found = Some(*message))?;
            Ok(found.is_some())
        })?;
        Ok(found.ok_or("no message")?)
    }
}

/// Waits until something is so.
pub fn wait(what: &str, mut ready: impl FnMut() -> Result<bool, Box<dyn Error>>) -> Outcome {
    let start = Instant::now();
    while !ready()? {
        if start.elapsed() > PATIENCE {
            return Err(format!("waited in vain for {what}").into());
        }
        std::thread::yield_now();
    }
    Ok(())
}

/// The page is not the driver's: stores do nothing, and loads beyond what is shown fail.
pub fn page_is_kept(node: &Node) -> Outcome {
    let bar0 = node.device.registers(0)?;
    bar0.write32(management::NODE_ID, 9);
    bar0.write64(management::PEERS, u64::MAX);
    bar0.write32(management::CONTROL, 0);
    let is = bar0.read32(management::NODE_ID);
    check(is == u32::from(node.id), || format!("it is node {is}"))?;
    check(node.rde.management().status().link_up(), || {
        "it has left the fabric".into()
    })?;
    let (peers, status) = (
        bar0.read64(management::PEERS),
        bar0.read32(management::STATUS),
    );
    check(peers == u64::MAX && status == GONE, || {
        format!("PEERS reads {peers:#x}, STATUS {status:#x}")
    })
}
