//! Sentries: threads that wait for what strangers also wait for, a process to end, or a message on a socket that was handed over.
//!
//! Whoever waits stands in a line with all who do, anybody's. When it comes to pass the kernel wakes the whole line, and who comes
//! or goes meanwhile waits: for half a second where millions stand there. So the control thread neither comes nor goes: it orders that
//! here, and is told as porters tell it.
//!
//! Who sends messages without end to a socket that he has handed over, and for which millions wait, can keep a sentry that comes or goes
//! there for seconds. So each user that is known has one of its own ([`Sentries`]), and all others have one.

use std::any::Any;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::geteuid;
use tracing::debug;

use crate::own::processor_time;
use crate::shares::Known;
use crate::starter::Starter;

/// Time until a thread is ordered again when there was none.
const PAUSE: Duration = Duration::from_millis(2);
/// To come or go takes less processor time than this where few wait. The kernel has interrupts off meanwhile.
const LONG: Duration = Duration::from_millis(2);
/// A sentry of a user rests so many times as long as what took longer.
const REST: u32 = 15;
/// and no longer than this: others of its user's, or of the crowd, wait as well.
const MOST_REST: Duration = Duration::from_millis(100);
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

/// Who is told of each connection for which something has come to pass.
type Tell<T> = Arc<dyn Fn(u64, &T, EpollFlags) + Send + Sync>;

/// See the module's text.
pub struct Sentry<T>(Arc<Shared<T>>);

struct Shared<T> {
    epoll: Epoll,
    orders: Mutex<Vec<Order<T>>>,
    /// Written to when there are orders again.
    come: EventFd,
    /// It is one user's, who waits where it takes long.
    rests: bool,
}

impl<T> std::fmt::Debug for Sentry<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Sentry").finish_non_exhaustive()
    }
}

impl<T: Awaited> Sentry<T> {
    /// Has it started, some time. It ends with the process.
    pub fn start(
        starter: &Starter,
        tell: impl Fn(u64, &T, EpollFlags) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        Self::start_with(starter, Arc::new(tell), false)
    }

    fn start_with(starter: &Starter, tell: Tell<T>, rests: bool) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let shared = Arc::new(Shared {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            orders: Mutex::default(),
            come: EventFd::from_value_and_flags(0, flags)?,
            rests,
        });
        let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        shared
            .epoll
            .add(&shared.come, EpollEvent::new(edge, ORDERS))?;
        shared.have_started(starter.clone(), tell);
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
    /// Waits for nobody. Where there is no thread, it is tried again.
    fn have_started(self: &Arc<Self>, starter: Starter, tell: Tell<T>) {
        let (own, its) = (self.clone(), tell.clone());
        let (none, again) = (self.clone(), starter.clone());
        let failed = move || {
            thread::sleep(PAUSE);
            none.have_started(again, tell);
        };
        starter.order("sentry", move || own.wait(&*its), failed);
    }

    /// Never held while anything is waited for.
    fn lock(&self) -> MutexGuard<'_, Vec<Order<T>>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For good.
    fn wait(&self, tell: &dyn Fn(u64, &T, EpollFlags)) {
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

    /// Behind an order that took so long.
    fn rest(&self, used: Duration) {
        if self.rests && used > LONG {
            thread::sleep(MOST_REST.min(REST * used));
        }
    }

    fn carry_out(&self, watched: &mut HashMap<u64, T>) {
        let mut used = processor_time();
        // The guard would live as long as the loop.
        let orders = std::mem::take(&mut *self.lock());
        for order in orders {
            let before = std::mem::replace(&mut used, processor_time());
            self.rest(used.saturating_sub(before));
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

/// A sentry for each user that is [`Known`], from the first time on that something is waited for on its behalf, and one for all others.
pub struct Sentries<T> {
    known: Known,
    starter: Starter,
    tell: Tell<T>,
    /// By user; `None` for those who are not known.
    sentries: HashMap<Option<u32>, Sentry<T>>,
}

impl<T> std::fmt::Debug for Sentries<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Sentries").finish_non_exhaustive()
    }
}

impl<T: Awaited> Sentries<T> {
    /// `tell` is told of each connection for which something has come to pass. The sentries of this user and of those who are not known are
    /// there from the start on: what the daemon holds says what is left of others.
    pub fn new(
        known: Known,
        starter: Starter,
        tell: impl Fn(u64, &T, EpollFlags) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let mut sentries = Sentries {
            known,
            starter,
            tell: Arc::new(tell),
            sentries: HashMap::new(),
        };
        for who in [None, sentries.who(geteuid().as_raw())] {
            sentries.of(who)?;
        }
        Ok(sentries)
    }

    /// That of a user, which is started if there is none.
    fn of(&mut self, who: Option<u32>) -> io::Result<&Sentry<T>> {
        Ok(match self.sentries.entry(who) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let sentry = Sentry::start_with(&self.starter, self.tell.clone(), true)?;
                entry.insert(sentry)
            }
        })
    }

    fn who(&self, uid: u32) -> Option<u32> {
        self.known.has(uid).then_some(uid)
    }

    /// Has the sentry of a user wait for one of these flags, once.
    pub fn watch(
        &mut self,
        uid: u32,
        connection: u64,
        awaited: T,
        flags: EpollFlags,
    ) -> io::Result<()> {
        let sentry = self.of(self.who(uid))?;
        sentry.watch(connection, awaited, flags);
        Ok(())
    }

    /// Has it wait no longer.
    pub fn leave(&self, uid: u32, connection: u64) {
        if let Some(sentry) = self.sentries.get(&self.who(uid)) {
            sentry.leave(connection, ());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Peer;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::sync::mpsc::channel;

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
        let starter = Starter::new().unwrap();
        let sentry = Sentry::start(&starter, move |connection, peer: &Arc<Peer>, _| {
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
    /// What can be waited for once the gate is open: to come there takes until then.
    struct Slow(std::io::PipeReader, Option<Arc<Mutex<()>>>);

    impl Awaited for Slow {
        fn fd(&self) -> BorrowedFd<'_> {
            let gate = self.1.as_ref().map(|gate| gate.lock().unwrap());
            drop(gate);
            self.0.as_fd()
        }
    }

    #[test]
    fn who_makes_a_sentry_wait_makes_no_other_users_wait() {
        let (tell, told) = channel();
        let known = [1, 2].into_iter().collect();
        let starter = Starter::new().unwrap();
        let mut sentries = Sentries::new(known, starter, move |connection, _: &Slow, _| {
            tell.send(connection).unwrap();
        })
        .unwrap();
        let gate = Arc::new(Mutex::new(()));
        let closed = gate.lock().unwrap();
        let mut writers = Vec::new();
        // 1 and 3 come there. 4 is of the same crowd as 3, and 2 stands for itself.
        for (uid, slow) in [(1, true), (3, true), (2, false), (4, false)] {
            let (reader, mut writer) = std::io::pipe().unwrap();
            writer.write_all(b"a").unwrap();
            writers.push(writer);
            let awaited = Slow(reader, slow.then(|| gate.clone()));
            let watched = sentries.watch(uid, uid.into(), awaited, EpollFlags::EPOLLIN);
            watched.unwrap();
        }
        let patience = Duration::from_secs(60);
        assert_eq!(told.recv_timeout(patience), Ok(2));
        assert!(told.recv_timeout(Duration::from_millis(50)).is_err());
        drop(closed);
        let mut rest = [(); 3].map(|()| told.recv_timeout(patience).unwrap());
        rest.sort();
        assert_eq!(rest, [1, 3, 4]);
    }
}
