//! The policer ahead of a link's queue.

use super::hop::BIT_NS_PER_BYTE;
use super::link::LinkConfig;

/// A token bucket that drops what exceeds it. Tokens count bit-nanoseconds, so
/// that refilling is exact at every rate.
#[derive(Debug)]
pub(super) struct Policer {
    rate_bps: u64,
    bucket: u128,
    tokens: u128,
    refilled_ns: u64,
}

impl Policer {
    pub(super) fn new(config: &LinkConfig) -> Self {
        Self {
            rate_bps: config.policer_rate_bps,
            bucket: Self::scaled(config.policer_bucket_bytes),
            tokens: Self::scaled(config.policer_initial_bytes),
            refilled_ns: 0,
        }
    }

    fn scaled(bytes: u64) -> u128 {
        u128::from(bytes) * u128::from(BIT_NS_PER_BYTE)
    }

    /// Keeps the tokens, but a policer that was off begins with the initial ones.
    pub(super) fn reconfigure(&mut self, now_ns: u64, old: &LinkConfig, new: &LinkConfig) {
        self.refill(now_ns);
        self.rate_bps = new.policer_rate_bps;
        self.bucket = Self::scaled(new.policer_bucket_bytes);
        if old.policer_rate_bps == 0 {
            self.tokens = Self::scaled(new.policer_initial_bytes);
        }
        self.tokens = self.tokens.min(self.bucket);
    }

    fn refill(&mut self, now_ns: u64) {
        let elapsed_ns = now_ns - self.refilled_ns;
        self.refilled_ns = now_ns;
        let earned = u128::from(elapsed_ns) * u128::from(self.rate_bps);
        self.tokens = (self.tokens + earned).min(self.bucket);
    }

    pub(super) fn admits(&mut self, now_ns: u64, bytes: u64) -> bool {
        if self.rate_bps == 0 {
            return true;
        }
        self.refill(now_ns);
        let Some(left) = self.tokens.checked_sub(Self::scaled(bytes)) else {
            return false;
        };
        self.tokens = left;
        true
    }
}
