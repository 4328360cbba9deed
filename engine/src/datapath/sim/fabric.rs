//! The network behind its handles: routes, ports, and a packet's way from one
//! hop to the next.
//!
//! Invariant: a packet of the pool is in exactly one place — a port's TX ring or
//! receive queue, a hop, or an arrival event — and is released when it leaves the last.

use std::hash::{Hash as _, Hasher as _};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use rustc_hash::{FxHashMap, FxHasher};

use super::endpoint::Endpoint;
use super::hop::Hop;
use super::link::{LinkConfig, LinkConfigError, LinkPlan};
use super::log::{EventDigest, Fate, PacketEvent};
use super::network::{Direction, EndpointId, Filter, LinkId, Prefix, Tap};
use super::packet::{Event, EventQueue, HopId, PacketId, PacketPool, Path};
use crate::clock::SimClock;

#[derive(Debug)]
pub(super) struct Link {
    pub(super) near: Prefix,
    pub(super) far: Prefix,
    pub(super) forward: HopId,
    pub(super) reverse: HopId,
}

/// What all handles share.
pub(super) struct Network {
    pub(super) seed: u64,
    pub(super) clock: SimClock,
    pub(super) hops: Vec<Hop>,
    pub(super) links: Vec<Link>,
    pub(super) access: FxHashMap<Ipv6Addr, (HopId, HopId)>,
    pub(super) endpoints: Vec<Option<Endpoint>>,
    pub(super) by_public: FxHashMap<(Ipv6Addr, u16), EndpointId>,
    /// Ports with more than one receive queue: all of them, the one in `by_public` first.
    pub(super) queues: FxHashMap<EndpointId, Vec<EndpointId>>,
    pub(super) packets: PacketPool,
    pub(super) events: EventQueue,
    pub(super) digest: EventDigest,
    pub(super) tap: Option<Tap>,
    pub(super) filter: Option<Filter>,
    pub(super) unreachable: u64,
    pub(super) deliveries: u64,
}

