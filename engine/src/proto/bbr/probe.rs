//! What the engine sees of a controller, and tells it: relaxed atomics shared by
//! the controller, its clones and its [`BbrProbe`]s.
//!
//! All sides run on one shard; the atomics exist because quinn-proto wants a
//! controller to be `Sync` and because metrics are read from elsewhere. Every
//! value stands for itself, none publishes another, so relaxed ordering is
//! enough; a reader on another thread may see fields of two neighbouring ACKs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::resume::ResumePhase;
use super::state::State;

const APP_LIMITED_KNOWN: u8 = 1;
const APP_LIMITED_NOW: u8 = 2;
const APP_LIMITED_SINCE: u8 = 4;

/// A view into a running [`Bbr`](super::Bbr), and the shard's way to tell it what
/// quinn-proto cannot. Clones see the same controller.
#[derive(Debug, Clone, Default)]
pub struct BbrProbe(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: AtomicU8,
    max_bw: AtomicU64,
    bw: AtomicU64,
    min_rtt_ns: AtomicU64,
    cwnd: AtomicU64,
    in_flight: AtomicU64,
    inflight_hi: AtomicU64,
    inflight_lo: AtomicU64,
    bw_lo: AtomicU64,
    pacing_rate: AtomicU64,
    send_quantum: AtomicU64,
    rounds: AtomicU64,
    cycles: AtomicU64,
    delivered: AtomicU64,
    lost: AtomicU64,
    unrecorded: AtomicU64,
    app_limited: AtomicU8,
    cwnd_limited: AtomicBool,
    spurious: AtomicBool,
    resume_phase: AtomicU8,
}

/// The controller's model and decisions after its last event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// State of the state machine.
    pub state: State,
    /// `max_bw`: estimated bottleneck bandwidth, in bytes of QUIC packets per second.
    pub max_bw_bytes_per_s: u64,
    /// `bw`: the bandwidth that is used, after the short-term bound.
    pub bw_bytes_per_s: u64,
    /// `min_rtt`, once there is a sample.
    pub min_rtt: Option<Duration>,
    /// Congestion window, bytes.
    pub cwnd_bytes: u64,
    /// Bytes in flight by the controller's count. Packets of at most 320 bytes
    /// sent since the last ACK may be bare acknowledgements and count for at most
    /// two full packets.
    pub in_flight_bytes: u64,
    /// `inflight_hi` (v3: `inflight_longterm`), if a probe has found it.
    pub inflight_hi_bytes: Option<u64>,
    /// `inflight_lo` (v3: `inflight_shortterm`), if congestion set it.
    pub inflight_lo_bytes: Option<u64>,
    /// `bw_lo` (v3: `bw_shortterm`), if congestion set it.
    pub bw_lo_bytes_per_s: Option<u64>,
    /// Rate to pace at, in bytes of QUIC packets per second.
    pub pacing_rate_bytes_per_s: u64,
    /// Bytes to release at once.
    pub send_quantum_bytes: u64,
    /// Packet-timed round trips so far.
    pub rounds: u64,
    /// Bandwidth probing cycles completed.
    pub cycles: u64,
    /// Bytes acknowledged so far.
    pub delivered_bytes: u64,
    /// Bytes declared lost so far.
    pub lost_bytes: u64,
    /// Packets sent while the record ring was full: they gave no samples.
    pub unrecorded_packets: u64,
}

/// What the controller publishes; see [`Snapshot`] for the meaning. Infinity is [`u64::MAX`].
pub(super) struct Published {
    pub(super) state: State,
    pub(super) max_bw: u64,
    pub(super) bw: u64,
    pub(super) min_rtt_ns: u64,
    pub(super) cwnd: u64,
    pub(super) in_flight: u64,
    pub(super) inflight_hi: u64,
    pub(super) inflight_lo: u64,
    pub(super) bw_lo: u64,
    pub(super) pacing_rate: u64,
    pub(super) send_quantum: u64,
    pub(super) rounds: u64,
    pub(super) cycles: u64,
    pub(super) delivered: u64,
    pub(super) lost: u64,
    pub(super) unrecorded: u64,
}

