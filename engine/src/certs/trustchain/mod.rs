//! `trustchain/1`: a CA as a service, one request and one answer per stream.
//!
//! ```text
//! node ── enrol (token, CSR) ──► server ── issue(CSR, names of the token) ──► CA
//!      ◄── chain or refusal ────
//! node ── renew (CSR), over a connection authenticated by its current certificate ──► …
//! ```
//!
//! Bytes in, bytes out: the transport is the caller's. The server takes names from the token or
//! from the verified certificate, never from the request. A token certifies once: it is taken out
//! before the CA is asked and put back only if the CA said "later". Tokens live in memory: those
//! that were not used end with the process.

mod codec;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest;
use rustls_pki_types::CertificateDer;

pub use codec::{BODY_SIZE_BYTES_MAX, CodecError, FrameReader, Message, RefusalCode};

use super::authority::{CertificateAuthority, CertificateRequest};
use super::error::{CaError, CertsError};
use super::names::IdentityNames;
use super::session::PeerIdentity;
use super::wall_clock::WallClock;

/// The application protocol (ALPN).
pub const TRUSTCHAIN_ALPN: &[u8] = b"trustchain/1";
/// Most tokens that wait for their use.
const TOKENS_MAX: usize = 16_384;
/// Random bytes in a token.
const TOKEN_SIZE_BYTES: usize = 32;

/// What a token entitles to.
#[derive(Debug)]
struct Grant {
    names: IdentityNames,
    expires: SystemTime,
}

/// The serving side. Shared by all connections.
pub struct TrustchainServer {
    ca: Arc<dyn CertificateAuthority>,
    clock: Arc<dyn WallClock>,
    /// By SHA-256 of the token: the table's look-up then tells nothing about tokens by its time.
    grants: Mutex<HashMap<[u8; 32], Grant>>,
}

impl std::fmt::Debug for TrustchainServer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("TrustchainServer").finish_non_exhaustive()
    }
}

impl TrustchainServer {
    /// A server in front of `ca`. Its TLS must verify clients against the CA's own root
    /// ([`ClientAuth::Optional`](super::ClientAuth::Optional)): a renewal trusts that.
    #[must_use]
    pub fn new(ca: Arc<dyn CertificateAuthority>, clock: Arc<dyn WallClock>) -> Self {
        Self { ca, clock, grants: Mutex::new(HashMap::new()) }
    }

