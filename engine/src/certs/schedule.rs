//! When a certificate is renewed, retried and worried about: pure arithmetic on dates.

use std::time::{Duration, SystemTime};

use rand::Rng;

use super::authority::RenewalWindow;
use super::names::CertificateSummary;

/// How often a CA is asked for its renewal window at most and at least (RFC 9773, section 4.3.1).
pub(super) const WINDOW_ASK_MIN: Duration = Duration::from_secs(60);
pub(super) const WINDOW_ASK_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Wait after a question for the window that nobody answered.
pub(super) const WINDOW_ASK_RETRY: Duration = Duration::from_secs(6 * 60 * 60);
/// First wait after a failed renewal; shorter for certificates that live some minutes only.
const BACKOFF_FIRST: Duration = Duration::from_secs(5);
/// Shortest wait between attempts.
const BACKOFF_MIN: Duration = Duration::from_secs(2);
/// Longest wait between attempts.
pub(super) const BACKOFF_MAX: Duration = Duration::from_secs(10 * 60);

/// The dates of one certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
    /// Between ½ and ⅔ of the lifetime, jittered so that a fleet does not renew at once.
    pub(super) renew_at: SystemTime,
}

impl Plan {
    pub(super) fn new(certificate: &CertificateSummary, rng: &mut impl Rng) -> Self {
        let lifetime = certificate.lifetime();
        let share = 0.5 + rng.random_range(0.0..1.0) / 6.0;
        Self {
            not_before: certificate.not_before,
            not_after: certificate.not_after,
            renew_at: certificate.not_before + lifetime.mul_f64(share),
        }
    }

    /// Moves the renewal to a moment in the CA's window, if that comes before the plan; at once if the
    /// window is over (RFC 9773, section 4.2).
    pub(super) fn follow(&mut self, window: &RenewalWindow, rng: &mut impl Rng) {
        let length = window.end.duration_since(window.start).unwrap_or_default();
        let wish = window.start + length.mul_f64(rng.random_range(0.0..1.0));
        self.renew_at = self.renew_at.min(wish);
    }

    fn lifetime(&self) -> Duration {
        self.not_after.duration_since(self.not_before).unwrap_or_default()
    }

    /// When `alarm` is due.
    pub(super) fn alarm_at(&self, alarm: Alarm) -> SystemTime {
        match alarm {
            Alarm::ThirdLeft => self.not_after - self.lifetime() / 3,
            Alarm::TenthLeft => self.not_after - self.lifetime() / 10,
            Alarm::Expired => self.not_after + Duration::from_secs(1),
        }
    }
}

/// How urgent it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Alarm {
    /// A third of the life is left: renewals have been failing for a while.
    ThirdLeft,
    /// A tenth of the life is left: act now.
    TenthLeft,
    /// It is over: peers refuse new handshakes; established connections go on.
    Expired,
}

impl Alarm {
    /// In the order in which they fall due.
    pub(super) const ALL: [Self; 3] = [Self::ThirdLeft, Self::TenthLeft, Self::Expired];
}

/// Doubling waits with jitter, short enough to try often before the end.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Backoff {
    attempts: u32,
}

impl Backoff {
    pub(super) fn reset(&mut self) {
        self.attempts = 0;
    }

    /// The wait after one more failure, for a certificate that lives `lifetime`.
    pub(super) fn next_delay(&mut self, lifetime: Duration, rng: &mut impl Rng) -> Duration {
        let longest = (lifetime / 50).clamp(BACKOFF_MIN, BACKOFF_MAX);
        let doubled = BACKOFF_FIRST.saturating_mul(1 << self.attempts.min(10));
        self.attempts = self.attempts.saturating_add(1);
        doubled.min(longest).mul_f64(rng.random_range(0.5..1.0))
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::super::names::IdentityNames;
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn day() -> CertificateSummary {
        CertificateSummary {
            serial: "01".to_owned(),
            not_before: UNIX_EPOCH,
            not_after: UNIX_EPOCH + DAY,
            names: IdentityNames::new(),
            is_ca: false,
        }
    }

    #[test]
    fn renewal_falls_between_half_and_two_thirds_and_spreads() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut first_half = 0;
        for _ in 0..1000 {
            let plan = Plan::new(&day(), &mut rng);
            let age = plan.renew_at.duration_since(UNIX_EPOCH).unwrap();
            assert!(age >= DAY / 2 && age < DAY * 2 / 3, "{age:?}");
            assert!(plan.renew_at < plan.alarm_at(Alarm::ThirdLeft));
            first_half += usize::from(age < DAY * 7 / 12);
        }
        assert!((400..600).contains(&first_half), "{first_half}");
    }

    #[test]
    fn alarms_fall_due_in_order() {
        let plan = Plan::new(&day(), &mut StdRng::seed_from_u64(1));
        let due: Vec<_> = Alarm::ALL.iter().map(|alarm| plan.alarm_at(*alarm)).collect();
        assert!(due.is_sorted());
        assert_eq!(due[0], UNIX_EPOCH + DAY * 2 / 3);
        assert_eq!(due[1], UNIX_EPOCH + DAY * 9 / 10);
        assert!(due[2] > UNIX_EPOCH + DAY);
    }

    #[test]
    fn backoff_doubles_up_to_a_bound_and_starts_over() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut backoff = Backoff::default();
        let delays: Vec<_> = (0..40).map(|_| backoff.next_delay(DAY, &mut rng)).collect();
        assert!(delays[0] <= BACKOFF_FIRST);
        assert!(delays[20..].iter().all(|d| *d >= BACKOFF_MAX / 2 && *d <= BACKOFF_MAX));
        backoff.reset();
        assert!(backoff.next_delay(DAY, &mut rng) <= BACKOFF_FIRST);
        // A short life is not slept through.
        let hour = Duration::from_secs(3600);
        let mut backoff = Backoff::default();
        assert!((0..40).all(|_| backoff.next_delay(hour, &mut rng) <= hour / 50));
        let minute = Duration::from_secs(60);
        let mut backoff = Backoff::default();
        assert!((0..40).all(|_| backoff.next_delay(minute, &mut rng) <= BACKOFF_MIN));
    }
}
