//! Nodes wired to each other, and each one's function as its host sees it: registers, interrupts,
//! reset.

use crate::counters::{Accesses, Counters};
use crate::dma::Dma;
use crate::engine::{Core, Node};
use crate::faults::{Chaos, Dice, Fault};
use crate::page::{self, Page};
use crate::sheet::{self, BAR0_SIZE, PAGE_SIZE};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    pub pages: Box<[Page]>,
    pub accesses: Accesses,
    pub removed: AtomicBool,
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
        let front = Arc::new(Front {
            pages: (0..queue_sets.clamp(1, 256)).map(|_| Page::new()).collect(),
            accesses: Accesses::default(),
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

    /// Lets every device do what it can do now: a bounded amount of work. `now` is in nanoseconds and
    /// does not go back. True when anything was done.
    pub fn step(&self, now: u64) -> bool {
        self.plain_lock().step(now)
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
            Bar::Pages => self.front.pages.len() as u64 * PAGE_SIZE,
        }
    }

    /// Number of interrupt vectors.
    pub fn vectors(&self) -> u32 {
        1 + self.front.pages.len() as u32
    }

    /// Loads a register of `width` (4 or 8) bytes; all ones where there is none.
    pub fn read(&self, bar: Bar, offset: u64, width: u32) -> u64 {
        self.accesses(bar, offset).reads.add();
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
        self.accesses(bar, offset).writes.add();
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
        if let Some(place) = core.nodes[self.node].interrupts.get_mut(vector as usize) {
            *place = interrupt;
        }
    }

    /// Plays a fault.
    pub fn inject(&self, fault: Fault) {
        self.fabric.lock().inject(self.node, fault);
    }

    /// What the device has done.
    pub fn counters(&self) -> Counters {
        let mut counters = self.fabric.lock().nodes[self.node].counters;
        self.front.accesses.add_to(&mut counters);
        for page in &self.front.pages {
            page.accesses.add_to(&mut counters);
        }
        counters
    }

    /// Who counts an access.
    #[inline]
    fn accesses(&self, bar: Bar, offset: u64) -> &Accesses {
        let page = match bar {
            Bar::Management => None,
            Bar::Pages => self.front.pages.get((offset / PAGE_SIZE) as usize),
        };
        page.map_or(&self.front.accesses, |page| &page.accesses)
    }

    fn is_removed(&self) -> bool {
        self.front.removed.load(Ordering::Relaxed)
    }

    fn read_page(&self, offset: u64, width: u32) -> Option<u64> {
        let set = (offset / PAGE_SIZE) as usize;
        let page = self.front.pages.get(set)?;
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
        let Some(page) = self.front.pages.get((offset / PAGE_SIZE) as usize) else {
            return;
        };
        let offset = offset % PAGE_SIZE;
        if page::width(offset) != width || !page::writable(offset) {
            return;
        }
        match offset {
            sheet::page::WQ_TAIL => page.accesses.doorbells.add(),
            sheet::page::CQ_HEAD | sheet::page::MQ_HEAD => page.accesses.heads.add(),
            _ => {}
        }
        match width {
            4 => page.store32(offset, value as u32),
            _ => page.store64(offset, value),
        }
    }
}
