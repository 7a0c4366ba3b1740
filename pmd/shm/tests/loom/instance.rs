//! Several threads on one epoll instance, one that arms a registration again, and a peer: whoever sleeps is told, whoever takes the
//! edge that was to wake it. A lost one is a deadlock, which loom reports.
//!
//! What is asked and answered, the bells and the registration are the code that ships (`wake`, `bell`, `take_ask`, and the shim's
//! `registration.rs`). The steps of the shim's `news.rs`, `report.rs` and `sleep.rs`, which act on the kernel, are written out
//! here on a kernel that is a flag: an inner instance that has an edge or not, on which threads sleep.

use crate::model::check;
use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*, fence};
use loom::sync::{Condvar, Mutex};
use loom::thread;
use rdsock_shm::bell::{self, Place, end_sleep, is_rung, start_sleep};
use rdsock_shm::end::take_ask;
use rdsock_shm::layout::{Ask, Bell, want};
use rdsock_shm::wake;
use registration::{Registration, Snapshot};
use std::sync::Arc;

#[path = "../../../../sockshim/core/src/registration.rs"]
#[allow(dead_code)]
mod registration;

const IN: i16 = libc::EPOLLIN as i16;
const LEVEL: u32 = libc::EPOLLIN as u32;
const EDGE: u32 = LEVEL | libc::EPOLLET as u32;
const ONCE: u32 = LEVEL | libc::EPOLLONESHOT as u32;

/// The place of the one registration on the one bell.
const PLACE: Place = Place { bell: 0, bit: 0 };

/// The inner instance.
#[derive(Default)]
struct Kernel {
    has_edge: Mutex<bool>,
    sleep: Condvar,
}

impl Kernel {
    fn edge(&self) {
        *self.has_edge.lock().unwrap() = true;
        self.sleep.notify_one();
    }

    /// Takes the edge, as any thread does that asks.
    fn harvest(&self) -> bool {
        std::mem::take(&mut *self.has_edge.lock().unwrap())
    }

    /// A sleep on the program's instance, in which the inner one shows as long as nobody has taken its edge.
    fn sleep(&self) {
        let mut has_edge = self.has_edge.lock().unwrap();
        while !*has_edge {
            has_edge = self.sleep.wait(has_edge).unwrap();
        }
    }
}

/// What the instance's lock protects.
struct State {
    marked: bool,
    slot: Registration,
}

struct Instance {
    state: Mutex<State>,
    kernel: Kernel,
    own: Bell,
    bell: Bell,
    sleepers: AtomicU32,
    /// The stream: what the peer has published, and what was read.
    head: AtomicU64,
    tail: AtomicU64,
    ask: Ask,
    over: AtomicBool,
}

/// How a thread sleeps.
#[derive(Clone, Copy, PartialEq)]
enum By {
    /// Counted at the bell.
    Wait,
    /// In `poll` on the instance's descriptor, which the bell knows nothing of.
    Poll,
}

impl Instance {
    /// With a registration that waits for `events`, armed, or fired.
    fn new(events: u32, fired: bool) -> Arc<Self> {
        let mut slot = Registration::new(events, 1);
        slot.enter(fired);
        let instance = Instance {
            state: Mutex::new(State { marked: true, slot }),
            kernel: Kernel::default(),
            own: Bell::default(),
            bell: Bell::default(),
            sleepers: AtomicU32::new(0),
            head: AtomicU64::new(0),
            tail: AtomicU64::new(0),
            ask: Ask::default(),
            over: AtomicBool::new(false),
        };
        instance.ask.place.store(PLACE.to_word(), Relaxed);
        Arc::new(instance)
    }

    // ---- The peer ----

    fn publish(&self) {
        self.head.fetch_add(1, Release);
        if wake::asked(&self.ask) == 0 {
            return;
        }
        let (taken, token) = take_ask(&self.ask, |place| Some(bell::ring(&self.bell, place.bit)));
        if token {
            self.kernel.edge();
        }
        if taken & (want::BELL | want::WAKE) != 0 {
            wake::rung(&self.ask.want);
        }
    }

    // ---- news.rs ----

    fn take_marks(&self, state: &mut State) {
        for bell in [&self.own, &self.bell] {
            bell::take(bell, |_, _| state.marked = true);
        }
    }

    fn reaches(&self) -> bool {
        self.sleepers.load(SeqCst) <= self.bell.sleepers.load(SeqCst)
    }

    fn kick(&self) {
        if self.sleepers.load(SeqCst) != 0 {
            self.kernel.edge();
        }
    }

    fn hand_on(&self, state: &mut State) {
        fence(SeqCst);
        if self.sleepers.load(SeqCst) != 0 {
            self.take_marks(state);
            if state.marked && self.look(state, true) != 0 {
                self.kick();
            }
        }
    }

    /// Something has changed at the own end, in this process.
    fn changed(&self) {
        fence(SeqCst);
        bell::ring(&self.own, PLACE.bit);
        self.kick();
    }

    // ---- report.rs ----

    fn ask(&self) {
        let how = if self.reaches() {
            want::BELL
        } else {
            want::WAKE
        };
        wake::ask(&self.ask.want, how);
    }

    /// The event of the registration, which is taken unless this is a `peek`.
    fn look(&self, state: &mut State, peek: bool) -> u32 {
        if !state.slot.is_armed() {
            state.marked = false;
            return 0;
        }
        bell::unring(&self.own, PLACE.bit);
        let question = |slot: &Registration| {
            let head = self.head.load(Acquire);
            let now = Snapshot {
                head,
                ..Snapshot::default()
            };
            let seen = if head != self.tail.load(Acquire) {
                IN
            } else {
                0
            };
            (slot.event(seen, &now), now)
        };
        let (mut event, mut now) = question(&state.slot);
        if event == 0 {
            state.marked = false;
            self.ask();
            (event, now) = question(&state.slot);
            if event == 0 {
                return 0;
            }
            state.marked = true;
        }
        if peek {
            return event;
        }
        state.slot.report(event, now);
        if state.slot.events & libc::EPOLLET as u32 != 0 {
            state.marked = false;
            self.ask();
            if question(&state.slot) != (event, now) {
                state.marked = true;
            }
        }
        event
    }

