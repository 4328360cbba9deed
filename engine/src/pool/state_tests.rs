//! The pool alone: a test plays the shard, which connects, loses and closes connections.

use std::cell::RefCell;
use std::collections::HashSet;
use std::net::{Ipv6Addr, SocketAddrV6};

use rand::Rng;

use super::*;
use crate::error::ConnectError;

struct Bench {
    pool: Pool,
    now: Instant,
    next_conn: u32,
    /// Connections that are closed although the pool was not told yet.
    closed: RefCell<HashSet<ConnId>>,
    events: Vec<PoolEventKind>,
}

fn limits() -> PoolConfig {
    PoolConfig {
        reconnect_base_ms: 100,
        reconnect_cap_ms: 1000,
        circuit_failures: 3,
        circuit_open_ms: 5000,
        ..Default::default()
    }
}

fn endpoint(number: u16) -> PeerEndpoint {
    let address = SocketAddrV6::new(Ipv6Addr::LOCALHOST, 1000 + number, 0, 0);
    PeerEndpoint::new(address, "peer.test")
}

impl Bench {
    fn new(limits: PoolConfig, idle_max: usize) -> Self {
        let setup = PoolSetup { limits, idle_max, shard: 0, shards: 1, seed: 5 };
        Self {
            pool: Pool::new(setup),
            now: Instant::now(),
            next_conn: 0,
            closed: RefCell::default(),
            events: Vec::new(),
        }
    }

    fn peer(&mut self, number: u16) -> PeerId {
        self.pool.peer(&endpoint(number)).expect("room for a peer")
    }

    fn ask(
        &mut self,
        peer: PeerId,
        token: u64,
        replay_safe: bool,
    ) -> Result<Checkout, CheckoutError> {
        let closed = &self.closed;
        let usable = |conn: ConnId| !closed.borrow().contains(&conn);
        self.pool.checkout(self.now, peer, token, replay_safe, usable)
    }

    fn lend(&mut self, peer: PeerId) -> Lease {
        match self.ask(peer, u64::MAX, false) {
            Ok(Checkout::Ready(lease)) => lease,
            other => panic!("no connection at once: {other:?}"),
        }
    }

    fn wait(&mut self, peer: PeerId, token: u64) {
        assert_eq!(self.ask(peer, token, false), Ok(Checkout::Waiting));
    }

    fn check_in(&mut self, lease: Lease) {
        self.pool.check_in(self.now, lease);
    }

    fn pass(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
        self.pool.handle_timeout(self.now);
    }

    /// Starts every attempt that waits; as the shard does.
    fn start(&mut self, early: bool) -> Vec<(EntryId, ConnId)> {
        let mut started = Vec::new();
        while let Some((entry, _)) = self.pool.next_connect() {
            self.next_conn += 1;
            let conn = ConnId { slot: self.next_conn, generation: 1 };
            self.pool.handle_started(entry, conn, early);
            started.push((entry, conn));
        }
        started
    }

    /// Starts one attempt, which succeeds.
    fn connect(&mut self) -> (EntryId, ConnId) {
        let started = self.start(false);
        let [(entry, conn)] = started[..] else { panic!("{} attempts, not one", started.len()) };
        self.pool.handle_connected(self.now, entry);
        (entry, conn)
    }

    /// Starts one attempt, which fails.
    fn fail(&mut self) {
        let started = self.start(false);
        assert_eq!(started.len(), 1, "one attempt at a time");
        self.pool.handle_closed(self.now, started[0].0, &ConnectionError::TimedOut);
    }

    fn actions(&mut self) -> Vec<PoolAction> {
        let mut actions = Vec::new();
        while let Some(action) = self.pool.poll_action() {
            match action {
                PoolAction::Event(event) => self.events.push(event.kind),
                other => actions.push(other),
            }
        }
        actions
    }

    fn leases(&mut self) -> Vec<(u64, Lease)> {
        let take = |action| match action {
            PoolAction::Ready { token, lease } => (token, lease),
            other => panic!("not a lease: {other:?}"),
        };
        self.actions().into_iter().map(take).collect()
    }

