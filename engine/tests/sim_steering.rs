//! A server with several shards in virtual time, while its clients' addresses change, shards are
//! held up and hand-over queues overflow: each connection completes or fails with its reason.
//!
//! Every run prints its seed. `STOQ_SOAK=200` runs two hundred seeds instead of a few;
//! `STOQ_SOAK_SEED=17` runs one. A seed fixes the stage: link, shards, policy, and what is drawn for its
//! changes. It does not fix every packet: quinn-proto takes a client's first ID and the length of a
//! transport parameter from the system's randomness, so a rare failure takes some runs to come back.

#[path = "common/sim.rs"]
mod sim;

use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn_proto::Dir;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sim::{Plan, SERVER, SERVER_HOST, Send, SharedLog, TestApp, pattern, tls};
use stoq::VarInt;
use stoq::clock::SimClock;
use stoq::config::{CidConfig, RetryPolicy, TransportConfig};
use stoq::datapath::sim::{LinkConfig, Prefix, SimNetwork, SimNode, run};
use stoq::error::ConnectionError;
use stoq::metrics::ShardCounters;
use stoq::sim::{SimHost, SimHostConfig, SimShards};

const CLIENTS: usize = 12;
const UPLOAD_BYTES: usize = 400_000;
/// Where the clients' NATs have their addresses.
const OUTSIDE: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0);
/// Virtual time between two changes of the stage.
const STEP: Duration = Duration::from_millis(10);
/// Longest run: every connection that cannot go on is given up before.
const LIMIT: Duration = Duration::from_secs(120);
/// After so long without an answer a client gives up.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// The server gives up clients of which it hears nothing in less, handshakes included.
const SETTLE: Duration = Duration::from_secs(60);
/// Moves within that time that explain the silence: one a second, while probes are seconds apart.
const MOVES_IN_SILENCE: usize = 20;

/// What a seed chose, and what came of it.
#[derive(Debug)]
struct Outcome {
    completed: usize,
    failed: BTreeMap<String, usize>,
    rebindings: u64,
    counters: ShardCounters,
}

struct Client {
    host: SimHost,
    log: SharedLog,
    /// Where it is, and where it began.
    public: SocketAddrV6,
    first: SocketAddrV6,
    /// It moved before its server had finished the handshake, which ends a connection (RFC 9000 §9).
    moved_early: bool,
    /// When it moved later.
    moves: Vec<Duration>,
}

impl Client {
    /// Whether this stage may do that to a connection. To one that moved too early: silence, IDs
    /// that the server no longer knows, an address that differs from the one in its Retry token. To any
    /// other: silence, where it moved so often that no answer met it for as long as the idle timeout.
    fn is_explained(&self, reason: &ConnectionError, now: Duration) -> bool {
        match reason {
            ConnectionError::AbortedByPeer(text) => {
                self.moved_early && text.contains("Retry Token")
            }
            ConnectionError::HandshakeTimedOut { .. } | ConnectionError::Reset => self.moved_early,
            ConnectionError::TimedOut => {
                let silence = now.saturating_sub(IDLE_TIMEOUT + STEP);
                let moves = self.moves.iter().filter(|at| **at >= silence).count();
                self.moved_early || moves >= MOVES_IN_SILENCE
            }
            _ => false,
        }
    }
}

struct Stage {
    clock: SimClock,
    network: SimNetwork,
    server: SimShards,
    server_logs: Arc<Mutex<Vec<SharedLog>>>,
    clients: Vec<Client>,
    rng: StdRng,
    rebindings: u64,
    rotation: u8,
    next_port: u16,
}

