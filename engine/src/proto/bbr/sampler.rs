//! Per-packet delivery-rate samples (draft-ietf-ccwg-bbr-06 §4.1.2).
//!
//! quinn-proto names packets by their send time only. The shard polls one batch
//! at a time, each with its own `now`: packets of equal send time left together,
//! in one message, and any of them stands for any other. `on_sent` appends a
//! record to a ring ordered by time, `on_ack` finds the next live one of its
//! time, at the front or by binary search. Invariants:
//!
//! - The ring is ordered by send time; a record with `bytes == 0` is dead and
//!   leaves when it reaches the front.
//! - quinn-proto does not say whether a packet counts as in flight. A packet of
//!   up to [`ACK_ONLY_BYTES_MAX`] *may* be a bare acknowledgement, which is never
//!   acknowledged to us; its bytes are kept apart until the next ACK reports the
//!   true number, and its record is the first to give way.
//! - The ring is bounded. When it is full, a packet is sent without a record: it
//!   counts when delivered or lost, but gives no sample of its own. Samples then
//!   come from the packets that have records.
//! - quinn-proto forgets a packet when it declares it lost, so a packet is
//!   counted once: as lost or as delivered, never both.

use std::collections::VecDeque;

use super::model;

/// The largest packet that can be a bare acknowledgement: a short header with a
/// 20-byte connection ID, the largest packet number and tag, and 64 ACK ranges
/// with ECN counts.
pub(super) const ACK_ONLY_BYTES_MAX: u32 = 320;

/// Bare acknowledgements remembered when nothing else is in flight.
const ACK_ONLY_TAIL_MAX: usize = 1024;

/// Records this far behind the newest acknowledged packet are bare
/// acknowledgements or belong to discarded keys: loss detection (RFC 9002 §6.1)
/// has dealt with everything else that old.
const STALE_DISTANCE: u64 = 4096;

/// One packet in flight: `P` of §4.1.2.1.2. One cache line.
#[derive(Debug, Clone, Copy)]
struct Sent {
    sent_ns: u64,
    first_sent_ns: u64,
    delivered_ns: u64,
    delivered: u64,
    lost: u64,
    tx_in_flight: u64,
    packet_number: u64,
    /// Bytes not yet acknowledged or lost; zero when the record is dead.
    bytes: u32,
    app_limited: bool,
}

/// `RS` of §4.1.2.1.3: what one ACK says.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RateSample {
    /// The packets acknowledged included one with a record: the fields below are set.
    pub(super) has_data: bool,
    /// Bytes acknowledged by this ACK.
    pub(super) newly_acked: u64,
    /// Round trip of the most recently sent packet.
    pub(super) rtt_ns: u64,
    /// When that packet was sent.
    pub(super) sent_ns: u64,
    /// `P.delivered`.
    pub(super) prior_delivered: u64,
    /// Bytes delivered from its sending to its acknowledgement.
    pub(super) delivered: u64,
    /// Bytes per second over the longer of the send and the ACK interval; zero
    /// when there is no reliable sample.
    pub(super) delivery_rate: u64,
    /// A bubble was in the pipe when it was sent.
    pub(super) app_limited: bool,
    /// Bytes in flight right after it was sent, itself included.
    pub(super) tx_in_flight: u64,
    /// Bytes lost since it was sent.
    pub(super) lost: u64,
}

/// A packet that was declared lost.
#[derive(Debug, Clone, Copy)]
pub(super) struct LostPacket {
    pub(super) packet_number: u64,
    pub(super) bytes: u64,
    pub(super) tx_in_flight: u64,
    /// Bytes lost since it was sent, itself included.
    pub(super) lost: u64,
    pub(super) app_limited: bool,
}

/// Walks over the packets of one loss detection, see [`Sampler::start_loss`].
#[derive(Debug)]
pub(super) struct LossScan {
    index: usize,
    end: usize,
    /// Live bytes in the range beyond what was reported lost.
    excess: u64,
    /// Bytes reported lost and not yet attributed.
    budget: u64,
}

