//! The gate between quinn-proto and the shard's own transmission rules.
//!
//! quinn-proto asks its controller for a window and paces by it. STOQ's shard
//! decides instead (cwnd and pacing rate of the inner controller), so every
//! controller is wrapped in [`Gated`]: quinn-proto sees an unlimited window
//! while the gate is open (an unlimited window also bypasses its pacer) and none
//! while it is closed; a closed gate still lets ACK-only packets, loss probes
//! and closes out.
//!
//! [`CcState`] is shared by the wrapper, which lives inside the connection, and
//! the shard that polls it. Both run on one thread; the atomics exist because
//! the trait demands `Send + Sync`, and are relaxed.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use quinn_proto::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::{Connection, RttEstimator};

use super::bbr::{Bbr, BbrProbe};
use crate::metrics::ShardMetrics;

/// Packets up to this size do not count as in flight: an ACK-only packet is
/// never acknowledged, and the difference is corrected with each ACK anyway.
const UNTRACKED_PACKET_BYTES_MAX: u64 = 96;
/// A delivery rate is taken over a round trip, but over this at least.
const DELIVERY_INTERVAL_MIN: Duration = Duration::from_millis(1);

/// What the shard needs to know of a connection's congestion control.
#[derive(Debug, Default)]
pub(crate) struct CcState {
    gate_open: AtomicBool,
    inflight_bytes: AtomicU64,
    cwnd_bytes: AtomicU64,
    /// Zero: the controller has no rate of its own.
    pacing_rate_bytes_per_s: AtomicU64,
    /// Size of the path MTU probe under way, part of what quinn-proto calls in flight.
    probe_bytes: AtomicU64,
    /// The view into a BBR controller; `None` for the others.
    bbr: Option<BbrProbe>,
    delivery_rate_bytes_per_s: AtomicU64,
    ecn_events: AtomicU64,
    latest_rtt_ns: AtomicU64,
}

impl CcState {
    /// Opens or closes the gate for the next `poll_transmit`.
    pub(crate) fn set_gate(&self, open: bool) {
        self.gate_open.store(open, Relaxed);
    }

    /// A path MTU probe left. Its loss is no congestion and nobody is told of it, and
    /// it may be larger than the whole window: it does not count as in flight.
    pub(crate) fn set_probe(&self, bytes: u64) {
        self.probe_bytes.store(bytes, Relaxed);
    }

    /// The path MTU probe under way, bytes; zero: none.
    pub(crate) fn probe_bytes(&self) -> u64 {
        self.probe_bytes.load(Relaxed)
    }

    /// What the peer acknowledged over the last round trip, bytes/s; zero before there was one.
    pub(crate) fn delivery_rate_bytes_per_s(&self) -> u64 {
        self.delivery_rate_bytes_per_s.load(Relaxed)
    }

    /// Congestion events that routers announced by ECN (RFC 9002 §7.1), not by losses.
    pub(crate) fn ecn_events(&self) -> u64 {
        self.ecn_events.load(Relaxed)
    }

    /// The latest round-trip sample, the peer's delay included; zero before there was one.
    pub(crate) fn latest_rtt(&self) -> Duration {
        Duration::from_nanos(self.latest_rtt_ns.load(Relaxed))
    }

    /// Bytes in flight: exact after each ACK, and as sent and lost since.
    pub(crate) fn inflight_bytes(&self) -> u64 {
        self.inflight_bytes.load(Relaxed)
    }

    /// The controller's window.
    pub(crate) fn cwnd_bytes(&self) -> u64 {
        self.cwnd_bytes.load(Relaxed)
    }

    /// The view into a BBR controller, and the way to tell it what quinn-proto cannot.
    pub(crate) fn bbr(&self) -> Option<&BbrProbe> {
        self.bbr.as_ref()
    }

    /// The controller's own pacing rate, if it has one.
    pub(crate) fn pacing_rate_bytes_per_s(&self) -> Option<u64> {
        match self.pacing_rate_bytes_per_s.load(Relaxed) {
            0 => None,
            rate => Some(rate),
        }
    }
}

