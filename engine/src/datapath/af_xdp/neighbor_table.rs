//! Routes and neighbours in use by one datapath: pure state, told what the
//! kernel says and what time it is.
//!
//! ```text
//!  (remote, local) ──▶ route: source address ──▶ neighbour: state, MAC address
//!     bounded map         or a reason, for 1 s      shared by the routes through it
//! ```
//! A neighbour's life, `Pending` and `NoRoute` being what senders are told:
//! ```text
//!   unknown ─ask─▶ Pending ──the kernel has a MAC──▶ Ready ──MAC lost──▶ Pending
//!                     └─ the kernel gave up, or RESOLUTION_LIMIT ─▶ NoRoute ─▶ Ready
//! ```
//! A neighbour in use is asked for again every [`REFRESH_INTERVAL`] while Ready,
//! because traffic that bypasses the kernel does not keep the kernel's entry
//! fresh, and every [`RETRY_INTERVAL`] while it is not.

use std::collections::HashMap;
use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use slab::Slab;

use super::routes::{NoRouteReason, Prefix};
use crate::wire::MacAddr;

/// Peers (with their source address) whose route is remembered. A shard with more
/// active peers asks the kernel more often, a few microseconds each time; the
/// table takes less than 1 MB.
pub const ROUTE_CACHE_ENTRIES_MAX: usize = 4096;
/// Next hops whose link-layer address is remembered: one per on-link peer at
/// most, so as many as routes.
pub const NEIGHBOR_CACHE_ENTRIES_MAX: usize = ROUTE_CACHE_ENTRIES_MAX;
/// How long a neighbour counts as in use after a packet to it.
pub const IN_USE: Duration = Duration::from_secs(30);
/// How often the kernel is asked to confirm a neighbour in use: its entries
/// turn stale after 15 to 45 s and are collected 60 s later.
pub const REFRESH_INTERVAL: Duration = Duration::from_secs(30);
/// How often the kernel is asked for a neighbour that is in use and unknown
/// (RFC 4861 §10: RETRANS_TIMER).
pub const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// When a neighbour that does not answer is reported even if the kernel is still
/// trying: by default it gives up after three solicitations, 3 s.
pub const RESOLUTION_LIMIT: Duration = Duration::from_secs(5);
/// How long an answer without a route stands before the kernel is asked again;
/// its notifications end it earlier.
pub const NO_ROUTE_LIFETIME: Duration = Duration::from_secs(1);
/// Routes and neighbours unused for this long are forgotten.
pub const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// A failure told sooner than this after the neighbour was found missing is an
/// earlier attempt's, notified late.
const LATE_FAILURE: Duration = Duration::from_millis(100);

/// States in which the kernel itself would send to the link-layer address.
const NUD_USABLE: u16 = libc::NUD_REACHABLE
    | libc::NUD_STALE
    | libc::NUD_DELAY
    | libc::NUD_PROBE
    | libc::NUD_PERMANENT
    | libc::NUD_NOARP;
/// States that the kernel never leaves by itself: asking would only disturb them.
const NUD_FIXED: u16 = libc::NUD_PERMANENT | libc::NUD_NOARP;

/// A peer, and the source address if the caller named one.
pub(super) type RouteKey = (Ipv6Addr, Option<Ipv6Addr>);

/// What the table knows about a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lookup {
    /// Nothing (any more): ask the kernel for the route.
    Miss,
    /// Send from this address to this link-layer address.
    Ready { src: Ipv6Addr, dst_mac: MacAddr },
    /// The neighbour is being resolved.
    Pending,
    /// See [`NeighborTable::reason`].
    NoRoute,
}

#[derive(Debug)]
struct Route {
    key: RouteKey,
    way: Way,
    last_used: Instant,
}

#[derive(Debug, Clone, Copy)]
enum Way {
    Via { src: Ipv6Addr, neighbor: usize },
    None { reason: NoRouteReason, until: Instant },
}

#[derive(Debug)]
struct Neighbor {
    address: Ipv6Addr,
    mac: Option<MacAddr>,
    /// Permanent, or on a link without neighbour discovery.
    fixed: bool,
    /// Reported as not answering.
    failed: bool,
    /// Since when there is no MAC address.
    missing_since: Option<Instant>,
    asked_at: Option<Instant>,
    last_used: Instant,
    /// Routes through it.
    routes: usize,
}