impl Stage {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let clock = SimClock::new();
        let network = SimNetwork::new(clock.clone(), seed);
        let link = LinkConfig {
            rate_bps: rng.random_range(5..100) * 1_000_000,
            delay_us: rng.random_range(100..30_000),
            loss: f64::from(rng.random_range(0..20)) / 1000.0,
            ..LinkConfig::default()
        };
        let (near, far) = (Prefix::new(OUTSIDE, 32), Prefix::new(SERVER_HOST, 32));
        network.add_link(near, far, link.clone(), link).expect("a valid link");
        let (server_tls, client_tls) = tls();
        let retry = if rng.random() { RetryPolicy::Always } else { RetryPolicy::UnderLoad };
        let shards = rng.random_range(2..=5);
        let config = TransportConfig { shards, retry, ..TransportConfig::default() };
        let setup =
            SimHostConfig { config, server: Some(server_tls), client: None, seed: seed * 2 + 1 };
        let port = network.open(SERVER);
        let handoff_datagrams = rng.random_range(4..64);
        let server_logs: Arc<Mutex<Vec<SharedLog>>> = Arc::default();
        let logs = server_logs.clone();
        let app = move |_| {
            let (app, log) = TestApp::new(Plan::default());
            logs.lock().expect("logs").push(log);
            app
        };
        let server = SimShards::new(&clock, &network, port, setup, handoff_datagrams, app);
        let clients = (0..CLIENTS)
            .map(|number| {
                let host = Ipv6Addr::from_bits(OUTSIDE.to_bits() + 1 + number as u128);
                let address = SocketAddrV6::new(host, 4000, 0, 0);
                let send = Send { dir: Dir::Uni, data: pattern(UPLOAD_BYTES), finish: true };
                let plan = Plan { connect: Some(SERVER), sends: vec![send], ..Plan::default() };
                let (app, log) = TestApp::new(plan);
                let setup = SimHostConfig {
                    config: TransportConfig {
                        idle_timeout_ms: IDLE_TIMEOUT.as_millis() as u64,
                        ..Default::default()
                    },
                    server: None,
                    client: Some(client_tls.clone()),
                    seed: seed * 1000 + number as u64,
                };
                let host = SimHost::new(&clock, network.open(address), setup, app);
                let host = host.expect("a client");
                host.send_to_app(Box::new(()));
                Client {
                    host,
                    log,
                    public: address,
                    first: address,
                    moved_early: false,
                    moves: Vec::new(),
                }
            })
            .collect();
        Self {
            clock,
            network,
            server: server.expect("a server"),
            server_logs,
            clients,
            rng,
            rebindings: 0,
            rotation: 0,
            next_port: 10_000,
        }
    }

    /// Changes something: a client's port, its address, a shard's time, the keys.
    fn disturb(&mut self) {
        match self.rng.random_range(0..10) {
            0..=2 => self.rebind(false),
            3..=4 => self.rebind(true),
            5..=6 => {
                let shard = self.rng.random_range(0..self.server.shards().len());
                let time = Duration::from_millis(self.rng.random_range(1..150));
                self.server.hold(shard, time);
            }
            // Once: with a second rotation the first IDs would be dead.
            7 if self.rotation == 0 => {
                self.rotation = 1;
                let config = CidConfig { rotation: self.rotation, ..CidConfig::default() };
                self.server.rotate_cids(&config).expect("rotated");
            }
            _ => {}
        }
    }

    /// Whether the server has finished the handshake with a client that began at `first`.
    fn is_connected(&self, first: SocketAddrV6) -> bool {
        let logs = self.server_logs.lock().expect("logs");
        logs.iter().any(|log| log.lock().expect("log").remotes.contains(&first))
    }

    fn rebind(&mut self, migrate: bool) {
        let number = self.rng.random_range(0..self.clients.len());
        // Before the handshake is over nobody may migrate (RFC 9000 §9); few are that unlucky.
        if !self.is_connected(self.clients[number].first) {
            if self.rng.random_range(0..50) != 0 {
                return;
            }
            self.clients[number].moved_early = true;
        }
        self.clients[number].moves.push(self.clock.elapsed());
        let public = &mut self.clients[number].public;
        self.next_port += 1;
        let host = match migrate {
            // An address that no client has.
            true => Ipv6Addr::from_bits(OUTSIDE.to_bits() + (1 << 32) + self.rebindings as u128),
            false => *public.ip(),
        };
        let new = SocketAddrV6::new(host, self.next_port, 0, 0);
        assert!(self.network.rebind(*public, new), "{public} is bound");
        *public = new;
        self.rebindings += 1;
    }

    fn is_over(&self) -> bool {
        self.clients.iter().all(|client| {
            let log = client.log.lock().expect("log");
            !log.acknowledged.is_empty() || !log.closed.is_empty()
        })
    }

    fn run(mut self) -> Outcome {
        while !self.is_over() {
            let until = self.clock.elapsed() + STEP;
            assert!(until < LIMIT, "neither completed nor failed: {:?}", self.outcome());
            self.disturb();
            let mut nodes: Vec<&mut dyn SimNode> = vec![&mut self.server];
            nodes
                .extend(self.clients.iter_mut().map(|client| &mut client.host as &mut dyn SimNode));
            run(&mut nodes, &self.network, &self.clock, until);
        }
        let outcome = self.outcome();
        self.settle();
        outcome
    }

    /// Every connection that the server took ends there, too, and its application is told why, once.
    fn settle(&mut self) {
        // The clients are gone; what they did not say is told by the idle timeout.
        for client in &self.clients {
            client.host.shut_down(VarInt::from_u32(0), b"done");
        }
        let mut nodes: Vec<&mut dyn SimNode> = vec![&mut self.server];
        nodes.extend(self.clients.iter_mut().map(|client| &mut client.host as &mut dyn SimNode));
        let until = self.clock.elapsed() + SETTLE;
        run(&mut nodes, &self.network, &self.clock, until);
        let counters = self.server.counters();
        assert_eq!(counters.connections, 0, "left behind: {counters:?}");
        let logs = self.server_logs.lock().expect("logs");
        let told: usize = logs.iter().map(|log| log.lock().expect("log").closed.len()).sum();
        assert_eq!(told as u64, counters.accepted + counters.incoming_failed, "{counters:?}");
    }

    fn outcome(&self) -> Outcome {
        let (mut completed, mut failed) = (0, BTreeMap::new());
        for client in &self.clients {
            let log = client.log.lock().expect("log");
            if !log.acknowledged.is_empty() {
                completed += 1;
            } else if let Some(reason) = log.closed.first() {
                let explained = client.is_explained(reason, self.clock.elapsed());
                assert!(explained, "{}: no reason of this stage: {reason:?}", client.first);
                *failed.entry(format!("{reason:?}")).or_default() += 1;
            }
        }
        let rebindings = self.rebindings;
        Outcome { completed, failed, rebindings, counters: self.server.counters() }
    }
}

