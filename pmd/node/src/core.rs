//! A poll core: runs to completion. Completions, inbound messages, streams with something to send,
//! credits, timers; bounded batches; no allocation, and no system call but to wake a thread that sleeps,
//! or to sleep itself when the configuration allows it.

mod commands;
mod idle;
mod protocol;
mod streams;

use crate::live::Live;
use crate::mail::{Look, Mail, Waker};
use crate::stages::{Stage, Stopwatch};
use crate::stream::todo;
use crate::totals::Counts;
use crate::{Command, Notice, Settings, Totals};
use rdsock_model::Fabric;
use rdsock_proto::{Action, Actions, Node, NodeId, Refusal, Status, StreamId};
use rdsock_rde::spec::status;
use rdsock_rde::{DeviceFailed, QueueSet, Rde, Region};
use rdsock_vfio::{EventFd, Piece, Window};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

/// Completions, messages, and commands taken in one turn.
const BATCH: usize = 64;
/// Actions asked of the protocol at once.
const ACTIONS: usize = 128;
/// Turns without work between two looks at the clock.
const TURNS_PER_LOOK: u32 = 16;
/// Bytes of a turn after which a core that it shares with others gives way at once.
const LITTLE: u64 = 4096;
/// Nanoseconds between two looks whether the device is alive.
const CHECK_EVERY: u64 = 100_000_000;
/// Looks after which a device that has work and completes nothing is taken for stuck. What can't be done
/// completes too, much earlier: the lane fails.
const STUCK_CHECKS: u32 = 50;

/// What a poll core shares with the other threads.
#[derive(Debug)]
pub(crate) struct Inbox {
    /// From the control thread.
    pub commands: Mail<Command>,
    /// Streams to look at, from the anchors' thread.
    pub look: Arc<Look>,
    pub stop: AtomicBool,
    pub waker: Arc<Waker>,
    pub totals: Totals,
}

/// The memory that a node may reach, and its key.
pub(crate) struct Reach {
    pub window: Window,
    pub region: Option<Region>,
}

pub(crate) struct Core {
    /// Of this core, of its queue set, and of the queue sets that it talks to.
    pub number: u16,
    pub node: Node,
    pub rde: Arc<Rde>,
    /// Poll cores of the node that use the device.
    pub working: Arc<AtomicUsize>,
    pub set: QueueSet,
    /// The model to be stepped, when the device is one in this process.
    pub fabric: Option<Fabric>,
    pub interrupt: Arc<EventFd>,
    pub reach: HashMap<u16, Reach>,
    pub inbox: Arc<Inbox>,
    pub notices: Arc<Mail<Notice>>,
    pub settings: Settings,
    streams: Vec<Option<Live>>,
    /// Places in `streams` that are polled.
    hot: Vec<u32>,
    actions: Actions,
    batch: Vec<Action>,
    pieces: Vec<Piece>,
    /// Nodes whose posts were rejected, until there is room again.
    blocked: Vec<u16>,
    failed: Option<DeviceFailed>,
    start: Instant,
    now: u64,
    /// The device was asked for an interrupt.
    armed: bool,
    /// The model did its part when it was asked last.
    stepped: bool,
    idle_turns: u32,
    idle_since: u64,
    checked: u64,
    /// Looks since something completed at which something was outstanding.
    stuck_checks: u32,
    counts: Counts,
    watch: Stopwatch,
    /// Busy turns at which the counts of the nodes were shown last.
    shown: u64,
    /// The core that it runs on, plus 1.
    core: u32,
    /// Others run there as well.
    shares_core: bool,
    /// Bytes that this turn has sent.
    sent: u64,
}

/// What a core is made of.
pub(crate) struct Parts {
    pub number: u16,
    pub node: Node,
    pub rde: Arc<Rde>,
    /// Poll cores of the node that use the device.
    pub working: Arc<AtomicUsize>,
    pub set: QueueSet,
    pub fabric: Option<Fabric>,
    pub interrupt: Arc<EventFd>,
    pub reach: HashMap<u16, Reach>,
    pub inbox: Arc<Inbox>,
    pub notices: Arc<Mail<Notice>>,
    pub settings: Settings,
    pub start: Instant,
}