impl BbrProbe {
    /// Tells whether the application has run out of data: `true` when the window
    /// and the pacer would have let a packet go and there was none, `false` when
    /// data waits. From the first call on, quinn-proto's own flag, which takes
    /// the shard's gate for a lack of data, is ignored.
    ///
    /// A `true` is remembered until the next packet even if `false` follows: the
    /// gap in the pipe has been made.
    pub fn set_app_limited(&self, app_limited: bool) {
        let flags = if app_limited {
            APP_LIMITED_KNOWN | APP_LIMITED_NOW | APP_LIMITED_SINCE
        } else {
            APP_LIMITED_KNOWN | (self.0.app_limited.load(Relaxed) & APP_LIMITED_SINCE)
        };
        self.0.app_limited.store(flags, Relaxed);
    }

    /// Tells that the congestion window, and nothing else, held a packet back. The
    /// controller also finds out by itself, when in-flight comes within a packet
    /// of the window.
    pub fn set_cwnd_limited(&self) {
        self.0.cwnd_limited.store(true, Relaxed);
    }

    /// Tells that the last loss episode was spurious: everything declared lost in
    /// it arrived after all. The model then returns to what it was before
    /// (v3 §5.5.11) on the next ACK. quinn-proto 0.11 does not notice late ACKs.
    pub fn report_spurious_loss(&self) {
        self.0.spurious.store(true, Relaxed);
    }

    /// What has come of what was remembered of the path.
    #[must_use]
    pub fn resume_phase(&self) -> ResumePhase {
        ResumePhase::from_index(self.0.resume_phase.load(Relaxed))
    }

    /// Takes back what was remembered of the path, where it was not tried yet. The controller may
    /// belong to another shard: its own step wins.
    pub(in crate::proto) fn withdraw_resume(&self) {
        let (from, to) = (ResumePhase::Reconnaissance as u8, ResumePhase::Declined as u8);
        // Relaxed, as everything here; a failure says that there is nothing to take back.
        let _unless_it_went_on = self.0.resume_phase.compare_exchange(from, to, Relaxed, Relaxed);
    }

    pub(in crate::proto) fn set_resume_phase(&self, phase: ResumePhase) {
        self.0.resume_phase.store(phase as u8, Relaxed);
    }

    /// Congestion window, bytes.
    #[must_use]
    pub fn cwnd_bytes(&self) -> u64 {
        self.0.cwnd.load(Relaxed)
    }

    /// Bytes in flight, see [`Snapshot::in_flight_bytes`].
    #[must_use]
    pub fn in_flight_bytes(&self) -> u64 {
        self.0.in_flight.load(Relaxed)
    }

    /// Rate to pace at, in bytes of QUIC packets per second; never zero.
    #[must_use]
    pub fn pacing_rate_bytes_per_s(&self) -> u64 {
        self.0.pacing_rate.load(Relaxed)
    }

    /// Bytes to release at once.
    #[must_use]
    pub fn send_quantum_bytes(&self) -> u64 {
        self.0.send_quantum.load(Relaxed)
    }

