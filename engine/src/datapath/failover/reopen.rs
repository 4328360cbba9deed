//! AF_XDP behind a failover: which queue belongs to which shard, and the program that they share.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use super::Failover;
use super::backoff::Backoff;
use super::coordinator::{Coordinator, Offer, Reopen};
use crate::config::TransportConfig;
use crate::datapath::Datapath;
use crate::datapath::af_xdp::{self, AfXdp, AfXdpConfig};
use crate::datapath::open::XdpHandle;
use crate::sys::numa::PreferredNode;

/// Times that a busy queue is tried again within one attempt, 10 ms apart; the next attempt is
/// the better place to wait.
const BIND_RETRIES: u32 = 10;

/// What is needed to open the queues of one interface again.
#[derive(Debug)]
pub(crate) struct AfXdpReopen {
    config: AfXdpConfig,
    /// The port that each shard's socket holds.
    ports: Arc<[u16]>,
    program: XdpHandle,
    /// Where packet memory shall lie.
    node: Option<usize>,
}

impl AfXdpReopen {
    /// For datapaths that were opened with `config`; `program` is kept up to date.
    pub(crate) fn new(config: AfXdpConfig, program: XdpHandle, node: Option<usize>) -> Self {
        Self { config, ports: Arc::new([]), program, node }
    }

    /// Wraps the open datapaths of an engine's shards, in order. `offer` pushes a datapath into a
    /// shard's mailbox, and says whether it was taken.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(crate) fn start(
        mut self,
        paths: Vec<AfXdp>,
        config: &TransportConfig,
        mut offer: impl FnMut(usize, Box<dyn Any + Send>) -> bool + Send + 'static,
    ) -> std::io::Result<(Vec<Failover<AfXdp>>, Coordinator)> {
        if let Some(first) = paths.first() {
            self.config.local = first.local_addr();
        }
        self.ports = paths.iter().map(|path| path.local_addr().port()).collect();
        self.config.limits.bind_retries = self.config.limits.bind_retries.min(BIND_RETRIES);
        let mut seed = [0; 8];
        aws_lc_rs::rand::fill(&mut seed).expect("the system gives randomness");
        let backoff = Backoff::new(
            Duration::from_millis(config.failover_backoff_ms_min),
            Duration::from_millis(config.failover_backoff_ms_max),
            u64::from_ne_bytes(seed),
        );
        let offer: Offer<AfXdp> = Box::new(move |shard, path| offer(shard, path));
        Coordinator::start(paths, backoff, self, offer)
    }
}

impl Reopen<AfXdp> for AfXdpReopen {
    fn reopen(&mut self, shard: usize) -> Result<AfXdp, String> {
        // Memory on another node costs speed only.
        let _near_the_card = self.node.and_then(|node| PreferredNode::set(node).ok());
        let program = self.program.interface();
        let opened = af_xdp::reopen(&self.config, shard, &self.ports, &program);
        let path = opened.map_err(|error| error.to_string())?;
        self.program.set_interface(path.interface());
        Ok(path)
    }

    fn check(&mut self) {
        self.program.interface().check_attached();
    }
}
