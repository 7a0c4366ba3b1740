//! The relay: whichever thread has the baton is the control thread.
//!
//! A look into another process takes some microseconds, and can be held up for ever by whoever owns that process. To
//! hand each look to another thread costs more than the look, where cores are asleep. So the control thread looks itself,
//! and lays the baton (all that it works on) down meanwhile. A *stand-in* watches: it picks the baton up where a look has
//! to wait, or computes for long, and is the control thread from then on. Who comes back late finds the baton gone, brings what it has found
//! as a porter does, and ends. Until then it is interrupted by signals, again and again.
//!
//! Only `daemon.rs` calls this. It knows nothing of what the baton is, nor of looks.

use std::fs;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use nix::unistd::gettid;

/// The stand-in looks after each such time. What it finds lying twice, it picks up.
const PATIENCE: Duration = Duration::from_millis(2);
/// What has used so much processor time is as good as held up: what a stranger owns much of is much work.
const BUSY: Duration = Duration::from_millis(4);
/// After so many looks at an idle relay it sleeps until it is called.
const IDLE: u32 = 16;

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
}

impl<B, E> Clone for Relay<B, E> {
    fn clone(&self) -> Self {
        Relay {
            shared: self.shared.clone(),
            leg: self.leg,
            ended: self.ended.clone(),
        }
    }
}

#[derive(Debug)]
struct Shared<B> {
    place: Mutex<Place<B>>,
    called: Condvar,
}

#[derive(Debug)]
struct Place<B> {
    /// The baton, while it lies there.
    baton: Option<Box<B>>,
    /// How often it was laid down.
    times: u64,
    /// The thread that laid it down.
    thread: i32,
    /// The processor time that this thread had used by then.
    used: Option<Duration>,
    /// A stand-in looks now and then.
    watched: bool,
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
    /// Starts the control thread with this baton, and a stand-in. What comes out at the end is received.
    pub fn start(baton: Box<B>, leg: Leg<B, E>) -> io::Result<Receiver<E>> {
        let (ended, end) = channel();
        let place = Place {
            baton: None,
            times: 0,
            thread: 0,
            used: None,
            watched: false,
            away: Vec::new(),
        };
        let shared = Shared {
            place: Mutex::new(place),
            called: Condvar::new(),
        };
        let relay = Relay {
            shared: Arc::new(shared),
            leg,
            ended,
        };
        relay.stand_by()?;
        let control = thread::Builder::new().name("control".into());
        control.spawn(move || relay.run(baton))?;
        Ok(end)
    }

    fn run(&self, baton: Box<B>) {
        if let Some(end) = (self.leg)(baton, self) {
            let _ = self.ended.send(end);
        }
    }

    /// Does something that may have to wait, with the baton laid down meanwhile.
    pub fn risk<R>(&self, baton: Box<B>, work: impl FnOnce() -> R) -> Back<B, R> {
        let times = self.shared.lay_down(baton);
        let result = work();
        match self.shared.pick_up(times) {
            Some(baton) => Back::Held(baton, result),
            None => {
                self.shared.come_back();
                Back::Lost(result)
            }
        }
    }

    /// Starts a stand-in. There is one at all times.
    fn stand_by(&self) -> io::Result<()> {
        let relay = self.clone();
        let stand_in = thread::Builder::new().name("stand-in".into());
        let body = move || {
            loop {
                let baton = relay.shared.watch();
                if relay.stand_by().is_ok() {
                    return relay.run(baton);
                }
                // There are no threads left: better a stand-in that waits for this one than none.
                relay.shared.give_back(baton);
                thread::sleep(PATIENCE);
            }
        };
        stand_in.spawn(body).map(drop)
    }
}

impl<B> Shared<B> {
    /// Held for some instructions only.
    fn lock(&self) -> MutexGuard<'_, Place<B>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lay_down(&self, baton: Box<B>) -> u64 {
        let mut place = self.lock();
        place.baton = Some(baton);
        place.times += 1;
        place.thread = gettid().as_raw();
        place.used = used_by(place.thread);
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

    /// As a stand-in: the baton that has lain there since it was laid down for the so-manieth time.
    fn take_over(&self, times: u64) -> Option<Box<B>> {
        let mut place = self.lock();
        let baton = (place.times == times).then(|| place.baton.take())??;
        let thread = place.thread;
        place.away.push(thread);
        Some(baton)
    }

    /// Nobody could go on with it.
    fn give_back(&self, baton: Box<B>) {
        let mut place = self.lock();
        place.baton = Some(baton);
        place.away.pop();
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

    /// Looks now and then, until a baton has lain for long.
    fn watch(&self) -> Box<B> {
        let (mut idle, mut seen) = (0, 0);
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
            let used = place.used;
            drop(place);
            idle = if times == seen && !lies { idle + 1 } else { 0 };
            // A thread that only has to wait for a core will have one before this one has learnt anything.
            if lies
                && times == seen
                && (!is_running(thread) || is_busy(thread, used))
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

/// Does a thread of this process run, or wait for nothing but a core?
fn is_running(thread: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat"));
    // The name in parentheses may hold any characters.
    stat.is_ok_and(|stat| {
        stat.rsplit(')')
            .next()
            .is_some_and(|rest| rest.trim_start().starts_with('R'))
    })
}

/// The processor time that a thread of this process has used.
fn used_by(thread: i32) -> Option<Duration> {
    // As the kernel makes the number of a thread's clock (`CPUCLOCK_PERTHREAD_MASK`, `CPUCLOCK_SCHED`).
    let clock = ClockId::from_raw(!thread << 3 | 4 | 2);
    clock_gettime(clock).ok().map(Duration::from)
}

/// Has a thread used much processor time since it had used that much? To have no core costs none.
fn is_busy(thread: i32, since: Option<Duration>) -> bool {
    match (used_by(thread), since) {
        (Some(now), Some(since)) => now.saturating_sub(since) >= BUSY,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

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
            match relay.risk(baton, move || wait.recv().is_ok()) {
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
        let end = Relay::start(Box::new(baton), leg).unwrap();
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
                match relay.risk(baton, || compute(BUSY / 4)) {
                    Back::Held(back, ()) => baton = back,
                    Back::Lost(()) => return Some(0),
                }
            }
            Some(*baton)
        }
        let end = Relay::start(Box::new(7), leg).unwrap();
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
            match relay.risk(baton, || compute(100 * BUSY)) {
                Back::Held(..) => Some(false),
                Back::Lost(()) => None,
            }
        }
        let end = Relay::start(Box::new(false), leg).unwrap();
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
            match relay.risk(baton, move || held.recv_timeout(Duration::from_secs(20))) {
                Back::Held(..) => Some(false),
                Back::Lost(_) => {
                    drop(hold);
                    None
                }
            }
        }
        let (first, once) = channel();
        let end = Relay::start(Box::new(first), idle).unwrap();
        once.recv().unwrap();
        drop(once);
        assert_eq!(end.recv_timeout(Duration::from_secs(30)), Ok(true));
    }
}
