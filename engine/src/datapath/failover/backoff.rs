//! When to try again: each delay twice the one before, within limits, shortened at random by up
//! to half, so that many engines on one machine do not try at the same moment.

use std::time::{Duration, Instant};

#[derive(Debug)]
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
    succeeded_at: Option<Instant>,
    random: u64,
}

impl Backoff {
    /// Delays from `min` to `max`; `seed` feeds the jitter.
    pub(super) fn new(min: Duration, max: Duration, seed: u64) -> Self {
        Self { min, max, next: min, succeeded_at: None, random: seed | 1 }
    }

    /// The next attempt's distance from now.
    pub(super) fn delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = (self.next * 2).min(self.max);
        // xorshift64: never zero, as its seed is not.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let half = delay / 2;
        delay - Duration::from_nanos(self.random % (half.as_nanos() as u64 + 1))
    }

    /// Notes that an attempt was successful.
    pub(super) fn succeeded(&mut self, now: Instant) {
        self.succeeded_at = Some(now);
    }

    /// Notes a new failure: delays begin anew if what was opened lasted for longer than the
    /// longest delay. A device that comes and goes is not tried ever faster.
    pub(super) fn failed(&mut self, now: Instant) {
        let lasted = self.succeeded_at.take().map(|at| now.saturating_duration_since(at));
        if lasted.is_none_or(|lasted| lasted > self.max) {
            self.next = self.min;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN: Duration = Duration::from_millis(100);
    const MAX: Duration = Duration::from_secs(1);

    #[test]
    fn delays_double_to_the_limit_and_differ_between_seeds() {
        let delays = |seed| {
            let mut backoff = Backoff::new(MIN, MAX, seed);
            (0..8).map(|_| backoff.delay()).collect::<Vec<_>>()
        };
        for (index, delay) in delays(7).into_iter().enumerate() {
            let whole = (MIN * (1 << index)).min(MAX);
            assert!(delay <= whole && delay >= whole / 2, "{index}: {delay:?} of {whole:?}");
        }
        assert_ne!(delays(7), delays(8));
    }

    #[test]
    fn only_a_lasting_success_begins_anew() {
        let mut backoff = Backoff::new(MIN, MAX, 3);
        let start = Instant::now();
        for _ in 0..5 {
            let _ = backoff.delay();
        }
        backoff.succeeded(start);
        backoff.failed(start + MAX / 2);
        assert!(backoff.delay() >= MAX / 2, "a flapping device is tried as rarely as before");
        backoff.succeeded(start);
        backoff.failed(start + MAX * 2);
        assert!(backoff.delay() <= MIN);
    }
}
