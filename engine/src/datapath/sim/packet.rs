//! Packets in flight, recycled, and the queue of what happens when.
//!
//! A packet lives in the [`PacketPool`] from `transmit` until it is received or
//! dropped; everything else holds its index. A freed packet keeps its payload
//! buffer, so that the steady state does not allocate.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::{Ipv6Addr, SocketAddrV6};

use super::link::HEADER_BYTES;
use super::network::EndpointId;
use crate::datapath::Ecn;

/// Index of a packet in the [`PacketPool`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PacketId(u32);

/// Index of one direction of a link or of an access hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct HopId(pub(super) u32);

/// The hops between two hosts: at most the sender's access, a link, the receiver's access.
pub(super) type Path = [Option<HopId>; 3];

#[derive(Debug)]
pub(super) struct Packet {
    /// Who it seems to come from: after address translation.
    pub(super) from: SocketAddrV6,
    pub(super) to: SocketAddrV6,
    pub(super) ecn: Ecn,
    pub(super) payload: Vec<u8>,
    /// A bit was flipped on the way.
    pub(super) corrupted: bool,
    pub(super) path: Path,
    /// Index into `path` of the hop that it is on.
    pub(super) stage: u8,
    /// Whose TX ring slot it occupies until its first hop has transmitted it.
    pub(super) ring_slot: Option<EndpointId>,
    in_use: bool,
}

impl Packet {
    /// IP bytes: payload and headers.
    pub(super) fn ip_bytes(&self) -> u64 {
        self.payload.len() as u64 + HEADER_BYTES
    }

    pub(super) fn hop(&self) -> Option<HopId> {
        self.path.get(usize::from(self.stage)).copied().flatten()
    }

    /// Moves on to the next hop of the path, if there is one.
    pub(super) fn next_hop(&mut self) -> Option<HopId> {
        loop {
            self.stage += 1;
            if usize::from(self.stage) >= self.path.len() {
                return None;
            }
            if let Some(hop) = self.hop() {
                return Some(hop);
            }
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct PacketPool {
    packets: Vec<Packet>,
    free: Vec<PacketId>,
}

impl PacketPool {
    /// A packet with an empty payload buffer; the caller fills in the rest.
    pub(super) fn take(&mut self) -> PacketId {
        if let Some(id) = self.free.pop() {
            self[id].in_use = true;
            self[id].corrupted = false;
            return id;
        }
        let id = PacketId(u32::try_from(self.packets.len()).expect("under 2^32 packets in flight"));
        let nowhere = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0);
        self.packets.push(Packet {
            from: nowhere,
            to: nowhere,
            ecn: Ecn::NotEct,
            payload: Vec::new(),
            corrupted: false,
            path: [None; 3],
            stage: 0,
            ring_slot: None,
            in_use: true,
        });
        id
    }

    /// A second packet with the same content.
    pub(super) fn duplicate(&mut self, id: PacketId) -> PacketId {
        let copy = self.take();
        let mut payload = std::mem::take(&mut self[copy].payload);
        let Packet { from, to, ecn, corrupted, path, stage, .. } = self[id];
        payload.extend_from_slice(&self[id].payload);
        self[copy] = Packet {
            from,
            to,
            ecn,
            payload,
            corrupted,
            path,
            stage,
            ring_slot: None,
            in_use: true,
        };
        copy
    }

    /// Gives a packet back; its buffer is kept for the next one.
    pub(super) fn release(&mut self, id: PacketId) {
        let packet = &mut self[id];
        assert!(packet.in_use, "packet released twice");
        packet.in_use = false;
        assert!(packet.ring_slot.is_none(), "packet released from within a TX ring");
        packet.payload.clear();
        packet.stage = 0;
        self.free.push(id);
    }

    /// How many packets are in use.
    pub(super) fn in_use(&self) -> usize {
        self.packets.len() - self.free.len()
    }
}

impl std::ops::Index<PacketId> for PacketPool {
    type Output = Packet;
    fn index(&self, id: PacketId) -> &Packet {
        &self.packets[id.0 as usize]
    }
}

impl std::ops::IndexMut<PacketId> for PacketPool {
    fn index_mut(&mut self, id: PacketId) -> &mut Packet {
        &mut self.packets[id.0 as usize]
    }
}

/// What happens at a point of virtual time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    /// The hop's transmitter has sent its packet's last bit.
    Departure(HopId),
    /// The hop's oldest held packet has waited long enough.
    Release(HopId),
    /// A packet comes out of the hop's far end.
    Arrival(HopId, PacketId),
    /// The hop's next planned change.
    Step(HopId),
}

/// Events in order of time, those of one instant in the order in which they were planned.
#[derive(Debug, Default)]
pub(super) struct EventQueue {
    heap: BinaryHeap<Reverse<(u64, u64, Event)>>,
    planned: u64,
}

impl EventQueue {
    pub(super) fn plan(&mut self, at_ns: u64, event: Event) {
        self.heap.push(Reverse((at_ns, self.planned, event)));
        self.planned += 1;
    }

    pub(super) fn next_ns(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse((at_ns, _, _))| *at_ns)
    }

    /// Takes the next event if it happens at `until_ns` or before.
    pub(super) fn pop_due(&mut self, until_ns: u64) -> Option<(u64, Event)> {
        if self.next_ns()? > until_ns {
            return None;
        }
        self.heap.pop().map(|Reverse((at_ns, _, event))| (at_ns, event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_keep_the_order_of_time_then_of_planning() {
        let mut events = EventQueue::default();
        events.plan(5, Event::Step(HopId(1)));
        events.plan(3, Event::Release(HopId(2)));
        events.plan(5, Event::Departure(HopId(0)));
        assert_eq!(events.pop_due(2), None);
        assert_eq!(events.pop_due(9), Some((3, Event::Release(HopId(2)))));
        assert_eq!(events.pop_due(9), Some((5, Event::Step(HopId(1)))));
        assert_eq!(events.pop_due(9), Some((5, Event::Departure(HopId(0)))));
        assert_eq!(events.pop_due(9), None);
    }

    #[test]
    fn a_released_packet_comes_back_with_its_buffer() {
        let mut pool = PacketPool::default();
        let id = pool.take();
        pool[id].payload.extend_from_slice(&[1; 1200]);
        pool[id].ring_slot = Some(EndpointId(3));
        let copy = pool.duplicate(id);
        assert_eq!(pool[copy].payload, pool[id].payload);
        assert_eq!(pool[copy].ring_slot.take(), None);
        assert_eq!(pool[id].ring_slot.take(), Some(EndpointId(3)));
        assert_eq!(pool.in_use(), 2);
        pool.release(id);
        let again = pool.take();
        assert_eq!(again, id);
        assert!(pool[again].payload.is_empty() && pool[again].payload.capacity() >= 1200);
        assert_eq!(pool[again].ring_slot, None);
    }

    #[test]
    fn a_path_skips_hops_that_are_not_there() {
        let mut pool = PacketPool::default();
        let id = pool.take();
        pool[id].path = [Some(HopId(4)), None, Some(HopId(5))];
        assert_eq!(pool[id].hop(), Some(HopId(4)));
        assert_eq!(pool[id].next_hop(), Some(HopId(5)));
        assert_eq!(pool[id].next_hop(), None);
    }
}