    /// Everything at once.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let read = |value: &AtomicU64| value.load(Relaxed);
        let finite = |value: &AtomicU64| Some(value.load(Relaxed)).filter(|&v| v != u64::MAX);
        let shared = &self.0;
        Snapshot {
            state: State::from_index(shared.state.load(Relaxed)),
            max_bw_bytes_per_s: read(&shared.max_bw),
            bw_bytes_per_s: read(&shared.bw),
            min_rtt: finite(&shared.min_rtt_ns).map(Duration::from_nanos),
            cwnd_bytes: read(&shared.cwnd),
            in_flight_bytes: read(&shared.in_flight),
            inflight_hi_bytes: finite(&shared.inflight_hi),
            inflight_lo_bytes: finite(&shared.inflight_lo),
            bw_lo_bytes_per_s: finite(&shared.bw_lo),
            pacing_rate_bytes_per_s: read(&shared.pacing_rate),
            send_quantum_bytes: read(&shared.send_quantum),
            rounds: read(&shared.rounds),
            cycles: read(&shared.cycles),
            delivered_bytes: read(&shared.delivered),
            lost_bytes: read(&shared.lost),
            unrecorded_packets: read(&shared.unrecorded),
        }
    }

    pub(super) fn publish(&self, p: &Published) {
        let shared = &self.0;
        shared.state.store(p.state as u8, Relaxed);
        shared.max_bw.store(p.max_bw, Relaxed);
        shared.bw.store(p.bw, Relaxed);
        shared.min_rtt_ns.store(p.min_rtt_ns, Relaxed);
        shared.cwnd.store(p.cwnd, Relaxed);
        shared.in_flight.store(p.in_flight, Relaxed);
        shared.inflight_hi.store(p.inflight_hi, Relaxed);
        shared.inflight_lo.store(p.inflight_lo, Relaxed);
        shared.bw_lo.store(p.bw_lo, Relaxed);
        shared.pacing_rate.store(p.pacing_rate, Relaxed);
        shared.send_quantum.store(p.send_quantum, Relaxed);
        shared.rounds.store(p.rounds, Relaxed);
        shared.cycles.store(p.cycles, Relaxed);
        shared.delivered.store(p.delivered, Relaxed);
        shared.lost.store(p.lost, Relaxed);
        shared.unrecorded.store(p.unrecorded, Relaxed);
    }

    pub(super) fn publish_in_flight(&self, in_flight: u64) {
        self.0.in_flight.store(in_flight, Relaxed);
    }

    /// Whether the application has nothing to send now; `quinn` when the shard never said.
    pub(super) fn is_app_limited(&self, quinn: bool) -> bool {
        let flags = self.0.app_limited.load(Relaxed);
        if flags & APP_LIMITED_KNOWN == 0 { quinn } else { flags & APP_LIMITED_NOW != 0 }
    }

    /// Whether it had nothing to send at some time since the last call.
    pub(super) fn take_app_limited(&self) -> bool {
        let flags = self.0.app_limited.load(Relaxed);
        let since = flags & APP_LIMITED_SINCE != 0;
        if since {
            self.0.app_limited.store(flags & !APP_LIMITED_SINCE, Relaxed);
        }
        since
    }

    pub(super) fn take_cwnd_limited(&self) -> bool {
        let limited = self.0.cwnd_limited.load(Relaxed);
        if limited {
            self.0.cwnd_limited.store(false, Relaxed);
        }
        limited
    }

    pub(super) fn take_spurious_loss(&self) -> bool {
        let spurious = self.0.spurious.load(Relaxed);
        if spurious {
            self.0.spurious.store(false, Relaxed);
        }
        spurious
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quinns_flag_counts_until_the_shard_speaks() {
        let probe = BbrProbe::default();
        assert!(probe.is_app_limited(true));
        assert!(!probe.is_app_limited(false));
        probe.set_app_limited(false);
        assert!(!probe.is_app_limited(true));
    }

    #[test]
    fn trap_7_a_gap_is_not_forgotten_when_data_comes_back() {
        let probe = BbrProbe::default();
        probe.set_app_limited(true);
        probe.set_app_limited(false);
        assert!(!probe.is_app_limited(true), "data waits now");
        assert!(probe.take_app_limited(), "but there was a gap");
        assert!(!probe.take_app_limited());
    }

    #[test]
    fn latches_fire_once_and_clones_share_them() {
        let probe = BbrProbe::default();
        let shard = probe.clone();
        assert!(!probe.take_cwnd_limited() && !probe.take_spurious_loss());
        shard.set_cwnd_limited();
        shard.report_spurious_loss();
        assert!(probe.take_cwnd_limited() && probe.take_spurious_loss());
        assert!(!probe.take_cwnd_limited() && !probe.take_spurious_loss());
    }
}
