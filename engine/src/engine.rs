//! The engine: its builder, its shards' threads, connect, accept, shut down.

mod attempt;
mod shutdown;

use std::any::Any;
use std::collections::VecDeque;
use std::net::SocketAddrV6;
use std::num::NonZeroU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::queue::{ArrayQueue, SegQueue};
use event_listener::Event;
use futures_channel::oneshot;
use quinn_proto::crypto;

use crate::app::ShardApp;
use crate::certs::{CertsError, FaultCounters, RotatingIdentity, SharedKeys};
use crate::clock::SystemClock;
use crate::config::{CidConfig, CidKey, ConfigError, POOL_EVENTS_QUEUED_MAX, TransportConfig};
use crate::datapath::af_xdp::AfXdp;
use crate::datapath::failover::AfXdpReopen;
use crate::datapath::open::{self, Opened, Use};
use crate::datapath::steering::SteeringHandle;
use crate::datapath::{Capabilities, Datapath, DatapathCounters};
use crate::error::{ConnectError, ConnectionError, StartError};
use crate::handles::{Command as HandleCommand, HandleApp, PoolCommand};
use crate::metrics::prometheus::Certificates;
use crate::metrics::{
    MetricsServer, RateWindow, ShardCounters, ShardMetrics, TransportStats, prometheus,
};
use crate::placement;
use crate::pool::{self, CheckoutError, PeerEndpoint, PoolEvent, PooledConnection, Replay};
use crate::proto::balance::Loads;
use crate::proto::cid::{CidTable, Cids};
use crate::proto::crypto::offload::SealProvider;
use crate::proto::{Protocol, ProtocolSetup, QuicIdentity};
use crate::shard::mailbox::{Command, Mailbox};
use crate::shard::spin::Spinner;
use crate::shard::{Shard, Siblings, worker};
use crate::sys::numa::PreferredNode;

use attempt::Offer;
pub use attempt::{Connecting, Incoming, ZeroRttAccepted};
pub use shutdown::ShutdownReport;

type AppFactory = Box<dyn FnMut(usize) -> Box<dyn ShardApp> + Send>;

/// What the engine's handles and its shards share.
pub(crate) struct EngineShared {
    mailboxes: Arc<[Mailbox]>,
    offers: SegQueue<Offer>,
    offered: Event,
    shards_running: AtomicUsize,
    ended: Event,
    next_shard: AtomicUsize,
    connections_cut_off: AtomicU64,
    streams_cut_off: AtomicU64,
    pool_events: ArrayQueue<PoolEvent>,
    pool_event: Event,
}

impl EngineShared {
    pub(crate) fn new(mailboxes: Arc<[Mailbox]>) -> Self {
        Self {
            shards_running: AtomicUsize::new(mailboxes.len()),
            mailboxes,
            offers: SegQueue::new(),
            offered: Event::new(),
            ended: Event::new(),
            next_shard: AtomicUsize::new(0),
            connections_cut_off: AtomicU64::new(0),
            streams_cut_off: AtomicU64::new(0),
            pool_events: ArrayQueue::new(POOL_EVENTS_QUEUED_MAX),
            pool_event: Event::new(),
        }
    }

    pub(crate) fn mailbox(&self, shard: usize) -> Mailbox {
        self.mailboxes[shard].clone()
    }

    /// Offers a client to whoever accepts.
    pub(crate) fn offer(&self, shard: usize, key: usize, remote: SocketAddrV6, validated: bool) {
        self.offers.push(Offer { shard, key, remote, validated });
        // Additional: a second client wakes a second waiter, though the first one has not run yet.
        self.offered.notify_additional(1);
    }

    /// Adds to what the shutdown cut off; published by [`shard_ended`](Self::shard_ended).
    pub(crate) fn note_cut_off(&self, connections: u64, streams: u64) {
        self.connections_cut_off.fetch_add(connections, Relaxed);
        self.streams_cut_off.fetch_add(streams, Relaxed);
    }

