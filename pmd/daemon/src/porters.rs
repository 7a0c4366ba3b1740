//! Porters: threads for whatever may wait for a stranger, so that the control thread never does.
//!
//! Much that looks harmless can be held up by whoever owns the other side: closing a socket that lingers, closing a file
//! of a file system in user space, looking into a process that is in the middle of `exec`, a socket whose lock its owner
//! holds. Such work is a *load*. Loads of one [`Owner`], a connection, are carried one after the other, those of
//! different ones side by side: who makes a porter wait, waits alone. What a load found is for the control thread
//! ([`Porters::next`]); an eventfd tells that there is something.
//!
//! A load may be *quick*, a look that mostly takes some microseconds: less than to hand it over. The control thread carries
//! it itself ([`Here::Look`]), where another one takes over if it has to wait after all, or works for long ([the relay](crate::relay)).
//! Who has made it wait or work is not trusted again for a minute: a porter carries his loads.
//!
//! A close that lingers is ended by a signal: while there are loads to carry, a timer interrupts a porter again and again.
//! What no signal interrupts holds up its owner's loads until it ends. A user has [`SHARE`] porters at most, of [`MOST`]; all users
//! who are not known have [`OF_CROWD`] together ([`line`]), which weigh less than others: what so many compute would take the processors from the
//! control thread.

mod foreign;
mod line;

use std::cell::Cell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{
    SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction,
};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use nix::unistd::gettid;
use tracing::debug;

pub use self::foreign::{Beside, Closer, Foreign};
use self::line::{Crew, Line};
use crate::own::processor_time;
use crate::shares::{Known, Turns};
use crate::starter::Starter;

/// What they are called.
const NAME: &str = "porter";
/// Threads that carry for users who are known, at most,
pub const MOST: usize = 256;
/// and for all others together: one attacker may be very many of them.
pub const OF_CROWD: usize = MOST / 2;
/// Threads of one user at most.
pub const SHARE: usize = 8;
/// In place of users: on whose behalf the daemon has something done that is nobody's in particular. Each has porters of its own, so
/// that who holds up one kind of work holds up no other.
///
/// Callers who are turned away. Of their sockets, only those are closed in which nothing can have to be waited for.
pub const NOBODY: u32 = u32::MAX;
/// Those who come to the anchors' port without a promise.
pub const STRANGERS: u32 = NOBODY - 1;
/// Answers that read what others write. Who makes that wait makes other answers wait.
pub const READERS: u32 = NOBODY - 2;
/// Looks whether anybody holds a stream, the streams of one user after the other. Whose socket makes that work makes others wait until
/// they are given theirs back.
pub const KEEPERS: u32 = NOBODY - 3;
/// Callers who are turned away, and have left messages: those of one user after the other.
pub const LEAVERS: u32 = NOBODY - 4;
/// All of these.
pub const IN_PLACE_OF_USERS: [u32; 5] = [NOBODY, STRANGERS, READERS, KEEPERS, LEAVERS];
/// Threads of a crew that stay when there is nothing to carry.
const KEPT: usize = 2;
/// The nice value of those that carry for the crowd. What others do on the machine may so hold them up ten times as long: nobody whom the
/// daemon knows.
const NICE: i32 = 10;
/// A lingering close is interrupted after this time, and the next one after that. All porters may have to wait for ever:
/// their signals together shall cost little.
const NUDGE: Duration = Duration::from_millis(1);
const NUDGE_AGAIN: Duration = Duration::from_millis(8);
/// The timer is stopped when there was nothing to carry for this time: to set it for each load costs as much as some loads.
const REST: Duration = Duration::from_millis(20);
/// The signal that interrupts. Nothing else in the daemon uses it.
pub const SIGNAL: Signal = Signal::SIGURG;

