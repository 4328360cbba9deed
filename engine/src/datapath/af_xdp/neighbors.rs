//! From a peer's address to the link-layer address of the next hop, for one
//! interface: everything comes from the kernel, nothing is invented.
//!
//! ```text
//!              resolve ──hit──▶ NeighborTable (no system call)
//!                 │miss
//!                 ▼
//!   RTM_GETROUTE ─▶ RTM_GETNEIGH ─▶ unknown? ask the kernel to find it (solicit)
//!
//!   notifications: links, addresses, routes, rules, nexthops, neighbours
//!                 └── poll ──▶ NeighborTable, LinkEvent; overrun ─▶ read all anew
//! ```
//! * Owned by one shard, in the network namespace of the thread that opened it.
//! * The notification socket is subscribed before the first dump: no change is missed.
//! * A route that changes is forgotten by its prefix and asked for again on its next use.
//!
//! Lowest kernel: 5.0 (single neighbour look-ups).

use std::collections::VecDeque;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::link::{self, InterfaceInfo, LinkHeader, LocalAddress};
pub use super::neighbor_table::{
    IDLE_LIMIT, IN_USE, NEIGHBOR_CACHE_ENTRIES_MAX, NO_ROUTE_LIFETIME, REFRESH_INTERVAL,
    RESOLUTION_LIMIT, RETRY_INTERVAL, ROUTE_CACHE_ENTRIES_MAX,
};
use super::neighbor_table::{Lookup, NeighborTable, RouteKey};
pub use super::netlink::NetlinkError;
use super::netlink::{Message, NetlinkSocket, Notifications, Request};
pub use super::routes::NoRouteReason;
use super::routes::{self, Prefix};
pub use super::solicit::REQUESTS_PER_SECOND_MAX;
use super::solicit::{Solicitor, neighbor_header};
use crate::wire::MacAddr;

/// How often [`Neighbors::poll`] looks at timers.
const UPKEEP_INTERVAL: Duration = Duration::from_millis(500);
/// Notification datagrams read by one [`Neighbors::poll`]: some 100 µs of work at most.
const NOTIFICATIONS_PER_POLL_MAX: u32 = 64;
/// Neighbours asked for by one [`Neighbors::poll`]: each is a system call of a few microseconds.
const REQUESTS_PER_POLL_MAX: usize = 32;
/// When reading everything anew is tried again after it failed.
const REREAD_INTERVAL: Duration = Duration::from_secs(1);

/// The way to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextHop {
    /// Source address: the caller's, or the kernel's choice.
    pub src: Ipv6Addr,
    /// Our interface's link-layer address.
    pub src_mac: MacAddr,
    /// The next hop's link-layer address.
    pub dst_mac: MacAddr,
}

/// Answer to [`Neighbors::resolve`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Resolution {
    /// Send it like this.
    Ready(NextHop),
    /// The next hop's link-layer address has been asked for; it becomes `Ready`,
    /// or `NoRoute` within [`RESOLUTION_LIMIT`] (if [`Neighbors::poll`] is called).
    Pending,
    /// The peer cannot be reached through this interface:
    /// [`Neighbors::no_route_reason`] says why.
    NoRoute,
    /// The interface is down, has no carrier, or is gone.
    LinkDown,
}

/// What happened to the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinkEvent {
    /// New MTU, in bytes.
    MtuChanged(u32),
    /// Up, with carrier.
    Up,
    /// Down, or without carrier.
    Down,
    /// [`Neighbors::addresses`] changed.
    AddressesChanged,
    /// Deleted, or moved to another namespace: final.
    Gone,
}

/// Something that a notification says.
#[derive(Debug)]
enum Change {
    Link(Box<InterfaceInfo>),
    LinkGone,
    OtherLink,
    Address { address: LocalAddress, present: bool },
    Routes(Prefix),
    Neighbor { address: Ipv6Addr, state: u16, mac: Option<MacAddr> },
}

/// Resolver and link monitor of one interface. See the [module documentation](self).
#[derive(Debug)]
pub struct Neighbors {
    ifindex: u32,
    name: String,
    requests: NetlinkSocket,
    notifications: NetlinkSocket,
    solicitor: Solicitor,
    table: NeighborTable,
    mtu: u32,
    up: bool,
    gone: bool,
    mac: MacAddr,
    /// Every IPv6 address of the namespace.
    local: Vec<LocalAddress>,
    /// The usable ones of our interface.
    addresses: Vec<Ipv6Addr>,
    events: VecDeque<LinkEvent>,
    generation: u64,
    upkeep_at: Option<Instant>,
    /// Set while the tables may not be what the kernel has.
    reread_at: Option<Instant>,
    changes: Vec<Change>,
    due: Vec<Ipv6Addr>,
}

