//! The journal: what the daemon has counted, and what it says in its log.

use std::io;
use std::time::{Duration, Instant};

use tracing::warn;

use crate::counters::Counters;
use crate::log::Throttle;

/// A turn of the control thread that takes longer is logged.
const LONG: Duration = Duration::from_millis(50);

/// See the module's text.
#[derive(Debug, Default)]
pub struct Journal {
    /// What is counted.
    pub counters: Counters,
    throttle: Throttle,
    /// What the control thread had used of its processor when its last turn ended.
    processor: Duration,
}

impl Journal {
    /// Logs a refusal, each cause once in a while for each user.
    pub fn refusal(&mut self, cause: &'static str, uid: u32, pid: i32) {
        if let Some(unsaid) = self.throttle.pass(cause, uid, Instant::now()) {
            warn!(uid, pid, unsaid, "refused: {cause}");
        }
    }

    /// Logs that something did not work, each kind once in a while for each user.
    pub fn fault(&mut self, what: &'static str, uid: u32, error: &io::Error) {
        if let Some(unsaid) = self.throttle.pass(what, uid, Instant::now()) {
            warn!(uid, unsaid, "{what}: {error}");
        }
    }

    /// Another thread is the control thread now, which has used so much of its processor before.
    pub fn other_thread(&mut self, processor: Duration) {
        self.processor = processor;
    }

    /// Notes how long a turn of the control thread took, what the thread has used of its processor by now, and what took
    /// longest in the turn. (Between two turns it sleeps.)
    pub fn turn(&mut self, took: Duration, processor: Duration, longest: &str) {
        let before = std::mem::replace(&mut self.processor, processor);
        let processor = processor.saturating_sub(before);
        let micros = |time: Duration| time.as_micros() as u64;
        let counters = &mut self.counters;
        counters.turns += 1;
        counters.longest_turn_us = counters.longest_turn_us.max(micros(took));
        counters.longest_turn_cpu_us = counters.longest_turn_cpu_us.max(micros(processor));
        if took < LONG {
            return;
        }
        counters.long_turns += 1;
        if let Some(unsaid) = self.throttle.pass("long turn", 0, Instant::now()) {
            let ms = took.as_millis() as u64;
            let cpu_ms = processor.as_millis() as u64;
            warn!(
                ms,
                cpu_ms, longest, unsaid, "a turn of the control thread took long"
            );
        }
    }
}
