//! The pool's state machine: `handle_*` and callers in, [`Pool::poll_action`] out, no I/O.
//!
//! Invariants:
//! - An entry is in its peer's `idle` list (ready, no lease), `busy` list (ready, leased) or
//!   `early` list (handshaking, keys for 0-RTT there), or in none (connecting, retired, free).
//! - `lru` holds idle entries only, oldest first; idle entries within a warm-up are not in it.
//! - Lending and checking in neither allocate nor loop, but over entries found closed.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;
use rustc_hash::FxHashMap;

use super::circuit::{Admission, Circuit};
use super::list::{Link, List, NONE};
use super::{
    Checkout, CheckoutError, Lease, PeerEndpoint, PeerId, PoolCounters, PoolEvent, PoolEventKind,
};
use crate::app::ConnId;
use crate::config::PoolConfig;
use crate::error::ConnectionError;

/// One pooled connection, from its attempt to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EntryId {
    slot: u32,
    generation: u32,
}

/// What the shard must do for the pool.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum PoolAction {
    /// The caller with this token has a connection.
    Ready { token: u64, lease: Lease },
    /// The caller with this token gets none.
    Failed { token: u64, error: CheckoutError },
    /// The pool gave this connection up: close it when nobody else uses it.
    Close { conn: ConnId },
    /// To be told to the application.
    Event(PoolEvent),
}

/// What a pool is made of.
pub(crate) struct PoolSetup {
    pub(crate) limits: PoolConfig,
    /// Connections that this pool keeps idle at most.
    pub(crate) idle_max: usize,
    pub(crate) shard: usize,
    /// Shards over which each peer's connections are spread; 1: this pool has them all.
    pub(crate) shards: usize,
    pub(crate) seed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EntryState {
    Free,
    Connecting,
    Early,
    Ready,
    /// Closed or being closed: never lent again.
    Retired,
}

struct Entry {
    conn: Option<ConnId>,
    peer: u32,
    generation: u32,
    leases: u32,
    state: EntryState,
    in_lru: bool,
    /// Set while idle.
    idle_since: Option<Instant>,
    peer_link: Link,
    lru_link: Link,
}

struct Peer {
    endpoint: Option<PeerEndpoint>,
    generation: u32,
    idle: List,
    busy: List,
    early: List,
    /// Ready entries.
    ready: u32,
    /// Connecting and early entries.
    connecting: u32,
    /// Entries in any state but free.
    entries: u32,
    warm: u32,
    limit: u32,
    /// A connection in use was lost: make another although nobody waits.
    wanted: bool,
    /// It has an entry in `retries`.
    armed: bool,
    vacant: bool,
    vacant_link: Link,
    waiters: List,
    circuit: Circuit,
}

struct Waiter {
    token: u64,
    replay_safe: bool,
    link: Link,
}

/// The connections of one shard to its peers, for one kind of user.
pub(crate) struct Pool {
    setup: PoolSetup,
    peers: Vec<Peer>,
    by_endpoint: FxHashMap<PeerEndpoint, u32>,
    /// Peers without any entry, waiter or warm-up: forgotten when room is needed, oldest first.
    vacant: List,
    entries: Vec<Entry>,
    free: Vec<u32>,
    waiters: Vec<Waiter>,
    free_waiters: Vec<u32>,
    lru: List,
    warm_total: usize,
    retries: BinaryHeap<Reverse<(Instant, u32, u32)>>,
    connects: VecDeque<EntryId>,
    actions: VecDeque<PoolAction>,
    stopped: bool,
    rng: StdRng,
    pub(crate) counters: PoolCounters,
}

fn peer_link(entry: &mut Entry) -> &mut Link {
    &mut entry.peer_link
}

fn lru_link(entry: &mut Entry) -> &mut Link {
    &mut entry.lru_link
}

/// On which shard a peer's first connection lives, and over how many shards they are spread.
pub(crate) fn spread(
    endpoint: &PeerEndpoint,
    shards: usize,
    per_peer_max: usize,
) -> (usize, usize) {
    use std::hash::BuildHasher;
    let hash = rustc_hash::FxBuildHasher.hash_one(endpoint);
    // The high bits: the low ones of this hash are the weaker ones.
    let home = (u128::from(hash) * shards as u128) >> 64;
    (home as usize, shards.min(per_peer_max))
}

impl Pool {
    pub(crate) fn new(setup: PoolSetup) -> Self {
        Self {
            rng: StdRng::seed_from_u64(setup.seed),
            setup,
            peers: Vec::new(),
            by_endpoint: FxHashMap::default(),
            vacant: List::default(),
            entries: Vec::new(),
            free: Vec::new(),
            waiters: Vec::new(),
            free_waiters: Vec::new(),
            lru: List::default(),
            warm_total: 0,
            retries: BinaryHeap::new(),
            connects: VecDeque::new(),
            actions: VecDeque::new(),
            stopped: false,
            counters: PoolCounters::default(),
        }
    }

