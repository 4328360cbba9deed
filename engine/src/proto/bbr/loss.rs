//! The response to congestion: lost packets, CE marks, persistent congestion, and
//! the undoing of it (draft-ietf-ccwg-bbr-06 §5.5.10 and §5.5.11).
//!
//! While probing, loss above 2 % bounds `inflight_hi` and ends the probe; at all
//! other times a round with loss lowers `bw_lo` and `inflight_lo`. quinn-proto
//! reports loss after the ACK that revealed it, so what is learnt here meets the
//! model on the next ACK; a probe that went too high ends at once.
//!
//! ECN: the interface says only that an ACK reported new CE marks, not how many.
//! Every byte of such an ACK counts as marked: exact when each packet is
//! acknowledged, an overestimate, never an underestimate, with stretched ACKs.

use super::Bbr;
use super::model::{mul_div, scale};
use super::params::Params;
use super::sampler::{LostPacket, RateSample};
use super::state::State;

/// `ecn_alpha` of a path whose every packet is marked.
const ALPHA_ONE: u64 = 1_000_000;

/// Congestion signals of the present round (§2.10).
#[derive(Debug, Clone, Copy)]
pub(super) struct Congestion {
    pub(super) loss_in_round: bool,
    pub(super) loss_round_start: bool,
    loss_round_delivered: u64,
    pub(super) bw_latest: u64,
    pub(super) inflight_latest: u64,
    lost_in_round: u64,
    /// Discontiguous ranges of packet numbers lost in this round, however many
    /// loss detections they came in.
    lost_ranges_in_round: u32,
    last_lost: Option<u64>,
    delivered_at_first_loss: u64,
    max_bw_at_first_loss: u64,
    /// The loss round that has just ended had too much loss for Startup.
    pub(super) startup_loss_too_high: bool,
    /// Since when the path has been in persistent congestion (RFC 9002 §7.6).
    pub(super) recovery_start_ns: Option<u64>,
    /// When loss ended Startup. What was sent until then and is found lost later is part of what
    /// has been answered, as in a recovery period (RFC 9002 §7.3.2): Startup overshoots for a
    /// round trip, and the rate meanwhile is Drain's, half of the path's.
    pub(super) startup_answered_ns: u64,
    pub(super) ecn: Ecn,
}

/// The proportional response to CE marks, as Linux has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ecn {
    in_round: bool,
    /// Moving average of the marked fraction, of [`ALPHA_ONE`].
    alpha: u64,
    marked_in_round: u64,
    delivered_at_round_start: u64,
    rounds_above_thresh: u32,
}

/// What is restored when a loss episode turns out to be spurious (§2.15).
#[derive(Debug, Clone, Copy)]
pub(super) struct Undo {
    /// The state that loss made the flow leave.
    pub(super) state: Option<State>,
    bw_lo: u64,
    inflight_lo: u64,
    inflight_hi: u64,
}

impl Congestion {
    pub(super) const fn new() -> Self {
        Self {
            loss_in_round: false,
            loss_round_start: false,
            loss_round_delivered: 0,
            bw_latest: 0,
            inflight_latest: 0,
            lost_in_round: 0,
            lost_ranges_in_round: 0,
            last_lost: None,
            delivered_at_first_loss: 0,
            max_bw_at_first_loss: 0,
            startup_loss_too_high: false,
            recovery_start_ns: None,
            startup_answered_ns: 0,
            ecn: Ecn {
                in_round: false,
                alpha: ALPHA_ONE,
                marked_in_round: 0,
                delivered_at_round_start: 0,
                rounds_above_thresh: 0,
            },
        }
    }
}

impl Ecn {
    /// Startup ends after enough rounds in which most packets were marked.
    pub(super) fn is_startup_done(&self, params: &Params) -> bool {
        self.rounds_above_thresh >= params.ecn_startup_rounds
    }
}

impl Undo {
    pub(super) const fn new() -> Self {
        Self { state: None, bw_lo: 0, inflight_lo: 0, inflight_hi: 0 }
    }
}

impl Bbr {
    // ---- Once per ACK ------------------------------------------------------

