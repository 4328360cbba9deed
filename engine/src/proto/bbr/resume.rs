//! Careful resume (RFC 9959): a connection that knows the path from an earlier
//! one may skip most of Startup's doublings, carefully.
//!
//! Phases: *Reconnaissance* starts as always and looks whether the path is the
//! remembered one (the round trip is between half and ten times the remembered
//! one, the initial window arrived without congestion). *Unvalidated* then lets
//! half of the remembered window go, paced over a round trip. *Validating* waits
//! until that flight is acknowledged, growing as Startup does. Congestion in
//! either means *safe retreat*: back to half of what was truly delivered, and no
//! further Startup.
//!
//! A seed holds for the first path of a connection and for its first
//! [`RESUME_WITHIN_S`] seconds: later, or after a migration, the path may be another.

use std::time::Duration;

use super::Bbr;
use super::model::{NS_PER_S, mul_div, scale, volume};
use super::sampler::RateSample;
use super::state::State;
use crate::config::RESUME_WITHIN_S;

/// Share of the remembered rate at which a resumed flow counts as arrived: the estimate counts
/// QUIC packets, and a user may have counted their headers.
const REMEMBERED_RATE_REACHED_MILLI: u32 = 950;

/// What is remembered of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResumeSeed {
    /// Bandwidth estimate of the earlier connection, bytes of QUIC packets per second.
    pub bandwidth_bytes_per_s: u64,
    /// Its `min_rtt`.
    pub min_rtt: Duration,
    /// The path carried no more: Startup was over. A flow that gets there again has arrived; with
    /// `false` it goes on looking for more.
    pub is_limit: bool,
    /// Upper bound for the jump, bytes: what the user is willing to risk at once.
    pub jump_bytes_max: u64,
}

/// How far a connection has come with what is remembered of its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
#[non_exhaustive]
pub enum ResumePhase {
    /// Nothing is remembered.
    #[default]
    Off,
    /// It starts as always and looks whether the path is the remembered one.
    Reconnaissance,
    /// Half of the remembered window is on its way.
    Unvalidated,
    /// The first packet of that has arrived, not yet the last.
    Validating,
    /// All of that has arrived.
    Validated,
    /// It did without: the round trip was another, there was congestion before the jump, Startup
    /// was over before data came, our address changed, or the jump would have been none.
    Declined,
    /// There was congestion after the jump: the path carries less than it did.
    Retreated,
}

impl ResumePhase {
    const ALL: [Self; 7] = [
        Self::Off,
        Self::Reconnaissance,
        Self::Unvalidated,
        Self::Validating,
        Self::Validated,
        Self::Declined,
        Self::Retreated,
    ];

    /// The phase with this discriminant; [`Off`](Self::Off) for any other number.
    pub(crate) fn from_index(index: u8) -> Self {
        Self::ALL.get(usize::from(index)).copied().unwrap_or_default()
    }