    // --- callers ------------------------------------------------------------------------

    /// The id of a peer; a new one is remembered.
    pub(crate) fn peer(&mut self, endpoint: &PeerEndpoint) -> Result<PeerId, CheckoutError> {
        if let Some(&index) = self.by_endpoint.get(endpoint) {
            return Ok(PeerId { index, generation: self.peers[index as usize].generation });
        }
        let index = if self.by_endpoint.len() >= self.setup.limits.peers_max {
            self.forget_vacant_peer().ok_or(CheckoutError::TooManyPeers)?
        } else {
            self.peers.push(Peer::unused());
            self.peers.len() as u32 - 1
        };
        let limit = self.limit_for(endpoint);
        let peer = &mut self.peers[index as usize];
        *peer = Peer { generation: peer.generation, limit, ..Peer::unused() };
        peer.endpoint = Some(endpoint.clone());
        let id = PeerId { index, generation: peer.generation };
        self.by_endpoint.insert(endpoint.clone(), index);
        self.update_vacancy(index);
        self.counters.peers = self.by_endpoint.len() as u64;
        Ok(id)
    }

    /// Lends a connection, or queues the caller, whose `token` a later action answers.
    /// `usable` says whether a connection is open at this moment.
    pub(crate) fn checkout(
        &mut self,
        now: Instant,
        peer: PeerId,
        token: u64,
        replay_safe: bool,
        usable: impl Fn(ConnId) -> bool,
    ) -> Result<Checkout, CheckoutError> {
        let index = self.known(peer)?;
        while let Some(slot) = self.peers[index as usize].idle.head() {
            if let Some(lease) = self.lend(slot, &usable) {
                self.counters.hits += 1;
                return Ok(Checkout::Ready(lease));
            }
        }
        while let Some(slot) = self.peers[index as usize].busy.head() {
            if let Some(lease) = self.lend(slot, &usable) {
                self.counters.hits += 1;
                self.grow(now, index);
                return Ok(Checkout::Ready(lease));
            }
        }
        self.counters.misses += 1;
        if replay_safe {
            while let Some(slot) = self.peers[index as usize].early.head() {
                if let Some(lease) = self.lend(slot, &usable) {
                    self.counters.handshakes_saved += 1;
                    return Ok(Checkout::Ready(lease));
                }
            }
        }
        self.wait(now, index, token, replay_safe)
    }

    /// Takes a lease back. A connection that ended meanwhile is no longer of interest.
    pub(crate) fn check_in(&mut self, now: Instant, lease: Lease) {
        let Some(slot) = self.slot_of(lease.entry) else { return };
        let entry = &mut self.entries[slot as usize];
        entry.leases -= 1;
        self.counters.leases -= 1;
        if entry.leases == 0 && entry.state == EntryState::Ready {
            let peer = entry.peer as usize;
            self.peers[peer].busy.remove(&mut self.entries, slot, peer_link);
            self.put_idle(now, slot);
        }
    }

