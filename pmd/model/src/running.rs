//! A thread that runs a fabric in real time.

use crate::fabric::Fabric;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Steps between two looks at the clock, which costs as much as a step.
const STEPS_PER_LOOK: u32 = 8;
/// Steps without work after which the thread gives its core to others.
const SPIN_STEPS: u32 = 10_000;
/// How long it then sleeps between looks, when it may.
const NAP: Duration = Duration::from_micros(50);

/// A running fabric; dropping it stops the thread.
#[derive(Debug)]
pub struct Running {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Starts a thread that steps `fabric` with the monotonic clock, from time 0 on. `on_start` runs
    /// on it first (to pin it, say). Without work it spins for ever (`busy`), or for a while and
    /// then looks every 50 µs.
    pub fn start(
        fabric: Fabric,
        busy: bool,
        on_start: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let run = move || {
            on_start();
            let start = Instant::now();
            let (mut idle, mut steps, mut now) = (0u32, 0u32, 0);
            while !stopped.load(Ordering::Relaxed) {
                if steps.is_multiple_of(STEPS_PER_LOOK) {
                    now = start.elapsed().as_nanos() as u64;
                }
                steps = steps.wrapping_add(1);
                if fabric.step(now) {
                    idle = 0;
                    continue;
                }
                idle = idle.saturating_add(1);
                if fabric.is_wanted() {
                    std::thread::yield_now();
                } else if idle > SPIN_STEPS && !busy {
                    std::thread::sleep(NAP);
                    steps = 0;
                } else {
                    std::hint::spin_loop();
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("rde-model".into())
            .spawn(run)?;
        Ok(Running {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed by the panic hook; there is nothing to add.
            let _ = thread.join();
        }
    }
}
