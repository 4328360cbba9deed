//! A soak of certificates: nodes that renew from a CA, connections between them that come and go, and what
//! must hold at the end. Who the CA is and what befalls it is the test's.

use std::collections::VecDeque;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::{join_all, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use pollster::block_on;
use quinn_proto::crypto;
use rustls_pki_types::CertificateDer;
use stoq::VarInt;
use stoq::ca::{RemoteCa, RemoteCaConfig};
use stoq::certs::trustchain::TokenDirectory;
use stoq::certs::{
    Alarm, CertificateFault, ClientAuth, ClientTls, IdentityNames, Periodic, RotatingIdentity,
    RotationEvent, ServerTls, SimWallClock, TrustStore, WallClock,
};
use stoq::config::TransportConfig;
use stoq::connection::Connection;
use stoq::engine::Engine;
use stoq::error::ConnectionError;

use crate::pair;

pub const CA_NAME: &str = "ca.example.net";
pub const SERVER: &str = "server.example.net";
pub const CLIENT: &str = "client.example.net";
pub const LIFETIME_S: u64 = 60;
pub const CONNECTIONS: usize = 200;
/// Connections that end and begin in each step.
pub const TURNOVER: usize = 20;
/// Connections that stay for the whole run.
const VETERANS: usize = 10;

/// Where the CA is.
pub struct Place {
    pub directory: PathBuf,
    pub clock: Arc<SimWallClock>,
    pub port: u16,
    pub root: CertificateDer<'static>,
}

impl Place {
    pub fn token(&self, name: &str) -> String {
        let tokens = TokenDirectory::open(&self.directory.join("tokens")).expect("tokens");
        let names = IdentityNames::new().with_dns(name).expect("a name");
        tokens.create(&names, Duration::from_secs(3600), self.clock.now()).expect("a token")
    }
}

/// A CA that can be stopped and started again on its directory and port.
pub trait Authority {
    fn place(&self) -> &Place;
    fn stop(&mut self);
    fn start(&mut self);
    /// The date has changed.
    fn follow_clock(&mut self) {}
}

/// A directory of one test, removed whatever happens.
pub struct Scratch(pub PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let removed = std::fs::remove_dir_all(&self.0);
        if !std::thread::panicking() {
            removed.expect("removed");
        }
    }
}

/// A node that enrols with the CA.
pub struct Node {
    pub ca: Arc<RemoteCa>,
    pub identity: Arc<RotatingIdentity>,
    pub alarms: Arc<std::sync::Mutex<Vec<Alarm>>>,
}

impl Node {
    pub fn new(place: &Place, name: &str) -> Self {
        let address = SocketAddrV6::new(Ipv6Addr::LOCALHOST, place.port, 0, 0);
        let mut config = RemoteCaConfig::new(address, CA_NAME, vec![place.root.clone()]);
        config.token = Some(place.token(name));
        config.clock = place.clock.clone();
        // Short: a stopped CA answers nothing on loopback, and each attempt waits this long.
        config.timeout = Duration::from_millis(300);
        let remote = RemoteCa::new(config).expect("a client");
        let alarms = Arc::new(std::sync::Mutex::new(Vec::new()));
        let noted = alarms.clone();
        let names = IdentityNames::new().with_dns(name).expect("a name");
        let identity = RotatingIdentity::with_authority(remote.clone(), names)
            .roots([place.root.clone()])
            .clock(place.clock.clone())
            // One each, the same in each run.
            .jitter_seed(name.bytes().map(u64::from).sum())
            .store(place.directory.join(format!("{name}.pem")))
            .on_event(move |event| {
                if let RotationEvent::Alarm { alarm, .. } = event {
                    noted.lock().expect("not poisoned").push(*alarm);
                }
            });
        // A busy machine may take longer than the time limit: enrolment alone is tried again.
        let identity = identity.allow_pending(true).start().expect("started");
        while identity.status().serial.is_none() {
            remote.set_token(&place.token(name)).expect("hexadecimal");
            place.clock.advance(Duration::from_secs(6));
            identity.poll(place.clock.now());
        }
        Self { ca: remote, identity, alarms }
    }

    pub fn is_valid(&self, now: SystemTime) -> bool {
        self.identity.status().not_after.is_some_and(|end| now <= end)
    }
}

/// Server and client engines under mutual TLS.
pub struct Service {
    server: Arc<Engine>,
    client: Engine,
    trust: Arc<TrustStore>,
    identity: Arc<RotatingIdentity>,
    clock: Arc<SimWallClock>,
    stop: Option<futures_channel::oneshot::Sender<()>>,
    echo: Option<std::thread::JoinHandle<()>>,
}