thread_local! {
    /// The user for whom this thread carries a load, if it is a porter.
    static CARRIES_FOR: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Something to do that may have to wait, and what it finds.
pub type Load<D> = Box<dyn FnOnce(&Carrier) -> Option<D> + Send>;

/// Who carries a load. What may take long asks for it ([`crate::diag`]), so that nobody does that who carries none: only here is one made, it
/// stays on its thread, and a load has it for as long as it is carried.
#[derive(Debug)]
pub struct Carrier {
    stays: PhantomData<*const ()>,
}

impl Carrier {
    fn new() -> Self {
        Carrier { stays: PhantomData }
    }

    /// A test carries a load.
    #[cfg(test)]
    pub fn of_test() -> Self {
        Self::new()
    }
}

/// What the caller has to do itself.
pub enum Here<D> {
    /// To carry a quick load, and to tell [`Porters::carried`] then.
    Look(Owner, Load<D>),
    /// To take what a porter has found.
    Found(D),
}

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
    /// Signalled when a load can be taken up by one of a crew.
    work: OfEach<Condvar>,
    /// Written to when something was found. Nobody reads it.
    found: EventFd,
    starter: Starter,
    /// Some users are known: porters of the others weigh less.
    is_shared: bool,
}

impl<D> std::fmt::Debug for Shared<D> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Porters").finish_non_exhaustive()
    }
}

/// On whose behalf a load is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The connection.
    pub connection: u64,
}

struct Yard<D> {
    /// What each user has that has any.
    users: HashMap<u32, Corner<D>>,
    /// What the caller does itself, by user.
    here: Turns<Here<D>>,
    /// The load of these that is being carried.
    under_way: Option<Owner>,
    trust: Trust,
    /// Users of whom a load may be taken up.
    line: Line,
    waiting: usize,
    crews: OfEach<Threads>,
}

/// Something of each crew.
#[derive(Debug, Default)]
struct OfEach<T> {
    known: T,
    crowd: T,
}

impl<T> OfEach<T> {
    fn get(&self, crew: Crew) -> &T {
        match crew {
            Crew::OfKnown => &self.known,
            Crew::OfCrowd => &self.crowd,
        }
    }

    fn get_mut(&mut self, crew: Crew) -> &mut T {
        match crew {
            Crew::OfKnown => &mut self.known,
            Crew::OfCrowd => &mut self.crowd,
        }
    }
}

/// The threads of a crew.
#[derive(Debug)]
struct Threads {
    all: usize,
    /// Those of them that were ordered, and are not there yet.
    coming: usize,
    idle: usize,
}

impl Default for Threads {
    fn default() -> Self {
        Threads {
            all: KEPT,
            coming: KEPT,
            idle: 0,
        }
    }
}

/// What one of a crew is called for.
#[derive(Clone, Copy)]
struct Call {
    crew: Crew,
    /// One that sleeps is woken.
    wakes: bool,
    /// One more is started.
    starts: bool,
}

/// What a user has.
struct Corner<D> {
    /// Loads that wait, by connection.
    waiting: HashMap<u64, VecDeque<Load<D>>>,
    /// Connections of which a load waits and none is carried, in turn.
    ready: VecDeque<u64>,
    /// Connections of which a load is carried.
    carried: HashSet<u64>,
    /// The user is in `line`.
    queued: bool,
    /// How many loads wait.
    loads: usize,
}

impl<D> Default for Corner<D> {
    fn default() -> Self {
        Corner {
            waiting: HashMap::new(),
            ready: VecDeque::new(),
            carried: HashSet::new(),
            queued: false,
            loads: 0,
        }
    }
}

impl<D> Corner<D> {
    /// May a load of this user be taken up?
    fn is_ready(&self) -> bool {
        !self.ready.is_empty() && self.carried.len() < SHARE
    }
}

/// Whose quick loads the caller carries itself: theirs who have not made it wait.
#[derive(Debug, Default)]
struct Trust {
    /// Users that made it wait for a little while, and when. The oldest first.
    late: VecDeque<(u32, Instant)>,
    /// Users that made it wait until somebody took over.
    lost: VecDeque<(u32, Instant)>,
    /// Threads that have to wait still.
    away: usize,
}