    /// Keeps at least `wanted` connections to a peer open from now on; 0 ends it.
    pub(crate) fn warm_up(
        &mut self,
        now: Instant,
        peer: PeerId,
        wanted: usize,
    ) -> Result<(), CheckoutError> {
        let index = self.known(peer)?;
        let peer = &self.peers[index as usize];
        let room = self.setup.idle_max - (self.warm_total - peer.warm as usize);
        let allowed = room.min(peer.limit as usize);
        if wanted > allowed {
            return Err(CheckoutError::WarmUpTooLarge { wanted, allowed });
        }
        self.warm_total = self.warm_total - peer.warm as usize + wanted;
        self.peers[index as usize].warm = wanted as u32;
        // What the warm-up no longer holds may become old again.
        let mut at = self.peers[index as usize].idle.head();
        while let Some(slot) = at {
            let idle = self.peers[index as usize].idle;
            at = idle.next(&mut self.entries, slot, peer_link);
            let entry = &mut self.entries[slot as usize];
            if !entry.in_lru {
                entry.in_lru = true;
                entry.idle_since = Some(now);
                self.lru.push_back(&mut self.entries, slot, lru_link);
            }
        }
        self.trim();
        self.settle(now, index);
        Ok(())
    }

    // --- the shard --------------------------------------------------------------------

    /// Whether an attempt waits to be started.
    pub(crate) fn has_connects(&self) -> bool {
        !self.connects.is_empty()
    }

    /// The next attempt to start; answered by [`handle_started`](Self::handle_started) or
    /// [`handle_closed`](Self::handle_closed).
    pub(crate) fn next_connect(&mut self) -> Option<(EntryId, PeerEndpoint)> {
        loop {
            let id = self.connects.pop_front()?;
            let Some(slot) = self.slot_of(id) else { continue };
            let peer = self.entries[slot as usize].peer;
            let endpoint = self.peers[peer as usize].endpoint.clone();
            return Some((id, endpoint.expect("a peer with entries has an endpoint")));
        }
    }

    /// The attempt is under way; `early`: data may be sent already.
    pub(crate) fn handle_started(&mut self, id: EntryId, conn: ConnId, early: bool) {
        let Some(slot) = self.slot_of(id) else { return };
        let entry = &mut self.entries[slot as usize];
        entry.conn = Some(conn);
        if !early {
            return;
        }
        entry.state = EntryState::Early;
        let index = entry.peer;
        self.peers[index as usize].early.push_back(&mut self.entries, slot, peer_link);
        self.serve_waiters(slot, true);
    }

    /// The handshake is complete.
    pub(crate) fn handle_connected(&mut self, now: Instant, id: EntryId) {
        let Some(slot) = self.slot_of(id) else { return };
        let entry = &mut self.entries[slot as usize];
        let index = entry.peer;
        let peer = &mut self.peers[index as usize];
        match entry.state {
            EntryState::Early => peer.early.remove(&mut self.entries, slot, peer_link),
            EntryState::Connecting => {}
            EntryState::Ready | EntryState::Retired | EntryState::Free => return,
        }
        peer.connecting -= 1;
        self.counters.connecting -= 1;
        peer.ready += 1;
        self.counters.connections += 1;
        peer.wanted = false;
        let (after_failures, closed) = peer.circuit.succeed();
        self.entries[slot as usize].state = EntryState::Ready;
        self.emit(index, PoolEventKind::Connected { after_failures });
        if closed {
            self.emit(index, PoolEventKind::CircuitClosed);
        }
        self.serve_waiters(slot, false);
        if self.entries[slot as usize].leases == 0 {
            self.put_idle(now, slot);
        } else {
            self.peers[index as usize].busy.push_back(&mut self.entries, slot, peer_link);
        }
        self.settle(now, index);
    }

    /// The connection, or the attempt, is over.
    pub(crate) fn handle_closed(&mut self, now: Instant, id: EntryId, reason: &ConnectionError) {
        let Some(slot) = self.slot_of(id) else { return };
        let index = self.entries[slot as usize].peer;
        let was = self.entries[slot as usize].state;
        self.retire(slot);
        let leases = self.free_entry(slot);
        if matches!(was, EntryState::Connecting | EntryState::Early) {
            self.attempt_failed(now, index, reason);
        } else {
            self.connection_lost(now, index, reason, leases);
        }
        self.settle(now, index);
    }

    /// Closes what is idle for too long and starts attempts that are due.
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        if let Some(timeout) = self.idle_timeout() {
            while let Some(slot) = self.lru.head() {
                let since = self.entries[slot as usize].idle_since;
                if since.expect("idle entries have a time") + timeout > now {
                    break;
                }
                if self.evict(slot) {
                    self.counters.evicted_idle += 1;
                }
            }
        }
        while let Some(&Reverse((at, index, generation))) = self.retries.peek() {
            if at > now {
                break;
            }
            self.retries.pop();
            let peer = &mut self.peers[index as usize];
            if peer.generation == generation {
                peer.armed = false;
                self.settle(now, index);
            }
        }
    }

