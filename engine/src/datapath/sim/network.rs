//! Hosts, links and the packets between them, in virtual time.
//!
//! ```text
//! SimDatapath ─flush─▶ access hop ─▶ link, one direction ─▶ access hop ─▶ SimDatapath
//!   (TX ring)           of sender     (shared queue)          of receiver   (RX queue)
//! ```
//!
//! [`SimNetwork`] is a handle on one single-threaded network; [`SimDatapath`]s
//! are its hosts' ports. Nothing here moves time: the event loop moves the
//! [`SimClock`] to [`next_event`](SimNetwork::next_event) and calls
//! [`advance`](SimNetwork::advance), which handles what is due, each event at
//! its own time. The same calls with the same seed give the same events.

use std::cell::{Ref, RefCell, RefMut};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::rc::Rc;
use std::time::Duration;

use super::endpoint::{Endpoint, SimDatapath};
use super::fabric::{Link, Network};
use super::link::{LinkConfig, LinkConfigError, LinkCounters, LinkPlan, MTU_MAX};
use super::log::PacketEvent;
use crate::clock::SimClock;
use crate::datapath::Datapath as _;

/// The MTU of a host's interface unless set otherwise: Ethernet's.
pub const INTERFACE_MTU_DEFAULT: u64 = 1500;

/// Watches every packet event.
pub type Tap = Box<dyn FnMut(&PacketEvent)>;
/// Decides with the UDP payload at hand whether a packet enters the network.
pub type Filter = Box<dyn FnMut(&PacketEvent, &[u8]) -> bool>;

/// A set of hosts: the addresses that share the first `bits` bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    address: Ipv6Addr,
    bits: u8,
}

impl Prefix {
    /// All hosts.
    pub const ALL: Self = Self { address: Ipv6Addr::UNSPECIFIED, bits: 0 };

    /// The addresses that share their first `bits` bits with `address`.
    ///
    /// # Panics
    /// If `bits` is above 128.
    #[must_use]
    pub fn new(address: Ipv6Addr, bits: u8) -> Self {
        assert!(bits <= 128, "an IPv6 prefix has at most 128 bits, not {bits}");
        Self { address, bits }
    }

    /// Whether `address` is one of them.
    #[must_use]
    pub fn contains(&self, address: Ipv6Addr) -> bool {
        let differing = self.address.to_bits() ^ address.to_bits();
        self.bits == 0 || differing >> (128 - u32::from(self.bits)) == 0
    }
}

impl From<Ipv6Addr> for Prefix {
    /// One host.
    fn from(address: Ipv6Addr) -> Self {
        Self { address, bits: 128 }
    }
}

/// Names a link of a [`SimNetwork`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkId(pub(super) usize);

/// Which way along a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the first host set given to [`SimNetwork::add_link`] to the second.
    Forward,
    /// Back.
    Reverse,
}

/// Names a [`SimDatapath`] of a [`SimNetwork`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId(pub(super) u32);

/// A handle on an in-memory network; clones share it.
#[derive(Clone)]
pub struct SimNetwork {
    inner: Rc<RefCell<Network>>,
}

impl SimNetwork {
    /// An empty network on `clock` whose links draw their randomness from `seed`.
    #[must_use]
    pub fn new(clock: SimClock, seed: u64) -> Self {
        Self { inner: Rc::new(RefCell::new(Network::new(clock, seed))) }
    }