    /// A peer with one idle connection.
    fn idle(&mut self, number: u16) -> (PeerId, EntryId, ConnId) {
        let peer = self.peer(number);
        self.wait(peer, 0);
        let (entry, conn) = self.connect();
        for (_, lease) in self.leases() {
            self.check_in(lease);
        }
        (peer, entry, conn)
    }
}

#[test]
fn concurrent_callers_share_one_handshake_and_then_one_connection() {
    let mut bench = Bench::new(limits(), 10);
    let peer = bench.peer(1);
    for token in 0..50 {
        bench.wait(peer, token);
    }
    let (_, conn) = bench.connect();
    let leases = bench.leases();
    assert_eq!(
        leases.iter().map(|(token, _)| *token).collect::<Vec<_>>(),
        (0..50).collect::<Vec<_>>()
    );
    assert!(leases.iter().all(|(_, lease)| lease.conn() == conn && !lease.is_early()));
    let counters = bench.pool.counters;
    assert_eq!((counters.handshakes, counters.handshakes_saved, counters.misses), (1, 49, 50));
    assert_eq!((counters.leases, counters.idle, counters.waiters), (50, 0, 0));
    for (_, lease) in leases {
        bench.check_in(lease);
    }
    assert_eq!((bench.pool.counters.leases, bench.pool.counters.idle), (0, 1));
    let lease = bench.lend(peer);
    assert_eq!((lease.conn(), bench.pool.counters.hits), (conn, 1));
}

#[test]
fn peers_names_and_profiles_are_kept_apart() {
    let mut bench = Bench::new(limits(), 10);
    let base = endpoint(1);
    let renamed = PeerEndpoint::new(base.remote(), "other.test");
    let ids =
        [base.clone(), renamed, endpoint(2)].map(|peer| bench.pool.peer(&peer).expect("room"));
    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), 3);
    assert_eq!(bench.pool.peer(&base), Ok(ids[0]), "the same key is the same peer");
}

#[test]
fn what_closed_is_never_lent_even_before_the_pool_was_told() {
    let mut bench = Bench::new(limits(), 10);
    let (peer, entry, conn) = bench.idle(1);
    bench.closed.borrow_mut().insert(conn);
    bench.wait(peer, 7);
    let (_, fresh) = bench.connect();
    let leases = bench.leases();
    assert_eq!((leases[0].0, leases[0].1.conn()), (7, fresh));
    bench.pool.handle_closed(bench.now, entry, &ConnectionError::Reset);
    assert_eq!(bench.pool.counters.connections, 1, "the fresh one stands");
    // In use, too: the busy list is checked as well.
    bench.closed.borrow_mut().insert(fresh);
    bench.wait(peer, 8);
    // A lease of a connection that is gone is taken back without harm.
    for (_, lease) in leases {
        bench.check_in(lease);
    }
    assert_eq!((bench.pool.counters.leases, bench.pool.counters.idle), (0, 0));
}

#[test]
fn the_longest_idle_goes_first_and_use_makes_young() {
    let mut bench = Bench::new(limits(), 3);
    let idle: Vec<_> = (0..3).map(|number| bench.idle(number)).collect();
    let lease = bench.lend(idle[0].0);
    bench.check_in(lease);
    bench.idle(3);
    assert_eq!(bench.actions(), [PoolAction::Close { conn: idle[1].2 }], "the oldest unused one");
    let counters = bench.pool.counters;
    assert_eq!((counters.idle, counters.evicted_full), (3, 1));
    bench.wait(idle[1].0, 0);
}

#[test]
fn idle_connections_are_closed_in_time() {
    let mut bench = Bench::new(PoolConfig { idle_timeout_ms: 1000, ..limits() }, 10);
    let (_, _, first) = bench.idle(1);
    bench.pass(600);
    let (_, _, second) = bench.idle(2);
    assert_eq!(bench.pool.poll_timeout(), Some(bench.now + Duration::from_millis(400)));
    bench.pass(399);
    assert_eq!(bench.actions(), []);
    bench.pass(1);
    assert_eq!(bench.actions(), [PoolAction::Close { conn: first }]);
    bench.pass(600);
    assert_eq!(bench.actions(), [PoolAction::Close { conn: second }]);
    assert_eq!((bench.pool.counters.evicted_idle, bench.pool.poll_timeout()), (2, None));
}

