//! The connection pool in the simulator: whole shards, virtual time, code on the shard.

#[path = "common/sim.rs"]
mod sim;

use std::any::Any;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use sim::{CLIENT, CLIENT_HOST, Log, Plan, SERVER, SERVER_HOST, TestApp};
use stoq::app::{ConnId, ShardApp, ShardCx};
use stoq::certs::{ClientTls, IdentityNames, ServerTls};
use stoq::clock::SimClock;
use stoq::config::{PoolConfig, TransportConfig};
use stoq::datapath::sim::{LinkConfig, Prefix, SimNetwork, run_while};
use stoq::error::ConnectionError;
use stoq::metrics::PoolCounters;
use stoq::pool::{Checkout, CheckoutError, Lease, PeerEndpoint, PeerId, PoolEvent, PoolEventKind};
use stoq::sim::{SimHost, SimHostConfig};
use stoq::{Dir, VarInt};

/// What a test asks of the pooling application.
enum Ask {
    /// Check out with this token.
    Checkout(u64),
    /// The same, safe to replay; a lease that comes sends its token on a new stream at once.
    Early(u64),
    /// Check the oldest lease in.
    CheckIn,
    /// Keep so many connections open.
    WarmUp(usize),
    /// Close the connection of the oldest lease.
    Close,
}

#[derive(Default)]
struct Seen {
    leases: Vec<(u64, Lease)>,
    errors: Vec<(u64, CheckoutError)>,
    events: Vec<PoolEventKind>,
    counters: PoolCounters,
    connected: u64,
    closed: Vec<ConnectionError>,
    early_accepted: Vec<Option<bool>>,
}

struct PoolApp {
    seen: Arc<Mutex<Seen>>,
    peer: Option<PeerId>,
}

impl PoolApp {
    fn peer(&mut self, cx: &mut ShardCx<'_>) -> PeerId {
        *self.peer.get_or_insert_with(|| {
            cx.pool_peer(&PeerEndpoint::new(SERVER, "stoq.test")).expect("room for a peer")
        })
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().expect("no panic while locked")
    }

    fn take(&mut self, cx: &mut ShardCx<'_>, token: u64, lease: Lease) {
        if token >= 1000 {
            let stream = cx.open(lease.conn(), Dir::Uni).expect("remembered stream credit");
            let mut data = [Bytes::from(token.to_string())];
            cx.write(lease.conn(), stream, &mut data);
            cx.finish(lease.conn(), stream);
        }
        self.seen().leases.push((token, lease));
    }

    fn note(&self, cx: &mut ShardCx<'_>) {
        self.seen().counters = cx.pool_counters();
    }
}

impl ShardApp for PoolApp {
    fn handle_message(&mut self, cx: &mut ShardCx<'_>, message: Box<dyn Any + Send>) {
        let peer = self.peer(cx);
        let (token, answer) = match *message.downcast::<Ask>().expect("an ask") {
            Ask::Checkout(token) => (token, cx.checkout(peer, token)),
            Ask::Early(token) => (token, cx.checkout_replay_safe(peer, token)),
            Ask::CheckIn => {
                let (_, lease) = self.seen().leases.remove(0);
                cx.check_in(lease);
                return self.note(cx);
            }
            Ask::WarmUp(connections) => {
                return cx.warm_up(peer, connections).expect("within the limits");
            }
            Ask::Close => {
                let conn = self.seen().leases[0].1.conn();
                return cx.close(conn, VarInt::from_u32(3), Bytes::new());
            }
        };
        match answer {
            Ok(Checkout::Ready(lease)) => self.take(cx, token, lease),
            Ok(Checkout::Waiting) => {}
            Err(error) => self.seen().errors.push((token, error)),
        }
        self.note(cx);
    }

    fn handle_checkout(
        &mut self,
        cx: &mut ShardCx<'_>,
        token: u64,
        result: Result<Lease, CheckoutError>,
    ) {
        match result {
            Ok(lease) => self.take(cx, token, lease),
            Err(error) => self.seen().errors.push((token, error)),
        }
        self.note(cx);
    }

    fn handle_pool_event(&mut self, cx: &mut ShardCx<'_>, event: &PoolEvent) {
        self.seen().events.push(event.kind.clone());
        self.note(cx);
    }

    fn handle_connected(&mut self, cx: &mut ShardCx<'_>, conn: ConnId) {
        let mut seen = self.seen();
        seen.connected += 1;
        seen.early_accepted.push(cx.early_data_accepted(conn));
    }

