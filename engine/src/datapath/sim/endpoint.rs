//! One port of a simulated host: the [`Datapath`] that a shard drives.
//!
//! The TX ring has a fixed number of slots. A slot is taken by
//! [`transmit`](Datapath::transmit) and free again at the flush, or, on a host
//! with an access hop, when the packet has left that hop's transmitter.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::fabric::Network;
use super::link::{HEADER_BYTES, MTU_MAX, MTU_MIN};
use super::network::{EndpointId, INTERFACE_MTU_DEFAULT};
use super::packet::PacketId;
use crate::datapath::{
    Capabilities, Datapath, DatapathCounters, DatapathEvent, DatapathKind, RxBatch, TxDrop, TxMeta,
    TxVerdict,
};

/// Slots of a port's TX ring.
pub const TX_RING_DATAGRAMS: usize = 1024;
/// How many datagrams may wait for a port to receive them; more are dropped as overrun.
pub const RX_QUEUE_DATAGRAMS_MAX: usize = 65_536;
/// The largest UDP payload that QUIC's protocol core sends.
const UDP_PAYLOAD_MAX: u64 = 65_527;

/// The network's side of a port.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) local: SocketAddrV6,
    /// How the port appears to others: differs from `local` behind address translation.
    pub(super) public: SocketAddrV6,
    interface_mtu: u64,
    tx_ring_datagrams: usize,
    /// Slots whose packets have been flushed but have not left the access hop.
    tx_ring_used: usize,
    pending: Vec<PacketId>,
    /// The shard saw no capacity and waits for a slot.
    tx_blocked: bool,
    rx_queue: VecDeque<PacketId>,
    events: VecDeque<DatapathEvent>,
    woken: bool,
    counters: DatapathCounters,
}

impl Endpoint {
    pub(super) fn new(local: SocketAddrV6) -> Self {
        Self {
            local,
            public: local,
            interface_mtu: INTERFACE_MTU_DEFAULT,
            tx_ring_datagrams: TX_RING_DATAGRAMS,
            tx_ring_used: 0,
            pending: Vec::with_capacity(TX_RING_DATAGRAMS),
            tx_blocked: false,
            rx_queue: VecDeque::new(),
            events: VecDeque::new(),
            woken: false,
            counters: DatapathCounters::default(),
        }
    }

    pub(super) fn into_packets(self) -> impl Iterator<Item = PacketId> {
        self.pending.into_iter().chain(self.rx_queue)
    }

    pub(super) fn set_interface_mtu(&mut self, mtu: u64) {
        assert!(
            (MTU_MIN..=MTU_MAX).contains(&mtu),
            "interface MTU {mtu} not in {MTU_MIN} to {MTU_MAX}"
        );
        if self.interface_mtu != mtu {
            self.interface_mtu = mtu;
            self.events.push_back(DatapathEvent::MaxUdpPayload(self.max_udp_payload()));
            self.woken = true;
        }
    }

    pub(super) fn set_tx_ring_datagrams(&mut self, datagrams: usize) {
        self.tx_ring_datagrams = datagrams;
        self.wake_if_unblocked();
    }

    pub(super) fn take_wake(&mut self) -> bool {
        std::mem::take(&mut self.woken)
    }

    pub(super) fn occupy_ring_slot(&mut self) {
        self.tx_ring_used += 1;
    }

    pub(super) fn free_ring_slot(&mut self) {
        self.tx_ring_used -= 1;
        self.wake_if_unblocked();
    }

    /// Queues a packet for the shard; `false` when the queue is full.
    pub(super) fn deliver(&mut self, packet: PacketId) -> bool {
        if self.rx_queue.len() >= RX_QUEUE_DATAGRAMS_MAX {
            self.counters.rx_drop_overrun += 1;
            return false;
        }
        self.rx_queue.push_back(packet);
        self.woken = true;
        true
    }

    pub(super) fn take_pending(&mut self) -> Vec<PacketId> {
        std::mem::take(&mut self.pending)
    }

    /// Returns the emptied list of the flush, so that the next turn does not allocate.
    pub(super) fn give_back_pending(&mut self, emptied: Vec<PacketId>) {
        debug_assert!(emptied.is_empty() && self.pending.is_empty());
        self.pending = emptied;
        self.wake_if_unblocked();
    }

    fn capacity(&self) -> usize {
        self.tx_ring_datagrams.saturating_sub(self.tx_ring_used + self.pending.len())
    }

    fn wake_if_unblocked(&mut self) {
        if self.tx_blocked && self.capacity() > 0 {
            self.tx_blocked = false;
            self.woken = true;
        }
    }