impl Neighbor {
    fn is_due(&self, now: Instant) -> bool {
        let interval = match self.mac {
            Some(_) if self.fixed => return false,
            Some(_) => REFRESH_INTERVAL,
            None => RETRY_INTERVAL,
        };
        let asked_lately =
            self.asked_at.is_some_and(|at| now.saturating_duration_since(at) < interval);
        !asked_lately && now.saturating_duration_since(self.last_used) < IN_USE
    }

    fn lookup(&self, src: Ipv6Addr) -> Lookup {
        match self.mac {
            Some(dst_mac) => Lookup::Ready { src, dst_mac },
            None if self.failed => Lookup::NoRoute,
            None => Lookup::Pending,
        }
    }
}

/// The two tables. Memory is bounded by [`ROUTE_CACHE_ENTRIES_MAX`] and
/// [`NEIGHBOR_CACHE_ENTRIES_MAX`].
#[derive(Debug, Default)]
pub(super) struct NeighborTable {
    routes: Slab<Route>,
    // Peers choose their addresses: these maps keep the standard keyed hash.
    route_ids: HashMap<RouteKey, usize>,
    /// The route used last: batches go to one peer.
    last_route: Option<(RouteKey, usize)>,
    neighbors: Slab<Neighbor>,
    neighbor_ids: HashMap<Ipv6Addr, usize>,
}

impl NeighborTable {
    /// What is known about a peer; notes that it is in use.
    #[inline]
    pub(super) fn lookup(&mut self, now: Instant, key: RouteKey) -> Lookup {
        let id = match self.last_route {
            Some((last, id)) if last == key => id,
            _ => match self.route_ids.get(&key) {
                Some(&id) => id,
                None => return Lookup::Miss,
            },
        };
        self.last_route = Some((key, id));
        let route = &mut self.routes[id];
        match route.way {
            Way::Via { src, neighbor } => {
                let neighbor = &mut self.neighbors[neighbor];
                if neighbor.mac.is_none()
                    && now.saturating_duration_since(neighbor.last_used) >= IN_USE
                {
                    return Lookup::Miss; // resolution stopped meanwhile: begin anew
                }
                route.last_used = now;
                neighbor.last_used = now;
                neighbor.lookup(src)
            }
            Way::None { until, .. } if now < until => {
                route.last_used = now;
                Lookup::NoRoute
            }
            Way::None { .. } => Lookup::Miss,
        }
    }

    /// Why a peer cannot be reached, if it is known not to be.
    pub(super) fn reason(&self, key: &RouteKey) -> Option<NoRouteReason> {
        match self.routes[*self.route_ids.get(key)?].way {
            Way::None { reason, .. } => Some(reason),
            Way::Via { neighbor, .. } => {
                let neighbor = &self.neighbors[neighbor];
                neighbor.failed.then_some(NoRouteReason::NeighborFailed(neighbor.address))
            }
        }
    }

    /// Remembers the kernel's route to a peer. Says whether the neighbour's state
    /// has to be asked for.
    pub(super) fn insert_route(
        &mut self,
        now: Instant,
        key: RouteKey,
        src: Ipv6Addr,
        next_hop: Ipv6Addr,
    ) -> bool {
        self.make_room(now, &key);
        let id = self.neighbor_id(now, next_hop);
        let neighbor = &mut self.neighbors[id];
        neighbor.routes += 1;
        if neighbor.mac.is_none() && now.saturating_duration_since(neighbor.last_used) >= IN_USE {
            neighbor.failed = false;
            neighbor.missing_since = None;
        }
        neighbor.last_used = now;
        let unknown = neighbor.mac.is_none() && neighbor.missing_since.is_none();
        self.insert(Route { key, way: Way::Via { src, neighbor: id }, last_used: now });
        unknown
    }

    /// Remembers for [`NO_ROUTE_LIFETIME`] that a peer cannot be reached.
    pub(super) fn insert_failure(&mut self, now: Instant, key: RouteKey, reason: NoRouteReason) {
        self.make_room(now, &key);
        let way = Way::None { reason, until: now + NO_ROUTE_LIFETIME };
        self.insert(Route { key, way, last_used: now });
    }

