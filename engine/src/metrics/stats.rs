//! The engine's statistics as one value, made from what the shards publish anyway.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::histogram::Merged;
use super::{LatencySummary, PoolCounters, ShardCounters, ShardMetrics};
use crate::certs::RotationStatus;
use crate::datapath::DatapathCounters;

/// "Current" throughput looks back this far, as far as statistics were read.
const RATE_WINDOW: Duration = Duration::from_secs(1);
/// Samples nearer together than this say nothing about a rate.
const RATE_SAMPLE_INTERVAL: Duration = Duration::from_millis(10);
/// `RATE_WINDOW` in samples, and one before it.
const RATE_SAMPLES_MAX: usize = 101;

/// Bytes copied in userspace per payload byte, counted and not assumed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct Copies {
    /// Bytes copied between packet memory and the engine's buffers (both directions).
    pub datapath_bytes: u64,
    /// Bytes of small writes copied into larger ones, and of slices copied by `write`.
    pub handle_bytes: u64,
    /// UDP payload bytes sent and received.
    pub payload_bytes: u64,
    /// Copies per payload byte: the first two over the third. quinn-proto's own copy of stream
    /// data into a packet, once per byte sent, is not in it.
    pub per_byte: f64,
}

/// One shard's part.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ShardReport {
    /// What the shard did, drops by reason included.
    pub shard: ShardCounters,
    /// What its datapath carried, drops by reason included.
    pub datapath: DatapathCounters,
    /// Its connection pools, those of handles and of code on the shard together.
    pub pool: PoolCounters,
    /// Datagrams received per turn that received any, on average.
    pub rx_batch_average: f64,
    /// Packets sent per turn that sent any, on average.
    pub tx_batch_average: f64,
    /// How long commands of other threads waited: the oldest, each time that they were taken.
    pub mailbox_wait: LatencySummary,
    /// How long turns took that found work: what a packet may have to wait for the shard.
    pub turns: LatencySummary,
    /// Part of the time, since statistics were read before, that was spent in turns with work. 0 to 1.
    pub busy_share: f64,
}

/// Statistics of an engine. Totals count from its start.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TransportStats {
    /// UDP payload bytes sent.
    pub bytes_sent: u64,
    /// UDP payload bytes received.
    pub bytes_received: u64,
    /// Connections that exist now, draining ones included.
    pub connections_active: u64,
    /// Connections that were made or accepted since the start.
    pub connections_total: u64,
    /// UDP payload bits sent per second, over the last second or since statistics were read before.
    pub throughput_sent_bps: f64,
    /// UDP payload bits received per second, likewise.
    pub throughput_received_bps: f64,
    /// Round-trip times: one sample per ACK that acknowledged something new, over all connections.
    /// It includes the delay that the peer added.
    pub latency: LatencySummary,
    /// Copies per byte.
    pub copies: Copies,
    /// All shards' pools together.
    pub pool: PoolCounters,
    /// Part of the pooled connections that is lent. 0 to 1; 0 without any.
    pub pool_utilization: f64,
    /// How the certificate fares that the engine was given
    /// ([`Builder::rotation`](crate::engine::Builder::rotation)).
    pub rotation: Option<RotationStatus>,
    /// Each shard by itself.
    pub shards: Vec<ShardReport>,
}

struct Sample {
    at: Instant,
    bytes_sent: u64,
    bytes_received: u64,
    busy_ns: Vec<u64>,
}

/// Earlier totals, from which present rates follow.
#[derive(Default)]
pub(crate) struct RateWindow {
    samples: VecDeque<Sample>,
}

impl RateWindow {
    /// Reads the shards' published counters. Costs the shards nothing.
    pub(crate) fn read<'a>(
        &mut self,
        now: Instant,
        metrics: impl IntoIterator<Item = &'a ShardMetrics>,
    ) -> TransportStats {
        let metrics: Vec<&ShardMetrics> = metrics.into_iter().collect();
        let mut shards: Vec<ShardReport> = metrics.iter().map(|shard| report(shard)).collect();
        let (mut pool, mut datapath, mut totals) =
            (PoolCounters::default(), DatapathCounters::default(), ShardCounters::default());
        for shard in &shards {
            pool.add(&shard.pool);
            datapath.add(&shard.datapath);
            totals.add(&shard.shard);
        }
        let sample = Sample {
            at: now,
            bytes_sent: datapath.tx_bytes,
            bytes_received: datapath.rx_bytes,
            busy_ns: shards.iter().map(|shard| shard.shard.busy_ns).collect(),
        };
        let rates = self.rates(&sample);
        for (shard, share) in shards.iter_mut().zip(rates.busy_shares) {
            shard.busy_share = share;
        }
        self.push(sample);
        let lent = pool.connections.saturating_sub(pool.idle);
        TransportStats {
            bytes_sent: datapath.tx_bytes,
            bytes_received: datapath.rx_bytes,
            connections_active: totals.connections,
            connections_total: totals.accepted + totals.connects,
            throughput_sent_bps: rates.sent_bps,
            throughput_received_bps: rates.received_bps,
            latency: Merged::of(metrics.iter().map(|shard| &shard.rtt_ns)).summary(),
            copies: copies(&datapath, &totals),
            pool,
            pool_utilization: ratio(lent, pool.connections),
            rotation: None,
            shards,
        }
    }

    /// Rates since the oldest sample of the window; zero before there is one.
    fn rates(&self, now: &Sample) -> Rates {
        // The youngest sample that is a whole window old, or else the oldest.
        let old = self.samples.iter().rev().find(|old| now.at - old.at >= RATE_WINDOW);
        let Some(old) = old.or_else(|| self.samples.front()) else { return Rates::default() };
        let seconds = now.at.saturating_duration_since(old.at).as_secs_f64();
        if seconds <= 0.0 {
            return Rates::default();
        }
        let bps = |new: u64, old: u64| new.saturating_sub(old) as f64 * 8.0 / seconds;
        let share = |(new, old): (&u64, &u64)| {
            (new.saturating_sub(*old) as f64 / (seconds * 1e9)).clamp(0.0, 1.0)
        };
        Rates {
            sent_bps: bps(now.bytes_sent, old.bytes_sent),
            received_bps: bps(now.bytes_received, old.bytes_received),
            busy_shares: now.busy_ns.iter().zip(&old.busy_ns).map(share).collect(),
        }
    }

    fn push(&mut self, sample: Sample) {
        let is_due =
            self.samples.back().is_none_or(|last| sample.at - last.at >= RATE_SAMPLE_INTERVAL);
        if !is_due {
            return;
        }
        self.samples.push_back(sample);
        if self.samples.len() > RATE_SAMPLES_MAX {
            self.samples.pop_front();
        }
    }
}