impl Neighbors {
    /// Watches an interface of the calling thread's network namespace.
    ///
    /// # Errors
    /// [`NetlinkError::Gone`] if there is no interface with this index,
    /// [`NetlinkError::Unsuitable`] if it is a bond, a bridge, a VLAN
    /// sub-interface or a member of one, and failures of netlink itself.
    pub fn open(ifindex: u32, ifname: &str) -> Result<Self, NetlinkError> {
        let notifications = NetlinkSocket::for_notifications(notification_groups())?;
        let mut requests = NetlinkSocket::for_requests()?;
        let all = link::dump_links(&mut requests)?;
        let info = all
            .iter()
            .find(|info| info.index == ifindex)
            .ok_or_else(|| NetlinkError::Gone { name: ifname.to_owned(), ifindex })?;
        info.check_attachable(&all)?;
        let local = link::dump_addresses(&mut requests)?;
        Ok(Self {
            ifindex,
            name: ifname.to_owned(),
            requests,
            notifications,
            solicitor: Solicitor::new(ifindex),
            table: NeighborTable::default(),
            mtu: info.mtu,
            up: info.up,
            gone: false,
            mac: info.mac,
            addresses: usable_addresses(&local, ifindex),
            local,
            events: VecDeque::new(),
            generation: 0,
            upkeep_at: None,
            reread_at: None,
            changes: Vec::new(),
            due: Vec::new(),
        })
    }

    /// The way to a peer, from `local` or from an address of the kernel's choice.
    ///
    /// On a hit this is one comparison (12 ns for the same peer again) or one
    /// hash look-up (35 ns); on a miss the kernel is asked for the route, once until
    /// something changes, which takes some microseconds.
    #[inline]
    pub fn resolve(
        &mut self,
        now: Instant,
        remote: &SocketAddrV6,
        local: Option<Ipv6Addr>,
    ) -> Resolution {
        if !self.up {
            return Resolution::LinkDown;
        }
        if remote.ip().is_unicast_link_local() && remote.scope_id() != self.ifindex {
            return Resolution::NoRoute;
        }
        let key = (*remote.ip(), local);
        match self.table.lookup(now, key) {
            Lookup::Miss => self.resolve_miss(now, key),
            found => self.resolution(found),
        }
    }

    /// Why [`resolve`](Self::resolve) answered [`Resolution::NoRoute`], for the text of an error.
    #[must_use]
    pub fn no_route_reason(
        &self,
        remote: &SocketAddrV6,
        local: Option<Ipv6Addr>,
    ) -> Option<NoRouteReason> {
        if remote.ip().is_unicast_link_local() && remote.scope_id() != self.ifindex {
            return Some(NoRouteReason::WrongScope(remote.scope_id()));
        }
        self.table.reason(&(*remote.ip(), local))
    }

    /// Takes in notifications and does what is due: refreshes neighbours in use,
    /// asks again for those missing, forgets idle ones. Never blocks; one system
    /// call if nothing happened. To be called when [`fd`](Self::fd) is readable,
    /// and every 500 ms at least.
    pub fn poll(&mut self, now: Instant) {
        self.read_notifications(now);
        if self.gone {
            return;
        }
        if self.reread_at.is_some_and(|at| now >= at) {
            self.reread(now);
        }
        if self.upkeep_at.is_none_or(|at| now >= at) {
            self.upkeep_at = Some(now + UPKEEP_INTERVAL);
            self.upkeep(now);
        }
    }