    /// Takes in the kernel's state of a neighbour (`NUD_*`; zero if it has none).
    /// Says whether an answer changed.
    pub(super) fn handle_neighbor(
        &mut self,
        now: Instant,
        address: Ipv6Addr,
        state: u16,
        mac: Option<MacAddr>,
    ) -> bool {
        let Some(&id) = self.neighbor_ids.get(&address) else { return false };
        let neighbor = &mut self.neighbors[id];
        let usable = mac.filter(|_| state & NUD_USABLE != 0);
        let before = (neighbor.mac, neighbor.failed);
        neighbor.fixed = state & NUD_FIXED != 0;
        if usable.is_some() {
            neighbor.failed = false;
            neighbor.missing_since = None;
        } else if neighbor.mac.is_some() {
            neighbor.missing_since = Some(now);
        } else {
            let since = *neighbor.missing_since.get_or_insert(now);
            let late = now.saturating_duration_since(since) < LATE_FAILURE;
            let gave_up = state & libc::NUD_FAILED != 0 && neighbor.asked_at.is_some();
            neighbor.failed |= gave_up && !late;
        }
        neighbor.mac = usable;
        before != (neighbor.mac, neighbor.failed)
    }

    /// The neighbours that are known at all.
    pub(super) fn neighbors(&self) -> Vec<Ipv6Addr> {
        self.neighbor_ids.keys().copied().collect()
    }

    /// Appends to `due` the neighbours to ask the kernel for now, at most `max`.
    pub(super) fn poll_due(&self, now: Instant, max: usize, due: &mut Vec<Ipv6Addr>) {
        let all = self.neighbors.iter().map(|(_, neighbor)| neighbor);
        due.extend(all.filter(|neighbor| neighbor.is_due(now)).map(|n| n.address).take(max));
    }

    /// Notes that the kernel has been asked.
    pub(super) fn handle_asked(&mut self, now: Instant, address: Ipv6Addr) {
        if let Some(&id) = self.neighbor_ids.get(&address) {
            self.neighbors[id].asked_at = Some(now);
        }
    }

    /// Forgets the routes to a prefix. Says whether there were any.
    pub(super) fn invalidate(&mut self, prefix: &Prefix) -> bool {
        self.remove_routes(|route| prefix.contains(route.key.0))
    }

    /// Forgets that peers cannot be reached (neighbours that do not answer excepted).
    pub(super) fn invalidate_failures(&mut self) -> bool {
        self.remove_routes(|route| matches!(route.way, Way::None { .. }))
    }

