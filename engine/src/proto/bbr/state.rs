//! The state machine: Startup, Drain, the ProbeBW cycle, ProbeRTT
//! (draft-ietf-ccwg-bbr-06 §5.3).
//!
//! Gains follow from the state alone (§5.6.1), so a transition is an assignment
//! to `state` plus what the draft resets there. Times are nanoseconds since the
//! controller's epoch.

use std::fmt;

use super::Bbr;
use super::model::{scale, volume};
use super::sampler::RateSample;

/// Where a flow is in BBR's state machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
#[repr(u8)]
pub enum State {
    /// Doubling the rate each round to find the bottleneck's bandwidth.
    #[default]
    Startup,
    /// Emptying the queue that Startup made.
    Drain,
    /// Slower than the bottleneck: drains the queue, leaves headroom.
    ProbeBwDown,
    /// At the bottleneck's rate.
    ProbeBwCruise,
    /// One round at full rate, to fill the pipe before probing.
    ProbeBwRefill,
    /// Faster than the bottleneck, to find more bandwidth.
    ProbeBwUp,
    /// Half a BDP in flight, to see the path without its queue.
    ProbeRtt,
}

impl State {
    /// The draft's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Drain => "Drain",
            Self::ProbeBwDown => "ProbeBW_DOWN",
            Self::ProbeBwCruise => "ProbeBW_CRUISE",
            Self::ProbeBwRefill => "ProbeBW_REFILL",
            Self::ProbeBwUp => "ProbeBW_UP",
            Self::ProbeRtt => "ProbeRTT",
        }
    }

    pub(crate) fn from_index(index: u8) -> Self {
        const STATES: [State; 7] = [
            State::Startup,
            State::Drain,
            State::ProbeBwDown,
            State::ProbeBwCruise,
            State::ProbeBwRefill,
            State::ProbeBwUp,
            State::ProbeRtt,
        ];
        STATES[usize::from(index)]
    }

    /// `IsInAProbeBWState`.
    pub(super) const fn is_probe_bw(self) -> bool {
        matches!(
            self,
            Self::ProbeBwDown | Self::ProbeBwCruise | Self::ProbeBwRefill | Self::ProbeBwUp
        )
    }

    /// `IsProbingBW`: loss in these states says nothing about the lower bounds.
    pub(super) const fn is_probing_bw(self) -> bool {
        matches!(self, Self::Startup | Self::ProbeBwRefill | Self::ProbeBwUp)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the ACKs that come in now are feedback to (`BBR.ack_phase`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AckPhase {
    /// Nothing special.
    Init,
    /// Sending at the estimated rate to fill the pipe.
    Refilling,
    /// Probing, no feedback yet.
    ProbeStarting,
    /// Feedback of the probe.
    ProbeFeedback,
    /// Probing is over, its feedback still comes in.
    ProbeStopping,
}

/// Packet-timed round trips (§5.5.1).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rounds {
    pub(super) count: u64,
    /// This ACK began a round.
    pub(super) start: bool,
    pub(super) next_delivered: u64,
}

/// The full-pipe estimator (§5.3.1.2).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct FullPipe {
    /// The pipe has been full once.
    pub(super) reached: bool,
    /// The pipe has been full since the estimator was reset.
    pub(super) now: bool,
    pub(super) bw: u64,
    pub(super) count: u32,
}

/// A ProbeBW cycle (§2.14).
#[derive(Debug, Clone, Copy)]
pub(super) struct Cycle {
    pub(super) ack_phase: AckPhase,
    /// Samples are from a probe that was not yet answered with a reduction.
    pub(super) is_probe_sample: bool,
    pub(super) up_acked: u64,
    pub(super) up_rounds: u32,
    /// Bytes to be acknowledged for each packet that `inflight_hi` grows by.
    pub(super) acked_per_increment: u64,
    pub(super) rounds_since_up: u64,
    pub(super) wait_ns: u64,
    pub(super) stamp_ns: u64,
    pub(super) prev_too_high: bool,
    pub(super) prev_precautionary: bool,
}

impl Cycle {
    pub(super) const fn new() -> Self {
        Self {
            ack_phase: AckPhase::Init,
            is_probe_sample: false,
            up_acked: 0,
            up_rounds: 0,
            acked_per_increment: u64::MAX,
            rounds_since_up: 0,
            wait_ns: 0,
            stamp_ns: 0,
            prev_too_high: false,
            prev_precautionary: false,
        }
    }
}

/// An episode of ProbeRTT.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ProbeRtt {
    /// Earliest end, once in-flight has come down.
    pub(super) done_ns: Option<u64>,
    pub(super) round_done: bool,
}

