//! Porters: threads for whatever may wait for a stranger, so that the control thread never does.
//!
//! Much that looks harmless can be held up by whoever owns the other side: closing a socket that lingers, closing a file
//! of a file system in user space, looking into a process that is in the middle of `exec`, a socket whose lock its owner
//! holds. Such work is a *load*. Loads of one user are carried one after the other, those of different users side by
//! side: who makes a porter wait, waits alone. What a load found is fetched with [`Porters::take`]; an eventfd tells
//! that there is something.
//!
//! A close that lingers is ended by a signal: while a porter carries a load, a timer interrupts it each millisecond.
//! What no signal interrupts holds up its user's loads until it ends; a user has one porter at most, and there are
//! [`MOST`].

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{
    SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction,
};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use nix::unistd::gettid;

use crate::accounts::Charge;

/// Threads at most: so many users can be waited for at once.
pub const MOST: usize = 64;
/// Threads that stay when there is nothing to carry.
const KEPT: usize = 2;
/// How long the others stay.
const STAY: Duration = Duration::from_secs(5);
/// A lingering close is interrupted after this time.
const NUDGE: Duration = Duration::from_millis(1);
/// The signal that interrupts. Nothing else in the daemon uses it.
const SIGNAL: Signal = Signal::SIGURG;

type Load<D> = Box<dyn FnOnce() -> Option<D> + Send>;

/// See the module's text. `D` is what loads find.
#[derive(Debug)]
pub struct Porters<D> {
    shared: Arc<Shared<D>>,
}

impl<D> Clone for Porters<D> {
    fn clone(&self) -> Self {
        Porters {
            shared: self.shared.clone(),
        }
    }
}

struct Shared<D> {
    yard: Mutex<Yard<D>>,
    /// Signalled when a load can be taken up.
    work: Condvar,
    /// Readable when something was found.
    found: EventFd,
}

impl<D> std::fmt::Debug for Shared<D> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Porters").finish_non_exhaustive()
    }
}

struct Yard<D> {
    /// Loads that wait, by user. A user without any has no entry.
    waiting: HashMap<u32, VecDeque<Load<D>>>,
    /// Users whose next load may be taken up, in turn.
    ready: VecDeque<u32>,
    /// Users whose load is being carried.
    carried: HashSet<u32>,
    found: VecDeque<D>,
    threads: usize,
    idle: usize,
}

impl<D> Yard<D> {
    fn give(&mut self, uid: u32, load: Load<D>) {
        let queue = self.waiting.entry(uid).or_default();
        queue.push_back(load);
        if queue.len() == 1 && !self.carried.contains(&uid) {
            self.ready.push_back(uid);
        }
    }

    fn next(&mut self) -> Option<(u32, Load<D>)> {
        let uid = self.ready.pop_front()?;
        let queue = self.waiting.get_mut(&uid)?;
        let load = queue.pop_front()?;
        if queue.is_empty() {
            self.waiting.remove(&uid);
        }
        self.carried.insert(uid);
        Some((uid, load))
    }

    fn carried(&mut self, uid: u32) {
        self.carried.remove(&uid);
        if self.waiting.contains_key(&uid) {
            self.ready.push_back(uid);
        }
    }
}

impl<D: Send + 'static> Porters<D> {
    /// No thread runs yet.
    pub fn new() -> io::Result<Self> {
        extern "C" fn interrupt(_: i32) {}
        let handler = SigHandler::Handler(interrupt);
        // Without SA_RESTART: that the call ends is what the signal is for.
        let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing, so it is safe at any moment.
        unsafe { sigaction(SIGNAL, &action) }?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let yard = Yard {
            waiting: HashMap::new(),
            ready: VecDeque::new(),
            carried: HashSet::new(),
            found: VecDeque::new(),
            threads: 0,
            idle: 0,
        };
        let shared = Shared {
            yard: Mutex::new(yard),
            work: Condvar::new(),
            found: EventFd::from_value_and_flags(0, flags)?,
        };
        Ok(Porters {
            shared: Arc::new(shared),
        })
    }

    /// Has a load carried on behalf of a user. It runs on another thread, after the user's earlier ones.
    pub fn give(&self, uid: u32, load: impl FnOnce() -> Option<D> + Send + 'static) {
        let mut yard = self.shared.lock();
        yard.give(uid, Box::new(load));
        let wanted = yard.ready.len() > yard.idle && yard.threads < MOST;
        if wanted && self.start().is_ok() {
            yard.threads += 1;
        }
        drop(yard);
        self.shared.work.notify_one();
    }

    fn start(&self) -> io::Result<()> {
        let shared = self.shared.clone();
        let porter = thread::Builder::new().name("porter".into());
        porter.spawn(move || shared.carry()).map(drop)
    }

    /// The next thing that was found.
    pub fn take(&self) -> Option<D> {
        self.shared.lock().found.pop_front()
    }

    /// To be called when [`Porters::found`] is readable, before [`Porters::take`].
    pub fn wake(&self) {
        let _ = self.shared.found.read();
    }

    /// Readable when something was found.
    pub fn found(&self) -> BorrowedFd<'_> {
        self.shared.found.as_fd()
    }

    /// Loads that wait, and users whose load is being carried.
    pub fn load(&self) -> (usize, usize) {
        let yard = self.shared.lock();
        let waiting = yard.waiting.values().map(VecDeque::len).sum();
        (waiting, yard.carried.len())
    }

    /// A descriptor that a stranger has made: closed by a porter.
    pub fn foreign(&self, uid: u32, fd: OwnedFd) -> Foreign<D> {
        Foreign {
            fd: Some(fd),
            uid,
            charge: None,
            porters: self.clone(),
        }
    }
}

