//! Certificates of 60 s under 200 connections that come and go, in accelerated time, while the CA is
//! stopped for a third of it, dies between issuing and answering, and cannot write once.
//!
//! Time is counted in steps of one simulated second. `STOQ_SOAK_STEPS` lengthens the run (default
//! 240; a day is 86400).

#[path = "common/pair.rs"]
#[allow(dead_code, unreachable_pub)]
mod pair;

use std::collections::VecDeque;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use futures_util::future::{join_all, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use pair::Watchdog;
use pollster::block_on;
use quinn_proto::crypto;
use rustls_pki_types::CertificateDer;
use stoq::VarInt;
use stoq::ca::{CaService, RemoteCa, RemoteCaConfig};
use stoq::certs::trustchain::{TRUSTCHAIN_ALPN, TokenDirectory, TrustchainServer};
use stoq::certs::{
    Alarm, CaError, CertificateAuthority, CertificateFault, CertificateRequest, ClientAuth,
    ClientTls, IdentityNames, LocalCa, LocalCaConfig, Periodic, RotatingIdentity, RotationEvent,
    ServerTls, SimWallClock, TrustStore, WallClock,
};
use stoq::config::TransportConfig;
use stoq::connection::Connection;
use stoq::engine::Engine;
use stoq::error::ConnectionError;

const CA_NAME: &str = "ca.example.net";
const SERVER: &str = "server.example.net";
const CLIENT: &str = "client.example.net";
const LIFETIME_S: u64 = 60;
const CONNECTIONS: usize = 200;
/// Connections that end and begin in each step.
const TURNOVER: usize = 20;
/// Connections that stay for the whole run.
const VETERANS: usize = 10;

/// A directory of one test, removed whatever happens.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let removed = std::fs::remove_dir_all(&self.0);
        if !std::thread::panicking() {
            removed.expect("removed");
        }
    }
}

/// Issues, writes its books, and dies before it answers, when told to.
struct Mortal {
    ca: Arc<LocalCa>,
    dies: Arc<AtomicBool>,
    deaths: Arc<AtomicU64>,
}

impl CertificateAuthority for Mortal {
    fn issue(
        &self,
        request: &CertificateRequest<'_>,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let chain = self.ca.issue(request)?;
        if self.dies.swap(false, Ordering::SeqCst) {
            self.deaths.fetch_add(1, Ordering::SeqCst);
            return Err(CaError::Unreachable { reason: "killed in mid-issue".to_owned() });
        }
        Ok(chain)
    }
}

/// A CA service that can be stopped and started again on its directory and port.
struct Ca {
    directory: PathBuf,
    clock: Arc<SimWallClock>,
    port: u16,
    root: CertificateDer<'static>,
    dies: Arc<AtomicBool>,
    deaths: Arc<AtomicU64>,
    running: Option<CaService>,
    starts: u64,
}

fn open_ca(directory: &Path, clock: &Arc<SimWallClock>) -> Arc<LocalCa> {
    let config = LocalCaConfig {
        leaf_lifetime: Duration::from_secs(LIFETIME_S),
        ..LocalCaConfig::default()
    };
    let ca = LocalCa::open_at(&directory.join("ca"), config, clock.clone());
    Arc::new(ca.expect("the directory opens, whatever happened before"))
}

impl Ca {
    fn new(directory: &Path, clock: &Arc<SimWallClock>) -> Self {
        let mut ca = Self {
            directory: directory.to_owned(),
            clock: clock.clone(),
            port: 0,
            root: open_ca(directory, clock).root(),
            dies: Arc::default(),
            deaths: Arc::default(),
            running: None,
            starts: 0,
        };
        ca.start();
        ca
    }

    fn start(&mut self) {
        if self.running.is_some() {
            return;
        }
        let ca = open_ca(&self.directory, &self.clock);
        let names = IdentityNames::new().with_dns(CA_NAME).expect("a name");
        let identity = RotatingIdentity::with_authority(ca.clone(), names)
            .clock(self.clock.clone())
            .start()
            .expect("the CA certifies itself");
        let trust = TrustStore::builder().roots([ca.root()]).build().expect("trust");
        let tls = ServerTls::builder()
            .identity(identity)
            .client_auth(ClientAuth::Optional(trust))
            .clock(self.clock.clone())
            .alpn([TRUSTCHAIN_ALPN])
            .build()
            .expect("TLS");
        let tokens = TokenDirectory::open(&self.directory.join("tokens")).expect("tokens");
        let mortal = Mortal { ca, dies: self.dies.clone(), deaths: self.deaths.clone() };
        let server = TrustchainServer::new(Arc::new(mortal), self.clock.clone());
        let bind = SocketAddrV6::new(Ipv6Addr::LOCALHOST, self.port, 0, 0);
        let service = CaService::start(bind, &tls, Arc::new(server.with_tokens(tokens)));
        let service = service.expect("the service starts");
        self.port = service.local_addr().port();
        self.running = Some(service);
        self.starts += 1;
    }