impl Trust {
    /// A quick load takes some microseconds. One that took longer than this was late.
    const QUICK: Duration = Duration::from_millis(1);
    /// So long is nothing forgotten.
    const MEMORY: Duration = Duration::from_secs(60);
    /// Late loads that a user may have within that time.
    const LATE: usize = 3;
    /// With so many lost ones, or threads away, nobody is trusted: one user may be many (`/etc/subuid`).
    const LOST: usize = 16;

    fn has(&mut self, uid: u32, now: Instant) -> bool {
        let is_old = |(_, since): &(u32, Instant)| now.duration_since(*since) > Self::MEMORY;
        for list in [&mut self.late, &mut self.lost] {
            while list.front().is_some_and(is_old) {
                list.pop_front();
            }
        }
        let of = |list: &VecDeque<(u32, Instant)>| list.iter().filter(|(of, _)| *of == uid).count();
        self.lost.len().max(self.away) < Self::LOST
            && of(&self.lost) == 0
            && of(&self.late) < Self::LATE
    }

    /// A load of this user had to wait, or worked, for a little while.
    fn late(&mut self, uid: u32, now: Instant) {
        // Whoever is late again and again is remembered by the last times.
        if self.late.len() >= 64 * Self::LATE {
            self.late.pop_front();
        }
        self.late.push_back((uid, now));
    }

    /// A load of this user was taken over.
    fn lost(&mut self, uid: u32, now: Instant) {
        self.lost.push_back((uid, now));
        self.away += 1;
    }
}

impl<D> Yard<D> {
    fn give(&mut self, owner: Owner, load: Load<D>) {
        let corner = self.users.entry(owner.uid).or_default();
        let queue = corner.waiting.entry(owner.connection).or_default();
        queue.push_back(load);
        corner.loads += 1;
        self.waiting += 1;
        if queue.len() == 1 && !corner.carried.contains(&owner.connection) {
            corner.ready.push_back(owner.connection);
        }
        self.queue(owner.uid);
    }

    /// A load that mostly takes some microseconds: for the caller itself, unless an earlier one is in the way, or its user
    /// is not trusted.
    fn give_quick(&mut self, owner: Owner, load: Load<D>) {
        let corner = self.users.entry(owner.uid).or_default();
        let first = !corner.carried.contains(&owner.connection)
            && !corner.waiting.contains_key(&owner.connection);
        if !first || corner.carried.len() >= SHARE || !self.trust.has(owner.uid, Instant::now()) {
            return self.give(owner, load);
        }
        corner.carried.insert(owner.connection);
        self.here.push(owner.uid, Here::Look(owner, load));
    }

    /// A user gets its turn, if it wants one.
    fn queue(&mut self, uid: u32) {
        if let Some(corner) = self.users.get_mut(&uid)
            && corner.is_ready()
            && !std::mem::replace(&mut corner.queued, true)
        {
            self.line.push(uid);
        }
    }

    fn next(&mut self, crew: Crew) -> Option<(Owner, Load<D>)> {
        let uid = self.line.pop(crew)?;
        let taken = self.take(uid);
        if taken.is_none() {
            self.line.put_down(uid);
        }
        taken
    }

    fn take(&mut self, uid: u32) -> Option<(Owner, Load<D>)> {
        let corner = self.users.get_mut(&uid)?;
        corner.queued = false;
        let connection = corner.ready.pop_front()?;
        let queue = corner.waiting.get_mut(&connection)?;
        let load = queue.pop_front()?;
        if queue.is_empty() {
            corner.waiting.remove(&connection);
        }
        corner.carried.insert(connection);
        corner.loads -= 1;
        self.waiting -= 1;
        self.queue(uid);
        Some((Owner { uid, connection }, load))
    }