impl<D: Send + 'static> Shared<D> {
    /// Never held while a load is carried, nor where anything can wait.
    fn lock(&self) -> MutexGuard<'_, Yard<D>> {
        self.yard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry(&self) {
        let mut nudge = Nudge::new();
        let mut yard = self.lock();
        loop {
            let Some((uid, load)) = yard.next() else {
                yard.idle += 1;
                let (woken, waited) = self
                    .work
                    .wait_timeout(yard, STAY)
                    .unwrap_or_else(PoisonError::into_inner);
                yard = woken;
                yard.idle -= 1;
                if waited.timed_out() && yard.ready.is_empty() && yard.threads > KEPT {
                    yard.threads -= 1;
                    return;
                }
                continue;
            };
            drop(yard);
            nudge.start();
            let found = load();
            nudge.stop();
            yard = self.lock();
            yard.carried(uid);
            if let Some(found) = found {
                yard.found.push_back(found);
                let _ = self.found.write(1);
            }
        }
    }
}

/// A timer that interrupts the calls of this thread.
struct Nudge(Option<Timer>);

impl Nudge {
    fn new() -> Self {
        let notify = SigevNotify::SigevThreadId {
            signal: SIGNAL,
            thread_id: gettid().as_raw(),
            si_value: 0,
        };
        Nudge(Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(notify)).ok())
    }

    fn set(&mut self, expiration: Expiration) {
        if let Some(timer) = &mut self.0 {
            let _ = timer.set(expiration, TimerSetTimeFlags::empty());
        }
    }

    fn start(&mut self) {
        self.set(Expiration::Interval(NUDGE.into()));
    }

    fn stop(&mut self) {
        self.set(Expiration::OneShot(Duration::ZERO.into()));
    }
}

/// A descriptor that a stranger has made. Whoever drops it does not close it: a porter does, since closing may wait.
#[derive(Debug)]
pub struct Foreign<D: Send + 'static> {
    fd: Option<OwnedFd>,
    uid: u32,
    charge: Option<Charge>,
    porters: Porters<D>,
}

impl<D: Send + 'static> Foreign<D> {
    /// Who pays for it, until it is closed.
    pub fn charge_to(&mut self, uid: u32, charge: Charge) {
        self.uid = uid;
        self.charge = Some(charge);
    }
}

impl<D: Send + 'static> AsRawFd for Foreign<D> {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }
}

impl<D: Send + 'static> Drop for Foreign<D> {
    fn drop(&mut self) {
        let (fd, charge) = (self.fd.take(), self.charge.take());
        self.porters.give(self.uid, move || {
            drop(fd);
            drop(charge);
            None
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::sync::mpsc::channel;
    use std::time::Instant;

    fn fetch<D: Send + 'static>(porters: &Porters<D>) -> D {
        let end = Instant::now() + Duration::from_secs(20);
        while Instant::now() < end {
            if let Some(found) = porters.take() {
                return found;
            }
            thread::sleep(Duration::from_millis(1));
        }
        panic!("no load was carried");
    }

    #[test]
    fn who_makes_a_porter_wait_waits_alone() {
        let porters = Porters::new().unwrap();
        let (end, ended) = channel::<()>();
        porters.give(1, move || ended.recv().ok().map(|()| 1));
        for user in [1, 2, 3, 2] {
            porters.give(user, move || Some(10 * user));
        }
        let mut found = [fetch(&porters), fetch(&porters), fetch(&porters)];
        found.sort_unstable();
        assert_eq!(found, [20, 20, 30]);
        assert!(porters.take().is_none());
        assert_eq!(porters.load(), (1, 1));
        end.send(()).unwrap();
        // One user's loads are carried in order.
        assert_eq!([fetch(&porters), fetch(&porters)], [1, 10]);
    }

    #[test]
    fn a_close_that_lingers_is_interrupted() {
        let porters = Porters::<()>::new().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (peer, _) = listener.accept().unwrap();
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[0; 65536]).is_ok() {}
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 60,
        };
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Linger, &linger).unwrap();
        drop(porters.foreign(7, socket.into()));
        let start = Instant::now();
        while porters.load() != (0, 0) {
            assert!(start.elapsed() < Duration::from_secs(30), "it lingers");
            thread::sleep(Duration::from_millis(1));
        }
        drop(peer);
    }

    #[test]
    fn there_are_never_too_many_threads() {
        let porters = Porters::new().unwrap();
        let (end, ended) = channel::<()>();
        let ended = Arc::new(Mutex::new(ended));
        for user in 0..2 * MOST as u32 {
            let ended = ended.clone();
            porters.give(user, move || {
                let _ = ended.lock().map(|ended| ended.recv());
                Some(user)
            });
        }
        assert_eq!(porters.shared.lock().threads, MOST);
        drop(end);
        let mut found: Vec<u32> = (0..2 * MOST).map(|_| fetch(&porters)).collect();
        found.sort_unstable();
        assert!(found.into_iter().eq(0..2 * MOST as u32));
    }
}