    /// Makes a token that certifies `names` once within `lifetime`; hexadecimal text.
    ///
    /// # Errors
    /// The names are invalid, too many tokens wait, or there is no entropy.
    pub fn create_token(
        &self,
        names: IdentityNames,
        lifetime: Duration,
    ) -> Result<String, CertsError> {
        names.validate()?;
        let mut token = [0; TOKEN_SIZE_BYTES];
        aws_lc_rs::rand::fill(&mut token)
            .map_err(|_| CertsError::crypto("token generation", "no entropy"))?;
        let now = self.clock.now();
        let mut grants = self.grants.lock().expect("no panic while locked");
        grants.retain(|_, grant| grant.expires >= now);
        if grants.len() >= TOKENS_MAX {
            return Err(CertsError::Configuration(format!(
                "{TOKENS_MAX} tokens wait for their use; let some expire"
            )));
        }
        grants.insert(hash(&token), Grant { names, expires: now + lifetime });
        Ok(token.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Answers one request. `peer` is who the connection is authenticated as. May block on the
    /// CA: not for a shard.
    #[must_use]
    pub fn handle_request(&self, request: &Message, peer: Option<&PeerIdentity>) -> Message {
        match request {
            Message::Enrol { token, csr } => self.enrol(token, csr),
            Message::Renew { csr } => self.renew(csr, peer),
            Message::Issued { .. } | Message::Refused { .. } => {
                refusal(RefusalCode::Invalid, "an answer was sent as a request")
            }
        }
    }

    fn enrol(&self, token: &[u8], csr: &[u8]) -> Message {
        let key = hash(token);
        let now = self.clock.now();
        let taken = self.grants.lock().expect("no panic while locked").remove(&key);
        let Some(grant) = taken.filter(|grant| grant.expires >= now) else {
            return refusal(RefusalCode::Unauthorized, "the token is unknown, used or expired");
        };
        let answer = self.issue(csr, &grant.names);
        if matches!(&answer, Message::Refused { code: RefusalCode::Unavailable, .. }) {
            self.grants.lock().expect("no panic while locked").insert(key, grant);
        }
        answer
    }

    fn renew(&self, csr: &[u8], peer: Option<&PeerIdentity>) -> Message {
        let Some(peer) = peer else {
            return refusal(
                RefusalCode::Unauthorized,
                "a renewal needs a connection authenticated by the current certificate",
            );
        };
        // The handshake checked the dates; the connection may have lived long since.
        if let Err(error) = peer.certificate.check_dates(self.clock.now()) {
            return refusal(RefusalCode::Unauthorized, error.to_string());
        }
        self.issue(csr, &peer.certificate.names)
    }

    fn issue(&self, csr: &[u8], names: &IdentityNames) -> Message {
        let csr = csr.to_vec().into();
        match self.ca.issue(&CertificateRequest { csr: &csr, names }) {
            Ok(chain) => {
                Message::Issued { chain: chain.iter().map(|one| one.as_ref().to_vec()).collect() }
            }
            Err(error) => {
                let code = match &error {
                    CaError::Unreachable { .. } | CaError::Storage(_) => RefusalCode::Unavailable,
                    CaError::InvalidRequest { .. } => RefusalCode::Invalid,
                    CaError::Refused { .. } | CaError::Internal { .. } => RefusalCode::Refused,
                };
                tracing::warn!(%error, "trustchain: no certificate issued");
                refusal(code, error.to_string())
            }
        }
    }
}

fn refusal(code: RefusalCode, reason: impl Into<String>) -> Message {
    Message::Refused { code, reason: reason.into() }
}

fn hash(token: &[u8]) -> [u8; 32] {
    digest::digest(&digest::SHA256, token).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// Carries one request to the service and brings the answer: a QUIC stream, in practice.
pub trait TrustchainTransport: Send + Sync {
    /// Sends a framed request, returns the framed answer. Blocks, with a time limit of its own.
    ///
    /// # Errors
    /// [`CaError::Unreachable`] if no answer came.
    fn exchange(&self, request: &[u8]) -> Result<Vec<u8>, CaError>;
}

/// The service as a [`CertificateAuthority`]: enrols with the token once, renews from then on.
///
/// If the answer to an enrolment is lost on its way, the token is spent and the node needs
/// another.
pub struct TrustchainAuthority {
    transport: Box<dyn TrustchainTransport>,
    token: Mutex<Option<Vec<u8>>>,
}

impl std::fmt::Debug for TrustchainAuthority {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("TrustchainAuthority").finish_non_exhaustive()
    }
}

impl TrustchainAuthority {
    /// A client of the service; `token` is the text of
    /// [`TrustchainServer::create_token`], or `None` for a node that has a certificate.
    ///
    /// # Errors
    /// The token is not hexadecimal.
    pub fn new(
        transport: Box<dyn TrustchainTransport>,
        token: Option<&str>,
    ) -> Result<Self, CertsError> {
        let token = token
            .map(|text| {
                super::names::unhex(text).ok_or_else(|| {
                    CertsError::Configuration("the enrolment token is not hexadecimal".to_owned())
                })
            })
            .transpose()?;
        Ok(Self { transport, token: Mutex::new(token) })
    }
}

impl CertificateAuthority for TrustchainAuthority {
    fn issue(
        &self,
        request: &CertificateRequest<'_>,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let mut token = self.token.lock().expect("no panic while locked");
        let csr = request.csr.as_ref().to_vec();
        let message = match token.clone() {
            Some(token) => Message::Enrol { token, csr },
            None => Message::Renew { csr },
        };
        let answer = self.transport.exchange(&message.encode().map_err(CaError::invalid)?)?;
        let answer = FrameReader::default()
            .handle_bytes(&answer)
            .map_err(|error| CaError::Unreachable { reason: error.to_string() })?
            .ok_or_else(|| CaError::Unreachable {
                reason: "the answer was cut short".to_owned(),
            })?;
        match answer {
            Message::Issued { chain } => {
                *token = None;
                Ok(chain.into_iter().map(CertificateDer::from).collect())
            }
            Message::Refused { code, reason } => Err(match code {
                RefusalCode::Unavailable => CaError::Unreachable { reason },
                RefusalCode::Invalid => CaError::InvalidRequest { reason },
                RefusalCode::Refused => CaError::Refused { reason },
                RefusalCode::Unauthorized => {
                    // Spent before a restart, perhaps: the stored certificate may still renew.
                    *token = None;
                    CaError::Refused { reason }
                }
            }),
            Message::Enrol { .. } | Message::Renew { .. } => Err(CaError::Unreachable {
                reason: "the service answered with a request".to_owned(),
            }),
        }
    }
}

#[cfg(test)]
mod tests;