    /// Whether somebody of a crew is called. One that is started counts from now on.
    fn call(&mut self, crew: Crew) -> Call {
        let wanted = self.line.len(crew);
        let threads = self.crews.get_mut(crew);
        let starts = wanted > threads.idle + threads.coming && threads.all < crew.most();
        if starts {
            threads.all += 1;
            threads.coming += 1;
        }
        Call {
            crew,
            wakes: wanted != 0,
            starts,
        }
    }

    fn found(&mut self, owner: Owner, found: Option<D>) {
        if let Some(found) = found {
            self.here.push(owner.uid, Here::Found(found));
        }
    }

    fn carried(&mut self, owner: Owner) {
        let Some(corner) = self.users.get_mut(&owner.uid) else {
            return;
        };
        corner.carried.remove(&owner.connection);
        if corner.waiting.contains_key(&owner.connection) {
            corner.ready.push_back(owner.connection);
        }
        if corner.carried.is_empty() && corner.waiting.is_empty() {
            self.users.remove(&owner.uid);
        } else {
            self.queue(owner.uid);
        }
    }
}

impl<D: Send + 'static> Porters<D> {
    /// Starts those that stay. The starter starts the others.
    pub fn new(starter: Starter, known: Known) -> io::Result<Self> {
        extern "C" fn interrupt(_: i32) {}
        let handler = SigHandler::Handler(interrupt);
        // Without SA_RESTART: that the call ends is what the signal is for.
        let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing, so it is safe at any moment.
        unsafe { sigaction(SIGNAL, &action) }?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let is_shared = known.but_for(&IN_PLACE_OF_USERS) != 0;
        let yard = Yard {
            users: HashMap::new(),
            here: Turns::new(known.clone()),
            under_way: None,
            trust: Trust::default(),
            line: Line::new(known),
            waiting: 0,
            crews: OfEach::default(),
        };
        let shared = Shared {
            yard: Mutex::new(yard),
            work: OfEach::default(),
            found: EventFd::from_value_and_flags(0, flags)?,
            starter,
            is_shared,
        };
        let porters = Porters {
            shared: Arc::new(shared),
        };
        for crew in Crew::ALL.into_iter().flat_map(|crew| [crew; KEPT]) {
            let shared = porters.shared.clone();
            let porter = thread::Builder::new().name(NAME.into());
            porter.spawn(move || shared.carry(crew))?;
        }
        Ok(porters)
    }

    /// Has a load carried on behalf of somebody. It runs on another thread, after the earlier ones of the same owner.
    pub fn give(&self, owner: Owner, load: impl FnOnce() -> Option<D> + Send + 'static) {
        self.ask(owner, move |_| load());
    }

    /// The same for a load that asks for something that may take long.
    pub fn ask(&self, owner: Owner, load: impl FnOnce(&Carrier) -> Option<D> + Send + 'static) {
        let mut yard = self.shared.lock();
        yard.give(owner, Box::new(load));
        self.shared.find_porter(yard);
    }

    /// The same for a load that mostly takes some microseconds: the caller may have to carry it itself ([`Here::Look`]).
    pub fn give_quick(&self, owner: Owner, load: impl FnOnce() -> Option<D> + Send + 'static) {
        self.ask_quick(owner, move |_| load());
    }

    /// The same for a load that asks for something that may take long, and mostly does not.
    pub fn ask_quick(
        &self,
        owner: Owner,
        load: impl FnOnce(&Carrier) -> Option<D> + Send + 'static,
    ) {
        let mut yard = self.shared.lock();
        yard.give_quick(owner, Box::new(load));
        self.shared.find_porter(yard);
    }

    /// How much the caller has to do itself.
    pub fn here(&self) -> usize {
        self.shared.lock().here.len()
    }

    /// The least `order` of the users for whom the caller has something to do.
    pub fn first<O: Ord>(&self, order: impl Fn(u32) -> O) -> Option<O> {
        self.shared.lock().here.first(order)
    }

    /// What the caller has to do next: something for the user of whom `order` is the least.
    pub fn next<O: Ord>(&self, order: impl Fn(u32) -> O) -> Option<(u32, Here<D>)> {
        let mut yard = self.shared.lock();
        let (uid, here) = yard.here.next(order)?;
        if let Here::Look(owner, _) = &here {
            yard.under_way = Some(*owner);
        }
        Some((uid, here))
    }

    /// The load that was last asked for was carried, in time or late.
    pub fn carried(&self, pace: Pace) {
        let mut yard = self.shared.lock();
        if let Some(owner) = yard.under_way.take() {
            if pace == Pace::Late {
                debug!(owner.uid, "a look had to wait, or work, for a little while");
                yard.trust.late(owner.uid, Instant::now());
            }
            yard.carried(owner);
        }
        self.shared.find_porter(yard);
    }

    /// Who carries the load that was last asked for has to wait, and another thread goes on asking for loads. False when
    /// there is none.
    pub fn take_over(&self) -> bool {
        let mut yard = self.shared.lock();
        let under_way = yard.under_way.take();
        if let Some(owner) = under_way {
            debug!(
                owner.uid,
                "a look has to wait, or works: porters look for this user from now on"
            );
            yard.trust.lost(owner.uid, Instant::now());
        }
        under_way.is_some()
    }

    /// Who had to wait comes back, with what it has found.
    pub fn come_back(&self, owner: Owner, found: Option<D>) {
        let mut yard = self.shared.lock();
        yard.trust.away = yard.trust.away.saturating_sub(1);
        yard.carried(owner);
        yard.found(owner, found);
        self.shared.find_porter(yard);
        let _ = self.shared.found.write(1);
    }

    /// Something was found on behalf of a user by somebody else than a porter.
    pub fn tell(&self, uid: u32, found: D) {
        self.shared.lock().here.push(uid, Here::Found(found));
        let _ = self.shared.found.write(1);
    }

    /// Becomes readable again whenever something was found: to be watched for edges.
    pub fn found(&self) -> BorrowedFd<'_> {
        self.shared.found.as_fd()
    }

    /// Loads that wait, and loads that are being carried.
    pub fn load(&self) -> (usize, usize) {
        let yard = self.shared.lock();
        let carried = yard.users.values().map(|corner| corner.carried.len());
        (yard.waiting, carried.sum())
    }

    /// Loads of a user that wait.
    pub fn waiting_of(&self, uid: u32) -> usize {
        let yard = self.shared.lock();
        yard.users.get(&uid).map_or(0, |corner| corner.loads)
    }

    /// Who lets go of what strangers have, on behalf of somebody.
    pub fn closer(&self, owner: Owner) -> Closer<D> {
        Closer::new(owner, self.clone())
    }

    /// Lets go of something: here, if this is a porter that carries for that user already.
    fn let_go(&self, owner: Owner, thing: impl Send + 'static) {
        if CARRIES_FOR.get() == Some(owner.uid) {
            return drop(thing);
        }
        self.give(owner, move || {
            drop(thing);
            None
        });
    }
}