/// See the [module documentation](self).
#[derive(Debug, Clone)]
pub(super) struct Sampler {
    ring: VecDeque<Sent>,
    packets_max: usize,
    /// Where the last acknowledged record was found: the next one follows it.
    hint: usize,
    /// `C.delivered`, bytes.
    pub(super) delivered: u64,
    delivered_ns: u64,
    first_sent_ns: u64,
    /// `C.lost`, bytes.
    pub(super) lost: u64,
    /// `C.app_limited`: the bubble has passed when more than this is delivered; 0 is off.
    app_limited_until: u64,
    /// In flight by quinn-proto's count at the last ACK, plus large packets since.
    in_flight_sure: u64,
    /// Packets since the last ACK that may be bare acknowledgements, bytes.
    in_flight_maybe: u64,
    min_rtt_ns: u64,
    newest: Option<Sent>,
    newly_acked: u64,
    peak_len: usize,
    /// Packets that were sent without a record because the ring was full.
    pub(super) unrecorded: u64,
}

impl Sampler {
    pub(super) fn new(now_ns: u64, packets_max: usize) -> Self {
        Self {
            ring: VecDeque::new(),
            packets_max: packets_max.max(ACK_ONLY_TAIL_MAX),
            hint: 0,
            delivered: 0,
            delivered_ns: now_ns,
            first_sent_ns: now_ns,
            lost: 0,
            app_limited_until: 0,
            in_flight_sure: 0,
            in_flight_maybe: 0,
            min_rtt_ns: u64::MAX,
            newest: None,
            newly_acked: 0,
            peak_len: 0,
            unrecorded: 0,
        }
    }

    /// `C.inflight`, bytes. What may be bare acknowledgements counts for at most
    /// `smss` × 2, or a receiver that only acknowledges would fill its own window.
    pub(super) fn in_flight(&self, smss: u64) -> u64 {
        self.in_flight_sure + self.in_flight_maybe.min(2 * smss)
    }

    /// Whether nothing but, perhaps, bare acknowledgements is in flight.
    pub(super) fn is_pipe_empty(&self, smss: u64) -> bool {
        self.in_flight_sure == 0 && self.in_flight_maybe < smss
    }

    /// `C.app_limited != 0`.
    pub(super) fn is_app_limited(&self) -> bool {
        self.app_limited_until != 0
    }

    /// `MarkConnectionAppLimited`: what is in flight now carries the bubble away.
    pub(super) fn mark_app_limited(&mut self) {
        self.app_limited_until = (self.delivered + self.in_flight_sure).max(1);
    }

    /// `OnPacketSent`.
    pub(super) fn on_sent(&mut self, now_ns: u64, bytes: u64, packet_number: u64, smss: u64) {
        if self.is_pipe_empty(smss) {
            self.first_sent_ns = now_ns;
            self.delivered_ns = now_ns;
            self.shrink();
        }
        let bytes = u32::try_from(bytes).expect("a datagram is at most 65527 bytes");
        if bytes <= ACK_ONLY_BYTES_MAX {
            self.in_flight_maybe += u64::from(bytes);
        } else {
            self.in_flight_sure += u64::from(bytes);
        }
        if self.ring.len() >= ACK_ONLY_TAIL_MAX {
            self.make_room();
        }
        if self.ring.len() >= self.packets_max {
            self.unrecorded += 1;
            return;
        }
        self.ring.push_back(Sent {
            sent_ns: now_ns,
            first_sent_ns: self.first_sent_ns,
            delivered_ns: self.delivered_ns,
            delivered: self.delivered,
            lost: self.lost,
            tx_in_flight: self.in_flight(smss),
            packet_number,
            bytes,
            app_limited: self.is_app_limited(),
        });
        self.peak_len = self.peak_len.max(self.ring.len());
    }

