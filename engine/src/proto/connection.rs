//! One connection as the shard sees it: quinn-proto's state machine, its gate, its pacer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::{Connection, FrameStats};

use super::Owner;
use super::bbr::{BbrProbe, ResumePhase, State};
use super::congestion::{CcState, Gated};
use super::credit::Credit;
use super::pacing::Pacer;
use crate::app::ConnId;
use crate::certs::KeyUpdates;
use crate::config::ACK_DELAY_MAX;
use crate::pool::EntryId;

/// ACK-eliciting packets after which an ACK must leave although data may not (RFC 9000 §13.2.2).
const ACK_ELICITING_FRAMES_MAX: u64 = 2;
/// Quantum while the controller names no rate: two packets, at most 64 kB (see bbr's send_quantum).
const QUANTUM_BYTES_MAX: u64 = 64 * 1024;

/// Whether a connection may put data into the next packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    /// It may, and so may as many packets as it says, at least one.
    Open {
        /// Full-sized packets that window and pacer allow now.
        packets: usize,
    },
    /// The congestion window is full: an ACK or a timer opens it.
    Window,
    /// The pacer holds it until then.
    Paced(Instant),
}

/// Statistics of one connection; counters are totals.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct ConnectionStats {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Smallest round-trip time seen.
    pub min_rtt: Duration,
    /// Congestion window, bytes.
    pub cwnd_bytes: u64,
    /// Bytes in flight.
    pub inflight_bytes: u64,
    /// Rate at which the pacer releases packets, bits/s; 0 while there is no RTT sample.
    pub pacing_rate_bps: u64,
    /// Largest UDP payload that the path carries now, bytes.
    pub mtu_bytes: u16,
    /// Packets sent.
    pub packets_sent: u64,
    /// Packets declared lost.
    pub packets_lost: u64,
    /// Bytes declared lost.
    pub bytes_lost: u64,
    /// Congestion events (losses and ECN).
    pub congestion_events: u64,
    /// Path MTU probes that were lost; not counted as lost packets.
    pub mtu_probes_lost: u64,
    /// Times that the path stopped carrying its MTU.
    pub black_holes: u64,
    /// UDP payload bytes sent.
    pub udp_tx_bytes: u64,
    /// UDP datagrams sent.
    pub udp_tx_datagrams: u64,
    /// UDP payload bytes received; at a server without the client's first datagram, which came before
    /// there was a connection.
    pub udp_rx_bytes: u64,
    /// UDP datagrams received, likewise.
    pub udp_rx_datagrams: u64,
    /// ACK frames sent.
    pub acks_sent: u64,
    /// ACK frames received.
    pub acks_received: u64,
    /// What the peer acknowledged over the last round trip, bits/s.
    pub delivery_rate_bps: u64,
    /// The latest round-trip sample, the peer's delay included.
    pub latest_rtt: Duration,
    /// Congestion events that routers announced by ECN, not by losses.
    pub ecn_events: u64,
    /// Changes of the packet protection keys (RFC 9001 §6), by either side. Counted for TLS
    /// configurations of [`crate::certs`] only.
    pub key_updates: u64,
    /// BBR's state; `None` with another congestion control.
    pub bbr_state: Option<State>,
    /// BBR's bandwidth estimate (`max_bw`), bits of QUIC packets per second; 0 with another congestion control.
    pub bandwidth_estimate_bps: u64,
    /// BBR's `inflight_hi` (v3: `inflight_longterm`), bytes, once a probe has found it.
    pub inflight_hi_bytes: Option<u64>,
    /// What has come of what was remembered of the path (`careful_resume`, RFC 9959).
    pub resume_phase: ResumePhase,
}

/// Numbers in [`ConnectionStats`].
pub(crate) const STATS_NUMBERS: usize = 26;

impl ConnectionStats {
    /// As numbers, for publication to other threads; times in nanoseconds.
    pub(crate) fn to_array(self) -> [u64; STATS_NUMBERS] {
        [
            self.rtt.as_nanos() as u64,
            self.min_rtt.as_nanos() as u64,
            self.cwnd_bytes,
            self.inflight_bytes,
            self.pacing_rate_bps,
            u64::from(self.mtu_bytes),
            self.packets_sent,
            self.packets_lost,
            self.bytes_lost,
            self.congestion_events,
            self.mtu_probes_lost,
            self.black_holes,
            self.udp_tx_bytes,
            self.udp_tx_datagrams,
            self.udp_rx_bytes,
            self.udp_rx_datagrams,
            self.acks_sent,
            self.acks_received,
            self.delivery_rate_bps,
            self.latest_rtt.as_nanos() as u64,
            self.ecn_events,
            self.key_updates,
            self.bbr_state.map_or(0, |state| state as u64 + 1),
            self.bandwidth_estimate_bps,
            self.inflight_hi_bytes.unwrap_or(u64::MAX),
            self.resume_phase as u64,
        ]
    }

