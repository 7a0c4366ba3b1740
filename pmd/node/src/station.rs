//! A poll core with its anchors' threads, as the control thread has it. A node has as many as it has poll
//! cores; each uses a queue set, a protocol machine and queues of its own, and none waits for another.

use crate::anchors::Anchors;
use crate::core::{Core, Inbox, Parts, Reach};
use crate::desk::{Desk, Paid, Seat};
use crate::mail::{Look, Mail, Waker};
use crate::totals::Totals;
use crate::{Command, Notice, Settings, StartError};
use rdsock_model::Fabric;
use rdsock_proto::{Config as Limits, Node, NodeId};
use rdsock_rde::{Rde, Rights, Sizes};
use rdsock_vfio::{EventFd, EventFlags, Window};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time for the threads to end. One that is held up ends with the process, which does not wait for it.
const END: Duration = Duration::from_secs(1);

/// What the poll cores of a node have in common.
pub(crate) struct Shared {
    pub rde: Arc<Rde>,
    /// The model to be stepped, when the device is one in this process.
    pub fabric: Option<Fabric>,
    /// The memory that each other node may reach.
    pub windows: HashMap<u16, Window>,
    pub settings: Settings,
    /// Woken by notices.
    pub control: Arc<Waker>,
    /// Poll cores that use the device.
    pub working: Arc<AtomicUsize>,
    /// When the clock of the cores, which the model runs by, was 0.
    pub start: Instant,
}

/// An anchors' thread. Streams hold its desk.
#[derive(Debug)]
struct Clerk {
    desk: Weak<Desk>,
    thread: JoinHandle<()>,
}

/// See the module's text. Dropping it ends its threads; its streams break.
#[derive(Debug)]
pub(crate) struct Station {
    inbox: Arc<Inbox>,
    /// The anchors' threads, by user.
    clerks: HashMap<u32, Vec<Clerk>>,
    notices: Arc<Mail<Notice>>,
    /// Notices taken while a command waited for room.
    backlog: VecDeque<Notice>,
    /// Held by each of its streams.
    pub load: Arc<()>,
    /// Most streams.
    most: usize,
    poll: Option<JoinHandle<()>>,
}

impl Station {
    /// Starts poll core `number` on the queue set of that number.
    pub fn start(shared: &Shared, number: u16) -> Result<Self, StartError> {
        let Shared { rde, settings, .. } = shared;
        let cpu = settings.cores.get(usize::from(number)).copied().flatten();
        let cpu = cpu.map(find_cpu).transpose()?;
        let mut reach = HashMap::new();
        for (peer, window) in &shared.windows {
            // A key of this core's own: it is withdrawn when the node has gone for this core, which says
            // nothing of the streams of the others.
            let region = rde.register_window(window, Rights::Write, Some(*peer))?;
            let (window, region) = (window.clone(), Some(region));
            reach.insert(*peer, Reach { window, region });
        }
        let set = rde.queue_set(number.into(), Sizes::default())?;
        let flags = EventFlags::EFD_CLOEXEC | EventFlags::EFD_NONBLOCK;
        let interrupt = EventFd::from_value_and_flags(0, flags).map_err(io::Error::from)?;
        let interrupt = Arc::new(interrupt);
        let device = rde.space().device();
        device.set_interrupt(1 + u32::from(number), Some(interrupt.clone()))?;

        let waker = Arc::new(Waker::new()?);
        let inbox = Arc::new(Inbox {
            commands: Mail::new(settings.streams.max(1024), waker.clone()),
            look: Arc::new(Look::new(settings.streams, waker.clone(), 0)),
            stop: AtomicBool::new(false),
            waker,
            totals: Totals::new(&settings.peers),
        });
        let notices = Arc::new(Mail::new(
            4 * settings.streams + 4096,
            shared.control.clone(),
        ));
        let core = Core::new(Parts {
            number,
            node: protocol(settings, number),
            rde: rde.clone(),
            working: shared.working.clone(),
            set,
            fabric: shared.fabric.clone(),
            interrupt,
            reach,
            inbox: inbox.clone(),
            notices: notices.clone(),
            settings: settings.clone(),
            start: shared.start,
        });
        let mut station = Station {
            inbox,
            clerks: HashMap::new(),
            notices,
            backlog: VecDeque::new(),
            load: Arc::new(()),
            most: settings.streams,
            poll: None,
        };
        station.poll = Some(spawn("rdsock-poll", move || {
            if let Some(cpu) = cpu
                && !core_affinity::set_for_current(cpu)
            {
                tracing::warn!(
                    cpu = cpu.id,
                    "the poll core can't be pinned; it runs on any"
                );
            }
            core.run();
        })?);
        Ok(station)
    }