impl Bbr {
    /// `UpdateRound`.
    pub(super) fn update_round(&mut self, rs: &RateSample) {
        self.rounds.start = rs.has_data && rs.prior_delivered >= self.rounds.next_delivered;
        if self.rounds.start {
            self.start_round();
            self.rounds.count += 1;
            self.cycle.rounds_since_up += 1;
        }
    }

    fn start_round(&mut self) {
        self.rounds.next_delivered = self.sampler.delivered;
    }

    // ---- Startup and Drain -------------------------------------------------

    /// `CheckFullBWReached`.
    pub(super) fn check_full_bw_reached(&mut self, rs: &RateSample) {
        let look = self.state == State::Startup
            || (self.params.up_exits_on_plateau && self.state.is_probe_bw());
        if !look || self.full.now || !self.rounds.start || rs.app_limited || !rs.has_data {
            return;
        }
        let bw = if self.params.up_exits_on_plateau { rs.delivery_rate } else { self.max_bw.max() };
        if bw >= scale(self.full.bw, self.params.full_bw_growth_milli) {
            self.reset_full_bw(bw);
            return;
        }
        self.full.count += 1;
        self.full.now = self.full.count >= self.params.full_bw_rounds;
        self.full.reached |= self.full.now;
    }

    pub(super) fn reset_full_bw(&mut self, baseline: u64) {
        self.full = FullPipe { reached: self.full.reached, now: false, bw: baseline, count: 0 };
    }

    /// `CheckStartupDone`. The loss exit looks at no app-limited flag: loss is
    /// loss, whoever limited the rate.
    pub(super) fn check_startup_done(&mut self, now_ns: u64) {
        if self.state != State::Startup {
            return;
        }
        if !self.full.reached && self.congestion.startup_loss_too_high {
            self.undo.state = Some(State::Startup);
            self.congestion.startup_answered_ns = now_ns;
            self.leave_startup_at(self.bdp().max(self.congestion.inflight_latest));
        } else if !self.full.reached && self.congestion.ecn.is_startup_done(&self.params) {
            self.leave_startup_at(self.bdp());
        }
        if self.full.reached {
            self.state = State::Drain;
            self.drain_start_round = self.rounds.count;
        }
    }

    /// Declares the pipe full because of congestion at `inflight` bytes.
    pub(super) fn leave_startup_at(&mut self, inflight: u64) {
        self.full.reached = true;
        self.full.now = true;
        self.inflight_hi = inflight.max(self.min_pipe_cwnd());
    }

    /// `EnterStartup`.
    pub(super) fn enter_startup(&mut self) {
        self.state = State::Startup;
    }

    /// `CheckDrainDone`.
    pub(super) fn check_drain_done(&mut self, now_ns: u64) {
        if self.state != State::Drain {
            return;
        }
        let overdue = self
            .params
            .drain_rounds_max
            .is_some_and(|max| self.rounds.count > self.drain_start_round + max);
        if overdue || self.in_flight() <= self.inflight_for(self.bw, 1000) {
            self.start_probe_down(now_ns);
        }
    }

    // ---- ProbeBW -----------------------------------------------------------

    /// `UpdateProbeBWCyclePhase`.
    pub(super) fn update_probe_bw(&mut self, now_ns: u64, rs: &RateSample) {
        if !self.full.reached || self.adapt_long_term_model(now_ns, rs) {
            return;
        }
        match self.state {
            State::ProbeBwDown => {
                if !self.start_refill_if_time(now_ns) && self.is_time_to_cruise() {
                    self.state = State::ProbeBwCruise;
                }
            }
            State::ProbeBwCruise => {
                self.start_refill_if_time(now_ns);
            }
            State::ProbeBwRefill => {
                if self.rounds.start {
                    self.cycle.is_probe_sample = true;
                    self.start_probe_up(now_ns, rs);
                }
            }
            State::ProbeBwUp => {
                if self.is_time_to_go_down(now_ns, rs) {
                    self.cycle.prev_too_high = false;
                    self.start_probe_down(now_ns);
                }
            }
            State::Startup | State::Drain | State::ProbeRtt => {}
        }
    }

    /// `StartProbeBW_DOWN`.
    pub(super) fn start_probe_down(&mut self, now_ns: u64) {
        self.reset_congestion_signals();
        self.cycle.acked_per_increment = u64::MAX;
        self.pick_probe_wait();
        self.cycle.stamp_ns = now_ns;
        self.cycle.ack_phase = AckPhase::ProbeStopping;
        self.start_round();
        self.state = State::ProbeBwDown;
    }

    fn pick_probe_wait(&mut self) {
        let ns = |d: std::time::Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        self.cycle.rounds_since_up = self.rng.below(2);
        self.cycle.wait_ns =
            ns(self.params.probe_wait_base) + self.rng.below(ns(self.params.probe_wait_random));
    }