#[test]
fn a_pool_of_size_zero_keeps_nothing() {
    let mut bench = Bench::new(limits(), 0);
    let peer = bench.peer(1);
    bench.wait(peer, 1);
    let (entry, conn) = bench.connect();
    let (_, lease) = bench.leases().pop().expect("a lease");
    bench.check_in(lease);
    assert_eq!(bench.actions(), [PoolAction::Close { conn }]);
    bench.pool.handle_closed(bench.now, entry, &ConnectionError::ClosedLocally);
    assert_eq!(
        bench.pool.warm_up(bench.now, peer, 1),
        Err(CheckoutError::WarmUpTooLarge { wanted: 1, allowed: 0 })
    );
}

#[test]
fn a_busy_peer_gets_further_connections_up_to_its_limit_and_users_take_turns() {
    let limits = PoolConfig { connections_per_peer_max: 3, ..limits() };
    let mut bench = Bench::new(limits, 10);
    let (peer, ..) = bench.idle(1);
    let mut used = vec![bench.lend(peer)];
    assert_eq!(bench.start(false), [], "an idle one was there");
    for connections in 2..=3 {
        used.push(bench.lend(peer));
        bench.connect();
        assert_eq!(bench.pool.counters.connections, connections);
        used.push(bench.lend(peer));
        assert_eq!(used.last().expect("lent").conn().slot as u64, connections, "the new one");
    }
    for _ in 0..30 {
        used.push(bench.lend(peer));
    }
    assert_eq!(bench.start(false), [], "the limit is reached");
    let mut shares = [0; 4];
    for lease in &used[used.len() - 30..] {
        shares[lease.conn().slot as usize] += 1;
    }
    assert_eq!(shares, [0, 10, 10, 10]);
    for lease in used {
        bench.check_in(lease);
    }
    assert_eq!((bench.pool.counters.leases, bench.pool.counters.idle), (0, 3));
}

#[test]
fn a_warm_peer_is_neither_too_old_nor_too_many_and_is_made_again() {
    let limits = PoolConfig { idle_timeout_ms: 1000, connections_per_peer_max: 2, ..limits() };
    let mut bench = Bench::new(limits, 3);
    let peer = bench.peer(1);
    assert!(bench.pool.warm_up(bench.now, peer, 3).is_err(), "more than the peer's limit");
    bench.pool.warm_up(bench.now, peer, 2).expect("within the limits");
    let started = bench.start(false);
    assert_eq!(started.len(), 2);
    for (entry, _) in &started {
        bench.pool.handle_connected(bench.now, *entry);
    }
    bench.pass(10_000);
    assert_eq!(bench.actions(), [], "warm connections do not age");
    bench.idle(2);
    bench.idle(3);
    let closed = bench.actions();
    assert!(matches!(closed[..], [PoolAction::Close { .. }]), "2 warm + 1 idle: {closed:?}");
    bench.events.clear();

    bench.pool.handle_closed(bench.now, started[0].0, &ConnectionError::Reset);
    assert_eq!(bench.actions(), []);
    let events = std::mem::take(&mut bench.events);
    assert!(matches!(events[0], PoolEventKind::Lost { leases: 0, .. }), "{events:?}");
    let PoolEventKind::ReconnectScheduled { after } = events[1] else { panic!("{events:?}") };
    assert!(after <= Duration::from_millis(100));
    bench.pass(100);
    bench.connect();
    assert_eq!(bench.pool.counters.connections, 2 + 1);

    bench.pool.warm_up(bench.now, peer, 0).expect("always allowed");
    bench.pass(1000);
    assert_eq!(bench.pool.counters.idle, 0, "they age again");
    assert_eq!(bench.actions().len(), 3);
}