    /// `UpdateLatestDeliverySignals`.
    pub(super) fn update_latest_delivery_signals(&mut self, rs: &RateSample) {
        let delivered = self.sampler.delivered;
        let c = &mut self.congestion;
        c.loss_round_start = false;
        c.startup_loss_too_high = false;
        if !rs.has_data {
            return;
        }
        c.bw_latest = c.bw_latest.max(rs.delivery_rate);
        c.inflight_latest = c.inflight_latest.max(rs.delivered);
        if rs.prior_delivered >= c.loss_round_delivered {
            c.loss_round_delivered = delivered;
            c.loss_round_start = true;
        }
    }

    /// `AdvanceLatestDeliverySignals`.
    pub(super) fn advance_latest_delivery_signals(&mut self, rs: &RateSample) {
        if self.congestion.loss_round_start {
            self.congestion.bw_latest = rs.delivery_rate;
            self.congestion.inflight_latest = rs.delivered;
        }
    }

    /// `UpdateCongestionSignals`, after `UpdateMaxBw`.
    pub(super) fn update_congestion_signals(&mut self, now_ns: u64) {
        if self.rounds.start {
            self.finish_ecn_round(now_ns);
        }
        if !self.congestion.loss_round_start {
            return;
        }
        self.congestion.startup_loss_too_high = self.is_startup_loss_too_high();
        // In ProbeRTT the rate is of our own making: a bound learnt from it would shrink the
        // window of ProbeRTT itself, which follows `bw`, and is forgotten at its end anyway.
        if !self.state.is_probing_bw() && self.state != State::ProbeRtt {
            self.adapt_lower_bounds();
        }
        self.congestion.loss_in_round = false;
        self.congestion.ecn.in_round = false;
    }

    /// The last round lost more than the threshold, in enough separate places.
    ///
    /// And the estimate did not grow meanwhile, which the drafts do not ask for: a full pipe was
    /// full for most of a round trip before its first loss is seen and delivers little more
    /// after. Small rounds at 1 % of random loss have 2 % and three losses every now and then (seen: one flow
    /// in eight), and a flow that leaves Startup at a fraction of the path's
    /// rate needs minutes for the rest.
    fn is_startup_loss_too_high(&self) -> bool {
        let c = &self.congestion;
        let delivered = self.sampler.delivered - c.delivered_at_first_loss;
        c.loss_in_round
            && c.lost_ranges_in_round >= self.params.startup_full_loss_count
            && self.max_bw.max() < scale(c.max_bw_at_first_loss, self.params.full_bw_growth_milli)
            && c.lost_in_round > scale(c.lost_in_round + delivered, self.params.loss_thresh_milli)
    }

    /// `AdaptLowerBoundsFromCongestion`, `InitLowerBounds` and `LossLowerBounds`.
    fn adapt_lower_bounds(&mut self) {
        let mut ecn_inflight_lo = u64::MAX;
        if self.congestion.ecn.in_round {
            self.init_inflight_lo();
            let alpha = self.congestion.ecn.alpha;
            let cut = mul_div(alpha, u64::from(self.params.ecn_factor_milli), 1000);
            ecn_inflight_lo = mul_div(self.inflight_lo, ALPHA_ONE - cut, ALPHA_ONE);
        }
        if self.congestion.loss_in_round {
            self.init_inflight_lo();
            if self.bw_lo == u64::MAX {
                self.bw_lo = self.max_bw.max();
            }
            // A round with x % loss takes x % (§5.3.3.8.3). The rate was measured
            // while pacing at 1 % below `bw`: without giving the margin back, each
            // round would take one percent more, of a path that delivered all it got.
            let offered = u64::from(100 - self.params.pacing_margin_percent);
            let bw_latest = mul_div(self.congestion.bw_latest, 100, offered);
            let beta = self.params.beta_milli;
            self.bw_lo = bw_latest.max(scale(self.bw_lo, beta));
            self.inflight_lo = self.congestion.inflight_latest.max(scale(self.inflight_lo, beta));
        }
        self.inflight_lo = self.inflight_lo.min(ecn_inflight_lo);
    }

    fn init_inflight_lo(&mut self) {
        if self.inflight_lo == u64::MAX {
            self.inflight_lo = self.cwnd;
        }
    }