    /// `StartProbeBW_REFILL`.
    pub(super) fn start_probe_refill(&mut self) {
        self.reset_short_term_model();
        self.cycle.up_rounds = 0;
        self.cycle.up_acked = 0;
        self.cycle.prev_precautionary = false;
        self.cycle.ack_phase = AckPhase::Refilling;
        self.start_round();
        self.state = State::ProbeBwRefill;
    }

    fn start_probe_up(&mut self, now_ns: u64, rs: &RateSample) {
        self.cycle.ack_phase = AckPhase::ProbeStarting;
        self.start_round();
        self.reset_full_bw(rs.delivery_rate);
        if !self.params.up_exits_on_plateau {
            self.cycle.stamp_ns = now_ns;
        }
        self.state = State::ProbeBwUp;
        self.raise_inflight_hi_slope();
    }

    /// `IsTimeToProbeBW`, not before the feedback of the last probe is in: the
    /// bandwidth filter advances at its end, and on a path whose round trip is
    /// longer than the wait, or whose BDP is a packet, it would never advance.
    fn start_refill_if_time(&mut self, now_ns: u64) -> bool {
        if self.cycle.ack_phase == AckPhase::ProbeStopping {
            return false;
        }
        let waited = now_ns > self.cycle.stamp_ns.saturating_add(self.cycle.wait_ns);
        if waited || self.is_reno_coexistence_time() {
            self.start_probe_refill();
            return true;
        }
        false
    }

    /// `IsRenoCoexistenceProbeTime`: a Reno flow with this window needs one round
    /// per *packet* of it between two losses.
    fn is_reno_coexistence_time(&self) -> bool {
        let reno_rounds = self.target_inflight() / self.smss;
        self.cycle.rounds_since_up >= reno_rounds.min(self.params.probe_wait_rounds_max)
    }

    /// `TargetInflight`, bytes.
    pub(super) fn target_inflight(&self) -> u64 {
        self.bdp().min(self.cwnd)
    }

    /// `IsTimeToCruise`.
    fn is_time_to_cruise(&self) -> bool {
        let in_flight = self.in_flight();
        in_flight <= self.inflight_with_headroom()
            && in_flight <= self.inflight_for(self.max_bw.max(), 1000)
    }

    /// `IsTimeToGoDown`. In-flight is taken before the ACK: after it, the window
    /// looks unused by what the ACK has just freed.
    fn is_time_to_go_down(&mut self, now_ns: u64, rs: &RateSample) -> bool {
        let in_flight = self.batch.prior_in_flight;
        if self.params.precautionary_probing
            && self.cycle.prev_too_high
            && in_flight >= self.inflight_hi
        {
            self.cycle.prev_precautionary = true;
            return true;
        }
        if self.params.up_exits_on_plateau {
            if self.is_cwnd_limited() && self.cwnd >= self.inflight_hi {
                // inflight_hi holds the rate down: the plateau is ours, not the path's.
                self.reset_full_bw(rs.delivery_rate);
                return false;
            }
            return self.full.now;
        }
        if self.is_cwnd_limited() && self.cwnd >= self.inflight_hi {
            // As in v3: the bound, not the path, is what this probe meets. Flows that share a
            // standing queue all have 1.25 BDP in flight before they probe; were that the end of
            // it, no bound would ever move and the first flow would keep the most.
            return false;
        }
        let elapsed = now_ns > self.cycle.stamp_ns.saturating_add(self.min_rtt.min_rtt_ns);
        let target = self.inflight_for(self.max_bw.max(), self.params.probe_up_pacing_gain_milli);
        // On a tiny path the target is the window itself, which in-flight touches but never
        // passes: within a packet. Elsewhere it passes when a queue has grown. A link that has
        // become faster has 1.25 BDP in flight without one: were the packet, or what this ACK
        // freed, to count there too, each probe would end before the first sample of its rate.
        let reached = if self.is_cwnd_limited() { in_flight + self.smss } else { self.in_flight() };
        elapsed && reached > target
    }

    /// `InflightWithHeadroom`.
    pub(super) fn inflight_with_headroom(&self) -> u64 {
        if self.inflight_hi == u64::MAX {
            return u64::MAX;
        }
        let headroom = scale(self.inflight_hi, self.params.headroom_milli).max(self.smss);
        self.inflight_hi.saturating_sub(headroom).max(self.min_pipe_cwnd())
    }

    /// `RaiseInflightLongtermSlope`.
    fn raise_inflight_hi_slope(&mut self) {
        let growth_packets = 1u64 << self.cycle.up_rounds;
        self.cycle.up_rounds = (self.cycle.up_rounds + 1).min(30);
        self.cycle.acked_per_increment = (self.cwnd / growth_packets).max(self.smss);
    }

