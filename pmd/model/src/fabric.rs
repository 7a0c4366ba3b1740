//! Nodes wired to each other, and each one's function as its host sees it: registers, interrupts,
//! reset.

use crate::counters::{Accesses, Counters};
use crate::dma::Dma;
use crate::engine::{Core, Node};
use crate::faults::{Chaos, Dice, Fault};
use crate::footprint::Footprint;
use crate::page::{self, Page};
use crate::port::{MAX_SETS, PortMemory, Private};
use crate::sheet::{self, BAR0_SIZE, MAX_NODE, PAGE_SIZE};
use crate::wire::{Peers, Wire};
use std::num::NonZeroU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// Looks at the fabric's lock before a thread sleeps for it.
const LOCK_TRIES: u32 = 1000;

/// Called when a vector fires, with the fabric's lock held: it must be short, and must not call back.
pub type Interrupt = Arc<dyn Fn() + Send + Sync>;

/// A base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bar {
    /// BAR0: management page and region table.
    Management,
    /// BAR2: queue pages.
    Pages,
}

/// Nodes that reach each other. Clones are the same fabric.
#[derive(Clone, Debug)]
pub struct Fabric {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    core: Mutex<Core>,
    /// Threads other than the stepping one that want the lock.
    wanted: AtomicU32,
}

/// The part of a function that the host's stores reach without the fabric's lock.
#[derive(Debug)]
pub(crate) struct Front {
    /// Its port and its pages.
    pub memory: Arc<dyn PortMemory>,
    pub accesses: Accesses,
    page_accesses: Box<[Accesses]>,
    pub removed: AtomicBool,
}

impl Front {
    pub fn queue_sets(&self) -> usize {
        self.page_accesses.len()
    }

    pub fn pages(&self) -> &[Page] {
        &self.memory.pages()[..self.queue_sets()]
    }
}

impl Fabric {
    /// A fabric without nodes.
    pub fn new(chaos: Chaos) -> Self {
        Fabric {
            shared: Arc::new(Shared {
                core: Mutex::new(Core::new(Dice::new(chaos))),
                wanted: AtomicU32::new(0),
            }),
        }
    }

    /// Adds a device with `queue_sets` (1 to 256) queue sets to the memory of a host.
    pub fn add(&self, dma: Arc<dyn Dma>, queue_sets: usize) -> Function {
        let queue_sets = queue_sets.clamp(1, MAX_SETS);
        self.add_in(dma, queue_sets, Arc::new(Private::new(queue_sets)))
    }

    /// As [`Fabric::add`], with the port and the queue pages in memory of the caller's: whoever serves the device
    /// to another process shows it the pages there.
    ///
    /// # Panics
    /// When `memory` has fewer pages than `queue_sets`.
    pub fn add_in(
        &self,
        dma: Arc<dyn Dma>,
        queue_sets: usize,
        memory: Arc<dyn PortMemory>,
    ) -> Function {
        let queue_sets = queue_sets.clamp(1, MAX_SETS);
        assert!(
            memory.pages().len() >= queue_sets,
            "a page for each queue set"
        );
        let front = Arc::new(Front {
            memory,
            accesses: Accesses::default(),
            page_accesses: (0..queue_sets).map(|_| Accesses::default()).collect(),
            removed: AtomicBool::new(false),
        });
        let mut core = self.lock();
        core.nodes.push(Node::new(dma, front.clone()));
        core.refresh_links();
        Function {
            node: core.nodes.len() - 1,
            front,
            fabric: self.clone(),
        }
    }

    /// Connects the fabric, which has no device yet, with others by a wire, and adds the device that they reach,
    /// with its port in `memory`. It can only join the fabric as node `id`. `token` is what this process puts into
    /// the locks of ports: no two that are wired have the same.
    ///
    /// # Panics
    /// When the fabric has a device or a wire, or `memory` has fewer pages than `queue_sets`.
    pub fn connect(
        &self,
        (id, token): (u16, NonZeroU64),
        wire: Box<dyn Wire>,
        memory: Arc<dyn PortMemory>,
        dma: Arc<dyn Dma>,
        queue_sets: usize,
    ) -> Function {
        let mut core = self.lock();
        assert!(
            core.nodes.is_empty() && core.wire.is_none(),
            "a fabric is connected once, before it has devices"
        );
        (core.wire_id, core.token) = (Some(id), token.get());
        core.wire = Some(wire);
        drop(core);
        self.add_in(dma, queue_sets, memory)
    }

