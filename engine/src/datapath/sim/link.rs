//! What a simulated link does to packets, as plain numbers, and what it counted.
//!
//! One [`LinkConfig`] describes one direction. Rates and sizes count IP bytes:
//! UDP payload plus [`HEADER_BYTES`]. All times are integers, so that no result
//! depends on floating point; probabilities are turned into integer thresholds.

use serde::Serialize;

/// IPv6 (40) and UDP (8) header bytes that every datagram carries on the wire.
pub const HEADER_BYTES: u64 = 48;

/// The fastest rate that a link can have: 1 Tbit/s.
pub const RATE_BPS_MAX: u64 = 1_000_000_000_000;
/// The slowest rate that a link can have: 1 kbit/s, at which a 1500 B packet takes 12 s.
pub const RATE_BPS_MIN: u64 = 1_000;
/// The longest delay, jitter, queue or hold time: one hour, enough for a path to any planet as far as Jupiter.
pub const TIME_US_MAX: u64 = 3_600_000_000;
/// The smallest MTU of an IPv6 link (RFC 8200 §5).
pub const MTU_MIN: u64 = 1_280;
/// The largest IPv6 packet without a jumbogram: 65535 bytes after the 40 byte header.
pub const MTU_MAX: u64 = 65_575;
/// The largest queue, aggregate or bucket in bytes: 64 GB.
pub const BYTES_MAX: u64 = 64_000_000_000;
/// The rarest loss that `loss_every` can describe.
pub const LOSS_EVERY_MAX: u64 = 1_000_000_000_000;

/// What each key may be, whatever the others are: `(key, min, max)`.
const RANGES: [(&str, u64, u64); 14] = [
    ("rate_bps", RATE_BPS_MIN, RATE_BPS_MAX),
    ("delay_us", 0, TIME_US_MAX),
    ("jitter_us", 0, TIME_US_MAX),
    ("queue_us", 1, TIME_US_MAX),
    ("queue_bytes", 1, BYTES_MAX),
    ("mtu", MTU_MIN, MTU_MAX),
    ("loss_every", 0, LOSS_EVERY_MAX),
    ("reorder_us", 0, TIME_US_MAX),
    ("ecn_threshold_us", 0, TIME_US_MAX),
    ("aggregation_bytes", 0, BYTES_MAX),
    ("aggregation_us", 0, TIME_US_MAX),
    ("policer_rate_bps", 0, RATE_BPS_MAX),
    ("policer_bucket_bytes", 0, BYTES_MAX),
    ("policer_initial_bytes", 0, BYTES_MAX),
];

/// The smallest and the largest value of an integer key.
///
/// # Panics
/// If no such key exists.
pub(super) fn range_of(key: &str) -> (u64, u64) {
    let row = RANGES.iter().find(|(name, _, _)| *name == key);
    let &(_, min, max) = row.expect("every integer key has its row in RANGES");
    (min, max)
}

/// The limit of a tail-drop queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QueueLimit {
    /// Takes everything.
    #[default]
    Unlimited,
    /// At most this many IP bytes wait; the packet in transmission does not count.
    Bytes(u64),
    /// As many bytes as the link's present rate sends in this many microseconds.
    TimeUs(u64),
}

impl QueueLimit {
    /// The limit in bytes on a link of `rate_bps`.
    #[must_use]
    pub fn bytes_at(self, rate_bps: u64) -> u64 {
        match self {
            Self::Unlimited => u64::MAX,
            Self::Bytes(bytes) => bytes,
            Self::TimeUs(time_us) => {
                let bytes = u128::from(time_us) * u128::from(rate_bps) / 8_000_000;
                u64::try_from(bytes).unwrap_or(u64::MAX)
            }
        }
    }
}

/// One direction of a link. The order in which a packet meets it: down, MTU,
/// policer, queue, aggregation, transmission at the rate (ECN mark when it
/// starts), then on the wire loss, corruption, duplication, delay, jitter,
/// reordering.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkConfig {
    /// Transmission rate in bits of IP packets per second.
    pub rate_bps: u64,
    /// Propagation delay.
    pub delay_us: u64,
    /// Added to the delay, uniform in `0..=jitter_us`; a packet never arrives before one sent earlier.
    pub jitter_us: u64,
    /// Where the queue drops. An idle link always takes a packet.
    pub queue: QueueLimit,
    /// Largest IP packet; a larger one is dropped without notice, as behind a PMTUD black hole.
    pub mtu: u64,
    /// Probability that a packet is lost on the wire (it has used its transmission time).
    pub loss: f64,
    /// Every Nth packet is lost on the wire; 0 is off.
    pub loss_every: u64,
    /// Probability that a packet is delayed by [`reorder_us`](Self::reorder_us) while later ones overtake it.
    pub reorder: f64,
    /// See [`reorder`](Self::reorder).
    pub reorder_us: u64,
    /// Probability that a second copy arrives right behind a packet.
    pub duplicate: f64,
    /// Probability that one bit of the UDP payload is flipped.
    pub corrupt: f64,
    /// A packet that waited longer than this and is ECN-capable is marked CE; 0 is off.
    pub ecn_threshold_us: u64,
    /// Packets are held until this many bytes wait; 0 with `aggregation_us` set holds by time alone.
    pub aggregation_bytes: u64,
    /// The longest that the first held packet is kept back; 0 is off.
    pub aggregation_us: u64,
    /// Rate of a token bucket that drops what exceeds it, ahead of the queue; 0 is off.
    pub policer_rate_bps: u64,
    /// Size of that bucket.
    pub policer_bucket_bytes: u64,
    /// What it holds at the start.
    pub policer_initial_bytes: u64,
    /// Nothing enters, nothing leaves; what waited or was being transmitted is lost.
    pub down: bool,
}