    fn handle_closed(&mut self, cx: &mut ShardCx<'_>, _conn: ConnId, reason: &ConnectionError) {
        self.seen().closed.push(reason.clone());
        self.note(cx);
    }
}

struct Net {
    clock: SimClock,
    network: SimNetwork,
    client: SimHost,
    server: Option<SimHost>,
    seen: Arc<Mutex<Seen>>,
    served: sim::SharedLog,
    config: TransportConfig,
    tls: ServerTls,
    seed: u64,
}

fn config(pool: PoolConfig) -> TransportConfig {
    TransportConfig {
        pool,
        idle_timeout_ms: 10_000,
        handshake_timeout_ms: 1000,
        zero_rtt: true,
        ..Default::default()
    }
}

/// Timers that a test can wait for.
fn quick() -> PoolConfig {
    PoolConfig {
        reconnect_base_ms: 100,
        reconnect_cap_ms: 400,
        circuit_failures: 3,
        circuit_open_ms: 3000,
        idle_timeout_ms: 5000,
        ..Default::default()
    }
}

impl Net {
    fn new(config: TransportConfig) -> Self {
        let clock = SimClock::new();
        let network = SimNetwork::new(clock.clone(), 3);
        let link = LinkConfig { rate_bps: 100_000_000, delay_us: 5_000, ..LinkConfig::default() };
        let (here, there) = (Prefix::new(CLIENT_HOST, 32), Prefix::new(SERVER_HOST, 32));
        network.add_link(here, there, link.clone(), link).expect("a valid link");
        let names = IdentityNames::new().with_dns("stoq.test").expect("a name");
        let tls = ServerTls::builder()
            .alpn(["test"])
            .identity_self_signed(names)
            .early_data(true)
            .build()
            .expect("server TLS");
        let roots = tls.identity().roots().to_vec();
        let client_tls = ClientTls::builder()
            .alpn(["test"])
            .roots(roots)
            .early_data(true)
            .build()
            .expect("client TLS");
        let seen = Arc::new(Mutex::new(Seen::default()));
        let setup = SimHostConfig {
            config: config.clone(),
            server: None,
            client: Some(client_tls.crypto()),
            seed: 1,
        };
        let app = PoolApp { seen: seen.clone(), peer: None };
        let client = SimHost::new(&clock, network.open(CLIENT), setup, app).expect("client");
        let served = sim::SharedLog::default();
        let mut net =
            Self { clock, network, client, server: None, seen, served, config, tls, seed: 10 };
        net.start_server();
        net
    }

    /// A server that has forgotten everything but its certificate and its tickets.
    fn start_server(&mut self) {
        self.server = None;
        self.seed += 1;
        let setup = SimHostConfig {
            config: self.config.clone(),
            server: Some(self.tls.crypto()),
            client: None,
            seed: self.seed,
        };
        let (app, log) = TestApp::new(Plan { keep: true, ..Plan::default() });
        let path = self.network.open(SERVER);
        self.server = Some(SimHost::new(&self.clock, path, setup, app).expect("server"));
        self.served = log;
    }

    fn ask(&self, ask: Ask) {
        self.client.send_to_app(Box::new(ask));
    }

    fn run(&mut self, ms: u64) {
        let until = self.clock.elapsed() + Duration::from_millis(ms);
        let (client, network, clock) = (&mut self.client, &self.network, &self.clock);
        match &mut self.server {
            Some(server) => {
                run_while(&mut [client, server], network, clock, until, &mut || true);
            }
            None => {
                run_while(&mut [client], network, clock, until, &mut || true);
            }
        }
        // Without anything to do the loop ends before its time.
        if self.clock.elapsed() < until {
            self.clock.advance_to(until);
        }
    }

    fn seen<R>(&self, look: impl FnOnce(&mut Seen) -> R) -> R {
        look(&mut self.seen.lock().expect("no panic while locked"))
    }

    fn served<R>(&self, look: impl FnOnce(&Log) -> R) -> R {
        look(&self.served.lock().expect("no panic while locked"))
    }
}