impl Network {
    pub(super) fn new(clock: SimClock, seed: u64) -> Self {
        Self {
            seed,
            clock,
            hops: Vec::new(),
            links: Vec::new(),
            access: FxHashMap::default(),
            endpoints: Vec::new(),
            by_public: FxHashMap::default(),
            queues: FxHashMap::default(),
            packets: PacketPool::default(),
            events: EventQueue::default(),
            digest: EventDigest::default(),
            tap: None,
            filter: None,
            unreachable: 0,
            deliveries: 0,
        }
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_nanos()).expect("virtual time under 584 years")
    }

    pub(super) fn add_hop(&mut self, plan: LinkPlan) -> Result<HopId, LinkConfigError> {
        plan.initial.check()?;
        for step in &plan.steps {
            step.config.check()?;
        }
        assert!(
            plan.steps.is_sorted_by_key(|step| step.at_ms),
            "the steps of a LinkPlan are in order of time"
        );
        let id = HopId(u32::try_from(self.hops.len()).expect("under 2^32 hops"));
        self.hops.push(Hop::new(id, self.seed, plan.initial, plan.steps, &mut self.events));
        Ok(id)
    }

    pub(super) fn open(&mut self, address: SocketAddrV6) -> EndpointId {
        assert!(address.port() != 0, "{address}: a simulated port is never zero");
        assert!(!address.ip().is_unspecified(), "{address}: a simulated host needs an address");
        let id = EndpointId(u32::try_from(self.endpoints.len()).expect("under 2^32 ports"));
        let taken = self.by_public.insert(key(&address), id);
        assert!(taken.is_none(), "{address}: in use on this network");
        self.endpoints.push(Some(Endpoint::new(address)));
        id
    }

    /// One more queue of the port `first`.
    pub(super) fn open_queue(&mut self, first: EndpointId) -> EndpointId {
        let id = EndpointId(u32::try_from(self.endpoints.len()).expect("under 2^32 ports"));
        let endpoint = Endpoint::new(self.endpoint(first).local);
        self.endpoints.push(Some(endpoint));
        self.queues.entry(first).or_insert_with(|| vec![first]).push(id);
        id
    }

    /// The queue of a port that packets from `from` arrive by: a hash decides, as a NIC's does.
    fn queue(&self, first: EndpointId, from: &SocketAddrV6) -> EndpointId {
        let Some(queues) = self.queues.get(&first) else { return first };
        let mut hasher = FxHasher::default();
        key(from).hash(&mut hasher);
        // The upper half: the lower bits of this hash keep patterns of the port.
        queues[(hasher.finish() >> 32) as usize % queues.len()]
    }

    pub(super) fn close(&mut self, id: EndpointId) {
        let endpoint = self.endpoints[id.0 as usize].take().expect("closed once, by its datapath");
        for queues in self.queues.values_mut() {
            queues.retain(|queue| *queue != id);
        }
        let place = key(&endpoint.public);
        if self.by_public.get(&place) == Some(&id) {
            // The port lives on with its other queues.
            match self.queues.remove(&id).filter(|queues| !queues.is_empty()) {
                Some(queues) => {
                    self.by_public.insert(place, queues[0]);
                    self.queues.insert(queues[0], queues);
                }
                None => {
                    self.by_public.remove(&place);
                }
            }
        }
        for packet in endpoint.into_packets() {
            self.packets.release(packet);
        }
    }

    pub(super) fn endpoint(&self, id: EndpointId) -> &Endpoint {
        self.endpoints[id.0 as usize].as_ref().expect("the port is open")
    }

    pub(super) fn endpoint_mut(&mut self, id: EndpointId) -> &mut Endpoint {
        self.endpoints[id.0 as usize].as_mut().expect("the port is open")
    }

    /// A port together with the packets that it holds.
    pub(super) fn endpoint_and_packets(
        &mut self,
        id: EndpointId,
    ) -> (&mut Endpoint, &mut PacketPool) {
        let endpoint = self.endpoints[id.0 as usize].as_mut().expect("the port is open");
        (endpoint, &mut self.packets)
    }

    pub(super) fn rebind(&mut self, public: SocketAddrV6, new_public: SocketAddrV6) -> bool {
        let Some(id) = self.by_public.remove(&key(&public)) else {
            return false;
        };
        let taken = self.by_public.insert(key(&new_public), id);
        assert!(taken.is_none(), "{new_public}: in use on this network");
        self.endpoint_mut(id).public = new_public;
        true
    }

    pub(super) fn hop_index(&self, link: LinkId, direction: Direction) -> usize {
        let link = &self.links[link.0];
        let hop = match direction {
            Direction::Forward => link.forward,
            Direction::Reverse => link.reverse,
        };
        hop.0 as usize
    }

    pub(super) fn set_link(
        &mut self,
        link: LinkId,
        direction: Direction,
        config: LinkConfig,
    ) -> Result<(), LinkConfigError> {
        self.advance();
        let now_ns = self.now_ns();
        let hop = self.hop_index(link, direction);
        let hop = &mut self.hops[hop];
        let dropped = hop.set_config(now_ns, config, &mut self.packets, &mut self.events)?;
        self.drop_all(now_ns, &dropped);
        Ok(())
    }

    /// The hops from a host to an address, or `None` when no link connects them.
    pub(super) fn route(&self, from: Ipv6Addr, to: &SocketAddrV6) -> Option<Path> {
        // Behind address translation a host stays where it is.
        let to = self.by_public.get(&key(to)).map_or(*to.ip(), |id| *self.endpoint(*id).local.ip());
        let link = self.links.iter().find_map(|link| {
            if link.near.contains(from) && link.far.contains(to) {
                Some(link.forward)
            } else if link.far.contains(from) && link.near.contains(to) {
                Some(link.reverse)
            } else {
                None
            }
        })?;
        if self.access.is_empty() {
            return Some([None, Some(link), None]);
        }
        let out = self.access.get(&from).map(|(out, _)| *out);
        let back = self.access.get(&to).map(|(_, back)| *back);
        Some([out, Some(link), back])
    }

    /// Sends what a port accepted since its last flush.
    pub(super) fn flush(&mut self, id: EndpointId) {
        self.advance();
        let now_ns = self.now_ns();
        let mut pending = self.endpoint_mut(id).take_pending();
        for packet in pending.drain(..) {
            self.send(now_ns, id, packet);
        }
        self.endpoint_mut(id).give_back_pending(pending);
    }

    fn send(&mut self, now_ns: u64, id: EndpointId, packet: PacketId) {
        self.record(now_ns, packet, Fate::Sent);
        let event = self.packet_event(now_ns, packet, Fate::Sent);
        if let Some(filter) = &mut self.filter
            && !filter(&event, &self.packets[packet].payload)
        {
            return self.drop_one(now_ns, packet, Fate::DroppedFilter);
        }
        let path = self.packets[packet].path;
        if path[0].is_some() {
            self.packets[packet].ring_slot = Some(id);
            self.endpoint_mut(id).occupy_ring_slot();
        }
        let first = path.iter().position(Option::is_some).expect("a path has a link");
        self.packets[packet].stage = u8::try_from(first).expect("a path has three hops");
        self.enter(now_ns, path[first].expect("just found"), packet);
    }

    pub(super) fn advance(&mut self) {
        let now_ns = self.now_ns();
        while let Some((at_ns, event)) = self.events.pop_due(now_ns) {
            self.handle(at_ns, event);
        }
    }

    fn handle(&mut self, now_ns: u64, event: Event) {
        let Self { hops, packets, events, .. } = self;
        match event {
            Event::Departure(hop) => {
                let hop = &mut hops[hop.0 as usize];
                let Some(departed) = hop.handle_departure(now_ns, packets, events) else {
                    return;
                };
                self.free_ring_slot(departed.packet);
                if let Some(fate) = departed.lost {
                    self.drop_one(now_ns, departed.packet, fate);
                }
            }
            Event::Release(hop) => hops[hop.0 as usize].handle_release(now_ns, packets, events),
            Event::Arrival(hop, packet) => {
                match hops[hop.0 as usize].handle_arrival(packets[packet].ip_bytes()) {
                    Ok(()) => self.move_on(now_ns, packet),
                    Err(fate) => self.drop_one(now_ns, packet, fate),
                }
            }
            Event::Step(hop) => {
                let dropped = hops[hop.0 as usize].handle_step(now_ns, packets, events);
                self.drop_all(now_ns, &dropped);
            }
        }
    }

    /// From the end of one hop into the next, or to the receiver.
    fn move_on(&mut self, now_ns: u64, packet: PacketId) {
        match self.packets[packet].next_hop() {
            Some(hop) => self.enter(now_ns, hop, packet),
            None => self.deliver(now_ns, packet),
        }
    }

    fn enter(&mut self, now_ns: u64, hop: HopId, packet: PacketId) {
        let hop = &mut self.hops[hop.0 as usize];
        if let Err(fate) = hop.handle_packet(now_ns, packet, &mut self.packets, &mut self.events) {
            self.drop_one(now_ns, packet, fate);
        }
    }

    fn deliver(&mut self, now_ns: u64, packet: PacketId) {
        let Some(&id) = self.by_public.get(&key(&self.packets[packet].to)) else {
            self.unreachable += 1;
            return self.drop_one(now_ns, packet, Fate::DroppedUnreachable);
        };
        let id = self.queue(id, &self.packets[packet].from);
        if !self.endpoint_mut(id).deliver(packet) {
            return self.drop_one(now_ns, packet, Fate::DroppedOverrun);
        }
        self.deliveries += 1;
        self.record(now_ns, packet, Fate::Delivered);
    }

    fn drop_all(&mut self, now_ns: u64, dropped: &[PacketId]) {
        for &packet in dropped {
            self.drop_one(now_ns, packet, Fate::DroppedDown);
        }
    }

    fn drop_one(&mut self, now_ns: u64, packet: PacketId, fate: Fate) {
        self.record(now_ns, packet, fate);
        self.packets.release(packet);
    }

    /// The packet has left its sender's TX ring.
    fn free_ring_slot(&mut self, packet: PacketId) {
        if let Some(id) = self.packets[packet].ring_slot.take()
            && let Some(endpoint) = &mut self.endpoints[id.0 as usize]
        {
            endpoint.free_ring_slot();
        }
    }

    fn packet_event(&self, now_ns: u64, packet: PacketId, fate: Fate) -> PacketEvent {
        let packet = &self.packets[packet];
        PacketEvent {
            at: Duration::from_nanos(now_ns),
            from: packet.from,
            to: packet.to,
            ecn: packet.ecn,
            payload_bytes: packet.payload.len(),
            corrupted: packet.corrupted,
            fate,
        }
    }

    fn record(&mut self, now_ns: u64, packet: PacketId, fate: Fate) {
        let event = self.packet_event(now_ns, packet, fate);
        self.digest.absorb(now_ns, &event);
        if let Some(tap) = &mut self.tap {
            tap(&event);
        }
    }
}

/// What tells ports apart: flow label and scope do not.
fn key(address: &SocketAddrV6) -> (Ipv6Addr, u16) {
    (*address.ip(), address.port())
}
