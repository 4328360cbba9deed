//! BBR congestion control: versions 2 and 3 in one implementation.
//!
//! [`Bbr`] follows draft-ietf-ccwg-bbr-06 step by step; [`Params`] holds what
//! draft-cardwell-iccrg-bbr-congestion-control-02 (BBRv2) has otherwise. Names
//! are BBRv2's: `inflight_hi`, `inflight_lo` and `bw_lo` are `inflight_longterm`,
//! `inflight_shortterm` and `bw_shortterm` in v3. `bw_hi` does not exist: v2-02
//! never sets it, v3 dropped it.
//!
//! ```text
//!        on_sent ──────────► sampler ──► records of packets in flight
//!        on_ack (each) ────► sampler ──► delivered, newest packet
//!        on_end_acks ──────► RateSample ─► model ─► state ─► control
//!        on_congestion_event ► lost packets / CE ─► loss ──► control
//!                                                  probe ◄── publish
//! ```
//!
//! # What the caller must do
//!
//! - Poll one datagram at a time, each with its own `now`, a nanosecond apart at
//!   least: the send time is how an acknowledgement names its packet.
//! - Enforce the window and the pacing itself: quinn-proto's pacer derives a rate
//!   from window and round trip and would send at 2.5 times the bandwidth. Read
//!   window, rate and send quantum from the [`BbrProbe`].
//! - Tell the probe when the application has nothing to send
//!   ([`BbrProbe::set_app_limited`]): quinn-proto sees no difference between an
//!   application without data and a shard that holds packets back.
//!
//! # What quinn-proto's interface does not allow
//!
//! - *Spurious loss*: a packet that was declared lost is forgotten, its late
//!   acknowledgement is not reported. The undo of v3 §5.5.11 is implemented and
//!   runs when somebody else notices ([`BbrProbe::report_spurious_loss`]).
//! - *Probe timeouts* are not reported; persistent congestion is, and is treated
//!   as a retransmission timeout.
//! - *CE counts*: see the note in `loss.rs`.
//! - *Which packets are in flight*: see the note in `sampler.rs`.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory, ControllerMetrics};

mod control;
mod loss;
mod model;
mod params;
mod probe;
mod resume;
mod sampler;
mod state;

#[cfg(test)]
mod appendix;
#[cfg(test)]
mod scenarios;
#[cfg(test)]
mod testlink;
#[cfg(test)]
mod traps;

pub use params::Params;
pub use probe::{BbrProbe, Snapshot};
pub use resume::{ResumePhase, ResumeSeed};
pub use state::State;

use control::ExtraAcked;
use loss::{Congestion, Undo};
use model::{MaxBwFilter, MinRtt, NS_PER_S, SplitMix};
use probe::Published;
use resume::Resume;
use sampler::{RateSample, Sampler};
use state::{Cycle, FullPipe, ProbeRtt, Rounds};

/// Makes [`Bbr`] controllers.
#[derive(Debug)]
pub struct BbrConfig {
    /// [`Params::BBR2`] or [`Params::BBR3`].
    pub params: Params,
    /// Initial congestion window, bytes. `None`: RFC 9002 §7.2, ten packets but
    /// no more than 14720 bytes (or two packets).
    pub initial_window_bytes: Option<u64>,
    /// Most packets in flight that are sampled one by one; 64 bytes of memory
    /// each. Beyond, packets are sent without a record: the model then lives on
    /// the samples of those that have one. At least 1024.
    pub packets_in_flight_max: usize,
    /// What is remembered of the path, for careful resume (RFC 9959): holds for the first controller
    /// that is made, as quinn-proto makes another when a connection migrates.
    pub resume: Option<ResumeSeed>,
    /// How long the receiver may hold an ACK back.
    pub ack_hold: AckHold,
    /// Seeds the random wait between bandwidth probes: give each shard its own,
    /// from the injected generator. Controllers of one factory differ.
    pub seed: u64,
    built: AtomicU64,
}

impl BbrConfig {
    /// A factory with these constants and the usual limits.
    #[must_use]
    pub fn new(params: Params, seed: u64) -> Self {
        Self {
            params,
            initial_window_bytes: None,
            packets_in_flight_max: 1 << 18,
            resume: None,
            ack_hold: AckHold::default(),
            seed,
            built: AtomicU64::new(0),
        }
    }