    fn max_udp_payload(&self) -> u16 {
        let payload = (self.interface_mtu - HEADER_BYTES).min(UDP_PAYLOAD_MAX);
        u16::try_from(payload).expect("capped to 65527")
    }
}

/// A port of a simulated host: what a shard drives in the simulator.
pub struct SimDatapath {
    network: Rc<RefCell<Network>>,
    id: EndpointId,
    local: SocketAddrV6,
    capabilities: Capabilities,
}

impl SimDatapath {
    pub(super) fn new(network: Rc<RefCell<Network>>, id: EndpointId, local: SocketAddrV6) -> Self {
        let mode = "virtual time".to_owned();
        let kind = DatapathKind::Sim;
        let capabilities =
            Capabilities { kind, mode, interface: None, queue: None, standby_reason: None };
        Self { network, id, local, capabilities }
    }

    /// Its name on the network, for [`SimNode::endpoint`](super::SimNode::endpoint)
    /// and the network's settings of one port.
    #[must_use]
    pub fn id(&self) -> EndpointId {
        self.id
    }
}

impl Datapath for SimDatapath {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn local_addr(&self) -> SocketAddrV6 {
        self.local
    }

    fn receive(&mut self, _now: Instant, batch: &mut RxBatch) {
        let mut network = self.network.borrow_mut();
        let (endpoint, packets) = network.endpoint_and_packets(self.id);
        while !batch.is_full() {
            let Some(id) = endpoint.rx_queue.pop_front() else {
                return;
            };
            let packet = &packets[id];
            let bytes = packet.payload.len() as u64;
            batch.push(packet.from, *endpoint.local.ip(), packet.ecn, &[&packet.payload]);
            endpoint.counters.rx_datagrams += 1;
            endpoint.counters.rx_bytes += bytes;
            endpoint.counters.copied_bytes += bytes;
            packets.release(id);
        }
        // What is left makes the next turn come at once.
        endpoint.woken |= !endpoint.rx_queue.is_empty();
    }

    fn transmit_capacity(&self) -> usize {
        let mut network = self.network.borrow_mut();
        let endpoint = network.endpoint_mut(self.id);
        let capacity = endpoint.capacity();
        endpoint.tx_blocked |= capacity == 0;
        capacity
    }

    fn transmit(&mut self, meta: &TxMeta, payload: &[u8]) -> TxVerdict {
        let mut network = self.network.borrow_mut();
        let own: Ipv6Addr = *self.local.ip();
        let path = match meta.local {
            Some(local) if local != own => None,
            _ => network.route(own, &meta.remote),
        };
        let (endpoint, packets) = network.endpoint_and_packets(self.id);
        if endpoint.capacity() == 0 {
            endpoint.tx_blocked = true;
            return TxVerdict::Full;
        }
        let counters = &mut endpoint.counters;
        let Some(path) = path else {
            counters.tx_drop_no_route += 1;
            return TxVerdict::Dropped(TxDrop::NoRoute);
        };
        if payload.len() as u64 + HEADER_BYTES > endpoint.interface_mtu {
            counters.tx_drop_too_large += 1;
            return TxVerdict::Dropped(TxDrop::TooLarge);
        }
        counters.tx_datagrams += 1;
        counters.tx_bytes += payload.len() as u64;
        counters.copied_bytes += payload.len() as u64;
        let id = packets.take();
        let packet = &mut packets[id];
        packet.from = endpoint.public;
        packet.to = meta.remote;
        packet.ecn = meta.ecn;
        packet.payload.extend_from_slice(payload);
        packet.path = path;
        endpoint.pending.push(id);
        TxVerdict::Accepted
    }

    fn flush(&mut self, _now: Instant) {
        // The clock of the network counts, not the caller's `now`, which may run
        // nanoseconds ahead to give every packet a time of its own.
        self.network.borrow_mut().flush(self.id);
    }

    fn poll_event(&mut self) -> Option<DatapathEvent> {
        self.network.borrow_mut().endpoint_mut(self.id).events.pop_front()
    }

    fn max_udp_payload(&self, _remote: &SocketAddrV6) -> u16 {
        self.network.borrow().endpoint(self.id).max_udp_payload()
    }

    /// Returns at once: only the event loop moves virtual time.
    fn wait(&mut self, _wake: BorrowedFd<'_>, _timeout: Option<Duration>) -> std::io::Result<()> {
        Ok(())
    }

    fn counters(&self) -> DatapathCounters {
        self.network.borrow().endpoint(self.id).counters
    }
}

impl Drop for SimDatapath {
    fn drop(&mut self) {
        self.network.borrow_mut().close(self.id);
    }
}

impl std::fmt::Debug for SimDatapath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = f.debug_struct("SimDatapath");
        debug.field("id", &self.id).field("local", &self.local).finish_non_exhaustive()
    }
}