impl Core {
    pub fn new(parts: Parts) -> Self {
        let streams = parts.settings.streams;
        Core {
            number: parts.number,
            node: parts.node,
            rde: parts.rde,
            working: parts.working,
            set: parts.set,
            fabric: parts.fabric,
            interrupt: parts.interrupt,
            reach: parts.reach,
            inbox: parts.inbox,
            notices: parts.notices,
            settings: parts.settings,
            streams: (0..streams).map(|_| None).collect(),
            hot: Vec::with_capacity(streams),
            actions: Actions::new(ACTIONS),
            batch: Vec::with_capacity(ACTIONS),
            pieces: Vec::with_capacity(16),
            blocked: Vec::new(),
            failed: None,
            start: parts.start,
            now: 0,
            armed: false,
            stepped: true,
            idle_turns: 0,
            idle_since: 0,
            checked: 0,
            stuck_checks: 0,
            counts: Counts::default(),
            watch: Stopwatch::new(),
            shown: 0,
            core: 0,
            shares_core: false,
            sent: 0,
        }
    }

    pub fn run(mut self) {
        while !self.inbox.stop.load(Ordering::Relaxed) {
            let worked = match self.failed {
                None => self.turn().unwrap_or_else(|failed| self.fail(failed)),
                Some(_) => self.commands(),
            };
            if !worked {
                self.idle();
                continue;
            }
            self.idle_turns = 0;
            let sent = std::mem::take(&mut self.sent);
            if sent <= LITTLE && self.shares_core {
                // What remains to be done of it can wait, and the program on this core cannot.
                self.give_way();
            }
        }
    }

    /// One turn of the loop. True when there was work.
    fn turn(&mut self) -> Result<bool, DeviceFailed> {
        if self.idle_turns.is_multiple_of(TURNS_PER_LOOK) {
            self.now = self.start.elapsed().as_nanos() as u64;
        }
        let worked = if self.watch.turn() {
            let worked = self.stages::<true>()?;
            if worked {
                self.watch.keep();
            }
            worked
        } else {
            self.stages::<false>()?
        };
        self.counts.turns += 1;
        self.counts.busy_turns += u64::from(worked);
        if self.now.wrapping_sub(self.checked) > CHECK_EVERY {
            self.checked = self.now;
            self.core = here();
            self.show();
            self.set.check()?;
            self.stuck_checks += u32::from(self.set.outstanding() != 0);
            if self.stuck_checks > STUCK_CHECKS {
                return Err(DeviceFailed::Stuck);
            }
        }
        Ok(worked)
    }

    /// The stages of a turn; their times are taken when it is `TIMED`. What programs have written goes
    /// first: the other end waits for it, and for nothing of the rest.
    fn stages<const TIMED: bool>(&mut self) -> Result<bool, DeviceFailed> {
        let mut worked = self.poll_hot();
        self.lap::<TIMED>(Stage::Streams);
        if worked {
            self.drive::<TIMED>()?;
        }
        worked |= self.step();
        self.lap::<TIMED>(Stage::Device);
        worked |= self.completions()?;
        self.lap::<TIMED>(Stage::Completions);
        worked |= self.messages()?;
        self.lap::<TIMED>(Stage::Messages);
        worked |= self.commands();
        self.lap::<TIMED>(Stage::Commands);
        worked |= self.looks();
        self.lap::<TIMED>(Stage::Looks);
        worked |= self.drive::<TIMED>()?;
        Ok(worked)
    }

    #[inline]
    fn lap<const TIMED: bool>(&mut self, stage: Stage) {
        if TIMED {
            self.watch.lap(stage);
        }
    }

    /// Shows other threads what was counted.
    fn show(&mut self) {
        self.counts.take(&self.set.stats());
        self.inbox.totals.show(&self.counts, &self.watch);
        if self.shown != self.counts.busy_turns {
            self.shown = self.counts.busy_turns;
            self.inbox.totals.show_nodes(&self.node);
        }
    }

