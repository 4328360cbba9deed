//! Whole shards in virtual time: the engine's everyday protocol test, and `stoq sim`'s motor.
//!
//! A [`SimHost`] is a real shard (its `turn` is the one that runs over AF_XDP) on a
//! [`SimDatapath`], driven by [`run`](crate::datapath::sim::run) in one thread.

#[cfg(test)]
mod failover_tests;
mod runner;
mod shards;
mod workload;

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use quinn_proto::VarInt;
use quinn_proto::crypto;

use crate::app::ShardApp;
use crate::clock::{Clock, SimClock};
use crate::config::{CidConfig, CidKey, HANDOFF_DATAGRAMS_MAX, TransportConfig};
use crate::datapath::Datapath;
use crate::datapath::sim::{EndpointId, SimDatapath, SimNode};
use crate::engine::EngineShared;
use crate::error::StartError;
use crate::handles::HandleApp;
use crate::metrics::{ShardCounters, ShardMetrics};
use crate::proto::balance::Loads;
use crate::proto::cid::{CidTable, Cids};
use crate::proto::crypto::offload::SealProvider;
use crate::proto::{Protocol, ProtocolSetup, QuicIdentity};
use crate::shard::mailbox::{Command, Mailbox, ShutdownOrder};
use crate::shard::{Shard, Siblings};

pub use runner::{RunError, Sample, ScenarioRun, run_scenario};
pub use shards::SimShards;

/// What a simulated host is made of.
pub struct SimHostConfig {
    /// The transport's settings; datapath, shards and cores are ignored.
    pub config: TransportConfig,
    /// Accept connections with this.
    pub server: Option<Arc<dyn crypto::ServerConfig>>,
    /// Make connections with this.
    pub client: Option<Arc<dyn crypto::ClientConfig>>,
    /// Seed of the host's randomness: connection IDs, tokens, quinn-proto's choices.
    pub seed: u64,
}

/// One shard on one simulated port.
pub struct SimHost {
    shard: Shard<SimDatapath, SimClock>,
    mailbox: Mailbox,
    metrics: Arc<ShardMetrics>,
    clock: SimClock,
    endpoint: EndpointId,
    ended: bool,
}

impl SimHost {
    /// A host whose connections belong to `app`.
    ///
    /// # Errors
    /// A setting is out of range.
    pub fn new(
        clock: &SimClock,
        datapath: SimDatapath,
        setup: SimHostConfig,
        app: impl ShardApp,
    ) -> Result<Self, StartError> {
        let identity = QuicIdentity {
            server: setup.server,
            client: setup.client,
            token_key: None,
            reset_key: None,
            tokens: Default::default(),
        };
        let siblings = siblings(&setup.config, 1, HANDOFF_DATAGRAMS_MAX)?;
        let config = Arc::new(setup.config);
        Ok(Self::shard(clock, datapath, config, identity, siblings, (0, setup.seed), app))
    }

    /// One shard of several, with its number and its seed.
    fn shard(
        clock: &SimClock,
        datapath: SimDatapath,
        config: Arc<TransportConfig>,
        identity: QuicIdentity,
        siblings: Siblings,
        (shard, seed_number): (usize, u64),
        app: impl ShardApp,
    ) -> Self {
        let endpoint = datapath.id();
        let (shard, mailbox, metrics) =
            shard_on(clock, datapath, config, identity, siblings, (shard, seed_number), app);
        Self { shard, mailbox, metrics, clock: clock.clone(), endpoint, ended: false }
    }

    /// Has `provider` seal the packets of cipher suites made for it
    /// ([`cipher_suites`](crate::proto::crypto::offload::cipher_suites)).
    pub fn set_seal_provider(&mut self, provider: &dyn SealProvider) {
        self.shard.set_seal_provider(provider);
    }

    /// Sends a message to the application; it is taken with the next turn.
    ///
    /// # Panics
    /// If the mailbox is full: the simulation's author sends too much.
    pub fn send_to_app(&self, message: Box<dyn Any + Send>) {
        assert!(self.mailbox.push(Command::App(message)).is_ok(), "the mailbox is full");
    }

