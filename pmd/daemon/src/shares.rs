//! Who has used how much of the control thread lately: who has used little of it is served first.
//!
//! A user with a thousand connections that always ask for something gets what the others leave; one who asks for
//! something now and then waits for what is being done, and for nobody's queue. Only the loop of the daemon calls this.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// What was used counts for half after this time.
const HALVED: Duration = Duration::from_millis(10);
/// Less than this is forgotten.
const LITTLE: Duration = Duration::from_micros(10);

/// See the module's text.
#[derive(Debug)]
pub struct Shares {
    used: HashMap<u32, Duration>,
    halved: Instant,
}

impl Shares {
    /// Nobody has used anything.
    pub fn new(now: Instant) -> Self {
        Shares {
            used: HashMap::new(),
            halved: now,
        }
    }

    /// A user has used this much, until `now`.
    pub fn charge(&mut self, uid: u32, time: Duration, now: Instant) {
        let halvings = now.saturating_duration_since(self.halved).as_nanos() / HALVED.as_nanos();
        if halvings != 0 {
            self.halved = now;
            let divisor = 1 << halvings.min(30);
            self.used.retain(|_, used| {
                *used /= divisor;
                *used >= LITTLE
            });
        }
        *self.used.entry(uid).or_default() += time;
    }

    /// What a user has used lately.
    pub fn of(&self, uid: u32) -> Duration {
        self.used.get(&uid).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_is_forgotten_by_and_by() {
        let start = Instant::now();
        let mut shares = Shares::new(start);
        shares.charge(7, Duration::from_micros(400), start);
        shares.charge(8, Duration::from_micros(30), start);
        assert_eq!(shares.of(7), Duration::from_micros(400));
        assert_eq!(shares.of(9), Duration::ZERO);
        shares.charge(9, Duration::from_micros(1), start + 2 * HALVED);
        assert_eq!(shares.of(7), Duration::from_micros(100));
        assert_eq!(shares.of(8), Duration::ZERO);
        shares.charge(9, Duration::ZERO, start + 1000 * HALVED);
        assert!(shares.used.len() == 1 && shares.of(7).is_zero());
    }
}