    /// `ResetCongestionSignals`.
    pub(super) fn reset_congestion_signals(&mut self) {
        self.congestion.loss_in_round = false;
        self.congestion.ecn.in_round = false;
        self.congestion.bw_latest = 0;
        self.congestion.inflight_latest = 0;
    }

    /// `ResetShortTermModel`.
    pub(super) fn reset_short_term_model(&mut self) {
        self.bw_lo = u64::MAX;
        self.inflight_lo = u64::MAX;
    }

    // ---- Loss --------------------------------------------------------------

    /// One loss detection: `bytes` lost among the packets sent until `sent_ns`.
    pub(super) fn handle_loss(&mut self, now_ns: u64, sent_ns: u64, bytes: u64, persistent: bool) {
        if sent_ns > self.congestion.startup_answered_ns {
            self.note_congestion();
            self.congestion.loss_in_round = true;
            self.congestion.lost_in_round += bytes;
        }
        let mut scan = self.sampler.start_loss(sent_ns, bytes);
        while let Some(packet) = self.sampler.next_lost(&mut scan) {
            self.handle_lost_packet(now_ns, &packet);
        }
        if persistent {
            self.enter_persistent_congestion(now_ns);
        }
        self.resume_on_congestion();
        self.set_pacing_rate();
        self.bound_cwnd();
    }

    /// `NoteLoss`, for loss and for CE marks.
    fn note_congestion(&mut self) {
        if self.congestion.loss_in_round || self.congestion.ecn.in_round {
            return;
        }
        let c = &mut self.congestion;
        c.loss_round_delivered = self.sampler.delivered;
        c.delivered_at_first_loss = self.sampler.delivered;
        c.max_bw_at_first_loss = self.max_bw.max();
        c.lost_in_round = 0;
        c.lost_ranges_in_round = 0;
        c.last_lost = None;
        self.save_state_upon_loss();
    }

    /// `HandleLostPacket`.
    fn handle_lost_packet(&mut self, now_ns: u64, packet: &LostPacket) {
        let c = &mut self.congestion;
        if c.last_lost.is_none_or(|last| packet.packet_number != last + 1) {
            c.lost_ranges_in_round += 1;
        }
        c.last_lost = Some(packet.packet_number);
        if self.cycle.is_probe_sample && self.is_inflight_too_high(packet.lost, packet.tx_in_flight)
        {
            let inflight = self.inflight_at_loss(packet);
            self.handle_inflight_too_high(now_ns, inflight, packet.app_limited);
        }
    }

    /// `IsInflightTooHigh`, by loss.
    pub(super) fn is_inflight_too_high(&self, lost: u64, tx_in_flight: u64) -> bool {
        lost > scale(tx_in_flight, self.params.loss_thresh_milli)
    }

    /// `InflightAtLoss`: the in-flight at which the losses crossed the threshold,
    /// somewhere within this packet.
    fn inflight_at_loss(&self, packet: &LostPacket) -> u64 {
        let inflight_prev = packet.tx_in_flight.saturating_sub(packet.bytes);
        let lost_prev = packet.lost.saturating_sub(packet.bytes);
        let thresh = self.params.loss_thresh_milli;
        let spare = scale(inflight_prev, thresh).saturating_sub(lost_prev);
        inflight_prev + mul_div(spare, 1000, u64::from(1000 - thresh))
    }

    /// `HandleInflightTooHigh`.
    pub(super) fn handle_inflight_too_high(&mut self, now_ns: u64, inflight: u64, limited: bool) {
        self.cycle.prev_too_high = true;
        self.cycle.is_probe_sample = false;
        if !limited {
            let floor = scale(self.target_inflight(), self.params.beta_milli);
            self.inflight_hi = inflight.max(floor);
        }
        if self.state == State::ProbeBwUp {
            self.undo.state = Some(State::ProbeBwUp);
            self.start_probe_down(now_ns);
        }
    }

    /// Everything sent over several probe timeouts was lost: as after a
    /// retransmission timeout, start again from one packet beyond what is in
    /// flight; the window returns when a packet sent from now on arrives.
    fn enter_persistent_congestion(&mut self, now_ns: u64) {
        self.save_cwnd();
        self.congestion.recovery_start_ns = Some(now_ns);
        self.cwnd = (self.in_flight() + self.smss).max(self.min_pipe_cwnd()).min(self.cwnd);
    }