    pub(crate) fn shard_ended(&self) {
        // AcqRel: whoever sees zero sees everything that the shards did.
        self.shards_running.fetch_sub(1, AcqRel);
        self.ended.notify(usize::MAX);
        self.offered.notify(usize::MAX);
        self.pool_event.notify(usize::MAX);
    }

    /// Offers a pool's event to whoever reads; whether an older one had to go for it.
    pub(crate) fn offer_pool_event(&self, event: PoolEvent) -> bool {
        let dropped = self.pool_events.force_push(event);
        self.pool_event.notify(1);
        dropped.is_some()
    }

    fn is_running(&self) -> bool {
        self.shards_running.load(Acquire) > 0
    }
}

/// Builds an [`Engine`].
#[derive(Default)]
pub struct Builder {
    config: TransportConfig,
    identity: QuicIdentity,
    app: Option<AppFactory>,
    seal_provider: Option<Arc<dyn SealProvider>>,
    certificates: Certificates,
}

impl Builder {
    /// The settings and limits.
    #[must_use]
    pub fn config(mut self, config: TransportConfig) -> Self {
        self.config = config;
        self
    }

    /// Accept connections with this TLS configuration
    /// ([`ServerTls::crypto`](crate::certs::ServerTls::crypto)).
    #[must_use]
    pub fn server(mut self, tls: Arc<dyn crypto::ServerConfig>) -> Self {
        self.identity.server = Some(tls);
        self
    }

    /// Make connections with this TLS configuration
    /// ([`ClientTls::crypto`](crate::certs::ClientTls::crypto)).
    #[must_use]
    pub fn client(mut self, tls: Arc<dyn crypto::ClientConfig>) -> Self {
        self.identity.client = Some(tls);
        self
    }

    /// Runs this application on every shard; `make` is called once per shard with its number.
    /// Clients that knock go to it instead of [`Engine::accept`]. A panic in `make` comes out of
    /// [`start`](Self::start), with nothing left running.
    #[must_use]
    pub fn app<A: ShardApp>(mut self, mut make: impl FnMut(usize) -> A + Send + 'static) -> Self {
        self.app = Some(Box::new(move |shard| Box::new(make(shard))));
        self
    }

    /// Has `provider` seal the packets of TLS configurations whose cipher suites were made for it
    /// ([`cipher_suites`](crate::proto::crypto::offload::cipher_suites)).
    #[must_use]
    pub fn seal_provider(mut self, provider: Arc<dyn SealProvider>) -> Self {
        self.seal_provider = Some(provider);
        self
    }

    /// The key that hides servers and shards in connection IDs; engines behind one balancer share
    /// it. The same as [`CidConfig::key`](crate::config::CidConfig::key).
    #[must_use]
    pub fn cid_key(mut self, key: CidKey) -> Self {
        self.config.cid.key = Some(key);
        self
    }

    /// The keys of stateless resets, address tokens and connection IDs, in place of random ones of
    /// this start. Engines behind one balancer that share them open each other's tokens, and a server
    /// that starts again with them ends the connections of its former life at once (RFC 9000 §10.3).
    ///
    /// # Errors
    /// Key derivation failed inside the cryptography library.
    pub fn shared_keys(mut self, keys: &SharedKeys) -> Result<Self, CertsError> {
        self.identity.reset_key = Some(keys.reset_key());
        self.identity.token_key = Some(keys.token_key());
        Ok(self.cid_key(CidKey::new(&keys.connection_id_key()?)))
    }

    /// Where address tokens of servers are kept for the next connections to them, in place of 256
    /// servers' latest in memory: a store may outlive the process.
    #[must_use]
    pub fn token_store(mut self, store: Arc<dyn quinn_proto::TokenStore>) -> Self {
        self.identity.tokens.store = store;
        self
    }

    /// Shows how this identity fares in the statistics and the exported metrics. It does not renew it:
    /// [`ServerTls::spawn_maintenance`](crate::certs::ServerTls::spawn_maintenance) does.
    #[must_use]
    pub fn rotation(mut self, identity: Arc<RotatingIdentity>) -> Self {
        self.certificates.rotation = Some(identity);
        self
    }

