//! All links of a process: what it tells everybody of its own node, and who has come and gone.

use crate::device::{Access, BusError};
use crate::link::connection::{Broken, Connection, Sent};
use crate::link::message::{Message, Unreceived, VERSION};
use crate::link::said::Said;
use crate::link::spare::{REMEDY, Spare};
use crate::sealed;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use rdsock_model::{Peers, Wire};
use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Until something that could not be sent is tried again, where nothing tells when.
const LATER: Duration = Duration::from_millis(20);
/// Until something for which there was no descriptor is tried again.
const STARVED: Duration = Duration::from_millis(100);

/// What this process's device reaches, as the others are told.
#[derive(Debug)]
struct Memory {
    len: u64,
    offset: u64,
    writable: bool,
    file: Arc<OwnedFd>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Ends {
    id: u16,
    token: u64,
    port: Arc<OwnedFd>,
    memory: BTreeMap<u64, Memory>,
    vectors: BTreeMap<u64, Arc<OwnedFd>>,
    /// Number of the last change of these.
    change: u64,
    connections: Vec<Connection>,
    /// Tells the waiting thread of everything that comes.
    epoll: Arc<Epoll>,
    spare: Spare,
    said: Said,
    /// When there is more to do, and nothing will tell.
    again: Option<Duration>,
}

/// Event of everything: who is woken looks at all.
fn event(flags: EpollFlags) -> EpollEvent {
    EpollEvent::new(flags, 0)
}

impl Ends {
    pub fn new((id, token): (u16, u64), port: OwnedFd, epoll: Arc<Epoll>) -> Self {
        let mut spare = Spare::default();
        spare.keep(&epoll.0);
        Ends {
            id,
            token,
            port: Arc::new(port),
            memory: BTreeMap::new(),
            vectors: BTreeMap::new(),
            change: 0,
            connections: Vec::new(),
            epoll,
            spare,
            said: Said::default(),
            again: None,
        }
    }

    /// After how long to poll again, though nothing comes.
    pub fn again(&self) -> Option<Duration> {
        self.again
    }

    /// Whether there is a link to a node, or will be when it answers.
    pub fn leads_to(&self, node: u16) -> bool {
        self.connections.iter().any(|c| c.leads_to(node))
    }

    /// Takes a connection that is new: to the node that this process has `dialled`, which is told everything at once, or
    /// from one that has to say first who it is. So a process that had a link before is not told, and not at work here,
    /// before the end of that link was seen.
    pub fn meet(&mut self, socket: OwnedFd, dialled: Option<u16>) -> Result<(), Errno> {
        self.epoll.add(&socket, event(EpollFlags::EPOLLIN))?;
        self.connections.push(Connection::new(socket, dialled));
        if dialled.is_some() {
            self.tell_all(self.connections.len() - 1);
            self.flush();
        }
        Ok(())
    }

    /// Tells a process that is new everything.
    fn tell_all(&mut self, at: usize) {
        let connection = &mut self.connections[at];
        let hello = Message::Hello {
            version: VERSION,
            id: self.id.into(),
            token: self.token,
        };
        connection.queue(hello, None);
        connection.queue(Message::Port, Some(&self.port));
        let change = self.change;
        for (iova, memory) in &self.memory {
            let message = memory.message(change, *iova);
            connection.queue(message, Some(&memory.file));
        }
        for (vector, eventfd) in &self.vectors {
            let vector = *vector;
            connection.queue(Message::Vector { change, vector }, Some(eventfd));
        }
        connection.queue(Message::Ready { change }, None);
        connection.is_told = true;
    }

    /// Cuts all links: another process is this node now.
    pub fn give_up(&mut self, peers: &mut Peers) {
        for at in (0..self.connections.len()).rev() {
            self.cut(at, Broken::Place, peers);
        }
    }