/// A controller behind the gate.
pub(crate) struct Gated {
    inner: Box<dyn Controller>,
    state: Arc<CcState>,
    metrics: Arc<ShardMetrics>,
    /// When the youngest packet of the ACK under way was sent.
    sent_latest: Option<Instant>,
    round: Round,
}

/// What was acknowledged since about a round trip.
#[derive(Clone, Copy)]
struct Round {
    start: Instant,
    rtt: Duration,
    acked_bytes: u64,
}

impl Gated {
    fn new(inner: Box<dyn Controller>, now: Instant, metrics: Arc<ShardMetrics>) -> Self {
        // The trait shows a controller's type only by value: look at a copy, once per path.
        let bbr = inner.clone_box().into_any().downcast::<Bbr>().ok().map(|bbr| bbr.probe());
        let state = Arc::new(CcState { bbr, ..CcState::default() });
        let round = Round { start: now, rtt: Duration::ZERO, acked_bytes: 0 };
        let gated = Self { inner, state, metrics, sent_latest: None, round };
        gated.publish();
        gated
    }

    fn note_ack(&mut self, sent: Instant, bytes: u64, rtt: Duration) {
        self.sent_latest = self.sent_latest.max(Some(sent));
        self.round.rtt = rtt;
        self.round.acked_bytes += bytes;
    }

    /// The round-trip sample of an ACK (RFC 9002 §5.1): of the largest packet that it acknowledges.
    fn take_rtt_sample(&mut self, now: Instant) {
        let Some(sent) = self.sent_latest.take() else { return };
        let rtt = now.saturating_duration_since(sent);
        self.state.latest_rtt_ns.store(rtt.as_nanos() as u64, Relaxed);
        self.metrics.rtt_ns.record_duration(rtt);
    }

    fn take_delivery_rate(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.round.start);
        if elapsed < self.round.rtt.max(DELIVERY_INTERVAL_MIN) {
            return;
        }
        let rate = u128::from(self.round.acked_bytes) * 1_000_000_000 / elapsed.as_nanos();
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        self.state.delivery_rate_bytes_per_s.store(rate, Relaxed);
        self.round = Round { start: now, acked_bytes: 0, ..self.round };
    }

    /// The state of the controller inside `connection`; fetch it again when the path changed.
    pub(crate) fn state_of(connection: &Connection) -> Arc<CcState> {
        let clone = connection.congestion_state().clone_box().into_any();
        let gated = clone.downcast::<Self>().expect("every controller is built by GatedFactory");
        gated.state
    }

    fn publish(&self) {
        if let Some(bbr) = &self.state.bbr {
            self.state.cwnd_bytes.store(bbr.cwnd_bytes(), Relaxed);
            self.state.pacing_rate_bytes_per_s.store(bbr.pacing_rate_bytes_per_s(), Relaxed);
            return;
        }
        let metrics = self.inner.metrics();
        self.state.cwnd_bytes.store(self.inner.window(), Relaxed);
        let rate = metrics.pacing_rate.map_or(0, |bits| bits / 8);
        self.state.pacing_rate_bytes_per_s.store(rate, Relaxed);
    }
}

impl Controller for Gated {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        if bytes > UNTRACKED_PACKET_BYTES_MAX {
            let inflight = self.state.inflight_bytes.load(Relaxed);
            self.state.inflight_bytes.store(inflight + bytes, Relaxed);
            self.inner.on_sent(now, bytes, last_packet_number);
            // Sending changes a window or a rate only when it ends an idle time.
            if inflight == 0 {
                self.publish();
            }
        }
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        self.note_ack(sent, bytes, rtt.get());
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        let in_flight = in_flight.saturating_sub(self.state.probe_bytes());
        self.state.inflight_bytes.store(in_flight, Relaxed);
        self.take_rtt_sample(now);
        self.take_delivery_rate(now);
        self.inner.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
        self.publish();
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        let inflight = self.state.inflight_bytes.load(Relaxed);
        self.state.inflight_bytes.store(inflight.saturating_sub(lost_bytes), Relaxed);
        if lost_bytes == 0 {
            // quinn-proto's way to say ECN.
            self.state.ecn_events.store(self.state.ecn_events() + 1, Relaxed);
        }
        self.inner.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
        self.publish();
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.inner.on_mtu_update(new_mtu);
        self.publish();
    }

    fn window(&self) -> u64 {
        if self.state.gate_open.load(Relaxed) { u64::MAX / 2 } else { 0 }
    }

    fn metrics(&self) -> ControllerMetrics {
        self.inner.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self {
            inner: self.inner.clone_box(),
            state: self.state.clone(),
            metrics: self.metrics.clone(),
            ..*self
        })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// Builds gated controllers from another factory.
