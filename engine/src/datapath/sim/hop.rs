//! One direction of a link: policer, tail-drop queue, transmitter, wire.
//!
//! A state machine without a clock: the network hands it packets and events
//! with their time, it plans its own next events. A packet waits in `queue`,
//! is in `in_service` while its bits leave, and is then on the wire: only an
//! [`Event::Arrival`] knows it. The first `released` packets of the queue may
//! be transmitted; the others are held back by aggregation.
//!
//! Invariants: `queue_bytes` is the sum over `queue`; while something is
//! released, the transmitter is busy; packets that no `reorder` picked arrive
//! in the order in which they were transmitted.

use std::collections::VecDeque;

use super::link::{LinkConfig, LinkConfigError, LinkCounters, LinkStep};
use super::log::Fate;
use super::packet::{Event, EventQueue, HopId, PacketId, PacketPool};
use super::policer::Policer;
use super::rng::SimRng;
use super::wire::Wire;
use crate::datapath::Ecn;

/// Nanoseconds in a microsecond.
pub(super) const NS_PER_US: u64 = 1_000;
const NS_PER_MS: u64 = 1_000_000;
/// Bit-nanoseconds in a byte at 1 bit/s: what makes times of whole bytes integers.
pub(super) const BIT_NS_PER_BYTE: u64 = 8_000_000_000;

/// A packet that waits or is being transmitted.
#[derive(Debug, Clone, Copy)]
struct Queued {
    packet: PacketId,
    bytes: u64,
    since_ns: u64,
}

/// What left the transmitter, and what became of it.
#[derive(Debug)]
pub(super) struct Departed {
    pub(super) packet: PacketId,
    /// Set when the packet was lost; its arrival is planned otherwise.
    pub(super) lost: Option<Fate>,
}

#[derive(Debug)]
pub(super) struct Hop {
    id: HopId,
    config: LinkConfig,
    wire: Wire,
    policer: Policer,
    steps: VecDeque<LinkStep>,
    queue_limit_bytes: u64,
    queue: VecDeque<Queued>,
    queue_bytes: u64,
    released: usize,
    released_bytes: u64,
    release_at_ns: Option<u64>,
    in_service: Option<Queued>,
    /// When the packet in service, or the last one, has left.
    departure_ns: u64,
    /// What integer division left of the last transmission time, in 1 / `rate_bps` ns.
    departure_fraction: u64,
    counters: LinkCounters,
}

impl Hop {
    /// A hop that starts as `initial` and takes `steps` when their time has come.
    /// The configurations have been checked.
    pub(super) fn new(
        id: HopId,
        seed: u64,
        initial: LinkConfig,
        steps: Vec<LinkStep>,
        events: &mut EventQueue,
    ) -> Self {
        for step in &steps {
            events.plan(step.at_ms * NS_PER_MS, Event::Step(id));
        }
        Self {
            id,
            wire: Wire::new(&initial, SimRng::new(seed, u64::from(id.0))),
            policer: Policer::new(&initial),
            steps: steps.into(),
            queue_limit_bytes: initial.queue.bytes_at(initial.rate_bps),
            config: initial,
            queue: VecDeque::new(),
            queue_bytes: 0,
            released: 0,
            released_bytes: 0,
            release_at_ns: None,
            in_service: None,
            departure_ns: 0,
            departure_fraction: 0,
            counters: LinkCounters::default(),
        }
    }

    pub(super) fn config(&self) -> &LinkConfig {
        &self.config
    }

    pub(super) fn counters(&self) -> LinkCounters {
        LinkCounters { queue_bytes: self.queue_bytes, ..self.counters }
    }

    /// Takes a packet at the near end; an error says why it was dropped instead.
    pub(super) fn handle_packet(
        &mut self,
        now_ns: u64,
        packet: PacketId,
        packets: &mut PacketPool,
        events: &mut EventQueue,
    ) -> Result<(), Fate> {
        let bytes = packets[packet].ip_bytes();
        self.admit(now_ns, bytes)?;
        self.queue.push_back(Queued { packet, bytes, since_ns: now_ns });
        self.queue_bytes += bytes;
        self.update_release(now_ns, events);
        self.start_transmission(now_ns, packets, events);
        self.counters.queue_bytes_max = self.counters.queue_bytes_max.max(self.queue_bytes);
        Ok(())
    }

    /// The packet in service has left. `None` when the event is stale: the link
    /// went down in between.
    pub(super) fn handle_departure(
        &mut self,
        now_ns: u64,
        packets: &mut PacketPool,
        events: &mut EventQueue,
    ) -> Option<Departed> {
        if self.departure_ns != now_ns {
            return None;
        }
        let packet = self.in_service.take()?.packet;
        self.start_transmission(now_ns, packets, events);
        let lost = if self.wire.loses() {
            self.counters.dropped_loss += 1;
            Some(Fate::DroppedLoss)
        } else {
            self.wire.carry(now_ns, self.id, packet, &mut self.counters, packets, events);
            None
        };
        Some(Departed { packet, lost })
    }

    /// The oldest held packet may wait no longer.
    pub(super) fn handle_release(
        &mut self,
        now_ns: u64,
        packets: &mut PacketPool,
        events: &mut EventQueue,
    ) {
        if self.release_at_ns == Some(now_ns) {
            self.release_all();
            self.start_transmission(now_ns, packets, events);
        }
    }