#[test]
fn a_connection_lost_in_use_is_made_again_an_idle_one_is_not() {
    let mut bench = Bench::new(limits(), 10);
    let (_, entry, _) = bench.idle(1);
    bench.pool.handle_closed(bench.now, entry, &ConnectionError::TimedOut);
    bench.pass(60_000);
    assert_eq!(bench.start(false), [], "nobody used it");

    let (peer, entry, _) = bench.idle(2);
    let lease = bench.lend(peer);
    bench.actions();
    bench.events.clear();
    bench.pool.handle_closed(bench.now, entry, &ConnectionError::Reset);
    assert_eq!(bench.actions(), []);
    let lost = PoolEventKind::Lost { reason: ConnectionError::Reset, leases: 1 };
    assert_eq!(bench.events[0], lost);
    bench.pass(100);
    bench.connect();
    bench.check_in(lease);
    assert_eq!((bench.pool.counters.idle, bench.pool.counters.leases), (1, 0));

    let lease = bench.lend(peer);
    let entry = lease.entry;
    bench.pool.handle_closed(bench.now, entry, &ConnectionError::ClosedLocally);
    bench.pass(60_000);
    assert_eq!(bench.start(false), [], "we closed it ourselves");
    drop(lease);
}

#[test]
fn failures_back_off_open_the_circuit_and_one_probe_closes_it() {
    let mut bench = Bench::new(limits(), 10);
    let peer = bench.peer(1);
    for failures in 1..=3u32 {
        bench.wait(peer, u64::from(failures));
        assert_eq!(bench.pool.has_connects(), failures == 1, "the others wait for the pause");
        bench.pass(1000);
        bench.fail();
        let reason = CheckoutError::Connect(ConnectionError::TimedOut);
        let told = PoolAction::Failed { token: u64::from(failures), error: reason };
        assert_eq!(bench.actions(), [told]);
        let failed = bench.events.iter().rev().find_map(|event| match event {
            PoolEventKind::AttemptFailed { failures, .. } => Some(*failures),
            _ => None,
        });
        assert_eq!(failed, Some(failures));
    }
    assert!(matches!(bench.events.last(), Some(PoolEventKind::CircuitOpened { .. })));
    let refused = bench.ask(peer, 9, false);
    let Err(CheckoutError::CircuitOpen { failures: 3, retry_after }) = refused else {
        panic!("{refused:?}")
    };
    assert!(retry_after >= Duration::from_millis(5000));
    bench.pass(4999);
    assert!(bench.ask(peer, 9, false).is_err(), "still open");
    assert_eq!(bench.start(false), [], "nobody wants it: no probe");

    bench.pass(600);
    bench.wait(peer, 10);
    bench.wait(peer, 11);
    bench.fail();
    assert_eq!(bench.actions().len(), 2, "both callers of the probe are told");
    assert!(bench.ask(peer, 12, false).is_err(), "one failure opens it again");
    bench.pass(6000);
    bench.wait(peer, 13);
    bench.connect();
    assert_eq!(bench.leases().len(), 1);
    let tail = &bench.events[bench.events.len() - 3..];
    assert_eq!(tail[0], PoolEventKind::CircuitHalfOpen);
    assert_eq!(tail[1], PoolEventKind::Connected { after_failures: 4 });
    assert_eq!(tail[2], PoolEventKind::CircuitClosed);
    let counters = bench.pool.counters;
    assert_eq!((counters.circuits_opened, counters.refused_by_circuit), (2, 3));
}

#[test]
fn a_warm_peer_probes_by_itself() {
    let mut bench = Bench::new(limits(), 10);
    let peer = bench.peer(1);
    bench.pool.warm_up(bench.now, peer, 1).expect("room");
    for _ in 0..3 {
        bench.fail();
        bench.pass(1000);
    }
    assert_eq!(bench.start(false), [], "the circuit is open");
    bench.pass(5500);
    bench.connect();
    assert_eq!(bench.pool.counters.connections, 1);
}

#[test]
fn an_attempt_that_cannot_start_fails_its_callers() {
    let mut bench = Bench::new(limits(), 10);
    let peer = bench.peer(1);
    bench.wait(peer, 1);
    let (entry, _) = bench.pool.next_connect().expect("an attempt");
    let reason = ConnectionError::NotStarted(ConnectError::TooManyConnections);
    bench.pool.handle_closed(bench.now, entry, &reason);
    let error = CheckoutError::Connect(reason);
    assert_eq!(bench.actions(), [PoolAction::Failed { token: 1, error }]);
    assert_eq!(bench.pool.counters.connecting, 0);
}