pub(crate) struct GatedFactory {
    pub(crate) inner: Arc<dyn ControllerFactory + Send + Sync>,
    /// Where round-trip samples go.
    pub(crate) metrics: Arc<ShardMetrics>,
}

impl ControllerFactory for GatedFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let inner = self.inner.clone().build(now, current_mtu);
        Box::new(Gated::new(inner, now, self.metrics.clone()))
    }
}

#[cfg(test)]
mod tests {
    use quinn_proto::congestion::NewRenoConfig;

    use super::*;

    #[test]
    fn the_gate_hides_the_window_and_state_follows_the_inner_controller() {
        let inner = Arc::new(NewRenoConfig::default());
        let factory = Arc::new(GatedFactory { inner, metrics: Arc::default() });
        let now = Instant::now();
        let mut controller = factory.build(now, 1200);
        assert_eq!(controller.window(), 0, "closed at first");
        let gated = controller.clone_box().into_any().downcast::<Gated>().expect("gated");
        let state = gated.state;
        assert!(state.cwnd_bytes() >= 10 * 1200);
        state.set_gate(true);
        assert!(controller.window() > u64::from(u32::MAX), "bypasses quinn-proto's pacer");

        controller.on_sent(now, 1200, 0);
        controller.on_sent(now, 40, 1);
        assert_eq!(state.inflight_bytes(), 1200, "ACK-only packets are not in flight");
        controller.on_congestion_event(now, now, false, 1200);
        assert_eq!(state.inflight_bytes(), 0);
        controller.on_end_acks(now, 777, false, Some(1));
        assert_eq!(state.inflight_bytes(), 777, "each ACK makes it exact");
        state.set_probe(9000);
        controller.on_end_acks(now, 9777, false, Some(2));
        assert_eq!(state.inflight_bytes(), 777, "a path MTU probe holds nothing back");
    }

    #[test]
    fn acks_give_round_trips_delivery_rates_and_ecn() {
        let metrics = Arc::new(ShardMetrics::default());
        let inner = Arc::new(NewRenoConfig::default());
        let factory = Arc::new(GatedFactory { inner, metrics: metrics.clone() });
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let controller = factory.build(start, 1200);
        let mut controller = controller.into_any().downcast::<Gated>().expect("gated");
        let state = controller.state.clone();
        for packet in 0..10 {
            controller.on_sent(at(packet), 1200, packet);
        }
        for packet in 0..10 {
            controller.note_ack(at(packet), 1200, Duration::from_millis(20));
        }
        controller.on_end_acks(at(30), 0, false, Some(9));
        assert_eq!(state.latest_rtt(), Duration::from_millis(21), "of the youngest packet");
        assert_eq!(state.delivery_rate_bytes_per_s(), 400_000, "12 kB in 30 ms");
        let summary = crate::metrics::Merged::of([&metrics.rtt_ns]).summary();
        assert_eq!((summary.samples, summary.average), (1, Duration::from_millis(21)));
        controller.on_end_acks(at(31), 0, false, None);
        assert_eq!(crate::metrics::Merged::of([&metrics.rtt_ns]).count(), 1, "no ACK, no sample");
        controller.on_congestion_event(at(31), at(9), false, 1200);
        assert_eq!(state.ecn_events(), 0);
        controller.on_congestion_event(at(31), at(9), false, 0);
        assert_eq!(state.ecn_events(), 1);
    }
}