    /// Readable when [`poll`](Self::poll) has notifications to read.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.notifications.as_fd()
    }

    /// Changes whenever an answer of [`resolve`](Self::resolve) may have changed.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Largest IP packet, in bytes.
    #[must_use]
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// Whether the interface is up and has carrier.
    #[must_use]
    pub fn link_up(&self) -> bool {
        self.up
    }

    /// The interface's link-layer address.
    #[must_use]
    pub fn mac(&self) -> MacAddr {
        self.mac
    }

    /// The interface's IPv6 addresses that duplicate address detection has let
    /// through: preferred before deprecated, global before link-local. Deprecated
    /// ones still receive, and are no source for a new peer.
    #[must_use]
    pub fn addresses(&self) -> &[Ipv6Addr] {
        &self.addresses
    }

    /// The next event, oldest first. An event that is repeated before it is read
    /// is told once.
    pub fn poll_event(&mut self) -> Option<LinkEvent> {
        self.events.pop_front()
    }

    fn resolution(&self, found: Lookup) -> Resolution {
        match found {
            Lookup::Ready { src, dst_mac } => {
                Resolution::Ready(NextHop { src, src_mac: self.mac, dst_mac })
            }
            Lookup::Pending => Resolution::Pending,
            Lookup::NoRoute | Lookup::Miss => Resolution::NoRoute,
        }
    }

    #[cold]
    fn resolve_miss(&mut self, now: Instant, key: RouteKey) -> Resolution {
        match self.find_route(key) {
            Ok((src, next_hop)) => {
                if self.table.insert_route(now, key, src, next_hop) {
                    self.find_neighbor(now, next_hop);
                }
            }
            Err(reason) => {
                tracing::debug!(interface = self.name, remote = %key.0, %reason, "no route");
                self.table.insert_failure(now, key, reason);
            }
        }
        let found = self.table.lookup(now, key);
        self.resolution(found)
    }

    /// The source address and the next hop for a peer.
    fn find_route(&mut self, key: RouteKey) -> Result<(Ipv6Addr, Ipv6Addr), NoRouteReason> {
        let (remote, local) = key;
        if remote.is_multicast() || remote.is_unspecified() || remote.to_ipv4_mapped().is_some() {
            return Err(NoRouteReason::NotUnicast);
        }
        if local.is_some_and(|local| !self.is_usable_source(local)) {
            return Err(NoRouteReason::ForeignSource);
        }
        let route = match routes::query(&mut self.requests, remote, local, Some(self.ifindex)) {
            Ok(route) => route,
            Err(error) => {
                return Err(error.refusal().map_or_else(
                    || {
                        tracing::warn!(interface = self.name, %remote, %error, "no route");
                        NoRouteReason::Unknown
                    },
                    NoRouteReason::Kernel,
                ));
            }
        };
        let next_hop = route.next_hop(remote, self.ifindex)?;
        let src = local
            .or(route.preferred_source)
            .or_else(|| self.source_by_scope(remote))
            .ok_or(NoRouteReason::NoSource)?;
        Ok((src, next_hop))
    }

    /// An address may be the source wherever it lives on this machine (as
    /// service addresses on loopback do), except for a link-local one.
    fn is_usable_source(&self, address: Ipv6Addr) -> bool {
        let on_right_link = |local: &LocalAddress| {
            local.ifindex == self.ifindex || !address.is_unicast_link_local()
        };
        self.local
            .iter()
            .any(|local| local.address == address && local.is_usable() && on_right_link(local))
    }

    fn source_by_scope(&self, remote: Ipv6Addr) -> Option<Ipv6Addr> {
        let same_scope =
            |address: &&Ipv6Addr| address.is_unicast_link_local() == remote.is_unicast_link_local();
        self.addresses.iter().find(same_scope).or(self.addresses.first()).copied()
    }

    /// Looks a neighbour up in the kernel's table, and asks for it if it has no address there.
    fn find_neighbor(&mut self, now: Instant, next_hop: Ipv6Addr) {
        if self.query_neighbor(now, next_hop) {
            return;
        }
        if self.solicitor.may_ask(now) {
            self.solicitor.ask(&mut self.requests, next_hop);
            self.table.handle_asked(now, next_hop);
            // On a link without neighbour discovery it is known at once, without a notification.
            self.query_neighbor(now, next_hop);
        }
    }

    /// Says whether the kernel has a usable entry.
    fn query_neighbor(&mut self, now: Instant, next_hop: Ipv6Addr) -> bool {
        let request =
            Request::new("a neighbour", libc::RTM_GETNEIGH, &neighbor_header(self.ifindex))
                .attribute(libc::NDA_DST, &next_hop.octets());
        let ifindex = self.ifindex;
        let mut found = None;
        let asked = self.requests.request(request, 0, |message| {
            found = parse_neighbor(message, ifindex);
        });
        match asked {
            Ok(()) => {}
            Err(error) if error.refusal() == Some(libc::ENOENT) => {}
            Err(error) => {
                tracing::warn!(interface = self.name, %next_hop, %error, "no neighbour");
            }
        }
        let (_, state, mac) = found.unwrap_or((next_hop, 0, None));
        self.table.handle_neighbor(now, next_hop, state, mac)
    }

    fn read_notifications(&mut self, now: Instant) {
        let mut changes = std::mem::take(&mut self.changes);
        let ifindex = self.ifindex;
        let outcome = self.notifications.notifications(NOTIFICATIONS_PER_POLL_MAX, |message| {
            changes.extend(parse_change(message, ifindex));
        });
        for change in changes.drain(..) {
            self.apply(now, change);
        }
        self.changes = changes;
        match outcome {
            Ok(Notifications::Drained | Notifications::More) => {}
            Ok(Notifications::Lost) => {
                tracing::info!(interface = self.name, "netlink notifications lost: reading anew");
                self.reread_at = Some(now);
            }
            Err(error) => {
                tracing::warn!(interface = self.name, %error, "netlink notifications");
                self.reread_at.get_or_insert(now + REREAD_INTERVAL);
            }
        }
    }

    fn apply(&mut self, now: Instant, change: Change) {
        match change {
            Change::Link(info) => self.apply_link(&info),
            Change::LinkGone => self.apply_gone(),
            Change::OtherLink => self.bump_if(|this| this.table.invalidate_failures()),
            Change::Address { address, present } => self.apply_address(address, present),
            Change::Routes(prefix) => self.bump_if(|this| this.table.invalidate(&prefix)),
            Change::Neighbor { address, state, mac } => {
                if self.table.handle_neighbor(now, address, state, mac) {
                    self.generation += 1;
                    self.upkeep_at = None; // a lost one is asked for at once
                }
            }
        }
    }

    fn bump_if(&mut self, changed: impl FnOnce(&mut Self) -> bool) {
        if changed(self) {
            self.generation += 1;
        }
    }

    fn apply_link(&mut self, info: &InterfaceInfo) {
        if info.mtu != self.mtu {
            self.mtu = info.mtu;
            self.push_event(LinkEvent::MtuChanged(info.mtu));
        }
        if info.mac != self.mac {
            self.mac = info.mac;
            self.generation += 1;
        }
        if info.up != self.up {
            self.up = info.up;
            self.table.invalidate(&Prefix::ALL);
            self.generation += 1;
            self.push_event(if info.up { LinkEvent::Up } else { LinkEvent::Down });
        }
    }

    fn apply_gone(&mut self) {
        if !std::mem::replace(&mut self.gone, true) {
            self.up = false;
            self.table.invalidate(&Prefix::ALL);
            self.generation += 1;
            self.push_event(LinkEvent::Gone);
        }
    }

    /// Router advertisements repeat addresses all the time: only news count.
    fn apply_address(&mut self, address: LocalAddress, present: bool) {
        let identity = |local: &LocalAddress| (local.ifindex, local.address);
        let known = self.local.iter().position(|local| identity(local) == identity(&address));
        match known {
            Some(at) if present && self.local[at] == address => return,
            Some(at) if present => self.local[at] = address,
            Some(at) => drop(self.local.remove(at)),
            None if present => self.local.push(address),
            None => return,
        }
        self.apply_addresses();
    }

    /// An address may be a source, or the destination of a peer that was not local before.
    fn apply_addresses(&mut self) {
        self.table.invalidate(&Prefix::ALL);
        self.generation += 1;
        let addresses = usable_addresses(&self.local, self.ifindex);
        if addresses != self.addresses {
            self.addresses = addresses;
            self.push_event(LinkEvent::AddressesChanged);
        }
    }

    fn push_event(&mut self, event: LinkEvent) {
        let kind = std::mem::discriminant(&event);
        self.events.retain(|queued| std::mem::discriminant(queued) != kind);
        self.events.push_back(event);
    }

    /// Reads links, addresses and neighbours anew after notifications were lost.
    fn reread(&mut self, now: Instant) {
        self.reread_at = match self.try_reread(now) {
            Ok(()) => None,
            Err(error) => {
                tracing::warn!(interface = self.name, %error, "cannot read the tables anew");
                Some(now + REREAD_INTERVAL)
            }
        };
    }

    fn try_reread(&mut self, now: Instant) -> Result<(), NetlinkError> {
        // Applied later, what waits would undo what is read now.
        if !self.notifications.discard()? {
            tracing::warn!(interface = self.name, "the kernel's tables change without pause");
        }
        let Some(info) = link::link(&mut self.requests, self.ifindex)? else {
            self.apply_gone();
            return Ok(());
        };
        self.apply_link(&info);
        self.local = link::dump_addresses(&mut self.requests)?;
        self.apply_addresses();
        let ifindex = self.ifindex;
        let mut header = [0; 12];
        header[0] = libc::AF_INET6 as u8;
        let request = Request::new("the list of neighbours", libc::RTM_GETNEIGH, &header)
            .attribute(libc::NDA_IFINDEX, &ifindex.to_ne_bytes());
        let mut missing = self.table.neighbors();
        let present = self.requests.dump(request, |message| parse_neighbor(message, ifindex))?;
        for (address, state, mac) in present {
            missing.retain(|other| *other != address);
            self.table.handle_neighbor(now, address, state, mac);
        }
        for address in missing {
            self.table.handle_neighbor(now, address, 0, None);
        }
        self.upkeep_at = None;
        Ok(())
    }

    fn upkeep(&mut self, now: Instant) {
        self.bump_if(|this| this.table.handle_timeout(now));
        let mut due = std::mem::take(&mut self.due);
        self.table.poll_due(now, REQUESTS_PER_POLL_MAX, &mut due);
        for next_hop in due.drain(..) {
            if !self.solicitor.may_ask(now) {
                continue; // in a later second
            }
            self.solicitor.ask(&mut self.requests, next_hop);
            self.table.handle_asked(now, next_hop);
        }
        self.due = due;
    }
}

