//! A host with several shards: one port with as many receive queues, in virtual time.
//!
//! Packets arrive by the queue that a hash of their source picks, as on a NIC; shards hand over what
//! is not theirs, as in an engine. A shard can be held up, so that what is handed to it piles up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::{hkdf, hmac};

use super::{SimHost, SimHostConfig, siblings};
use crate::app::ShardApp;
use crate::clock::{Clock, SimClock};
use crate::datapath::sim::{SimDatapath, SimNetwork, SimNode};
use crate::error::StartError;
use crate::metrics::ShardCounters;
use crate::proto::QuicIdentity;
use crate::proto::cid::Cids;

/// Several shards on one simulated port.
pub struct SimShards {
    shards: Vec<SimHost>,
    held_until: Vec<Option<Instant>>,
    cids: Cids,
    clock: SimClock,
}

impl SimShards {
    /// A host with `config.shards` shards on `port`; `make` gives each its application. At most
    /// `handoff_datagrams` wait for a shard, others are dropped and counted.
    ///
    /// # Errors
    /// A setting is out of range.
    pub fn new<A: ShardApp>(
        clock: &SimClock,
        network: &SimNetwork,
        port: SimDatapath,
        setup: SimHostConfig,
        handoff_datagrams: usize,
        mut make: impl FnMut(usize) -> A,
    ) -> Result<Self, StartError> {
        let shards = setup.config.shards;
        let siblings = siblings(&setup.config, shards, handoff_datagrams)?;
        let secret = setup.seed.to_le_bytes();
        let identity = QuicIdentity {
            server: setup.server,
            client: setup.client,
            token_key: Some(Arc::new(hkdf::Salt::new(hkdf::HKDF_SHA256, &[]).extract(&secret))),
            reset_key: Some(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &secret))),
            tokens: Default::default(),
        };
        let config = Arc::new(setup.config);
        let further: Vec<SimDatapath> = (1..shards).map(|_| network.open_queue(&port)).collect();
        let queues = std::iter::once(port).chain(further);
        let shards: Vec<SimHost> = queues
            .enumerate()
            .map(|(number, queue)| {
                let seed = setup.seed.wrapping_mul(1000) + number as u64;
                let (config, identity, siblings) =
                    (config.clone(), identity.clone(), siblings.clone());
                SimHost::shard(
                    clock,
                    queue,
                    config,
                    identity,
                    siblings,
                    (number, seed),
                    make(number),
                )
            })
            .collect();
        let held_until = vec![None; shards.len()];
        Ok(Self { shards, held_until, cids: siblings.cids, clock: clock.clone() })
    }

    /// The shards, in order.
    #[must_use]
    pub fn shards(&self) -> &[SimHost] {
        &self.shards
    }

    /// All shards' counters in one sum.
    #[must_use]
    pub fn counters(&self) -> ShardCounters {
        let mut sum = ShardCounters::default();
        for shard in &self.shards {
            sum.add(&shard.counters());
        }
        sum
    }

    /// Gives a shard no turn for so long: a busy core.
    pub fn hold(&mut self, shard: usize, time: Duration) {
        self.held_until[shard] = Some(self.clock.now() + time);
    }

    /// As [`Engine::rotate_cids`](crate::engine::Engine::rotate_cids).
    ///
    /// # Errors
    /// A value is out of range, the length is another, or the rotation bits are in use.
    pub fn rotate_cids(
        &self,
        config: &crate::config::CidConfig,
    ) -> Result<(), crate::config::ConfigError> {
        self.cids.rotate(config, |_| ())
    }
}

impl SimNode for SimShards {
    /// A turn for every shard that is not held up, and again while one hands over to another.
    fn turn(&mut self) -> Option<Instant> {
        let now = self.clock.now();
        loop {
            let mut next: Option<Instant> = None;
            let mut handed_over = 0;
            for (shard, held_until) in self.shards.iter_mut().zip(&mut self.held_until) {
                let deadline = match *held_until {
                    Some(until) if until > now => Some(until),
                    _ => {
                        *held_until = None;
                        let before = shard.counters().rx_handed_over;
                        let deadline = shard.turn();
                        handed_over += shard.counters().rx_handed_over - before;
                        deadline
                    }
                };
                next = match (next, deadline) {
                    (Some(a), Some(b)) => Some(a.min(b)),
                    (a, b) => a.or(b),
                };
            }
            if handed_over == 0 {
                return next;
            }
        }
    }
}
