//! Serves a model of the device over a vfio-user socket: to a driver in another process ([`crate::user`]), or to a
//! virtual machine (QEMU's `vfio-user-pci`), whose guest sees a PCI device behind its IOMMU.
//!
//! The counterpart is the client, which is not believed: it can harm its own device, and nothing else. There is one
//! at a time; when it goes, the device is reset and reaches no memory.
//!
//! The queue pages are memory that the client maps, and that the model looks at; the other registers are messages.

mod config_space;
mod memory;
mod session;

use crate::translation::Translation;
use crate::user::message::{Header, flag};
use crate::user::socket::{Broken, Received, receive, send};
use memory::ServedMemory;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType};
use rdsock_files::SocketFile;
use rdsock_model::{Fabric, Function};
use session::{MOST_DATA, Session};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a client may take in the middle of a message, or to take an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How a device is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serving {
    /// Its queue sets: a power of two up to 256, since BARs are.
    pub queue_sets: usize,
    /// Makes each access to a queue page a message, so that it is counted as on the bus of a real device. Else the
    /// pages are mapped, and the model sees only what they hold when it looks.
    pub trapped: bool,
}

/// A served device. Dropping it ends that.
#[derive(Debug)]
pub struct Server {
    function: Function,
    _file: SocketFile,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Adds a device to a fabric, and serves it to whoever connects to the socket that it makes at `path`. A socket that
    /// was left there by a server that has died is replaced.
    pub fn start(fabric: &Fabric, path: &Path, serving: Serving) -> std::io::Result<Self> {
        if !serving.queue_sets.is_power_of_two() || serving.queue_sets > 256 {
            let expected = "the number of queue sets is not a power of two up to 256";
            return Err(std::io::Error::other(expected));
        }
        let (listener, file) = listen(path)?;
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let translation = Arc::new(Translation::default());
        let (memory, pages) = ServedMemory::make(serving.queue_sets)?;
        let function = fabric.add_in(translation.clone(), serving.queue_sets, Arc::new(memory));
        let pages = (!serving.trapped).then_some(pages);
        let mut session = Session::new(function.clone(), translation, pages);
        let stopped = stop.clone();
        let name = path.display().to_string();
        let thread = std::thread::Builder::new()
            .name("rde-serve".into())
            .spawn(move || serve(&listener, &stopped, &mut session, &name))?;
        Ok(Server {
            function,
            _file: file,
            stop,
            thread: Some(thread),
        })
    }

    /// The model's side: faults, counters.
    pub fn function(&self) -> &Function {
        &self.function
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It fails only when 2^64 - 2 are pending: the thread is told either way.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed by the panic hook; there is nothing to add.
            let _ = thread.join();
        }
    }
}

/// Makes the socket, unless something else is there.
fn listen(path: &Path) -> std::io::Result<(UnixListener, SocketFile)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // Who comes has the place of a node. Somebody else is let in by whoever changes the file.
    let file = SocketFile::bind(&socket, path, Some(0o600))?;
    socket::listen(&socket, Backlog::MAXALLOWABLE)?;
    Ok((socket.into(), file))
}

/// Why a conversation with a client has ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Stopped,
    Client(Broken),
}

/// Serves one client after the other.
fn serve(listener: &UnixListener, stop: &EventFd, session: &mut Session, name: &str) {
    loop {
        let [stopped, comes, _] = wait(stop, listener, None);
        if stopped {
            return;
        }
        let Some(client) = accept(listener).filter(|_| comes) else {
            continue;
        };
        tracing::info!(socket = name, "a client has come");
        let end = talk(&client, listener, stop, session);
        session.end();
        match end {
            End::Stopped => return,
            End::Client(Broken::Closed) => tracing::info!(socket = name, "the client has gone"),
            End::Client(broken) => {
                tracing::warn!(socket = name, "dropped a client that {broken}");
            }
        }
    }
}

fn talk(client: &OwnedFd, listener: &UnixListener, stop: &EventFd, session: &mut Session) -> End {
    loop {
        let [stopped, another, speaks] = wait(stop, listener, Some(client));
        if stopped {
            return End::Stopped;
        }
        // First this client: perhaps it has gone, and the other one comes in its place.
        if speaks {
            if let Err(broken) = answer(client, session) {
                return End::Client(broken);
            }
        } else if another && accept(listener).is_some() {
            tracing::warn!("refused a second client while there is one");
        }
    }
}

/// Takes one message, and answers it.
fn answer(client: &OwnedFd, session: &mut Session) -> Result<(), Broken> {
    let deadline = Instant::now() + PATIENCE;
    let message: Received = receive(client, deadline, MOST_DATA + 64)?;
    let asked = message.header;
    if asked.flags & flag::TYPE != 0 {
        // An answer, though nothing was asked.
        return Err(Broken::Size);
    }
    let handled = session.handle(message);
    if asked.flags & flag::NO_REPLY != 0 {
        return Ok(());
    }
    let mut header = Header {
        flags: flag::REPLY,
        ..asked
    };
    let reply = handled.unwrap_or_else(|errno| {
        tracing::debug!(command = asked.command, %errno, "refused what a client asks for");
        header.flags |= flag::ERROR;
        header.error = errno as u32;
        Default::default()
    });
    let deadline = Instant::now() + PATIENCE;
    let files = Vec::from_iter(reply.file);
    send(client, deadline, header, &[&reply.body], &files)
}

/// Waits until one of them is ready; which are.
fn wait(stop: &EventFd, listener: &UnixListener, client: Option<&OwnedFd>) -> [bool; 3] {
    let interest = |fd| PollFd::new(fd, PollFlags::POLLIN);
    let mut fds = vec![interest(stop.as_fd()), interest(listener.as_fd())];
    fds.extend(client.map(|client| interest(client.as_fd())));
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(%error, "cannot wait for clients any more");
                return [true, false, false];
            }
            Ok(_) => break,
        }
    }
    let ready = |i: usize| fds.get(i).is_some_and(|fd| fd.any() == Some(true));
    [ready(0), ready(1), ready(2)]
}

fn accept(listener: &UnixListener) -> Option<OwnedFd> {
    match listener.accept() {
        Ok((client, _)) => Some(client.into()),
        Err(error) => {
            if error.kind() != std::io::ErrorKind::WouldBlock {
                tracing::warn!(%error, "cannot accept a client");
                // Out of descriptors, say: not to be asked again at once.
                std::thread::sleep(Duration::from_millis(100));
            }
            None
        }
    }
}