    pub(crate) fn from_array(values: [u64; STATS_NUMBERS]) -> Self {
        let [rtt, min_rtt, cwnd_bytes, inflight_bytes, pacing_rate_bps, mtu, rest @ ..] = values;
        let [packets_sent, packets_lost, bytes_lost, congestion_events, probes, rest @ ..] = rest;
        let [black_holes, udp_tx_bytes, udp_tx_datagrams, udp_rx_bytes, rest @ ..] = rest;
        let [udp_rx_datagrams, acks_sent, acks_received, delivery_rate_bps, rest @ ..] = rest;
        let [latest_rtt, ecn_events, key_updates, state, bandwidth_estimate_bps, hi, resume] = rest;
        Self {
            rtt: Duration::from_nanos(rtt),
            min_rtt: Duration::from_nanos(min_rtt),
            cwnd_bytes,
            inflight_bytes,
            pacing_rate_bps,
            mtu_bytes: mtu as u16,
            packets_sent,
            packets_lost,
            bytes_lost,
            congestion_events,
            mtu_probes_lost: probes,
            black_holes,
            udp_tx_bytes,
            udp_tx_datagrams,
            udp_rx_bytes,
            udp_rx_datagrams,
            acks_sent,
            acks_received,
            delivery_rate_bps,
            latest_rtt: Duration::from_nanos(latest_rtt),
            ecn_events,
            key_updates,
            bbr_state: state.checked_sub(1).map(|index| State::from_index(index as u8)),
            bandwidth_estimate_bps,
            inflight_hi_bytes: Some(hi).filter(|&hi| hi != u64::MAX),
            resume_phase: ResumePhase::from_index(resume as u8),
        }
    }
}

pub(crate) struct Conn {
    pub(crate) inner: Connection,
    pub(crate) id: ConnId,
    pub(crate) owner: Owner,
    pub(crate) touched: bool,
    pub(crate) tx_queued: bool,
    /// When it was made.
    pub(super) begun: Instant,
    pub(crate) handshake_deadline: Option<Instant>,
    /// When it has reached `connection_age_ms_max`.
    pub(crate) age_deadline: Option<Instant>,
    pub(crate) closed_reported: bool,
    /// It was seen closed, and is counted so.
    pub(crate) closing: bool,
    /// quinn-proto's endpoint has forgotten it.
    pub(crate) drained: bool,
    /// Its place in the owner's connection pool.
    pub(crate) pool_entry: Option<EntryId>,
    /// Its life, for logs.
    pub(crate) span: tracing::Span,
    /// Counts changes of its keys, once the handshake is over.
    pub(crate) key_updates: Option<KeyUpdates>,
    /// What the peer may use, and uses.
    pub(crate) credit: Credit,
    /// Something arrived since `owes_ack` last looked.
    pub(crate) rx_since_ack_check: bool,
    cc: Arc<CcState>,
    path: SocketAddr,
    pacer: Pacer,
    paced_until: Option<Instant>,
    acks_sent: u64,
    eliciting_at_ack: u64,
    owed_since: Option<Instant>,
    /// Path MTU probes lost when the one under way was sent.
    probes_lost: u64,
}

impl Conn {
    pub(crate) fn new(
        inner: Connection,
        id: ConnId,
        owner: Owner,
        now: Instant,
        handshake_deadline: Instant,
        span: tracing::Span,
        credit: Credit,
    ) -> Self {
        Self {
            cc: Gated::state_of(&inner),
            path: inner.remote_address(),
            inner,
            id,
            owner,
            touched: false,
            tx_queued: false,
            begun: now,
            handshake_deadline: Some(handshake_deadline),
            age_deadline: None,
            closed_reported: false,
            closing: false,
            drained: false,
            pool_entry: None,
            span,
            key_updates: None,
            credit,
            rx_since_ack_check: false,
            pacer: Pacer::new(now),
            paced_until: None,
            acks_sent: 0,
            eliciting_at_ack: 0,
            owed_since: None,
            probes_lost: 0,
        }
    }

