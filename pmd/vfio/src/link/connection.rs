//! The link to one other process: what it has told of its node, and what it has not been told yet.

use crate::fire::fire;
use crate::link::memory::{self, SharedPort};
use crate::link::message::{Message, Unreceived, VERSION};
use crate::translation::Translation;
use nix::errno::Errno;
use rdsock_model::{Interrupt, Peers};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Messages that may wait for a process that does not take them. One that lives is never so far behind.
const MAX_QUEUED: usize = 1 << 17;

/// See the module's text.
#[derive(Debug)]
pub struct Connection {
    pub socket: OwnedFd,
    outbox: VecDeque<(Message, Option<Arc<OwnedFd>>)>,
    /// Id and token, once it has said them.
    hello: Option<(u16, u64)>,
    translation: Arc<Translation>,
    /// The model knows the node.
    attached: bool,
    /// The node's memory is known, and each change of it is announced from now on.
    ready: bool,
}

/// Why a link is cut.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    #[error(transparent)]
    Receive(#[from] Unreceived),
    #[error(
        "it speaks version {0} of the link, and this process {VERSION}: build both of one release"
    )]
    Version(u64),
    #[error("it says that it is node {0}")]
    Id(u64),
    #[error("its message {0:?} makes no sense now")]
    Order(Message),
    #[error("it names memory that cannot be mapped here: {0}")]
    Memory(String),
    #[error("it takes no messages")]
    Deaf,
    #[error("cannot send: {0}")]
    Send(Errno),
    #[error("it was stopped while it worked on this node's memory")]
    Stopped,
}

/// How far sending came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Everything.
    All,
    /// The socket is full, and will say when it is not.
    Full,
    /// Too many files are on their way, or there is no memory: nothing will say when that ends.
    Later,
}

impl Connection {
    /// Takes a connected socket.
    pub fn new(socket: OwnedFd) -> Self {
        Connection {
            socket,
            outbox: VecDeque::new(),
            hello: None,
            translation: Arc::default(),
            attached: false,
            ready: false,
        }
    }

    /// The node at the other end, 0 as long as it has not said.
    pub fn id(&self) -> u16 {
        self.hello.map_or(0, |(id, _)| id)
    }

    /// Queues a message.
    pub fn queue(&mut self, message: Message, file: Option<&Arc<OwnedFd>>) {
        self.outbox.push_back((message, file.cloned()));
    }

    /// Sends what the socket takes.
    pub fn flush(&mut self) -> Result<Sent, Broken> {
        while let Some((message, file)) = self.outbox.front() {
            match message.send(&self.socket, file.as_deref()) {
                Ok(()) => {
                    self.outbox.pop_front();
                }
                Err(_) if self.outbox.len() > MAX_QUEUED => return Err(Broken::Deaf),
                Err(Errno::EAGAIN) => return Ok(Sent::Full),
                Err(Errno::EINTR) => {}
                Err(Errno::ETOOMANYREFS | Errno::ENOBUFS | Errno::ENOMEM) => {
                    return Ok(Sent::Later);
                }
                // It says why with what it has sent, or closed.
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Ok(Sent::All),
                Err(error) => return Err(Broken::Send(error)),
            }
        }
        Ok(Sent::All)
    }

    /// Takes in all that has come.
    pub fn receive(&mut self, own_id: u16, peers: &mut Peers) -> Result<(), Broken> {
        if self.attached && !peers.knows(self.id()) {
            return Err(Broken::Stopped);
        }
        loop {
            match Message::receive(&self.socket) {
                Ok((message, file)) => self.apply(message, file, own_id, peers)?,
                Err(Unreceived::Nothing) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Lets the model forget the node.
    pub fn detach(&self, peers: &mut Peers) {
        if self.attached {
            peers.detach(self.id());
        }
    }

    fn apply(
        &mut self,
        message: Message,
        file: Option<OwnedFd>,
        own_id: u16,
        peers: &mut Peers,
    ) -> Result<(), Broken> {
        let unmapped = |error: std::io::Error| Broken::Memory(error.to_string());
        let change = match (message, file, self.hello) {
            (Message::Hello { version, .. }, None, None) if version != VERSION => {
                return Err(Broken::Version(version));
            }
            (Message::Hello { id, token, .. }, None, None) => {
                let usable = u16::try_from(id).ok().filter(|id| *id != own_id);
                let id = usable.ok_or(Broken::Id(id))?;
                self.hello = Some((id, token));
                return Ok(());
            }
            (Message::Port, Some(file), Some((id, token))) if !self.attached => {
                let port = Arc::new(SharedPort::map(&file).map_err(unmapped)?);
                if !peers.attach(id, token, port, self.translation.clone()) {
                    return Err(Broken::Id(id.into()));
                }
                self.attached = true;
                return Ok(());
            }
            (
                Message::Map {
                    change,
                    iova,
                    len,
                    offset,
                    writable,
                },
                Some(file),
                _,
            ) if self.attached => {
                let mapping = memory::map(&file, offset, len, writable).map_err(unmapped)?;
                let inserted = self.translation.insert(iova, mapping);
                inserted.map_err(|error| Broken::Memory(error.to_string()))?;
                change
            }
            (Message::Unmap { change, iova, len }, None, _) if self.attached => {
                let removed = self.translation.remove(iova, len);
                removed.map_err(|error| Broken::Memory(error.to_string()))?;
                change
            }
            (Message::Vector { change, vector }, file, _) if self.attached && vector <= 256 => {
                let interrupt =
                    file.map(|eventfd| -> Interrupt { Arc::new(move || fire(&eventfd)) });
                peers.set_interrupt(self.id(), vector as u16, interrupt);
                change
            }
            (Message::Ready { change }, None, _) if self.attached => {
                self.ready = true;
                tracing::info!(node = self.id(), "linked with another process");
                change
            }
            (message, ..) => return Err(Broken::Order(message)),
        };
        if self.ready {
            peers.caught_up(self.id(), change);
        }
        Ok(())
    }
}
