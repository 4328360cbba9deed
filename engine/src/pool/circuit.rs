//! When a peer that fails is tried again: jittered exponential back-off under a circuit breaker.
//!
//! ```text
//!            failure              failures = circuit_failures
//!   closed ──────────▶ backing off ──────────▶ open ──(circuit_open_ms)──▶ half open
//!     ▲                 │      ▲                 ▲                          │   │
//!     │     success     │      │ failure         └──────── failure ─────────┘   │
//!     ├─────────────────┘      └──                                              │
//!     └───────────────────────────────── success ───────────────────────────────┘
//! ```
//!
//! Backing off delays callers; an open circuit refuses them. Half open lets one attempt through.

use std::time::{Duration, Instant};

use rand::Rng;

use crate::config::PoolConfig;

/// Whether an attempt may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    Now,
    /// Not before then; callers may wait.
    At(Instant),
    /// Not before then; callers are refused.
    Refused(Instant),
}

/// What a failure led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pause {
    pub(super) duration: Duration,
    /// The circuit opened (or opened again).
    pub(super) opened: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed,
    BackingOff { until: Instant },
    Open { until: Instant },
    HalfOpen,
}

/// One peer's record of failures.
#[derive(Debug, Clone, Copy)]
pub(super) struct Circuit {
    failures: u32,
    state: State,
}

impl Default for Circuit {
    fn default() -> Self {
        Self { failures: 0, state: State::Closed }
    }
}

impl Circuit {
    /// Failures in a row.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    pub(super) fn admit(&self, now: Instant) -> Admission {
        match self.state {
            State::BackingOff { until } if now < until => Admission::At(until),
            State::Open { until } if now < until => Admission::Refused(until),
            _ => Admission::Now,
        }
    }

    /// An admitted attempt starts; whether it is the one that probes an open circuit.
    pub(super) fn begin(&mut self) -> bool {
        let probes = matches!(self.state, State::Open { .. });
        self.state = if probes { State::HalfOpen } else { State::Closed };
        probes
    }

    /// An attempt succeeded; how many failures it ended, and whether the circuit closed.
    pub(super) fn succeed(&mut self) -> (u32, bool) {
        let was_open = matches!(self.state, State::HalfOpen | State::Open { .. });
        self.state = State::Closed;
        (std::mem::take(&mut self.failures), was_open)
    }

    /// An attempt failed.
    pub(super) fn fail(&mut self, now: Instant, limits: &PoolConfig, rng: &mut impl Rng) -> Pause {
        self.failures = self.failures.saturating_add(1);
        if self.state == State::HalfOpen || self.failures >= limits.circuit_failures {
            // A tenth on top, so that callers that failed together do not come back together.
            let open_ms = limits.circuit_open_ms;
            let duration = Duration::from_millis(open_ms + rng.random_range(0..=open_ms / 10));
            self.state = State::Open { until: now + duration };
            return Pause { duration, opened: true };
        }
        let doubled = 1u64.checked_shl(self.failures - 1).unwrap_or(u64::MAX);
        let full_ms = limits.reconnect_base_ms.saturating_mul(doubled).min(limits.reconnect_cap_ms);
        let full_us = full_ms * 1000;
        let duration = Duration::from_micros(rng.random_range(full_us / 2..=full_us));
        self.state = State::BackingOff { until: now + duration };
        Pause { duration, opened: false }
    }

    /// An established connection was lost: the first attempt of many clients is spread out.
    pub(super) fn lose(&mut self, now: Instant, limits: &PoolConfig, rng: &mut impl Rng) -> Pause {
        let duration = match self.admit(now) {
            Admission::Now if self.state == State::Closed => {
                let base_us = limits.reconnect_base_ms * 1000;
                let duration = Duration::from_micros(rng.random_range(0..=base_us));
                self.state = State::BackingOff { until: now + duration };
                duration
            }
            Admission::Now => Duration::ZERO,
            Admission::At(until) | Admission::Refused(until) => until - now,
        };
        Pause { duration, opened: false }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    fn limits() -> PoolConfig {
        PoolConfig {
            reconnect_base_ms: 100,
            reconnect_cap_ms: 1000,
            circuit_failures: 6,
            circuit_open_ms: 5000,
            ..Default::default()
        }
    }

    #[test]
    fn pauses_double_with_jitter_up_to_the_cap_and_then_the_circuit_opens() {
        let (now, limits) = (Instant::now(), limits());
        for seed in 0..200 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut circuit = Circuit::default();
            for full_ms in [100, 200, 400, 800, 1000] {
                let pause = circuit.fail(now, &limits, &mut rng);
                let range = Duration::from_millis(full_ms / 2)..=Duration::from_millis(full_ms);
                assert!(range.contains(&pause.duration) && !pause.opened, "{full_ms}: {pause:?}");
                assert_eq!(circuit.admit(now), Admission::At(now + pause.duration));
                assert_eq!(circuit.admit(now + pause.duration), Admission::Now);
                assert!(!circuit.begin(), "no probe while the circuit is closed");
            }
            let pause = circuit.fail(now, &limits, &mut rng);
            assert!(pause.opened && pause.duration >= Duration::from_millis(5000));
            assert_eq!(circuit.admit(now), Admission::Refused(now + pause.duration));
        }
    }

    #[test]
    fn jitter_differs_between_clients() {
        let (now, limits) = (Instant::now(), limits());
        let pause =
            |seed| Circuit::default().fail(now, &limits, &mut StdRng::seed_from_u64(seed)).duration;
        assert_ne!(pause(1), pause(2));
    }

    #[test]
    fn half_open_closes_on_success_and_opens_on_one_failure() {
        let (now, limits) = (Instant::now(), limits());
        let mut rng = StdRng::seed_from_u64(7);
        let mut circuit = Circuit::default();
        let mut pause = Pause { duration: Duration::ZERO, opened: false };
        for _ in 0..6 {
            pause = circuit.fail(now, &limits, &mut rng);
        }
        let later = now + pause.duration;
        assert_eq!(circuit.admit(later), Admission::Now);
        assert!(circuit.begin(), "the attempt probes");
        assert!(circuit.fail(later, &limits, &mut rng).opened, "one failure is enough");
        assert!(matches!(circuit.admit(later), Admission::Refused(_)));
        let later = later + Duration::from_secs(6);
        assert!(circuit.begin());
        assert_eq!(circuit.succeed(), (7, true));
        assert_eq!((circuit.admit(later), circuit.failures()), (Admission::Now, 0));
    }

    #[test]
    fn many_failures_do_not_overflow() {
        let mut limits = limits();
        limits.circuit_failures = u32::MAX;
        let mut rng = StdRng::seed_from_u64(7);
        let mut circuit = Circuit::default();
        for _ in 0..200 {
            let pause = circuit.fail(Instant::now(), &limits, &mut rng);
            assert!(pause.duration <= Duration::from_millis(1000));
        }
    }

    #[test]
    fn a_lost_connection_is_retried_within_the_base() {
        let (now, limits) = (Instant::now(), limits());
        let mut circuit = Circuit::default();
        let pause = circuit.lose(now, &limits, &mut StdRng::seed_from_u64(3));
        assert!(pause.duration <= Duration::from_millis(100));
        assert_eq!(circuit.admit(now + pause.duration), Admission::Now);
    }
}
