//! Identity: certificates that renew themselves, the CA that issues them, and TLS around both.
//!
//! ```text
//! CertificateAuthority (LocalCa | RemoteCa | AcmeCa | yours) ─► RotatingIdentity ─► ServerTls / ClientTls ─► quinn-proto
//!                                              TrustStore ──────────┘  (roots, CRLs, files watched)
//! trustchain::TrustchainServer puts a CA behind a stream; TrustchainAuthority is its client
//! MaintenanceThread polls: renewals, trust files, ticket keys      SharedKeys: resets, tokens, CIDs
//! ```
//!
//! Everything here runs at start, at handshakes or on the maintenance thread; nothing runs per
//! packet. Dates come from a [`WallClock`], so months of rotation can be tested in seconds.
// Tests may unwrap; the build without tests keeps the lint on for everything else.
#![cfg_attr(test, allow(clippy::unwrap_used))]

#[cfg(feature = "acme")]
pub mod acme;
mod authority;
mod ca_state;
mod constraints;
mod csr;
mod error;
mod fault;
mod keys;
mod local_ca;
mod maintenance;
mod names;
mod padding;
mod pem;
mod provider;
mod resumption;
mod revocations;
mod rotation;
mod schedule;
mod server_session;
mod session;
mod shared_keys;
mod storage;
#[cfg(test)]
pub(crate) mod test_dir;
#[cfg(test)]
mod test_handshake;
mod tickets;
mod tls;
mod trust;
pub mod trustchain;
mod verify;
mod wall_clock;

pub use authority::{CertificateAuthority, CertificateRequest, RenewalWindow};
pub use error::{CaError, CertsError};
pub use fault::{CertificateFault, FaultCounters, start_faults};
pub use keys::KeyAlgorithm;
pub use local_ca::{LocalCa, LocalCaConfig};
pub use maintenance::{MaintenanceThread, Periodic};
pub use names::{CertificateSummary, IdentityNames};
pub use pem::{certificates_from_file, private_key_from_file, revocation_lists_from_file};
pub(crate) use revocations::write_revocation_list;
pub use revocations::{RevocationDesk, RevocationDirectory};
pub use rotation::{IdentityBuilder, RotatingIdentity, RotationEvent, RotationStatus};
pub use schedule::Alarm;
pub use session::{HandshakeInfo, PeerIdentity, explain_peer_alert};
pub(crate) use session::{KeyUpdates, peer_alert_advice};
pub use shared_keys::{SHARED_SECRET_SIZE_BYTES, SharedKeys};
pub use tickets::TicketKeys;
pub use tls::{ClientAuth, ClientTls, ClientTlsBuilder, ServerTls, ServerTlsBuilder};
pub use trust::{TrustStore, TrustStoreBuilder};
pub use wall_clock::{SimWallClock, SystemWallClock, WallClock};
