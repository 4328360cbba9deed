//! Connection pool: connections to peers, kept and shared, one pool per shard.
//!
//! ```text
//!   checkout(peer) ─▶ idle, most recently used first ─▶ lease
//!        │            else the next one in use ───────▶ lease (QUIC connections are shared)
//!        │            else the handshake under way ───▶ wait for it, together
//!        ▼            else a new handshake, as the peer's circuit allows
//!   check_in(lease) ─▶ last user gone: idle ─▶ closed after `pool.idle_timeout_ms`,
//!                                             or when more than `connection_pool_size` idle
//! ```
//!
//! The pool lives on the shard's thread, is reached without locks and allocates only when a
//! peer or a connection is new. It hands out connections that quinn-proto calls open at that
//! moment: closed and draining ones never. A connection that was lost while in use, or that a
//! warm-up asked for, is made again with jittered exponential back-off under a circuit breaker;
//! [`PoolEvent`]s tell. Nothing that was sent on a lost connection is sent again.
//!
//! Code on the shard uses [`ShardCx::checkout`](crate::app::ShardCx::checkout); other threads
//! use [`Engine::checkout`](crate::engine::Engine::checkout) or
//! [`StoqTransport`](crate::transport::StoqTransport). The two kinds never share a connection.

mod circuit;
mod cx;
mod handle;
mod list;
mod state;

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::SocketAddrV6;
use std::sync::Arc;
use std::time::Duration;

use quinn_proto::crypto;

use crate::app::ConnId;
use crate::error::ConnectionError;

pub use crate::metrics::PoolCounters;
pub use handle::PooledConnection;
pub(crate) use state::{EntryId, Pool, PoolAction, PoolSetup, spread};

/// A client's TLS configuration as part of a pool's key: it stands for ALPN, client identity and
/// trust. Clones are equal; two profiles made apart never are, whatever they hold, so that no
/// connection is shared across identities or trust.
#[derive(Clone)]
pub struct ClientProfile(Arc<dyn crypto::ClientConfig>);

impl ClientProfile {
    /// Makes a profile; keep it and clone it.
    #[must_use]
    pub fn new(tls: Arc<dyn crypto::ClientConfig>) -> Self {
        Self(tls)
    }

    pub(crate) fn tls(&self) -> Arc<dyn crypto::ClientConfig> {
        self.0.clone()
    }

    /// The configuration's identity: the profile holds it alive, so no other can have its address.
    fn address(&self) -> usize {
        Arc::as_ptr(&self.0).cast::<()>().addr()
    }
}

impl PartialEq for ClientProfile {
    fn eq(&self, other: &Self) -> bool {
        self.address() == other.address()
    }
}

impl Eq for ClientProfile {}

impl Hash for ClientProfile {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.address().hash(state);
    }
}

impl fmt::Debug for ClientProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ClientProfile").finish_non_exhaustive()
    }
}

/// Whom to connect to, and as whom: the pool's key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerEndpoint {
    remote: SocketAddrV6,
    server_name: Arc<str>,
    profile: Option<ClientProfile>,
}

impl PeerEndpoint {
    /// A peer whose certificate must show `server_name` (a DNS name or an IPv6 address), with the
    /// engine's own client configuration.
    #[must_use]
    pub fn new(remote: SocketAddrV6, server_name: &str) -> Self {
        Self { remote, server_name: server_name.into(), profile: None }
    }

    /// Connects with this client configuration instead of the engine's.
    #[must_use]
    pub fn with_profile(mut self, profile: ClientProfile) -> Self {
        self.profile = Some(profile);
        self
    }

    /// The peer's address.
    #[must_use]
    pub fn remote(&self) -> SocketAddrV6 {
        self.remote
    }

    /// The name that its certificate must show.
    #[must_use]
    pub fn server_name(&self) -> &str {
        &self.server_name
    }

    /// The client configuration, where it is not the engine's.
    #[must_use]
    pub fn profile(&self) -> Option<&ClientProfile> {
        self.profile.as_ref()
    }
}

impl fmt::Display for PeerEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.server_name, self.remote)
    }
}