    /// `UpdateRateSample`: one packet of an ACK. `sent_ns` names it.
    pub(super) fn on_acked(&mut self, now_ns: u64, sent_ns: u64, bytes: u64) {
        self.delivered += bytes;
        self.delivered_ns = now_ns;
        self.newly_acked += bytes;
        let Some(index) = self.find(sent_ns) else { return };
        self.hint = index + 1;
        let record = &mut self.ring[index];
        let newest = *record;
        // A datagram of the handshake holds several packets, acknowledged one by one.
        record.bytes = record.bytes.saturating_sub(u32::try_from(bytes).unwrap_or(u32::MAX));
        let is_newer = |best: &Sent| {
            (newest.sent_ns, newest.packet_number) > (best.sent_ns, best.packet_number)
        };
        if self.newest.as_ref().is_none_or(is_newer) {
            self.newest = Some(newest);
            self.first_sent_ns = newest.sent_ns;
        }
        self.pop_dead();
    }

    /// `GenerateRateSample`: ends an ACK. `in_flight` is quinn-proto's count.
    pub(super) fn finish_ack(&mut self, now_ns: u64, in_flight: u64) -> RateSample {
        self.in_flight_sure = in_flight;
        self.in_flight_maybe = 0;
        if self.app_limited_until != 0 && self.delivered > self.app_limited_until {
            self.app_limited_until = 0;
        }
        let newly_acked = std::mem::take(&mut self.newly_acked);
        if in_flight == 0 {
            self.ring.clear();
            self.hint = 0;
        }
        let Some(packet) = self.newest.take() else {
            return RateSample { newly_acked, ..RateSample::default() };
        };
        self.drop_stale(packet.packet_number);
        let rtt_ns = now_ns.saturating_sub(packet.sent_ns);
        self.min_rtt_ns = self.min_rtt_ns.min(rtt_ns);
        let send_elapsed = packet.sent_ns.saturating_sub(packet.first_sent_ns);
        let ack_elapsed = now_ns.saturating_sub(packet.delivered_ns);
        let interval = send_elapsed.max(ack_elapsed);
        let delivered = self.delivered - packet.delivered;
        let reliable = interval >= self.min_rtt_ns;
        RateSample {
            has_data: true,
            newly_acked,
            rtt_ns,
            sent_ns: packet.sent_ns,
            prior_delivered: packet.delivered,
            delivered,
            delivery_rate: if reliable { model::rate(delivered, interval) } else { 0 },
            app_limited: packet.app_limited,
            tx_in_flight: packet.tx_in_flight,
            lost: self.lost - packet.lost,
        }
    }

    /// Begins a loss detection: `bytes` were lost among the packets sent until
    /// `sent_ns`. [`next_lost`](Self::next_lost) then gives the packets in order.
    pub(super) fn start_loss(&mut self, sent_ns: u64, bytes: u64) -> LossScan {
        let end = self.ring.partition_point(|p| p.sent_ns <= sent_ns);
        let live: u64 = self.ring.range(..end).map(|p| u64::from(p.bytes)).sum();
        self.in_flight_sure = self.in_flight_sure.saturating_sub(bytes);
        LossScan { index: 0, end, excess: live.saturating_sub(bytes), budget: bytes }
    }

    /// The next packet of a loss detection; `None` ends it, and books what was
    /// lost without a record.
    ///
    /// What is still live in the range is lost, except what the reported sum does
    /// not cover: bare acknowledgements first, then packets of another number
    /// space, which stay in flight.
    pub(super) fn next_lost(&mut self, scan: &mut LossScan) -> Option<LostPacket> {
        while scan.index < scan.end {
            let record = &mut self.ring[scan.index];
            scan.index += 1;
            let bytes = u64::from(record.bytes);
            if bytes == 0 {
                continue;
            }
            if record.bytes <= ACK_ONLY_BYTES_MAX && scan.excess >= bytes {
                scan.excess -= bytes;
                record.bytes = 0;
                continue;
            }
            if scan.budget < bytes {
                continue;
            }
            scan.budget -= bytes;
            record.bytes = 0;
            self.lost += bytes;
            return Some(LostPacket {
                packet_number: record.packet_number,
                bytes,
                tx_in_flight: record.tx_in_flight,
                lost: self.lost - record.lost,
                app_limited: record.app_limited,
            });
        }
        self.lost += std::mem::take(&mut scan.budget);
        self.pop_dead();
        None
    }