/// The mask of the groups that a route, a neighbour or the link may change by.
fn notification_groups() -> u32 {
    [
        libc::RTNLGRP_LINK,
        libc::RTNLGRP_NEIGH,
        libc::RTNLGRP_IPV6_IFADDR,
        libc::RTNLGRP_IPV6_ROUTE,
        libc::RTNLGRP_IPV6_RULE,
        libc::RTNLGRP_NEXTHOP,
    ]
    .into_iter()
    .fold(0, |mask, group| mask | 1 << (group - 1))
}

fn usable_addresses(local: &[LocalAddress], ifindex: u32) -> Vec<Ipv6Addr> {
    let mut ours: Vec<_> =
        local.iter().filter(|local| local.ifindex == ifindex && local.is_usable()).collect();
    ours.sort_by_key(|local| local.rank());
    ours.into_iter().map(|local| local.address).collect()
}

fn parse_change(message: &Message<'_>, ifindex: u32) -> Option<Change> {
    /// From `linux/rtnetlink.h`.
    const RTM_NEWNEXTHOP: u16 = 104;
    const RTM_DELNEXTHOP: u16 = 105;
    match message.kind {
        libc::RTM_NEWLINK | libc::RTM_DELLINK => {
            let header = LinkHeader::parse(message.split::<16>()?.0)?;
            if header.index != ifindex {
                Some(Change::OtherLink)
            } else if message.kind == libc::RTM_DELLINK {
                Some(Change::LinkGone)
            } else {
                InterfaceInfo::parse(message).map(|info| Change::Link(Box::new(info)))
            }
        }
        libc::RTM_NEWADDR | libc::RTM_DELADDR => {
            let present = message.kind == libc::RTM_NEWADDR;
            let address = LocalAddress::parse(message)?;
            Some(Change::Address { address, present })
        }
        libc::RTM_NEWROUTE | libc::RTM_DELROUTE => Prefix::parse(message).map(Change::Routes),
        libc::RTM_NEWRULE | libc::RTM_DELRULE | RTM_NEWNEXTHOP | RTM_DELNEXTHOP => {
            Some(Change::Routes(Prefix::ALL))
        }
        libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH => {
            let (address, state, mac) = parse_neighbor(message, ifindex)?;
            let present = message.kind == libc::RTM_NEWNEIGH;
            let state = if present { state } else { 0 };
            Some(Change::Neighbor { address, state, mac })
        }
        _ => None,
    }
}

/// Address, state and MAC address of an IPv6 neighbour on our interface.
fn parse_neighbor(message: &Message<'_>, ifindex: u32) -> Option<(Ipv6Addr, u16, Option<MacAddr>)> {
    if !matches!(message.kind, libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH) {
        return None;
    }
    let (header, attributes) = message.split::<12>()?;
    let [family, _, _, _, i0, i1, i2, i3, s0, s1, flags, _] = *header;
    let ours = i32::from(family) == libc::AF_INET6
        && u32::from_ne_bytes([i0, i1, i2, i3]) == ifindex
        && flags & libc::NTF_PROXY == 0;
    let address = attributes.find_ipv6(libc::NDA_DST).filter(|_| ours)?;
    let mac = link::mac(attributes.find(libc::NDA_LLADDR));
    Some((address, u16::from_ne_bytes([s0, s1]), mac))
}