    /// The rate and quantum of the pacer, bytes/s and bytes.
    fn pacing(&self) -> (u64, u64) {
        let rate = self.cc.pacing_rate_bytes_per_s().unwrap_or_else(|| {
            // No rate without a round trip: the initial window bounds what leaves (RFC 9002 §7.7).
            // The 100 ms that quinn-proto assumes would hold a LAN's first packets back for 16 ms.
            if self.cc.latest_rtt().is_zero() {
                return u64::MAX;
            }
            // RFC 9002 §7.7: N × cwnd / smoothed_rtt, N = 1.25.
            let rtt_ns = self.inner.rtt().as_nanos().max(1);
            let cwnd = u128::from(self.cc.cwnd_bytes());
            u64::try_from(cwnd * 1_250_000_000 / rtt_ns).unwrap_or(u64::MAX)
        });
        let packet = u64::from(self.inner.current_mtu());
        if let Some(bbr) = self.cc.bbr() {
            return (rate, bbr.send_quantum_bytes().max(packet));
        }
        // 1 ms of rate within two packets and 64 kB (draft-ietf-ccwg-bbr, send_quantum).
        (rate, (rate / 1000).clamp(2 * packet, QUANTUM_BYTES_MAX.max(2 * packet)))
    }

    /// Decides about the next packets, and tells quinn-proto.
    pub(crate) fn gate(&mut self, now: Instant) -> Gate {
        if self.inner.remote_address() != self.path {
            // A new path has a controller of its own (RFC 9000 §9.4).
            self.path = self.inner.remote_address();
            self.cc = Gated::state_of(&self.inner);
            self.pacer = Pacer::new(now);
        }
        if self.cc.probe_bytes() != 0 && self.probe_is_over() {
            self.cc.set_probe(0);
        }
        let packet = u64::from(self.inner.current_mtu());
        let window = self.cc.cwnd_bytes().saturating_sub(self.cc.inflight_bytes());
        // The packet that closes a connection is not held back by what the connection had to say.
        let gate = if self.inner.is_closed() {
            Gate::Open { packets: 1 }
        } else if window < packet {
            Gate::Window
        } else {
            let (rate, quantum) = self.pacing();
            match self.pacer.allowance(now, rate, quantum) {
                Err(until) => Gate::Paced(until),
                Ok(allowed) => {
                    let packets = (window / packet).min(allowed.div_ceil(packet));
                    Gate::Open { packets: packets as usize }
                }
            }
        };
        self.paced_until = None;
        match gate {
            Gate::Paced(until) => {
                self.paced_until = Some(until);
                self.pacer.hold(self.inner.rtt());
            }
            Gate::Window => self.pacer.release(),
            Gate::Open { .. } => {}
        }
        let is_open = matches!(gate, Gate::Open { .. });
        if is_open {
            // Whatever ACK is owed leaves with this poll: nothing is left to wait for.
            self.owed_since = None;
        }
        self.cc.set_gate(is_open);
        gate
    }

    /// Tells the controller what came of an attempt to send: `gate` is what
    /// [`gate`](Self::gate) said before it, `sent` whether a packet left.
    ///
    /// BBR needs both: a sample taken while the application had nothing must not
    /// lower the estimate, and a window that held nothing back must not grow.
    pub(crate) fn note_attempt(&mut self, gate: Gate, sent: bool) {
        if matches!(gate, Gate::Open { .. }) && !sent {
            self.pacer.release();
        }
        let Some(bbr) = self.cc.bbr() else { return };
        match gate {
            Gate::Open { .. } if sent => bbr.set_app_limited(false),
            Gate::Open { .. } => bbr.set_app_limited(true),
            Gate::Window => bbr.set_cwnd_limited(),
            Gate::Paced(_) => {}
        }
    }

    /// The view into a BBR controller of the present path.
    pub(super) fn bbr(&self) -> Option<&BbrProbe> {
        self.cc.bbr()
    }

    /// BBR's state; `None` with another congestion control.
    pub(crate) fn bbr_state(&self) -> Option<State> {
        self.cc.bbr().map(|bbr| bbr.snapshot().state)
    }

    /// Opens the gate for the one packet that carries an owed ACK.
    ///
    /// With the gate closed quinn-proto sends an ACK when nothing else is queued,
    /// but nothing at all while data is queued; a bidirectional transfer would
    /// then starve. Only asked when the gate is closed and nothing was sent.
    pub(crate) fn open_for_owed_ack(&mut self, now: Instant) -> bool {
        if !self.rx_since_ack_check && self.owed_since.is_none() {
            return false;
        }
        self.rx_since_ack_check = false;
        let stats = self.inner.stats();
        let eliciting = ack_eliciting(&stats.frame_rx);
        if stats.frame_tx.acks != self.acks_sent {
            self.acks_sent = stats.frame_tx.acks;
            self.eliciting_at_ack = eliciting;
            self.owed_since = None;
        }
        let owed = eliciting - self.eliciting_at_ack;
        if owed == 0 {
            self.owed_since = None;
            return false;
        }
        let since = *self.owed_since.get_or_insert(now);
        if owed < ACK_ELICITING_FRAMES_MAX && now < since + ACK_DELAY_MAX {
            return false;
        }
        self.eliciting_at_ack = eliciting;
        self.owed_since = None;
        self.cc.set_gate(true);
        true
    }

