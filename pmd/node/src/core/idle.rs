//! What a poll core does without work: spin, give way, sleep.

use super::{Core, here};
use crate::Idle;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Turns without work after which a core that may sleep gives way to other threads, while it seems to
/// have its core to itself.
const TURNS_BEFORE_YIELD: u32 = 4;
/// A core that sleeps looks around after this time.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// The same while there are programs that can't wake it. (The kernel counts in milliseconds, and one is added.)
const POLLED_EVERY: Duration = Duration::ZERO;
/// Giving way took longer: somebody else was on the core meanwhile.
const LOST: Duration = Duration::from_micros(2);

impl Core {
    /// There was nothing to do.
    pub(super) fn idle(&mut self) {
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
    pub(super) fn give_way(&mut self) {
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

    pub(super) fn sleep(&mut self) {
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
