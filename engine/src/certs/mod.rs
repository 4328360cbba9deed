//! Identity: certificates that renew themselves, the CA that issues them, and TLS around both.

mod authority;
mod ca_state;
mod constraints;
mod error;
mod fault;
mod local_ca;
mod names;
mod pem;
mod storage;
#[cfg(test)]
mod test_dir;
mod wall_clock;

pub use authority::{CertificateAuthority, CertificateRequest};
pub use error::{CaError, CertsError};
pub use fault::{CertificateFault, FaultCounters};
pub use local_ca::{LocalCa, LocalCaConfig};
pub use names::{CertificateSummary, IdentityNames};
pub use pem::{certificates_from_file, private_key_from_file, revocation_lists_from_file};
pub use wall_clock::{SimWallClock, SystemWallClock, WallClock};