    /// Exports these counters, of TLS configurations or trust stores, as
    /// `stoq_certificate_faults_total` with the label `by`; [`Self::rotation`]'s are `identity`.
    #[must_use]
    pub fn faults(mut self, by: &'static str, counters: Arc<FaultCounters>) -> Self {
        self.certificates.faults.retain(|(name, _)| *name != by);
        self.certificates.faults.push((by, counters));
        self
    }

    /// Opens the datapath and starts the shards.
    ///
    /// # Errors
    /// A setting, the datapath, a core or the system refused; nothing is left behind.
    pub fn start(self) -> Result<Engine, StartError> {
        let Self { config, mut identity, app, certificates, seal_provider } = self;
        config.validate()?;
        let mut secret = [0; 64];
        aws_lc_rs::rand::fill(&mut secret).expect("the system gives randomness");
        // All shards share the keys: a token or a reset is good whichever shard sees it.
        identity.reset_key.get_or_insert_with(|| {
            Arc::new(aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &secret[..32]))
        });
        identity.token_key.get_or_insert_with(|| {
            let salt = aws_lc_rs::hkdf::Salt::new(aws_lc_rs::hkdf::HKDF_SHA256, &[]);
            Arc::new(salt.extract(&secret[32..]))
        });
        if let Some(directory) = &config.qlog_dir {
            std::fs::create_dir_all(directory).map_err(|source| StartError::System {
                what: "directory for qlog files (`qlog_dir`)",
                source,
            })?;
        }
        let interface = open::interface_name(&config);
        let placement = placement::place(&config, interface.as_deref())?;
        let cids = Cids::new(CidTable::new(&config.cid, config.shards));
        let opened = {
            // Packet memory and rings are made here; what a pinned shard allocates lies on its node.
            let _near_the_card = placement.node.map(prefer_node);
            let table = cids.table();
            let client_only = identity.server.is_none();
            open::open_for(&config, &Use { table: Some(table.steer_table()), client_only })?
        };
        let mailboxes: Arc<[Mailbox]> = (0..config.shards)
            .map(|_| Mailbox::new(config.mailbox_capacity))
            .collect::<std::io::Result<_>>()
            .map_err(|source| StartError::System { what: "eventfd for a mailbox", source })?;
        // Before any thread: a panic in the application's constructor leaves nothing running.
        let apps = app.map(|mut make| (0..config.shards).map(&mut make).collect());
        let starter = Starter {
            shared: Arc::new(EngineShared::new(mailboxes.clone())),
            siblings: Siblings {
                mailboxes,
                cids,
                loads: Loads::new(config.shards),
                paths: config.careful_resume.then(Arc::default),
            },
            cores: placement.cores,
            config: Arc::new(config),
            certificates,
            identity,
            apps,
            seal_provider,
            node: placement.node,
            threads: Vec::new(),
            metrics: Vec::new(),
        };
        starter.start(opened)
    }
}

/// Takes this thread's new memory from a node while the answer lives; goes without where the
/// system refuses, which costs speed only.
fn prefer_node(node: usize) -> Option<PreferredNode> {
    PreferredNode::set(node)
        .inspect_err(|error| {
            tracing::warn!(node, %error, "set_mempolicy: packet memory may lie on another node");
        })
        .ok()
}

struct Starter {
    shared: Arc<EngineShared>,
    siblings: Siblings,
    config: Arc<TransportConfig>,
    identity: QuicIdentity,
    /// Of the shards that are still to be started, in their order.
    apps: Option<VecDeque<Box<dyn ShardApp>>>,
    seal_provider: Option<Arc<dyn SealProvider>>,
    cores: Vec<Option<core_affinity::CoreId>>,
    threads: Vec<JoinHandle<()>>,
    metrics: Vec<Arc<ShardMetrics>>,
    /// Where packet memory shall lie.
    node: Option<usize>,
    certificates: Certificates,
}

