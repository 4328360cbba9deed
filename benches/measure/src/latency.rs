//! Latencies in a histogram of fixed size: 1 µs of 60 s is told to three digits.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// The largest latency that is told apart.
const LATENCY_NS_MAX: u64 = 60_000_000_000;
/// Significant decimal digits.
const DIGITS: u8 = 3;

/// Latencies of operations, from each one's intended start.
#[derive(Debug, Clone)]
pub struct Latencies(Histogram<u64>);

/// Quantiles, µs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LatencyUs {
    /// The median.
    pub p50: f64,
    /// One in a hundred is slower.
    pub p99: f64,
    /// One in a thousand is slower.
    pub p999: f64,
}

/// Quantiles of a curve: close together where tails begin.
const CURVE: [f64; 10] = [0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999];

impl Default for Latencies {
    fn default() -> Self {
        let bounds = Histogram::new_with_bounds(1, LATENCY_NS_MAX, DIGITS);
        Self(bounds.expect("constant bounds are valid"))
    }
}

impl Latencies {
    /// Adds one.
    pub fn record(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Adds all of another.
    pub fn merge(&mut self, other: &Self) {
        self.0.add(&other.0).expect("the bounds are the same");
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.reset();
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Quantiles and their latencies, µs, for a curve; empty without latencies. Quantiles of which
    /// there is less than one latency are left out.
    #[must_use]
    pub fn curve_us(&self) -> Vec<(f64, f64)> {
        let told = |quantile: &f64| (1.0 - quantile) * self.len() as f64 >= 1.0;
        let us = |quantile| (quantile, self.0.value_at_quantile(quantile) as f64 / 1e3);
        CURVE.into_iter().filter(told).map(us).collect()
    }

    /// The quantiles; `None` without latencies.
    #[must_use]
    pub fn quantiles(&self) -> Option<LatencyUs> {
        let us = |quantile| self.0.value_at_quantile(quantile) as f64 / 1e3;
        (!self.is_empty()).then(|| LatencyUs { p50: us(0.5), p99: us(0.99), p999: us(0.999) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_a_ramp() {
        let (mut low, mut high) = (Latencies::default(), Latencies::default());
        for us in 1..=500 {
            low.record(Duration::from_micros(us));
            high.record(Duration::from_micros(500 + us));
        }
        low.merge(&high);
        let told = low.quantiles().expect("1000 latencies");
        assert!((told.p50 - 500.0).abs() < 2.0, "{told:?}");
        assert!((told.p99 - 990.0).abs() < 2.0, "{told:?}");
        assert!((told.p999 - 999.0).abs() < 2.0, "{told:?}");
        let curve = low.curve_us();
        assert_eq!(curve.last().map(|point| point.0), Some(0.999), "of 1000: {curve:?}");
        assert!(curve.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{curve:?}");
        low.clear();
        assert!(low.curve_us().is_empty());
        assert_eq!(low.quantiles(), None);
    }

    #[test]
    fn an_absurd_latency_is_the_largest() {
        let mut latencies = Latencies::default();
        latencies.record(Duration::MAX);
        assert!(latencies.quantiles().expect("one").p50 >= 5.9e7);
    }
}