impl Service {
    pub fn start(place: &Place, server: &Node, client: &Node) -> Self {
        let trust = TrustStore::builder().roots([place.root.clone()]).build().expect("trust");
        let tls = ServerTls::builder()
            .identity(server.identity.clone())
            .client_auth(ClientAuth::Required(trust.clone()))
            .clock(place.clock.clone())
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
            clock: place.clock.clone(),
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

    pub async fn connect(&self) -> Result<Connection, ConnectionError> {
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
pub async fn echo(engine: &Engine, stopped: futures_channel::oneshot::Receiver<()>) {
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

pub async fn ping(connection: &Connection) -> Result<(), ConnectionError> {
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

/// Everything that runs but the CA.
pub struct Soak {
    pub server: Node,
    pub client: Node,
    service: Service,
    veterans: Vec<Connection>,
    young: VecDeque<Connection>,
    pub handshakes: usize,
}

impl Soak {
    pub fn start(place: &Place) -> Self {
        let (server, client) = (Node::new(place, SERVER), Node::new(place, CLIENT));
        let service = Service::start(place, &server, &client);
        let (veterans, young) = (Vec::new(), VecDeque::new());
        let mut soak = Self { server, client, service, veterans, young, handshakes: 0 };
        soak.veterans = soak.open(VETERANS);
        while soak.young.len() < CONNECTIONS - VETERANS {
            let fresh = soak.open(TURNOVER.min(CONNECTIONS - VETERANS - soak.young.len()));
            soak.young.extend(fresh);
        }
        soak
    }

    fn open(&mut self, count: usize) -> Vec<Connection> {
        self.handshakes += count;
        let made = block_on(join_all((0..count).map(|_| self.service.connect())));
        made.into_iter()
            .map(|one| one.expect("no handshake fails while certificates are valid"))
            .collect()
    }

    /// One second later: renewals that are due, connections that end and begin.
    pub fn step(&mut self, step: u64, ca: &mut impl Authority) {
        let clock = ca.place().clock.clone();
        clock.advance(Duration::from_secs(1));
        ca.follow_clock();
        for node in [&self.server, &self.client] {
            node.identity.poll(clock.now());
        }
        let now = clock.now();
        let all_valid = self.server.is_valid(now) && self.client.is_valid(now);
        assert!(all_valid, "step {step}: a certificate ended");
        for old in self.young.drain(..TURNOVER) {
            block_on(ping(&old)).unwrap_or_else(|error| panic!("step {step}: broken: {error}"));
            old.close(VarInt::from_u32(0), b"its time");
        }
        let fresh = self.open(TURNOVER);
        self.young.extend(fresh);
    }

    /// Every connection that should stand does.
    pub fn all_stand(&self) {
        for (index, connection) in self.veterans.iter().chain(&self.young).enumerate() {
            block_on(ping(connection)).unwrap_or_else(|error| panic!("{index} is broken: {error}"));
        }
    }

    /// Renewals and failed attempts of both nodes.
    pub fn counts(&self) -> (u64, u64) {
        let [server, client] = [&self.server, &self.client].map(|node| node.identity.status());
        (server.renewals + client.renewals, server.failures + client.failures)
    }

    /// The CA stays away until the certificates end, and comes back.
    pub fn end(&self, ca: &mut impl Authority) {
        the_end_is_clear_and_heals(ca, &self.service, &self.server, &self.client);
        // Those that were made before stood through all of it: no certificate's end breaks one.
        self.all_stand();
    }
}

/// The CA stays away until certificates end: alarms, a clear error at both ends, then recovery.
fn the_end_is_clear_and_heals(
    ca: &mut impl Authority,
    service: &Service,
    server: &Node,
    client: &Node,
) {
    let clock = ca.place().clock.clone();
    ca.stop();
    for node in [server, client] {
        node.alarms.lock().expect("not poisoned").clear();
    }
    while server.is_valid(clock.now()) || client.is_valid(clock.now()) {
        clock.advance(Duration::from_secs(1));
        for node in [server, client] {
            node.identity.poll(clock.now());
        }
    }
    clock.advance(Duration::from_secs(2));
    for node in [server, client] {
        node.identity.poll(clock.now());
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
        while !node.is_valid(clock.now()) {
            assert!(attempts < 20, "{:?}", node.identity.status());
            attempts += 1;
            node.ca.set_token(&ca.place().token(name)).expect("hexadecimal");
            let next = node.identity.status().next_renewal.expect("planned");
            clock.set(next.max(clock.now()) + Duration::from_millis(1));
            ca.follow_clock();
            node.identity.poll(clock.now());
        }
    }
    block_on(service.connect()).expect("recovered");
}
