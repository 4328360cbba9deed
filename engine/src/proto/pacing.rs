//! The engine's pacer: a token bucket per connection, in front of `poll_transmit`.
//!
//! quinn-proto 0.11 paces by window and RTT and ignores a controller's own rate,
//! so its pacer is bypassed (see [`congestion`](super::congestion)) and this one
//! decides. Tokens are nanoseconds of sending time, not bytes: the bucket is the
//! single instant at which the line is free again, which makes the arithmetic
//! exact from 10 kbit/s to 100 Gbit/s and lets unused time never grow into more
//! than one quantum.
//!
//! Time is unused when the connection had nothing to send, or its window was full. A
//! shard that comes late to a connection that only the pacer held back has a backlog
//! instead, which may leave at once, as far as a round trip goes: otherwise a thread that
//! shares its core would send a quantum each time it runs, congestion control would take that
//! for the path's bandwidth, and the next quantum would be smaller still.

use std::time::{Duration, Instant};

/// When the next packet may leave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pacer {
    /// The virtual line is busy until then; may lie in the past.
    free_at: Instant,
    /// Remainder of the last division, in byte-nanoseconds, so that no rate drifts.
    remainder: u64,
    /// Only the pacer has held packets back since the line was last busy.
    holds: bool,
    /// How much time a late visit may make up for.
    make_up: Duration,
}

impl Pacer {
    /// A pacer whose line is free at `now`.
    pub(crate) fn new(now: Instant) -> Self {
        Self { free_at: now, remainder: 0, holds: false, make_up: Duration::ZERO }
    }

    /// Packets wait for the pacer alone: a visit that comes late may make up for at most a round
    /// trip, `rtt`. The window bounds what leaves all the same.
    pub(crate) fn hold(&mut self, rtt: Duration) {
        self.holds = true;
        self.make_up = rtt;
    }

    /// Something else than the pacer holds packets back, or there are none: the time until some
    /// leave is unused.
    pub(crate) fn release(&mut self) {
        self.holds = false;
    }

    /// When the line was free, as far back as that counts.
    fn line_free_at(&self, now: Instant) -> Instant {
        if !self.holds {
            return self.free_at.max(now);
        }
        // An instant before the machine's start does not exist; then nothing is too far back.
        now.checked_sub(self.make_up).map_or(self.free_at, |earliest| self.free_at.max(earliest))
    }

    /// The bytes that may leave at `now`, at least 1; or the time at which some may.
    ///
    /// A quantum that has begun may be finished: the line may run at most
    /// `quantum_bytes` ahead of the rate. Unused time is not counted, a backlog is.
    pub(crate) fn allowance(
        &self,
        now: Instant,
        rate_bytes_per_s: u64,
        quantum_bytes: u64,
    ) -> Result<u64, Instant> {
        if rate_bytes_per_s == 0 || rate_bytes_per_s == u64::MAX {
            return Ok(quantum_bytes.max(1));
        }
        if self.free_at <= now {
            let backlog = now.duration_since(self.line_free_at(now));
            return Ok(quantum_bytes.saturating_add(volume(backlog, rate_bytes_per_s)).max(1));
        }
        let ahead = now + time_to_send(quantum_bytes, rate_bytes_per_s);
        if self.free_at >= ahead {
            return Err(self.free_at);
        }
        let bytes = volume(ahead.duration_since(self.free_at), rate_bytes_per_s);
        Ok(bytes.clamp(1, quantum_bytes.max(1)))
    }

    /// Accounts for `bytes` that left at `now`.
    pub(crate) fn on_sent(&mut self, now: Instant, bytes: u64, rate_bytes_per_s: u64) {
        if rate_bytes_per_s == 0 || rate_bytes_per_s == u64::MAX {
            self.free_at = now;
            return;
        }
        // Unused time does not become a burst: the line was free, it starts now.
        let free_at = self.line_free_at(now);
        if self.free_at < free_at {
            self.free_at = free_at;
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

/// The bytes that a rate sends in a time, rounded down.
fn volume(time: Duration, rate_bytes_per_s: u64) -> u64 {
    let bytes = time.as_nanos() * u128::from(rate_bytes_per_s) / 1_000_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
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

    /// What leaves in visits every 50 ms, bytes a second; the pacer is told why it stopped.
    fn visited_every_50_ms(rate: u64, mut after: impl FnMut(&mut Pacer)) -> u64 {
        let start = Instant::now();
        let (packet, quantum) = (1_452, 2_904);
        let (mut pacer, mut sent) = (Pacer::new(start), 0);
        for visit in 0..200 {
            let now = start + Duration::from_millis(50 * visit);
            while let Ok(allowed) = pacer.allowance(now, rate, quantum) {
                let bytes = allowed.min(packet);
                pacer.on_sent(now, bytes, rate);
                sent += bytes;
            }
            after(&mut pacer);
        }
        sent / 10
    }

    #[test]
    fn late_visits_keep_the_rate_within_a_round_trip() {
        let rate = 1_000_000;
        let held = visited_every_50_ms(rate, |pacer| pacer.hold(Duration::from_millis(60)));
        assert!(held.abs_diff(rate) < rate / 50, "{held} of {rate} bytes/s");
        let bounded = visited_every_50_ms(rate, |pacer| pacer.hold(Duration::from_millis(5)));
        let bound = 20 * (rate / 200 + 2 * 2_904);
        assert!(bounded > 20 * rate / 200 && bounded <= bound, "{bounded} bytes/s");
        let other_limit = visited_every_50_ms(rate, |pacer| {
            pacer.hold(Duration::from_millis(60));
            pacer.release();
        });
        assert!(other_limit <= 20 * (2 * 2_904), "{other_limit} bytes/s were saved up");
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
