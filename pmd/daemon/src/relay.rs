//! The relay: whichever thread has the baton is the control thread.
//!
//! A look into another process takes some microseconds, and can be held up for ever by whoever owns that process. To
//! hand each look to another thread costs more than the look, where cores are asleep. So the control thread looks itself,
//! and lays the baton (all that it works on) down meanwhile. A *stand-in* watches: it picks the baton up where a look has
//! to wait, or computes for long, and is the control thread from then on. Who comes back late finds the baton gone, brings what it has found
//! as a porter does, and ends. Until then it is interrupted by signals, again and again.
//!
//! A second stand-in relieves the first one, which is the control thread then and starts no thread itself: the [`Starter`] does.
//!
//! Only `daemon.rs` calls this. It knows nothing of what the baton is, nor of looks.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use nix::unistd::gettid;

use crate::heap;
use crate::own::processor_time;
use crate::starter::Starter;

/// The stand-in looks after each such time. What it finds lying twice, it picks up.
const PATIENCE: Duration = Duration::from_millis(2);
/// What has used so much processor time is as good as held up: what a stranger owns much of is much work.
const BUSY: Duration = Duration::from_millis(4);
/// Where nobody knows whether its thread waits, so many looks find it lying first.
const UNKNOWN: u32 = 10;
/// To open what tells that may take so long.
const OPENING: Duration = Duration::from_millis(20);
/// After so many looks at an idle relay it sleeps until it is called.
const IDLE: u32 = 16;

/// What those are called that are not the control thread yet.
const STAND_IN: &str = "stand-in";

/// The signal that interrupts, as it does porters.
const NUDGE: i32 = crate::porters::SIGNAL as i32;

/// What the control thread does with the baton, until it ends or has lost the baton (`None`).
type Leg<B, E> = fn(Box<B>, &Relay<B, E>) -> Option<E>;

/// See the module's text. `B` is the baton, `E` what comes out at the end.
#[derive(Debug)]
pub struct Relay<B, E> {
    shared: Arc<Shared<B>>,
    leg: Leg<B, E>,
    ended: Sender<E>,
    starter: Starter,
}

impl<B, E> Clone for Relay<B, E> {
    fn clone(&self) -> Self {
        Relay {
            shared: self.shared.clone(),
            leg: self.leg,
            ended: self.ended.clone(),
            starter: self.starter.clone(),
        }
    }
}

#[derive(Debug)]
struct Shared<B> {
    place: Mutex<Place<B>>,
    called: Condvar,
    /// Signalled when a stand-in may take its place.
    relieved: Condvar,
}

#[derive(Debug)]
struct Place<B> {
    /// The baton, while it lies there.
    baton: Option<Box<B>>,
    /// How often it was laid down.
    times: u64,
    /// The control thread, which lays it down.
    thread: i32,
    /// What says whether that waits, where it could be opened.
    stat: Option<Arc<File>>,
    /// The processor time that this thread had used by then.
    used: Duration,
    /// A stand-in looks now and then.
    watched: bool,
    /// A stand-in has its place: another one waits until it is free.
    taken: bool,
    /// Stand-ins that wait.
    spare: usize,
    /// Threads that have lost the baton, and have not come back.
    away: Vec<i32>,
}

/// What became of the baton while its thread looked away.
#[derive(Debug)]
pub enum Back<B, R> {
    /// It lay there.
    Held(Box<B>, R),
    /// Somebody else has it.
    Lost(R),
}

impl<B: Send + 'static, E: Send + 'static> Relay<B, E> {
    /// Starts the control thread with this baton, and two stand-ins. What comes out at the end is received.
    pub fn start(baton: Box<B>, leg: Leg<B, E>, starter: Starter) -> io::Result<Receiver<E>> {
        let (ended, end) = channel();
        let place = Place {
            baton: None,
            times: 0,
            thread: 0,
            stat: None,
            used: Duration::ZERO,
            watched: false,
            taken: false,
            spare: 0,
            away: Vec::new(),
        };
        let shared = Shared {
            place: Mutex::new(place),
            called: Condvar::new(),
            relieved: Condvar::new(),
        };
        let relay = Relay {
            shared: Arc::new(shared),
            leg,
            ended,
            starter,
        };
        for _ in 0..2 {
            let stand_in = relay.clone();
            let thread = thread::Builder::new().name(STAND_IN.into());
            thread.spawn(move || stand_in.stand_in())?;
        }
        let control = thread::Builder::new().name("control".into());
        control.spawn(move || {
            heap::grow();
            relay.run(baton, open_stat());
        })?;
        Ok(end)
    }

