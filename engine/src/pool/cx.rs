//! The pool as code on the shard sees it.

use super::{Checkout, CheckoutError, Lease, PeerEndpoint, PeerId, PoolCounters, Replay};
use crate::app::{ConnId, ShardCx};

impl ShardCx<'_> {
    /// The id of a peer for [`checkout`](Self::checkout); keep it, looking it up hashes its key.
    ///
    /// # Errors
    /// `pool.peers_max` peers are in use.
    pub fn pool_peer(&mut self, endpoint: &PeerEndpoint) -> Result<PeerId, CheckoutError> {
        self.proto.pool(self.owner).peer(endpoint)
    }

    /// Lends a connection to a peer: at once, without lock or allocation, when an open one is
    /// there; else [`ShardApp::handle_checkout`](crate::app::ShardApp::handle_checkout) brings the
    /// answer with `token` when the handshake, which all waiting callers share, is over.
    ///
    /// # Errors
    /// The id is stale, too many callers wait, or the peer's circuit is open.
    pub fn checkout(&mut self, peer: PeerId, token: u64) -> Result<Checkout, CheckoutError> {
        self.proto.checkout(self.now, self.owner, peer, token, Replay::Unsafe)
    }

    /// As [`checkout`](Self::checkout) for a request that may be executed twice: where `zero_rtt`
    /// and a remembered session allow, the lease is there before the handshake is
    /// ([`Lease::is_early`]).
    ///
    /// # Errors
    /// As [`checkout`](Self::checkout).
    pub fn checkout_replay_safe(
        &mut self,
        peer: PeerId,
        token: u64,
    ) -> Result<Checkout, CheckoutError> {
        self.proto.checkout(self.now, self.owner, peer, token, Replay::Safe)
    }

    /// Gives a lease back. Its connection becomes idle with the last one. A stale lease (the
    /// connection ended) is fine.
    pub fn check_in(&mut self, lease: Lease) {
        let now = self.now;
        self.proto.pool(self.owner).check_in(now, lease);
    }

    /// Keeps at least so many connections to a peer open from now on, lost ones replaced; 0 ends it.
    ///
    /// # Errors
    /// The id is stale, or the limits allow fewer.
    pub fn warm_up(&mut self, peer: PeerId, connections: usize) -> Result<(), CheckoutError> {
        let now = self.now;
        self.proto.pool(self.owner).warm_up(now, peer, connections)
    }

    /// What this shard's pool did and holds.
    #[must_use]
    pub fn pool_counters(&mut self) -> PoolCounters {
        self.proto.pool(self.owner).counters
    }

    /// Whether the server took what was sent on an early lease. `None` while the handshake goes on
    /// and for connections without early data. After `false`, all streams opened before are void,
    /// and their ids will be used again: forget them in
    /// [`ShardApp::handle_connected`](crate::app::ShardApp::handle_connected), before opening new ones.
    #[must_use]
    pub fn early_data_accepted(&self, conn: ConnId) -> Option<bool> {
        self.proto.early_data_accepted(conn)
    }
}