    /// Whether it is still open what comes of it.
    #[must_use]
    pub fn is_under_way(self) -> bool {
        matches!(self, Self::Reconnaissance | Self::Unvalidated | Self::Validating)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resume {
    /// Nothing remembered, or done with it.
    Off,
    Reconnaissance(ResumeSeed),
    Unvalidated {
        started_ns: u64,
        jump: u64,
        pipe: u64,
    },
    Validating {
        last_sent_ns: u64,
        pipe: u64,
    },
}

impl Resume {
    pub(super) fn new(seed: Option<ResumeSeed>) -> Self {
        seed.map_or(Self::Off, Self::Reconnaissance)
    }
}

impl Bbr {
    fn end_resume(&mut self, outcome: ResumePhase) {
        self.resume = Resume::Off;
        self.probe.set_resume_phase(outcome);
    }
}

impl Bbr {
    /// Once per ACK, after the control parameters were set.
    pub(super) fn resume_on_ack(&mut self, now_ns: u64, rs: &RateSample) {
        self.end_startup_at_remembered_rate();
        match self.resume {
            Resume::Off => {}
            Resume::Reconnaissance(seed) => self.try_jump(now_ns, &seed, rs),
            Resume::Unvalidated { started_ns, jump, pipe } => {
                let pipe = pipe + rs.newly_acked;
                if rs.has_data && rs.sent_ns >= started_ns {
                    // The first packet of the jump has arrived.
                    self.cwnd = self.in_flight().max(self.cwnd.min(jump)).max(self.initial_window);
                    self.resume = Resume::Validating { last_sent_ns: now_ns, pipe };
                    self.probe.set_resume_phase(ResumePhase::Validating);
                } else {
                    self.cwnd = self.cwnd.max(jump);
                    self.resume = Resume::Unvalidated { started_ns, jump, pipe };
                }
            }
            Resume::Validating { last_sent_ns, pipe } => {
                let pipe = pipe + rs.newly_acked;
                if rs.has_data && rs.sent_ns >= last_sent_ns {
                    self.end_resume(ResumePhase::Validated);
                } else {
                    self.resume = Resume::Validating { last_sent_ns, pipe };
                }
            }
        }
    }

    /// A flow that jumped is at the path's rate when it is at the remembered one. Three more
    /// rounds of doubling to see the plateau would overflow the queue; ProbeBW finds what is more.
    fn end_startup_at_remembered_rate(&mut self) {
        let Some(remembered) = self.resume_rate else { return };
        if self.state == State::Startup
            && self.max_bw.max() >= scale(remembered, REMEMBERED_RATE_REACHED_MILLI)
        {
            self.full.reached = true;
            self.full.now = true;
            self.resume_rate = None;
        }
    }

    fn try_jump(&mut self, now_ns: u64, seed: &ResumeSeed, rs: &RateSample) {
        let is_withdrawn = self.probe.resume_phase() != ResumePhase::Reconnaissance;
        // The epoch is when the path began; it reads 1.
        let is_late = now_ns > RESUME_WITHIN_S * NS_PER_S;
        if is_withdrawn || is_late || self.state != State::Startup {
            self.end_resume(ResumePhase::Declined);
            return;
        }
        // Whether data waits now; the samples are of packets of the handshake, all marked.
        let enough = self.sampler.delivered >= self.initial_window;
        if !rs.has_data || !enough || self.probe.is_app_limited(false) {
            return;
        }
        let saved_ns = u64::try_from(seed.min_rtt.as_nanos()).unwrap_or(u64::MAX);
        let rtt_ns = self.min_rtt.min_rtt_ns;
        let jump = (volume(seed.bandwidth_bytes_per_s, saved_ns) / 2).min(seed.jump_bytes_max);
        let is_another_path = rtt_ns < saved_ns / 2 || rtt_ns > saved_ns.saturating_mul(10);
        if is_another_path || jump <= self.cwnd {
            self.end_resume(ResumePhase::Declined);
            return;
        }
        self.cwnd = jump;
        self.resume_rate = seed.is_limit.then_some(seed.bandwidth_bytes_per_s);
        self.pacing_rate = self.pacing_rate.max(mul_div(jump, NS_PER_S, rtt_ns.max(1)));
        self.set_pacing_rate();
        self.resume = Resume::Unvalidated { started_ns: now_ns, jump, pipe: self.in_flight() };
        self.probe.set_resume_phase(ResumePhase::Unvalidated);
    }

    /// Loss or CE. The next ACK takes a flow that has retreated into Drain.
    pub(super) fn resume_on_congestion(&mut self) {
        let pipe = match self.resume {
            Resume::Off => return,
            Resume::Reconnaissance(_) => return self.end_resume(ResumePhase::Declined),
            Resume::Unvalidated { pipe, .. } | Resume::Validating { pipe, .. } => pipe,
        };
        self.end_resume(ResumePhase::Retreated);
        if self.state == State::Startup {
            self.leave_startup_at((pipe / 2).max(self.initial_window));
            self.cwnd = self.cwnd.min(self.inflight_hi);
        }
    }
}