#[test]
fn callers_share_a_handshake_and_get_it_back_from_the_pool() {
    let mut net = Net::new(config(quick()));
    for token in 0..20 {
        net.ask(Ask::Checkout(token));
    }
    net.run(100);
    let conns = net.seen(|seen| {
        assert_eq!((seen.leases.len(), seen.connected), (20, 1));
        seen.leases.iter().map(|(_, lease)| lease.conn()).collect::<Vec<_>>()
    });
    assert!(conns.iter().all(|conn| *conn == conns[0]));
    for _ in 0..20 {
        net.ask(Ask::CheckIn);
    }
    net.ask(Ask::Checkout(50));
    net.run(100);
    net.seen(|seen| {
        assert_eq!((seen.leases[0].0, seen.leases[0].1.conn()), (50, conns[0]));
        assert_eq!((seen.counters.handshakes, seen.counters.handshakes_saved), (1, 19));
        assert_eq!((seen.counters.hits, seen.counters.misses), (1, 20));
    });
    assert_eq!(net.served(|log| log.connected), 1);
}

#[test]
fn an_unused_connection_is_closed_in_time_and_the_peer_is_told() {
    let mut net = Net::new(config(quick()));
    net.ask(Ask::Checkout(1));
    net.run(4000);
    net.ask(Ask::CheckIn);
    net.run(4900);
    assert_eq!(net.served(|log| log.closed.len()), 0, "lent for a while, idle for less than 5 s");
    net.run(200);
    let closed = net.served(|log| log.closed.clone());
    assert!(matches!(closed[..], [ConnectionError::ClosedByPeer { .. }]), "{closed:?}");
    net.run(3000);
    net.seen(|seen| assert_eq!(seen.counters.evicted_idle, 1));
    assert_eq!(net.client.counters().connections, 0, "and nothing of it is left");
}

#[test]
fn closed_connections_are_not_lent() {
    let mut net = Net::new(config(quick()));
    net.ask(Ask::Checkout(1));
    net.run(100);
    // Both in one turn: the connection is closed, but not yet gone.
    net.ask(Ask::Close);
    net.ask(Ask::Checkout(2));
    net.run(100);
    net.seen(|seen| {
        assert_eq!(seen.leases.len(), 2);
        assert_ne!(seen.leases[0].1.conn(), seen.leases[1].1.conn());
        assert_eq!(seen.counters.connections, 1);
    });
}

#[test]
fn a_peer_that_crashes_is_found_again() {
    let mut net = Net::new(config(quick()));
    net.ask(Ask::Checkout(1));
    net.run(100);
    net.server = None;
    net.run(12_000);
    net.seen(|seen| {
        assert_eq!(seen.closed[0], ConnectionError::TimedOut);
        let lost = PoolEventKind::Lost { reason: ConnectionError::TimedOut, leases: 1 };
        assert!(seen.events.contains(&lost), "{:?}", seen.events);
        let scheduled =
            |event: &PoolEventKind| matches!(event, PoolEventKind::ReconnectScheduled { .. });
        assert!(seen.events.iter().any(scheduled), "{:?}", seen.events);
    });
    net.start_server();
    net.run(1500);
    net.seen(|seen| {
        let connected = |event: &&PoolEventKind| matches!(event, PoolEventKind::Connected { .. });
        assert_eq!(seen.events.iter().filter(connected).count(), 2, "{:?}", seen.events);
        assert_eq!(seen.counters.connections, 1);
        assert_eq!(seen.leases.len(), 1, "nobody is handed a connection unasked");
    });
    assert_eq!(net.served(|log| log.connected), 1);
}

#[test]
fn a_peer_that_stays_away_is_left_alone_and_probed_once() {
    let mut net = Net::new(config(quick()));
    net.server = None;
    for token in 0..3 {
        net.ask(Ask::Checkout(token));
        net.run(1600);
    }
    net.ask(Ask::Checkout(9));
    net.run(10);
    net.seen(|seen| {
        assert_eq!(seen.errors.len(), 4, "{:?}", seen.errors);
        for (_, error) in &seen.errors[..3] {
            let timed_out = ConnectionError::HandshakeTimedOut { remote: SERVER, timeout_ms: 1000 };
            assert_eq!(error, &CheckoutError::Connect(timed_out));
        }
        assert!(matches!(seen.errors[3].1, CheckoutError::CircuitOpen { failures: 3, .. }));
        assert!(matches!(seen.events.last(), Some(PoolEventKind::CircuitOpened { .. })));
    });
    let sent = net.client.datapath_counters().tx_datagrams;
    net.run(1000);
    assert_eq!(net.client.datapath_counters().tx_datagrams, sent, "silence while it is open");
    net.start_server();
    net.run(2400);
    net.ask(Ask::Checkout(10));
    net.run(100);
    net.seen(|seen| {
        assert_eq!(seen.leases.len(), 1);
        let tail = &seen.events[seen.events.len() - 3..];
        assert_eq!(tail[0], PoolEventKind::CircuitHalfOpen);
        assert_eq!(tail[1], PoolEventKind::Connected { after_failures: 3 });
        assert_eq!(tail[2], PoolEventKind::CircuitClosed);
    });
}

