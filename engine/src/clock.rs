//! Time enters the engine here, once per turn, and nowhere else.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A source of monotonic time.
pub trait Clock {
    /// The present.
    fn now(&self) -> Instant;
}

/// The system's monotonic clock (`CLOCK_MONOTONIC`).
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
}

/// Virtual time that moves only when told to; clones share it.
#[derive(Debug, Clone)]
pub struct SimClock {
    base: Instant,
    elapsed: Rc<Cell<Duration>>,
}

impl SimClock {
    /// A clock that stands at zero.
    #[must_use]
    pub fn new() -> Self {
        Self { base: Instant::now(), elapsed: Rc::new(Cell::new(Duration::ZERO)) }
    }

    /// Virtual time since the clock was made.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.elapsed.get()
    }

    /// Moves time to `elapsed` after the start.
    ///
    /// # Panics
    /// If that would move time backwards.
    pub fn advance_to(&self, elapsed: Duration) {
        assert!(elapsed >= self.elapsed.get(), "virtual time moves forward only");
        self.elapsed.set(elapsed);
    }

    /// The instant that stands for `elapsed`.
    #[must_use]
    pub fn instant_at(&self, elapsed: Duration) -> Instant {
        self.base + elapsed
    }
}

impl Default for SimClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SimClock {
    fn now(&self) -> Instant {
        self.base + self.elapsed.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_share_virtual_time() {
        let clock = SimClock::new();
        let other = clock.clone();
        let start = other.now();
        clock.advance_to(Duration::from_millis(5));
        assert_eq!(other.now() - start, Duration::from_millis(5));
        assert_eq!(other.elapsed(), Duration::from_millis(5));
    }

    #[test]
    #[should_panic(expected = "forward only")]
    fn time_does_not_go_back() {
        let clock = SimClock::new();
        clock.advance_to(Duration::from_millis(5));
        clock.advance_to(Duration::from_millis(4));
    }
}
