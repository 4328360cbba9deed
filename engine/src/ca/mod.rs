//! The remote CA over STOQ itself: `trustchain/1` as a service and as a client.
//!
//! ```text
//! RotatingIdentity ─ issue ─► RemoteCa ══ QUIC, ALPN trustchain/1 ══► CaService ─► TrustchainServer ─► CA
//!                    shows its current certificate ──┘     └── verifies it against the CA's own root
//! ```
//!
//! Both ends run apart from an application's engine: requests are rare (two a day from each node),
//! signing waits for the disk, and neither may touch a shard that carries traffic. The client makes
//! an engine of one unpinned shard for each request and ends it afterwards.

mod block_on;
mod client;
mod revocations;
mod service;

pub use client::{RemoteCa, RemoteCaConfig};
pub use revocations::RevocationFeed;
pub use service::{CONNECTIONS_MAX, CaService};