    fn stop(&mut self) {
        self.running = None;
    }

    fn token(&self, name: &str) -> String {
        let tokens = TokenDirectory::open(&self.directory.join("tokens")).expect("tokens");
        let names = IdentityNames::new().with_dns(name).expect("a name");
        tokens.create(&names, Duration::from_secs(3600), self.clock.now()).expect("a token")
    }
}

/// A node that enrols with the CA.
struct Node {
    ca: Arc<RemoteCa>,
    identity: Arc<RotatingIdentity>,
    alarms: Arc<std::sync::Mutex<Vec<Alarm>>>,
}

impl Node {
    fn new(ca: &Ca, name: &str) -> Self {
        let address = SocketAddrV6::new(Ipv6Addr::LOCALHOST, ca.port, 0, 0);
        let mut config = RemoteCaConfig::new(address, CA_NAME, vec![ca.root.clone()]);
        config.token = Some(ca.token(name));
        config.clock = ca.clock.clone();
        // Short: a stopped CA answers nothing on loopback, and each attempt waits this long.
        config.timeout = Duration::from_millis(300);
        let remote = RemoteCa::new(config).expect("a client");
        let alarms = Arc::new(std::sync::Mutex::new(Vec::new()));
        let noted = alarms.clone();
        let names = IdentityNames::new().with_dns(name).expect("a name");
        let identity = RotatingIdentity::with_authority(remote.clone(), names)
            .roots([ca.root.clone()])
            .clock(ca.clock.clone())
            .store(ca.directory.join(format!("{name}.pem")))
            .on_event(move |event| {
                if let RotationEvent::Alarm { alarm, .. } = event {
                    noted.lock().expect("not poisoned").push(*alarm);
                }
            });
        // A busy machine may take longer than the time limit: enrolment alone is tried again.
        let identity = identity.allow_pending(true).start().expect("started");
        while identity.status().serial.is_none() {
            remote.set_token(&ca.token(name)).expect("hexadecimal");
            ca.clock.advance(Duration::from_secs(6));
            identity.poll(ca.clock.now());
        }
        Self { ca: remote, identity, alarms }
    }

    fn is_valid(&self, now: SystemTime) -> bool {
        self.identity.status().not_after.is_some_and(|end| now <= end)
    }
}

/// Server and client engines under mutual TLS.
struct Service {
    server: Arc<Engine>,
    client: Engine,
    trust: Arc<TrustStore>,
    identity: Arc<RotatingIdentity>,
    clock: Arc<SimWallClock>,
    stop: Option<futures_channel::oneshot::Sender<()>>,
    echo: Option<std::thread::JoinHandle<()>>,
}

impl Service {
    fn start(ca: &Ca, server: &Node, client: &Node) -> Self {
        let trust = TrustStore::builder().roots([ca.root.clone()]).build().expect("trust");
        let tls = ServerTls::builder()
            .identity(server.identity.clone())
            .client_auth(ClientAuth::Required(trust.clone()))
            .clock(ca.clock.clone())
            .alpn(["soak"])
            .build()
            .expect("server TLS");
        let config = |shards| TransportConfig {
            shards,
            idle_timeout_ms: 0,
            handshake_timeout_ms: 60_000,
            ..pair::config()
        };
        let engine = Engine::builder().config(config(2)).server(tls.crypto()).start();
        let engine = Arc::new(engine.expect("server starts"));
        let engine_of_clients = Engine::builder().config(config(1)).start();
        let (stop, stopped) = futures_channel::oneshot::channel();
        let serving = engine.clone();
        let echo = std::thread::spawn(move || block_on(echo(&serving, stopped)));
        Self {
            server: engine,
            client: engine_of_clients.expect("client starts"),
            trust,
            identity: client.identity.clone(),
            clock: ca.clock.clone(),
            stop: Some(stop),
            echo: Some(echo),
        }
    }