    /// From now on this is the control thread.
    fn run(&self, baton: Box<B>, stat: Option<File>) {
        let mut place = self.shared.lock();
        (place.thread, place.stat) = (gettid().as_raw(), stat.map(Arc::new));
        drop(place);
        if let Some(end) = (self.leg)(baton, self) {
            let _ = self.ended.send(end);
        }
    }

    /// Does something that may have to wait, with the baton laid down meanwhile. It is told what this thread has used of its
    /// processor so far: to ask the kernel for that twice would be a good part of a look.
    pub fn risk<R>(&self, baton: Box<B>, work: impl FnOnce(Duration) -> R) -> Back<B, R> {
        let used = processor_time();
        let times = self.shared.lay_down(baton, used);
        let result = work(used);
        match self.shared.pick_up(times) {
            Some(baton) => Back::Held(baton, result),
            None => {
                self.shared.come_back();
                Back::Lost(result)
            }
        }
    }

    /// Takes a stand-in's place when that is free, and picks the baton up there when that lies for long.
    fn stand_in(&self) {
        heap::grow();
        let stat = open_stat();
        let baton = self.shared.watch();
        self.order_stand_in();
        self.run(baton, stat);
    }

    /// Has another stand-in started. While there is none to relieve it, a stand-in leaves the baton where it lies.
    fn order_stand_in(&self) {
        let (stand_in, none) = (self.clone(), self.clone());
        let failed = move || {
            // There are no threads left.
            thread::sleep(PATIENCE);
            none.order_stand_in();
        };
        self.starter
            .order(STAND_IN, move || stand_in.stand_in(), failed);
    }
}

impl<B> Shared<B> {
    /// Held for some instructions only.
    fn lock(&self) -> MutexGuard<'_, Place<B>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lay_down(&self, baton: Box<B>, used: Duration) -> u64 {
        let mut place = self.lock();
        place.baton = Some(baton);
        place.used = used;
        place.times += 1;
        let times = place.times;
        let watched = std::mem::replace(&mut place.watched, true);
        drop(place);
        if !watched {
            self.called.notify_one();
        }
        times
    }

    /// The baton, if it lies there as it was laid down for the so-manieth time.
    fn pick_up(&self, times: u64) -> Option<Box<B>> {
        let mut place = self.lock();
        (place.times == times).then(|| place.baton.take())?
    }

    /// As a stand-in: the baton that has lain there since it was laid down for the so-manieth time, if another stand-in is there
    /// to take this one's place.
    fn take_over(&self, times: u64) -> Option<Box<B>> {
        let mut place = self.lock();
        let may = place.times == times && place.spare > 0;
        let baton = may.then(|| place.baton.take())??;
        let thread = place.thread;
        place.away.push(thread);
        place.taken = false;
        drop(place);
        self.relieved.notify_one();
        Some(baton)
    }

    /// Waits for a stand-in's place.
    fn take_place(&self) {
        let mut place = self.lock();
        place.spare += 1;
        while place.taken {
            let relieved = self.relieved.wait(place);
            place = relieved.unwrap_or_else(PoisonError::into_inner);
        }
        place.spare -= 1;
        place.taken = true;
    }

    /// This thread has lost the baton, and waits no more.
    fn come_back(&self) {
        let own = gettid().as_raw();
        self.lock().away.retain(|thread| *thread != own);
    }

    /// What a signal can interrupt, ends: closing a socket that lingers, say.
    fn nudge(&self) {
        // Under the lock: none of these threads can end meanwhile.
        for thread in &self.lock().away {
            // SAFETY: a signal to a thread of this process, which has a handler for it.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), *thread, NUDGE) };
        }
    }

    /// Takes a stand-in's place, and looks now and then, until a baton has lain for long.
    fn watch(&self) -> Box<B> {
        self.take_place();
        let (mut idle, mut seen, mut lain) = (0, 0, 0);
        loop {
            let mut place = self.lock();
            if idle >= IDLE && place.away.is_empty() {
                place.watched = false;
            }
            while !place.watched {
                idle = 0;
                let called = self.called.wait(place);
                place = called.unwrap_or_else(PoisonError::into_inner);
            }
            let (times, lies, thread) = (place.times, place.baton.is_some(), place.thread);
            let (used, stat) = (place.used, place.stat.clone());
            drop(place);
            lain = if lies && times == seen { lain + 1 } else { 0 };
            idle = if times == seen && !lies { idle + 1 } else { 0 };
            // A thread that only has to wait for a core will have one before this one has learnt anything.
            let waits = || stat.map_or(lain >= UNKNOWN, |stat| !is_running(&stat));
            if lain != 0
                && (waits() || is_busy(thread, used))
                && let Some(baton) = self.take_over(times)
            {
                return baton;
            }
            seen = times;
            self.nudge();
            thread::sleep(PATIENCE);
        }
    }
}

