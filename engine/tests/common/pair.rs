//! Two engines on `::1`: a server and a client that trusts it, with a watchdog per test.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use quinn_proto::crypto;
use stoq::certs::{ClientTls, IdentityNames, RotatingIdentity, ServerTls};
use stoq::config::TransportConfig;
use stoq::connection::Connection;
use stoq::datapath::choice::DatapathChoice;
use stoq::engine::{Builder, Engine};
use stoq::metrics::ShardCounters;

pub const NAME: &str = "node.example.net";
/// Longest that one test may take before the process is aborted: a hang must be seen.
const WATCHDOG: Duration = Duration::from_secs(120);
/// Longest that anything awaited by polling may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Aborts the process with the test's name unless dropped in time.
pub struct Watchdog(Arc<AtomicBool>);

impl Watchdog {
    pub fn new(test: &'static str) -> Self {
        Self::with_limit(test, WATCHDOG)
    }

    pub fn with_limit(test: &'static str, limit: Duration) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let watched = done.clone();
        std::thread::spawn(move || {
            let start = Instant::now();
            while start.elapsed() < limit {
                if watched.load(Ordering::Acquire) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            // Past the capture, which the abort would take along.
            let _ = std::io::Write::write_fmt(
                &mut std::io::stderr(),
                format_args!("watchdog: `{test}` hangs for {limit:?}\n"),
            );
            std::process::abort();
        });
        Self(done)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A certificate for [`NAME`] and clients that trust it.
pub fn identity() -> (Arc<dyn crypto::ServerConfig>, Arc<dyn crypto::ClientConfig>) {
    let names = IdentityNames::new().with_dns(NAME).expect("a DNS name");
    let identity = RotatingIdentity::self_signed(names).start().expect("a certificate");
    let client = ClientTls::builder()
        .alpn(["stoq-test"])
        .roots(identity.roots().to_vec())
        .build()
        .expect("client TLS");
    let server =
        ServerTls::builder().identity(identity).alpn(["stoq-test"]).build().expect("server TLS");
    (server.crypto(), client.crypto())
}

/// A configuration for `::1` over plain sockets that leaves the cores to others.
pub fn config() -> TransportConfig {
    TransportConfig {
        bind: SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0),
        datapath: DatapathChoice::Socket,
        spin_us: 0,
        ..Default::default()
    }
}

pub struct Pair {
    pub server: Engine,
    pub client: Engine,
}

impl Pair {
    pub fn new() -> Self {
        Self::with(config(), config())
    }

    pub fn with(server: TransportConfig, client: TransportConfig) -> Self {
        Self::build(Engine::builder().config(server), Engine::builder().config(client))
    }

    pub fn build(server: Builder, client: Builder) -> Self {
        let (server_tls, client_tls) = identity();
        Self {
            server: server.server(server_tls).start().expect("the server starts"),
            client: client.client(client_tls).start().expect("the client starts"),
        }
    }

    /// A connection: the client's end and the server's.
    pub async fn connect(&self) -> (Connection, Connection) {
        let connecting = self.client.connect(self.server.local_addr(), NAME);
        let incoming = self.server.accept().await.expect("a client knocks");
        let accepting = incoming.accept();
        let (client, server) = futures_util::future::join(connecting, accepting).await;
        (client.expect("connected"), server.expect("accepted"))
    }

    /// Waits until no connection exists on either side, draining ones included.
    pub fn wait_idle(&self) {
        wait_for("no connection is left", || {
            counters(&self.server).connections == 0 && counters(&self.client).connections == 0
        });
        for engine in [&self.server, &self.client] {
            let counters = counters(engine);
            assert_eq!(counters.streams, 0, "streams left behind: {counters:?}");
        }
    }
}

/// All shards' counters in one sum.
pub fn counters(engine: &Engine) -> ShardCounters {
    let mut sum = ShardCounters::default();
    for stats in engine.stats() {
        sum.add(&stats.shard);
    }
    sum
}

pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