    fn harvest(&self) {
        if self.kernel.harvest() {
            self.state.lock().unwrap().marked = true;
        }
    }

    fn collect(&self) -> u32 {
        let mut state = self.state.lock().unwrap();
        self.take_marks(&mut state);
        if state.marked {
            self.look(&mut state, false)
        } else {
            0
        }
    }

    // ---- sleep.rs ----

    fn leave(&self) {
        let mut state = self.state.lock().unwrap();
        self.hand_on(&mut state);
    }

    /// `epoll_wait(0)`.
    fn wait_0(&self) -> bool {
        self.harvest();
        let event = self.collect();
        self.leave();
        event != 0
    }

    /// `epoll_wait(-1)`, or `poll` on the instance and then `epoll_wait(0)`. False where all is over.
    fn wait(&self, by: By) -> bool {
        loop {
            if self.over.load(Acquire) {
                self.leave();
                return false;
            }
            if self.wait_0() {
                return true;
            }
            self.sleep(by);
        }
    }

    fn sleep(&self, by: By) {
        self.sleepers.fetch_add(1, SeqCst);
        match by {
            By::Wait => start_sleep(&self.bell.sleepers),
            By::Poll => {
                let mut state = self.state.lock().unwrap();
                state.marked = true;
                if state.slot.is_armed() {
                    wake::ask(&self.ask.want, want::WAKE);
                }
            }
        }
        let found = {
            let mut state = self.state.lock().unwrap();
            self.take_marks(&mut state);
            // It is taken by the next turn.
            state.marked && self.look(&mut state, true) != 0
        };
        let is_marked = by == By::Wait && (is_rung(&self.own) || is_rung(&self.bell));
        if !found && !is_marked && !self.over.load(Acquire) {
            self.kernel.sleep();
        }
        if by == By::Wait {
            end_sleep(&self.bell.sleepers);
        }
        self.sleepers.fetch_sub(1, SeqCst);
    }

    // ---- register.rs ----

    fn modify(&self, events: u32) {
        let mut state = self.state.lock().unwrap();
        state.slot.modify(events, 1);
        state.marked = true;
        self.hand_on(&mut state);
    }

    // ---- The program ----

    /// Somebody else has done it: ends the others' sleep, each of whom passes it on.
    fn end(&self) {
        self.over.store(true, Release);
        self.kernel.edge();
    }

    /// A thread that waits for one event, and reads what is there.
    fn serve(&self, by: By) {
        if self.wait(by) {
            self.tail.store(self.head.load(Acquire), Release);
        }
        self.end();
    }
}

fn one_sleeps_the_other_arms_it_again_and_looks(events: u32, by: By) {
    check(2, move || {
        let instance = Instance::new(events, true);
        let sleeper = {
            let instance = instance.clone();
            thread::spawn(move || instance.serve(by))
        };
        let peer = {
            let instance = instance.clone();
            thread::spawn(move || instance.publish())
        };
        instance.modify(events);
        if instance.wait_0() {
            instance.end();
        }
        peer.join().unwrap();
        sleeper.join().unwrap();
    });
}

#[test]
fn armed_again_with_oneshot_while_one_sleeps() {
    one_sleeps_the_other_arms_it_again_and_looks(ONCE, By::Wait);
}

#[test]
fn armed_again_with_oneshot_while_one_sleeps_in_poll() {
    one_sleeps_the_other_arms_it_again_and_looks(ONCE, By::Poll);
}

#[test]
fn armed_again_with_edges_while_one_sleeps() {
    one_sleeps_the_other_arms_it_again_and_looks(EDGE, By::Wait);
}

/// The second message is for the thread that sleeps: the first one's edge may be taken by the one that looks.
#[test]
fn one_sleeps_the_other_looks_at_each_message() {
    check(2, || {
        let instance = Instance::new(LEVEL, false);
        let sleeper = {
            let instance = instance.clone();
            thread::spawn(move || instance.serve(By::Wait))
        };
        let peer = {
            let instance = instance.clone();
            thread::spawn(move || {
                instance.publish();
            })
        };
        // Looks, and leaves what it finds to the other one.
        instance.wait_0();
        peer.join().unwrap();
        sleeper.join().unwrap();
    });
}

/// A receive takes the token that an edge was of, and what came with it stays.
#[test]
fn a_change_at_the_own_end_wakes_a_sleeper() {
    check(2, || {
        let instance = Instance::new(EDGE, false);
        let sleeper = {
            let instance = instance.clone();
            thread::spawn(move || instance.serve(By::Wait))
        };
        // The peer tells of nothing here.
        instance.head.fetch_add(1, Release);
        instance.changed();
        sleeper.join().unwrap();
    });
}

/// Two sleep, one edge wakes one of them, and there is one event for each.
#[test]
fn two_sleep_and_each_has_an_event() {
    check(2, || {
        let instance = Instance::new(LEVEL, false);
        let sleepers = [0, 1].map(|_| {
            let instance = instance.clone();
            // Nobody reads, so that both see it.
            thread::spawn(move || assert!(instance.wait(By::Wait)))
        });
        instance.publish();
        for sleeper in sleepers {
            sleeper.join().unwrap();
        }
    });
}
