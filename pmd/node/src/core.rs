//! A poll core: runs to completion. Completions, inbound messages, streams with something to send,
//! credits, timers; bounded batches; no allocation, and no system call but to wake a thread that sleeps,
//! or to sleep itself when the configuration allows it.

use crate::anchors::Desk;
use crate::live::Live;
use crate::mail::{Look, Mail, Waker};
use crate::memory::StreamMemory;
use crate::stages::{Stage, Stopwatch};
use crate::stream::{NodeStream, todo};
use crate::totals::Counts;
use crate::{Asked, Command, Idle, Notice, Settings, Totals};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rdsock_model::Fabric;
use rdsock_proto::{
    Action, Actions, Event, Node, NodeId, Place, Refusal, Status, StreamId, Write as Transfer,
};
use rdsock_rde::spec::{Key, status};
use rdsock_rde::{
    Data, DeviceFailed, NotPosted, Notify, Operation, QueueSet, Rde, Region, Remote, Rights, Work,
};
use rdsock_shm::layout::want;
use rdsock_shm::wake;
use rdsock_vfio::{EventFd, Piece, Window};
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Completions, messages, and commands taken in one turn.
const BATCH: usize = 64;
/// Actions asked of the protocol at once.
const ACTIONS: usize = 128;
/// Streams that are polled however long nothing has happened on them.
const ALWAYS_HOT: usize = 64;
/// Nanoseconds without an event after which a stream is polled no more, when there are many.
const COOLS_AFTER: u64 = 2_000_000;
/// Turns without work between two looks at the clock.
const TURNS_PER_LOOK: u32 = 16;
/// Turns without work after which a core that may sleep gives way to other threads, while it seems to
/// have its core to itself.
const TURNS_BEFORE_YIELD: u32 = 4;
/// A core that sleeps looks around after this time.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// The same while there are programs that can't wake it. (The kernel counts in milliseconds, and one is added.)
const POLLED_EVERY: Duration = Duration::ZERO;
/// Bytes of a turn after which a core that it shares with others gives way at once.
const LITTLE: u64 = 4096;
/// Giving way took longer: somebody else was on the core meanwhile.
const LOST: Duration = Duration::from_micros(2);
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
    pub desk: Arc<Desk>,
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
    pub desk: Arc<Desk>,
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
            desk: parts.desk,
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

    /// The stages of a turn; their times are taken when it is `TIMED`.
    fn stages<const TIMED: bool>(&mut self) -> Result<bool, DeviceFailed> {
        let mut worked = self.step();
        self.lap::<TIMED>(Stage::Device);
        worked |= self.completions()?;
        self.lap::<TIMED>(Stage::Completions);
        worked |= self.messages()?;
        self.lap::<TIMED>(Stage::Messages);
        worked |= self.commands();
        self.lap::<TIMED>(Stage::Commands);
        worked |= self.looks();
        self.lap::<TIMED>(Stage::Looks);
        worked |= self.poll_hot();
        self.lap::<TIMED>(Stage::Streams);
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
            for blocked in self.blocked.drain(..) {
                self.node.handle_room(NodeId(blocked));
            }
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

    fn commands(&mut self) -> bool {
        let mut worked = false;
        for _ in 0..BATCH {
            // A command leads to two notices at most, which must find room.
            if self.notices.room() <= ACTIONS {
                break;
            }
            let Some(command) = self.inbox.commands.take() else {
                break;
            };
            worked = true;
            self.counts.commands += 1;
            self.obey(command);
        }
        worked
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Connect { stream, addresses } => {
                let place = self.place(&stream);
                let asked = match (place, self.failed) {
                    (Some(place), None) => {
                        let node = NodeId(stream.node);
                        self.node.connect(node, addresses, place, self.now)
                    }
                    _ => Err(Refusal::Lost),
                };
                match asked {
                    Ok(id) => self.enter(stream, id),
                    Err(why) => {
                        let ticket = stream.ticket;
                        self.tell(Notice::Refused { ticket, why });
                        self.tell(Notice::Released { ticket });
                    }
                }
            }
            Command::Accept {
                id: Asked { id, .. },
                stream,
            } => {
                let accepted = self
                    .place(&stream)
                    .is_some_and(|place| self.node.accept(id, place).is_ok());
                if !accepted {
                    // It has ended meanwhile, or does here.
                    let _ = self.node.refuse(id, Refusal::Limit);
                    let ticket = stream.ticket;
                    self.desk.ask(&stream, todo::BROKEN);
                    return self.tell(Notice::Released { ticket });
                }
                self.enter(stream, id);
                if let Some(live) = self.live(id) {
                    live.open = true;
                }
                self.heat(id);
            }
            Command::Refuse { id, why } => {
                // It has ended meanwhile, if that fails.
                let _ = self.node.refuse(id.id, why);
            }
            Command::Gone { stream } => {
                if let Some(id) = StreamId::from_u64(stream.id.load(Ordering::Relaxed)) {
                    self.with(id, |live, node| {
                        if !live.gone {
                            live.break_it(node);
                        }
                    });
                }
            }
            Command::Ready { stream } => self.desk.ask(&stream, todo::READY),
        }
    }

    /// Where another node may write for a stream.
    fn place(&self, stream: &NodeStream) -> Option<Place> {
        let region = self.reach.get(&stream.node)?.region.as_ref()?;
        let incoming = 1 - stream.end;
        let memory: &StreamMemory = &stream.memory;
        Some(Place {
            key: region.key().0,
            ring: memory.ring_in_region(incoming),
            word: memory.head_in_region(incoming),
            log2: memory.ring_size().trailing_zeros() as u8,
        })
    }

    fn enter(&mut self, stream: Arc<NodeStream>, id: StreamId) {
        stream.id.store(id.to_u64(), Ordering::Relaxed);
        let at = index(id);
        if let Some(place) = self.streams.get_mut(at) {
            *place = Some(Live::new(stream, id, self.now));
        }
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

    /// What the anchors' thread wants to be looked at.
    fn looks(&mut self) -> bool {
        let mut worked = false;
        for _ in 0..BATCH {
            let Some(stream) = self.inbox.look.take() else {
                break;
            };
            worked = true;
            self.counts.looks += 1;
            let Some(id) = StreamId::from_u64(stream.id.load(Ordering::Relaxed)) else {
                continue;
            };
            self.look_at(id);
            self.heat(id);
        }
        worked
    }

    fn look_at(&mut self, id: StreamId) -> bool {
        let now = self.now;
        let Some(live) = self.streams.get_mut(index(id)).and_then(Option::as_mut) else {
            return false;
        };
        if live.id != id || !live.look(&mut self.node) {
            return false;
        }
        live.moved = now;
        let what = std::mem::take(&mut live.ask);
        if what != 0 {
            self.desk.ask(&live.stream, what);
        }
        true
    }

    /// Has a stream polled.
    fn heat(&mut self, id: StreamId) {
        let at = index(id);
        let now = self.now;
        if let Some(live) = self.live(id)
            && live.open
            && !live.gone
        {
            live.moved = now;
            if !live.hot {
                live.hot = true;
                self.hot.push(at as u32);
            }
        }
    }

    fn poll_hot(&mut self) -> bool {
        self.counts.polled += self.hot.len() as u64;
        let mut worked = false;
        let mut at = 0;
        while let Some(&place) = self.hot.get(at) {
            let Some(live) = self
                .streams
                .get_mut(place as usize)
                .and_then(Option::as_mut)
            else {
                self.hot.swap_remove(at);
                continue;
            };
            live.tell_core(self.core);
            let (id, gone) = (live.id, live.gone);
            let looked = self.look_at(id);
            worked |= looked;
            let many = self.hot.len() > ALWAYS_HOT;
            if gone || (!looked && many && self.is_cold(id)) && self.cool(id) {
                if let Some(live) = self.live(id) {
                    live.hot = false;
                }
                self.hot.swap_remove(at);
            } else {
                at += 1;
            }
        }
        worked
    }

    fn is_cold(&mut self, id: StreamId) -> bool {
        let now = self.now;
        self.live(id)
            .is_none_or(|live| now.wrapping_sub(live.moved) > COOLS_AFTER)
    }

    /// Asks a program for a sign of what it does next, so that it need not be polled. False when it
    /// has done something meanwhile.
    fn cool(&mut self, id: StreamId) -> bool {
        self.with(id, |live, node| live.stop_watching(node));
        let Some(live) = self.live(id) else {
            return true;
        };
        let stream = &live.stream;
        wake::ask(&stream.out().bytes.want, want::WAKE);
        wake::ask(&stream.incoming().space.want, want::WAKE);
        !stream.is_deaf() && !self.look_at(id)
    }

    /// Lets the protocol act.
    fn drive<const TIMED: bool>(&mut self) -> Result<bool, DeviceFailed> {
        let mut worked = false;
        // Events must find room.
        while self.notices.room() > ACTIONS {
            let more = self.node.poll(self.now, &mut self.actions);
            self.lap::<TIMED>(Stage::Protocol);
            if self.actions.is_empty() {
                break;
            }
            worked = true;
            self.batch.clear();
            self.batch.extend(self.actions.drain());
            self.counts.actions += self.batch.len() as u64;
            self.carry_out()?;
            self.lap::<TIMED>(Stage::Posts);
            if !more {
                break;
            }
        }
        if worked {
            self.set.ring();
            self.lap::<TIMED>(Stage::Posts);
            // The model executes at once what was posted.
            self.step();
            self.lap::<TIMED>(Stage::Device);
        }
        Ok(worked)
    }

    fn carry_out(&mut self) -> Result<(), DeviceFailed> {
        let batch = std::mem::take(&mut self.batch);
        let blocked_before = self.blocked.len();
        for (at, action) in batch.iter().enumerate() {
            let posted = match action {
                Action::Event(event) => {
                    self.on_event(*event);
                    continue;
                }
                Action::Restart { node } => {
                    let resume = Work {
                        target: node.0,
                        operation: Operation::Resume,
                        tag: 0,
                        report: false,
                    };
                    // When it does not fit, the lane stays failed, and the next post shows that.
                    let _ = self.set.post(&resume);
                    continue;
                }
                Action::Send { node, seq, .. } | Action::Write { node, seq, .. } => {
                    if self.blocked[blocked_before..].contains(&node.0) {
                        continue;
                    }
                    let report = is_last(&batch[at + 1..], *node);
                    (*node, *seq, self.post(action, report))
                }
            };
            let (node, seq, result) = posted;
            match result {
                Ok(()) => {}
                Err(NotPosted::Failed(failed)) => return Err(failed),
                Err(_) => {
                    self.node.handle_rejected(node, seq);
                    self.blocked.push(node.0);
                }
            }
        }
        self.batch = batch;
        Ok(())
    }

    fn post(&mut self, action: &Action, report: bool) -> Result<(), NotPosted> {
        match action {
            Action::Send { node, seq, message } => self.set.post(&Work {
                target: node.0,
                operation: Operation::Message(Notify {
                    set: self.number,
                    payload: message,
                }),
                tag: *seq,
                report,
            }),
            Action::Write { node, seq, write } => {
                let Transfer {
                    stream,
                    position,
                    len,
                    ..
                } = *write;
                let live = self.streams.get(index(stream)).and_then(Option::as_ref);
                let found = live.is_some_and(|live| live.pieces(position, len, &mut self.pieces));
                if !found {
                    return Err(NotPosted::Invalid("no memory for a write"));
                }
                self.sent += u64::from(len);
                let set = self.number;
                let notify = write.notify.as_ref().map(|payload| Notify { set, payload });
                self.set.post(&Work {
                    target: node.0,
                    operation: Operation::Write {
                        to: Remote {
                            key: Key(write.key),
                            offset: write.offset,
                        },
                        data: Data::Pieces(&self.pieces),
                        word: Some((write.word, write.head)),
                        notify,
                    },
                    tag: *seq,
                    report,
                })
            }
            _ => Ok(()),
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Incoming {
                stream,
                node,
                addresses,
            } => self.tell(Notice::Incoming {
                id: Asked {
                    core: self.number,
                    id: stream,
                },
                node: node.0,
                addresses,
            }),
            Event::Established { stream } => {
                let now = self.now;
                let ticket = self.live(stream).map(|live| {
                    (live.open, live.moved) = (true, now);
                    live.stream.ticket
                });
                if let Some(ticket) = ticket {
                    self.tell(Notice::Established { ticket });
                    self.heat(stream);
                }
            }
            Event::Refused { stream, refusal } => {
                if let Some(live) = self.live(stream) {
                    live.gone = true;
                    let ticket = live.stream.ticket;
                    let why = refusal;
                    self.tell(Notice::Refused { ticket, why });
                }
            }
            Event::PeerHead { stream, head } => self.arrived(stream, head),
            Event::Credit { stream, to } => {
                if let Some(live) = self.live(stream) {
                    let what = live.credit(to);
                    let behind = live.is_behind();
                    if what != 0 {
                        let stream = live.stream.clone();
                        self.desk.ask(&stream, what);
                    }
                    if behind {
                        self.look_at(stream);
                    }
                }
            }
            Event::PeerShut { stream, end } => {
                if let Some(live) = self.live(stream) {
                    let stream = live.stream.clone();
                    stream.ends_at.store(end, Ordering::SeqCst);
                    let mut what = todo::ENDED;
                    if stream.on_ring.load(Ordering::SeqCst) {
                        stream.mark_end();
                        what = if stream.answer(&stream.incoming().bytes) {
                            todo::WAKE_BYTES
                        } else {
                            0
                        };
                    }
                    if what != 0 {
                        self.desk.ask(&stream, what);
                    }
                }
            }
            Event::Ended { stream, reason } => {
                tracing::debug!(?reason, "a stream to another node ended");
                self.end(stream);
            }
            Event::Resume { stream } => {
                let head = self.live(stream).map(|live| {
                    let producer = &live.stream.incoming().producer;
                    producer.head.load(Ordering::Acquire)
                });
                if self.node.resume(stream, head.unwrap_or(0)).is_err() {
                    self.end(stream);
                }
            }
            Event::Released { stream } => {
                let at = index(stream);
                let released = self.live(stream).map(|live| live.stream.clone());
                if let Some(released) = released {
                    self.streams[at] = None;
                    self.hot.retain(|place| *place as usize != at);
                    released.id.store(0, Ordering::Relaxed);
                    self.desk.ask(&released, todo::OVER);
                    let ticket = released.ticket;
                    self.tell(Notice::Released { ticket });
                }
            }
            Event::NodeUp { node } => {
                self.inbox.totals.show_nodes(&self.node);
                self.tell(Notice::NodeUp { node: node.0 });
            }
            Event::NodeGone { node } => {
                self.renew(node.0);
                self.inbox.totals.show_nodes(&self.node);
                self.tell(Notice::NodeGone { node: node.0 });
            }
        }
    }

    /// Bytes have arrived.
    #[inline]
    fn arrived(&mut self, id: StreamId, head: u64) {
        let now = self.now;
        let (Some(live), node) = (
            self.streams.get_mut(index(id)).and_then(Option::as_mut),
            &mut self.node,
        ) else {
            return;
        };
        if live.id != id {
            return;
        }
        live.moved = now;
        let hot = live.hot;
        let what = live.notified(head, node);
        if what != 0 {
            let stream = live.stream.clone();
            self.desk.ask(&stream, what);
        }
        if !hot {
            self.heat(id);
        }
    }

    /// A stream is broken: its program sees ECONNRESET.
    fn end(&mut self, id: StreamId) {
        // It may be over already.
        let _ = self.node.close(id);
        if let Some(live) = self.live(id) {
            live.gone = true;
            let stream = live.stream.clone();
            self.desk.ask(&stream, todo::BROKEN);
        }
    }

    /// Withdraws the key that a node had, and makes another.
    fn renew(&mut self, node: u16) {
        if let Some(reach) = self.reach.get_mut(&node) {
            reach.region = None;
            match self
                .rde
                .register_window(&reach.window, Rights::Write, Some(node))
            {
                Ok(region) => reach.region = Some(region),
                Err(error) => tracing::error!(node, "no region for a node: {error}"),
            }
        }
    }

    /// The device is not used any more: all streams end, and new ones find no place.
    fn fail(&mut self, failed: DeviceFailed) -> bool {
        tracing::error!(
            "the device has failed for poll core {}: {failed}; its streams end, and when no poll core is \
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
            self.desk.ask(&live.stream, todo::BROKEN);
            let why = Refusal::Lost;
            self.tell(Notice::Refused { ticket, why });
            self.tell(Notice::Released { ticket });
        }
        true
    }

    /// There was nothing to do.
    fn idle(&mut self) {
        if self.idle_turns == 0 {
            self.now = self.start.elapsed().as_nanos() as u64;
            self.idle_since = self.now;
        }
        self.idle_turns = self.idle_turns.saturating_add(1);
        let Idle::Adaptive { spin } = self.settings.idle else {
            return std::hint::spin_loop();
        };
        if self.idle_turns < TURNS_BEFORE_YIELD && !self.shares_core {
            return std::hint::spin_loop();
        }
        let idle_for = self.now.saturating_sub(self.idle_since);
        let may_sleep = self.set.outstanding() == 0 || self.fabric.is_none();
        if idle_for < spin.as_nanos() as u64 || !may_sleep {
            return self.give_way();
        }
        self.sleep();
    }

    /// Lets others run, who may have something to send.
    fn give_way(&mut self) {
        let before = Instant::now();
        std::thread::yield_now();
        let after = Instant::now();
        self.now = (after - self.start).as_nanos() as u64;
        self.shares_core = after - before > LOST;
        if self.shares_core {
            // Time that others had is no time without work.
            self.idle_since += (after - before).as_nanos() as u64;
        }
        self.core = here();
    }

    fn sleep(&mut self) {
        // Every program that is polled is asked for a sign. One whose sign would not be seen goes on being polled.
        let mut polled = 0;
        while let Some(&place) = self.hot.get(polled) {
            let live = self.streams.get(place as usize).and_then(Option::as_ref);
            let (id, deaf) = match live {
                Some(live) => (live.id, live.stream.is_deaf()),
                None => {
                    self.hot.swap_remove(polled);
                    continue;
                }
            };
            if deaf {
                polled += 1;
                continue;
            }
            if !self.cool(id) {
                self.idle_turns = 0;
                return;
            }
            if let Some(live) = self.live(id) {
                live.hot = false;
            }
            self.hot.swap_remove(polled);
        }
        self.inbox.waker.start_sleep();
        if self.failed.is_none() {
            self.set.arm();
            self.armed = true;
        }
        let quiet = self.inbox.commands.is_empty()
            && self.inbox.look.is_empty()
            && (self.failed.is_some() || !self.turn().unwrap_or(true))
            // A model that did not look after it was armed does not tell what came before.
            && (self.stepped || self.failed.is_some())
            && !self.inbox.stop.load(Ordering::Relaxed);
        if quiet && self.hot.len() == polled {
            self.counts.sleeps += 1;
            self.show();
            let mut fds = [
                PollFd::new(self.inbox.waker.fd(), PollFlags::POLLIN),
                PollFd::new(self.interrupt.as_fd(), PollFlags::POLLIN),
            ];
            let until = self.node.deadline().saturating_sub(self.now);
            let longest = if polled == 0 {
                LONGEST_SLEEP
            } else {
                POLLED_EVERY
            };
            let wait = Duration::from_nanos(until).min(longest);
            let wait = PollTimeout::try_from(wait.as_millis() as u32 + 1);
            // Interrupted, it has slept long enough.
            let _ = poll(&mut fds, wait.unwrap_or(PollTimeout::ZERO));
        }
        let _ = self.interrupt.read();
        self.armed = false;
        self.inbox.waker.end_sleep();
        self.idle_turns = 0;
    }
}

/// The core that this thread runs on, plus 1; 0 when the system does not say.
fn here() -> u32 {
    nix::sched::sched_getcpu().map_or(0, |core| core as u32 + 1)
}

fn index(id: StreamId) -> usize {
    id.to_u64() as u32 as usize
}

/// No further post to that node follows in the batch.
fn is_last(rest: &[Action], node: NodeId) -> bool {
    !rest.iter().any(|action| match action {
        Action::Send { node: other, .. } | Action::Write { node: other, .. } => *other == node,
        _ => false,
    })
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