    /// A client's TLS that remembers no session: a resumed handshake would check no certificate.
    fn tls(&self) -> Arc<dyn crypto::ClientConfig> {
        let builder = ClientTls::builder().trust(self.trust.clone()).alpn(["soak"]);
        let builder = builder.identity(self.identity.clone()).clock(self.clock.clone());
        builder.build().expect("client TLS").crypto()
    }

    async fn connect(&self) -> Result<Connection, ConnectionError> {
        let server = self.server.local_addr();
        let connection = self.client.connect_with(server, SERVER, self.tls()).await?;
        // The server checks our certificate after our side is done: only an answer proves it.
        ping(&connection).await?;
        Ok(connection)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop.take().expect("once").send(()).expect("the echo runs");
        let ended = self.echo.take().expect("once").join();
        if !std::thread::panicking() {
            ended.expect("the echo did not panic");
        }
    }
}

/// Answers every stream with its own bytes.
async fn echo(engine: &Engine, stopped: futures_channel::oneshot::Receiver<()>) {
    let mut clients = FuturesUnordered::new();
    let mut stopped = stopped;
    loop {
        let accept = Box::pin(engine.accept());
        let next = async {
            match clients.next().await {
                Some(()) => {}
                None => std::future::pending().await,
            }
        };
        let work = select(accept, Box::pin(next));
        match select(&mut stopped, work).await {
            futures_util::future::Either::Left(_) => return,
            futures_util::future::Either::Right((futures_util::future::Either::Left(knock), _)) => {
                let Some(incoming) = knock.0 else { return };
                clients.push(async move {
                    // A refused client is the test's other end's to judge.
                    let Ok(connection) = incoming.accept().await else { return };
                    while let Ok((mut send, mut recv)) = connection.accept_bi().await {
                        let Ok(data) = recv.read_to_end(64).await else { continue };
                        if send.write_all(&data).await.is_ok() {
                            // Whether it arrives is for the other end to judge, too.
                            let _finished = send.finish();
                        }
                    }
                });
            }
            futures_util::future::Either::Right(_) => {}
        }
    }
}

async fn ping(connection: &Connection) -> Result<(), ConnectionError> {
    let gone = |what: &str| {
        connection.close_reason().unwrap_or_else(|| panic!("{what} failed on a living connection"))
    };
    let (mut send, mut recv) = connection.open_bi().await?;
    send.write_all(b"alive?").await.map_err(|_| gone("writing"))?;
    send.finish().map_err(|_| gone("finishing"))?;
    let echo = recv.read_to_end(64).await.map_err(|_| gone("reading"))?;
    assert_eq!(echo, b"alive?");
    Ok(())
}

/// What happens to the CA in a step: stopped for 20 of each 60 seconds, and twice worse.
fn misfortune(ca: &mut Ca, step: u64, steps: u64) {
    match step % 60 {
        0 => ca.stop(),
        20 => ca.start(),
        _ => {}
    }
    let blocked = ca.directory.join("ca/state.toml.tmp");
    // Once: for eleven seconds nothing can be written, as on a full disk.
    if step == steps / 2 / 60 * 60 + 25 {
        std::fs::create_dir(&blocked).expect("blocked");
    } else if step == steps / 2 / 60 * 60 + 36 {
        std::fs::remove_dir(&blocked).expect("unblocked");
    }
    // In every other minute it dies after issuing, and is started again a step later.
    if step % 120 == 24 {
        ca.dies.store(true, Ordering::SeqCst);
    }
}

