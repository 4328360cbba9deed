//! Starting the shards of an engine: wraps their datapaths, spawns and pins their threads.

use std::net::SocketAddrV6;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{AppFactory, Engine, EngineShared};
use crate::clock::SystemClock;
use crate::config::TransportConfig;
use crate::datapath::Datapath;
use crate::datapath::af_xdp::AfXdp;
use crate::datapath::failover::AfXdpReopen;
use crate::datapath::open::{self, Opened};
use crate::error::StartError;
use crate::handles::HandleApp;
use crate::metrics::ShardMetrics;
use crate::placement;
use crate::proto::{Protocol, ProtocolSetup, QuicIdentity};
use crate::shard::mailbox::Command;
use crate::shard::spin::Spinner;
use crate::shard::{Shard, Siblings, worker};

/// What an engine is started from, and what is running so far.
pub(super) struct Starter {
    pub(super) shared: Arc<EngineShared>,
    pub(super) siblings: Siblings,
    pub(super) config: Arc<TransportConfig>,
    pub(super) identity: QuicIdentity,
    pub(super) app: Option<AppFactory>,
    pub(super) cores: Vec<Option<core_affinity::CoreId>>,
    pub(super) threads: Vec<JoinHandle<()>>,
    pub(super) metrics: Vec<Arc<ShardMetrics>>,
    /// Where packet memory shall lie.
    pub(super) node: Option<usize>,
}

impl Starter {
    pub(super) fn start(mut self, opened: Opened) -> Result<Engine, StartError> {
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
            shard,
            shards: self.config.shards,
            metrics: metrics.clone(),
            mailbox: self.siblings.mailboxes[shard].clone(),
            mtu_bytes: datapath.max_udp_payload(&probe),
            seed,
        };
        let app = self.app.as_mut().map(|make| make(shard));
        let shared = self.shared.clone();
        let siblings = self.siblings.clone();
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
                let proto = Protocol::new(setup, std::time::Instant::now());
                let mailbox = siblings.mailboxes[shard].clone();
                let handles = HandleApp::new(shared);
                let shard = Shard::new(
                    datapath,
                    SystemClock,
                    proto,
                    handles,
                    app,
                    mailbox,
                    siblings,
                    metrics,
                );
                worker::run(shard, spinner);
            })
            .map_err(|source| StartError::System { what: "thread for a shard", source })?;
        self.threads.push(thread);
        Ok(())
    }
}