    /// A packet comes out of the far end, unless the link is down.
    pub(super) fn handle_arrival(&mut self, bytes: u64) -> Result<(), Fate> {
        if self.config.down {
            self.counters.dropped_down += 1;
            return Err(Fate::DroppedDown);
        }
        self.counters.delivered += 1;
        self.counters.delivered_bytes += bytes;
        Ok(())
    }

    /// Takes the next planned step; returns the packets that it dropped.
    pub(super) fn handle_step(
        &mut self,
        now_ns: u64,
        packets: &mut PacketPool,
        events: &mut EventQueue,
    ) -> Vec<PacketId> {
        let step = self.steps.pop_front().expect("one event for each step");
        self.apply(now_ns, step.config, packets, events)
    }

    /// Replaces the configuration; returns the packets that this dropped
    /// (only when the link goes down).
    pub(super) fn set_config(
        &mut self,
        now_ns: u64,
        config: LinkConfig,
        packets: &mut PacketPool,
        events: &mut EventQueue,
    ) -> Result<Vec<PacketId>, LinkConfigError> {
        config.check()?;
        Ok(self.apply(now_ns, config, packets, events))
    }

    /// A packet in service finishes at the old rate; those that wait leave at the new one.
    fn apply(
        &mut self,
        now_ns: u64,
        config: LinkConfig,
        packets: &mut PacketPool,
        events: &mut EventQueue,
    ) -> Vec<PacketId> {
        if config.rate_bps != self.config.rate_bps {
            self.departure_fraction = 0;
        }
        self.policer.reconfigure(now_ns, &self.config, &config);
        self.wire.reconfigure(&config);
        self.queue_limit_bytes = config.queue.bytes_at(config.rate_bps);
        self.config = config;
        if self.config.down {
            return self.drop_all();
        }
        self.update_release(now_ns, events);
        self.start_transmission(now_ns, packets, events);
        Vec::new()
    }

    fn drop_all(&mut self) -> Vec<PacketId> {
        let waiting = self.queue.drain(..);
        let dropped: Vec<_> =
            self.in_service.take().into_iter().chain(waiting).map(|queued| queued.packet).collect();
        self.queue_bytes = 0;
        self.released = 0;
        self.released_bytes = 0;
        self.release_at_ns = None;
        self.counters.dropped_down += dropped.len() as u64;
        dropped
    }

    fn admit(&mut self, now_ns: u64, bytes: u64) -> Result<(), Fate> {
        if self.config.down {
            self.counters.dropped_down += 1;
            return Err(Fate::DroppedDown);
        }
        if bytes > self.config.mtu {
            self.counters.dropped_mtu += 1;
            return Err(Fate::DroppedMtu);
        }
        if !self.policer.admits(now_ns, bytes) {
            self.counters.dropped_policer += 1;
            return Err(Fate::DroppedPolicer);
        }
        let idle = self.in_service.is_none() && self.queue.is_empty();
        if !idle && self.queue_bytes.saturating_add(bytes) > self.queue_limit_bytes {
            self.counters.dropped_queue += 1;
            return Err(Fate::DroppedQueue);
        }
        Ok(())
    }

    /// Releases what waits, or arms the timer that will.
    fn update_release(&mut self, now_ns: u64, events: &mut EventQueue) {
        let held_bytes = self.queue_bytes - self.released_bytes;
        if held_bytes == 0 {
            return;
        }
        let config = &self.config;
        let enough = config.aggregation_bytes > 0 && held_bytes >= config.aggregation_bytes;
        if enough || !config.aggregates() {
            self.release_all();
        } else if self.release_at_ns.is_none() {
            let at_ns = now_ns + config.aggregation_us * NS_PER_US;
            self.release_at_ns = Some(at_ns);
            events.plan(at_ns, Event::Release(self.id));
        }
    }

    fn release_all(&mut self) {
        self.released = self.queue.len();
        self.released_bytes = self.queue_bytes;
        self.release_at_ns = None;
    }

    /// Gives the transmitter its next packet if it is idle and one may leave.
    fn start_transmission(
        &mut self,
        now_ns: u64,
        packets: &mut PacketPool,
        events: &mut EventQueue,
    ) {
        if self.in_service.is_some() || self.released == 0 {
            return;
        }
        let queued = self.queue.pop_front().expect("released packets are in the queue");
        self.queue_bytes -= queued.bytes;
        self.released -= 1;
        self.released_bytes -= queued.bytes;
        self.mark(now_ns, queued, packets);
        if self.departure_ns != now_ns {
            // The transmitter stood idle: nothing is left over from the last packet.
            self.departure_fraction = 0;
        }
        let bit_ns = queued.bytes * BIT_NS_PER_BYTE + self.departure_fraction;
        self.departure_ns = now_ns + bit_ns / self.config.rate_bps;
        self.departure_fraction = bit_ns % self.config.rate_bps;
        self.in_service = Some(queued);
        events.plan(self.departure_ns, Event::Departure(self.id));
    }

    /// Marks an ECN-capable packet that waited too long (RFC 3168 §5).
    fn mark(&mut self, now_ns: u64, queued: Queued, packets: &mut PacketPool) {
        let threshold_us = self.config.ecn_threshold_us;
        let waited_ns = now_ns - queued.since_ns;
        let ecn = &mut packets[queued.packet].ecn;
        if threshold_us > 0
            && waited_ns > threshold_us * NS_PER_US
            && matches!(*ecn, Ecn::Ect0 | Ecn::Ect1)
        {
            *ecn = Ecn::Ce;
            self.counters.marked_ce += 1;
        }
    }
}
