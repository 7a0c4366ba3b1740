//! What was said in the log lately, so that what goes on for hours does not fill it.

use std::time::{Duration, Instant};

/// The same is not said again before.
const AGAIN: Duration = Duration::from_secs(60);
/// Most different texts in that time.
const MAX_TEXTS: usize = 32;

/// See the module's text.
#[derive(Debug, Default)]
pub struct Said {
    texts: Vec<(String, Instant)>,
}

impl Said {
    /// Whether to say this now.
    pub fn is_due(&mut self, text: &str) -> bool {
        self.texts.retain(|(_, when)| when.elapsed() < AGAIN);
        let known = self.texts.iter().any(|(said, _)| said == text);
        let due = !known && self.texts.len() < MAX_TEXTS;
        if due {
            self.texts.push((text.to_owned(), Instant::now()));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_said_once_and_not_without_bound() {
        let mut said = Said::default();
        assert!(said.is_due("a") && !said.is_due("a") && said.is_due("b"));
        let many = (0..1000).filter(|n| said.is_due(&n.to_string())).count();
        assert_eq!(many, MAX_TEXTS - 2);
    }
}