    /// A controller as its own type; [`ControllerFactory::build`] boxes it.
    #[must_use]
    pub fn build_bbr(&self, now: Instant, mtu_bytes: u16) -> Bbr {
        // Relaxed: the number only has to differ from one controller to the next.
        let nth = self.built.fetch_add(1, Ordering::Relaxed);
        let resume = self.resume.filter(|_| nth == 0);
        Bbr::new(self, resume, now, mtu_bytes, SplitMix(self.seed).below(u64::MAX) ^ (nth << 1 | 1))
    }
}

/// What the receiver was asked to hold an ACK back for (draft-ietf-quic-ack-frequency §4): a
/// window of less would wait for its timer. The default asks for nothing: `MinPipeCwnd` has room
/// for an ACK of every other packet (RFC 9000 §13.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AckHold {
    /// Packets that it may have received, at most.
    pub packets: u64,
    /// Time that it may wait, at most, nanoseconds.
    pub time_ns: u64,
}

impl Default for BbrConfig {
    /// BBRv2, seed 0.
    fn default() -> Self {
        Self::new(Params::BBR2, 0)
    }
}

impl ControllerFactory for BbrConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(self.build_bbr(now, current_mtu))
    }
}

/// One ACK while its packets come in.
#[derive(Debug, Clone, Copy, Default)]
struct Batch {
    open: bool,
    /// In flight before the ACK, bytes.
    prior_in_flight: u64,
}

/// Whether the window was ever full, by packet-timed round.
#[derive(Debug, Clone, Copy, Default)]
struct Limited {
    this_round: bool,
    last_round: bool,
}

/// A BBR congestion controller. See the [module documentation](self).
#[derive(Debug, Clone)]
pub struct Bbr {
    params: Params,
    initial_window: u64,
    ack_hold: AckHold,
    /// `C.SMSS`: the largest QUIC packet, bytes.
    smss: u64,
    epoch: Instant,
    /// The time converted last: all packets of an ACK come with the same.
    clock: (Instant, u64),
    rng: SplitMix,
    sampler: Sampler,
    probe: BbrProbe,
    // The path model; infinity is `u64::MAX`.
    max_bw: MaxBwFilter,
    bw: u64,
    bw_lo: u64,
    inflight_lo: u64,
    inflight_hi: u64,
    min_rtt: MinRtt,
    extra_acked: ExtraAcked,
    congestion: Congestion,
    undo: Undo,
    last_sample: RateSample,
    // The state machine.
    state: State,
    rounds: Rounds,
    full: FullPipe,
    cycle: Cycle,
    probe_rtt: ProbeRtt,
    drain_start_round: u64,
    idle_restart: bool,
    resume: Resume,
    /// The remembered bandwidth that a jump aimed at, bytes/s, until it is reached.
    resume_rate: Option<u64>,
    batch: Batch,
    limited: Limited,
    // The control parameters.
    cwnd: u64,
    prior_cwnd: u64,
    pacing_rate: u64,
    send_quantum: u64,
}

impl Bbr {
    fn new(
        config: &BbrConfig,
        resume: Option<ResumeSeed>,
        now: Instant,
        mtu_bytes: u16,
        seed: u64,
    ) -> Self {
        let smss = u64::from(mtu_bytes).max(1);
        let initial_window = config
            .initial_window_bytes
            .unwrap_or_else(|| (10 * smss).min(14_720.max(2 * smss)))
            .max(2 * smss);
        // Time zero is "before everything", so the epoch is at one.
        let now_ns = 1;
        let mut bbr = Self {
            params: config.params,
            initial_window,
            ack_hold: config.ack_hold,
            smss,
            epoch: now,
            clock: (now, now_ns),
            rng: SplitMix(seed),
            sampler: Sampler::new(now_ns, config.packets_in_flight_max),
            probe: BbrProbe::default(),
            max_bw: MaxBwFilter::default(),
            bw: 0,
            bw_lo: u64::MAX,
            inflight_lo: u64::MAX,
            inflight_hi: u64::MAX,
            min_rtt: MinRtt::new(now_ns),
            extra_acked: ExtraAcked::default(),
            congestion: Congestion::new(),
            undo: Undo::new(),
            last_sample: RateSample::default(),
            state: State::Startup,
            rounds: Rounds::default(),
            full: FullPipe::default(),
            cycle: Cycle::new(),
            probe_rtt: ProbeRtt::default(),
            drain_start_round: 0,
            idle_restart: false,
            resume: Resume::new(resume),
            resume_rate: None,
            batch: Batch::default(),
            limited: Limited::default(),
            cwnd: initial_window,
            prior_cwnd: 0,
            pacing_rate: 0,
            send_quantum: 0,
        };
        bbr.init_pacing_rate(None);
        if resume.is_some() {
            bbr.probe.set_resume_phase(ResumePhase::Reconnaissance);
        }
        bbr.publish();
        bbr
    }