    /// The seed, for messages about a run that failed.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.borrow().seed
    }

    /// Connects two sets of hosts. All packets of one direction share its queue.
    /// Where several links fit a packet, the one added first carries it.
    ///
    /// # Errors
    /// The first configuration key out of its range.
    pub fn add_link(
        &self,
        near: impl Into<Prefix>,
        far: impl Into<Prefix>,
        forward: impl Into<LinkPlan>,
        reverse: impl Into<LinkPlan>,
    ) -> Result<LinkId, LinkConfigError> {
        let mut inner = self.borrow_mut();
        let forward = inner.add_hop(forward.into())?;
        let reverse = inner.add_hop(reverse.into())?;
        inner.links.push(Link { near: near.into(), far: far.into(), forward, reverse });
        Ok(LinkId(inner.links.len() - 1))
    }

    /// Gives a host an access hop of its own, both ways, between it and every
    /// link. Out of the host it is fed by the TX rings, whose slots stay
    /// occupied until their packets have left: a slow access pushes back.
    ///
    /// # Errors
    /// The first configuration key out of its range.
    pub fn set_access(
        &self,
        host: Ipv6Addr,
        rate_bps: u64,
        delay_us: u64,
    ) -> Result<(), LinkConfigError> {
        let config = LinkConfig { rate_bps, delay_us, mtu: MTU_MAX, ..LinkConfig::default() };
        let mut inner = self.borrow_mut();
        let out = inner.add_hop(LinkPlan::constant(config.clone()))?;
        let back = inner.add_hop(LinkPlan::constant(config))?;
        inner.access.insert(host, (out, back));
        Ok(())
    }

    /// Opens a port on a host. The port is free again when the datapath is dropped.
    ///
    /// # Panics
    /// If the port is zero, the address unspecified, or both are in use.
    #[must_use]
    pub fn open(&self, address: SocketAddrV6) -> SimDatapath {
        let id = self.borrow_mut().open(address);
        SimDatapath::new(Rc::clone(&self.inner), id, address)
    }

    /// Opens one more receive queue of an open port: a hash of the sender's address and port decides
    /// which queue a packet arrives by, as a NIC with several does. Each may send. Give the port
    /// itself away by dropping its first datapath last.
    ///
    /// # Panics
    /// If the port is closed.
    #[must_use]
    pub fn open_queue(&self, port: &SimDatapath) -> SimDatapath {
        let id = self.borrow_mut().open_queue(port.id());
        SimDatapath::new(Rc::clone(&self.inner), id, port.local_addr())
    }

    /// Changes the MTU of the interface beneath a port; its shard is told by
    /// an event. The links have MTUs of their own, of which no host knows.
    ///
    /// # Panics
    /// If the port is closed.
    pub fn set_interface_mtu(&self, id: EndpointId, mtu: u64) {
        self.borrow_mut().endpoint_mut(id).set_interface_mtu(mtu);
    }

    /// Changes how many datagrams the port's TX ring holds.
    ///
    /// # Panics
    /// If the port is closed.
    pub fn set_tx_ring_datagrams(&self, id: EndpointId, datagrams: usize) {
        self.borrow_mut().endpoint_mut(id).set_tx_ring_datagrams(datagrams);
    }

    /// Replaces one direction of a link from now on; planned steps still come.
    ///
    /// # Errors
    /// The first key out of its range; the link is then unchanged.
    pub fn set_link(
        &self,
        link: LinkId,
        direction: Direction,
        config: LinkConfig,
    ) -> Result<(), LinkConfigError> {
        self.borrow_mut().set_link(link, direction, config)
    }

    /// The present configuration of one direction of a link.
    #[must_use]
    pub fn link_config(&self, link: LinkId, direction: Direction) -> LinkConfig {
        let inner = self.borrow();
        inner.hops[inner.hop_index(link, direction)].config().clone()
    }

    /// The counters of one direction of a link.
    #[must_use]
    pub fn link_counters(&self, link: LinkId, direction: Direction) -> LinkCounters {
        let inner = self.borrow();
        inner.hops[inner.hop_index(link, direction)].counters()
    }

    /// Rebinds a port's address translation, as a NAT does in mid-flow: what the
    /// port that appears as `public` sends from now on appears to come from
    /// `new_public`, and what is sent there reaches the port. What still arrives
    /// for `public` is lost. `false` when no port appears as `public`.
    ///
    /// # Panics
    /// If another port appears as `new_public`.
    pub fn rebind(&self, public: SocketAddrV6, new_public: SocketAddrV6) -> bool {
        self.borrow_mut().rebind(public, new_public)
    }

    /// Watches every packet event from now on; `None` stops it. The tap must not call the network.
    pub fn set_tap(&self, tap: Option<Tap>) {
        self.borrow_mut().tap = tap;
    }

    /// Decides for every packet whether it enters the network; `None` lets all
    /// in. For tests that lose exactly the packets they mean. The filter must not call the network.
    pub fn set_filter(&self, filter: Option<Filter>) {
        self.borrow_mut().filter = filter;
    }

    /// Digest of all packet events so far: (virtual time, from, to, length, mark,
    /// fate) of each. Equal for two runs exactly if they ran the same.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.borrow().digest.value()
    }

    /// Packets sent to an address that nobody has.
    #[must_use]
    pub fn unreachable(&self) -> u64 {
        self.borrow().unreachable
    }

    /// Packets that are under way or wait to be received.
    #[must_use]
    pub fn packets_in_use(&self) -> usize {
        self.borrow().packets.in_use()
    }

    /// Virtual time of the next event inside the network: a delivery, a packet
    /// leaving a queue, a planned step. `None` when nothing is under way.
    #[must_use]
    pub fn next_event(&self) -> Option<Duration> {
        self.borrow().events.next_ns().map(Duration::from_nanos)
    }

    /// Handles every event up to the clock's present, each at its own time.
    pub fn advance(&self) {
        self.borrow_mut().advance();
    }

    /// Whether the port was given something to do since the last call: a datagram,
    /// room in its full TX ring, an event. A closed port never is.
    pub(super) fn take_wake(&self, id: EndpointId) -> bool {
        self.borrow_mut().endpoints[id.0 as usize].as_mut().is_some_and(Endpoint::take_wake)
    }

    /// Counts deliveries to any port, for nodes that name no port of their own.
    pub(super) fn deliveries(&self) -> u64 {
        self.borrow().deliveries
    }

    fn borrow(&self) -> Ref<'_, Network> {
        self.inner.borrow()
    }

    fn borrow_mut(&self) -> RefMut<'_, Network> {
        self.inner.borrow_mut()
    }
}

impl std::fmt::Debug for SimNetwork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let inner = self.borrow();
        f.debug_struct("SimNetwork")
            .field("seed", &inner.seed)
            .field("links", &inner.links)
            .field("packets_in_use", &inner.packets.in_use())
            .finish_non_exhaustive()
    }
}