    /// A place for one more stream of a user, if a thread of that user has one.
    pub fn seat(&self, user: u32) -> Option<Seat> {
        let mut clerks = self.clerks.get(&user)?.iter();
        clerks.find_map(|clerk| clerk.desk.upgrade()?.seat())
    }

    /// Starts a further thread for the anchors of a user, with a place for a stream.
    pub fn open_desk(&mut self, user: u32, paid: Paid) -> io::Result<Seat> {
        self.clerks.retain(|_, clerks| {
            clerks.retain(|clerk| !clerk.thread.is_finished());
            !clerks.is_empty()
        });
        let (desk, seat) = Desk::new(self.most, paid)?;
        let weak = Arc::downgrade(&desk);
        let anchors = Anchors::new(desk, self.inbox.look.clone())?;
        let thread = spawn("rdsock-anchors", move || anchors.run())?;
        let clerk = Clerk { desk: weak, thread };
        self.clerks.entry(user).or_default().push(clerk);
        Ok(seat)
    }

    /// Has the poll core do something.
    pub fn command(&mut self, command: Command) {
        let mut command = command;
        while let Err(full) = self.inbox.commands.put(command) {
            command = full;
            // The poll core takes commands only while there is room for its notices.
            self.backlog
                .extend(std::iter::from_fn(|| self.notices.take()));
            std::thread::yield_now();
        }
    }

    /// The next notice.
    pub fn notice(&mut self) -> Option<Notice> {
        self.backlog.pop_front().or_else(|| self.notices.take())
    }

    /// What the poll core has done.
    pub fn totals(&self) -> &Totals {
        &self.inbox.totals
    }

    /// Streams that it has.
    pub fn streams(&self) -> usize {
        Arc::strong_count(&self.load) - 1
    }
}

impl Drop for Station {
    fn drop(&mut self) {
        let end = Instant::now() + END;
        self.inbox.stop.store(true, Ordering::Release);
        self.inbox.waker.wake();
        // It asks for nothing more, when it has ended.
        if let Some(poll) = self.poll.take() {
            end_by(poll, end);
        }
        let clerks: Vec<Clerk> = self.clerks.drain().flat_map(|(_, clerks)| clerks).collect();
        for desk in clerks.iter().filter_map(|clerk| clerk.desk.upgrade()) {
            desk.end();
        }
        for clerk in clerks {
            end_by(clerk.thread, end);
        }
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).spawn(run)
}

/// Waits for the end of a thread that was told to end, but not for ever: whoever owns a program can hold up the thread that
/// serves it.
fn end_by(thread: JoinHandle<()>, end: Instant) {
    while !thread.is_finished() {
        if Instant::now() >= end {
            let name = thread.thread().name().unwrap_or_default();
            return tracing::warn!("{name} is held up: it ends with the process");
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    // A panic of the thread was printed by the panic hook.
    let _ = thread.join();
}

/// The protocol's machine of a poll core: it greets the cores of the same number.
fn protocol(settings: &Settings, number: u16) -> Node {
    let nodes = settings.peers.iter().chain([&settings.node]).max();
    let mut limits = Limits::new(nodes.map_or(1, |node| node + 1));
    limits.streams = settings.streams as u32;
    limits.streams_from_node = settings.streams_at_node() as u32;
    limits.resume_timeout = settings.resume_timeout.as_nanos() as u64;
    limits.connect_timeout = settings.connect_timeout.as_nanos() as u64;
    let seed = settings.epoch.rotate_left(17) ^ u64::from(number);
    Node::new(NodeId(settings.node), settings.epoch, seed, limits)
}

/// A core that a thread of this process may be put on. It is tried, since the process's own affinity does not tell: a service
/// is not given isolated cores, and may use them all the same.
fn find_cpu(cpu: usize) -> Result<core_affinity::CoreId, StartError> {
    let core = core_affinity::CoreId { id: cpu };
    let tried = std::thread::spawn(move || core_affinity::set_for_current(core)).join();
    match tried {
        Ok(true) => Ok(core),
        _ => Err(StartError::NoCpu(cpu)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    use nix::unistd::Pid;

    #[test]
    fn a_core_outside_of_the_own_affinity_is_found() {
        let me = Pid::from_raw(0);
        let all = sched_getaffinity(me).unwrap();
        let cores = (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu).unwrap());
        let (first, last) = (cores.clone().min().unwrap(), cores.max().unwrap());
        let mut one = CpuSet::new();
        one.set(first).unwrap();
        sched_setaffinity(me, &one).unwrap();
        assert_eq!(find_cpu(last).unwrap().id, last);
        assert!(matches!(find_cpu(1023), Err(StartError::NoCpu(1023))));
    }
}