/// What says whether this thread runs, opened before it has anything to do. Anybody can keep the lock of its folder in `/proc`, so
/// another thread looks for the name, and this one does without where it does not come.
fn open_stat() -> Option<File> {
    let path = format!("/proc/self/task/{}/stat", gettid());
    let (found, opened) = channel();
    let opener = thread::Builder::new().name("stat".into());
    let started = opener.spawn(move || found.send(File::open(path)));
    let file = started.ok().and_then(|_| opened.recv_timeout(OPENING).ok());
    file.and_then(Result::ok)
}

/// Does a thread run, or wait for nothing but a core?
fn is_running(stat: &File) -> bool {
    let mut text = [0; 512];
    let length = stat.read_at(&mut text, 0).unwrap_or(0);
    let text = text.get(..length).unwrap_or_default();
    // The name in parentheses may hold any characters.
    let mut behind = text.rsplit(|byte| *byte == b')');
    behind.next().is_some_and(|rest| rest.starts_with(b" R"))
}

/// The processor time that a thread of this process has used.
fn used_by(thread: i32) -> Option<Duration> {
    // As the kernel makes the number of a thread's clock (`CPUCLOCK_PERTHREAD_MASK`, `CPUCLOCK_SCHED`).
    let clock = ClockId::from_raw(!thread << 3 | 4 | 2);
    clock_gettime(clock).ok().map(Duration::from)
}

