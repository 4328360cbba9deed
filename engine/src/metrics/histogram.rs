//! A histogram that one thread fills and any thread reads, in fixed memory.
//!
//! Buckets grow with the value: 32 to each power of two, so a value is known to within 1.6 %
//! of itself. The writer pays two plain stores; a reader copies the cells into an
//! [`hdrhistogram::Histogram`], which does the arithmetic.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// log2 of the buckets to each power of two.
const SUB_BUCKET_BITS: u32 = 5;
/// Values from this on share the last bucket: 2^37 ns are 137 s.
const VALUE_BITS: u32 = 37;
const BUCKETS: usize = ((VALUE_BITS - SUB_BUCKET_BITS + 1) << SUB_BUCKET_BITS) as usize;

/// The bucket of a value.
fn bucket(value: u64) -> usize {
    let value = value.min((1 << VALUE_BITS) - 1);
    let bits = u64::BITS - value.leading_zeros();
    let shift = bits.saturating_sub(SUB_BUCKET_BITS + 1);
    ((u64::from(shift) << SUB_BUCKET_BITS) + (value >> shift)) as usize
}

/// The middle of a bucket.
fn middle(bucket: usize) -> u64 {
    let sub_buckets = 1 << SUB_BUCKET_BITS;
    let shift = (bucket / sub_buckets).saturating_sub(1);
    let low = ((bucket - shift * sub_buckets) as u64) << shift;
    low + ((1u64 << shift) >> 1)
}

/// Filled by one thread.
pub(crate) struct Histogram {
    buckets: Box<[AtomicU64; BUCKETS]>,
    sum: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: Box::new([const { AtomicU64::new(0) }; BUCKETS]), sum: AtomicU64::new(0) }
    }
}

impl std::fmt::Debug for Histogram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Histogram").field("sum", &self.sum).finish_non_exhaustive()
    }
}

impl Histogram {
    /// Counts a value. Only the owning thread calls this: load and store need not be one step.
    pub(crate) fn record(&self, value: u64) {
        // Relaxed: readers want counts, not an order among them.
        let cell = &self.buckets[bucket(value)];
        cell.store(cell.load(Relaxed) + 1, Relaxed);
        self.sum.store(self.sum.load(Relaxed).wrapping_add(value), Relaxed);
    }

    /// Counts a duration in nanoseconds.
    pub(crate) fn record_duration(&self, duration: Duration) {
        self.record(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
    }
}

/// Several threads' histograms as one.
pub(crate) struct Merged {
    histogram: hdrhistogram::Histogram<u64>,
    sum: u64,
}

impl Merged {
    pub(crate) fn of<'a>(parts: impl IntoIterator<Item = &'a Histogram>) -> Self {
        let high = 1 << VALUE_BITS;
        let mut histogram =
            hdrhistogram::Histogram::new_with_bounds(1, high, 3).expect("constant valid bounds");
        let mut sum = 0u64;
        for part in parts {
            sum = sum.wrapping_add(part.sum.load(Relaxed));
            for (index, cell) in part.buckets.iter().enumerate() {
                let count = cell.load(Relaxed);
                if count > 0 {
                    histogram.record_n(middle(index), count).expect("below the upper bound");
                }
            }
        }
        Self { histogram, sum }
    }

    /// The values as durations in nanoseconds.
    pub(crate) fn summary(&self) -> LatencySummary {
        let quantile = |q| Duration::from_nanos(self.histogram.value_at_quantile(q));
        let samples = self.histogram.len();
        if samples == 0 {
            return LatencySummary::default();
        }
        LatencySummary {
            samples,
            average: Duration::from_nanos(self.sum / samples),
            p50: quantile(0.5),
            p90: quantile(0.9),
            p99: quantile(0.99),
            p999: quantile(0.999),
            max: Duration::from_nanos(self.histogram.max()),
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.histogram.len()
    }

    pub(crate) fn sum(&self) -> u64 {
        self.sum
    }

    /// Values that are at most `limit`.
    pub(crate) fn count_up_to(&self, limit: u64) -> u64 {
        self.histogram.count_between(0, limit)
    }

    pub(crate) fn average(&self) -> f64 {
        if self.count() == 0 { 0.0 } else { self.sum as f64 / self.count() as f64 }
    }
}

/// A latency distribution since the engine started; known to within 1.6 %.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LatencySummary {
    /// Number of samples; without any, the times are zero.
    pub samples: u64,
    /// Mean; exact.
    pub average: Duration,
    /// Median.
    pub p50: Duration,
    /// 90th percentile.
    pub p90: Duration,
    /// 99th percentile.
    pub p99: Duration,
    /// 99.9th percentile.
    pub p999: Duration,
    /// Largest.
    pub max: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_near_the_middle_of_its_bucket() {
        let values = (0..64).chain((6..VALUE_BITS).flat_map(|bits| {
            let power = 1u64 << bits;
            [power - 1, power, power + 1, power + power / 3]
        }));
        for value in values.filter(|value| *value < 1 << VALUE_BITS) {
            let middle = middle(bucket(value));
            assert!(middle.abs_diff(value) * 64 <= value.max(1), "{value} became {middle}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1, "the largest value is in the last bucket");
    }

    #[test]
    fn buckets_rise_without_gaps() {
        for index in 1..BUCKETS {
            assert_eq!(bucket(middle(index)), index);
            assert!(middle(index) > middle(index - 1));
        }
    }

    #[test]
    fn percentiles_of_parts_are_those_of_the_whole() {
        let (one, two) = (Histogram::default(), Histogram::default());
        for value in 1..=10_000u64 {
            if value % 2 == 0 { &one } else { &two }.record(value * 1000);
        }
        let summary = Merged::of([&one, &two]).summary();
        assert_eq!((summary.samples, summary.average), (10_000, Duration::from_nanos(5_000_500)));
        for (found, expected_us) in
            [(summary.p50, 5_000), (summary.p99, 9_900), (summary.p999, 9_990)]
        {
            let off = found.as_micros().abs_diff(expected_us);
            assert!(off * 50 <= expected_us, "{found:?} for {expected_us} µs");
        }
    }

    #[test]
    fn nothing_recorded_is_all_zero() {
        assert_eq!(Merged::of([&Histogram::default()]).summary(), LatencySummary::default());
    }
}