    /// Orders the shard to end at once, as a crash of its process would not: peers are told.
    pub fn shut_down(&self, code: VarInt, reason: &'static [u8]) {
        let order = ShutdownOrder {
            code,
            reason: bytes::Bytes::from_static(reason),
            grace: std::time::Duration::ZERO,
        };
        assert!(self.mailbox.push(Command::Shutdown(order)).is_ok(), "the mailbox is full");
    }

    /// The shard's counters.
    #[must_use]
    pub fn counters(&self) -> ShardCounters {
        self.metrics.shard()
    }

    /// The datapath's counters.
    #[must_use]
    pub fn datapath_counters(&self) -> crate::datapath::DatapathCounters {
        self.metrics.datapath()
    }

    /// Statistics of the host's first connection, while there is one.
    #[must_use]
    pub fn connection_stats(&self) -> Option<crate::proto::ConnectionStats> {
        let proto = self.shard.protocol();
        proto.ids().next().and_then(|id| proto.stats(id))
    }

    /// BBR's state on the host's first connection.
    #[must_use]
    pub fn bbr_state(&self) -> Option<crate::proto::bbr::State> {
        let proto = self.shard.protocol();
        proto.ids().next().and_then(|id| proto.conn(id)).and_then(crate::proto::Conn::bbr_state)
    }

    /// Whether the shard has ended after [`shut_down`](Self::shut_down).
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended
    }
}

type SimShard<D> = (Shard<D, SimClock>, Mailbox, Arc<ShardMetrics>);

/// A shard over any datapath in virtual time.
fn shard_on<D: Datapath>(
    clock: &SimClock,
    datapath: D,
    config: Arc<TransportConfig>,
    identity: QuicIdentity,
    siblings: Siblings,
    (shard, seed_number): (usize, u64),
    app: impl ShardApp,
) -> SimShard<D> {
    let mailbox = siblings.mailboxes[shard].clone();
    let metrics = Arc::new(ShardMetrics::default());
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&seed_number.to_le_bytes());
    let setup = ProtocolSetup {
        mtu_bytes: datapath.max_udp_payload(&datapath.local_addr()),
        config,
        identity,
        cids: siblings.cids.clone(),
        loads: siblings.loads.clone(),
        paths: siblings.paths.clone(),
        shard,
        shards: siblings.mailboxes.len(),
        metrics: metrics.clone(),
        mailbox: mailbox.clone(),
        seed,
    };
    let shard = Shard::new(
        datapath,
        clock.clone(),
        Protocol::new(setup, clock.now()),
        HandleApp::new(Arc::new(EngineShared::new(siblings.mailboxes.clone()))),
        Some(Box::new(app)),
        mailbox.clone(),
        siblings,
        metrics.clone(),
    );
    (shard, mailbox, metrics)
}

/// Mailboxes and connection IDs of `shards` shards; without a key of its own, a fixed one.
fn siblings(
    config: &TransportConfig,
    shards: usize,
    handoff_datagrams: usize,
) -> Result<Siblings, StartError> {
    config.validate()?;
    let source = |source| StartError::System { what: "eventfd for a mailbox", source };
    let mailboxes: Arc<[Mailbox]> = (0..shards)
        .map(|_| Mailbox::without_wait_times(config.mailbox_capacity, handoff_datagrams))
        .collect::<std::io::Result<_>>()
        .map_err(source)?;
    let key = config.cid.key.clone().unwrap_or(CidKey::new(&[0x42; 16]));
    let cid = CidConfig { key: Some(key), ..config.cid.clone() };
    let cids = Cids::new(CidTable::new(&cid, shards));
    let paths = config.careful_resume.then(Arc::default);
    Ok(Siblings { mailboxes, cids, loads: Loads::new(shards), paths })
}

impl SimNode for SimHost {
    fn turn(&mut self) -> Option<Instant> {
        if self.ended {
            return None;
        }
        let turn = self.shard.turn();
        self.ended = turn.ended;
        if turn.more { Some(self.clock.now()) } else { turn.deadline }
    }

    fn endpoint(&self) -> Option<EndpointId> {
        Some(self.endpoint)
    }
}
