//! The control parameters: pacing rate, send quantum, congestion window
//! (draft-ietf-ccwg-bbr-06 §5.6), and the aggregation estimate that feeds the
//! window (§5.5.9).
//!
//! Left out on purpose: v2-02's packet conservation in the first round of fast
//! recovery. QUIC has no recovery episode that a controller is told of, and the
//! lower bounds answer a loss within one round trip.

use super::Bbr;
use super::model::{NS_PER_S, WindowedMax, mul_div, scale, volume};
use super::sampler::RateSample;
use super::state::State;

/// `send_quantum` is this long at the pacing rate …
const QUANTUM_NS: u64 = 1_000_000;
/// … and at most this many bytes …
const QUANTUM_BYTES_MAX: u64 = 64 * 1024;
/// … and at least this many packets.
const QUANTUM_PACKETS_MIN: u64 = 2;
/// Round trip assumed for the very first pacing rate.
const INITIAL_RTT_NS: u64 = 1_000_000;

/// The aggregation estimate looks back so long at least: ten rounds of 50 µs forget a
/// receiver that was away for a millisecond before it is away again.
const EXTRA_ACKED_ROUND_NS_MIN: u64 = 1_000_000;

/// Data acknowledged beyond what the bandwidth explains (§2.12).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ExtraAcked {
    filter: WindowedMax,
    pub(super) interval_start_ns: u64,
    delivered: u64,
    /// Rounds that lasted [`EXTRA_ACKED_ROUND_NS_MIN`], or what several lasted together.
    rounds: u64,
    round_start_ns: u64,
}

impl Bbr {
    /// `MinPipeCwnd`, bytes: four packets, and what the path delivers while the receiver may hold
    /// an ACK back. On a path of 1 Gbit/s and 50 µs four packets wait for the receiver's timer: a
    /// ProbeRTT would send at a twentieth of the rate and measure the timer.
    pub(super) fn min_pipe_cwnd(&self) -> u64 {
        let held = volume(self.bw, self.ack_hold.time_ns).min(self.ack_hold.packets * self.smss);
        self.params.min_pipe_cwnd_packets * self.smss + held
    }

    fn pacing_gain_milli(&self) -> u32 {
        match self.state {
            State::Startup => self.params.startup_pacing_gain_milli,
            State::Drain => self.params.drain_pacing_gain_milli,
            State::ProbeBwDown => self.params.probe_down_pacing_gain_milli,
            State::ProbeBwUp => self.params.probe_up_pacing_gain_milli,
            State::ProbeBwCruise | State::ProbeBwRefill | State::ProbeRtt => 1000,
        }
    }

    fn cwnd_gain_milli(&self) -> u32 {
        match self.state {
            State::ProbeBwUp => self.params.probe_up_cwnd_gain_milli,
            State::ProbeRtt => self.params.probe_rtt_cwnd_gain_milli,
            _ => self.params.cwnd_gain_milli,
        }
    }

    /// `UpdateACKAggregation`.
    pub(super) fn update_ack_aggregation(&mut self, now_ns: u64, rs: &RateSample) {
        let extra = &mut self.extra_acked;
        let mut expected = volume(self.bw, now_ns.saturating_sub(extra.interval_start_ns));
        if extra.delivered <= expected {
            extra.delivered = 0;
            extra.interval_start_ns = now_ns;
            expected = 0;
        }
        extra.delivered += rs.newly_acked;
        let sample = (extra.delivered - expected).min(self.cwnd);
        let window = if self.full.reached {
            self.params.extra_acked_rounds
        } else {
            self.params.extra_acked_rounds_startup
        };
        if self.rounds.start
            && now_ns.saturating_sub(extra.round_start_ns) >= EXTRA_ACKED_ROUND_NS_MIN
        {
            extra.rounds += 1;
            extra.round_start_ns = now_ns;
        }
        extra.filter.update(sample, extra.rounds, window);
    }

    /// The aggregation estimate, bytes.
    pub(super) fn extra_acked(&self) -> u64 {
        self.extra_acked.filter.max()
    }

    // ---- Pacing ------------------------------------------------------------

    /// `InitPacingRate`: the initial window over the round trip, times Startup's
    /// gain. Done again at the first round-trip sample, or a flow that the
    /// application limits would keep the rate of a made-up millisecond.
    pub(super) fn init_pacing_rate(&mut self, rtt_ns: Option<u64>) {
        let rtt_ns = rtt_ns.unwrap_or(INITIAL_RTT_NS).max(1);
        let nominal = mul_div(self.initial_window.max(self.cwnd), NS_PER_S, rtt_ns);
        self.pacing_rate = scale(nominal, self.params.startup_pacing_gain_milli).max(self.smss);
        self.set_send_quantum();
    }