impl Starter {
    fn start(mut self, opened: Opened) -> Result<Engine, StartError> {
        let local = opened.local_addr();
        let metrics_address = self.config.metrics_address;
        let reasons = opened.reasons.clone();
        let xdp = opened.xdp.clone();
        let steering = opened.steering.clone();
        let result = match opened.datapaths {
            open::Datapaths::AfXdp(paths) => match (opened.af_xdp, opened.xdp) {
                (Some(config), Some(program)) if self.config.failover => {
                    let reopen = AfXdpReopen::new(config, program, self.node);
                    self.spawn_with_failover(paths, reopen)
                }
                _ => self.spawn_all(paths),
            },
            open::Datapaths::IoUring(paths) => self.spawn_all(paths),
            open::Datapaths::Socket(paths) => self.spawn_all(paths),
        };
        let engine = Engine {
            shared: self.shared,
            threads: Mutex::new(self.threads),
            metrics: self.metrics,
            pool_width: self.config.pool.connections_per_peer_max,
            local,
            reasons,
            xdp,
            steering,
            rates: Mutex::default(),
            cids: self.siblings.cids,
            exporter: None,
            certificates: self.certificates,
        };
        // An engine that started in part is dropped here, which ends its shards.
        result?;
        engine.with_exporter(metrics_address)
    }

    fn spawn_all<D: Datapath + Send + 'static>(&mut self, paths: Vec<D>) -> Result<(), StartError> {
        let total = self.config.shards;
        for (shard, datapath) in paths.into_iter().enumerate() {
            if let Err(error) = self.spawn(shard, datapath) {
                for _ in shard..total {
                    self.shared.shard_ended();
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// The coordinator's thread comes last: it ends when the shards have ended.
    fn spawn_with_failover(
        &mut self,
        paths: Vec<AfXdp>,
        reopen: AfXdpReopen,
    ) -> Result<(), StartError> {
        let mailboxes = self.siblings.mailboxes.clone();
        let offer =
            move |shard: usize, path| mailboxes[shard].push(Command::Datapath(path)).is_ok();
        let started = reopen.start(paths, &self.config, offer);
        let (paths, coordinator) = started.map_err(|source| {
            for _ in 0..self.config.shards {
                self.shared.shard_ended();
            }
            StartError::System { what: "thread for the failover", source }
        })?;
        let spawned = self.spawn_all(paths);
        self.threads.push(coordinator.into_thread());
        spawned
    }

    fn spawn<D: Datapath + Send + 'static>(
        &mut self,
        shard: usize,
        datapath: D,
    ) -> Result<(), StartError> {
        let capabilities = datapath.capabilities().clone();
        tracing::info!(
            shard,
            datapath = capabilities.kind.name(),
            mode = capabilities.mode,
            interface = capabilities.interface,
            queue = capabilities.queue,
            "shard starts"
        );
        let metrics = Arc::new(ShardMetrics::default());
        metrics.set_path(capabilities);
        self.metrics.push(metrics.clone());
        let mut seed = [0; 32];
        aws_lc_rs::rand::fill(&mut seed).expect("the system gives randomness");
        let probe = SocketAddrV6::new(*self.config.bind.ip(), 1, 0, self.config.bind.scope_id());
        let setup = ProtocolSetup {
            config: self.config.clone(),
            identity: self.identity.clone(),
            cids: self.siblings.cids.clone(),
            loads: self.siblings.loads.clone(),
            paths: self.siblings.paths.clone(),
            shard,
            shards: self.config.shards,
            metrics: metrics.clone(),
            mailbox: self.siblings.mailboxes[shard].clone(),
            mtu_bytes: datapath.max_udp_payload(&probe),
            seed,
        };
        let app = self.apps.as_mut().and_then(VecDeque::pop_front);
        let shared = self.shared.clone();
        let siblings = self.siblings.clone();
        let seal_provider = self.seal_provider.clone();
        let core = self.cores[shard];
        let spin_window = Duration::from_micros(self.config.spin_us);
        let spinner = Spinner::new(self.config.busy_poll, spin_window);
        let thread = std::thread::Builder::new()
            .name(format!("{}{shard}", placement::THREAD_NAME_PREFIX))
            .spawn(move || {
                if let Some(core) = core
                    && !core_affinity::set_for_current(core)
                {
                    tracing::warn!(shard, core = core.id, "could not pin the shard's thread");
                }
                // Sleeps would end up to 50 µs late, so that the kernel may end several at once.
                if let Err(error) = rustix::thread::set_current_timer_slack(NonZeroU64::new(1)) {
                    tracing::warn!(shard, %error, "timers of the shard's thread stay imprecise");
                }
                let proto = Protocol::new(setup, std::time::Instant::now());
                let mailbox = siblings.mailboxes[shard].clone();
                let handles = HandleApp::new(shared);
                let mut shard = Shard::new(
                    datapath,
                    SystemClock,
                    proto,
                    handles,
                    app,
                    mailbox,
                    siblings,
                    metrics,
                );
                if let Some(provider) = seal_provider {
                    shard.set_seal_provider(&*provider);
                }
                worker::run(shard, spinner);
            })
            .map_err(|source| StartError::System { what: "thread for a shard", source })?;
        self.threads.push(thread);
        Ok(())
    }
}

/// Counters of one shard and its datapath.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ShardStats {
    /// What the shard did.
    pub shard: ShardCounters,
    /// What its datapath carried.
    pub datapath: DatapathCounters,
}

/// A running engine. Dropped, it closes every connection at once and ends its threads.
pub struct Engine {
    shared: Arc<EngineShared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    metrics: Vec<Arc<ShardMetrics>>,
    pool_width: usize,
    local: SocketAddrV6,
    reasons: Vec<String>,
    xdp: Option<open::XdpHandle>,
    steering: Option<SteeringHandle>,
    rates: Mutex<RateWindow>,
    cids: Cids,
    exporter: Option<MetricsServer>,
    certificates: Certificates,
}

impl Engine {
    /// Begins an engine.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The address that it is bound to.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddrV6 {
        self.local
    }

