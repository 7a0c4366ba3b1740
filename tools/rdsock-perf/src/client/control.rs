//! The conversation with a parent process: events as lines of JSON on stdout, words on stdin.

use crate::error::{Error, Result};
use crate::link::Link;
use crate::outcome::Outcome;
use crate::pattern::Pattern;
use crate::plan::{Mode, Wait};
use crate::wire::Order;
use serde_json::json;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

/// Time between two warm-up messages: short enough to look alive, long enough to leave the core to others.
const BREATH: Duration = Duration::from_micros(500);
/// Bytes of a warm-up message.
const SIZE: usize = 64;

/// The parent's words, read by a thread.
pub struct Control {
    words: Receiver<String>,
}

impl Control {
    /// Tells the parent that `link` is connected, and begins to listen to it.
    pub fn start(link: &Link) -> Result<Self> {
        let (local, peer) = link.ends()?;
        rdsock_output::json(
            json!({"event": "connected", "pid": std::process::id(), "local": local, "peer": peer}),
        )?;
        let (send, words) = sync_channel(4);
        std::thread::spawn(move || {
            for line in std::io::stdin().lines().map_while(std::result::Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { words })
    }

    /// Exchanges messages over `link` until the parent says `go`.
    pub fn warm_until_go(&mut self, link: &Link, wait: Wait) -> Result<()> {
        let size = SIZE as u64;
        let order = Order {
            mode: Mode::Rtt,
            wait,
            verify: false,
            size,
            warmup_ns: 0,
            recv_bytes: size,
        };
        link.send_all(&order.encode())?;
        let pattern = Pattern::new(SIZE);
        let mut answer = [0; SIZE];
        loop {
            let go = self.heard("go", BREATH)?;
            let message = if go {
                pattern.last(0)
            } else {
                pattern.at(0, SIZE).to_vec()
            };
            link.send_all(&message)?;
            link.recv_exact(&mut answer)?;
            if go {
                return Ok(());
            }
        }
    }

    /// Prints the result, and keeps the connection until the parent says `finish`.
    pub fn report_and_wait(&mut self, outcome: &Outcome) -> Result<()> {
        rdsock_output::json(json!({"event": "result", "result": outcome}))?;
        while !self.heard("finish", Duration::from_secs(3600))? {}
        Ok(())
    }

    /// Whether the parent said `word` within `limit`. Anything else that it says, or its death, is an error.
    fn heard(&self, word: &str, limit: Duration) -> Result<bool> {
        match self.words.recv_timeout(limit) {
            Ok(said) if said == word => Ok(true),
            Ok(said) => Err(Error::Peer(format!(
                "the parent said {said:?} instead of {word:?}"
            ))),
            Err(RecvTimeoutError::Timeout) => Ok(false),
            Err(RecvTimeoutError::Disconnected) => Err(Error::Peer("the parent has gone".into())),
        }
    }
}