impl Default for LinkConfig {
    /// 1 Gbit/s with an MTU of 1500, no delay, an unlimited queue and no impairment.
    fn default() -> Self {
        Self {
            rate_bps: 1_000_000_000,
            delay_us: 0,
            jitter_us: 0,
            queue: QueueLimit::Unlimited,
            mtu: 1500,
            loss: 0.0,
            loss_every: 0,
            reorder: 0.0,
            reorder_us: 0,
            duplicate: 0.0,
            corrupt: 0.0,
            ecn_threshold_us: 0,
            aggregation_bytes: 0,
            aggregation_us: 0,
            policer_rate_bps: 0,
            policer_bucket_bytes: 0,
            policer_initial_bytes: 0,
            down: false,
        }
    }
}

impl LinkConfig {
    /// Checks every range and combination.
    ///
    /// # Errors
    /// The first key that is wrong, with its value and what is allowed.
    pub fn check(&self) -> Result<(), LinkConfigError> {
        check_range("rate_bps", self.rate_bps)?;
        check_range("delay_us", self.delay_us)?;
        check_range("jitter_us", self.jitter_us)?;
        match self.queue {
            QueueLimit::Unlimited => {}
            QueueLimit::Bytes(bytes) => check_range("queue_bytes", bytes)?,
            QueueLimit::TimeUs(time_us) => check_range("queue_us", time_us)?,
        }
        check_range("mtu", self.mtu)?;
        check_probability("loss", self.loss)?;
        check_range("loss_every", self.loss_every)?;
        check_probability("reorder", self.reorder)?;
        check_range("reorder_us", self.reorder_us)?;
        check_probability("duplicate", self.duplicate)?;
        check_probability("corrupt", self.corrupt)?;
        check_range("ecn_threshold_us", self.ecn_threshold_us)?;
        check_range("aggregation_bytes", self.aggregation_bytes)?;
        check_range("aggregation_us", self.aggregation_us)?;
        check_range("policer_rate_bps", self.policer_rate_bps)?;
        check_range("policer_bucket_bytes", self.policer_bucket_bytes)?;
        check_range("policer_initial_bytes", self.policer_initial_bytes)?;
        self.check_combinations()
    }

    /// Whether packets are held back to leave in bursts.
    #[must_use]
    pub fn aggregates(&self) -> bool {
        self.aggregation_us > 0
    }

    fn check_combinations(&self) -> Result<(), LinkConfigError> {
        if self.reorder > 0.0 && self.reorder_us == 0 {
            return Err(LinkConfigError::new("reorder_us", 0, "at least 1 where reorder > 0"));
        }
        if self.aggregation_bytes > 0 && self.aggregation_us == 0 {
            let expected = "at least 1 where aggregation_bytes > 0, or the last bytes wait forever";
            return Err(LinkConfigError::new("aggregation_us", 0, expected));
        }
        if self.policer_rate_bps == 0 {
            return Ok(());
        }
        check_within("policer_rate_bps", self.policer_rate_bps, RATE_BPS_MIN, RATE_BPS_MAX)?;
        check_within("policer_bucket_bytes", self.policer_bucket_bytes, MTU_MIN, BYTES_MAX)?;
        let bucket = self.policer_bucket_bytes;
        check_within("policer_initial_bytes", self.policer_initial_bytes, 0, bucket)
    }
}

/// A key of a link that cannot be, with its value and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} = {value}: expected {expected}")]
pub struct LinkConfigError {
    /// The field of [`LinkConfig`], as in a scenario file.
    pub key: &'static str,
    /// What it was.
    pub value: String,
    /// What it may be.
    pub expected: String,
}

impl LinkConfigError {
    fn new(key: &'static str, value: impl ToString, expected: impl Into<String>) -> Self {
        Self { key, value: value.to_string(), expected: expected.into() }
    }
}

