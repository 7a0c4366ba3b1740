//! The link to one other process: what it has told of its node, and what it has not been told yet.

use crate::fire::fire;
use crate::link::memory::{self, SharedPort};
use crate::link::message::{Message, Unreceived, VERSION};
use crate::link::spare::Spare;
use crate::translation::Translation;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};
use rdsock_model::{Interrupt, Peers};
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a process that has connected may take to say who it is.
const GREETING: Duration = Duration::from_secs(10);

/// See the module's text.
#[derive(Debug)]
pub struct Connection {
    pub socket: OwnedFd,
    /// The node whose socket this process has connected to; `None` when the other one has connected.
    dialled: Option<u16>,
    since: Instant,
    /// What the other process does not know yet. What has become void is taken out, so there is never more than
    /// what is mapped, and was when the other one took something last, however long it takes nothing.
    outbox: VecDeque<(Message, Option<Arc<OwnedFd>>)>,
    /// It is told of all changes.
    pub is_told: bool,
    /// It has said who it is since the last look: it is told at the next one.
    pub is_new: bool,
    /// There was no descriptor for a file that it sent.
    pub is_starved: bool,
    /// Epoll looks at it.
    pub is_watched: bool,
    /// Id and token, once it has said them.
    hello: Option<(u16, u64)>,
    translation: Arc<Translation>,
    /// The model knows the node, or knew it.
    pub attached: bool,
    /// This process has cut the link, and the other one has not closed it yet.
    pub is_ending: bool,
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
    #[error("it does not say who it is")]
    Silent,
    #[error("there is another link to the same process")]
    Double,
    #[error("another process is this node now")]
    Place,
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
    /// Takes a socket that is connected, by this process with the node that it has `dialled`, or by the other one.
    pub fn new(socket: OwnedFd, dialled: Option<u16>) -> Self {
        Connection {
            socket,
            dialled,
            since: Instant::now(),
            outbox: VecDeque::new(),
            is_told: false,
            is_new: false,
            is_starved: false,
            is_watched: true,
            is_ending: false,
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

    /// What it puts into locks.
    pub fn token(&self) -> Option<u64> {
        self.hello.map(|(_, token)| token)
    }

    /// Whether the other end is this node, or will be when it answers.
    pub fn leads_to(&self, node: u16) -> bool {
        self.id() == node || self.dialled == Some(node)
    }

    /// The node that has connected.
    pub fn dialler(&self, own_id: u16) -> u16 {
        self.dialled.map_or(self.id(), |_| own_id)
    }

    /// Queues a message.
    pub fn queue(&mut self, message: Message, file: Option<&Arc<OwnedFd>>) {
        self.outbox.push_back((message, file.cloned()));
    }

    /// Queues that memory is not reached any more.
    pub fn queue_unmap(&mut self, change: u64, iova: u64, len: u64) {
        let unsent = |(message, _): &(Message, _)| matches!(message, Message::Map { iova: at, .. } if *at == iova);
        let Some(at) = self.outbox.iter().rposition(unsent) else {
            return self.queue(Message::Unmap { change, iova, len }, None);
        };
        // It need not know that there was some.
        self.outbox.remove(at);
        if matches!(self.outbox.back(), Some((Message::Ready { .. }, _))) {
            self.outbox.pop_back();
        }
        self.queue(Message::Ready { change }, None);
    }

    /// Queues how to fire a vector.
    pub fn queue_vector(&mut self, change: u64, vector: u64, eventfd: Option<&Arc<OwnedFd>>) {
        let same = |message: &Message| matches!(message, Message::Vector { vector: v, .. } if *v == vector);
        self.outbox.retain(|(message, _)| !same(message));
        self.queue(Message::Vector { change, vector }, eventfd);
    }

    /// Sends what the socket takes.
    pub fn flush(&mut self) -> Result<Sent, Broken> {
        while let Some((message, file)) = self.outbox.front() {
            match message.send(&self.socket, file.as_deref()) {
                Ok(()) => {
                    self.outbox.pop_front();
                }
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

    /// Takes in what has come. True when it stopped after it was told who is there, and is to be called again.
    pub fn receive(
        &mut self,
        own_id: u16,
        peers: &mut Peers,
        spare: &mut Spare,
    ) -> Result<bool, Broken> {
        if self.is_ending {
            return self.drain();
        }
        if self.attached && !peers.knows(self.id()) {
            return Err(Broken::Stopped);
        }
        self.is_starved = false;
        loop {
            match Message::receive(&self.socket, spare) {
                Ok((message, file)) => {
                    self.apply(message, file, own_id, peers)?;
                    if matches!(message, Message::Hello { .. }) {
                        return Ok(true);
                    }
                }
                Err(Unreceived::NoDescriptor) => {
                    self.is_starved = true;
                    return Ok(false);
                }
                Err(Unreceived::Nothing) if self.is_late() => return Err(Broken::Silent),
                Err(Unreceived::Nothing) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// It has connected, and not said why. Who was connected to may take his time: he may be stopped.
    fn is_late(&self) -> bool {
        self.hello.is_none() && self.dialled.is_none() && self.since.elapsed() > GREETING
    }

    /// Lets the model forget the node, and asks the other process to close the link, too. It may be at work in this
    /// process's port until it does.
    pub fn end(&mut self, peers: &mut Peers) {
        peers.release(self.id());
        self.is_ending = true;
        self.is_told = false;
        self.outbox.clear();
        // It fails when the other one has closed.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Write);
    }

    /// Lets the model forget the node of a link that is over. A process that `lives`, linked in another way, releases by
    /// itself what it has locked.
    pub fn detach(&self, lives: bool, peers: &mut Peers) {
        if self.attached && !self.is_ending {
            peers.release(self.id());
        }
        if let (true, false, Some(token)) = (self.attached, lives, self.token()) {
            peers.bury(token);
        }
    }

    /// Waits for the other process to close.
    fn drain(&self) -> Result<bool, Broken> {
        loop {
            match recv(self.socket.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT) {
                Ok(0) | Err(Errno::ECONNRESET) => return Err(Unreceived::Closed.into()),
                Ok(_) => {}
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(false),
                Err(error) => return Err(Unreceived::from(error).into()),
            }
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
                let usable = u16::try_from(id).ok();
                let usable = usable.filter(|id| *id != 0 && *id != own_id);
                let usable = usable.filter(|id| self.dialled.is_none_or(|node| node == *id));
                let id = usable.ok_or(Broken::Id(id))?;
                self.hello = Some((id, token));
                self.is_new = true;
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
                if !std::mem::replace(&mut self.ready, true) {
                    tracing::info!(node = self.id(), "linked with another process");
                }
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