#[derive(Default)]
struct Rates {
    sent_bps: f64,
    received_bps: f64,
    busy_shares: Vec<f64>,
}

fn report(metrics: &ShardMetrics) -> ShardReport {
    ShardReport {
        shard: metrics.shard(),
        datapath: metrics.datapath(),
        pool: metrics.pool(),
        rx_batch_average: Merged::of([&metrics.rx_batch]).average(),
        tx_batch_average: Merged::of([&metrics.tx_batch]).average(),
        mailbox_wait: Merged::of([&metrics.mailbox_wait_ns]).summary(),
        turns: Merged::of([&metrics.turn_ns]).summary(),
        busy_share: 0.0,
    }
}

fn copies(datapath: &DatapathCounters, shards: &ShardCounters) -> Copies {
    let payload_bytes = datapath.tx_bytes + datapath.rx_bytes;
    Copies {
        datapath_bytes: datapath.copied_bytes,
        handle_bytes: shards.handle_copied_bytes,
        payload_bytes,
        per_byte: ratio(datapath.copied_bytes + shards.handle_copied_bytes, payload_bytes),
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(tx_bytes: u64, busy_ns: u64) -> ShardMetrics {
        let metrics = ShardMetrics::default();
        publish(&metrics, tx_bytes, busy_ns);
        metrics
    }

    fn publish(metrics: &ShardMetrics, tx_bytes: u64, busy_ns: u64) {
        let shard = ShardCounters { busy_ns, connects: 2, accepted: 3, ..Default::default() };
        let copied_bytes = tx_bytes / 2;
        let datapath = DatapathCounters { tx_bytes, copied_bytes, ..Default::default() };
        metrics.publish(&shard, &datapath);
    }

    #[test]
    fn the_rate_is_that_of_the_last_second() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut window = RateWindow::default();
        let metrics = shard(0, 0);
        assert_eq!(window.read(at(0), [&metrics]).throughput_sent_bps, 0.0);
        publish(&metrics, 1_000_000, 250_000_000);
        let stats = window.read(at(500), [&metrics]);
        assert_eq!(stats.throughput_sent_bps, 16e6);
        assert_eq!(stats.shards[0].busy_share, 0.5);
        // Nothing more is sent: the rate falls to zero once the burst is a second old.
        assert_eq!(window.read(at(1000), [&metrics]).throughput_sent_bps, 8e6);
        assert_eq!(window.read(at(1500), [&metrics]).throughput_sent_bps, 0.0);
    }

    #[test]
    fn reading_often_keeps_memory_and_window() {
        let start = Instant::now();
        let mut window = RateWindow::default();
        let metrics = shard(0, 0);
        for ms in 0..10_000u64 {
            publish(&metrics, ms * 1000, 0);
            let stats = window.read(start + Duration::from_millis(ms), [&metrics]);
            if ms > 100 {
                let rate = stats.throughput_sent_bps;
                assert!((7.9e6..8.1e6).contains(&rate), "{rate} at {ms} ms");
            }
        }
        assert!(window.samples.len() <= RATE_SAMPLES_MAX);
    }

    #[test]
    fn shards_are_added_up() {
        let (one, two) = (shard(100, 0), shard(50, 0));
        one.rtt_ns.record(1000);
        two.rtt_ns.record(3000);
        let stats = RateWindow::default().read(Instant::now(), [&one, &two]);
        assert_eq!((stats.bytes_sent, stats.connections_total), (150, 10));
        assert_eq!((stats.latency.samples, stats.latency.average.as_nanos()), (2, 2000));
        assert_eq!((stats.copies.payload_bytes, stats.copies.per_byte), (150, 0.5));
        assert_eq!(stats.pool_utilization, 0.0, "no pool, no division by zero");
    }
}
