//! When each operation should start: at once in a closed loop, by the clock at a rate.
//!
//! At a rate, an operation that starts late keeps its intended start, and its latency counts
//! from there: a stack that stalls does not hide the operations that it held up.

use std::time::{Duration, Instant};

/// The schedule of operations.
#[derive(Debug, Clone)]
pub struct Pace {
    start: Instant,
    /// 0: closed loop.
    per_s: f64,
    taken: u64,
}

impl Pace {
    /// `per_s` operations a second from `start` on; 0: as soon as asked for.
    #[must_use]
    pub fn new(start: Instant, per_s: f64) -> Self {
        Self { start, per_s, taken: 0 }
    }

    /// The intended start of the next operation, if it has come.
    pub fn take(&mut self, now: Instant) -> Option<Instant> {
        if self.per_s <= 0.0 {
            return Some(now);
        }
        let due = self.next_at()?;
        if due > now {
            return None;
        }
        self.taken += 1;
        Some(due)
    }

    /// When the next operation is due; `None` in a closed loop: whenever there is room.
    #[must_use]
    pub fn next_at(&self) -> Option<Instant> {
        let is_paced = self.per_s > 0.0;
        is_paced.then(|| self.start + Duration::from_secs_f64(self.taken as f64 / self.per_s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_does_not_hide_what_it_held_up() {
        let start = Instant::now();
        let mut pace = Pace::new(start, 1000.0);
        assert_eq!(pace.take(start), Some(start));
        assert_eq!(pace.take(start), None);
        let late = start + Duration::from_millis(3);
        let taken: Vec<_> = std::iter::from_fn(|| pace.take(late)).collect();
        let intended: Vec<_> = (1..=3).map(|ms| start + Duration::from_millis(ms)).collect();
        assert_eq!(taken, intended);
        assert_eq!(pace.next_at(), Some(start + Duration::from_millis(4)));
    }

    #[test]
    fn a_closed_loop_starts_now() {
        let now = Instant::now();
        let mut pace = Pace::new(now, 0.0);
        let later = now + Duration::from_secs(1);
        assert_eq!((pace.take(later), pace.next_at()), (Some(later), None));
    }
}