    /// Has the model do its part, unless another core is at that. While nothing of this core is in its hands
    /// there is none, and the lock that the cores share in it is left alone.
    fn step(&mut self) -> bool {
        let Some(fabric) = &self.fabric else {
            return false;
        };
        if self.set.outstanding() == 0 && !self.armed {
            return false;
        }
        let stepped = fabric.step_set(self.number.into(), self.now);
        self.stepped = stepped.is_some();
        self.counts.model_busy += u64::from(stepped.is_none());
        stepped.unwrap_or(false)
    }

    fn completions(&mut self) -> Result<bool, DeviceFailed> {
        let (node, now) = (&mut self.node, self.now);
        let mut denied = None;
        let taken = self
            .set
            .poll_completions(BATCH, |done| match outcome(done.status) {
                Some(outcome) => {
                    node.handle_completion(NodeId(done.target), done.tag, outcome, now);
                }
                None => denied = Some(DeviceFailed::Denies(done.status)),
            })?;
        if let Some(denied) = denied {
            return Err(denied);
        }
        if taken != 0 {
            self.stuck_checks = 0;
            self.make_room();
        }
        Ok(taken != 0)
    }

    fn messages(&mut self) -> Result<bool, DeviceFailed> {
        let (node, now) = (&mut self.node, self.now);
        let taken = self.set.poll_messages(BATCH, |message| {
            node.handle_message(NodeId(message.source), &message.payload, now);
        })?;
        Ok(taken != 0)
    }

    fn live(&mut self, id: StreamId) -> Option<&mut Live> {
        self.streams
            .get_mut(index(id))?
            .as_mut()
            .filter(|live| live.id == id)
    }

    fn with(&mut self, id: StreamId, what: impl FnOnce(&mut Live, &mut Node)) {
        if let Some(live) = self.streams.get_mut(index(id)).and_then(Option::as_mut)
            && live.id == id
        {
            what(live, &mut self.node);
        }
    }

    fn tell(&self, notice: Notice) {
        // There is room, since `drive` looks before it asks the protocol for events; but when all streams end at
        // once, the control thread may have to make some.
        let mut notice = notice;
        while let Err(full) = self.notices.put(notice) {
            if self.inbox.stop.load(Ordering::Relaxed) {
                return;
            }
            notice = full;
            std::thread::yield_now();
        }
    }

    /// The device is not used any more: all streams end, and new ones find no place.
    fn fail(&mut self, failed: DeviceFailed) -> bool {
        tracing::error!(
            "poll core {} does not use the device any more: {failed}; its streams end, and when no poll core is \
             left, new connections stay on kernel TCP; restart rdsockd when the device is well again",
            self.number
        );
        self.failed = Some(failed);
        self.show();
        self.inbox.totals.fail();
        // Nobody writes into its streams' memory any more.
        for reach in self.reach.values_mut() {
            reach.region = None;
        }
        if self.working.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.rde.management().leave();
        }
        self.tell(Notice::DeviceFailed);
        self.hot.clear();
        let streams = std::mem::take(&mut self.streams);
        for live in streams.into_iter().flatten() {
            let ticket = live.stream.ticket;
            live.stream.ask(todo::BROKEN);
            let why = Refusal::Lost;
            self.tell(Notice::Refused { ticket, why });
            self.tell(Notice::Released { ticket });
        }
        true
    }
}

/// The core that this thread runs on, plus 1; 0 when the system does not say.
fn here() -> u32 {
    nix::sched::sched_getcpu().map_or(0, |core| core as u32 + 1)
}

fn index(id: StreamId) -> usize {
    id.to_u64() as u32 as usize
}

/// How the protocol takes a completion. `None` when it says that our own memory or descriptor is wrong: what
/// follows it in its lane is executed, and would leave a gap.
fn outcome(done: rdsock_rde::spec::Status) -> Option<Status> {
    Some(match done.0 {
        status::OK => Status::Success,
        status::FLUSHED => Status::Flushed,
        status::REFUSED_KEY
        | status::REFUSED_RIGHTS
        | status::REFUSED_SOURCE
        | status::REFUSED_BOUNDS
        | status::TARGET_ACCESS => Status::Refused,
        status::BAD_DESCRIPTOR | status::LOCAL_ACCESS | status::BAD_TARGET => return None,
        _ => Status::Failed,
    })
}