#[test]
fn rotation_breaks_nothing_while_the_ca_comes_and_goes() {
    let steps: u64 = std::env::var("STOQ_SOAK_STEPS").map_or(240, |text| {
        text.parse().expect("STOQ_SOAK_STEPS is a number of simulated seconds")
    });
    let limit = Duration::from_secs(180) + Duration::from_millis(700) * steps as u32;
    let _watchdog =
        Watchdog::with_limit("rotation_breaks_nothing_while_the_ca_comes_and_goes", limit);
    let path = std::env::temp_dir().join(format!("stoq-certs-soak-{}", std::process::id()));
    std::fs::create_dir(&path).expect("a new directory");
    let scratch = Scratch(path);
    let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let clock = Arc::new(SimWallClock::new(start));
    let mut ca = Ca::new(&scratch.0, &clock);
    let (server, client) = (Node::new(&ca, SERVER), Node::new(&ca, CLIENT));
    let service = Service::start(&ca, &server, &client);
    let open = |count: usize| -> Vec<Connection> {
        let made = block_on(join_all((0..count).map(|_| service.connect())));
        made.into_iter()
            .map(|one| one.expect("no handshake fails while certificates are valid"))
            .collect()
    };
    let veterans = open(VETERANS);
    let mut young: VecDeque<Connection> = VecDeque::new();
    while young.len() < CONNECTIONS - VETERANS {
        young.extend(open(TURNOVER.min(CONNECTIONS - VETERANS - young.len())));
    }
    let mut handshakes = CONNECTIONS;
    for step in 0..steps {
        misfortune(&mut ca, step, steps);
        clock.advance(Duration::from_secs(1));
        for node in [&server, &client] {
            node.identity.poll(clock.now());
        }
        let now = clock.now();
        assert!(server.is_valid(now) && client.is_valid(now), "step {step}: a certificate ended");
        for old in young.drain(..TURNOVER) {
            block_on(ping(&old)).unwrap_or_else(|error| panic!("step {step}: broken: {error}"));
            old.close(VarInt::from_u32(0), b"its time");
        }
        young.extend(open(TURNOVER));
        handshakes += TURNOVER;
    }
    for (index, connection) in veterans.iter().chain(&young).enumerate() {
        block_on(ping(connection)).unwrap_or_else(|error| panic!("{index} is broken: {error}"));
    }
    let renewals = server.identity.status().renewals + client.identity.status().renewals;
    let failures = server.identity.status().failures + client.identity.status().failures;
    println!(
        "{steps} s, {handshakes} handshakes, {renewals} renewals, {failures} failed attempts, \
         CA started {} times and killed {} times",
        ca.starts,
        ca.deaths.load(Ordering::SeqCst)
    );
    assert!(renewals >= 2 * steps / LIFETIME_S, "{renewals} renewals");
    if steps >= 240 {
        assert!(failures > 0 && ca.starts >= steps / 60 && ca.deaths.load(Ordering::SeqCst) > 0);
    }
    the_end_is_clear_and_heals(&mut ca, &service, &server, &client);
    // Those that were made before stood through all of it.
    for connection in veterans.iter().chain(&young) {
        block_on(ping(connection)).expect("no certificate's end breaks a connection");
    }
}

/// The CA stays away until certificates end: alarms, a clear error at both ends, then recovery.
fn the_end_is_clear_and_heals(ca: &mut Ca, service: &Service, server: &Node, client: &Node) {
    ca.stop();
    for node in [server, client] {
        node.alarms.lock().expect("not poisoned").clear();
    }
    while server.is_valid(ca.clock.now()) || client.is_valid(ca.clock.now()) {
        ca.clock.advance(Duration::from_secs(1));
        for node in [server, client] {
            node.identity.poll(ca.clock.now());
        }
    }
    ca.clock.advance(Duration::from_secs(2));
    for node in [server, client] {
        node.identity.poll(ca.clock.now());
        let alarms = node.alarms.lock().expect("not poisoned").clone();
        assert!(alarms.ends_with(&[Alarm::TenthLeft, Alarm::Expired]), "{alarms:?}");
        let status = node.identity.status();
        assert!(status.last_error.is_some(), "{status:?}");
        assert!(node.identity.faults().count(CertificateFault::Expired) > 0);
    }
    let error = block_on(service.connect()).expect_err("expired");
    assert!(error.to_string().contains("expired"), "{error}");
    assert!(error.to_string().contains("clock"), "a wrong clock is named: {error}");
    ca.start();
    // An expired certificate authenticates nothing: tokens, as for new nodes.
    for (node, name) in [(server, SERVER), (client, CLIENT)] {
        let mut attempts = 0;
        while !node.is_valid(ca.clock.now()) {
            assert!(attempts < 20, "{:?}", node.identity.status());
            attempts += 1;
            node.ca.set_token(&ca.token(name)).expect("hexadecimal");
            let next = node.identity.status().next_renewal.expect("planned");
            ca.clock.set(next.max(ca.clock.now()) + Duration::from_millis(1));
            node.identity.poll(ca.clock.now());
        }
    }
    block_on(service.connect()).expect("recovered");
}