impl<D: Send + 'static> Shared<D> {
    /// Never held while a load is carried, nor where anything can wait.
    fn lock(&self) -> MutexGuard<'_, Yard<D>> {
        self.yard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes somebody, or has somebody started, if a load may be taken up. Who takes one calls this again: so there are as many as can
    /// be used, however late those that were woken come.
    fn find_porter(self: &Arc<Self>, mut yard: MutexGuard<'_, Yard<D>>) {
        let calls = Crew::ALL.map(|crew| yard.call(crew));
        // Who is woken wants the lock at once, maybe on this core.
        drop(yard);
        for call in calls {
            if call.wakes {
                self.work.get(call.crew).notify_one();
            }
            if call.starts {
                let (porter, none) = (self.clone(), self.clone());
                let failed = move || {
                    let mut yard = none.lock();
                    let threads = yard.crews.get_mut(call.crew);
                    threads.all -= 1;
                    threads.coming -= 1;
                };
                self.starter
                    .order(NAME, move || porter.carry(call.crew), failed);
            }
        }
    }

    fn carry(self: &Arc<Self>, crew: Crew) {
        give_way(self.is_shared && crew == Crew::OfCrowd);
        let work = self.work.get(crew);
        let mut nudge = Nudge::new();
        let mut yard = self.lock();
        yard.crews.get_mut(crew).coming -= 1;
        loop {
            let Some((owner, load)) = yard.next(crew) else {
                let threads = yard.crews.get_mut(crew);
                if threads.idle >= KEPT {
                    threads.all -= 1;
                    return;
                }
                threads.idle += 1;
                if nudge.started {
                    let woken = work.wait_timeout(yard, REST);
                    let (lock, slept) = woken.unwrap_or_else(PoisonError::into_inner);
                    yard = lock;
                    if slept.timed_out() {
                        nudge.stop();
                    }
                } else {
                    let woken = work.wait(yard);
                    yard = woken.unwrap_or_else(PoisonError::into_inner);
                }
                yard.crews.get_mut(crew).idle -= 1;
                continue;
            };
            self.find_porter(yard);
            nudge.start();
            CARRIES_FOR.set(Some(owner.uid));
            let found = load(&Carrier::new());
            CARRIES_FOR.set(None);
            yard = self.lock();
            yard.line.put_down(owner.uid);
            yard.carried(owner);
            if found.is_some() {
                yard.found(owner, found);
                drop(yard);
                let _ = self.found.write(1);
                yard = self.lock();
            }
        }
    }
}