    /// Forgets what has not been used for [`IDLE_LIMIT`], and gives up on neighbours
    /// after [`RESOLUTION_LIMIT`]. Says whether an answer changed.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> bool {
        let idle = |at: Instant| now.saturating_duration_since(at) >= IDLE_LIMIT;
        self.remove_routes(|route| idle(route.last_used));
        self.remove_unrouted(|neighbor| idle(neighbor.last_used));
        let mut changed = false;
        for (_, neighbor) in &mut self.neighbors {
            let given_up = neighbor
                .missing_since
                .is_some_and(|since| now.saturating_duration_since(since) >= RESOLUTION_LIMIT);
            if given_up && neighbor.asked_at.is_some() && !neighbor.failed {
                neighbor.failed = true;
                changed = true;
            }
        }
        changed
    }

    fn insert(&mut self, route: Route) {
        let key = route.key;
        let id = self.routes.insert(route);
        let previous = self.route_ids.insert(key, id);
        debug_assert!(previous.is_none(), "make_room has removed it");
    }

    /// Removes the route of `key`, and the longest unused ones if the table is full.
    fn make_room(&mut self, now: Instant, key: &RouteKey) {
        if let Some(id) = self.route_ids.get(key).copied() {
            self.remove_route(id);
        }
        if self.routes.len() >= ROUTE_CACHE_ENTRIES_MAX {
            // A quarter at once: a flood of new peers then costs a fraction of a scan each.
            let mut ages: Vec<Instant> =
                self.routes.iter().map(|(_, route)| route.last_used).collect();
            let (_, &mut oldest, _) = ages.select_nth_unstable(ROUTE_CACHE_ENTRIES_MAX / 4);
            self.remove_routes(|route| route.last_used <= oldest.min(now));
        }
        if self.neighbors.len() >= NEIGHBOR_CACHE_ENTRIES_MAX {
            self.remove_unrouted(|_| true);
        }
    }

    fn neighbor_id(&mut self, now: Instant, address: Ipv6Addr) -> usize {
        *self.neighbor_ids.entry(address).or_insert_with(|| {
            self.neighbors.insert(Neighbor {
                address,
                mac: None,
                fixed: false,
                failed: false,
                missing_since: None,
                asked_at: None,
                last_used: now,
                routes: 0,
            })
        })
    }

    fn remove_routes(&mut self, mut doomed: impl FnMut(&Route) -> bool) -> bool {
        let ids: Vec<usize> =
            self.routes.iter().filter(|(_, route)| doomed(route)).map(|(id, _)| id).collect();
        for &id in &ids {
            self.remove_route(id);
        }
        !ids.is_empty()
    }

    fn remove_route(&mut self, id: usize) {
        self.last_route = None;
        let route = self.routes.remove(id);
        self.route_ids.remove(&route.key);
        if let Way::Via { neighbor, .. } = route.way {
            self.neighbors[neighbor].routes -= 1;
        }
    }

    fn remove_unrouted(&mut self, mut doomed: impl FnMut(&Neighbor) -> bool) {
        let ids = &mut self.neighbor_ids;
        self.neighbors.retain(|_, neighbor| {
            let keep = neighbor.routes > 0 || !doomed(neighbor);
            if !keep {
                ids.remove(&neighbor.address);
            }
            keep
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SRC: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
    const PEER: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
    const KEY: RouteKey = (PEER, None);
    const MAC: MacAddr = [2, 0, 0, 0, 0, 2];
    const READY: Lookup = Lookup::Ready { src: SRC, dst_mac: MAC };

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A table with a route to [`PEER`] on the link, its neighbour unknown and asked for.
    fn pending(now: Instant) -> NeighborTable {
        let mut table = NeighborTable::default();
        assert_eq!(table.lookup(now, KEY), Lookup::Miss);
        assert!(table.insert_route(now, KEY, SRC, PEER), "a new neighbour is unknown");
        assert!(!table.handle_neighbor(now, PEER, 0, None));
        table.handle_asked(now, PEER);
        assert_eq!(table.lookup(now, KEY), Lookup::Pending);
        table
    }

    fn ready(now: Instant) -> NeighborTable {
        let mut table = pending(now);
        assert!(table.handle_neighbor(now, PEER, libc::NUD_REACHABLE, Some(MAC)));
        assert_eq!(table.lookup(now, KEY), READY);
        table
    }

    fn due(table: &NeighborTable, now: Instant) -> Vec<Ipv6Addr> {
        let mut due = Vec::new();
        table.poll_due(now, 10, &mut due);
        due
    }

    #[test]
    fn every_nud_state() {
        let now = Instant::now();
        for state in [
            libc::NUD_REACHABLE,
            libc::NUD_STALE,
            libc::NUD_DELAY,
            libc::NUD_PROBE,
            libc::NUD_PERMANENT,
            libc::NUD_NOARP,
        ] {
            let mut table = pending(now);
            assert!(table.handle_neighbor(now, PEER, state, Some(MAC)), "{state:#x}");
            assert_eq!(table.lookup(now, KEY), READY, "{state:#x}");
            assert!(!table.handle_neighbor(now, PEER, state, Some(MAC)), "nothing new");
        }
        for state in [0, libc::NUD_INCOMPLETE] {
            let mut table = pending(now);
            assert!(!table.handle_neighbor(now, PEER, state, Some(MAC)), "{state:#x}");
            assert_eq!(table.lookup(now, KEY), Lookup::Pending, "{state:#x}");
        }
        let mut table = pending(now);
        assert!(!table.handle_neighbor(now, PEER, libc::NUD_REACHABLE, None), "no MAC");
        assert_eq!(table.lookup(now, KEY), Lookup::Pending);
    }

    #[test]
    fn a_changed_mac_is_used() {
        let now = Instant::now();
        let mut table = ready(now);
        let other = [2, 0, 0, 0, 0, 9];
        assert!(table.handle_neighbor(now, PEER, libc::NUD_STALE, Some(other)));
        assert_eq!(table.lookup(now, KEY), Lookup::Ready { src: SRC, dst_mac: other });
    }

    #[test]
    fn failure_of_the_kernel_is_told_and_forgotten() {
        let now = Instant::now();
        let mut table = pending(now);
        let late = now + LATE_FAILURE / 2;
        assert!(!table.handle_neighbor(late, PEER, libc::NUD_FAILED, None), "an earlier attempt's");
        let then = now + seconds(3);
        table.handle_asked(then, PEER);
        assert!(table.handle_neighbor(then, PEER, libc::NUD_FAILED, None));
        assert_eq!(table.lookup(then, KEY), Lookup::NoRoute);
        assert_eq!(table.reason(&KEY), Some(NoRouteReason::NeighborFailed(PEER)));
        assert!(!table.handle_neighbor(then, PEER, libc::NUD_INCOMPLETE, None));
        assert_eq!(table.lookup(then, KEY), Lookup::NoRoute, "until it answers");
        assert_eq!(due(&table, then + RETRY_INTERVAL), [PEER]);
        assert!(table.handle_neighbor(then, PEER, libc::NUD_REACHABLE, Some(MAC)));
        assert_eq!(table.lookup(then, KEY), READY);
        assert_eq!(table.reason(&KEY), None);
    }

    #[test]
    fn a_silent_kernel_is_not_waited_for() {
        let now = Instant::now();
        let mut table = pending(now);
        let before = now + RESOLUTION_LIMIT - Duration::from_millis(1);
        assert!(!table.handle_timeout(before));
        assert_eq!(table.lookup(before, KEY), Lookup::Pending);
        assert!(table.handle_timeout(now + RESOLUTION_LIMIT));
        assert_eq!(table.lookup(now + RESOLUTION_LIMIT, KEY), Lookup::NoRoute);
    }

    #[test]
    fn a_lost_neighbour_is_pending_first() {
        let now = Instant::now();
        for state in [libc::NUD_FAILED, 0] {
            let mut table = ready(now);
            let then = now + seconds(20);
            assert_eq!(table.lookup(then, KEY), READY);
            assert!(table.handle_neighbor(then, PEER, state, None));
            assert_eq!(table.lookup(then, KEY), Lookup::Pending);
            assert_eq!(due(&table, then), [PEER], "asked for at once");
        }
    }

    #[test]
    fn asked_for_while_in_use() {
        let now = Instant::now();
        let mut table = pending(now);
        assert!(due(&table, now + RETRY_INTERVAL / 2).is_empty());
        assert_eq!(due(&table, now + RETRY_INTERVAL), [PEER]);
        table.handle_neighbor(now, PEER, libc::NUD_REACHABLE, Some(MAC));
        assert!(due(&table, now + RETRY_INTERVAL).is_empty());
        let then = now + REFRESH_INTERVAL;
        assert!(due(&table, then).is_empty(), "not used any more");
        table.lookup(then, KEY);
        assert_eq!(due(&table, then), [PEER]);
        table.handle_asked(then, PEER);
        assert!(due(&table, then).is_empty());
        table.handle_neighbor(then, PEER, libc::NUD_PERMANENT, Some(MAC));
        table.lookup(then + REFRESH_INTERVAL, KEY);
        assert!(due(&table, then + REFRESH_INTERVAL).is_empty(), "permanent");
    }

    #[test]
    fn an_abandoned_resolution_begins_anew() {
        let now = Instant::now();
        let mut table = pending(now);
        table.handle_timeout(now + RESOLUTION_LIMIT);
        let then = now + IN_USE;
        assert_eq!(table.lookup(then, KEY), Lookup::Miss);
        assert!(table.insert_route(then, KEY, SRC, PEER), "unknown again");
        table.handle_neighbor(then, PEER, libc::NUD_FAILED, None);
        assert!(!table.handle_timeout(then));
        // The old failure counts only once it has been asked for again and has failed again.
        table.handle_asked(then, PEER);
        assert!(!table.handle_timeout(then + seconds(1)));
    }

    #[test]
    fn no_route_is_asked_for_again() {
        let now = Instant::now();
        let mut table = NeighborTable::default();
        table.insert_failure(now, KEY, NoRouteReason::Kernel(101));
        assert_eq!(table.lookup(now, KEY), Lookup::NoRoute);
        assert_eq!(table.reason(&KEY), Some(NoRouteReason::Kernel(101)));
        assert_eq!(table.lookup(now + NO_ROUTE_LIFETIME, KEY), Lookup::Miss);
        table.insert_failure(now, KEY, NoRouteReason::Local);
        assert!(table.invalidate_failures());
        assert_eq!(table.lookup(now, KEY), Lookup::Miss);
        assert!(!table.invalidate_failures());
    }

    #[test]
    fn stale_routes_go_and_neighbours_stay() {
        let now = Instant::now();
        let mut table = ready(now);
        let with_source = (PEER, Some(SRC));
        assert!(!table.insert_route(now, with_source, SRC, PEER), "the neighbour is known");
        assert!(table.invalidate(&Prefix::ALL));
        assert!(!table.invalidate(&Prefix::ALL));
        assert_eq!(table.lookup(now, KEY), Lookup::Miss, "also the one used last");
        assert!(!table.insert_route(now, KEY, SRC, PEER));
        assert_eq!(table.lookup(now, KEY), READY);
        table.handle_timeout(now + IDLE_LIMIT);
        assert_eq!(table.lookup(now, KEY), Lookup::Miss);
        assert!(table.neighbors().is_empty());
        assert!(!table.handle_neighbor(now, PEER, libc::NUD_REACHABLE, Some(MAC)), "not ours");
    }

    #[test]
    fn full_tables_drop_what_was_used_longest_ago() {
        let start = Instant::now();
        let mut table = NeighborTable::default();
        let peer = |n: usize| Ipv6Addr::from_bits(PEER.to_bits() + n as u128);
        let at = |n: usize| start + Duration::from_micros(n as u64);
        let count = 3 * ROUTE_CACHE_ENTRIES_MAX;
        for n in 0..count {
            table.insert_route(at(n), (peer(n), None), SRC, peer(n));
            assert!(table.routes.len() <= ROUTE_CACHE_ENTRIES_MAX);
            assert!(table.neighbors.len() <= NEIGHBOR_CACHE_ENTRIES_MAX);
            assert_eq!(table.routes.len(), table.route_ids.len());
            assert_eq!(table.neighbors.len(), table.neighbor_ids.len());
        }
        let last = count - 1;
        assert_ne!(table.lookup(at(last), (peer(last), None)), Lookup::Miss);
        let recent = count - ROUTE_CACHE_ENTRIES_MAX / 2;
        assert_ne!(table.lookup(at(last), (peer(recent), None)), Lookup::Miss);
        assert_eq!(table.lookup(at(last), (peer(0), None)), Lookup::Miss);
    }

    #[test]
    fn a_table_filled_at_one_instant_makes_room_too() {
        let now = Instant::now();
        let mut table = NeighborTable::default();
        for n in 0..=ROUTE_CACHE_ENTRIES_MAX {
            let peer = Ipv6Addr::from_bits(PEER.to_bits() + n as u128);
            table.insert_route(now, (peer, None), SRC, SRC);
            assert!(table.routes.len() <= ROUTE_CACHE_ENTRIES_MAX);
            assert_eq!(table.lookup(now, (peer, None)), Lookup::Pending);
        }
        let routed: usize = table.neighbors.iter().map(|(_, neighbor)| neighbor.routes).sum();
        assert_eq!(routed, table.routes.len());
    }

    /// Prints what a hit costs: `cargo test --release -p stoq cost_of_a_hit -- --ignored --nocapture`.
    #[test]
    #[ignore = "a measurement: run in release mode with --nocapture"]
    fn cost_of_a_hit() {
        const ROUNDS: usize = 4_000_000;
        let now = Instant::now();
        let peer = |n: usize| Ipv6Addr::from_bits(PEER.to_bits() + n as u128);
        for peers in [1, 2, 1000] {
            let mut table = NeighborTable::default();
            for n in 0..peers {
                table.insert_route(now, (peer(n), Some(SRC)), SRC, PEER);
            }
            table.handle_neighbor(now, PEER, libc::NUD_REACHABLE, Some(MAC));
            let start = Instant::now();
            for n in 0..ROUNDS {
                std::hint::black_box(table.lookup(now, (peer(n % peers), Some(SRC))));
            }
            let hit_ns = start.elapsed().as_nanos() as f64 / ROUNDS as f64;
            println!("{peers} peers in turn: {hit_ns:.1} ns");
        }
    }
}