    /// The shared view into this controller and its clones.
    #[must_use]
    pub fn probe(&self) -> BbrProbe {
        self.probe.clone()
    }

    /// A packet left: `OnTransmit` and `OnPacketSent`.
    pub fn handle_sent(&mut self, now: Instant, bytes: u64, packet_number: u64) {
        let now_ns = self.now_ns(now);
        if self.probe.take_app_limited() && self.in_flight() < self.cwnd {
            self.sampler.mark_app_limited();
        }
        if self.sampler.is_app_limited() && self.sampler.is_pipe_empty(self.smss) {
            self.restart_from_idle(now_ns);
        }
        self.sampler.on_sent(now_ns, bytes, packet_number, self.smss);
        self.note_cwnd_limited();
        self.probe.publish_in_flight(self.in_flight());
    }

    /// One acknowledged packet, named by the time it was sent.
    /// [`handle_ack_end`](Self::handle_ack_end) follows when the ACK is through.
    pub fn handle_acked(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool) {
        if !self.batch.open {
            self.batch = Batch { open: true, prior_in_flight: self.in_flight() };
            self.note_cwnd_limited();
            if self.probe.is_app_limited(app_limited) && self.in_flight() < self.cwnd {
                self.sampler.mark_app_limited();
            }
        }
        let now_ns = self.now_ns(now);
        let sent_ns = self.ns(sent);
        self.sampler.on_acked(now_ns, sent_ns, bytes);
    }

    /// The end of an ACK; `in_flight` is what is still in flight after it, bytes.
    pub fn handle_ack_end(&mut self, now: Instant, in_flight: u64) {
        let now_ns = self.now_ns(now);
        let rs = self.sampler.finish_ack(now_ns, in_flight);
        if std::mem::take(&mut self.batch.open) {
            self.update_on_ack(now_ns, &rs);
            self.publish();
        } else {
            self.probe.publish_in_flight(self.in_flight());
        }
    }

    /// Packets were lost, or marked (`lost_bytes` 0), as quinn-proto reports it:
    /// `sent` belongs to the largest of them.
    pub fn handle_congestion(
        &mut self,
        now: Instant,
        sent: Instant,
        persistent: bool,
        lost_bytes: u64,
    ) {
        let now_ns = self.now_ns(now);
        if lost_bytes == 0 {
            self.handle_ecn(now_ns);
        } else {
            self.handle_loss(now_ns, self.ns(sent), lost_bytes, persistent);
        }
        self.publish();
    }

    /// The path's largest packet changed.
    pub fn handle_mtu(&mut self, mtu_bytes: u16) {
        self.smss = u64::from(mtu_bytes).max(1);
        self.cwnd = self.cwnd.max(self.min_pipe_cwnd());
        self.publish();
    }

