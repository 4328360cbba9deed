//! The wire behind a transmitter: loss, corruption, delay, jitter, reordering,
//! duplication.
//!
//! Invariant: packets that no `reorder` picked arrive in the order in which
//! they were transmitted.

use super::hop::NS_PER_US;
use super::link::{LinkConfig, LinkCounters};
use super::packet::{Event, EventQueue, HopId, PacketId, PacketPool};
use super::rng::{Probability, SimRng};

/// What happens to a packet between the transmitter and the far end.
#[derive(Debug)]
pub(super) struct Wire {
    loss: Probability,
    loss_every: u64,
    reorder: Probability,
    reorder_ns: u64,
    duplicate: Probability,
    corrupt: Probability,
    delay_ns: u64,
    jitter_ns: u64,
    rng: SimRng,
    /// Packets since `loss_every` lost one.
    since_loss: u64,
    /// When the last packet that was not reordered arrives.
    last_arrival_ns: u64,
}

impl Wire {
    pub(super) fn new(config: &LinkConfig, rng: SimRng) -> Self {
        let mut wire = Self {
            loss: Probability::NEVER,
            loss_every: 0,
            reorder: Probability::NEVER,
            reorder_ns: 0,
            duplicate: Probability::NEVER,
            corrupt: Probability::NEVER,
            delay_ns: 0,
            jitter_ns: 0,
            rng,
            since_loss: 0,
            last_arrival_ns: 0,
        };
        wire.reconfigure(config);
        wire
    }

    pub(super) fn reconfigure(&mut self, config: &LinkConfig) {
        self.loss = Probability::new(config.loss);
        self.loss_every = config.loss_every;
        self.reorder = Probability::new(config.reorder);
        self.reorder_ns = config.reorder_us * NS_PER_US;
        self.duplicate = Probability::new(config.duplicate);
        self.corrupt = Probability::new(config.corrupt);
        self.delay_ns = config.delay_us * NS_PER_US;
        self.jitter_ns = config.jitter_us * NS_PER_US;
    }

    pub(super) fn loses(&mut self) -> bool {
        if self.loss_every > 0 {
            self.since_loss += 1;
            if self.since_loss >= self.loss_every {
                self.since_loss = 0;
                return true;
            }
        }
        self.rng.chance(self.loss)
    }

    /// Plans when the packet, and its copy if it gets one, comes out.
    pub(super) fn carry(
        &mut self,
        now_ns: u64,
        hop: HopId,
        packet: PacketId,
        counters: &mut LinkCounters,
        packets: &mut PacketPool,
        events: &mut EventQueue,
    ) {
        if self.rng.chance(self.corrupt) && self.flip_one_bit(&mut packets[packet].payload) {
            packets[packet].corrupted = true;
            counters.corrupted += 1;
        }
        let jitter_ns = if self.jitter_ns > 0 { self.rng.up_to(self.jitter_ns) } else { 0 };
        let mut arrival_ns = (now_ns + self.delay_ns + jitter_ns).max(self.last_arrival_ns);
        if self.rng.chance(self.reorder) {
            arrival_ns += self.reorder_ns;
            counters.reordered += 1;
        } else {
            self.last_arrival_ns = arrival_ns;
        }
        events.plan(arrival_ns, Event::Arrival(hop, packet));
        if self.rng.chance(self.duplicate) {
            let copy = packets.duplicate(packet);
            events.plan(arrival_ns, Event::Arrival(hop, copy));
            counters.duplicated += 1;
        }
    }

    fn flip_one_bit(&mut self, payload: &mut [u8]) -> bool {
        let Some(last_bit) = (payload.len() as u64 * 8).checked_sub(1) else {
            return false;
        };
        let bit = self.rng.up_to(last_bit) as usize;
        payload[bit / 8] ^= 1 << (bit % 8);
        true
    }
}
