//! What was measured: for each path, mode, wait and size the outcomes of all rounds, and their medians.

use crate::latency::Latencies;
use crate::outcome::Outcome;
use crate::plan::{Cell, Mode, Path, Wait};
use serde::Serialize;

/// All measurements of one comparison, in the order of the table.
#[derive(Default)]
pub struct Rows {
    /// One for each path, mode, wait and size.
    pub rows: Vec<Row>,
    /// The cost of a cache line before and after each round.
    pub probes: Vec<Probe>,
}

/// The measurements of one path in one mode.
pub struct Row {
    /// What carried the bytes.
    pub path: Path,
    /// What was measured.
    pub mode: Mode,
    /// How both ends waited.
    pub wait: Wait,
    /// Bytes of a message; 0 in mode cps.
    pub size: u64,
    /// One for each round.
    pub runs: Vec<Outcome>,
}

/// The cost of a cache line around one round: median round trips in nanoseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Probe {
    /// Mode of the round.
    pub mode: Mode,
    /// Size of the round's messages.
    pub size: u64,
    /// Number of the round, from 1.
    pub round: u32,
    /// Just before the round.
    pub before_ns: u64,
    /// Just after the round.
    pub after_ns: u64,
}

impl Rows {
    /// Adds the outcome of one run.
    pub fn add(&mut self, path: Path, cell: Cell, wait: Wait, outcome: Outcome) {
        let size = if path == Path::FloorCacheline {
            64
        } else {
            cell.size
        };
        let is_same = |row: &&mut Row| {
            (row.path, row.mode, row.wait, row.size) == (path, cell.mode, wait, size)
        };
        match self.rows.iter_mut().find(is_same) {
            Some(row) => row.runs.push(outcome),
            None => self.rows.push(Row {
                path,
                mode: cell.mode,
                wait,
                size,
                runs: vec![outcome],
            }),
        }
    }
}

impl Row {
    /// The median over the runs of something that each run has.
    pub fn median(&self, figure: impl Fn(&Outcome) -> Option<f64>) -> Option<f64> {
        median(self.runs.iter().map(figure).collect::<Option<Vec<_>>>()?)
    }

    /// Median of the runs' median latencies, in nanoseconds.
    pub fn p50_ns(&self) -> Option<f64> {
        self.median(|run| run.p50_ns.map(|ns| ns as f64))
    }

    /// Median of the runs' 99th percentiles, in nanoseconds.
    pub fn p99_ns(&self) -> Option<f64> {
        self.median(|run| run.p99_ns.map(|ns| ns as f64))
    }

    /// Median of the runs' 99.9th percentiles, in nanoseconds.
    pub fn p999_ns(&self) -> Option<f64> {
        self.median(|run| run.p999_ns.map(|ns| ns as f64))
    }

    /// Median of the runs' round trips, messages or connections each second.
    pub fn per_s(&self) -> Option<f64> {
        self.median(|run| Some(run.per_s))
    }

    /// Median of the runs' payload in 10^6 bytes each second.
    pub fn mb_s(&self) -> Option<f64> {
        self.median(|run| run.mb_s)
    }

    /// How often the kernel ran something else on one of the two cores, for each second that was measured.
    pub fn preempted_per_s(&self) -> Option<f64> {
        let times: Option<u64> = self.runs.iter().map(|run| run.preempted).sum();
        let seconds: f64 = self.runs.iter().map(|run| run.seconds).sum();
        times
            .filter(|_| seconds > 0.0)
            .map(|times| times as f64 / seconds)
    }

    /// The latency samples of all runs together.
    pub fn latencies(&self) -> Latencies {
        let mut all = Latencies::preallocated();
        self.runs.iter().for_each(|run| all.merge(&run.histogram));
        all
    }
}

/// The middle of the values, or the mean of the two middle ones; none where there are no values.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::clock::{Facts, Source};

    /// An outcome with the figures that matter to a test.
    pub fn outcome(mode: Mode, wait: Wait, size: u64, p50_ns: Option<u64>, per_s: f64) -> Outcome {
        Outcome {
            mode,
            wait,
            size,
            seconds: 1.0,
            count: per_s as u64,
            per_s,
            mb_s: p50_ns.is_none().then_some(per_s * size as f64 / 1e6),
            p50_ns,
            p99_ns: p50_ns.map(|ns| ns * 2),
            p999_ns: p50_ns.map(|ns| ns * 3),
            max_ns: p50_ns.map(|ns| ns * 4),
            ring_bytes: None,
            preempted: None,
            clock: Facts {
                source: Source::Tsc,
                cost_ns: 10.0,
            },
            histogram: p50_ns
                .map(|ns| vec![(ns, 10), (ns * 2, 5)])
                .unwrap_or_default(),
        }
    }

    /// Path, mode, wait, size, median latency, rate.
    type Figures = (Path, Mode, Wait, u64, Option<u64>, f64);

    /// Rows with one run or more each.
    pub fn rows(figures: &[Figures]) -> Rows {
        let mut rows = Rows::default();
        for &(path, mode, wait, size, p50_ns, per_s) in figures {
            rows.add(
                path,
                Cell { mode, size },
                wait,
                outcome(mode, wait, size, p50_ns, per_s),
            );
        }
        rows
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn runs_of_one_kind_become_one_row() {
        let unix = |ns| (Path::Unix, Mode::Rtt, Wait::Spin, 64, Some(ns), 1.0);
        let rows = rows(&[
            unix(100),
            unix(300),
            unix(200),
            (Path::Unix, Mode::Rtt, Wait::Block, 64, Some(9), 1.0),
        ]);
        assert_eq!(rows.rows.len(), 2);
        assert_eq!(rows.rows[0].runs.len(), 3);
        assert_eq!(rows.rows[0].p50_ns(), Some(200.0));
        assert_eq!(rows.rows[0].mb_s(), None);
        assert_eq!(rows.rows[0].latencies().count(), 45);
    }
}
