//! Links between models in different processes of one machine.
//!
//! Each process has one device. The processes meet in a directory, in which each listens as `NODE.sock`, and
//! connects to those that are there, so that there is a link between each two. Over it each tells
//! the other of its device's port and of the memory that it reaches, as files; after that the engine of the one
//! works in the other's memory by itself (see [`rdsock_model::Wire`]), and the link is silent until something
//! changes. A thread waits for that. When a process ends, the kernel closes its links: the others forget its
//! node, and unmap its memory. If it comes back, it is a new node.
//!
//! A link that is missing is made again, whatever has happened to it, to the processes or to the directory: the
//! thread looks once a second (`watch.rs`). When descriptors are short nothing is cut: what needs one waits.
//!
//! The directory stands for the wire between real devices, and for more: who may connect there can write into
//! the memory of every node that is linked. It has to belong to the user, with mode 0700; processes of other
//! users are refused.
//!
//! What comes over a link is checked. It can make this process drop the link, and nothing else.

mod connection;
mod ends;
mod memory;
mod message;
mod place;
mod said;
mod spare;
mod watch;

use crate::device::{Access, BusError};
use ends::{Ends, SharedEnds};
use memory::SharedPort;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use place::{Place, io};
use rdsock_model::sheet::MAX_NODE;
use rdsock_model::{Dma, Fabric, Function};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::num::NonZeroU64;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use watch::{STOP, Watch};

/// Why a device could not be linked.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// A system call failed.
    #[error("{what} ({}): {source}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Others than this user could come in.
    #[error(
        "{} is no directory of user {user} alone (owner {owner}, mode {mode:o}): who can enter it can write into the memory of every node; use one with mode 700",
        dir.display()
    )]
    Open {
        /// The directory.
        dir: PathBuf,
        /// The user of this process.
        user: u32,
        /// The directory's owner.
        owner: u32,
        /// Its mode.
        mode: u32,
    },
    /// Another process has the node id.
    #[error("node {id} runs already in another process that is linked through {}", dir.display())]
    Taken {
        /// The id.
        id: u16,
        /// The directory.
        dir: PathBuf,
    },
    /// Something stands in a node's place that no node has made.
    #[error("{} is not what a node makes there: it is left alone; move it away", path.display())]
    Foreign {
        /// It.
        path: PathBuf,
    },
    /// There is no such node id.
    #[error("{0} is no node id: they are 1 to {MAX_NODE}")]
    BadId(u16),
}

impl LinkError {
    /// What the system said.
    fn errno(&self) -> Errno {
        match self {
            LinkError::Io { source, .. } => {
                (source.raw_os_error()).map_or(Errno::UnknownErrno, Errno::from_raw)
            }
            _ => Errno::UnknownErrno,
        }
    }
}

/// The links of a device.
#[derive(Debug)]
pub(crate) struct Link {
    fabric: Fabric,
    ends: SharedEnds,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    /// Adds a device to a fabric that has none, and links it with those of the processes that meet in `dir`.
    pub fn connect(
        fabric: &Fabric,
        dir: &Path,
        id: u16,
        dma: Arc<dyn Dma>,
        queue_sets: usize,
    ) -> Result<(Self, Function), LinkError> {
        if id == 0 || u32::from(id) > MAX_NODE {
            return Err(LinkError::BadId(id));
        }
        let (port, file) = SharedPort::make().map_err(io("making a port", dir))?;
        let watch = |error: nix::Error| io("watching links", dir)(error.into());
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(watch)?);
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(watch)?);
        let stopping = EpollEvent::new(EpollFlags::EPOLLIN, STOP);
        epoll.add(&*stop, stopping).map_err(watch)?;
        let place = Place::take(dir, id)?;
        let token = NonZeroU64::MIN | RandomState::new().build_hasher().finish();
        let names = (id, token.get());
        let ends = Ends::new(names, file.into(), epoll.clone());
        let ends = SharedEnds(Arc::new(Mutex::new(ends)));
        let wire = Box::new(ends.clone());
        let function = fabric.connect((id, token), wire, Arc::new(port), dma, queue_sets);
        let mut link = Link {
            fabric: fabric.clone(),
            ends: ends.clone(),
            stop,
            thread: None,
        };
        let mut watch = Watch::new(fabric.clone(), ends, place, epoll);
        watch.look();
        let thread = std::thread::Builder::new()
            .name("rde-link".into())
            .spawn(move || watch.run());
        link.thread = Some(thread.map_err(io("starting the thread that waits for links", dir))?);
        Ok((link, function))
    }

    /// Tells of memory that the device reaches from change number `change` on.
    pub fn map(
        &self,
        change: u64,
        iova: u64,
        file: (BorrowedFd<'_>, u64, usize),
        access: Access,
    ) -> Result<(), BusError> {
        self.ends.lock().map(change, iova, file, access)
    }

    /// Tells of memory that it does not reach any more.
    pub fn unmap(&self, change: u64, iova: u64, len: usize) {
        self.ends.lock().unmap(change, iova, len as u64);
    }

    /// Tells how to fire a vector.
    pub fn set_interrupt(
        &self,
        change: u64,
        vector: u32,
        eventfd: Option<BorrowedFd<'_>>,
    ) -> Result<(), BusError> {
        let told = self.ends.lock().set_interrupt(change, vector, eventfd);
        told.map_err(|source| BusError::Io {
            what: "sharing an interrupt with linked processes",
            source,
        })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // It fails only when 2^64 - 2 are pending: the thread is told either way.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed by the panic hook; there is nothing to add.
            let _ = thread.join();
        }
        self.fabric.disconnect();
    }
}