fn check_range(key: &'static str, value: u64) -> Result<(), LinkConfigError> {
    let (min, max) = range_of(key);
    check_within(key, value, min, max)
}

fn check_within(key: &'static str, value: u64, min: u64, max: u64) -> Result<(), LinkConfigError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(LinkConfigError::new(key, value, format!("{min} to {max}")))
}

fn check_probability(key: &'static str, value: f64) -> Result<(), LinkConfigError> {
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    Err(LinkConfigError::new(key, value, "a probability, 0.0 to 1.0"))
}

/// A direction of a link and how it changes with time.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LinkPlan {
    /// What it is at virtual time zero.
    pub initial: LinkConfig,
    /// What it becomes, in order of time.
    pub steps: Vec<LinkStep>,
}

impl LinkPlan {
    /// A direction that stays as it is.
    #[must_use]
    pub fn constant(config: LinkConfig) -> Self {
        Self { initial: config, steps: Vec::new() }
    }

    /// The largest MTU that the direction ever has.
    #[must_use]
    pub fn mtu_max(&self) -> u64 {
        let later = self.steps.iter().map(|step| step.config.mtu).max().unwrap_or(0);
        self.initial.mtu.max(later)
    }
}

impl From<LinkConfig> for LinkPlan {
    fn from(config: LinkConfig) -> Self {
        Self::constant(config)
    }
}

/// One change of a link.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkStep {
    /// Virtual time.
    pub at_ms: u64,
    /// The whole configuration from then on.
    pub config: LinkConfig,
}

/// What became of the packets of one direction of a link; monotonic but for the two gauges at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct LinkCounters {
    /// Packets that came out at the far end, copies included.
    pub delivered: u64,
    /// Their IP bytes.
    pub delivered_bytes: u64,
    /// Dropped: the queue was full.
    pub dropped_queue: u64,
    /// Dropped: lost on the wire (`loss`, `loss_every`).
    pub dropped_loss: u64,
    /// Dropped: the policer had no tokens.
    pub dropped_policer: u64,
    /// Dropped: larger than the MTU.
    pub dropped_mtu: u64,
    /// Dropped: the link was down.
    pub dropped_down: u64,
    /// Packets marked CE.
    pub marked_ce: u64,
    /// Copies made.
    pub duplicated: u64,
    /// Packets with a flipped bit.
    pub corrupted: u64,
    /// Packets delayed for others to overtake.
    pub reordered: u64,
    /// IP bytes that wait now; the packet in transmission does not count.
    pub queue_bytes: u64,
    /// The most that ever waited.
    pub queue_bytes_max: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(config: &LinkConfig) -> String {
        config.check().expect_err("must be refused").to_string()
    }

    #[test]
    fn default_is_valid() {
        LinkConfig::default().check().expect("the default");
    }

    #[test]
    fn errors_name_key_value_and_range() {
        let base = LinkConfig::default;
        assert_eq!(
            refused(&LinkConfig { rate_bps: 0, ..base() }),
            "rate_bps = 0: expected 1000 to 1000000000000"
        );
        assert_eq!(
            refused(&LinkConfig { loss: 1.5, ..base() }),
            "loss = 1.5: expected a probability, 0.0 to 1.0"
        );
        assert!(refused(&LinkConfig { corrupt: f64::NAN, ..base() }).starts_with("corrupt = NaN"));
        assert!(refused(&LinkConfig { mtu: 1279, ..base() }).starts_with("mtu = 1279"));
        assert!(
            refused(&LinkConfig { queue: QueueLimit::TimeUs(0), ..base() })
                .starts_with("queue_us = 0")
        );
    }

    #[test]
    fn impossible_combinations_are_refused() {
        let base = LinkConfig::default;
        assert!(refused(&LinkConfig { reorder: 0.1, ..base() }).starts_with("reorder_us"));
        assert!(
            refused(&LinkConfig { aggregation_bytes: 9000, ..base() })
                .starts_with("aggregation_us")
        );
        let policed = LinkConfig {
            policer_rate_bps: 1_000_000,
            policer_bucket_bytes: 10_000,
            policer_initial_bytes: 10_001,
            ..base()
        };
        assert_eq!(refused(&policed), "policer_initial_bytes = 10001: expected 0 to 10000");
    }

    #[test]
    fn a_time_limit_follows_the_rate() {
        assert_eq!(QueueLimit::TimeUs(20_000).bytes_at(10_000_000), 25_000);
        assert_eq!(QueueLimit::TimeUs(20_000).bytes_at(1_000_000), 2_500);
        assert_eq!(QueueLimit::TimeUs(TIME_US_MAX).bytes_at(RATE_BPS_MAX), 450_000_000_000_000);
        assert_eq!(QueueLimit::Bytes(7).bytes_at(1_000), 7);
    }
}