    /// Takes in what the wire has to tell, without waiting. For who waits for it; steps do it only when they
    /// cannot go on without.
    pub fn poll_wire(&self) {
        self.lock().poll_wire();
    }

    /// Lets the wire change who is there.
    pub fn with_peers(&self, change: impl FnOnce(&mut Peers)) {
        let mut core = self.lock();
        change(&mut core.peers);
        core.bury();
    }

    /// Takes the wire away, and with it all nodes of other processes.
    pub fn disconnect(&self) {
        let mut core = self.lock();
        core.wire = None;
        for id in 0..=MAX_NODE as u16 {
            core.peers.detach(id);
        }
        core.bury();
    }

    /// Lets every device do what it can do now: a bounded amount of work. `now` is in nanoseconds and
    /// does not go back. True when anything was done.
    pub fn step(&self, now: u64) -> bool {
        self.plain_lock().step(now)
    }

    /// As [`Fabric::step`], for one queue set of each device: what the thread that drives that set calls. Several
    /// may, each for its own set. They take turns: while another one is at work in the fabric, or waits for a
    /// register, this one does nothing, and need not wait (`None`).
    pub fn step_set(&self, set: usize, now: u64) -> Option<bool> {
        if self.is_wanted() {
            return None;
        }
        match self.shared.core.try_lock() {
            Ok(mut core) => Some(core.step_sets(set..set + 1, now)),
            Err(TryLockError::Poisoned(core)) => {
                Some(core.into_inner().step_sets(set..set + 1, now))
            }
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Changes what happens by chance.
    pub fn set_chaos(&self, chaos: Chaos) {
        self.lock().dice = Dice::new(chaos);
    }

    /// True while another thread waits to get at a device's registers.
    pub(crate) fn is_wanted(&self) -> bool {
        self.shared.wanted.load(Ordering::Relaxed) != 0
    }

    fn plain_lock(&self) -> MutexGuard<'_, Core> {
        self.shared
            .core
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock, for others than the stepping thread.
    fn lock(&self) -> MutexGuard<'_, Core> {
        // A step is short. Who steps all the time should not have to wake others that wait for the lock.
        for _ in 0..LOCK_TRIES {
            if let Ok(guard) = self.shared.core.try_lock() {
                return guard;
            }
            std::hint::spin_loop();
        }
        self.shared.wanted.fetch_add(1, Ordering::Relaxed);
        let guard = self.plain_lock();
        self.shared.wanted.fetch_sub(1, Ordering::Relaxed);
        guard
    }
}

/// One node's device, as a PCI function. Clones are the same function.
#[derive(Clone, Debug)]
pub struct Function {
    fabric: Fabric,
    node: usize,
    front: Arc<Front>,
}

impl Function {
    /// Bytes of a BAR.
    pub fn bar_size(&self, bar: Bar) -> u64 {
        match bar {
            Bar::Management => BAR0_SIZE,
            Bar::Pages => self.front.queue_sets() as u64 * PAGE_SIZE,
        }
    }

    /// Number of interrupt vectors.
    pub fn vectors(&self) -> u32 {
        1 + self.front.queue_sets() as u32
    }

    /// Loads a register of `width` (4 or 8) bytes; all ones where there is none.
    pub fn read(&self, bar: Bar, offset: u64, width: u32) -> u64 {
        self.accesses(bar, offset).reads.add(1);
        let ones = if width == 4 {
            u32::MAX.into()
        } else {
            u64::MAX
        };
        if self.is_removed() || !matches!(width, 4 | 8) || !offset.is_multiple_of(width.into()) {
            return ones;
        }
        match bar {
            Bar::Management => self.fabric.lock().read(self.node, offset, width),
            Bar::Pages => self.read_page(offset, width),
        }
        .unwrap_or(ones)
    }