    /// Tells of memory that the device reaches now.
    pub fn map(
        &mut self,
        change: u64,
        iova: u64,
        (file, offset, len): (BorrowedFd<'_>, u64, usize),
        access: Access,
    ) -> Result<(), BusError> {
        let io = |source| BusError::Io {
            what: "sharing DMA memory with linked processes",
            source,
        };
        sealed::check(&file, offset, len as u64).map_err(io)?;
        let memory = Memory {
            len: len as u64,
            offset,
            writable: access == Access::ReadWrite,
            file: Arc::new(file.try_clone_to_owned().map_err(io)?),
        };
        let message = memory.message(change, iova);
        self.tell(change, |c| c.queue(message, Some(&memory.file)));
        self.memory.insert(iova, memory);
        Ok(())
    }

    /// Tells of memory that it does not reach any more.
    pub fn unmap(&mut self, change: u64, iova: u64, len: u64) {
        self.memory.remove(&iova);
        self.tell(change, |c| c.queue_unmap(change, iova, len));
    }

    /// Tells how to fire a vector.
    pub fn set_interrupt(
        &mut self,
        change: u64,
        vector: u32,
        eventfd: Option<BorrowedFd<'_>>,
    ) -> std::io::Result<()> {
        let vector = vector.into();
        let eventfd = eventfd.map(|fd| fd.try_clone_to_owned()).transpose()?;
        let eventfd = eventfd.map(Arc::new);
        self.tell(change, |c| c.queue_vector(change, vector, eventfd.as_ref()));
        match eventfd {
            Some(eventfd) => self.vectors.insert(vector, eventfd),
            None => self.vectors.remove(&vector),
        };
        Ok(())
    }

    fn tell(&mut self, change: u64, queue: impl Fn(&mut Connection)) {
        self.change = change;
        let told = self.connections.iter_mut().filter(|c| c.is_told);
        told.for_each(queue);
        self.flush();
    }

    /// Sends what can be sent. What is broken is found out, and cut, by the next poll.
    fn flush(&mut self) {
        self.again = None;
        for connection in &mut self.connections {
            let mut flags = EpollFlags::EPOLLIN;
            let again = match connection.flush() {
                _ if connection.is_new => Some(Duration::ZERO),
                _ if connection.is_starved => Some(STARVED),
                Ok(Sent::All) => None,
                Ok(Sent::Later) => Some(LATER),
                Ok(Sent::Full) | Err(_) => {
                    flags |= EpollFlags::EPOLLOUT;
                    None
                }
            };
            self.again = self.again.into_iter().chain(again).min();
            // What can't be received now would wake the thread all the time.
            let watched = match (connection.is_watched, !connection.is_starved) {
                (true, true) => self.epoll.modify(&connection.socket, &mut event(flags)),
                (true, false) => self.epoll.delete(&connection.socket),
                (false, true) => self.epoll.add(&connection.socket, event(flags)),
                (false, false) => Ok(()),
            };
            match watched {
                Ok(()) => connection.is_watched = !connection.is_starved,
                // Too little memory.
                Err(_) => self.again = self.again.into_iter().chain([LATER]).min(),
            }
        }
    }

    /// Ends a link.
    fn cut(&mut self, at: usize, broken: Broken, peers: &mut Peers) {
        let connection = &mut self.connections[at];
        let (node, token) = (connection.id(), connection.token());
        match &broken {
            _ if connection.is_ending => tracing::debug!(node, "a cut link is closed"),
            Broken::Receive(Unreceived::Closed) => {
                tracing::info!(node, "a linked process has gone");
            }
            Broken::Double => tracing::debug!(node, "one link is enough"),
            broken => {
                let text = format!("{node}: {broken}");
                if self.said.is_due(&text) {
                    tracing::warn!(node, %broken, "cut the link to another process; it is made anew");
                }
            }
        }
        let is_over = matches!(broken, Broken::Receive(Unreceived::Closed) | Broken::Double);
        if connection.attached && !is_over && !connection.is_ending {
            return connection.end(peers);
        }
        let connection = self.connections.remove(at);
        let lives = self.connections.iter().any(|c| c.token() == token);
        connection.detach(lives && token.is_some(), peers);
    }

    /// Of two links to one node, the one that is to go, when the one `at` has just said who it is.
    fn double(&self, at: usize) -> Option<usize> {
        let new = &self.connections[at];
        let mut others = self.connections.iter().enumerate();
        let (other, old) = others.find(|(n, c)| *n != at && c.id() == new.id())?;
        // A node that has restarted: only one process at a time has its id, so the one before has gone, though perhaps
        // not all of its descriptors. Or a process that has closed the other link. But where each has connected to the
        // other, both must keep the same.
        let crossed = old.token() == new.token() && !old.is_ending;
        match crossed && new.dialler(self.id) < old.dialler(self.id) {
            true => Some(at),
            false => Some(other),
        }
    }

    fn poll(&mut self, peers: &mut Peers) {
        self.spare.keep(&self.epoll.0);
        for at in 0..self.connections.len() {
            let is_new = std::mem::take(&mut self.connections[at].is_new);
            if is_new && !self.connections[at].is_told {
                self.tell_all(at);
            }
        }
        let mut at = 0;
        while let Some(connection) = self.connections.get_mut(at) {
            match connection.receive(self.id, peers, &mut self.spare) {
                Ok(true) => {
                    if let Some(double) = self.double(at) {
                        self.cut(double, Broken::Double, peers);
                        at -= usize::from(double < at);
                    }
                }
                Ok(false) => match connection.flush() {
                    Ok(_) => at += 1,
                    Err(broken) => at = self.cut_at(at, broken, peers),
                },
                Err(broken) => at = self.cut_at(at, broken, peers),
            }
        }
        if self.connections.iter().any(|c| c.is_starved) && self.said.is_due(REMEDY) {
            tracing::warn!("{REMEDY}");
        }
        self.flush();
    }

    /// Ends a link; where the next one is.
    fn cut_at(&mut self, at: usize, broken: Broken, peers: &mut Peers) -> usize {
        let before = self.connections.len();
        self.cut(at, broken, peers);
        at + usize::from(self.connections.len() == before)
    }
}

impl Memory {
    fn message(&self, change: u64, iova: u64) -> Message {
        Message::Map {
            change,
            iova,
            len: self.len,
            offset: self.offset,
            writable: self.writable,
        }
    }
}

/// The ends as the model has them, and the bus. Locked after the fabric.
#[derive(Clone, Debug)]
pub struct SharedEnds(pub Arc<Mutex<Ends>>);

impl SharedEnds {
    pub fn lock(&self) -> MutexGuard<'_, Ends> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wire for SharedEnds {
    fn poll(&mut self, peers: &mut Peers) {
        self.lock().poll(peers);
    }
}
