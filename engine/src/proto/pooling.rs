//! What the connection pools of a shard are told about its connections, and ask of them.

use std::time::Instant;

use super::{Owner, Protocol, ProtocolSetup};
use crate::app::ConnId;
use crate::error::ConnectionError;
use crate::pool::{Checkout, CheckoutError, EntryId, PeerId, Pool, PoolSetup, Replay};

/// The pools of a new shard, by owner.
pub(super) fn pools(setup: &ProtocolSetup) -> [Pool; 2] {
    let seed = u64::from_le_bytes(setup.seed[8..16].try_into().expect("eight bytes"));
    let (shard, shards) = (setup.shard, setup.shards);
    let total = setup.config.connection_pool_size;
    let make = |seed, shards| {
        Pool::new(PoolSetup {
            limits: setup.config.pool.clone(),
            idle_max: total / setup.shards + usize::from(shard < total % setup.shards),
            shard,
            shards,
            seed,
        })
    };
    // Async callers reach every shard; code on a shard its own pool only.
    [make(seed, shards), make(!seed, 1)]
}

impl Protocol {
    /// The pool of an owner.
    pub(crate) fn pool(&mut self, owner: Owner) -> &mut Pool {
        &mut self.pools[owner as usize]
    }

    /// Lends a pooled connection that is open at this moment, or queues the caller.
    pub(crate) fn checkout(
        &mut self,
        now: Instant,
        owner: Owner,
        peer: PeerId,
        token: u64,
        replay: Replay,
    ) -> Result<Checkout, CheckoutError> {
        // Where 0-RTT is not allowed, no connection is ever early: see `join_pool`.
        let replay_safe = replay == Replay::Safe;
        let conns = &self.conns;
        let is_open = |id: ConnId| {
            conns[id.slot as usize]
                .as_deref()
                .is_some_and(|conn| conn.id == id && !conn.inner.is_closed())
        };
        self.pools[owner as usize].checkout(now, peer, token, replay_safe, is_open)
    }

    /// A pool's attempt became this connection; whether data may be sent before the handshake ends.
    pub(crate) fn join_pool(&mut self, id: ConnId, entry: EntryId) -> bool {
        let zero_rtt = self.config.zero_rtt;
        let conn = self.conn_in_slot(id.slot).expect("just made");
        conn.pool_entry = Some(entry);
        zero_rtt && conn.inner.has_0rtt()
    }

    /// The handshake is complete.
    pub(crate) fn pool_connected(&mut self, now: Instant, id: ConnId) {
        let Some(conn) = self.conn(id) else { return };
        if let (owner, Some(entry)) = (conn.owner, conn.pool_entry) {
            self.pool(owner).handle_connected(now, entry);
        }
    }

    /// The connection is over for its owner.
    pub(crate) fn pool_closed(&mut self, now: Instant, id: ConnId, reason: &ConnectionError) {
        let Some(conn) = self.conn_in_slot(id.slot).filter(|conn| conn.id == id) else { return };
        if let (owner, Some(entry)) = (conn.owner, conn.pool_entry.take()) {
            self.pool(owner).handle_closed(now, entry, reason);
        }
    }

    /// Time passes for the pools.
    pub(crate) fn expire_pools(&mut self, now: Instant) {
        for pool in &mut self.pools {
            pool.handle_timeout(now);
        }
    }

    /// Whether a pool has attempts to start.
    pub(crate) fn pools_have_connects(&self) -> bool {
        self.pools.iter().any(Pool::has_connects)
    }

    /// Shows the pools' counters to other threads.
    pub(crate) fn publish_pools(&self) {
        for (index, pool) in self.pools.iter().enumerate() {
            self.metrics.publish_pool(index, &pool.counters);
        }
    }

    /// The shard ends: the pools make and keep nothing any more.
    pub(crate) fn stop_pools(&mut self) {
        for pool in &mut self.pools {
            pool.stop();
        }
    }

    /// Whether an application may use the connection before its handshake is complete: clients where
    /// 0-RTT is allowed and a session is remembered, servers always (0.5-RTT).
    pub(crate) fn may_be_used_early(&self, id: ConnId) -> bool {
        let Some(connection) = self.connection(id) else { return false };
        connection.side().is_server() || (self.config.zero_rtt && connection.has_0rtt())
    }

    /// Whether there are keys for early data: the client may have sent, the server received some.
    pub(crate) fn has_early_keys(&self, id: ConnId) -> bool {
        self.connection(id).is_some_and(quinn_proto::Connection::has_0rtt)
    }

    /// Whether the server accepted our early data; `None` while the handshake goes on, without early
    /// data, and on servers, which would not have read it.
    pub(crate) fn early_data_accepted(&self, id: ConnId) -> Option<bool> {
        let connection = self.connection(id)?;
        let was_sent = connection.side().is_client() && connection.has_0rtt();
        (was_sent && !connection.is_handshaking()).then(|| connection.accepted_0rtt())
    }
}