    /// A live record with this send time: after the last hit, at the front, or by
    /// binary search.
    fn find(&self, sent_ns: u64) -> Option<usize> {
        let is_it =
            |i: usize| self.ring.get(i).is_some_and(|p| p.sent_ns == sent_ns && p.bytes != 0);
        if is_it(self.hint) {
            return Some(self.hint);
        }
        if is_it(0) {
            return Some(0);
        }
        let first = self.ring.partition_point(|p| p.sent_ns < sent_ns);
        (first..self.ring.len())
            .take_while(|&i| self.ring[i].sent_ns == sent_ns)
            .find(|&i| self.ring[i].bytes != 0)
    }

    fn pop_dead(&mut self) {
        while self.ring.front().is_some_and(|p| p.bytes == 0) {
            self.pop_front();
        }
    }

    fn pop_front(&mut self) {
        self.ring.pop_front();
        self.hint = self.hint.saturating_sub(1);
    }

    fn drop_stale(&mut self, newest: u64) {
        while self
            .ring
            .front()
            .is_some_and(|p| p.bytes == 0 || p.packet_number + STALE_DISTANCE < newest)
        {
            self.pop_front();
        }
    }

    /// With nothing sure in flight the ring holds bare acknowledgements: the oldest goes.
    fn make_room(&mut self) {
        if self.in_flight_sure == 0 {
            self.pop_front();
        }
    }