/// Has this thread take no core from a running one when it is woken: the control thread, which wakes it, first ends its
/// turn. It may have less weight than others, too.
fn give_way(weighs_less: bool) {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameters outlive the call; 0 is this thread. Where it fails, porters are in the way a little.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameters) };
    if weighs_less {
        // SAFETY: takes three integers; 0 is this thread. Likewise.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
    }
}

/// How a quick load was carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// As a look mostly is.
    InTime,
    /// It had to wait for somebody, or worked, for longer than `Trust::QUICK`.
    Late,
}

/// Carries a quick load, and nothing else: what the daemon's threads wait for among themselves is nobody's fault. This thread has `used`
/// so much of its processor so far.
pub fn carry<D>(load: Load<D>, used: Duration) -> (Option<D>, Pace) {
    let (since, before) = (Instant::now(), waits());
    let found = load(&Carrier::new());
    // A thread that had no core for a while has not waited for anybody, nor worked.
    let waited = || waits() != before;
    let worked = || processor_time().saturating_sub(used) > Trust::QUICK;
    let late = since.elapsed() > Trust::QUICK && (waited() || worked());
    (found, if late { Pace::Late } else { Pace::InTime })
}

/// How often this thread has waited for something, of its own accord.
fn waits() -> i64 {
    use nix::sys::resource::{UsageWho, getrusage};
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.voluntary_context_switches())
}

/// A timer that interrupts the calls of this thread.
struct Nudge {
    timer: Option<Timer>,
    started: bool,
}

impl Nudge {
    fn new() -> Self {
        let notify = SigevNotify::SigevThreadId {
            signal: SIGNAL,
            thread_id: gettid().as_raw(),
            si_value: 0,
        };
        Nudge {
            timer: Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(notify)).ok(),
            started: false,
        }
    }

    fn set(&mut self, expiration: Expiration) {
        if let Some(timer) = &mut self.timer {
            let _ = timer.set(expiration, TimerSetTimeFlags::empty());
        }
    }

    /// Unless it runs already.
    fn start(&mut self) {
        if !std::mem::replace(&mut self.started, true) {
            self.set(Expiration::IntervalDelayed(
                NUDGE.into(),
                NUDGE_AGAIN.into(),
            ));
        }
    }

    fn stop(&mut self) {
        self.started = false;
        self.set(Expiration::OneShot(Duration::ZERO.into()));
    }
}

#[cfg(test)]
mod tests;