    /// Whether the path MTU probe under way was answered or lost since.
    fn probe_is_over(&self) -> bool {
        u64::from(self.inner.current_mtu()) >= self.cc.probe_bytes()
            || self.inner.stats().path.lost_plpmtud_probes != self.probes_lost
    }

    /// Accounts for `bytes` that left in datagrams of `segment_bytes`.
    pub(crate) fn on_transmit(&mut self, now: Instant, bytes: u64, segment_bytes: u64) {
        if segment_bytes > u64::from(self.inner.current_mtu()) {
            self.cc.set_probe(segment_bytes);
            self.probes_lost = self.inner.stats().path.lost_plpmtud_probes;
        }
        let (rate, _) = self.pacing();
        self.pacer.on_sent(now, bytes, rate);
    }

    /// The earliest of quinn-proto's timeout, the handshake's and the age's deadlines, the pacer and
    /// an owed ACK.
    pub(crate) fn next_deadline(&mut self) -> Option<Instant> {
        let owed = self.owed_since.map(|since| since + ACK_DELAY_MAX);
        let ends = [self.handshake_deadline, self.age_deadline];
        [self.inner.poll_timeout(), self.paced_until, owed].into_iter().chain(ends).flatten().min()
    }

    pub(crate) fn stats(&self) -> ConnectionStats {
        let stats = self.inner.stats();
        let bbr = self.cc.bbr().map(super::bbr::BbrProbe::snapshot);
        ConnectionStats {
            rtt: stats.path.rtt,
            min_rtt: stats.path.min_rtt,
            cwnd_bytes: self.cc.cwnd_bytes(),
            inflight_bytes: self.cc.inflight_bytes(),
            pacing_rate_bps: match self.pacing().0 {
                u64::MAX => 0,
                rate => rate.saturating_mul(8),
            },
            mtu_bytes: stats.path.current_mtu,
            packets_sent: stats.path.sent_packets,
            packets_lost: stats.path.lost_packets,
            bytes_lost: stats.path.lost_bytes,
            congestion_events: stats.path.congestion_events,
            mtu_probes_lost: stats.path.lost_plpmtud_probes,
            black_holes: stats.path.black_holes_detected,
            udp_tx_bytes: stats.udp_tx.bytes,
            udp_tx_datagrams: stats.udp_tx.datagrams,
            udp_rx_bytes: stats.udp_rx.bytes,
            udp_rx_datagrams: stats.udp_rx.datagrams,
            acks_sent: stats.frame_tx.acks,
            acks_received: stats.frame_rx.acks,
            delivery_rate_bps: self.cc.delivery_rate_bytes_per_s().saturating_mul(8),
            latest_rtt: self.cc.latest_rtt(),
            ecn_events: self.cc.ecn_events(),
            key_updates: self.key_updates.as_ref().map_or(0, KeyUpdates::count),
            bbr_state: bbr.map(|bbr| bbr.state),
            bandwidth_estimate_bps: bbr.map_or(0, |bbr| bbr.max_bw_bytes_per_s.saturating_mul(8)),
            inflight_hi_bytes: bbr.and_then(|bbr| bbr.inflight_hi_bytes),
            resume_phase: self.bbr().map_or(ResumePhase::Off, BbrProbe::resume_phase),
        }
    }
}

/// Frames received that ask for an ACK (RFC 9000 §13.2): all but ACK, PADDING and CONNECTION_CLOSE.
fn ack_eliciting(frames: &FrameStats) -> u64 {
    frames.stream
        + frames.datagram
        + frames.ping
        + frames.crypto
        + frames.max_data
        + frames.max_stream_data
        + frames.max_streams_bidi
        + frames.max_streams_uni
        + frames.data_blocked
        + frames.stream_data_blocked
        + frames.streams_blocked_bidi
        + frames.streams_blocked_uni
        + frames.new_connection_id
        + frames.retire_connection_id
        + frames.new_token
        + frames.path_challenge
        + frames.path_response
        + frames.reset_stream
        + frames.stop_sending
        + frames.ack_frequency
        + frames.immediate_ack
        + u64::from(frames.handshake_done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_survive_publication() {
        let mut values: [u64; STATS_NUMBERS] = std::array::from_fn(|index| 1000 + index as u64);
        values[STATS_NUMBERS - 4] = State::ProbeRtt as u64 + 1;
        values[STATS_NUMBERS - 1] = ResumePhase::Retreated as u64;
        assert_eq!(ConnectionStats::from_array(values).to_array(), values);
    }
}