#[test]
fn soak_of_rebindings_overload_and_full_queues() {
    let number = |name| std::env::var(name).ok().map(|text: String| text.parse().expect(name));
    let seeds: Vec<u64> = match number("STOQ_SOAK_SEED") {
        Some(seed) => vec![seed],
        None => (1..=number("STOQ_SOAK").unwrap_or(8)).collect(),
    };
    let mut sum = ShardCounters::default();
    let (mut completed, mut failed, mut rebindings) = (0, 0, 0);
    for seed in &seeds {
        println!("seed {seed}: STOQ_SOAK_SEED={seed} runs this stage again");
        let outcome = Stage::new(*seed).run();
        println!("  {} completed, failed {:?}", outcome.completed, outcome.failed);
        let failures: usize = outcome.failed.values().sum();
        assert_eq!(outcome.completed + failures, CLIENTS);
        sum.add(&outcome.counters);
        completed += outcome.completed;
        failed += failures;
        rebindings += outcome.rebindings;
    }
    println!("{completed} completed, {failed} failed, {rebindings} rebindings; {sum:?}");
    // Each failure was explained above; few clients are made to move early, or too often.
    assert!(completed > 4 * failed, "{failed} of {} failed", completed + failed);
    if seeds.len() > 1 {
        assert!(sum.rx_handed_over > 1000, "nothing was handed over");
        assert!(sum.rx_drop_handoff_full > 0, "no hand-over queue was ever full");
        assert!(sum.retries > 0);
    }
}