    /// When [`handle_timeout`](Self::handle_timeout) must be called next.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let oldest = self.lru.head().and_then(|slot| self.entries[slot as usize].idle_since);
        let idle = oldest.zip(self.idle_timeout()).map(|(since, timeout)| since + timeout);
        let retry = self.retries.peek().map(|Reverse((at, ..))| *at);
        idle.into_iter().chain(retry).min()
    }

    /// What the shard must do next.
    pub(crate) fn poll_action(&mut self) -> Option<PoolAction> {
        self.actions.pop_front()
    }

    /// The engine shuts down: nothing new is made, waiting callers are told, what is idle is closed.
    pub(crate) fn stop(&mut self) {
        self.stopped = true;
        self.warm_total = 0;
        for index in 0..self.peers.len() as u32 {
            self.fail_waiters(index, &CheckoutError::Connect(ConnectionError::EngineStopped));
            self.peers[index as usize].warm = 0;
            while let Some(slot) = self.peers[index as usize].idle.head() {
                self.close_idle(slot);
            }
        }
        self.retries.clear();
        self.connects.clear();
    }

    // --- lending ------------------------------------------------------------------------

    /// Lends the entry, first of its list, or retires it when it is not usable any more.
    fn lend(&mut self, slot: u32, usable: &impl Fn(ConnId) -> bool) -> Option<Lease> {
        let entry = &mut self.entries[slot as usize];
        let conn = entry.conn.expect("only started entries are in a list");
        if !usable(conn) {
            self.retire(slot);
            return None;
        }
        entry.leases += 1;
        let early = entry.state == EntryState::Early;
        let id = EntryId { slot, generation: entry.generation };
        let (first, in_lru) = (entry.leases == 1, std::mem::take(&mut entry.in_lru));
        let peer = &mut self.peers[entry.peer as usize];
        if early {
            // Stays where it is: all early callers share the oldest attempt.
        } else if first {
            peer.idle.remove(&mut self.entries, slot, peer_link);
            peer.busy.push_back(&mut self.entries, slot, peer_link);
            self.counters.idle -= 1;
        } else if peer.busy.len() > 1 {
            // Users of busy connections take turns.
            peer.busy.remove(&mut self.entries, slot, peer_link);
            peer.busy.push_back(&mut self.entries, slot, peer_link);
        }
        if in_lru {
            self.lru.remove(&mut self.entries, slot, lru_link);
        }
        self.counters.leases += 1;
        Some(Lease { conn, entry: id, early })
    }

    /// Every connection of the peer is in use: make a further one, where the limit allows.
    fn grow(&mut self, now: Instant, index: u32) {
        let peer = &self.peers[index as usize];
        if peer.ready < peer.limit
            && peer.connecting == 0
            && !self.stopped
            && peer.circuit.admit(now) == Admission::Now
        {
            self.start(index);
        }
    }

    fn wait(
        &mut self,
        now: Instant,
        index: u32,
        token: u64,
        replay_safe: bool,
    ) -> Result<Checkout, CheckoutError> {
        if self.stopped {
            return Err(CheckoutError::Connect(ConnectionError::EngineStopped));
        }
        if self.counters.waiters >= self.setup.limits.waiters_max as u64 {
            return Err(CheckoutError::TooManyWaiters);
        }
        let peer = &self.peers[index as usize];
        if peer.connecting > 0 {
            self.counters.handshakes_saved += 1;
        } else if let Admission::Refused(until) = peer.circuit.admit(now) {
            self.counters.refused_by_circuit += 1;
            let failures = peer.circuit.failures();
            return Err(CheckoutError::CircuitOpen { failures, retry_after: until - now });
        }
        let waiter = Waiter { token, replay_safe, link: Link::default() };
        let slot = match self.free_waiters.pop() {
            Some(slot) => {
                self.waiters[slot as usize] = waiter;
                slot
            }
            None => {
                self.waiters.push(waiter);
                self.waiters.len() as u32 - 1
            }
        };
        let queue = &mut self.peers[index as usize].waiters;
        queue.push_back(&mut self.waiters, slot, |waiter| &mut waiter.link);
        self.counters.waiters += 1;
        self.settle(now, index);
        Ok(Checkout::Waiting)
    }

    /// Gives the entry's connection to its peer's waiting callers.
    fn serve_waiters(&mut self, slot: u32, early: bool) {
        let index = self.entries[slot as usize].peer as usize;
        let mut at = self.peers[index].waiters.head();
        while let Some(waiter) = at {
            let queue = self.peers[index].waiters;
            at = queue.next(&mut self.waiters, waiter, |waiter| &mut waiter.link);
            if early && !self.waiters[waiter as usize].replay_safe {
                continue;
            }
            let token = self.take_waiter(index, waiter);
            let entry = &mut self.entries[slot as usize];
            entry.leases += 1;
            self.counters.leases += 1;
            let conn = entry.conn.expect("started");
            let entry = EntryId { slot, generation: entry.generation };
            let lease = Lease { conn, entry, early };
            self.actions.push_back(PoolAction::Ready { token, lease });
        }
    }

    fn fail_waiters(&mut self, index: u32, error: &CheckoutError) {
        while let Some(waiter) = self.peers[index as usize].waiters.head() {
            let token = self.take_waiter(index as usize, waiter);
            self.actions.push_back(PoolAction::Failed { token, error: error.clone() });
        }
    }

    fn take_waiter(&mut self, index: usize, waiter: u32) -> u64 {
        let queue = &mut self.peers[index].waiters;
        queue.remove(&mut self.waiters, waiter, |waiter| &mut waiter.link);
        self.free_waiters.push(waiter);
        self.counters.waiters -= 1;
        self.waiters[waiter as usize].token
    }

    // --- entries --------------------------------------------------------------------------

    /// A new attempt; the shard finds it with [`next_connect`](Self::next_connect).
    fn start(&mut self, index: u32) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry::unused());
            self.entries.len() as u32 - 1
        });
        let entry = &mut self.entries[slot as usize];
        entry.peer = index;
        entry.state = EntryState::Connecting;
        let id = EntryId { slot, generation: entry.generation };
        let peer = &mut self.peers[index as usize];
        peer.connecting += 1;
        peer.entries += 1;
        self.counters.connecting += 1;
        self.counters.handshakes += 1;
        if peer.circuit.begin() {
            self.emit(index, PoolEventKind::CircuitHalfOpen);
        }
        self.connects.push_back(id);
        self.update_vacancy(index);
    }

    /// An entry that nobody uses any more.
    fn put_idle(&mut self, now: Instant, slot: u32) {
        let entry = &mut self.entries[slot as usize];
        let peer = &mut self.peers[entry.peer as usize];
        entry.idle_since = Some(now);
        let pinned = peer.ready <= peer.warm;
        entry.in_lru = !pinned;
        peer.idle.push_front(&mut self.entries, slot, peer_link);
        self.counters.idle += 1;
        if !pinned {
            self.lru.push_back(&mut self.entries, slot, lru_link);
            self.trim();
        }
    }

    /// Closes the oldest idle connections beyond the limit.
    fn trim(&mut self) {
        while self.lru.len() > self.setup.idle_max - self.warm_total {
            let oldest = self.lru.head().expect("longer than a limit");
            if self.evict(oldest) {
                self.counters.evicted_full += 1;
            }
        }
    }

    /// Closes an idle connection, unless its peer's warm-up needs it: then it is old no more.
    fn evict(&mut self, slot: u32) -> bool {
        let peer = &self.peers[self.entries[slot as usize].peer as usize];
        if peer.ready <= peer.warm {
            self.entries[slot as usize].in_lru = false;
            self.lru.remove(&mut self.entries, slot, lru_link);
            return false;
        }
        self.close_idle(slot);
        true
    }

    fn close_idle(&mut self, slot: u32) {
        let conn = self.entries[slot as usize].conn.expect("idle entries are connected");
        self.retire(slot);
        self.actions.push_back(PoolAction::Close { conn });
    }

    /// Takes an entry out of every list: it is never lent again.
    fn retire(&mut self, slot: u32) {
        let entry = &mut self.entries[slot as usize];
        let was = std::mem::replace(&mut entry.state, EntryState::Retired);
        let in_lru = std::mem::take(&mut entry.in_lru);
        let peer = &mut self.peers[entry.peer as usize];
        match was {
            EntryState::Free | EntryState::Retired => return,
            EntryState::Connecting | EntryState::Early => {
                peer.connecting -= 1;
                self.counters.connecting -= 1;
                if was == EntryState::Early {
                    peer.early.remove(&mut self.entries, slot, peer_link);
                }
            }
            EntryState::Ready => {
                peer.ready -= 1;
                self.counters.connections -= 1;
                if entry.leases == 0 {
                    peer.idle.remove(&mut self.entries, slot, peer_link);
                    self.counters.idle -= 1;
                } else {
                    peer.busy.remove(&mut self.entries, slot, peer_link);
                }
            }
        }
        if in_lru {
            self.lru.remove(&mut self.entries, slot, lru_link);
        }
    }

    /// Makes a retired entry's slot free again; its open leases become void.
    fn free_entry(&mut self, slot: u32) -> u32 {
        let entry = &mut self.entries[slot as usize];
        let leases = std::mem::take(&mut entry.leases);
        self.counters.leases -= u64::from(leases);
        self.peers[entry.peer as usize].entries -= 1;
        *entry = Entry { generation: entry.generation.wrapping_add(1), ..Entry::unused() };
        self.free.push(slot);
        leases
    }

    fn slot_of(&self, id: EntryId) -> Option<u32> {
        let entry = &self.entries[id.slot as usize];
        (entry.generation == id.generation && entry.state != EntryState::Free).then_some(id.slot)
    }

    // --- failures ---------------------------------------------------------------------

    fn attempt_failed(&mut self, now: Instant, index: u32, reason: &ConnectionError) {
        self.fail_waiters(index, &CheckoutError::Connect(reason.clone()));
        if is_deliberate(reason) || self.stopped {
            return;
        }
        self.counters.handshakes_failed += 1;
        let peer = &mut self.peers[index as usize];
        let pause = peer.circuit.fail(now, &self.setup.limits, &mut self.rng);
        let failures = peer.circuit.failures();
        if pause.opened {
            // Nobody waits and nobody asked for it to be warm: the next caller tries again.
            peer.wanted = false;
        }
        let reconnects = peer.wanted || peer.ready < peer.warm;
        self.emit(index, PoolEventKind::AttemptFailed { reason: reason.clone(), failures });
        if pause.opened {
            self.counters.circuits_opened += 1;
            self.emit(index, PoolEventKind::CircuitOpened { retry_after: pause.duration });
        }
        if reconnects {
            self.schedule(now, index, pause.duration);
        }
    }

    fn connection_lost(&mut self, now: Instant, index: u32, reason: &ConnectionError, leases: u32) {
        if self.stopped {
            return;
        }
        let peer = &mut self.peers[index as usize];
        if is_deliberate(reason) {
            if peer.ready + peer.connecting < peer.warm {
                let pause = peer.circuit.lose(now, &self.setup.limits, &mut self.rng);
                self.schedule(now, index, pause.duration);
            }
            return;
        }
        self.counters.lost += 1;
        peer.wanted |= leases > 0 && peer.ready + peer.connecting == 0;
        let reconnects = peer.wanted || peer.ready + peer.connecting < peer.warm;
        self.emit(index, PoolEventKind::Lost { reason: reason.clone(), leases });
        if reconnects {
            let peer = &mut self.peers[index as usize];
            let pause = peer.circuit.lose(now, &self.setup.limits, &mut self.rng);
            self.schedule(now, index, pause.duration);
        }
    }

    fn schedule(&mut self, now: Instant, index: u32, after: Duration) {
        self.counters.reconnects += 1;
        self.arm(index, now + after);
        self.emit(index, PoolEventKind::ReconnectScheduled { after });
    }

    fn arm(&mut self, index: u32, at: Instant) {
        let peer = &mut self.peers[index as usize];
        if !std::mem::replace(&mut peer.armed, true) {
            self.retries.push(Reverse((at, index, peer.generation)));
        }
    }

    /// Starts the attempts that the peer needs, or files when they may start.
    fn settle(&mut self, now: Instant, index: u32) {
        loop {
            let peer = &self.peers[index as usize];
            let wanted = u32::from(peer.wanted || peer.waiters.len() > 0);
            let needed = wanted.max(peer.warm).min(peer.limit);
            let there = peer.ready + peer.connecting;
            // One attempt at a time while the peer is failing.
            let must_wait = peer.circuit.failures() > 0 && peer.connecting > 0;
            if self.stopped || there >= needed || must_wait {
                break;
            }
            match peer.circuit.admit(now) {
                Admission::Now => self.start(index),
                Admission::At(at) | Admission::Refused(at) => {
                    self.arm(index, at);
                    break;
                }
            }
        }
        self.update_vacancy(index);
    }

    // --- peers --------------------------------------------------------------------------

    fn known(&self, id: PeerId) -> Result<u32, CheckoutError> {
        match self.peers.get(id.index as usize) {
            Some(peer) if peer.generation == id.generation => Ok(id.index),
            _ => Err(CheckoutError::UnknownPeer),
        }
    }

    /// Connections that this pool may have to a peer.
    fn limit_for(&self, endpoint: &PeerEndpoint) -> u32 {
        let (shards, total) = (self.setup.shards, self.setup.limits.connections_per_peer_max);
        let (home, width) = spread(endpoint, shards, total);
        let offset = (self.setup.shard % shards + shards - home) % shards;
        let share = total / width + usize::from(offset < total % width);
        u32::try_from(share.max(1)).expect("validated: at most 1024")
    }

    fn update_vacancy(&mut self, index: u32) {
        let peer = &mut self.peers[index as usize];
        let is_vacant = peer.endpoint.is_some()
            && peer.entries == 0
            && peer.waiters.len() == 0
            && peer.warm == 0
            && !peer.wanted;
        let was_vacant = std::mem::replace(&mut peer.vacant, is_vacant);
        match (was_vacant, is_vacant) {
            (false, true) => self.vacant.push_back(&mut self.peers, index, |p| &mut p.vacant_link),
            (true, false) => self.vacant.remove(&mut self.peers, index, |p| &mut p.vacant_link),
            _ => {}
        }
    }

    fn forget_vacant_peer(&mut self) -> Option<u32> {
        let index = self.vacant.pop_front(&mut self.peers, |peer| &mut peer.vacant_link)?;
        let peer = &mut self.peers[index as usize];
        peer.vacant = false;
        peer.generation = peer.generation.wrapping_add(1);
        let endpoint = peer.endpoint.take().expect("vacant peers have an endpoint");
        self.by_endpoint.remove(&endpoint);
        Some(index)
    }

    fn idle_timeout(&self) -> Option<Duration> {
        let ms = self.setup.limits.idle_timeout_ms;
        (ms != 0).then(|| Duration::from_millis(ms))
    }

    fn emit(&mut self, index: u32, kind: PoolEventKind) {
        let peer = self.peers[index as usize].endpoint.clone().expect("a peer in use");
        let event = PoolEvent { peer, shard: self.setup.shard, kind };
        self.actions.push_back(PoolAction::Event(event));
    }
}

/// Whether this side ended it: no failure of the peer.
fn is_deliberate(reason: &ConnectionError) -> bool {
    use ConnectionError::{AppPanicked, ClosedLocally, EngineStopped};
    matches!(reason, ClosedLocally | EngineStopped | AppPanicked)
}

impl Entry {
    fn unused() -> Self {
        Self {
            conn: None,
            peer: NONE,
            generation: 0,
            leases: 0,
            state: EntryState::Free,
            in_lru: false,
            idle_since: None,
            peer_link: Link::default(),
            lru_link: Link::default(),
        }
    }
}

impl Peer {
    fn unused() -> Self {
        Self {
            endpoint: None,
            generation: 0,
            idle: List::default(),
            busy: List::default(),
            early: List::default(),
            ready: 0,
            connecting: 0,
            entries: 0,
            warm: 0,
            limit: 1,
            wanted: false,
            armed: false,
            vacant: false,
            vacant_link: Link::default(),
            waiters: List::default(),
            circuit: Circuit::default(),
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
