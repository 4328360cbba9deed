//! Civil time for certificates: validity, renewal, ticket keys.
//!
//! Packets live on the monotonic [`Clock`](crate::clock::Clock); certificates live on the date.
//! The date can jump either way, so nothing here assumes that it moves forward.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;

/// A source of the date.
pub trait WallClock: fmt::Debug + Send + Sync {
    /// The date now. It may jump backwards, as the machine's own does.
    fn now(&self) -> SystemTime;
}

/// The machine's date (`CLOCK_REALTIME`).
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemWallClock;

impl WallClock for SystemWallClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// A date that moves only when told to, in either direction.
#[derive(Debug)]
pub struct SimWallClock {
    unix_ns: AtomicU64,
}

impl SimWallClock {
    /// A clock that stands at `start`.
    ///
    /// # Panics
    /// If `start` lies before 1970 or after 2553.
    #[must_use]
    pub fn new(start: SystemTime) -> Self {
        Self { unix_ns: AtomicU64::new(unix_ns(start)) }
    }

    /// Sets the date, forwards or backwards.
    ///
    /// # Panics
    /// If `now` lies before 1970 or after 2553.
    pub fn set(&self, now: SystemTime) {
        // Relaxed: the date publishes nothing but itself.
        self.unix_ns.store(unix_ns(now), Ordering::Relaxed);
    }

    /// Moves the date forward by `step`.
    ///
    /// # Panics
    /// If `step` exceeds 584 years.
    pub fn advance(&self, step: Duration) {
        let step_ns = u64::try_from(step.as_nanos()).expect("a step fits 64 bits of nanoseconds");
        self.unix_ns.fetch_add(step_ns, Ordering::Relaxed);
    }
}

impl WallClock for SimWallClock {
    fn now(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(self.unix_ns.load(Ordering::Relaxed))
    }
}

fn unix_ns(time: SystemTime) -> u64 {
    let since_epoch = time.duration_since(UNIX_EPOCH).expect("dates before 1970 are not simulated");
    u64::try_from(since_epoch.as_nanos()).expect("dates before 2554 fit 64 bits of nanoseconds")
}

/// Whole seconds since 1970; a date before that counts as 1970.
pub(super) fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since_epoch| since_epoch.as_secs())
}

/// The date as rustls and webpki take it.
pub(super) fn unix_time(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(unix_seconds(time)))
}

/// Lets rustls read the injected date.
#[derive(Debug)]
pub(super) struct TlsTime(pub(super) Arc<dyn WallClock>);

impl TimeProvider for TlsTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix_time(self.0.now()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simulated_date_moves_both_ways() {
        let start = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let clock = SimWallClock::new(start);
        clock.advance(Duration::from_secs(90));
        assert_eq!(clock.now(), start + Duration::from_secs(90));
        clock.set(start - Duration::from_secs(10));
        assert_eq!(clock.now(), start - Duration::from_secs(10));
    }

    #[test]
    fn seconds_before_1970_saturate() {
        assert_eq!(unix_seconds(UNIX_EPOCH - Duration::from_secs(5)), 0);
    }
}