/// Has a thread used much processor time since it had used that much? To have no core costs none.
fn is_busy(thread: i32, since: Duration) -> bool {
    used_by(thread).is_some_and(|now| now.saturating_sub(since) >= BUSY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn starter() -> Starter {
        Starter::new().unwrap()
    }

    struct Baton {
        legs: Vec<thread::ThreadId>,
        waits: Vec<mpsc::Receiver<()>>,
        late: Sender<thread::ThreadId>,
    }

    /// Waits for all that it is told to.
    fn leg(
        mut baton: Box<Baton>,
        relay: &Relay<Baton, Vec<thread::ThreadId>>,
    ) -> Option<Vec<thread::ThreadId>> {
        baton.legs.push(thread::current().id());
        let late = baton.late.clone();
        while let Some(wait) = baton.waits.pop() {
            match relay.risk(baton, move |_| wait.recv().is_ok()) {
                Back::Held(back, _) => baton = back,
                Back::Lost(_) => {
                    late.send(thread::current().id()).unwrap();
                    return None;
                }
            }
        }
        Some(baton.legs)
    }

    #[test]
    fn who_is_held_up_loses_the_baton_and_nothing_else() {
        let (late, came_late) = channel();
        let (quick, is_quick) = channel();
        let (slow, is_slow) = channel();
        quick.send(()).unwrap();
        let baton = Baton {
            legs: Vec::new(),
            // The last one first.
            waits: vec![is_slow, is_quick],
            late,
        };
        let end = Relay::start(Box::new(baton), leg, starter()).unwrap();
        let legs = end.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(legs.len(), 2);
        assert_ne!(legs[0], legs[1]);
        assert!(came_late.try_recv().is_err());
        slow.send(()).unwrap();
        assert_eq!(came_late.recv_timeout(Duration::from_secs(20)), Ok(legs[0]));
    }

    /// Computes for so long, in processor time.
    fn compute(time: Duration) {
        let start = used_by(gettid().as_raw()).unwrap();
        while used_by(gettid().as_raw()).unwrap() - start < time {}
    }

    #[test]
    fn who_computes_for_a_moment_keeps_the_baton() {
        fn leg(mut baton: Box<u32>, relay: &Relay<u32, u32>) -> Option<u32> {
            for _ in 0..20 {
                match relay.risk(baton, |_| compute(BUSY / 4)) {
                    Back::Held(back, ()) => baton = back,
                    Back::Lost(()) => return Some(0),
                }
            }
            Some(*baton)
        }
        let end = Relay::start(Box::new(7), leg, starter()).unwrap();
        assert_eq!(end.recv_timeout(Duration::from_secs(20)), Ok(7));
    }

    #[test]
    fn who_computes_for_long_loses_the_baton() {
        fn leg(baton: Box<bool>, relay: &Relay<bool, bool>) -> Option<bool> {
            if *baton {
                // The second leg.
                return Some(true);
            }
            let mut baton = baton;
            *baton = true;
            match relay.risk(baton, |_| compute(100 * BUSY)) {
                Back::Held(..) => Some(false),
                Back::Lost(()) => None,
            }
        }
        let end = Relay::start(Box::new(false), leg, starter()).unwrap();
        assert_eq!(end.recv_timeout(Duration::from_secs(20)), Ok(true));
    }

    #[test]
    fn a_relay_that_was_idle_is_watched_again() {
        fn idle(baton: Box<Sender<()>>, relay: &Relay<Sender<()>, bool>) -> Option<bool> {
            let (hold, held) = channel::<()>();
            if baton.send(()).is_err() {
                // The second leg.
                return Some(true);
            }
            thread::sleep(4 * IDLE * PATIENCE);
            match relay.risk(baton, move |_| held.recv_timeout(Duration::from_secs(20))) {
                Back::Held(..) => Some(false),
                Back::Lost(_) => {
                    drop(hold);
                    None
                }
            }
        }
        let (first, once) = channel();
        let end = Relay::start(Box::new(first), idle, starter()).unwrap();
        once.recv().unwrap();
        drop(once);
        assert_eq!(end.recv_timeout(Duration::from_secs(30)), Ok(true));
    }

    /// Nobody who goes on starts a thread first: the next stand-in is there already. Where none comes after it, the last one stays.
    #[test]
    fn a_starter_that_is_held_up_holds_up_nobody_who_goes_on() {
        #[derive(Default)]
        struct Legs(Vec<Sender<()>>);
        fn leg(mut baton: Box<Legs>, relay: &Relay<Legs, usize>) -> Option<usize> {
            let (hold, held) = channel::<()>();
            baton.0.push(hold);
            let legs = baton.0.len();
            // The second one is not relieved, so it keeps the baton.
            let patience = if legs == 1 { 600 } else { 1 };
            match relay.risk(baton, move |_| {
                held.recv_timeout(Duration::from_secs(patience))
            }) {
                Back::Held(..) => Some(legs),
                Back::Lost(_) => None,
            }
        }
        let starter = Starter::held_up();
        let end = Relay::start(Box::default(), leg, starter.clone()).unwrap();
        assert_eq!(end.recv_timeout(Duration::from_secs(60)), Ok(2));
        assert_eq!(starter.ordered(), 1);
    }
}