    /// `UpdateOnACK`, in the draft's order.
    fn update_on_ack(&mut self, now_ns: u64, rs: &RateSample) {
        self.last_sample = *rs;
        if self.probe.take_spurious_loss() {
            self.handle_spurious_loss();
        }
        self.leave_recovery(rs);
        self.update_latest_delivery_signals(rs);
        self.update_max_bw(rs);
        self.update_congestion_signals(now_ns);
        self.update_ack_aggregation(now_ns, rs);
        self.check_full_bw_reached(rs);
        self.check_startup_done(now_ns);
        self.check_drain_done(now_ns);
        self.update_probe_bw(now_ns, rs);
        self.update_min_rtt(now_ns, rs);
        self.check_probe_rtt(now_ns, rs);
        self.advance_latest_delivery_signals(rs);
        self.bw = self.max_bw.max().min(self.bw_lo);
        self.set_pacing_rate();
        self.set_cwnd(rs);
        self.resume_on_ack(now_ns, rs);
        if self.rounds.start {
            self.limited = Limited { this_round: false, last_round: self.limited.this_round };
        }
    }

    /// `UpdateMaxBw`: an application-limited sample counts only if it is no lower.
    fn update_max_bw(&mut self, rs: &RateSample) {
        self.update_round(rs);
        if rs.delivery_rate > 0 && (rs.delivery_rate >= self.max_bw.max() || !rs.app_limited) {
            self.max_bw.update(rs.delivery_rate);
        }
    }

    fn update_min_rtt(&mut self, now_ns: u64, rs: &RateSample) {
        let ns = |d: std::time::Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        let is_first = self.min_rtt.min_rtt_ns == u64::MAX;
        let rtt_ns = rs.has_data.then_some(rs.rtt_ns);
        // The five seconds bound ProbeRTT's cost to 2 % if an episode is short. With
        // round trips of a second and more (a queue behind a link that has become
        // slow) it is not: ProbeRTT would follow ProbeRTT, no probing cycle would end
        // and `max_bw` would never forget the faster link.
        let slow = if is_first { 0 } else { self.min_rtt.min_rtt_ns.saturating_mul(8) };
        let interval = ns(self.params.probe_rtt_interval).max(slow);
        let window = ns(self.params.min_rtt_filter).max(2 * interval);
        self.min_rtt.update(now_ns, rtt_ns, interval, window);
        if is_first && rtt_ns.is_some() {
            self.init_pacing_rate(rtt_ns);
        }
    }

    /// `HandleRestartFromIdle`.
    fn restart_from_idle(&mut self, now_ns: u64) {
        self.idle_restart = true;
        self.extra_acked.interval_start_ns = now_ns;
        if self.state.is_probe_bw() {
            self.set_pacing_rate_with_gain(1000);
        } else if self.state == State::ProbeRtt {
            self.check_probe_rtt_done(now_ns);
        }
        self.publish();
    }

    /// `C.inflight`, bytes.
    fn in_flight(&self) -> u64 {
        self.sampler.in_flight(self.smss)
    }

    /// [`ns`](Self::ns) of the present.
    fn now_ns(&mut self, now: Instant) -> u64 {
        if self.clock.0 != now {
            self.clock = (now, self.ns(now));
        }
        self.clock.1
    }

    /// Nanoseconds since the epoch, plus one; packets of an earlier path are at one.
    fn ns(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.epoch);
        since.as_secs() * NS_PER_S + u64::from(since.subsec_nanos()) + 1
    }

    fn publish(&self) {
        self.probe.publish(&Published {
            state: self.state,
            max_bw: self.max_bw.max(),
            bw: self.bw,
            min_rtt_ns: self.min_rtt.min_rtt_ns,
            cwnd: self.cwnd,
            in_flight: self.in_flight(),
            inflight_hi: self.inflight_hi,
            inflight_lo: self.inflight_lo,
            bw_lo: self.bw_lo,
            pacing_rate: self.pacing_rate,
            send_quantum: self.send_quantum,
            rounds: self.rounds.count,
            cycles: self.max_bw.cycles,
            delivered: self.sampler.delivered,
            lost: self.sampler.lost,
            unrecorded: self.sampler.unrecorded,
        });
    }
}

impl Controller for Bbr {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.handle_sent(now, bytes, last_packet_number);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        _rtt: &RttEstimator,
    ) {
        self.handle_acked(now, sent, bytes, app_limited);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        _app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        self.handle_ack_end(now, in_flight);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.handle_congestion(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.handle_mtu(new_mtu);
    }

    fn window(&self) -> u64 {
        self.cwnd
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.cwnd;
        metrics.pacing_rate = Some(self.pacing_rate.saturating_mul(8));
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.initial_window
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