    /// Whether at least one shard runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.shared.is_running()
    }

    /// What carries each shard now, and why, where that is not what it was started with: an AF_XDP
    /// device that fails is replaced by the kernel's socket until it is there again (`failover`).
    #[must_use]
    pub fn datapaths(&self) -> Vec<Capabilities> {
        self.metrics.iter().map(|metrics| metrics.path()).collect()
    }

    /// Why this datapath was chosen at the start, and why better ones were not.
    #[must_use]
    pub fn datapath_reasons(&self) -> &[String] {
        &self.reasons
    }

    /// Connects to a peer with the engine's client configuration; shards take turns.
    ///
    /// `server_name` is what the peer's certificate must show: a DNS name or an IPv6 address.
    pub fn connect(&self, remote: SocketAddrV6, server_name: &str) -> Connecting {
        self.connect_on(self.shared.next_shard.fetch_add(1, Relaxed), remote, server_name, None)
    }

    /// Connects with a client configuration of its own.
    pub fn connect_with(
        &self,
        remote: SocketAddrV6,
        server_name: &str,
        tls: Arc<dyn crypto::ClientConfig>,
    ) -> Connecting {
        let config = quinn_proto::ClientConfig::new(tls);
        let shard = self.shared.next_shard.fetch_add(1, Relaxed);
        self.connect_on(shard, remote, server_name, Some(config))
    }

    fn connect_on(
        &self,
        shard: usize,
        remote: SocketAddrV6,
        server_name: &str,
        config: Option<quinn_proto::ClientConfig>,
    ) -> Connecting {
        let (reply, connecting) = Connecting::new();
        let command =
            Command::Connect { remote, server_name: server_name.to_owned(), config, reply };
        let mailbox = &self.shared.mailboxes[shard % self.shared.mailboxes.len()];
        if let Err(Command::Connect { reply, .. }) = mailbox.push(command) {
            let stopped = !self.shared.is_running();
            reply.fail(if stopped { ConnectError::EngineStopped } else { ConnectError::Busy });
        }
        connecting
    }

    /// Lends a connection to a peer from the pool; makes one, which concurrent callers share, where
    /// none is open. A peer's connections live on as many shards as
    /// `pool.connections_per_peer_max` allows, peers are spread over all. Cancel-safe.
    ///
    /// [`Replay::Safe`] allows 0-RTT: the connection may be lent before its handshake is complete.
    ///
    /// # Errors
    /// The handshake failed, the peer's circuit is open, or a limit is reached.
    pub async fn checkout(
        &self,
        endpoint: &PeerEndpoint,
        replay: Replay,
    ) -> Result<PooledConnection, CheckoutError> {
        let shards = self.shared.mailboxes.len();
        let (home, width) = pool::spread(endpoint, shards, self.pool_width);
        let turn = if width > 1 { self.shared.next_shard.fetch_add(1, Relaxed) % width } else { 0 };
        let (reply, answer) = oneshot::channel();
        let command = PoolCommand::Checkout { endpoint: endpoint.clone(), replay, reply };
        self.ask_pool((home + turn) % shards, command)?;
        answer.await.unwrap_or(Err(CheckoutError::Connect(ConnectionError::EngineStopped)))
    }

    /// Keeps at least so many connections to a peer open from now on, over all shards; 0 ends it.
    /// Returns when it is noted, not when they stand: see [`pool_event`](Self::pool_event).
    ///
    /// # Errors
    /// The limits allow fewer, or a shard cannot be reached.
    pub async fn warm_up(
        &self,
        endpoint: &PeerEndpoint,
        connections: usize,
    ) -> Result<(), CheckoutError> {
        let shards = self.shared.mailboxes.len();
        let (home, width) = pool::spread(endpoint, shards, self.pool_width);
        for turn in 0..width {
            let share = connections / width + usize::from(turn < connections % width);
            let (reply, answer) = oneshot::channel();
            let endpoint = endpoint.clone();
            let command = PoolCommand::WarmUp { endpoint, connections: share, reply };
            self.ask_pool((home + turn) % shards, command)?;
            let stopped = Err(CheckoutError::Connect(ConnectionError::EngineStopped));
            answer.await.unwrap_or(stopped)?;
        }
        Ok(())
    }

    fn ask_pool(&self, shard: usize, command: PoolCommand) -> Result<(), CheckoutError> {
        let command = Command::Handles(HandleCommand::Pool(command));
        self.shared.mailboxes[shard].push(command).map_err(|_refused| {
            let stopped = self.shared.mailboxes[shard].is_stopped();
            let error = if stopped { ConnectError::EngineStopped } else { ConnectError::Busy };
            CheckoutError::Connect(ConnectionError::NotStarted(error))
        })
    }

    /// The next event of the pool: connections made, lost and awaited, circuits that open and
    /// close. `None` when the engine has ended. The oldest of 1024 unread ones is dropped and counted
    /// ([`PoolCounters::events_dropped`](crate::metrics::PoolCounters)). Cancel-safe.
    pub async fn pool_event(&self) -> Option<PoolEvent> {
        loop {
            let listener = self.shared.pool_event.listen();
            if let Some(event) = self.shared.pool_events.pop() {
                return Some(event);
            }
            if !self.shared.is_running() {
                return None;
            }
            listener.await;
        }
    }

    /// The next client that knocks; `None` when the engine has ended. Cancel-safe.
    pub async fn accept(&self) -> Option<Incoming> {
        loop {
            let listener = self.shared.offered.listen();
            if let Some(offer) = self.shared.offers.pop() {
                return Some(Incoming::new(offer, self.shared.clone()));
            }
            if !self.shared.is_running() {
                return None;
            }
            listener.await;
        }
    }

    /// Sends a message to the application on a shard.
    ///
    /// # Errors
    /// Gives the message back when the shard's mailbox is full or the engine has ended.
    pub fn send_to_app(
        &self,
        shard: usize,
        message: Box<dyn Any + Send>,
    ) -> Result<(), Box<dyn Any + Send>> {
        match self.shared.mailboxes[shard].push(Command::App(message)) {
            Err(Command::App(message)) => Err(message),
            _ => Ok(()),
        }
    }

    /// Number of shards.
    #[must_use]
    pub fn shards(&self) -> usize {
        self.metrics.len()
    }

    /// Counters of every shard. Costs the shards nothing.
    #[must_use]
    pub fn stats(&self) -> Vec<ShardStats> {
        self.metrics
            .iter()
            .map(|metrics| ShardStats { shard: metrics.shard(), datapath: metrics.datapath() })
            .collect()
    }

    /// Everything that the shards publish, as one value; rates are those since it was read before,
    /// or of the last second. Costs the shards nothing.
    #[must_use]
    pub fn transport_stats(&self) -> TransportStats {
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stats = rates.read(std::time::Instant::now(), self.metrics.iter().map(Arc::as_ref));
        stats.rotation = self.certificates.rotation.as_deref().map(RotatingIdentity::status);
        stats
    }

    /// The statistics as Prometheus text, as `metrics_address` serves them.
    #[must_use]
    pub fn prometheus(&self) -> String {
        let shards = self.metrics.iter().map(Arc::as_ref);
        let steered = SteeringHandle::published(self.steering.as_ref());
        prometheus::render(shards, &steered, &self.certificates)
    }

    /// Where metrics are served, when `metrics_address` asked for it.
    #[must_use]
    pub fn metrics_addr(&self) -> Option<SocketAddrV6> {
        self.exporter.as_ref().map(MetricsServer::local_addr)
    }

    fn with_exporter(mut self, address: Option<SocketAddrV6>) -> Result<Self, StartError> {
        let Some(address) = address else { return Ok(self) };
        let metrics = self.metrics.clone();
        let (steering, certificates) = (self.steering.clone(), self.certificates.clone());
        let render = move || {
            let shards = metrics.iter().map(Arc::as_ref);
            let steered = SteeringHandle::published(steering.as_ref());
            prometheus::render(shards, &steered, &certificates)
        };
        let exporter = MetricsServer::start(address, Arc::new(render)).map_err(|source| {
            StartError::System { what: "listener for metrics (`metrics_address`)", source }
        })?;
        self.exporter = Some(exporter);
        Ok(self)
    }

    /// Makes `config` the configuration of connection IDs from now on: its key, server ID and rotation
    /// bits, which must differ from the current ones. IDs of the configuration before it stay valid
    /// until the next rotation; connections replace them as
    /// [`lifetime_s`](CidConfig::lifetime_s) and migrations say. Give balancers the new configuration
    /// first (draft-ietf-quic-load-balancers §3.1).
    ///
    /// # Errors
    /// A value is out of range, the length is another, or the rotation bits are in use.
    pub fn rotate_cids(&self, config: &CidConfig) -> Result<(), ConfigError> {
        let publish = |table: &_| {
            let set = self.steering.as_ref().map(|kernel| kernel.set_table(table));
            if let Some(Err(error)) = set {
                tracing::warn!(
                    error,
                    "the kernel steers by the old configuration: hand-off instead"
                );
            }
        };
        self.cids.rotate(config, publish)?;
        tracing::info!(rotation = config.rotation, "connection IDs have a new configuration");
        Ok(())
    }

    /// The XDP program's counters by name, where it runs.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn xdp_counters(&self) -> Option<Result<Vec<(&'static str, u64)>, String>> {
        self.xdp.as_ref().map(open::XdpHandle::counters)
    }

    /// What the kernel's steering to shards has done, by name, where its program runs: with more
    /// than one shard on sockets. [`datapath_reasons`](Self::datapath_reasons) says why it does not.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn steering_counters(&self) -> Option<Result<Vec<(&'static str, u64)>, String>> {
        self.steering.as_ref().map(SteeringHandle::counters)
    }
}
