//! The engine's pacer: a token bucket per connection, in front of `poll_transmit`.
//!
//! quinn-proto 0.11 paces by window and RTT and ignores a controller's own rate,
//! so its pacer is bypassed (see [`congestion`](super::congestion)) and this one
//! decides. Tokens are nanoseconds of sending time, not bytes: the bucket is the
//! single instant at which the line is free again, which makes the arithmetic
//! exact from 10 kbit/s to 100 Gbit/s and lets unused time never grow into more
//! than one quantum.

use std::time::{Duration, Instant};

/// When the next packet may leave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pacer {
    /// The virtual line is busy until then; may lie in the past.
    free_at: Instant,
    /// Remainder of the last division, in byte-nanoseconds, so that no rate drifts.
    remainder: u64,
}

impl Pacer {
    /// A pacer whose line is free at `now`.
    pub(crate) fn new(now: Instant) -> Self {
        Self { free_at: now, remainder: 0 }
    }

    /// The bytes that may leave at `now`, at least 1; or the time at which some may.
    ///
    /// A quantum that has begun may be finished: the line may run at most
    /// `quantum_bytes` ahead of the rate. Unused time is not counted.
    pub(crate) fn allowance(
        &self,
        now: Instant,
        rate_bytes_per_s: u64,
        quantum_bytes: u64,
    ) -> Result<u64, Instant> {
        if rate_bytes_per_s == 0 || rate_bytes_per_s == u64::MAX || self.free_at <= now {
            return Ok(quantum_bytes.max(1));
        }
        let ahead = now + time_to_send(quantum_bytes, rate_bytes_per_s);
        if self.free_at >= ahead {
            return Err(self.free_at);
        }
        let left_ns = ahead.duration_since(self.free_at).as_nanos();
        let bytes = left_ns * u128::from(rate_bytes_per_s) / 1_000_000_000;
        Ok((bytes as u64).clamp(1, quantum_bytes.max(1)))
    }

    /// Accounts for `bytes` that left at `now`.
    pub(crate) fn on_sent(&mut self, now: Instant, bytes: u64, rate_bytes_per_s: u64) {
        if rate_bytes_per_s == 0 || rate_bytes_per_s == u64::MAX {
            self.free_at = now;
            return;
        }
        // Unused time does not become a burst: the line was free, it starts now.
        if self.free_at < now {
            self.free_at = now;
            self.remainder = 0;
        }
        let scaled = u128::from(bytes) * 1_000_000_000 + u128::from(self.remainder);
        let rate = u128::from(rate_bytes_per_s);
        self.free_at += Duration::from_nanos((scaled / rate) as u64);
        self.remainder = (scaled % rate) as u64;
    }
}

/// The time that `bytes` take at a rate, rounded down.
fn time_to_send(bytes: u64, rate_bytes_per_s: u64) -> Duration {
    Duration::from_nanos((u128::from(bytes) * 1_000_000_000 / u128::from(rate_bytes_per_s)) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends as fast as the pacer allows for `seconds`; returns bytes and the largest burst.
    fn run(rate: u64, packet: u64, quantum: u64, seconds: u64) -> (u64, u64) {
        let start = Instant::now();
        let end = start + Duration::from_secs(seconds);
        let (mut now, mut sent, mut burst, mut burst_max) = (start, 0, 0, 0);
        let mut pacer = Pacer::new(start);
        while now < end {
            match pacer.allowance(now, rate, quantum) {
                Ok(_) => {
                    pacer.on_sent(now, packet, rate);
                    sent += packet;
                    burst += packet;
                    burst_max = burst_max.max(burst);
                }
                Err(at) => {
                    assert!(at > now);
                    now = at;
                    burst = 0;
                }
            }
        }
        (sent, burst_max)
    }

    #[test]
    fn rate_holds_from_10_kbit_to_100_gbit() {
        for (rate, packet, seconds) in [
            (1_250, 1_200, 200),
            (125_000, 1_452, 20),
            (125_000_000, 1_452, 1),
            (1_250_000_000, 1_452, 1),
            (12_500_000_000, 9_000, 1),
        ] {
            let quantum = (rate / 1000).clamp(2 * packet, 65_536);
            let (sent, burst) = run(rate, packet, quantum, seconds);
            let ideal = rate * seconds;
            let slack = 2 * quantum + packet;
            assert!(
                sent.abs_diff(ideal) <= slack,
                "rate {rate}: sent {sent}, ideal {ideal}, slack {slack}"
            );
            assert!(burst <= 2 * quantum + packet, "rate {rate}: burst {burst} of {quantum}");
        }
    }

    #[test]
    fn unused_time_is_not_saved_up() {
        let start = Instant::now();
        let (rate, packet, quantum) = (1_000_000, 1_000, 2_000);
        let mut pacer = Pacer::new(start);
        let later = start + Duration::from_secs(60);
        let mut burst = 0;
        while let Ok(allowed) = pacer.allowance(later, rate, quantum) {
            assert!((1..=quantum - burst.min(quantum - 1)).contains(&allowed), "{allowed}");
            pacer.on_sent(later, packet, rate);
            burst += packet;
        }
        assert!(burst <= quantum + packet, "burst of {burst} after an idle minute");
    }

    #[test]
    fn an_unlimited_rate_never_blocks() {
        let now = Instant::now();
        let mut pacer = Pacer::new(now);
        for _ in 0..1000 {
            assert_eq!(pacer.allowance(now, u64::MAX, 65_536), Ok(65_536));
            pacer.on_sent(now, 9_000, u64::MAX);
        }
    }
}