    /// `SetPacingRate` with the state's gain.
    pub(super) fn set_pacing_rate(&mut self) {
        self.set_pacing_rate_with_gain(self.pacing_gain_milli());
    }

    /// `SetPacingRateWithGain`. One packet a second is the floor.
    pub(super) fn set_pacing_rate_with_gain(&mut self, gain_milli: u32) {
        if self.bw == 0 {
            return;
        }
        let rate = scale(self.bw, gain_milli);
        let rate = mul_div(rate, u64::from(100 - self.params.pacing_margin_percent), 100);
        if self.full.reached || rate > self.pacing_rate {
            self.pacing_rate = rate.max(self.smss);
        }
        self.set_send_quantum();
    }

    /// `SetSendQuantum`.
    fn set_send_quantum(&mut self) {
        // A burst of all that path and queue were seen to hold would overflow them by itself.
        self.send_quantum = volume(self.pacing_rate, QUANTUM_NS)
            .min(QUANTUM_BYTES_MAX)
            .min(self.inflight_hi / 2)
            .max(QUANTUM_PACKETS_MIN * self.smss);
    }

    // ---- Window ------------------------------------------------------------

    fn bdp_multiple(&self, bw: u64, gain_milli: u32) -> u64 {
        if self.min_rtt.min_rtt_ns == u64::MAX {
            return self.initial_window;
        }
        scale(volume(bw, self.min_rtt.min_rtt_ns), gain_milli)
    }

    /// `QuantizationBudget` with QUIC's offload budget of one quantum.
    fn quantize(&self, inflight: u64) -> u64 {
        let inflight = inflight.max(self.send_quantum).max(self.min_pipe_cwnd());
        if self.state == State::ProbeBwUp { inflight + 2 * self.smss } else { inflight }
    }

    /// `Inflight(bw, gain)`.
    pub(super) fn inflight_for(&self, bw: u64, gain_milli: u32) -> u64 {
        self.quantize(self.bdp_multiple(bw, gain_milli))
    }

    /// `ProbeRTTCwnd`.
    pub(super) fn probe_rtt_cwnd(&self) -> u64 {
        self.bdp_multiple(self.bw, self.params.probe_rtt_cwnd_gain_milli).max(self.min_pipe_cwnd())
    }

    /// `SetCwnd`.
    pub(super) fn set_cwnd(&mut self, rs: &RateSample) {
        let max_inflight =
            self.quantize(self.bdp_multiple(self.bw, self.cwnd_gain_milli()) + self.extra_acked());
        if self.full.reached {
            self.cwnd = (self.cwnd + rs.newly_acked).min(max_inflight);
        } else if self.cwnd < max_inflight || self.sampler.delivered < self.initial_window {
            self.cwnd += rs.newly_acked;
        }
        self.bound_cwnd();
    }

    /// `BoundCwndForProbeRTT` and `BoundCwndForModel`; the floor comes last.
    pub(super) fn bound_cwnd(&mut self) {
        if self.state == State::ProbeRtt {
            self.cwnd = self.cwnd.min(self.probe_rtt_cwnd());
        }
        let cap = match self.state {
            State::ProbeRtt | State::ProbeBwCruise => self.inflight_with_headroom(),
            State::ProbeBwDown | State::ProbeBwRefill | State::ProbeBwUp => self.inflight_hi,
            State::Startup | State::Drain => u64::MAX,
        };
        let cap = cap.min(self.inflight_lo).max(self.min_pipe_cwnd());
        self.cwnd = self.cwnd.min(cap).max(self.min_pipe_cwnd());
    }

    /// `SaveCwnd`: the last window not reduced by recovery or ProbeRTT.
    pub(super) fn save_cwnd(&mut self) {
        let reduced = self.congestion.recovery_start_ns.is_some() || self.state == State::ProbeRtt;
        self.prior_cwnd = if reduced { self.prior_cwnd.max(self.cwnd) } else { self.cwnd };
    }

    /// `RestoreCwnd`.
    pub(super) fn restore_cwnd(&mut self) {
        self.cwnd = self.cwnd.max(self.prior_cwnd);
    }

    // ---- Limits ------------------------------------------------------------

    /// `C.is_cwnd_limited`: the window was full at some time in the last round trip.
    pub(super) fn is_cwnd_limited(&self) -> bool {
        self.limited.this_round || self.limited.last_round
    }

    /// Notes whether the window is full now. Called while sending and before an
    /// ACK is processed: afterwards there is always room.
    pub(super) fn note_cwnd_limited(&mut self) {
        let full = self.in_flight() + self.smss > self.cwnd;
        self.limited.this_round |= full | self.probe.take_cwnd_limited();
    }
}
