//! `trustchain/1`: a CA as a service, one request and one answer per stream.
//!
//! ```text
//! node ── enrol (token, CSR) ──► server ── issue(CSR, names of the token) ──► CA
//!      ◄── chain or refusal ────
//! node ── renew (CSR), over a connection authenticated by its current certificate ──► …
//! node ── keys, authenticated alike ──► the secret of all machines with the same names
//! anybody ── list ──► the CA's revocation list
//! ```
//!
//! Bytes in, bytes out: the transport is the caller's ([`crate::ca`] is STOQ's own). The server
//! takes names from the token or from the verified certificate, never from the request. A token
//! certifies once: it is spent before the CA is asked and good again only if the CA said "later".

mod client;
mod codec;
mod tokens;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

pub use client::{TrustchainAuthority, TrustchainTransport};
pub use codec::{
    ANSWER_SIZE_BYTES_MAX, BODY_SIZE_BYTES_MAX, CodecError, FrameReader, Message, RefusalCode,
};
pub use tokens::{TOKENS_MAX, TokenDirectory};

use super::authority::{CertificateAuthority, CertificateRequest};
use super::error::{CaError, CertsError};
use super::fault::{CertificateFault, FaultCounters};
use super::names::IdentityNames;
use super::session::PeerIdentity;
use super::shared_keys::SharedKeys;
use super::wall_clock::WallClock;
use tokens::{TokenRefusal, TokenStore};

/// The application protocol (ALPN).
pub const TRUSTCHAIN_ALPN: &[u8] = b"trustchain/1";

/// The serving side. Shared by all connections.
pub struct TrustchainServer {
    ca: Arc<dyn CertificateAuthority>,
    clock: Arc<dyn WallClock>,
    tokens: TokenStore,
    fleet_keys: Option<SharedKeys>,
    faults: Arc<FaultCounters>,
    enrolled: AtomicU64,
    renewed: AtomicU64,
    refused: AtomicU64,
}

/// What a service did since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TrustchainCounters {
    /// First certificates issued.
    pub enrolled: u64,
    /// Renewals issued.
    pub renewed: u64,
    /// Requests refused, for whatever reason.
    pub refused: u64,
}

impl std::fmt::Debug for TrustchainServer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("TrustchainServer")
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}