    /// Stores to a register of `width` (4 or 8) bytes; nothing happens where there is none.
    #[inline]
    pub fn write(&self, bar: Bar, offset: u64, width: u32, value: u64) {
        self.accesses(bar, offset).writes.add(1);
        if self.is_removed() || !offset.is_multiple_of(width.max(1).into()) {
            return;
        }
        match bar {
            Bar::Management => self.fabric.lock().write(self.node, offset, width, value),
            Bar::Pages => self.write_page(offset, width, value),
        }
    }

    /// Function level reset.
    pub fn reset(&self) {
        if !self.is_removed() {
            self.fabric.lock().reset(self.node);
        }
    }

    /// Says what to do when a vector fires; `None` masks it.
    pub fn set_interrupt(&self, vector: u32, interrupt: Option<Interrupt>) {
        let mut core = self.fabric.lock();
        if let Some(place) = core.nodes[self.node]
            .end
            .interrupts
            .get_mut(vector as usize)
        {
            *place = interrupt;
        }
    }

    /// Plays a fault.
    pub fn inject(&self, fault: Fault) {
        self.fabric.lock().inject(self.node, fault);
    }

    /// What the device has done.
    pub fn counters(&self) -> Counters {
        let core = self.fabric.lock();
        let node = &core.nodes[self.node];
        let mut counters = node.tally.sum(&node.port().tally);
        drop(core);
        self.front.accesses.add_to(&mut counters);
        for accesses in &self.front.page_accesses {
            accesses.add_to(&mut counters);
        }
        counters
    }

    /// What the device holds.
    pub fn footprint(&self) -> Footprint {
        Footprint::of(&self.fabric.lock().nodes[self.node])
    }

    /// Changes the memory that the device reaches, while no access of any node to it is under way. `change` is
    /// given the number of the change, which the wire must announce if it is made (`Ok`): until then no other
    /// process executes anything at this node.
    pub fn change_reach<R, E>(&self, change: impl FnOnce(u64) -> Result<R, E>) -> Result<R, E> {
        let mut core = self.fabric.lock();
        core.hold(self.node, |node| {
            let number = node.port().changes.load(Relaxed).wrapping_add(1);
            let done = change(number)?;
            node.port().changes.store(number, Relaxed);
            Ok(done)
        })
    }

    /// Who counts an access.
    #[inline]
    fn accesses(&self, bar: Bar, offset: u64) -> &Accesses {
        let page = match bar {
            Bar::Management => None,
            Bar::Pages => (self.front.page_accesses).get((offset / PAGE_SIZE) as usize),
        };
        page.unwrap_or(&self.front.accesses)
    }

    fn is_removed(&self) -> bool {
        self.front.removed.load(Ordering::Relaxed)
    }

    fn read_page(&self, offset: u64, width: u32) -> Option<u64> {
        let set = (offset / PAGE_SIZE) as usize;
        let page = self.front.pages().get(set)?;
        let offset = offset % PAGE_SIZE;
        if page::width(offset) != width {
            return None;
        }
        // The device may look at a queue page when it likes: it does so now, so that a driver which
        // waits for SET_STATE gets its answer whether or not somebody steps the fabric meanwhile.
        self.fabric.lock().control(self.node, set);
        Some(match width {
            4 => page.load32(offset).into(),
            _ => page.load64(offset),
        })
    }

    #[inline]
    fn write_page(&self, offset: u64, width: u32, value: u64) {
        let set = (offset / PAGE_SIZE) as usize;
        let Some(page) = self.front.pages().get(set) else {
            return;
        };
        let offset = offset % PAGE_SIZE;
        if page::width(offset) != width || !page::writable(offset) {
            return;
        }
        match offset {
            sheet::page::WQ_TAIL => self.front.page_accesses[set].doorbells.add(1),
            sheet::page::CQ_HEAD | sheet::page::MQ_HEAD => {
                self.front.page_accesses[set].heads.add(1)
            }
            _ => {}
        }
        match width {
            4 => page.store32(offset, value as u32),
            _ => page.store64(offset, value),
        }
    }
}