#[test]
fn only_replay_safe_callers_get_a_connection_early() {
    let mut bench = Bench::new(limits(), 10);
    let peer = bench.peer(1);
    bench.wait(peer, 1);
    assert_eq!(bench.ask(peer, 2, true), Ok(Checkout::Waiting), "no attempt under way yet");
    let (entry, conn) = bench.start(true)[0];
    let early = bench.leases();
    assert_eq!(early.len(), 1);
    assert!(early[0].0 == 2 && early[0].1.is_early() && early[0].1.conn() == conn);
    let Ok(Checkout::Ready(at_once)) = bench.ask(peer, 3, true) else { panic!("not lent") };
    assert!(at_once.is_early());
    bench.wait(peer, 4);
    bench.pool.handle_connected(bench.now, entry);
    let late = bench.leases();
    assert_eq!(late.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 4]);
    assert!(late.iter().all(|(_, lease)| !lease.is_early()));
    for (_, lease) in early.into_iter().chain(late).chain([(0, at_once)]) {
        bench.check_in(lease);
    }
    assert_eq!((bench.pool.counters.leases, bench.pool.counters.idle), (0, 1));
}

#[test]
fn an_early_connection_that_fails_leaves_nothing_behind() {
    let mut bench = Bench::new(limits(), 10);
    let peer = bench.peer(1);
    assert_eq!(bench.ask(peer, 2, true), Ok(Checkout::Waiting));
    let (entry, _) = bench.start(true)[0];
    let (_, lease) = bench.leases().pop().expect("early");
    bench.pool.handle_closed(bench.now, entry, &ConnectionError::TimedOut);
    bench.check_in(lease);
    let counters = bench.pool.counters;
    assert_eq!((counters.leases, counters.connecting, counters.connections), (0, 0, 0));
}

#[test]
fn unused_peers_make_room_and_their_ids_become_stale() {
    let mut bench = Bench::new(PoolConfig { peers_max: 2, ..limits() }, 10);
    let (kept, ..) = bench.idle(1);
    let forgotten = bench.peer(2);
    let third = bench.peer(3);
    assert_eq!(bench.ask(forgotten, 1, false), Err(CheckoutError::UnknownPeer));
    bench.wait(third, 1);
    assert_eq!(bench.pool.peer(&endpoint(4)), Err(CheckoutError::TooManyPeers), "both in use");
    drop(bench.lend(kept));
    assert_eq!(bench.pool.counters.peers, 2);
}

#[test]
fn waiting_callers_are_limited() {
    let mut bench = Bench::new(PoolConfig { waiters_max: 2, ..limits() }, 10);
    let peer = bench.peer(1);
    bench.wait(peer, 1);
    bench.wait(peer, 2);
    assert_eq!(bench.ask(peer, 3, false), Err(CheckoutError::TooManyWaiters));
    bench.connect();
    bench.leases();
    assert_eq!(bench.pool.counters.waiters, 0);
}

#[test]
fn a_stopped_pool_closes_what_is_idle_and_refuses() {
    let mut bench = Bench::new(limits(), 10);
    let (_, _, idle) = bench.idle(1);
    let warm = bench.peer(2);
    bench.pool.warm_up(bench.now, warm, 1).expect("room");
    let (_, warm_conn) = bench.connect();
    let waiting = bench.peer(3);
    bench.wait(waiting, 7);
    bench.actions();
    bench.pool.stop();
    let stopped = CheckoutError::Connect(ConnectionError::EngineStopped);
    let actions = bench.actions();
    assert!(actions.contains(&PoolAction::Close { conn: idle }));
    assert!(actions.contains(&PoolAction::Close { conn: warm_conn }));
    assert!(actions.contains(&PoolAction::Failed { token: 7, error: stopped.clone() }));
    assert_eq!(bench.ask(waiting, 8, false), Err(stopped));
    bench.pass(60_000);
    assert_eq!(bench.start(false), []);
    assert_eq!(bench.pool.poll_timeout(), None);
}