/// A peer that a shard's pool knows. Stale after the pool forgot an unused peer for want of room:
/// a checkout then answers [`CheckoutError::UnknownPeer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerId {
    index: u32,
    generation: u32,
}

/// The right to use a pooled connection, from a checkout until
/// [`ShardCx::check_in`](crate::app::ShardCx::check_in). Others may hold the same connection.
#[must_use = "a lease that is not checked in keeps its connection from becoming idle"]
#[derive(Debug, PartialEq, Eq)]
pub struct Lease {
    conn: ConnId,
    entry: EntryId,
    early: bool,
}

impl Lease {
    /// The connection.
    #[must_use]
    pub fn conn(&self) -> ConnId {
        self.conn
    }

    /// Whether the handshake was still under way when it was lent: what is sent until then is
    /// 0-RTT data, which an attacker can replay (RFC 9001 §9.2) and the server may refuse. Streams
    /// opened early are void after a refusal: see
    /// [`ShardCx::early_data_accepted`](crate::app::ShardCx::early_data_accepted).
    #[must_use]
    pub fn is_early(&self) -> bool {
        self.early
    }
}

/// The answer to a checkout.
#[derive(Debug, PartialEq, Eq)]
pub enum Checkout {
    /// A connection that can be used now.
    Ready(Lease),
    /// A handshake is awaited: [`ShardApp::handle_checkout`](crate::app::ShardApp::handle_checkout)
    /// brings the answer with the caller's token.
    Waiting,
}

/// Whether a request may go out before the handshake ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Replay {
    /// It may not: an attacker could replay it.
    #[default]
    Unsafe,
    /// It may: executing it twice does no harm. Needs `zero_rtt` and a client configuration that
    /// allows early data; else it waits like any other.
    Safe,
}

/// Why a checkout failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckoutError {
    /// The handshake that this caller waited for failed.
    #[error("connecting failed: {0}")]
    Connect(#[from] ConnectionError),
    /// The peer failed too often in a row and is left alone for a while.
    #[error("the peer failed {failures} times in a row; it is tried again in {retry_after:?}")]
    CircuitOpen {
        /// Failures in a row.
        failures: u32,
        /// Time until the next attempt is allowed.
        retry_after: Duration,
    },
    /// `pool.waiters_max` callers wait already.
    #[error("too many callers wait for handshakes; slow down or raise `pool.waiters_max`")]
    TooManyWaiters,
    /// `pool.peers_max` peers are in use.
    #[error("the pool holds as many peers as `pool.peers_max` allows, all in use")]
    TooManyPeers,
    /// The id is stale: the pool forgot the unused peer. Ask for it anew.
    #[error("the pool forgot this unused peer; look it up again")]
    UnknownPeer,
    /// A warm-up asks for more connections than the limits allow.
    #[error(
        "a warm-up to {wanted} connections exceeds the limit of {allowed} \
         (`pool.connections_per_peer_max`, `connection_pool_size`)"
    )]
    WarmUpTooLarge {
        /// Connections asked for.
        wanted: usize,
        /// Connections that this shard's pool may still hold for the peer.
        allowed: usize,
    },
}

/// What happened to a peer of the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PoolEventKind {
    /// A connection stands.
    Connected {
        /// Failed attempts since the last success.
        after_failures: u32,
    },
    /// A connection was lost.
    Lost {
        /// Why.
        reason: ConnectionError,
        /// Leases that were out: their streams failed.
        leases: u32,
    },
    /// An attempt failed; its callers were told.
    AttemptFailed {
        /// Why.
        reason: ConnectionError,
        /// Failures in a row.
        failures: u32,
    },
    /// The pool will connect again by itself.
    ReconnectScheduled {
        /// When, from now.
        after: Duration,
    },
    /// Too many failures: callers are refused.
    CircuitOpened {
        /// For so long.
        retry_after: Duration,
    },
    /// One attempt probes whether the peer is back.
    CircuitHalfOpen,
    /// The peer is back.
    CircuitClosed,
}

/// Something that happened to a peer of the pool. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolEvent {
    /// Whom it concerns.
    pub peer: PeerEndpoint,
    /// The shard on which it happened.
    pub shard: usize,
    /// What happened.
    pub kind: PoolEventKind,
}