    /// Ends the recovery from persistent congestion.
    pub(super) fn leave_recovery(&mut self, rs: &RateSample) {
        if let Some(start_ns) = self.congestion.recovery_start_ns
            && rs.has_data
            && rs.sent_ns > start_ns
        {
            self.congestion.recovery_start_ns = None;
            self.restore_cwnd();
        }
    }

    // ---- ECN ---------------------------------------------------------------

    /// The last ACK reported new CE marks.
    pub(super) fn handle_ecn(&mut self, now_ns: u64) {
        self.note_congestion();
        if self.is_ecn_proportional() {
            self.congestion.ecn.in_round = true;
            self.congestion.ecn.marked_in_round += self.last_sample.newly_acked;
        } else {
            // RFC 3168, RFC 8311 §4.1: congestion, as if a packet had been lost.
            self.congestion.loss_in_round = true;
            if self.cycle.is_probe_sample && self.last_sample.has_data {
                let rs = self.last_sample;
                self.handle_inflight_too_high(now_ns, rs.tx_in_flight, rs.app_limited);
            }
        }
        self.resume_on_congestion();
        self.set_pacing_rate();
        self.bound_cwnd();
    }

    fn is_ecn_proportional(&self) -> bool {
        self.params
            .ecn_rtt_max
            .is_none_or(|max| u128::from(self.min_rtt.min_rtt_ns) <= max.as_nanos())
    }

    /// `bbr_update_ecn_alpha` of Linux: once per round.
    fn finish_ecn_round(&mut self, now_ns: u64) {
        let ecn = &mut self.congestion.ecn;
        let delivered = self.sampler.delivered - ecn.delivered_at_round_start;
        let marked = std::mem::take(&mut ecn.marked_in_round).min(delivered);
        ecn.delivered_at_round_start = self.sampler.delivered;
        if delivered == 0 {
            return;
        }
        let fraction = mul_div(marked, ALPHA_ONE, delivered);
        let gain = u64::from(self.params.ecn_alpha_gain_milli);
        ecn.alpha = (ecn.alpha * (1000 - gain) + fraction * gain) / 1000;
        if fraction < mul_div(ALPHA_ONE, u64::from(self.params.ecn_thresh_milli), 1000) {
            ecn.rounds_above_thresh = 0;
            return;
        }
        ecn.rounds_above_thresh += 1;
        if self.cycle.is_probe_sample && self.last_sample.has_data {
            let rs = self.last_sample;
            self.handle_inflight_too_high(now_ns, rs.tx_in_flight, rs.app_limited);
        }
    }

    // ---- Undo --------------------------------------------------------------

    /// What `inflight_hi` was when the loss episode began.
    #[cfg(test)]
    pub(super) fn undo_inflight_hi(&self) -> u64 {
        self.undo.inflight_hi
    }

    fn save_state_upon_loss(&mut self) {
        self.save_cwnd();
        self.undo = Undo {
            state: None,
            bw_lo: self.bw_lo,
            inflight_lo: self.inflight_lo,
            inflight_hi: self.inflight_hi,
        };
    }

    /// `HandleSpuriousLossDetection`.
    pub(super) fn handle_spurious_loss(&mut self) {
        self.restore_cwnd();
        self.congestion.loss_in_round = false;
        self.congestion.recovery_start_ns = None;
        self.reset_full_bw(0);
        self.bw_lo = self.bw_lo.max(self.undo.bw_lo);
        self.inflight_lo = self.inflight_lo.max(self.undo.inflight_lo);
        self.inflight_hi = self.inflight_hi.max(self.undo.inflight_hi);
        let left = self.undo.state.take().filter(|&state| state != self.state);
        match left {
            Some(State::Startup) => {
                self.full.reached = false;
                if self.state != State::ProbeRtt {
                    self.enter_startup();
                }
            }
            Some(State::ProbeBwUp) if self.state != State::ProbeRtt => self.start_probe_refill(),
            _ => {}
        }
    }
}
