//! The result of one run, as a client prints it: one line of JSON for a program, or a short text for a person.

use crate::clock::{Clock, Facts};
use crate::latency::{Buckets, Latencies};
use crate::plan::{Mode, Wait};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What one run measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// What was measured.
    pub mode: Mode,
    /// How both ends waited.
    pub wait: Wait,
    /// Bytes of a message; 0 in mode cps.
    pub size: u64,
    /// Length of the measured window, in seconds.
    pub seconds: f64,
    /// Round trips, messages or connections in the window.
    pub count: u64,
    /// Round trips, messages or connections each second.
    pub per_s: f64,
    /// Payload in one direction, in 10^6 bytes each second; none in modes rtt and cps.
    pub mb_s: Option<f64>,
    /// Median latency in nanoseconds; none in the one-way modes, as all percentiles.
    pub p50_ns: Option<u64>,
    /// 99th percentile.
    pub p99_ns: Option<u64>,
    /// 99.9th percentile.
    pub p999_ns: Option<u64>,
    /// Largest sample.
    pub max_ns: Option<u64>,
    /// Bytes of the shared ring, for the path floor-ring.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ring_bytes: Option<u64>,
    /// How often the kernel ran something else on the core of one of the two processes; filled in by `compare`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub preempted: Option<u64>,
    /// The clock of the side that measured.
    pub clock: Facts,
    /// All samples: (nanoseconds, how many).
    #[serde(default)]
    pub histogram: Buckets,
}

impl Outcome {
    /// The result of a mode that measures latencies.
    pub fn of_latencies(
        mode: Mode,
        wait: Wait,
        size: u64,
        samples: &Latencies,
        seconds: f64,
        clock: &Clock,
    ) -> Self {
        let percentiles = samples.percentiles();
        Self {
            mode,
            wait,
            size,
            seconds,
            count: samples.count(),
            per_s: samples.count() as f64 / seconds,
            mb_s: None,
            p50_ns: percentiles.map(|p| p.p50),
            p99_ns: percentiles.map(|p| p.p99),
            p999_ns: percentiles.map(|p| p.p999),
            max_ns: percentiles.map(|p| p.max),
            ring_bytes: None,
            preempted: None,
            clock: clock.facts(),
            histogram: samples.buckets(),
        }
    }

    /// The result of a mode that counts bytes at the receiver.
    pub fn of_bytes(mode: Mode, wait: Wait, size: u64, bytes: u64, ns: u64, clock: &Clock) -> Self {
        let seconds = ns as f64 / 1e9;
        let bytes_per_s = if ns > 0 { bytes as f64 / seconds } else { 0.0 };
        Self {
            mode,
            wait,
            size,
            seconds,
            count: bytes / size,
            per_s: bytes_per_s / size as f64,
            mb_s: Some(bytes_per_s / 1e6),
            p50_ns: None,
            p99_ns: None,
            p999_ns: None,
            max_ns: None,
            ring_bytes: None,
            preempted: None,
            clock: clock.facts(),
            histogram: Buckets::new(),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} {}", self.mode, self.wait)?;
        if self.size > 0 {
            write!(out, " {} B", self.size)?;
        }
        writeln!(out, ": {} in {:.2} s", self.count, self.seconds)?;
        writeln!(out, "  rate     {:.0} /s", self.per_s)?;
        if let Some(mb_s) = self.mb_s {
            writeln!(out, "  payload  {mb_s:.1} MB/s")?;
        }
        let named = [
            ("p50", self.p50_ns),
            ("p99", self.p99_ns),
            ("p99.9", self.p999_ns),
            ("max", self.max_ns),
        ];
        for (name, ns) in named {
            if let Some(ns) = ns {
                writeln!(out, "  {name:<8} {ns} ns")?;
            }
        }
        write!(
            out,
            "  clock    {:?}, one reading costs {} ns",
            self.clock.source, self.clock.cost_ns
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_become_rates() {
        let clock = Clock::calibrated();
        let outcome =
            Outcome::of_bytes(Mode::Rate, Wait::Spin, 64, 64_000_000, 500_000_000, &clock);
        assert_eq!(outcome.count, 1_000_000);
        assert!((outcome.per_s - 2e6).abs() < 1.0);
        assert!((outcome.mb_s.unwrap() - 128.0).abs() < 1e-6);
    }

    #[test]
    fn an_outcome_survives_json() {
        let clock = Clock::calibrated();
        let mut samples = Latencies::preallocated();
        (1..=100).for_each(|ns| samples.record(ns));
        let outcome = Outcome::of_latencies(Mode::Rtt, Wait::Block, 64, &samples, 2.0, &clock);
        let back: Outcome =
            serde_json::from_str(&serde_json::to_string(&outcome).unwrap()).unwrap();
        assert_eq!((back.p50_ns, back.count, back.per_s), (Some(50), 100, 50.0));
        assert_eq!(back.histogram, samples.buckets());
    }
}
