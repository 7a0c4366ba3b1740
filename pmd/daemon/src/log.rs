//! Logs: to standard error, in a form that the journal keeps well; refusals are throttled, so
//! that a tenant can't fill a disk.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tracing_subscriber::filter::LevelFilter;

use crate::config::{Config, LogFormat, LogLevel};
use crate::lines::Lines;

/// Starts logging. What is said goes where these lines go.
pub fn start(config: &Config) -> Lines {
    let lines = Lines::default();
    let writer = lines.clone();
    let level = match config.log_level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(move || writer.clone())
        // It would say so on standard error, and wait there.
        .log_internal_errors(false)
        .with_ansi(false)
        .with_target(false);
    let in_journal = std::env::var_os("JOURNAL_STREAM").is_some();
    match (config.log_format, in_journal) {
        (LogFormat::Json, _) => builder.json().init(),
        (LogFormat::Text, true) => builder.without_time().init(),
        (LogFormat::Text, false) => builder.init(),
    }
    lines
}

/// Each cause is logged once in this time for each user; the rest is counted.
const QUIET: Duration = Duration::from_secs(30);
/// When there are too many to remember, those that are old are looked for no more often.
const PAUSE: Duration = Duration::from_secs(1);
/// Causes and users remembered.
const MOST: usize = 4096;

/// Decides whether a refusal is worth a line.
#[derive(Debug, Default)]
pub struct Throttle {
    seen: HashMap<(&'static str, u32), (Instant, u64)>,
    /// When it was last looked through for what is old.
    swept: Option<Instant>,
}

impl Throttle {
    /// `Some(n)`: log it, and say that `n` more were not logged since the last line.
    pub fn pass(&mut self, cause: &'static str, uid: u32, now: Instant) -> Option<u64> {
        let swept_lately = |swept: Instant| now.duration_since(swept) < PAUSE;
        if self.seen.len() >= MOST && !self.swept.is_some_and(swept_lately) {
            self.swept = Some(now);
            self.seen
                .retain(|_, (at, _)| now.duration_since(*at) < QUIET);
        }
        let full = self.seen.len() >= MOST;
        match self.seen.get_mut(&(cause, uid)) {
            Some((at, unsaid)) if now.duration_since(*at) < QUIET => {
                *unsaid += 1;
                None
            }
            Some(entry) => {
                let unsaid = entry.1;
                *entry = (now, 0);
                Some(unsaid)
            }
            None if full => None,
            None => {
                self.seen.insert((cause, uid), (now, 0));
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_logged_once_and_then_counted() {
        let mut throttle = Throttle::default();
        let now = Instant::now();
        assert_eq!(throttle.pass("a", 1, now), Some(0));
        assert_eq!(throttle.pass("a", 1, now), None);
        assert_eq!(throttle.pass("a", 2, now), Some(0));
        assert_eq!(throttle.pass("b", 1, now), Some(0));
        assert_eq!(throttle.pass("a", 1, now + QUIET), Some(1));
        for uid in 0..2 * MOST as u32 {
            throttle.pass("many", uid, now);
        }
        assert!(throttle.seen.len() <= MOST);
    }

    /// Each line would look through all that are remembered, and wait for that.
    #[test]
    fn what_is_old_is_looked_for_once_in_a_while() {
        let mut throttle = Throttle::default();
        let start = Instant::now();
        for uid in 0..MOST as u32 {
            throttle.pass("many", uid, start);
        }
        assert_eq!(throttle.pass("one more", 1, start), None);
        let swept = throttle.swept;
        assert_eq!(throttle.pass("one more", 1, start + PAUSE / 2), None);
        assert_eq!(throttle.swept, swept);
        // By then all are old.
        assert_eq!(throttle.pass("one more", 1, start + QUIET), Some(0));
        assert_eq!(throttle.seen.len(), 1);
    }
}