impl TrustchainServer {
    /// A server in front of `ca`. Its TLS must verify clients against the CA's own root
    /// ([`ClientAuth::Optional`](super::ClientAuth::Optional)): a renewal trusts that. Tokens live
    /// in memory and end with the process.
    #[must_use]
    pub fn new(ca: Arc<dyn CertificateAuthority>, clock: Arc<dyn WallClock>) -> Self {
        Self {
            ca,
            clock,
            tokens: TokenStore::Memory(std::sync::Mutex::default()),
            fleet_keys: None,
            faults: Arc::default(),
            enrolled: AtomicU64::new(0),
            renewed: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    /// Keeps tokens in a directory, where other processes can make them.
    #[must_use]
    pub fn with_tokens(mut self, directory: TokenDirectory) -> Self {
        self.tokens = TokenStore::Directory(directory);
        self
    }

    /// Hands machines whose certificates carry the same DNS names one secret, derived from `keys`,
    /// for their session tickets ([`SharedKeys::secret_of`]).
    #[must_use]
    pub fn with_fleet_keys(mut self, keys: SharedKeys) -> Self {
        self.fleet_keys = Some(keys);
        self
    }

    /// Makes a token that certifies `names` once within `lifetime`; hexadecimal text.
    ///
    /// # Errors
    /// The names are invalid, too many tokens wait, or it could not be stored.
    pub fn create_token(
        &self,
        names: IdentityNames,
        lifetime: Duration,
    ) -> Result<String, CertsError> {
        self.tokens.create(&names, lifetime, self.clock.now())
    }

    /// What it did so far.
    #[must_use]
    pub fn counters(&self) -> TrustchainCounters {
        TrustchainCounters {
            enrolled: self.enrolled.load(Relaxed),
            renewed: self.renewed.load(Relaxed),
            refused: self.refused.load(Relaxed),
        }
    }

    /// Refused tokens and failed storage by kind.
    #[must_use]
    pub fn faults(&self) -> &Arc<FaultCounters> {
        &self.faults
    }

    /// Answers one request. `peer` is who the connection is authenticated as. May block on the
    /// CA: not for a shard.
    #[must_use]
    pub fn handle_request(&self, request: &Message, peer: Option<&PeerIdentity>) -> Message {
        let (answer, issued) = match request {
            Message::Enrol { token, csr } => (self.enrol(token, csr), &self.enrolled),
            Message::Renew { csr } => (self.renew(csr, peer), &self.renewed),
            Message::Keys => return self.keys(peer),
            Message::List => return self.list(),
            Message::Issued { .. }
            | Message::Refused { .. }
            | Message::Secret { .. }
            | Message::Revoked { .. } => {
                let answer = refusal(RefusalCode::Invalid, "an answer was sent as a request");
                (answer, &self.refused)
            }
        };
        // Relaxed: statistics.
        match &answer {
            Message::Issued { .. } => issued.fetch_add(1, Relaxed),
            _ => self.refused.fetch_add(1, Relaxed),
        };
        answer
    }

    fn enrol(&self, token: &[u8], csr: &[u8]) -> Message {
        let key = tokens::hash(token);
        let grant = match self.tokens.take(&key, self.clock.now()) {
            Ok(Ok(grant)) => grant,
            Ok(Err(why)) => {
                let (code, fault) = match why {
                    TokenRefusal::Spent => (RefusalCode::TokenSpent, CertificateFault::TokenSpent),
                    TokenRefusal::Unknown | TokenRefusal::Expired => {
                        (RefusalCode::TokenInvalid, CertificateFault::TokenInvalid)
                    }
                };
                self.faults.record(fault);
                tracing::warn!(?why, "trustchain: an enrolment token was refused");
                return refusal(code, fault.advice());
            }
            Err(error) => return self.unavailable(&error),
        };
        let answer = self.issue(csr, &grant.names);
        if matches!(&answer, Message::Refused { code: RefusalCode::Unavailable, .. })
            && let Err(error) = self.tokens.put_back(&key)
        {
            // The token stays spent: never certifying twice matters more.
            return self.unavailable(&error);
        }
        answer
    }

    fn renew(&self, csr: &[u8], peer: Option<&PeerIdentity>) -> Message {
        match self.authenticated(peer) {
            Ok(names) => self.issue(csr, names),
            Err(refusal) => refusal,
        }
    }

    fn keys(&self, peer: Option<&PeerIdentity>) -> Message {
        let names = match self.authenticated(peer) {
            Ok(names) => names,
            Err(refusal) => return refusal,
        };
        let Some(keys) = self.fleet_keys.as_ref().filter(|_| !names.dns().is_empty()) else {
            return refusal(
                RefusalCode::Refused,
                "secrets are shared by machines with a DNS name in common, if the CA keeps any",
            );
        };
        match keys.secret_of(names.dns()) {
            Ok(secret) => Message::Secret { secret: secret.to_vec() },
            Err(error) => self.unavailable(&error),
        }
    }

    fn list(&self) -> Message {
        match self.ca.current_revocation_list() {
            Ok(list) => {
                Message::Revoked { list: list.map_or_else(Vec::new, |list| list.as_ref().to_vec()) }
            }
            Err(error) => {
                self.faults.record(error.fault());
                tracing::warn!(%error, "trustchain: no revocation list");
                refusal(RefusalCode::Unavailable, error.to_string())
            }
        }
    }

    /// The names of a peer whose certificate is good now.
    fn authenticated<'a>(
        &self,
        peer: Option<&'a PeerIdentity>,
    ) -> Result<&'a IdentityNames, Message> {
        let Some(peer) = peer else {
            return Err(refusal(
                RefusalCode::Unauthorized,
                "this needs a connection authenticated by the current certificate",
            ));
        };
        // The handshake checked the dates; the connection may have lived long since.
        if let Err(error) = peer.certificate.check_dates(self.clock.now()) {
            self.faults.record(error.fault());
            return Err(refusal(RefusalCode::Unauthorized, error.to_string()));
        }
        // So may a revocation have come since.
        if self.ca.is_revoked(&peer.certificate.serial) {
            let fault = CertificateFault::Revoked;
            self.faults.record(fault);
            tracing::warn!(serial = %peer.certificate.serial, "trustchain: a revoked node asks");
            return Err(refusal(RefusalCode::Unauthorized, fault.advice()));
        }
        Ok(&peer.certificate.names)
    }

    fn issue(&self, csr: &[u8], names: &IdentityNames) -> Message {
        let csr = csr.to_vec().into();
        match self.ca.issue(&CertificateRequest { csr: &csr, names }) {
            Ok(chain) => {
                Message::Issued { chain: chain.iter().map(|one| one.as_ref().to_vec()).collect() }
            }
            Err(error) => {
                let code = match &error {
                    CaError::Unreachable { .. }
                    | CaError::Untrusted { .. }
                    | CaError::Storage(_) => RefusalCode::Unavailable,
                    CaError::InvalidRequest { .. } => RefusalCode::Invalid,
                    CaError::Refused { .. }
                    | CaError::Internal { .. }
                    | CaError::TokenSpent
                    | CaError::TokenInvalid => RefusalCode::Refused,
                };
                self.faults.record(error.fault());
                tracing::warn!(%error, "trustchain: no certificate issued");
                refusal(code, error.to_string())
            }
        }
    }

    fn unavailable(&self, error: &CertsError) -> Message {
        self.faults.record(error.fault());
        tracing::warn!(%error, "trustchain: the service cannot answer");
        refusal(RefusalCode::Unavailable, error.to_string())
    }
}

fn refusal(code: RefusalCode, reason: impl Into<String>) -> Message {
    Message::Refused { code, reason: reason.into() }
}

#[cfg(test)]
mod tests;
