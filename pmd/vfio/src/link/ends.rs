//! All links of a process: what it tells everybody of its own node, and who has come and gone.

use crate::device::{Access, BusError};
use crate::link::connection::{Broken, Connection, Sent};
use crate::link::message::{Message, Unreceived, VERSION};
use crate::link::place::Place;
use crate::sealed;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{SockFlag, accept4, getsockopt, sockopt::PeerCredentials};
use rdsock_model::{Peers, Wire};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    place: Place,
    id: u16,
    token: u64,
    port: Arc<OwnedFd>,
    memory: BTreeMap<u64, Memory>,
    vectors: BTreeMap<u64, Arc<OwnedFd>>,
    /// Number of the last change of these.
    change: u64,
    connections: Vec<Connection>,
    /// Tells the waiting thread of everything that comes.
    pub epoll: Arc<Epoll>,
    /// Something waits to be sent, and nothing will say when.
    pub later: bool,
}

/// Event of everything: who is woken looks at all.
fn event(flags: EpollFlags) -> EpollEvent {
    EpollEvent::new(flags, 0)
}

impl Ends {
    pub fn new(
        place: Place,
        others: Vec<OwnedFd>,
        (id, token): (u16, u64),
        port: OwnedFd,
        epoll: Arc<Epoll>,
    ) -> Result<Self, Errno> {
        epoll.add(&place.listener, event(EpollFlags::EPOLLIN))?;
        let mut ends = Ends {
            place,
            id,
            token,
            port: Arc::new(port),
            memory: BTreeMap::new(),
            vectors: BTreeMap::new(),
            change: 0,
            connections: Vec::new(),
            epoll,
            later: false,
        };
        for socket in others {
            ends.meet(socket)?;
        }
        Ok(ends)
    }

    /// Tells a process that is new everything, whatever comes from it.
    fn meet(&mut self, socket: OwnedFd) -> Result<(), Errno> {
        self.epoll.add(&socket, event(EpollFlags::EPOLLIN))?;
        let mut connection = Connection::new(socket);
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
        self.connections.push(connection);
        Ok(())
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
        self.tell(change, memory.message(change, iova), Some(&memory.file));
        self.memory.insert(iova, memory);
        Ok(())
    }

    /// Tells of memory that it does not reach any more.
    pub fn unmap(&mut self, change: u64, iova: u64, len: u64) {
        self.memory.remove(&iova);
        self.tell(change, Message::Unmap { change, iova, len }, None);
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
        self.tell(change, Message::Vector { change, vector }, eventfd.as_ref());
        match eventfd {
            Some(eventfd) => self.vectors.insert(vector, eventfd),
            None => self.vectors.remove(&vector),
        };
        Ok(())
    }

    fn tell(&mut self, change: u64, message: Message, file: Option<&Arc<OwnedFd>>) {
        self.change = change;
        for connection in &mut self.connections {
            connection.queue(message, file);
        }
        self.flush();
    }

    /// Sends what can be sent. What is broken is found out, and cut, by the next poll.
    fn flush(&mut self) {
        self.later = false;
        for connection in &mut self.connections {
            let mut flags = EpollFlags::EPOLLIN;
            match connection.flush() {
                Ok(Sent::All) => {}
                Ok(Sent::Later) => self.later = true,
                Ok(Sent::Full) | Err(_) => flags |= EpollFlags::EPOLLOUT,
            }
            // It fails only for a socket that is not there.
            let _ = self.epoll.modify(&connection.socket, &mut event(flags));
        }
    }

    fn accept(&mut self) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        loop {
            let socket = match accept4(self.place.listener.as_raw_fd(), flags) {
                // SAFETY: the kernel made it for this process just now, and nobody else knows it.
                Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
                Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => return,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a link");
                    return;
                }
            };
            let user = getsockopt(&socket, PeerCredentials).map(|peer| peer.uid());
            if user != Ok(nix::unistd::geteuid().as_raw()) {
                tracing::warn!(?user, "refused a link to a process of another user");
                continue;
            }
            if let Err(error) = self.meet(socket) {
                tracing::warn!(%error, "cannot watch a link");
            }
        }
    }

    fn poll(&mut self, peers: &mut Peers) {
        self.accept();
        let id = self.id;
        let works = |connection: &mut Connection| -> Result<(), Broken> {
            connection.receive(id, peers)?;
            connection.flush().map(|_| ())
        };
        let mut works = works;
        let mut gone = Vec::new();
        for (i, connection) in self.connections.iter_mut().enumerate() {
            if let Err(broken) = works(connection) {
                gone.push((i, broken));
            }
        }
        for (i, broken) in gone.into_iter().rev() {
            let connection = self.connections.remove(i);
            connection.detach(peers);
            let node = connection.id();
            match broken {
                Broken::Receive(Unreceived::Closed) => {
                    tracing::info!(node, "a linked process has gone")
                }
                broken => tracing::warn!(node, %broken, "cut the link to another process"),
            }
        }
        self.flush();
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