#[test]
fn a_warm_up_holds_its_connections_and_replaces_lost_ones() {
    let pool = PoolConfig { connections_per_peer_max: 3, ..quick() };
    let keep_alive_interval_ms = 1000;
    let mut net = Net::new(TransportConfig { keep_alive_interval_ms, ..config(pool) });
    net.ask(Ask::WarmUp(3));
    net.run(20_000);
    assert_eq!(net.served(|log| (log.connected, log.closed.len())), (3, 0), "kept past 5 s");
    net.ask(Ask::Checkout(1));
    net.run(10);
    net.seen(|seen| assert_eq!((seen.leases.len(), seen.counters.misses), (1, 0)));
    net.start_server();
    net.run(15_000);
    // The new server knows none of them: it resets them, and gets three others.
    assert_eq!(net.served(|log| log.connected), 3);
    net.ask(Ask::WarmUp(0));
    net.run(6000);
    net.seen(|seen| assert_eq!(seen.counters.connections, 0));
}

#[test]
fn early_leases_send_before_the_handshake_is_over() {
    let mut net = Net::new(config(quick()));
    net.ask(Ask::Early(1001));
    net.run(200);
    net.seen(|seen| {
        assert!(!seen.leases[0].1.is_early(), "no session is remembered yet");
        assert_eq!(seen.early_accepted, [None]);
    });
    net.ask(Ask::CheckIn);
    net.run(9000);
    net.seen(|seen| assert_eq!(seen.counters.connections, 0, "closed as idle"));
    net.ask(Ask::Early(1002));
    net.ask(Ask::Checkout(5));
    net.run(6);
    // One way takes 5 ms: the request is there with the first flight.
    let received = net.served(|log| log.received.values().next().cloned().expect("a stream"));
    assert_eq!(String::from_utf8_lossy(&received), "10011002", "streams have the same id");
    net.seen(|seen| {
        assert_eq!(seen.leases.len(), 1, "the caller that is not safe to replay waits");
        assert!(seen.leases[0].1.is_early());
    });
    net.run(200);
    net.seen(|seen| {
        assert_eq!(seen.leases.len(), 2);
        assert!(!seen.leases[1].1.is_early());
        assert_eq!(seen.early_accepted, [None, Some(true)]);
    });
}

#[test]
fn refused_early_data_is_told_and_not_sent_again() {
    let mut net = Net::new(config(quick()));
    net.ask(Ask::Early(1001));
    net.run(200);
    net.ask(Ask::CheckIn);
    net.run(9000);
    // Another server under the same certificate, whose sessions are others: no early data.
    let other = ServerTls::builder()
        .alpn(["test"])
        .identity(net.tls.identity().clone())
        .early_data(true)
        .build()
        .expect("server TLS");
    net.tls = other;
    net.start_server();
    net.ask(Ask::Early(1002));
    net.run(300);
    net.seen(|seen| {
        assert!(seen.leases[0].1.is_early());
        assert_eq!(seen.early_accepted.last(), Some(&Some(false)));
    });
    let received = net.served(|log| log.received_bytes);
    assert_eq!(received, 0, "the server never acts on it, and the pool repeats nothing");
}

#[test]
fn without_zero_rtt_everybody_waits() {
    let mut net = Net::new(TransportConfig { zero_rtt: false, ..config(quick()) });
    for token in [1001, 1002] {
        net.ask(Ask::Early(token));
        net.run(200);
        net.seen(|seen| assert!(!seen.leases[0].1.is_early()));
        net.ask(Ask::CheckIn);
        net.run(9000);
    }
    net.seen(|seen| assert_eq!(seen.counters.handshakes, 2));
}

#[test]
fn a_shutdown_does_not_wait_for_what_is_idle() {
    let mut net = Net::new(config(quick()));
    net.ask(Ask::Checkout(1));
    net.run(100);
    net.ask(Ask::CheckIn);
    net.run(100);
    net.client.shut_down(VarInt::from_u32(0), b"");
    net.run(1500);
    assert!(net.client.has_ended());
    let closed = net.served(|log| log.closed.clone());
    assert!(matches!(closed[..], [ConnectionError::ClosedByPeer { .. }]), "{closed:?}");
    net.seen(|seen| assert_eq!(seen.closed.len(), 1, "told once: {:?}", seen.closed));
}
