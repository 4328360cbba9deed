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

use std::time::Duration;

use super::Bbr;
use super::model::{NS_PER_S, mul_div, scale, volume};
use super::sampler::RateSample;
use super::state::State;

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
    /// Upper bound for the jump, bytes: what the user is willing to risk at once.
    pub jump_bytes_max: u64,
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
                } else {
                    self.cwnd = self.cwnd.max(jump);
                    self.resume = Resume::Unvalidated { started_ns, jump, pipe };
                }
            }
            Resume::Validating { last_sent_ns, pipe } => {
                let pipe = pipe + rs.newly_acked;
                let done = rs.has_data && rs.sent_ns >= last_sent_ns;
                self.resume =
                    if done { Resume::Off } else { Resume::Validating { last_sent_ns, pipe } };
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
        if self.state != State::Startup {
            self.resume = Resume::Off;
            return;
        }
        // Whether data waits now; the samples are of packets of the handshake, all marked.
        let enough = self.sampler.delivered >= self.initial_window;
        if !rs.has_data || !enough || self.probe.is_app_limited(false) {
            return;
        }
        self.resume = Resume::Off;
        let saved_ns = u64::try_from(seed.min_rtt.as_nanos()).unwrap_or(u64::MAX);
        let rtt_ns = self.min_rtt.min_rtt_ns;
        if rtt_ns < saved_ns / 2 || rtt_ns > saved_ns.saturating_mul(10) {
            return;
        }
        let jump = (volume(seed.bandwidth_bytes_per_s, saved_ns) / 2).min(seed.jump_bytes_max);
        if jump <= self.cwnd {
            return;
        }
        self.cwnd = jump;
        self.resume_rate = Some(seed.bandwidth_bytes_per_s);
        self.pacing_rate = self.pacing_rate.max(mul_div(jump, NS_PER_S, rtt_ns.max(1)));
        self.set_pacing_rate();
        self.resume = Resume::Unvalidated { started_ns: now_ns, jump, pipe: self.in_flight() };
    }

    /// Loss or CE. The next ACK takes a flow that has retreated into Drain.
    pub(super) fn resume_on_congestion(&mut self) {
        let pipe = match std::mem::replace(&mut self.resume, Resume::Off) {
            Resume::Off | Resume::Reconnaissance(_) => return,
            Resume::Unvalidated { pipe, .. } | Resume::Validating { pipe, .. } => pipe,
        };
        if self.state == State::Startup {
            self.leave_startup_at((pipe / 2).max(self.initial_window));
            self.cwnd = self.cwnd.min(self.inflight_hi);
        }
    }
}
