//! The sentry: a thread that waits for processes to end.
//!
//! Whoever waits for a process stands in a line with all who do, anybody's. When it ends the kernel wakes the whole line, and who comes
//! or goes meanwhile waits: for half a second where millions stand there. So the control thread neither comes nor goes: it orders that
//! here, and is told as porters tell it.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tracing::debug;

use crate::accounts::Charge;
use crate::process::Peer;

/// In place of a connection: there are orders.
const ORDERS: u64 = 0;

/// What is to be done.
#[derive(Debug)]
enum Order {
    /// Wait for the end of the process of this connection.
    Watch(u64, Arc<Peer>),
    /// No longer. Until then it is on an account.
    Leave(u64, #[expect(dead_code, reason = "it is held")] Charge),
}

/// See the module's text.
#[derive(Debug)]
pub struct Sentry(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    epoll: Epoll,
    orders: Mutex<Vec<Order>>,
    /// Written to when there are orders again.
    come: EventFd,
}

impl Sentry {
    /// Starts it. It ends with the process. `tell` is told of each connection whose process has ended, and the process.
    pub fn start(tell: impl Fn(u64, &Peer) + Send + 'static) -> io::Result<Self> {
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

    /// Has it wait for the end of the process of a connection.
    pub fn watch(&self, connection: u64, peer: Arc<Peer>) {
        self.order(Order::Watch(connection, peer));
    }

    /// Has it wait no longer. The process's descriptors are on this account until then.
    pub fn leave(&self, connection: u64, charge: Charge) {
        self.order(Order::Leave(connection, charge));
    }

    fn order(&self, order: Order) {
        let mut orders = self.0.lock();
        orders.push(order);
        let is_first = orders.len() == 1;
        drop(orders);
        if is_first {
            let _ = self.0.come.write(1);
        }
    }
}

impl Shared {
    /// Never held while anything is waited for.
    fn lock(&self) -> MutexGuard<'_, Vec<Order>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, tell: impl Fn(u64, &Peer)) -> ! {
        let mut watched: HashMap<u64, Arc<Peer>> = HashMap::new();
        loop {
            let mut events = [EpollEvent::empty(); 64];
            let told = self.epoll.wait(&mut events, EpollTimeout::NONE);
            for event in events.iter().take(told.unwrap_or(0)) {
                match event.data() {
                    ORDERS => self.carry_out(&mut watched),
                    connection => {
                        if let Some(peer) = watched.get(&connection) {
                            tell(connection, peer);
                        }
                    }
                }
            }
        }
    }

    fn carry_out(&self, watched: &mut HashMap<u64, Arc<Peer>>) {
        for order in std::mem::take(&mut *self.lock()) {
            match order {
                Order::Watch(connection, peer) => {
                    // Told once: whoever is told lets it leave, or knows why not.
                    let once = EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT;
                    let event = EpollEvent::new(once, connection);
                    if let Err(error) = self.epoll.add(&peer.pidfd, event) {
                        debug!(connection, "its end is not waited for: {error}");
                    }
                    watched.insert(connection, peer);
                }
                Order::Leave(connection, _) => {
                    if let Some(peer) = watched.remove(&connection) {
                        let _ = self.epoll.delete(&peer.pidfd);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let sentry = Sentry::start(move |connection, peer| {
            tell.send((connection, peer.pid)).unwrap();
        });
        let sentry = sentry.unwrap();
        let ([first, second], mut its) = child();
        sentry.watch(7, first.clone());
        // It goes on.
        let kind = SockType::SeqPacket;
        let pair = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC);
        let own = Arc::new(Peer::of(&pair.unwrap().0).unwrap());
        sentry.watch(8, own);
        sentry.watch(9, second);
        sentry.leave(9, Charge::of_nothing());
        its.kill().unwrap();
        its.wait().unwrap();
        let patience = Duration::from_secs(60);
        assert_eq!(told.recv_timeout(patience), Ok((7, first.pid)));
        assert!(told.recv_timeout(Duration::from_millis(50)).is_err());
        sentry.leave(7, Charge::of_nothing());
    }
}
