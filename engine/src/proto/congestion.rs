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
use std::time::Instant;

use quinn_proto::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::{Connection, RttEstimator};

use super::bbr::{Bbr, BbrProbe};

/// Packets up to this size do not count as in flight: an ACK-only packet is
/// never acknowledged, and the difference is corrected with each ACK anyway.
const UNTRACKED_PACKET_BYTES_MAX: u64 = 96;

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
}

impl Gated {
    fn new(inner: Box<dyn Controller>) -> Self {
        // The trait shows a controller's type only by value: look at a copy, once per path.
        let bbr = inner.clone_box().into_any().downcast::<Bbr>().ok().map(|bbr| bbr.probe());
        let gated = Self { inner, state: Arc::new(CcState { bbr, ..CcState::default() }) };
        gated.publish();
        gated
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
            self.publish();
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
        Box::new(Self { inner: self.inner.clone_box(), state: self.state.clone() })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// Builds gated controllers from another factory.
pub(crate) struct GatedFactory(pub(crate) Arc<dyn ControllerFactory + Send + Sync>);

impl ControllerFactory for GatedFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Gated::new(self.0.clone().build(now, current_mtu)))
    }
}

#[cfg(test)]
mod tests {
    use quinn_proto::congestion::NewRenoConfig;

    use super::*;

    #[test]
    fn the_gate_hides_the_window_and_state_follows_the_inner_controller() {
        let factory = Arc::new(GatedFactory(Arc::new(NewRenoConfig::default())));
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
}
