//! Latency samples: a histogram of fixed size, allocated and touched before the run, and its percentiles.

use hdrhistogram::Histogram;

/// Longest latency that is told apart from longer ones: one minute, in nanoseconds.
const LONGEST_NS: u64 = 60_000_000_000;

/// A histogram in its portable form: (nanoseconds, how many samples), ascending.
pub type Buckets = Vec<(u64, u64)>;

/// Latency samples in nanoseconds, precise to three decimal digits.
#[derive(Debug, Clone)]
pub struct Latencies {
    histogram: Histogram<u64>,
}

/// Three percentiles and the largest sample, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Percentiles {
    /// Half of the samples are at most this.
    pub p50: u64,
    /// 99 % of the samples are at most this.
    pub p99: u64,
    /// 99.9 % of the samples are at most this.
    pub p999: u64,
    /// The largest sample.
    pub max: u64,
}

impl Latencies {
    /// An empty histogram whose memory is allocated and has been written to.
    pub fn preallocated() -> Self {
        let mut histogram = Histogram::new_with_bounds(1, LONGEST_NS, 3)
            .expect("1 ns, one minute and 3 digits are valid bounds");
        // One sample in each power of two touches each page of the counts, so no page fault comes in the run.
        for shift in 0..36 {
            histogram.saturating_record(1 << shift);
        }
        histogram.reset();
        Self { histogram }
    }

    /// Adds one sample. Allocates nothing; a sample above one minute counts as one minute.
    #[inline]
    pub fn record(&mut self, ns: u64) {
        self.histogram.saturating_record(ns);
    }

    /// How many samples there are.
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// The percentiles, or none where there is no sample.
    pub fn percentiles(&self) -> Option<Percentiles> {
        (self.count() > 0).then(|| Percentiles {
            p50: self.histogram.value_at_quantile(0.5),
            p99: self.histogram.value_at_quantile(0.99),
            p999: self.histogram.value_at_quantile(0.999),
            max: self.histogram.max(),
        })
    }

    /// The latency at a quantile between 0 and 1, in nanoseconds.
    pub fn at(&self, quantile: f64) -> u64 {
        self.histogram.value_at_quantile(quantile)
    }

    /// The portable form, for another process.
    pub fn buckets(&self) -> Buckets {
        self.histogram
            .iter_recorded()
            .map(|step| (step.value_iterated_to(), step.count_at_value()))
            .collect()
    }

    /// Adds the samples of another histogram.
    pub fn merge(&mut self, buckets: &[(u64, u64)]) {
        for &(ns, count) in buckets {
            self.histogram.saturating_record_n(ns, count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(samples: impl IntoIterator<Item = u64>) -> Latencies {
        let mut latencies = Latencies::preallocated();
        samples.into_iter().for_each(|ns| latencies.record(ns));
        latencies
    }

    #[test]
    fn starts_empty() {
        assert_eq!(Latencies::preallocated().percentiles(), None);
        assert_eq!(Latencies::preallocated().buckets(), vec![]);
    }

    #[test]
    fn percentiles_are_right_to_three_digits() {
        let percentiles = of(1..=1000).percentiles().unwrap();
        assert_eq!(
            (percentiles.p50, percentiles.p99, percentiles.p999),
            (500, 990, 999)
        );
        assert_eq!(percentiles.max, 1000);
    }

    #[test]
    fn merging_is_the_same_as_recording_all() {
        let (low, high) = (of(1..=500), of((501..=1000).map(|ns| ns * 1000)));
        let mut merged = Latencies::preallocated();
        merged.merge(&low.buckets());
        merged.merge(&high.buckets());
        let all = of((1..=500).chain((501..=1000).map(|ns| ns * 1000)));
        assert_eq!(merged.count(), 1000);
        assert_eq!(merged.percentiles(), all.percentiles());
        assert_eq!(merged.buckets(), all.buckets());
    }

    #[test]
    fn huge_samples_saturate() {
        let latencies = of([u64::MAX]);
        assert_eq!(latencies.count(), 1);
        assert!(latencies.at(0.5) >= LONGEST_NS);
    }
}
