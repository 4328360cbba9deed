//! The constants of BBRv2 and BBRv3.
//!
//! One implementation runs both: everything in which the two drafts differ is a
//! field here. BBRv2 is draft-cardwell-iccrg-bbr-congestion-control-02 (its
//! names for the bounds are `inflight_hi`, `inflight_lo`, `bw_lo`), BBRv3 is
//! draft-ietf-ccwg-bbr-06 (`inflight_longterm`, `inflight_shortterm`,
//! `bw_shortterm`). Gains and fractions are integers in thousandths.

use std::time::Duration;

/// A full set of BBR constants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Params {
    /// Name used in configurations, logs and outputs: `"bbr2"` or `"bbr3"`.
    pub name: &'static str,
    /// `StartupPacingGain`: lets the rate double each round (4 ln 2).
    pub startup_pacing_gain_milli: u32,
    /// `DrainPacingGain`.
    pub drain_pacing_gain_milli: u32,
    /// Rounds after which Drain ends even if the queue is not empty, if bounded.
    pub drain_rounds_max: Option<u64>,
    /// `BBRStartupFullLossCnt`: discontiguous losses in a round that end Startup.
    pub startup_full_loss_count: u32,
    /// Pacing gain of ProbeBW_DOWN.
    pub probe_down_pacing_gain_milli: u32,
    /// Pacing gain of ProbeBW_UP.
    pub probe_up_pacing_gain_milli: u32,
    /// `DefaultCwndGain`.
    pub cwnd_gain_milli: u32,
    /// Congestion window gain of ProbeBW_UP.
    pub probe_up_cwnd_gain_milli: u32,
    /// `ProbeRTTCwndGain`.
    pub probe_rtt_cwnd_gain_milli: u32,
    /// `LossThresh`: tolerated loss per round while probing.
    pub loss_thresh_milli: u32,
    /// `Beta`: the most that a round with loss takes from the lower bounds.
    pub beta_milli: u32,
    /// `Headroom`: the fraction of `inflight_hi` that is left *free* while cruising.
    pub headroom_milli: u32,
    /// `PacingMarginPercent`.
    pub pacing_margin_percent: u32,
    /// `MinPipeCwnd`, in packets.
    pub min_pipe_cwnd_packets: u64,
    /// Growth below which a round counts towards the plateau.
    pub full_bw_growth_milli: u32,
    /// Rounds of plateau that mean a full pipe.
    pub full_bw_rounds: u32,
    /// `MinRTTFilterLen`.
    pub min_rtt_filter: Duration,
    /// `ProbeRTTInterval`.
    pub probe_rtt_interval: Duration,
    /// `ProbeRTTDuration`.
    pub probe_rtt_duration: Duration,
    /// Shortest wall-clock wait between two bandwidth probes; up to
    /// [`probe_wait_random`](Self::probe_wait_random) is added.
    pub probe_wait_base: Duration,
    /// Width of the random part of the wait.
    pub probe_wait_random: Duration,
    /// Most rounds between two probes, for coexistence with Reno (in rounds,
    /// compared with the inflight target in *packets*).
    pub probe_wait_rounds_max: u64,
    /// `ExtraAckedFilterLen`, in rounds.
    pub extra_acked_rounds: u64,
    /// The same while the pipe was never full.
    pub extra_acked_rounds_startup: u64,
    /// Precautionary probing after a probe that went too high (v3 §5.3.3.6).
    pub precautionary_probing: bool,
    /// ProbeBW_UP ends on a bandwidth plateau (v3) instead of on an inflight of
    /// 1.25 BDP after one `min_rtt` (v2).
    pub up_exits_on_plateau: bool,
    /// ACK samples, not only lost packets, may lower `inflight_hi` (v2).
    pub too_high_on_ack: bool,
    /// Weight of a round's CE fraction in `ecn_alpha` (Linux `ecn_alpha_gain`).
    pub ecn_alpha_gain_milli: u32,
    /// `inflight_lo` is cut by this times `ecn_alpha` (Linux `ecn_factor`).
    pub ecn_factor_milli: u32,
    /// CE fraction of a round that means "inflight too high" (Linux `ecn_thresh`).
    pub ecn_thresh_milli: u32,
    /// Rounds above the threshold that end Startup (Linux `full_ecn_cnt`).
    pub ecn_startup_rounds: u32,
    /// Largest `min_rtt` with a proportional response to CE; above it a mark
    /// counts as a lost packet's congestion signal (v3 §3.7; Linux `bbr_ecn_max_rtt_us`). `None`: no limit.
    pub ecn_rtt_max: Option<Duration>,
}

impl Params {
    /// BBRv2: draft-cardwell-iccrg-bbr-congestion-control-02.
    pub const BBR2: Self = Self {
        name: "bbr2",
        startup_pacing_gain_milli: 2770,
        drain_pacing_gain_milli: 500,
        drain_rounds_max: None,
        startup_full_loss_count: 3,
        probe_down_pacing_gain_milli: 900,
        probe_up_pacing_gain_milli: 1250,
        cwnd_gain_milli: 2000,
        probe_up_cwnd_gain_milli: 2000,
        probe_rtt_cwnd_gain_milli: 500,
        loss_thresh_milli: 20,
        beta_milli: 700,
        headroom_milli: 150,
        pacing_margin_percent: 1,
        min_pipe_cwnd_packets: 4,
        full_bw_growth_milli: 1250,
        full_bw_rounds: 3,
        min_rtt_filter: Duration::from_secs(10),
        probe_rtt_interval: Duration::from_secs(5),
        probe_rtt_duration: Duration::from_millis(200),
        probe_wait_base: Duration::from_secs(2),
        probe_wait_random: Duration::from_secs(1),
        probe_wait_rounds_max: 63,
        extra_acked_rounds: 10,
        extra_acked_rounds_startup: 10,
        precautionary_probing: false,
        up_exits_on_plateau: false,
        too_high_on_ack: true,
        ecn_alpha_gain_milli: 62,
        ecn_factor_milli: 333,
        ecn_thresh_milli: 500,
        ecn_startup_rounds: 2,
        ecn_rtt_max: Some(Duration::from_millis(5)),
    };

    /// BBRv3: draft-ietf-ccwg-bbr-06; ECN as in Linux.
    pub const BBR3: Self = Self {
        name: "bbr3",
        drain_rounds_max: Some(3),
        startup_full_loss_count: 6,
        probe_up_cwnd_gain_milli: 2250,
        extra_acked_rounds_startup: 1,
        precautionary_probing: true,
        up_exits_on_plateau: true,
        too_high_on_ack: false,
        ..Self::BBR2
    };
}

impl Default for Params {
    /// [`Params::BBR2`].
    fn default() -> Self {
        Self::BBR2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sets_differ_only_where_the_drafts_do() {
        let (v2, v3) = (Params::BBR2, Params::BBR3);
        assert_eq!(Params::default(), v2);
        assert_eq!((v2.startup_full_loss_count, v3.startup_full_loss_count), (3, 6));
        assert_eq!((v2.probe_up_cwnd_gain_milli, v3.probe_up_cwnd_gain_milli), (2000, 2250));
        assert_eq!((v2.drain_rounds_max, v3.drain_rounds_max), (None, Some(3)));
        assert_eq!(v2.headroom_milli, 150, "trap 8: what is left free, not what is used");
        assert_eq!((v2.beta_milli, v2.loss_thresh_milli), (v3.beta_milli, v3.loss_thresh_milli));
    }
}