#[test]
fn shares_of_the_shards_add_up_to_the_peers_limit() {
    for (shards, total) in [(1, 5), (4, 5), (8, 3), (3, 3)] {
        let limits = PoolConfig { connections_per_peer_max: total, ..limits() };
        for number in 0..50 {
            let endpoint = endpoint(number);
            let (home, width) = spread(&endpoint, shards, total);
            assert!(home < shards && width == shards.min(total));
            let share = |turn| {
                let shard = (home + turn) % shards;
                let limits = limits.clone();
                let setup = PoolSetup { limits, idle_max: 1, shard, shards, seed: 1 };
                Pool::new(setup).limit_for(&endpoint) as usize
            };
            assert_eq!((0..width).map(share).sum::<usize>(), total);
        }
    }
}

#[test]
fn peers_are_spread_over_the_shards() {
    let mut peers = [0; 4];
    for number in 0..4000 {
        peers[spread(&endpoint(number), 4, 1).0] += 1;
    }
    assert!(peers.iter().all(|count| (800..1200).contains(count)), "{peers:?}");
}

/// Everything at random: the lists, the counters and the limits stay consistent.
#[test]
fn random_use_keeps_every_count_right() {
    for seed in 0..40 {
        let limits = PoolConfig {
            connections_per_peer_max: 1 + seed as usize % 3,
            peers_max: 6,
            idle_timeout_ms: 500,
            ..limits()
        };
        let mut bench = Bench::new(limits, 4);
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut leases, mut open) = (Vec::new(), Vec::new());
        for step in 0..3000u64 {
            match rng.random_range(0..8) {
                0 | 1 => {
                    let endpoint = endpoint(rng.random_range(0..8));
                    if let Ok(peer) = bench.pool.peer(&endpoint)
                        && let Ok(Checkout::Ready(lease)) = bench.ask(peer, step, step % 3 == 0)
                    {
                        let closed = bench.closed.borrow();
                        assert!(!closed.contains(&lease.conn()), "seed {seed}: a closed one lent");
                        leases.push(lease);
                    }
                }
                2 | 3 if !leases.is_empty() => {
                    let index = rng.random_range(0..leases.len());
                    bench.check_in(leases.swap_remove(index));
                }
                4 => open.extend(bench.start(step % 5 == 0)),
                5 if !open.is_empty() => {
                    let (entry, _) = open[rng.random_range(0..open.len())];
                    bench.pool.handle_connected(bench.now, entry);
                }
                6 if !open.is_empty() => {
                    let (entry, conn) = open.swap_remove(rng.random_range(0..open.len()));
                    bench.closed.borrow_mut().insert(conn);
                    if rng.random_range(0..2) == 0 {
                        bench.pool.handle_closed(bench.now, entry, &ConnectionError::Reset);
                    } else {
                        open.push((entry, conn));
                    }
                }
                _ => bench.pass(rng.random_range(0..300)),
            }
            for action in bench.actions() {
                match action {
                    PoolAction::Ready { lease, .. } => leases.push(lease),
                    PoolAction::Close { conn } => drop(bench.closed.borrow_mut().insert(conn)),
                    _ => {}
                }
            }
            let counters = bench.pool.counters;
            assert!(counters.idle <= 4 && counters.idle <= counters.connections);
            assert!(counters.peers <= 6 && bench.pool.retries.len() <= 200);
        }
        for (entry, _) in open {
            bench.pool.handle_closed(bench.now, entry, &ConnectionError::ClosedLocally);
        }
        for lease in leases {
            bench.check_in(lease);
        }
        let counters = bench.pool.counters;
        let ends = (counters.leases, counters.idle, counters.connections, counters.waiters);
        // Callers that wait for attempts which were never started still wait.
        assert_eq!((ends.0, ends.1, ends.2), (0, 0, 0), "seed {seed}");
        let used = bench.pool.entries.iter().filter(|e| e.state != EntryState::Free).count() as u64;
        assert_eq!(used, counters.connecting, "seed {seed}: entries leak");
    }
}
