//! Sentries: threads that wait for what strangers also wait for, a process to end, or a message on a socket that was handed over.
//!
//! Whoever waits stands in a line with all who do, anybody's. When it comes to pass the kernel wakes the whole line, and who comes
//! or goes meanwhile waits: for half a second where millions stand there. So the control thread neither comes nor goes: it orders that
//! here, and is told as porters tell it.

use std::any::Any;
use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tracing::debug;

/// In place of a connection: there are orders.
const ORDERS: u64 = 0;

/// What is waited for.
pub trait Awaited: Send + 'static {
    /// By this descriptor.
    fn fd(&self) -> BorrowedFd<'_>;
}

/// What is to be done.
enum Order<T> {
    /// Wait for what is there, for this connection. What is told once is not told again before this is ordered again.
    Watch(u64, T, EpollFlags),
    /// No longer. Until then it is on an account.
    Leave(
        u64,
        #[expect(dead_code, reason = "it is held")] Box<dyn Any + Send>,
    ),
}

/// See the module's text.
pub struct Sentry<T>(Arc<Shared<T>>);

struct Shared<T> {
    epoll: Epoll,
    orders: Mutex<Vec<Order<T>>>,
    /// Written to when there are orders again.
    come: EventFd,
}

impl<T> std::fmt::Debug for Sentry<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Sentry").finish_non_exhaustive()
    }
}

impl<T: Awaited> Sentry<T> {
    /// Starts it. It ends with the process. `tell` is told of each connection for which something has come to pass.
    pub fn start(tell: impl Fn(u64, &T, EpollFlags) + Send + 'static) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let shared = Arc::new(Shared {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            orders: Mutex::default(),
            come: EventFd::from_value_and_flags(0, flags)?,
        });
        let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        shared
            .epoll
            .add(&shared.come, EpollEvent::new(edge, ORDERS))?;
        let own = shared.clone();
        let sentry = thread::Builder::new().name("sentry".into());
        sentry.spawn(move || own.wait(tell))?;
        Ok(Sentry(shared))
    }

    /// Has it wait for one of these flags, once.
    pub fn watch(&self, connection: u64, awaited: T, flags: EpollFlags) {
        self.order(Order::Watch(connection, awaited, flags));
    }

    /// Has it wait no longer. What is waited for is on this account until then.
    pub fn leave(&self, connection: u64, charge: impl Any + Send) {
        self.order(Order::Leave(connection, Box::new(charge)));
    }

    fn order(&self, order: Order<T>) {
        let mut orders = self.0.lock();
        orders.push(order);
        let is_first = orders.len() == 1;
        drop(orders);
        if is_first {
            let _ = self.0.come.write(1);
        }
    }
}

impl<T: Awaited> Shared<T> {
    /// Never held while anything is waited for.
    fn lock(&self) -> MutexGuard<'_, Vec<Order<T>>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, tell: impl Fn(u64, &T, EpollFlags)) -> ! {
        let mut watched: HashMap<u64, T> = HashMap::new();
        loop {
            let mut events = [EpollEvent::empty(); 64];
            let told = self.epoll.wait(&mut events, EpollTimeout::NONE);
            for event in events.iter().take(told.unwrap_or(0)) {
                match event.data() {
                    ORDERS => self.carry_out(&mut watched),
                    connection => {
                        if let Some(awaited) = watched.get(&connection) {
                            tell(connection, awaited, event.events());
                        }
                    }
                }
            }
        }
    }

    fn carry_out(&self, watched: &mut HashMap<u64, T>) {
        for order in std::mem::take(&mut *self.lock()) {
            match order {
                Order::Watch(connection, awaited, flags) => {
                    let mut event = EpollEvent::new(flags | EpollFlags::EPOLLONESHOT, connection);
                    let done = match watched.contains_key(&connection) {
                        true => self.epoll.modify(awaited.fd(), &mut event),
                        false => self.epoll.add(awaited.fd(), event),
                    };
                    if let Err(error) = done {
                        debug!(connection, "it is not waited for: {error}");
                    }
                    watched.insert(connection, awaited);
                }
                Order::Leave(connection, _) => {
                    if let Some(awaited) = watched.remove(&connection) {
                        let _ = self.epoll.delete(awaited.fd());
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Peer;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::sync::mpsc::channel;
    use std::time::Duration;

    /// A process, twice: each connection has a descriptor of its own.
    fn child() -> ([Arc<Peer>; 2], std::process::Child) {
        let listener = tempfile::tempdir().unwrap();
        let path = listener.path().join("s");
        let door = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let script =
            "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\ns.recv(1)";
        let mut command = std::process::Command::new("python3");
        let child = command.args(["-c", script]).arg(&path).spawn().unwrap();
        let (socket, _) = door.accept().unwrap();
        let peers = [(); 2].map(|()| Arc::new(Peer::of(&socket).unwrap()));
        std::mem::forget(socket);
        (peers, child)
    }

    #[test]
    fn who_ends_is_told_of_once_unless_it_has_left() {
        let _alone = crate::own::alone();
        let (tell, told) = channel();
        let sentry = Sentry::start(move |connection, peer: &Arc<Peer>, _| {
            tell.send((connection, peer.pid)).unwrap();
        });
        let sentry = sentry.unwrap();
        let ([first, second], mut its) = child();
        let end = EpollFlags::EPOLLIN;
        sentry.watch(7, first.clone(), end);
        // It goes on.
        let kind = SockType::SeqPacket;
        let pair = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC);
        let own = Arc::new(Peer::of(&pair.unwrap().0).unwrap());
        sentry.watch(8, own, end);
        sentry.watch(9, second, end);
        sentry.leave(9, ());
        its.kill().unwrap();
        its.wait().unwrap();
        let patience = Duration::from_secs(60);
        assert_eq!(told.recv_timeout(patience), Ok((7, first.pid)));
        assert!(told.recv_timeout(Duration::from_millis(50)).is_err());
        sentry.leave(7, ());
    }
}