    /// Gives memory back when the pipe runs empty, if the last busy time did not
    /// need it: one allocation at most per idle time.
    fn shrink(&mut self) {
        if self.ring.is_empty() && self.ring.capacity() > 4 * self.peak_len.max(64) {
            self.ring.shrink_to(2 * self.peak_len.max(64));
        }
        self.peak_len = self.ring.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMSS: u64 = 1200;
    const MS: u64 = 1_000_000;

    fn send(sampler: &mut Sampler, at_ms: u64, packet_number: u64) {
        sampler.on_sent(at_ms * MS, SMSS, packet_number, SMSS);
    }

    fn lost(sampler: &mut Sampler, sent_ns: u64, bytes: u64) -> Vec<u64> {
        let mut scan = sampler.start_loss(sent_ns, bytes);
        std::iter::from_fn(|| sampler.next_lost(&mut scan)).map(|p| p.packet_number).collect()
    }

    #[test]
    fn record_is_one_cache_line() {
        assert_eq!(size_of::<Sent>(), 64);
    }

    #[test]
    fn rate_is_bounded_by_the_slower_of_sending_and_acknowledging() {
        let mut sampler = Sampler::new(1, 4096);
        for n in 0..10 {
            send(&mut sampler, 10 + n, n);
        }
        // All ten acknowledged at once: the ACK interval runs from the first sending.
        for n in 0..10 {
            sampler.on_acked(60 * MS, (10 + n) * MS, SMSS);
        }
        let sample = sampler.finish_ack(60 * MS, 0);
        assert_eq!(sample.newly_acked, 12_000);
        assert_eq!(
            sample.rtt_ns,
            41 * MS,
            "trap 10: of the packet sent last, from its real send time"
        );
        assert_eq!(sample.delivery_rate, model::rate(12_000, 50 * MS));
        assert_eq!(sample.tx_in_flight, 12_000);
        assert!(sampler.ring.is_empty() && sampler.is_pipe_empty(SMSS));
    }

    #[test]
    fn compressed_acks_are_capped_by_the_send_rate() {
        let mut sampler = Sampler::new(1, 4096);
        let mut now = 0;
        // Steady state: a packet each millisecond, acknowledged 20 ms later …
        for n in 0..100u64 {
            now = n;
            send(&mut sampler, 1000 + n, n);
            if n >= 20 {
                sampler.on_acked((1000 + n) * MS, (980 + n) * MS, SMSS);
                let sample = sampler.finish_ack((1000 + n) * MS, 20 * SMSS);
                assert!(sample.delivery_rate <= 1_300_000, "{sample:?}");
            }
        }
        // … then the last 20 come back in one instant: the send rate caps the sample.
        let at = (1000 + now + 20) * MS;
        for n in 80..100 {
            sampler.on_acked(at, (1000 + n) * MS, SMSS);
        }
        let sample = sampler.finish_ack(at, 0);
        assert!(sample.delivery_rate <= 1_260_000, "{sample:?}");
    }

    #[test]
    fn app_limited_bubble_lasts_until_it_is_delivered() {
        let mut sampler = Sampler::new(1, 4096);
        send(&mut sampler, 1, 0);
        sampler.mark_app_limited();
        send(&mut sampler, 2, 1);
        send(&mut sampler, 3, 2);
        sampler.on_acked(50 * MS, MS, SMSS);
        assert!(!sampler.finish_ack(50 * MS, 2 * SMSS).app_limited, "sent before the bubble");
        assert!(sampler.is_app_limited());
        sampler.on_acked(51 * MS, 2 * MS, SMSS);
        assert!(sampler.finish_ack(51 * MS, SMSS).app_limited);
        assert!(!sampler.is_app_limited(), "the bubble has left the pipe");
        send(&mut sampler, 52, 3);
        sampler.on_acked(90 * MS, 52 * MS, SMSS);
        assert!(!sampler.finish_ack(90 * MS, 0).app_limited);
    }

    #[test]
    fn acks_out_of_order_and_of_unknown_packets_still_count() {
        let mut sampler = Sampler::new(1, 4096);
        for n in 0..5 {
            send(&mut sampler, n + 1, n);
        }
        sampler.on_acked(40 * MS, 4 * MS, SMSS);
        sampler.on_acked(40 * MS, 2 * MS, SMSS);
        sampler.on_acked(40 * MS, 77 * MS, 1500); // an MTU probe: never announced
        let sample = sampler.finish_ack(40 * MS, 3 * SMSS);
        assert_eq!(sample.newly_acked, 3900);
        assert_eq!(sample.sent_ns, 4 * MS);
        assert_eq!(sampler.ring.len(), 5, "the front is still in flight");
        sampler.on_acked(41 * MS, MS, SMSS);
        sampler.finish_ack(41 * MS, 2 * SMSS);
        assert_eq!(sampler.ring.len(), 3);
        // The same packet twice: delivered is quinn's word, but no record, no sample.
        sampler.on_acked(42 * MS, MS, SMSS);
        assert!(!sampler.finish_ack(42 * MS, 2 * SMSS).has_data);
    }

    #[test]
    fn trap_9_and_10_lost_set_is_what_is_live_up_to_the_largest_lost() {
        let mut sampler = Sampler::new(1, 4096);
        for n in 0..8 {
            send(&mut sampler, n + 1, n);
        }
        for n in [1, 4, 7] {
            sampler.on_acked(50 * MS, (n + 1) * MS, SMSS);
        }
        sampler.finish_ack(50 * MS, 5 * SMSS);
        assert_eq!(lost(&mut sampler, 6 * MS, 4 * SMSS), [0, 2, 3, 5]);
        assert_eq!(sampler.lost, 4 * SMSS);
        assert_eq!(sampler.in_flight(SMSS), SMSS);
        // Reported again, or acknowledged after all: nothing live is left to count.
        assert!(lost(&mut sampler, 6 * MS, 0).is_empty());
        sampler.on_acked(60 * MS, 3 * MS, SMSS);
        assert!(!sampler.finish_ack(60 * MS, SMSS).has_data);
        assert_eq!(sampler.lost, 4 * SMSS);
    }

    #[test]
    fn bare_acknowledgements_are_not_taken_for_lost_packets() {
        let mut sampler = Sampler::new(1, 4096);
        send(&mut sampler, 1, 0);
        sampler.on_sent(2 * MS, 50, 1, SMSS);
        send(&mut sampler, 3, 2);
        send(&mut sampler, 4, 3);
        sampler.on_acked(50 * MS, 4 * MS, SMSS);
        sampler.finish_ack(50 * MS, 2 * SMSS);
        assert_eq!(lost(&mut sampler, 3 * MS, 2 * SMSS), [0, 2]);
        assert_eq!(sampler.in_flight(SMSS), 0);
        assert!(sampler.ring.is_empty(), "{:?}", sampler.ring);
    }

    #[test]
    fn packets_of_another_space_stay_in_flight() {
        let mut sampler = Sampler::new(1, 4096);
        send(&mut sampler, 1, 0); // Handshake
        send(&mut sampler, 2, 0); // 1-RTT, lost … one of the two, and the sum says one
        assert_eq!(lost(&mut sampler, 2 * MS, SMSS).len(), 1);
        assert_eq!(sampler.ring.iter().filter(|p| p.bytes != 0).count(), 1);
    }

    #[test]
    fn losses_without_a_record_are_still_booked() {
        let mut sampler = Sampler::new(1, 4096);
        send(&mut sampler, 1, 0);
        assert_eq!(lost(&mut sampler, MS, 5000), [0]);
        assert_eq!(sampler.lost, 5000);
    }

    #[test]
    fn full_ring_sends_without_records_and_recovers() {
        let mut sampler = Sampler::new(1, 1024);
        for n in 0..1500 {
            send(&mut sampler, n + 1, n);
        }
        assert_eq!(sampler.ring.len(), 1024);
        assert_eq!(sampler.unrecorded, 476);
        for n in 0..1500 {
            sampler.on_acked(5000 * MS, (n + 1) * MS, SMSS);
        }
        let sample = sampler.finish_ack(5000 * MS, 0);
        assert_eq!(sample.newly_acked, 1500 * SMSS);
        assert_eq!(sample.sent_ns, 1024 * MS, "the newest with a record");
        send(&mut sampler, 5001, 1500);
        assert_eq!(sampler.ring.len(), 1);
    }

    #[test]
    fn a_receiver_of_bulk_does_not_fill_its_own_window_or_memory() {
        let mut sampler = Sampler::new(1, 1 << 18);
        for n in 0..100_000 {
            sampler.on_sent(n + 1, 45, n, SMSS);
        }
        assert_eq!(sampler.in_flight(SMSS), 2 * SMSS);
        assert!(sampler.ring.len() <= 1024);
    }

    #[test]
    fn stale_records_leave_when_newer_packets_are_acknowledged() {
        let mut sampler = Sampler::new(1, 1 << 18);
        sampler.on_sent(1, 40, 0, SMSS);
        for n in 1..6000u64 {
            sampler.on_sent(n + 1, SMSS, n, SMSS);
        }
        for n in 1..5000u64 {
            sampler.on_acked(20_000, n + 1, SMSS);
        }
        sampler.finish_ack(20_000, 1000 * SMSS);
        assert_eq!(sampler.ring.len(), 1000);
    }

    #[test]
    fn a_coalesced_datagram_is_acknowledged_in_parts() {
        let mut sampler = Sampler::new(1, 4096);
        send(&mut sampler, 1, 0);
        sampler.on_acked(20 * MS, MS, 700);
        assert!(sampler.finish_ack(20 * MS, 500).has_data);
        sampler.on_acked(21 * MS, MS, 500);
        let sample = sampler.finish_ack(21 * MS, 0);
        assert!(sample.has_data && sampler.ring.is_empty());
        assert_eq!(sampler.delivered, SMSS);
    }

    #[test]
    fn memory_returns_after_a_large_flight() {
        let mut sampler = Sampler::new(1, 1 << 18);
        for n in 0..10_000u64 {
            sampler.on_sent(n + 1, SMSS, n, SMSS);
        }
        for n in 0..10_000u64 {
            sampler.on_acked(20_000, n + 1, SMSS);
        }
        sampler.finish_ack(20_000, 0);
        send(&mut sampler, 30, 10_000);
        sampler.on_acked(40 * MS, 30 * MS, SMSS);
        sampler.finish_ack(40 * MS, 0);
        send(&mut sampler, 50, 10_001);
        assert!(sampler.ring.capacity() < 1024, "{}", sampler.ring.capacity());
    }
}