    /// `ProbeInflightLongtermUpward`.
    fn probe_inflight_hi_upward(&mut self, rs: &RateSample) {
        if !self.is_cwnd_limited() || self.cwnd < self.inflight_hi {
            return;
        }
        self.cycle.up_acked += rs.newly_acked;
        if self.cycle.up_acked >= self.cycle.acked_per_increment {
            let packets = self.cycle.up_acked / self.cycle.acked_per_increment;
            self.cycle.up_acked -= packets * self.cycle.acked_per_increment;
            self.inflight_hi += packets * self.smss;
        }
        if self.rounds.start {
            self.raise_inflight_hi_slope();
        }
    }

    /// `AdaptLongTermModel`; whether it decided a transition.
    fn adapt_long_term_model(&mut self, now_ns: u64, rs: &RateSample) -> bool {
        if self.rounds.start {
            if self.cycle.ack_phase == AckPhase::ProbeStarting {
                self.cycle.ack_phase = AckPhase::ProbeFeedback;
            } else if self.cycle.ack_phase == AckPhase::ProbeStopping
                && self.finish_probe_feedback(rs)
            {
                return true;
            }
        }
        if !rs.has_data {
            return false;
        }
        if self.is_inflight_too_high(rs.lost, rs.tx_in_flight) {
            if self.params.too_high_on_ack && self.cycle.is_probe_sample {
                let was_up = self.state == State::ProbeBwUp;
                self.handle_inflight_too_high(now_ns, rs.tx_in_flight, rs.app_limited);
                return was_up;
            }
            return false;
        }
        if self.inflight_hi != u64::MAX {
            self.inflight_hi = self.inflight_hi.max(rs.tx_in_flight);
            if self.state == State::ProbeBwUp {
                self.probe_inflight_hi_upward(rs);
            }
        }
        false
    }

    /// The last round of a probe's feedback is over: the one place where the
    /// bandwidth filter advances, hence once per cycle.
    fn finish_probe_feedback(&mut self, rs: &RateSample) -> bool {
        self.cycle.is_probe_sample = false;
        self.cycle.ack_phase = AckPhase::Init;
        if !self.state.is_probe_bw() {
            return false;
        }
        if !rs.app_limited {
            self.max_bw.advance();
        }
        if self.cycle.prev_precautionary && !self.cycle.prev_too_high {
            self.start_probe_refill();
            return true;
        }
        false
    }

    // ---- ProbeRTT ----------------------------------------------------------

    /// `CheckProbeRTT`.
    pub(super) fn check_probe_rtt(&mut self, now_ns: u64, rs: &RateSample) {
        // Startup that data drives has not filled the pipe: there is no queue to look behind,
        // and on a path of 600 ms the look costs a second of doubling. It ends soon by itself.
        let is_growing = self.state == State::Startup && !rs.app_limited;
        if self.state != State::ProbeRtt
            && self.min_rtt.probe_expired
            && !self.idle_restart
            && !is_growing
        {
            self.save_cwnd();
            self.state = State::ProbeRtt;
            self.probe_rtt = ProbeRtt::default();
            self.cycle.ack_phase = AckPhase::ProbeStopping;
            self.start_round();
        }
        if self.state == State::ProbeRtt {
            self.handle_probe_rtt(now_ns);
        }
        if rs.delivered > 0 {
            self.idle_restart = false;
        }
    }

    fn handle_probe_rtt(&mut self, now_ns: u64) {
        // Low rates are of our own making here.
        self.sampler.mark_app_limited();
        if self.probe_rtt.done_ns.is_none() {
            if self.in_flight() <= self.probe_rtt_cwnd() {
                let duration = self.params.probe_rtt_duration.as_nanos();
                let duration = u64::try_from(duration).unwrap_or(u64::MAX);
                self.probe_rtt =
                    ProbeRtt { done_ns: Some(now_ns.saturating_add(duration)), round_done: false };
                self.start_round();
            }
            return;
        }
        self.probe_rtt.round_done |= self.rounds.start;
        if self.probe_rtt.round_done {
            self.check_probe_rtt_done(now_ns);
        }
    }

    /// `CheckProbeRTTDone`; also asked when the flow restarts from idle.
    pub(super) fn check_probe_rtt_done(&mut self, now_ns: u64) {
        if self.probe_rtt.done_ns.is_none_or(|done| now_ns <= done) {
            return;
        }
        self.min_rtt.probe_stamp_ns = now_ns;
        self.restore_cwnd();
        self.reset_short_term_model();
        if self.full.reached {
            self.start_probe_down(now_ns);
            // In-flight is below the BDP already: nothing to drain.
            self.state = State::ProbeBwCruise;
        } else {
            self.enter_startup();
        }
    }

    /// The estimated bandwidth-delay product, bytes.
    pub(super) fn bdp(&self) -> u64 {
        if self.min_rtt.min_rtt_ns == u64::MAX {
            return self.initial_window;
        }
        volume(self.bw, self.min_rtt.min_rtt_ns)
    }
}
